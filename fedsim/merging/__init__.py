"""Modules of finished runs, or of the tasks of one run, merged by any merging rule: `sources` opens them, `merge` merges them,
`heads` solves the head anew, `measure` says what the result knows.

    from fedsim.merging.merge import merge
    from fedsim.merging.sources import of_runs, of_tasks

    merged = merge(of_runs(["runs/a", "runs/b"]), {"name": "ties", "density": 0.3})
    merged.deployed    # its tensors, `adapter.*` and `head.*`
"""
