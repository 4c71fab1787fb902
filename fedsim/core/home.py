"""Which fedsim this is, where it lies, and that the names of its packages mean its packages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

__version__ = "0.8.0"

ROOT = str(Path(__file__).resolve().parents[2])


def ours_first() -> Callable[[str], None]:
    """A function for a worker process to call, with our `ROOT`, before it imports anything of ours: what it finds is ours then.

    Made in a function, so that it travels by value: what travels by name is imported in the worker process before any line of
    ours runs there, and would find a `clients.py` of the user's working directory.
    """

    def put_first(root: str) -> None:
        import os
        import sys

        if root in sys.path:
            sys.path.remove(root)
        sys.path.insert(0, root)
        for name in [n for n in sys.modules if n.split(".")[0] in ("fedsim", "clients", "server")]:  # a decoy, imported before us
            ours = os.path.join(root, name.split(".")[0], "")
            if not str(getattr(sys.modules[name], "__file__", None) or ours).startswith(ours):
                del sys.modules[name]

    return put_first


def claim_names() -> None:
    """Make `clients` and `server` mean our packages here too, where a file beside the user's script may have that name.

    Raises ImportError, in one line that names the file, if it was imported before: somebody uses it.
    """
    for name in ("clients", "server"):
        there, ours = sys.modules.get(name), PathFinder.find_spec(name, [ROOT])
        if ours is None or ours.loader is None:  # not where fedsim lies: left to Python
            continue
        if there is None:
            sys.modules[name] = module_from_spec(ours)
            ours.loader.exec_module(sys.modules[name])
        elif (file := getattr(there, "__file__", None)) and Path(file).resolve() != Path(str(ours.origin)).resolve():
            raise ImportError(f"{file} stands in the way of fedsim, which has a package named '{name}': rename that file")
