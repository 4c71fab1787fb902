"""How far apart two methods' means must lie before the seeds of a table can tell them apart.

    python -m experiments.ledger.noise experiments/ledger/fashion_tuned.csv [--alpha 0.5] [--between 40 55]

Of the methods that have every seed of the table, and whose mean final average accuracy lies in this range, in percent:

    a_ms = μ + m_m + e_s + r_ms,   Σ m = Σ e = 0

m is the method's part, e the seed's (its split and its noise, common to all methods), r what is left: of N methods and K seeds it
has (N − 1)(K − 1) degrees of freedom. The variance of m is (MS_methods − MS_left) / K, not below 0, where MS are mean squares
(two-way layout without replication). Two means of K seeds differ by chance with a standard deviation of s √(2/K), s² = MS_left;
what is said is t₀.₉₇₅ times that. A range that leaves methods out leaves out the variance that they would add.
"""

# M methods, S seeds

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from fedsim.core.errors import DataError, FedsimError
from fedsim.report.ledger import study
from fedsim.report.ledger.rows import agreements
from fedsim.report.ledger.study import ANY, METHOD, SPLIT
from fedsim.runs.metrics import HEADLINE


@dataclass(frozen=True)
class Noise:
    """In points of accuracy. methods: N; seeds: K; methods_apart: the standard deviation of m; left: s; least: the smallest
    difference of two means that is told apart at 95 %; p: of the F test that m is 0 for all."""

    methods: int
    seeds: int
    methods_apart: float
    left: float
    least: float
    p: float


def noise(scores_MS: NDArray[np.float64]) -> Noise:
    """Of the scores of methods (rows) on seeds (columns), two of each at least."""
    methods, seeds = scores_MS.shape
    whole = scores_MS.mean()
    of_method_M, of_seed_S = scores_MS.mean(axis=1), scores_MS.mean(axis=0)
    left_MS = scores_MS - of_method_M[:, None] - of_seed_S[None, :] + whole
    freedom = (methods - 1) * (seeds - 1)
    square_left = float((left_MS**2).sum()) / freedom
    square_methods = seeds * float(((of_method_M - whole) ** 2).sum()) / (methods - 1)
    ratio = square_methods / square_left if square_left else math.inf
    return Noise(
        methods,
        seeds,
        math.sqrt(max(0.0, square_methods - square_left) / seeds),
        math.sqrt(square_left),
        float(stats.t.ppf(0.975, freedom)) * math.sqrt(2 * square_left / seeds),
        float(stats.f.sf(ratio, methods - 1, freedom)),
    )


def chosen(path: Path, alpha: float, low: float, high: float) -> pd.DataFrame:
    """The rows of methods that have all of the table's seeds on this split and whose mean lies in the range; joint runs, to which
    no split applies, are on every one. Raises DataError where fewer than two methods or seeds are left, and what a ledger of the
    table raises."""
    (stream,) = study.read([path]).streams
    here = stream.frame[stream.frame[SPLIT].isin((f"{alpha:g}", ANY))]
    by_method = here.groupby(METHOD)
    seeds = here["seed"].nunique()
    means = by_method[HEADLINE].mean()
    wanted = means.index[(by_method["seed"].nunique() == seeds) & means.between(low, high)]
    if seeds < 2 or len(wanted) < 2:
        raise DataError(
            f"methods that have all seeds at alpha {alpha:g} and lie between {low:g} and {high:g} %: {len(wanted)}; "
            f"seeds: {seeds}; two of each are needed"
        )
    return here[here[METHOD].isin(wanted)]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="a CSV of fedsim results, with the columns method and seed")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--between", type=float, nargs=2, default=(0.0, 100.0), metavar=("LOW", "HIGH"))
    args = parser.parse_args(words)
    try:
        found = chosen(args.table, args.alpha, *args.between)
    except FedsimError as e:
        print(f"noise: {e}", file=sys.stderr)
        return 2
    scores = found.pivot_table(index=METHOD, columns="seed", values=HEADLINE)
    told = noise(scores.to_numpy())
    print(f"{told.methods} methods, {told.seeds} seeds, whose means are {', '.join(f'{m:.1f}' for m in scores.mean())}")
    print(f"methods lie {told.methods_apart:.1f} points apart (standard deviation; F test p = {told.p:.2g})")
    print(f"a run lies {told.left:.1f} points from where its method and its seed have it")
    print(f"means of {told.seeds} seeds that differ by less than {told.least:.1f} points are not told apart (95 %)")
    print(f"Kendall's tau of every two seeds: {', '.join(f'{tau:.2f}' for tau in agreements(found))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
