"""Budgets as people spell them, and by how much a candidate misses them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.compress import budget
from edgekit.compress.budget import Budget, Reached
from edgekit.errors import UsageError


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("20ms", 0.02), ("1.5 s", 1.5), ("250us", 250e-6), ("30m", 1800), ("30min", 1800), ("2h", 7200), (".5s", 0.5)],
)
def test_times_are_read_with_their_unit(text, wanted):
    assert budget.seconds(text, "--budget") == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("2MB", 2_000_000), ("1.5MiB", 1_572_864), ("300 kB", 300_000), ("1KiB", 1024), ("17B", 17), ("1.9B", 1)],
)
def test_sizes_are_read_with_their_unit(text, wanted):
    assert budget.size(text, "--size") == wanted


@pytest.mark.parametrize("text", ["", "ms", "-3ms", "nanms", "inf s", "1e3s", "0x10s", "1,5s", "3 m s", "٣ms"])
def test_what_is_no_positive_number_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="--latency") as caught:
        budget.seconds(text, "--latency")
    assert "20ms" in caught.value.hint


def test_a_missing_or_unknown_unit_is_told_apart():
    with pytest.raises(UsageError, match="has no unit"):
        budget.size("2000000", "--size")
    with pytest.raises(UsageError, match="'Mb', which nobody knows") as caught:
        budget.size("2Mb", "--size")
    assert "MiB" in caught.value.hint


@pytest.mark.parametrize("text", ["0s", "0.0ms", "9" * 400 + "h"])
def test_zero_and_infinity_are_refused(text):
    with pytest.raises(UsageError, match="not above zero and finite"):
        budget.seconds(text, "--budget")


@pytest.mark.parametrize("loss", [math.nan, math.inf, -0.1])
def test_a_loss_that_is_none_is_refused(loss):
    with pytest.raises(UsageError, match="--max-drop"):
        Budget(max_drop=loss)


@given(st.floats(0, 1e6, exclude_min=True), st.sampled_from(sorted(budget.SECONDS)))
def test_any_time_that_is_written_comes_back(number, unit):
    text = f"{number:.12f}{unit}"
    if float(text.removesuffix(unit)) > 0:
        assert budget.seconds(text, "--budget") == pytest.approx(number * budget.SECONDS[unit], rel=1e-3, abs=1e-9)


def test_misses_are_shares_of_their_budget():
    wanted = Budget(max_drop=0.5, size=1000, latency=0.02)
    assert Reached(drop=0.5, value=1, bytes=1000, latency=0.02).misses(wanted) == {}
    missed = Reached(drop=1.0, value=1, bytes=1500, latency=0.06).misses(wanted)
    assert missed == pytest.approx({"drop": 1.0, "size": 0.5, "latency": 2.0})
    assert "latency" in Reached(drop=0.0, value=1, bytes=1).misses(wanted)  # nobody measured it


def test_of_a_budget_of_nothing_a_loss_counts_in_its_own_unit():
    wanted = Budget(max_drop=0.0, size=1000)
    assert Reached(drop=0.75, value=1, bytes=1000).misses(wanted) == {"drop": 0.75}
    small, exact = Reached(drop=0.75, value=1, bytes=1000), Reached(drop=0.0, value=1, bytes=9000)
    assert small.rank(wanted) < exact.rank(wanted)


def test_candidates_rank_by_what_they_miss_then_by_loss_then_by_fidelity():
    wanted = Budget(max_drop=0.5, size=1000)
    fits, near, far, faithful = (
        Reached(drop=0.4, value=1, bytes=900, fidelity=20),
        Reached(drop=0.6, value=1, bytes=900, fidelity=40),
        Reached(drop=0.0, value=1, bytes=9000, fidelity=90),
        Reached(drop=0.4, value=1, bytes=900, fidelity=30),
    )
    assert sorted([far, near, fits, faithful], key=lambda r: r.rank(wanted)) == [faithful, fits, near, far]


def test_what_is_built_on_fits_in_bytes_first_for_lost_points_can_be_won_back():
    wanted = Budget(max_drop=0.5, size=1000)
    cut, large = Reached(drop=9, value=1, bytes=900), Reached(drop=0, value=1, bytes=1200)
    assert large.rank(wanted) < cut.rank(wanted)
    assert cut.promise(wanted) < large.promise(wanted)
