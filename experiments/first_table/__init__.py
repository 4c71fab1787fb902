"""The first table: every preset on the embedded stream."""
