"""Statistics over seeds against scipy and numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsim.core.errors import ConfigError
from fedsim.core.events import ClassRow, Row
from fedsim.runs import bounds, compare, metrics, tables
from fedsim.runs.collection import collect
from fedsim.runs.directory import Holding
from fedsim.runs.results import Results
from tests import run_dirs
from tests.tiny import tiny

FAA = metrics.HEADLINE
Levels = Mapping[str, object]


def frame(*groups: tuple[Levels, Sequence[float]], first_seed: int = 0) -> pd.DataFrame:
    """Runs with one value each; seeds count up, and every seed has its split per α."""
    rows = []
    for levels, values in groups:
        for seed, value in enumerate(values, first_seed):
            split = f"{levels.get('alpha')}-{seed}"
            rows.append({**levels, "seed": seed, "partition_hash": split, FAA: value, "forgetting": value})
    return pd.DataFrame(rows)


def one(table: pd.DataFrame, **levels: object) -> pd.Series:
    """The only row with these levels."""
    for name, level in levels.items():
        table = table[table[name] == level]
    assert len(table) == 1, table
    return table.iloc[0]


# ---------------------------------------------------------------- summary


@settings(max_examples=40)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=10))
def test_summary_is_students_interval(values: list[float]) -> None:
    got = compare.summary(frame(({"method": "a"}, values)), ["method"], [FAA]).iloc[0]
    assert (got["n"], got["mean"]) == (len(values), pytest.approx(np.mean(values)))
    assert got["std"] == pytest.approx(np.std(values, ddof=1), abs=1e-9)
    if got["std"] > 1e-6:
        expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert (got["low"], got["high"]) == pytest.approx(expected, rel=1e-9)


def test_summary_by_hand() -> None:
    """58, 60, 65: mean 61, std √((9 + 1 + 16) / 2) = √13, t(0.975, 2) = 4.302652729911275."""
    got = compare.summary(frame(({"method": "a"}, [58, 60, 65])), ["method"], [FAA])
    assert list(got.columns) == ["method", "metric", "n", "mean", "std", "low", "high"]
    half = 4.302652729911275 * math.sqrt(13 / 3)
    assert got.iloc[0].tolist() == [
        "a",
        FAA,
        3,
        61.0,
        pytest.approx(math.sqrt(13)),
        pytest.approx(61 - half),
        pytest.approx(61 + half),
    ]


def test_one_run_has_a_mean_and_no_spread() -> None:
    got = compare.summary(frame(({"method": "a"}, [60]), ({"method": "b"}, [math.nan])), ["method"], [FAA])
    assert got["n"].tolist() == [1, 0]
    assert got["mean"].tolist()[0] == 60
    assert np.isnan(got[["std", "low", "high"]].to_numpy()).all()
    assert math.isnan(got["mean"][1])


def test_what_a_run_does_not_have_lowers_n() -> None:
    got = compare.summary(frame(({"method": "a"}, [60, math.nan, 64])), ["method"], [FAA]).iloc[0]
    assert (got["n"], got["mean"]) == (2, 62)


def test_settings_keep_the_order_of_the_frame_and_metrics_that_given() -> None:
    runs = frame(
        ({"method": "z", "alpha": 0.5}, [1, 2]), ({"method": "a", "alpha": None}, [3]), ({"method": "z", "alpha": 0.1}, [4])
    )
    got = compare.summary(runs, ["method", "alpha"], ["forgetting", FAA])
    assert got["method"].tolist() == ["z", "z", "a", "a", "z", "z"]
    assert got["metric"].tolist() == ["forgetting", FAA] * 3
    assert got["n"].tolist() == [2, 2, 1, 1, 1, 1]
    assert list(compare.settings(runs, ["method", "alpha"])) == [("z", 0.5), ("a", None), ("z", 0.1)]


def test_without_factors_all_runs_are_one_setting() -> None:
    got = compare.summary(frame(({}, [1, 2, 3])), [], [FAA])
    assert got[["metric", "n", "mean"]].iloc[0].tolist() == [FAA, 3, 2.0]


def test_pivot() -> None:
    runs = frame(
        ({"method": "z", "alpha": 0.5}, [1, 3]), ({"method": "a", "alpha": 0.5}, [5]), ({"method": "a", "alpha": 0.1}, [7])
    )
    matrix = compare.pivot(compare.summary(runs, ["method", "alpha"], [FAA]), "method")
    assert (matrix.index.name, matrix.index.tolist()) == ("method", ["z", "a"])
    assert matrix.columns.tolist() == [(0.5, FAA), (0.1, FAA)]
    np.testing.assert_array_equal(matrix.to_numpy(), [[2, np.nan], [5, 7]])


# ---------------------------------------------------------------- paired differences

A = [61.0, 64.5, 59.0, 66.0, 63.0]
B = [58.0, 60.0, 58.5, 61.0, 62.0]


def test_paired_is_scipys_test() -> None:
    got = one(compare.paired(frame(({"method": "lorm"}, A), ({"method": "fedavg"}, B)), ["method"], {"method": "fedavg"}, [FAA]))
    d = np.subtract(A, B)
    expected = stats.ttest_rel(A, B)
    assert got["p"] == pytest.approx(expected.pvalue, rel=1e-12)
    assert (got["low"], got["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-12)
    exact = stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert got["p_sign_flip"] == exact.pvalue == got["p_sign_flip_floor"] == 2 / 2**5
    assert (got["method"], got["metric"], got["n"], got["unpaired"], got["wins"], got["ties"]) == ("lorm", FAA, 5, 0, 5, 0)
    assert (got["difference"], got["std"]) == (pytest.approx(d.mean()), pytest.approx(d.std(ddof=1)))
    assert got["d_z"] == pytest.approx(d.mean() / d.std(ddof=1))
    assert got["p_holm"] == got["p"]


@settings(max_examples=60)
@given(st.lists(st.integers(-40, 40), min_size=2, max_size=8))
def test_sign_flip_is_the_exact_permutation_test(quarters: list[int]) -> None:
    """Multiples of 1/4: sums are exact, so scipy and we see the same ties."""
    d = np.array(quarters) / 4
    exact = stats.permutation_test((d,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert compare.sign_flip(d) == pytest.approx(min(1.0, exact.pvalue), abs=1e-12)


def test_below_6_seeds_no_sign_flip_reaches_5_percent() -> None:
    """Why the t-test is the headline: even when every seed agrees."""
    assert [compare.sign_flip(np.arange(1.0, n + 1)) for n in (3, 5, 6)] == [0.25, 0.0625, 0.03125]
    assert stats.wilcoxon(np.arange(1.0, 6), method="exact").pvalue == 0.0625
    assert math.isnan(compare.sign_flip(np.ones(17)))
    assert math.isnan(compare.sign_flip(np.ones(0)))


def test_sign_flip_takes_rounded_ties_as_ties() -> None:
    """|±0.1 ± 0.2 ± 0.1| is 0.4, 0.2, 0.2 or 0, twice each: 6 of 8 reach 0.2; ±0.1 ± 0.2 ± 0.2 always reaches 0.1.
    In float64 some of these sums fall short by 1e-17."""
    assert compare.sign_flip(np.array([0.1, 0.2, -0.1])) == 6 / 8
    assert compare.sign_flip(np.array([0.1, 0.2, -0.2])) == 1.0


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.9: × 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.9, never falling. The NaN is no comparison."""
    got = compare.holm(np.array([0.03, 0.01, np.nan, 0.9, 0.02]))
    np.testing.assert_allclose(got, [0.06, 0.04, np.nan, 0.9, 0.06])
    np.testing.assert_allclose(compare.holm(np.array([0.7, 0.6])), [1.0, 1.0])  # 0.6 · 2 is cut at 1


def test_holm_is_over_the_comparisons_of_one_metric() -> None:
    runs = frame(({"method": "a"}, A), ({"method": "b"}, B), ({"method": "c"}, B[::-1]))
    runs["forgetting"] = np.arange(15.0) ** 1.5
    table = compare.paired(runs, ["method"], {"method": "b"}, [FAA, "forgetting"])
    assert table["metric"].tolist() == [FAA, "forgetting"] * 2
    for metric in (FAA, "forgetting"):
        part = table[table["metric"] == metric]
        np.testing.assert_allclose(part["p_holm"], compare.holm(part["p"].to_numpy()))
        assert part["p_holm"].min() == pytest.approx(2 * part["p"].min())


def test_each_setting_is_compared_with_the_baseline_of_its_other_factors() -> None:
    runs = frame(
        *(({"method": m, "alpha": alpha}, [base + shift + s for s in (0, 1, 3)])
          for alpha, base in ((0.1, 40), (0.5, 60)) for m, shift in (("lorm", 2 + alpha), ("fedavg", 0)))
    )  # fmt: skip
    table = compare.paired(runs, ["method", "alpha"], {"method": "fedavg"}, [FAA])
    assert list(zip(table["method"], table["alpha"], strict=True)) == [("lorm", 0.1), ("lorm", 0.5)]
    assert table["difference"].tolist() == pytest.approx([2.1, 2.5])
    by_alpha = compare.paired(runs, ["method", "alpha"], {"alpha": "0.5"}, [FAA])  # another split: nothing to pair
    assert (by_alpha["n"].tolist(), by_alpha["unpaired"].tolist()) == ([0, 0], [6, 6])
    assert by_alpha[["difference", "p", "p_sign_flip", "d_z"]].isna().all(axis=None)


def test_only_runs_of_one_split_and_seed_are_pairs() -> None:
    runs = frame(({"method": "lorm"}, [61, 62, 63, 64]), ({"method": "fedavg"}, [50, 51, 52]))
    runs.loc[1, "partition_hash"] = "another"
    got = one(compare.paired(runs, ["method"], {"method": "fedavg"}, [FAA]))
    assert (got["n"], got["unpaired"], got["difference"]) == (2, 3, 11)  # seeds 0 and 2; left: 1 and 3, and 1 of the baseline
    runs.loc[0, FAA] = math.nan
    got = one(compare.paired(runs, ["method"], {"method": "fedavg"}, [FAA]))
    assert (got["n"], got["unpaired"], got["difference"]) == (1, 5, 11)
    assert math.isnan(got["p"])
    assert got["p_sign_flip"] == 1.0


def test_wins_go_by_what_is_better() -> None:
    runs = frame(({"method": "lorm"}, [5, 6, 9, 4]), ({"method": "fedavg"}, [7, 7, 7, 4]))
    runs["newest_share"] = runs[FAA]
    table = compare.paired(runs, ["method"], {"method": "fedavg"}, [FAA, "forgetting", "newest_share"])
    assert table["wins"].tolist()[:2] == [1, 2]
    assert math.isnan(table["wins"][2])
    assert table["ties"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_equal_differences_have_no_p(shift: float) -> None:
    """Rounding alone is no spread: 0.1 + 0.2 − 0.3 would give a t of any size."""
    values = [60.1, 61.7, 63.3]
    rounded = [v * 3 / 3 + shift + 1e-14 * i for i, v in enumerate(values)]
    got = one(compare.paired(frame(({"m": "a"}, rounded), ({"m": "b"}, values)), ["m"], {"m": "b"}, [FAA]))
    assert got["difference"] == pytest.approx(shift, abs=1e-9)
    assert got[["p", "p_holm", "d_z"]].isna().all()
    assert got["p_sign_flip"] == (1.0 if shift == 0 else 0.25)
    assert (got["wins"], got["ties"]) == ((0, 3) if shift == 0 else (3, 0))


def test_a_key_that_one_of_the_two_does_not_have_does_not_tell_them_apart() -> None:
    runs = frame(({"rule": "lorm", "ridge": 0.1}, [61, 62, 64]), ({"rule": "fedavg", "ridge": None}, [60, 60, 60]))
    got = one(compare.paired(runs, ["rule", "ridge"], {"rule": "fedavg"}, [FAA]))
    assert (got["n"], got["difference"]) == (3, pytest.approx(7 / 3))


def test_a_baseline_of_which_there_are_two() -> None:
    runs = frame(*(({"rule": r, "lr": lr}, [1, 2]) for r, lr in (("lorm", None), ("fedavg", 0.1), ("fedavg", 0.2))))
    with pytest.raises(ConfigError, match="baseline: 2 settings could be that of rule=lorm: choose a lr, too"):
        compare.paired(runs, ["rule", "lr"], {"rule": "fedavg"}, [FAA])
    got = compare.paired(runs, ["rule", "lr"], {"rule": "fedavg", "lr": 0.1}, [FAA])
    assert (got["rule"].tolist(), got["n"].tolist()) == (["lorm", "fedavg"], [2, 2])


def test_one_setting_that_could_belong_to_two_baselines_keeps_none_of_the_others_from_theirs() -> None:
    """Joint training, to which no α applies, among methods at two of them."""
    cells = (("joint", None), ("lorm", 0.1), ("lorm", 0.5), ("fedavg", 0.1), ("fedavg", 0.5))
    runs = frame(*(({"m": m, "alpha": alpha}, [10 * i, 10 * i + 1]) for i, (m, alpha) in enumerate(cells)))
    got = compare.paired(runs, ["m", "alpha"], {"m": "fedavg"}, [FAA])
    assert dict(zip(zip(got["m"], got["n"], strict=True), got["difference"], strict=True)) == {
        ("joint", 0): pytest.approx(np.nan, nan_ok=True), ("lorm", 2): -20,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ({"metod": "fedavg"}, "'metod' is no factor of these runs. Did you mean 'method'?"),
        ({"method": "fedagv"}, "no run has method=fedagv. Did you mean 'fedavg'?"),
        ({"alpha": "0.7"}, "no run has alpha=0.7."),
        ({}, "names no factor: choose a level of method, alpha"),
    ],
)
def test_a_baseline_that_is_not_there(baseline: Mapping[str, str], message: str) -> None:
    runs = frame(({"method": "lorm", "alpha": 1.0}, A), ({"method": "fedavg", "alpha": 1.0}, B))
    with pytest.raises(ConfigError) as caught:
        compare.paired(runs, ["method", "alpha"], baseline, [FAA])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_level_may_be_given_as_text() -> None:
    runs = frame(({"alpha": 1.0}, A), ({"alpha": None}, B))
    assert compare.known_baseline(runs, ["alpha"], {"alpha": "1"}) == {"alpha": 1.0}
    assert compare.known_baseline(runs, ["alpha"], {"alpha": "–"}) == {"alpha": None}


def test_two_runs_of_a_seed_in_one_setting_are_no_pair() -> None:
    runs = frame(({"method": "lorm", "lr": 0.1}, A), ({"method": "lorm", "lr": 0.2}, A), ({"method": "fedavg", "lr": 0.1}, B))
    with pytest.raises(ConfigError, match="method=lorm holds two runs of seed 0 on the same split: compare by the key"):
        compare.paired(runs, ["method"], {"method": "fedavg"}, [FAA])


def test_unequal_seeds() -> None:
    runs = pd.concat([frame(({"m": "a"}, [1, 2, 3])), frame(({"m": "b"}, [1]), first_seed=1), frame(({"m": "c"}, [1, 2, 3]))])
    assert compare.unequal_seeds(runs, ["m"]) == {("b",): [0, 2]}
    assert compare.unequal_seeds(runs[runs["m"] != "b"], ["m"]) == {}


def test_columns_are_judged_by_the_table() -> None:
    columns = ("forgetting_task_incremental", "plasticity", "bytes_up_adapter", "seconds", "drift_cosine_head", "seed")
    assert [metrics.of(m).sign for m in columns] == [-1, 1, -1, -1, 0, 0]


# ---------------------------------------------------------------- against a joint run


def counted(config_seed: int, accuracy: Sequence[Sequence[float]], **sections: object) -> Results:
    """A class-incremental run whose task t brings the class "class t"."""
    run = run_dirs.results(tiny(f"seed={config_seed}", **sections), accuracy)
    holdings = tuple(Holding(*h) for h in run_dirs.Split("", len(accuracy)).holdings())
    return Results(run.config, run.rows, run.costs, classes=run.classes, holdings=holdings)


def joint_run(
    seed: int, a: float, b: float, names: Sequence[str] = ("class 0", "class 1"), total: int = run_dirs.TESTED
) -> Results:
    """One task with both classes; the classes may come in another order."""
    classes = tuple(ClassRow(0, 2, "task_end", i, round(v * total / 100), 0, total) for i, v in enumerate((a, b)))
    run = run_dirs.results(tiny(f"seed={seed}", "stream.tasks=1", "partition.clients=1", "server.rounds=9"), [[(a + b) / 2]])
    holdings = tuple(Holding(0, 0, i, name, 6) for i, name in enumerate(names))
    return Results(run.config, run.rows, run.costs, classes=classes, holdings=holdings)


def test_gap_and_intransigence_by_hand() -> None:
    """a = [[90], [60, 70]], FAA 65. Joint 95 on class 0, 85 on class 1, FAA 90: the gap is 25, and what was learned when it
    came, 90 and 70, lacks (95 − 90 + 85 − 70) / 2 = 10. With seed 1 the mean over joint runs stands in."""
    runs = run_dirs.collection(counted(0, [[90], [60, 70]]), counted(1, [[90], [60, 70]]))
    joint = run_dirs.collection(joint_run(0, 85, 95, names=("class 1", "class 0")), joint_run(2, 100, 94))
    got = compare.gap_to_joint(runs, joint)
    assert got["seed"].tolist() == [0, 1]
    assert got["gap_to_joint"].tolist() == [pytest.approx(25), pytest.approx(((90 + 97) / 2) - 65)]
    assert got["intransigence"].tolist() == [pytest.approx(10), pytest.approx((10 + (100 - 90 + 94 - 70) / 2) / 2)]


@pytest.mark.parametrize(
    ("joint", "run"),
    [
        (joint_run(0, 85, 95, names=("class 1", "class 2")), counted(0, [[90], [60, 70]])),
        (joint_run(0, 85, 95, total=500), counted(0, [[90], [60, 70]])),
        (joint_run(0, 85, 95), counted(0, [[90], [60, 70]], data={"classes": 12})),
        (joint_run(0, 85, 95), counted(0, [[90]])),
    ],
)
def test_a_joint_run_of_other_tests_is_no_reference(joint: Results, run: Results) -> None:
    got = compare.gap_to_joint(run_dirs.collection(run), run_dirs.collection(joint))
    assert got[["gap_to_joint", "intransigence"]].isna().all(axis=None)


def test_intransigence_is_of_streams_with_new_classes_only() -> None:
    joint = run_dirs.collection(joint_run(0, 95, 85))
    got = compare.gap_to_joint(run_dirs.collection(counted(0, [[90], [60, 70]], stream={"name": "task_incremental"})), joint)
    assert got["gap_to_joint"].tolist() == [pytest.approx(25)]
    assert got["intransigence"].isna().all()


def unequal(seed: int, name: str, right: Sequence[Sequence[int]], joint: bool = False) -> Results:
    """Two classes, tested on 100 samples of the first task and 300 of the second. right: correct[i][j]. Domains share the
    classes, else each task has one; of the joint run `right` is [[all]]."""
    sizes = [400] if joint else [100, 300]
    rows = [Row(i, 2, "task_end", j, c, c, sizes[j]) for i, row in enumerate(right) for j, c in enumerate(row)]
    shared = name == "domain_incremental"
    counts = [(sum(right[-1]) // 2, 200)] * 2 if shared else [(60, 100), (240, 300)]
    last = len(right) - 1
    classes = [ClassRow(last, 2, "task_end", c, *(correct, 0, total)) for c, (correct, total) in enumerate(counts)]
    if not shared and not joint:
        classes.insert(0, ClassRow(0, 2, "task_end", 0, 90, 0, 100))
    config = tiny(f"seed={seed}", f"stream.name={name}", "stream.tasks=2", f"stream.joint={str(joint).lower()}")
    held = tuple(Holding(0, 0, c, f"class {c}", 6) for c in range(2))
    costs = {"bytes": {}, "seconds": {}, "client_rounds": 0}
    return Results(config, tuple(rows), costs, manifest_hash="0123456789abcdef", classes=tuple(classes), holdings=held)


def test_a_run_that_predicts_what_a_joint_run_does_has_no_gap() -> None:
    """60 of 100 and 240 of 300 are right: 70 % over tasks, 75 % over samples. Of classes that a task brings, the joint run is
    regrouped by task; of domains, which share them, nobody knows, and samples are held against samples."""
    for name in ("class_incremental", "domain_incremental"):
        run, joint = unequal(0, name, [[90], [60, 240]]), unequal(0, name, [[300]], joint=True)
        assert (run.metrics["final_average_accuracy"], joint.metrics["final_average_accuracy"]) == (70, 75)
        got = compare.gap_to_joint(run_dirs.collection(run), run_dirs.collection(joint))
        assert got["gap_to_joint"].tolist() == [pytest.approx(0)]


def test_headroom_is_a_difference_in_one_average() -> None:
    for name, want in (
        ("class_incremental", {"ncm": 70.0, "joint": 70.0}),
        ("domain_incremental", {"ncm": 70.0, "ncm_micro": 75.0, "joint_micro": 75.0}),
    ):
        run, joint = unequal(0, name, [[90], [60, 240]]), unequal(0, name, [[300]], joint=True)
        for of in (run, joint):  # whichever run asks
            found = bounds.reached(of, {"ncm": run, "joint": joint})
            assert found == pytest.approx(want)
            assert bounds.Bounds(50.0, **found).headroom == pytest.approx(0)
    assert bounds.Bounds(50.0, **found).lines[0] == (
        "Bounds: chance 50.0, nearest class mean of the bare backbone 70.0, training on all data at once (over all test samples) "
        "75.0. Headroom, over all test samples: 0.0 points."
    )
    assert bounds.reached(unequal(0, "task_incremental", [[90], [60, 240]]), {"joint": joint}) == {}


def test_a_table_says_what_accuracies_of_joint_runs_are_over(tmp_path: Path) -> None:
    """Whether runs are at hand or known by their rows; nothing where the two averages are the same."""
    run, joint = unequal(0, "class_incremental", [[90], [60, 240]]), unequal(0, "class_incremental", [[300]], joint=True)
    both = run_dirs.collection(run, joint)
    (tmp_path / "both.csv").write_text(tables.to_csv(both.frame()))
    for found in (both, collect([tmp_path / "both.csv"])):
        assert "Joint runs have one task: their accuracies are over all test samples" in found.unlike_text
    even = run_dirs.collection(counted(0, [[90], [60, 70]]), unequal(0, "class_incremental", [[300]], joint=True))
    assert "stream.joint" in even.unlike_text and "have one task" not in even.unlike_text


def test_two_joint_runs_of_one_seed() -> None:
    joint = run_dirs.collection(joint_run(0, 95, 85), joint_run(0, 95, 80))
    with pytest.raises(ConfigError, match="several joint runs of seed 0 could be the reference"):
        compare.gap_to_joint(run_dirs.collection(counted(0, [[90], [60, 70]])), joint)
