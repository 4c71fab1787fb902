"""fedsim results: the runs of a folder as one table, with statistics over seeds."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedsim.cli.printing import capped, console, counted, line_printer, new_table, short
from fedsim.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from fedsim.runs.collection import Collection


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `fedsim results` takes."""
    command.add_argument("paths", nargs="+", metavar="PATH", help="a folder of runs, a run directory, or a CSV of this command")
    command.add_argument("--sweep", metavar="NAME", help="the runs of this sweep, where a folder holds several")
    command.add_argument("--all", action="store_true", help="every run that lies there, whatever sweep it belongs to")
    command.add_argument(
        "--metrics", metavar="A,B,…", help="columns of the CSV, or short names such as faa, aia, bwt (default: the usual ones)"
    )
    command.add_argument(
        "--baseline", action="append", default=[], metavar="FACTOR=LEVEL", help="compare with it, run by run, e.g. method=fedavg"
    )
    command.add_argument("--joint", metavar="PATH", help="runs on all data at once: adds gap_to_joint and intransigence")
    command.add_argument("--rows", metavar="FACTOR", help="what goes down in --markdown and --latex (default: the first)")
    command.add_argument("--csv", metavar="FILE", help="one row per run, every column; - for the standard output")
    command.add_argument("--parquet", metavar="FILE", help="the same as Parquet")
    command.add_argument("--with-path", action="store_true", help="keep the column in them that says where a run lies")
    command.add_argument("--markdown", metavar="FILE", help="the table with the best in bold; - for the standard output")
    command.add_argument("--latex", metavar="FILE", help="the same for booktabs; - for the standard output")
    command.add_argument("--digits", type=int, default=1, metavar="N", help="decimals (default: 1)")


def run(args: argparse.Namespace) -> int:
    """fedsim results: statistics per setting, paired differences, files, and what is not in them."""
    _check(args)
    from fedsim.core.files import write_atomic
    from fedsim.runs import compare, tables
    from fedsim.runs.collection import collect

    collection = collect(args.paths, args.sweep, args.all)
    frame = compare.gap_to_joint(collection, collect([args.joint])) if args.joint else collection.frame()
    by = list(collection.factors)
    metrics = chosen_metrics(args.metrics, collection, frame)
    long = compare.summary(frame, by, metrics)
    differences = compare.paired(frame, by, parse_baseline(args.baseline), metrics) if args.baseline else None
    texts: dict[str, Any] = {
        "csv": lambda: tables.to_csv(frame, args.with_path),
        "markdown": lambda: tables.to_markdown(long, args.rows, args.digits, collection.factors, collection.unlike_text),
        "latex": lambda: tables.to_latex(long, args.rows, args.digits, collection.factors, collection.unlike_text),
        "parquet": lambda: tables.to_parquet(frame, args.with_path),
    }
    wanted = {kind: make() for kind, make in texts.items() if getattr(args, kind)}
    notes = [*remarks(collection, frame, by, args)]
    for kind, content in wanted.items():
        target = getattr(args, kind)
        if target != "-":
            write_atomic(target, content if isinstance(content, bytes) else content.encode(), "free space, then try again")
            notes.append(f"{kind}: {target}")
    piped = [content for kind, content in wanted.items() if getattr(args, kind) == "-"]
    if piped:
        sys.stdout.write(piped[0])
        sys.stderr.writelines(f"fedsim: {note}\n" for note in notes)
        return 0
    out = console()
    print_line = line_printer(out)
    for table in summary_tables(collection, long, by, args.digits, out.width):
        out.print(table)
        print_line("")
    print_line("Mean ± standard deviation over runs, 95 % interval of the mean (Student's t, as far as the metric can go).")
    if differences is not None:
        for table in paired_tables(differences, by, args.baseline, args.digits, out.width):
            print_line("")
            out.print(table)
        print_line("")
        print_line(paired_legend(differences))
    for note in notes:
        print_line(note)
    return 0


def chosen_metrics(wanted: str | None, collection: Collection, frame: pd.DataFrame) -> list[str]:
    """Names of columns from "faa,forgetting"; the default ones that some run has. Raises ConfigError for an unknown name."""
    from fedsim.runs import metrics
    from fedsim.runs.collection import NAMED

    words = {*NAMED, *collection.factors, *collection.varying}
    known = [str(c) for c in frame.columns if c not in words]
    if wanted is None:
        usual = [m.name for m in metrics.shown("results") if m.name in known and frame[m.name].notna().any()]
        return usual or [metrics.HEADLINE]
    names, aliases = list[str](), metrics.aliases()
    for word in filter(None, (part.strip() for part in wanted.split(","))):
        name = aliases.get(word.lower(), word)
        if metrics.of(name).needs == "a joint run" and name not in known:
            raise ConfigError(f"metric '{word}' needs a joint run: give --joint PATH")
        if name not in known:
            raise ConfigError(f"unknown metric '{word}'.{did_you_mean(word, [*known, *aliases])}")
        names.append(name)
    if not names:
        raise ConfigError("--metrics names none: leave it out, or give names such as faa,forgetting")
    return list(dict.fromkeys(names))


def parse_baseline(words: Sequence[str]) -> dict[str, str]:
    """["method=fedavg"] as a mapping. Raises ConfigError."""
    for word in words:
        if "=" not in word:
            raise ConfigError(f"--baseline {word}: it must look like FACTOR=LEVEL, e.g. method=fedavg")
    found: dict[str, str] = {}
    for name, level in (word.split("=", 1) for word in words):
        if name in found:
            raise ConfigError(f"--baseline names {name} twice: there is one baseline")
        found[name] = level
    return found


def remarks(collection: Collection, frame: pd.DataFrame, by: Sequence[str], args: argparse.Namespace) -> Iterator[str]:
    """What is not in the numbers, and what makes them hard to compare, one line each."""
    from fedsim.runs import bounds, compare, metrics
    from fedsim.runs.collection import sweeps

    if not collection.known:  # those of the runs at hand would be of some seeds only
        yield from known.lines if (known := bounds.common([run.results for run in collection.runs])) else ()
    else:
        tables = ", ".join(dict.fromkeys(short(run.table) for run in collection.known))
        yield f"{counted(len(collection.known), 'run')} of {len(collection.members)} as {tables} has them."
    for note in collection.sweep.notes if collection.sweep else ():
        yield f"{note}: left out there."
    names = sweeps(args.paths)
    if collection.sweep is None and not args.all and len(names) > 1:
        yield f"The sweeps {', '.join(names)} lie there: all runs are taken (--sweep NAME takes those of one)."
    for setting, places in compare.settings(frame, by).items():
        seeds = frame["seed"].iloc[places]
        if seeds.duplicated().any():
            yield f"{compare.describe(by, setting)} holds runs of the same seed, and their mean counts every one."
    if args.joint and (without := int(frame[metrics.GAP].isna().sum())):
        yield f"{without} of {len(frame)} runs have no gap to joint: no joint run was tested on the same samples."
    lacking = compare.unequal_seeds(frame, by)
    if lacking:
        yield "Seeds are unequal:"
        yield from capped([f"{compare.describe(by, s)} lacks seed {', '.join(map(str, seeds))}" for s, seeds in lacking.items()])
    if collection.absent:
        yield f"Not in the data, {len(collection.absent)} in all:"
        yield from capped([f"{absent.what}: {absent.reason}" for absent in collection.absent])
    if collection.others:
        runs = "finished run lies" if collection.others == 1 else "finished runs lie"
        yield f"{collection.others} other {runs} there, left out (--all takes every run)."


def summary_tables(collection: Collection, long: pd.DataFrame, by: Sequence[str], digits: int, width: int) -> Iterator[Table]:
    """One row per setting: n, and per metric mean ± std with its interval; in several tables where the metrics do not fit."""
    from fedsim.runs import compare, metrics
    from fedsim.runs.tables import number, title

    found = compare.settings(long, by)
    names = list(dict.fromkeys(long["metric"]))
    most = [max(int(long["n"].iloc[i]) for i in places) for places in found.values()]
    heads, labels = _settings_columns(by, list(found), width)
    columns: dict[str, list[list[str]]] = {"n": [[str(n)] for n in most]}
    for k, metric in enumerate(names):
        cells = []
        for places, n_most in zip(found.values(), most, strict=True):
            n, mean, std, low, high = (long[c].iloc[places[k]] for c in ("n", "mean", "std", "low", "high"))
            if not n:
                cells.append(["–"])
                continue
            text = [number(v, metric, digits) for v in (mean, std, *metrics.of(metric).cut(low, high))]
            lines = [f"{text[0]} ± {text[1]}", f"[{text[2]}, {text[3]}]"] if n > 1 else [text[0]]
            cells.append([lines[0] + (f" (n={n})" if n < n_most else ""), *lines[1:]])
        columns[title(metric)] = cells
    what = f"{collection.sweep.name}: " if collection.sweep else ""
    name = f"{what}{counted(len(collection.members), 'run')}, {counted(len(found), 'setting')}"
    yield from _fitted("\n".join(filter(None, (name, collection.unlike_text))), heads, labels, columns, width)


def paired_tables(table: pd.DataFrame, by: Sequence[str], baseline: Sequence[str], digits: int, width: int) -> Iterator[Table]:
    """Per metric one row per setting: pairs, mean difference with its interval, and what the tests say."""
    from fedsim.runs import compare, metrics
    from fedsim.runs.tables import number, title

    for metric in dict.fromkeys(table["metric"]):
        part = table[table["metric"] == metric]
        found = compare.settings(part, by)
        heads, labels = _settings_columns(by, list(found), width)
        records = [part.iloc[places[0]] for places in found.values()]
        columns: dict[str, list[list[str]]] = {"n": [[str(r["n"])] for r in records]}
        if part["unpaired"].any():
            columns["un-\npaired"] = [[str(r["unpaired"])] for r in records]
        cells = []
        for r in records:
            low, high = metrics.of(metric).cut_difference(r["low"], r["high"])
            values = {"difference": r["difference"], "std": r["std"], "low": low, "high": high}
            texts = {name: number(value, metric, digits) for name, value in values.items() if not math.isnan(value)}
            if not texts:
                cells.append(["–"])
                continue
            plus = "+" if texts["difference"].strip("0.−") and r["difference"] > 0 else ""
            interval = [f"[{texts['low']}, {texts['high']}]"] if "low" in texts else []
            cells.append([f"{plus}{texts['difference']}" + (f" ± {texts['std']}" if "std" in texts else ""), *interval])
        columns["difference"] = cells
        for head, name in (("p\nt-test", "p"), ("p\nHolm", "p_holm"), ("p sign-\nflip", "p_sign_flip")):
            columns[head] = [[_p(r[name])] for r in records]
        if metrics.of(metric).sign:
            columns["wins"] = [[f"{r['wins']:.0f}/{r['n']}"] for r in records]
        yield from _fitted(f"{title(metric)}: difference from {', '.join(baseline)}", heads, labels, columns, width)


def paired_legend(table: pd.DataFrame) -> str:
    """What was tested, and what the tests cannot say."""
    pairs = [int(n) for n in table["n"] if n]
    floor = f" With {min(pairs)} pairs sign-flip cannot go below {2 / 2 ** min(pairs):.2g}." if pairs else ""
    return (
        "Differences run by run, same split and same seed. t-test: paired, two-sided, takes the differences as normal. "
        "Holm: the same p, corrected for all comparisons of its metric. Sign-flip: exact, takes the differences as symmetric."
        f"{floor} wins: pairs in which the setting is better. – in a test: fewer than two pairs, or no spread."
    )


Lines = Sequence[str]  # of a cell


def _fitted(
    title: str, heads: Sequence[str], labels: Sequence[Sequence[str]], columns: Mapping[str, Sequence[Lines]], width: int
) -> Iterator[Table]:
    """One table where the columns fit; else with the lines of a cell below each other; else in several tables."""
    from rich.text import Text

    def measure(head: str, cells: Sequence[Lines], between: str) -> int:
        return 2 + max(len(line) for text in [head, *(between.join(cell) for cell in cells)] for line in text.split("\n"))

    own = sum(measure(head, [[label[i]] for label in labels], "") for i, head in enumerate(heads))
    between = " " if own + sum(measure(h, c, " ") for h, c in columns.items()) <= width else "\n"
    needed = sum(measure(h, c, between) for h, c in columns.items())
    room = width - min(own, max(width // 3, width - needed))
    groups: list[list[str]] = [[]]
    left = room
    for head, cells in columns.items():
        need = measure(head, cells, between)
        if need > left and groups[-1]:
            groups.append([])
            left = room
        groups[-1].append(head)
        left -= need
    for group in groups:
        table = new_table(title)
        table.collapse_padding = True
        for head in heads:
            table.add_column(Text(head), overflow="fold")
        for head in group:
            table.add_column(Text(head), justify="right", no_wrap=True)
        for i, label in enumerate(labels):
            table.add_row(*map(Text, [*label, *(between.join(columns[head][i]) for head in group)]))
        yield table


def _settings_columns(by: Sequence[str], found: Sequence[tuple[Any, ...]], width: int) -> tuple[list[str], list[list[str]]]:
    """Heads and cells that tell the settings: one column per factor, or where these are too wide, one for all."""
    from fedsim.runs.compare import describe, label

    cells = [[label(level) for level in setting] for setting in found]
    wide = sum(2 + max(len(text) for text in column) for column in zip(by, *cells, strict=True))
    if by and wide > width // 2:
        return ["setting"], [[describe(by, setting)] for setting in found]
    return list(by), cells


def _p(value: float) -> str:
    return "–" if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"


def _check(args: argparse.Namespace) -> None:
    if args.sweep and args.all:
        raise ConfigError("--sweep takes the runs of one sweep, --all every run: give one of the two")
    if args.digits < 0:
        raise ConfigError(f"--digits must not be negative, got {args.digits}")
    if args.parquet == "-":
        raise ConfigError("--parquet -: Parquet is no text, name a file")
    if [args.csv, args.markdown, args.latex].count("-") > 1:
        raise ConfigError("only one of --csv, --markdown and --latex can go to the standard output")
    parse_baseline(args.baseline)
