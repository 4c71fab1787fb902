"""Speed as ratios within one run of a script, since machines are noisy: `python -m experiments.benchmarks` lists them."""
