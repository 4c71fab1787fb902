"""What the server does: the round loop, merging rules, evaluation and checkpoints. Read `loop.py` first."""
