"""fedsim report: in the making."""

import argparse


def add_arguments(command: argparse.ArgumentParser) -> None: ...


def run(args: argparse.Namespace) -> int:
    return 0
