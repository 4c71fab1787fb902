"""Data: sources, streams of tasks, partitions over clients, and the manifest that pins them."""
