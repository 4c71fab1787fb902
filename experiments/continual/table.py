"""Write the table of README.md anew from results.csv: means over seeds, the best preset at α = 0.5 first.

    python -m experiments.continual.table

What a row says of its preset beside the numbers is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from scipy import stats

from fedsim.report.ledger.rows import agreements
from fedsim.runs.known import table

HERE = Path(__file__).parent
HEAD = "| preset | α = 0.5 | α = 0.1 | task told | forgetting | MB up | MB down | kB stored | time |"
ACCURACY, TIME = "final_average_accuracy", "processor_seconds"


def rows(frame: pd.DataFrame, remarks: dict[str, str]) -> list[str]:
    """One line per method. A joint run has no α: it stands in both columns. Time is in units of FedAvg's, a mean over runs."""
    frame = frame.assign(time=in_units_of_fedavg(frame))
    split = {alpha: frame[frame["partition.alpha"].isna() | (frame["partition.alpha"] == alpha)] for alpha in (0.5, 0.1)}
    half = split[0.5].groupby("method")
    lines = []
    for method in half[ACCURACY].mean().sort_values(ascending=False, kind="stable").index:
        group = half.get_group(method)
        cells = [_spread(part.loc[part["method"] == method, ACCURACY]) for part in split.values()]
        cells += [_number(group[c].mean()) for c in (f"{ACCURACY}_task_incremental", "forgetting")]
        cells += [_number(group[c].mean() / 1e6) for c in ("bytes_up", "bytes_down")]
        cells += [_number(group["stored_mean"].mean() / 1e3), _number(group["time"].mean(), 2)]
        lines.append(f"| {remarks.get(method, f'`{method}`')} | {' | '.join(cells)} |")
    return lines


def in_units_of_fedavg(frame: pd.DataFrame) -> pd.Series:
    """Of every run: beside the FedAvg of its seed on a processor of the same name, or else of all seeds on such a one. NaN where
    the run did not count its time, or no such FedAvg did."""
    processor = frame["processor"].fillna("")
    half = frame[(frame["method"] == "fedavg") & (frame["partition.alpha"] == 0.5)].assign(processor=processor)
    of_seed, of_any = (half.groupby(keys)[TIME].mean() for keys in (["processor", "seed"], "processor"))
    places = pd.MultiIndex.from_arrays([processor, frame["seed"]])
    unit = pd.Series(of_seed.reindex(places).to_numpy(), frame.index).fillna(processor.map(of_any))
    return frame[TIME] / unit


def agreement(frame: pd.DataFrame) -> Iterator[str]:
    """How far the orders of the methods agree: Kendall's τ."""
    of = {alpha: frame[frame["partition.alpha"] == alpha] for alpha in (0.5, 0.1)}
    for alpha, part in of.items():
        yield f"α = {alpha:g}: τ between seeds {', '.join(f'{tau:.2f}' for tau in agreements(part))}"
    means = [part.groupby("method")[ACCURACY].mean() for part in of.values()]
    yield f"between the means at both α {stats.kendalltau(*means).statistic:.2f}"


def rewritten(text: str, frame: pd.DataFrame) -> str:
    """The page with the rows of its first table anew."""
    lines = text.splitlines()
    first = lines.index(HEAD) + 2
    last = next(i for i in range(first, len(lines)) if not lines[i].startswith("|"))
    names = [line.split("|")[1].strip() for line in lines[first:last]]
    remarks = {name.split("`")[1]: name for name in names}
    return "\n".join([*lines[:first], *rows(frame, remarks), *lines[last:]]) + "\n"


def _spread(values: pd.Series) -> str:
    return f"{values.mean():.1f} ± {values.std():.1f}"


def _number(value: float, digits: int = 1) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def main() -> None:
    frame = table(HERE / "results.csv")
    page = HERE / "README.md"
    page.write_text(rewritten(page.read_text(encoding="utf-8"), frame), encoding="utf-8")
    print(*agreement(frame), sep="\n")


if __name__ == "__main__":
    main()
