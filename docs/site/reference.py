"""The reference, made from the code: a page for every plug-in, the keys of a config, the commands, the public face."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import fedsim
from docs.site.links import DOCS, ROOT, Site
from fedsim import cli
from fedsim.cli.list import where
from fedsim.core import config as configs
from fedsim.core import contracts, options, plugins, presets
from fedsim.core.config import schema
from fedsim.core.contracts import Part
from fedsim.core.errors import PluginError
from fedsim.runs.metrics import METRICS

Pages = dict[str, tuple[str, Path]]  # page -> Markdown, and the file that its links are relative to
HERE = DOCS / "index.md"  # generated pages link as if they lay in docs
ORPHAN = "---\norphan: true\n---\n"  # in no menu: its kind's page leads to it, and a menu of all makes every page dear
NAMED = re.compile(r"[a-z_*]+(, [a-z_*]+)*: ")
SUMMARY = {
    "aggregators": "How the server merges clients, every round.",
    "consolidators": "How modules of tasks become the model that is deployed.",
    "calibrators": "How the head is repaired, after a round or at a task's end.",
    "merging": "Maths that knows neither clients nor tasks: for clients, for tasks, and for finished runs.",
    "adapters": "What is trained on the frozen backbone.",
    "heads": "How features become logits.",
    "sources": "Where samples come from.",
    "partitions": "Who holds which of them.",
    "learners": "What a client does beyond SGD, and the server's half of it.",
    "statistics": "What a client can send beside its update.",
    "channels": "What happens to updates on the wire.",
    "pools": "Where clients run.",
    "trackers": "Where a run is shown.",
}  # fmt: skip


def pages(site: Site) -> Pages:
    """All pages of the reference. What links to a plug-in's file is led to the plug-in's page."""
    for kind in plugins.KINDS:
        for name in _names(kind):
            site.page_of[_file(kind, name)] = f"reference/{kind}/{name}"
    out: Pages = {}
    used = _presets_of()
    for kind in plugins.KINDS:
        out[f"reference/{kind}/index"] = (_index(kind), HERE)
        for name in _names(kind):
            out[f"reference/{kind}/{name}"] = (_plugin(kind, name, used.get((kind, name), [])), HERE)
    out["reference/config"] = (_config(), HERE)
    out["reference/commands"] = (_commands(), HERE)
    out["reference/metrics"] = (_metrics(), HERE)
    out["reference/api"] = (_api(), HERE)
    return out


@cache
def _names(kind: str) -> list[str]:
    """The plug-ins of a kind, but for those whose package is not installed here."""
    found = []
    for name in plugins.names(kind):
        with suppress(PluginError):
            plugins.load(kind, name)
            found.append(name)
    return found


def _file(kind: str, name: str) -> Path:
    return ROOT / plugins.KINDS[kind].package.replace(".", "/") / f"{name}.py"


# ---------------------------------------------------------------- plug-ins


def _index(kind: str) -> str:
    """All plug-ins of a kind, a line each."""
    lines = [f"# {kind.capitalize()}", "", SUMMARY[kind], "", f"Named by `{where(kind)}`; see also `fedsim list {kind}`.", ""]
    lines += ["| name | what it is |", "|---|---|"]
    for name in _names(kind):
        file = _file(kind, name).relative_to(ROOT).as_posix()
        lines.append(f"| [{name}](../{file}) | {_cell(escaped(title(_module_text(kind, name))))} |")
    return "\n".join([*lines, ""])


def _plugin(kind: str, name: str, used: Sequence[str]) -> str:
    """One plug-in: where it comes from, what it computes, its options, presets that name it, and its file."""
    cls = plugins.load(kind, name)
    told = options.of(cls)
    lines = [ORPHAN, f"[{kind.capitalize()}](reference/{kind}/index.md)", "", f"# {name}", ""]
    lines += [escaped(title(_module_text(kind, name))), ""]
    lines += prose(without_options(cls.__doc__, [o.name for o in told]))
    if told:
        lines += ["## Options", "", *_table(told), ""]
    lines += ["## In a config", "", "```yaml", *_usage(kind, name, told), "```", ""]
    if issubclass(cls, Part) and (traits := cls.usual_traits().lines()):
        lines += [
            "## With others",
            "",
            *(f"- {escaped(line)}" for line in traits),
            "",
            "[What these words mean](methods.md).",
            "",
        ]
    if used:
        lines += ["## Presets", "", ", ".join(f"`{preset}`" for preset in used), ""]
    file = _file(kind, name).relative_to(ROOT).as_posix()
    return "\n".join([*lines, f"Source: [{file}](../{file}?source)", ""])


def _usage(kind: str, name: str, told: Sequence[options.Option]) -> list[str]:
    """How a YAML names it with its first options."""
    must = [o for o in told if o.default == options.MUST]
    shown = {o.name: "…" if o in must else _yaml(o.default) for o in [*must, *(o for o in told if o not in must)][:3]}
    inner = ", ".join([f"{configs.schema.name_key(kind)}: {name}", *(f"{k}: {v}" for k, v in shown.items())])
    key = where(kind).split(",")[0]
    if key == "asked for by rules":
        return [f"# rules ask for it: StatisticRequest({name!r}, …)"]
    if kind == "merging":
        return ["server:", f"  aggregator: {{name: merged, rule: {{{inner}}}}}"]
    value = name if kind == "pools" else f"[{{{inner}}}]" if kind in ("learners", "trackers", "channels") else f"{{{inner}}}"
    section, _, rest = key.partition(".")
    return [f"{section}:", f"  {rest}: {value}"] if rest else [f"{section}: {value}"]


def _yaml(default: str) -> str:
    return default.replace("{}", "{ }") if default.startswith("{") else default


def _presets_of() -> Mapping[tuple[str, str], list[str]]:
    """Which presets of methods name a plug-in beyond what every run has."""
    found: dict[tuple[str, str], list[str]] = {}
    for preset in presets.names(presets.METHODS):
        config = configs.load(["omniglot", preset])
        for kind, _, section in configs.schema.plugin_sections(config):
            if kind not in ("sources", "partitions"):
                names = found.setdefault((kind, section[configs.schema.name_key(kind)]), [])
                names += [] if preset in names else [preset]
    return {key: names for key, names in found.items() if len(names) < 20}


def _module_text(kind: str, name: str) -> str:
    return sys.modules[plugins.load(kind, name).__module__].__doc__ or ""


def title(text: str) -> str:
    """The first paragraph of a module's docstring."""
    return " ".join(inspect.cleandoc(text).split("\n\n")[0].split())


def _table(told: Sequence[options.Option]) -> Iterator[str]:
    """Two columns, which a phone has room for: the option with its type and default, and what it means."""
    yield from ("| option | meaning |", "|---|---|")
    for o in told:
        default = f" = `{o.default}`"
        if o.default == options.MUST:
            default = ", must be given"
        elif o.type.endswith("Config"):
            default = ", a section: see below"
        yield f"| `{o.name}`: {_cell(escaped(o.type) + default)} | {_cell(escaped(o.meaning))} |"


# ---------------------------------------------------------------- text


def without_options(text: str | None, names: list[str]) -> str:
    """A docstring without what the table of options says; what stands behind it in a paragraph stays."""
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", inspect.cleandoc(text or "")):
        start, rest = options.around(paragraph, names)
        kept.append("\n".join(part for part in (start, rest) if part))
    return "\n\n".join(paragraph for paragraph in kept if paragraph.strip())


def prose(text: str) -> list[str]:
    """A docstring as Markdown: what is indented or has gaps is an equation or a table, and stays as it is; the rest flows."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        for indented, block in _runs(paragraph.split("\n")):
            if indented:
                lines += ["```text", *inspect.cleandoc("\n" + "\n".join(block)).split("\n"), "```", ""]
            else:
                lines += [escaped(" ".join(" ".join(block).split())), ""]
    return lines


def _runs(lines: Sequence[str]) -> Iterator[tuple[bool, list[str]]]:
    """Lines in a row that are set as they are, or that flow; what hangs below `name: meaning` flows with it, by itself."""
    hanging, place, placed = False, 0, []
    for line in lines:
        indented = line.startswith("  ")
        begins = not indented and NAMED.match(line) is not None
        hanging = begins or (hanging and indented)
        as_it_is = "  " in line.strip() or (indented and not hanging)
        place += begins
        placed.append((as_it_is, place, line))
    for (as_it_is, _), block in itertools.groupby(placed, lambda one: one[:2]):
        yield as_it_is, [line for *_, line in block]


def escaped(text: str) -> str:
    """Plain text as Markdown, code in backticks being left as it is."""
    parts = re.split(r"(`[^`]+`)", text)
    plain = [part if i % 2 else re.sub(r"([\\`*_\[\]<>#~^$])", r"\\\1", part) for i, part in enumerate(parts)]
    return re.sub(r"^(\d+)([.)] )|^([-+]) ", lambda m: f"{m[1]}\\{m[2]}" if m[1] else f"\\{m[3]} ", "".join(plain))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# ---------------------------------------------------------------- config, commands, public face


def _config() -> str:
    """Every key of the schema."""
    lines = [
        "# Keys of a config", "",
        "A config is a YAML of these keys; all have defaults. On the command line a key is written with dots: `client.lr=1e-2`.",
        "Sections that name a plug-in hold its options too: [all plug-ins](methods.md). `extends:` names presets or files",
        "on which a YAML builds; `${seed}` means the value of another key.", "",
    ]  # fmt: skip
    lines += ["## At the top", "", *prose(_head(schema.SimConfig)), *_table(options.of(schema.SimConfig)), ""]
    for key, section in schema.SECTIONS.items():
        lines += [f"## `{key}`", "", *prose(_head(section)), *_table(options.of(section)), ""]
    for key, section in (("stream.noise", schema.NoiseConfig), ("client.groups", schema.ParameterGroup)):
        lines += [f"## `{key}`", "", *prose(_head(section)), *_table(options.of(section)), ""]
    moving = ", ".join(f"`runtime.{key}`" for key in schema.MOVES_BITS)
    lines += ["## What may move bits", "", f"Of `runtime`, {moving} and a pool of your own are part of what a run is.", ""]
    return "\n".join(lines)


def _head(section: Any) -> str:
    return without_options(section.__doc__, [f.name for f in dataclasses.fields(section)])


def _commands() -> str:
    """Every command with its arguments, from its parser."""
    lines = ["# Commands", "", "`fedsim COMMAND --help` says the same. Errors are one line; the exit code is 0 when all went",
             "well, 2 for bad input, 1 when something failed on the way, 130 when it was stopped.", ""]  # fmt: skip
    for name, parser in cli.parsers().items():
        lines += [f"## fedsim {name}", "", f"{escaped(parser.description or '')}", "", "| argument | meaning |", "|---|---|"]
        for action in parser._actions:
            if action.help != argparse.SUPPRESS and "--help" not in action.option_strings:
                lines.append(f"| {_cell(_argument(action))} | {_cell(escaped(action.help or ''))} |")
        lines.append("")
    return "\n".join(lines)


def _metrics() -> str:
    """The table of metrics."""
    lines = ["# Metrics", "", "One table, read by results, reports, trackers and commands. Its definitions, with",
             "sources, are in [its file](../fedsim/runs/metrics.py); [what they are called elsewhere](elsewhere.md).", "",
             "| name | what it is | unit | better | needs |", "|---|---|---|---|---|"]  # fmt: skip
    for metric in METRICS.values():
        told = (f"`{metric.name}`", metric.title, metric.unit or "–", metric.better or "–", metric.needs)
        lines.append(f"| {' | '.join(_cell(escaped(text)) for text in told)} |")
    return "\n".join([*lines, ""])


def _argument(action: argparse.Action) -> str:
    metavar = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    value = "" if action.nargs == 0 else metavar if isinstance(metavar, str) else " ".join(metavar)
    names = action.option_strings or [""]
    return ", ".join(f"`{' '.join(part for part in (name, value) if part)}`" for name in names)


def _api() -> str:
    """What `import fedsim` gives, grouped by where it lies."""
    lines = ["# Python", "", "`import fedsim` gives these names, and imports what is behind one when it is asked for.", ""]
    groups: dict[str, list[str]] = {}
    for name in fedsim.__all__:
        found = getattr(fedsim, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            contract = name in contracts.__all__
            groups.setdefault("Contracts to derive from" if contract else "Runs and results", []).append(name)
    for group in sorted(groups, reverse=True):
        lines += [f"## {group}", ""]
        for name in sorted(groups[group], key=lambda name: (name[0].isupper(), name)):
            lines += _described(name, getattr(fedsim, name))
    return "\n".join(lines)


def _described(name: str, found: Any) -> Iterator[str]:
    """A class with its own public methods, or a function."""
    yield from (f"### {name}", "", "```python", signature(name, found), "```", "")
    yield from prose(inspect.cleandoc(found.__doc__ or ""))
    if not inspect.isclass(found):
        return
    for key, member in vars(found).items():
        target = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if key.startswith("_") or not inspect.isfunction(target):
            continue
        text = inspect.cleandoc(target.__doc__ or "")
        head = f"{key}" if isinstance(member, property) else signature(key, target)
        yield from ("```python", head, "```", "", *prose(text))


def signature(name: str, found: Any) -> str:
    """`name(arguments) -> result`, an argument a line where it is long."""
    try:
        said = inspect.signature(found)
    except (TypeError, ValueError):
        return name
    shown = [re.sub(r": '([^']*)'", r": \1", str(p)) for p in said.parameters.values()]
    result = "" if said.return_annotation is inspect.Signature.empty else f" -> {said.return_annotation}"
    line = f"{name}({', '.join(shown)}){result}".replace("<factory>", "...")
    if len(line) <= 90:
        return line
    return f"{name}(\n" + "".join(f"    {p},\n" for p in shown).replace("<factory>", "...") + f"){result}"
