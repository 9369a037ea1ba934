"""Intervals and permutation tests against what is known of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ibisagent.evaluation.statistics import Row, differences, intervals, patient_interval


def rows(values: list[float], name: str = "iou", patients: list[str] | None = None) -> list[Row]:
    subjects = patients or [str(number) for number in range(len(values))]
    return [(who, {name: (value, 1.0)}) for who, value in zip(subjects, values, strict=True)]


def test_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    low, high = intervals(rows(values.tolist()))["iou"] or (0, 0)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.002)


def test_every_metrics_has_the_interval_that_it_has_alone() -> None:
    values = np.random.default_rng(1).random((30, 2)).tolist()
    both: list[Row] = [(str(n % 11), {"iou": (a, 1.0), "dice": (b, 1.0)}) for n, (a, b) in enumerate(values)]
    some: list[Row] = [(who, metrics if n % 11 else {"iou": metrics["iou"]}) for n, (who, metrics) in enumerate(both)]
    found = intervals(some)
    assert found["iou"] == patient_interval((who, metrics["iou"][0]) for who, metrics in both)
    assert found["dice"] == patient_interval((who, row["dice"][0]) for who, row in some if "dice" in row)


def test_ratio_is_resampled_as_a_ratio() -> None:
    pooled: list[Row] = [("small", {"ciou": (0.0, 10.0)}), ("large", {"ciou": (900.0, 990.0)})]
    assert intervals(pooled)["ciou"] == pytest.approx((0, 900 / 990))


def test_fewer_than_two_patients() -> None:
    assert intervals(rows([0.1, 0.9], patients=["a", "a"])) == {"iou": None}
    assert intervals([]) == {}
    assert patient_interval([]) is None


def test_permutation_p_is_exact_enough() -> None:
    a, b = [0.3, 0.5, 0.4, 0.6, 0.2, 0.5], [0.5, 0.6, 0.4, 0.7, 0.5, 0.45]
    found = differences(rows(a), rows(b), permutations=20_000)["iou"]
    gaps = np.subtract(b, a)
    flips = np.array(list(itertools.product((1, -1), repeat=len(a))))
    exact = np.mean(np.abs(flips @ gaps) >= abs(gaps.sum()) - 1e-9)
    assert (found.cases, found.difference) == (6, pytest.approx(gaps.mean()))
    assert found.p == pytest.approx(exact, abs=0.01)


def test_runs_that_are_the_same_do_not_differ() -> None:
    one = rows([0.1, 0.7, 0.4])
    found = differences(one, one)["iou"]
    assert (found.difference, found.interval, found.p) == (0, (0, 0), 1)


def test_patients_not_cases_are_permuted() -> None:
    """Twenty cases of one patient are one piece of evidence."""
    a, b = rows([0.5] * 20, patients=["a"] * 20), rows([0.9] * 20, patients=["a"] * 20)
    found = differences(a, b)["iou"]
    assert (found.interval, found.p) == (None, 1)
    many = differences(rows([0.5] * 20), rows([0.9] * 20))["iou"]
    assert many.p < 0.001
    assert many.interval == pytest.approx((0.4, 0.4))


def test_metrics_that_one_run_lacks_are_compared_where_both_have_them() -> None:
    a: list[Row] = [("x", {"tokens": (5.0, 1.0)}), ("y", {}), ("z", {"tokens": (7.0, 1.0)})]
    b: list[Row] = [("x", {"tokens": (6.0, 1.0)}), ("y", {"tokens": (99.0, 1.0)}), ("z", {"tokens": (7.0, 1.0)})]
    found = differences(a, b)["tokens"]
    assert (found.cases, found.a, found.b) == (2, 6, 6.5)
    assert differences(a[1:2], b[1:2]) == {}
