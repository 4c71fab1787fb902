"""Every merging rule over the tasks of one run."""
