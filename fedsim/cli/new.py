"""fedsim new: a plug-in of your own, or a study, to start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedsim.cli.printing import console, line_printer
from fedsim.core.errors import ConfigError, did_you_mean

SKELETONS = Path(__file__).resolve().parents[1] / "assets" / "skeletons"
NAME = "NAME"  # in a skeleton, what becomes the name of the file


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim new` takes."""
    command.add_argument("kind", metavar="KIND", help=f"{', '.join(kinds())}")
    command.add_argument("file", metavar="FILE", help="for example my_rule.py; it must not be there yet")


def kinds() -> dict[str, Path]:
    """What there is a skeleton of, and where it lies."""
    return {path.stem: path for path in sorted(SKELETONS.iterdir()) if path.suffix in (".py", ".yaml")}


def run(args: argparse.Namespace) -> int:
    """fedsim new: write the skeleton under the name of the file."""
    known = kinds()
    if args.kind not in known:
        raise ConfigError(f"there is no skeleton of '{args.kind}'.{did_you_mean(args.kind, known)}")
    source, path = known[args.kind], Path(args.file).expanduser()
    if path.suffix != source.suffix or not path.stem.isidentifier():
        raise ConfigError(f"{args.file} must be a plain name that ends with {source.suffix}, e.g. my_{args.kind}{source.suffix}")
    text = source.read_text(encoding="utf-8").replace(NAME, path.stem)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as e:
        raise ConfigError(f"{path} is there already: choose another name") from e
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}") from e
    print_line = line_printer(console())
    print_line(f"written to {path}")
    print_line(f"fedsim sweep {path} --dry-run" if args.kind == "study" else f"fedsim check {_as_path(path)}")
    return 0


def _as_path(path: Path) -> str:
    return str(path) if path.is_absolute() or path.parent != Path() else f"./{path}"
