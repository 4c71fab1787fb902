"""fedsim partition: who holds which samples of the stream."""

from __future__ import annotations

import argparse

from fedsim.cli.printing import configs_and_overrides, console, line_printer
from fedsim.core.errors import ConfigError

PICTURES = (".png", ".svg", ".pdf")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim partition` takes."""
    configs_and_overrides(command)
    command.add_argument("--picture", metavar="FILE", help=f"draw it ({', '.join(PICTURES)})")
    command.add_argument("--save", metavar="FILE", help="write the manifest, to be used with manifest=FILE")


def run(args: argparse.Namespace) -> int:
    """fedsim partition: the split as a table, a picture, a file."""
    if not args.configs:
        raise ConfigError("no config: give one, e.g. fedsim partition configs/quickstart.yaml partition.alpha=0.1")
    if args.picture and not args.picture.endswith(PICTURES):
        raise ConfigError(f"--picture {args.picture}: the name must end in {', '.join(PICTURES)}")
    from fedsim import simulation
    from fedsim.core import config as configs
    from fedsim.data import show

    manifest, _, notes = simulation.prepare_data(configs.load(args.configs, args.overrides))
    out = console()
    out.print(show.table(manifest))
    print_line = line_printer(out)
    for note in notes:
        print_line(f"note: {note}")
    print_line(f"manifest hash: {manifest.hash}")
    if args.picture:
        show.picture(manifest, args.picture)
        print_line(f"picture: {args.picture}")
    if args.save:
        manifest.save(args.save)
        print_line(f"manifest: {args.save} (manifest={args.save} repeats this split)")
    return 0
