"""Which plug-in an error came from: its place in the config, and its name or file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from fedsim.core import plugins
from fedsim.core.config.schema import PLUGIN_KEYS, SERVER_PLUGIN_KEYS
from fedsim.core.contracts import Plugin, Pool
from fedsim.core.errors import FedsimError, PluginFailed, one_line

PLACES = {
    **{kind: key for key, kind in PLUGIN_KEYS.items()},
    **{kind: f"server.{key}" for key, kind in SERVER_PLUGIN_KEYS.items()},
    "learners": "client.learners",
}


def who(part: Plugin) -> str:
    """server.aggregator /home/me/my.py | client.learners scaffold | adapter lora."""
    kind = kind_of(part)
    return f"{PLACES.get(kind, plugins.singular(kind))} {name_of(part)}".rstrip()


def kind_of(part: Plugin) -> str:
    """The key of `plugins.KINDS`."""
    return next(kind for kind, what in plugins.KINDS.items() if isinstance(part, what.contract))


def name_of(part: Plugin) -> str:
    """Its name, its dotted module, or the path of its file; nothing for what a list of rules becomes."""
    module = type(part).__module__
    if module.startswith(plugins.USER_FILE):
        return str(getattr(sys.modules.get(module), "__file__", None) or module)
    name = module.removeprefix(f"{plugins.KINDS[kind_of(part)].package}.")
    return "" if name.startswith("_") and not name.startswith("__") else name


@contextmanager
def blamed(when: str) -> Iterator[None]:
    """Errors that nobody expected, of code that was called on a plug-in, become a PluginFailed of one line that names the
    plug-in, the method and when it was. Others go through: those of fedsim say by themselves who is to blame.

    Of plug-ins that call each other the innermost of the user's own is named, else the innermost."""
    try:
        yield
    except FedsimError:
        raise
    except Exception as e:
        found = list(_plugins_in(e.__traceback__))
        own = [(part, method) for part, method in found if plugins.is_own(kind_of(part), type(part).__module__)]
        if not found:
            raise
        part, method = (own or found)[-1]
        advice = f"hold it against the laws with fedsim check {name_of(part)}" if own else "run with --debug for the traceback"
        raise PluginFailed(f"{who(part)}: {when}: {method} fails: {one_line(e)}: {advice}") from e


def _plugins_in(trace: TracebackType | None) -> Iterator[tuple[Plugin, str]]:
    """The plug-ins whose methods an error came through, from the outermost, with the names of the methods. A pool is none of
    them: it runs what others say."""
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
        part = frame.f_locals.get("self")
        if isinstance(part, Plugin) and not isinstance(part, Pool):
            yield part, frame.f_code.co_name
