"""The arithmetic of a plan as laws: what rounding keeps, how far it moves, how a weight is cut and counted."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from edgekit import grid
from edgekit.errors import CompressionError
from edgekit.plan import Range, WeightRule

NUMBERS = st.one_of(st.just(0.0), st.floats(0.0009765625, 1000, width=32), st.floats(-1000, -0.0009765625, width=32))
WEIGHTS = arrays(np.float32, array_shapes(min_dims=2, max_dims=4, max_side=6), elements=NUMBERS)


@st.composite
def cases(draw):
    """Give a weight with a rule of any bits and granularity that fits it; half have zero points."""
    weight = draw(WEIGHTS)
    kind = draw(st.sampled_from(["channel", "tensor", "group"]))
    group = draw(st.integers(1, 9)) if kind == "group" else 0
    rule = WeightRule(draw(st.integers(2, 8)), kind, draw(st.integers(0, weight.ndim - 1)), group)
    if draw(st.booleans()):
        scales = grid.scales_of(weight, rule) * np.float32(draw(st.floats(0.3, 2)))
        zeros = np.full(scales.shape, draw(st.integers(0, 2**rule.bits - 1)), np.int32)
        rule = grid.with_scales(rule, scales, zeros if draw(st.booleans()) else None)
    return weight, rule


@given(cases())
def test_what_is_rounded_stays_where_it_is(case):
    weight, rule = case
    fixed = grid.with_scales(rule, grid.scales_of(weight, rule), grid.zeros_of(weight, rule) if rule.zeros else None)
    once = grid.rounded(weight, fixed)
    np.testing.assert_array_equal(grid.rounded(once, fixed), once)
    np.testing.assert_array_equal(grid.quantized(once, fixed), grid.quantized(weight, fixed))
    np.testing.assert_array_equal(once, grid.rounded(weight, rule))


@given(cases())
def test_inside_the_range_nothing_moves_by_more_than_half_a_scale(case):
    weight, rule = case
    scales, zeros = (part(weight, rule)[:, :, None] for part in (grid.scales_of, grid.zeros_of))
    lowest, highest = grid.limits(rule)
    cut = grid.rows(weight, rule)
    inside = (cut >= (lowest - zeros) * scales) & (cut <= (highest - zeros) * scales)
    moved = np.abs(grid.rows(grid.rounded(weight, rule), rule) - cut)
    assert (moved[inside] <= np.broadcast_to(scales * 0.5001, cut.shape)[inside]).all()
    if not rule.scales:
        assert (moved <= scales * 0.5001).all(), "the largest value is the largest integer"


@given(cases())
def test_integers_lie_within_the_limits_and_use_the_end_of_them(case):
    weight, rule = case
    integers = grid.quantized(weight, rule)
    lowest, highest = grid.limits(rule)
    assert integers.dtype == np.int32
    assert integers.shape == weight.shape
    assert lowest <= integers.min() <= integers.max() <= highest
    if not rule.scales and weight.any():
        assert np.abs(integers).max() == highest


@given(cases())
def test_cutting_a_weight_and_joining_it_gives_the_weight(case):
    weight, rule = case
    np.testing.assert_array_equal(grid.unrows(grid.rows(weight, rule), weight.shape, rule), weight)


@given(cases())
def test_the_bytes_counted_are_those_of_packed_integers_and_scales(case):
    weight, rule = case
    width = 8 if rule.bits == 7 else rule.bits
    count = grid.scales_of(weight, rule).size
    zeros = math.ceil(count * width / 8) if rule.zeros else 0
    assert grid.stored_bytes(weight.shape, rule) == math.ceil(weight.size * width / 8) + 4 * count + zeros


def test_the_last_group_of_a_channel_is_shorter_and_has_its_own_scale():
    weight = np.array([[1, 2, 3, 4, 100], [5, 6, 7, 8, -200]], np.float32)
    rule = WeightRule(8, "group", 0, 4)
    np.testing.assert_allclose(grid.scales_of(weight, rule) * 127, [[4, 100], [8, 200]], rtol=1e-6)
    assert grid.quantized(weight, rule)[:, 4].tolist() == [127, -127]


def test_groups_run_along_one_channel_whatever_axis_it_lies_on():
    weight = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    columns = grid.scales_of(weight, WeightRule(8, "group", 1, 2)) * 127
    np.testing.assert_allclose(columns, [[4, 10], [5, 11], [6, 12]], rtol=1e-6)


def test_scales_of_another_weight_are_refused():
    rule = grid.with_scales(WeightRule(), np.ones((3, 1)))
    with pytest.raises(CompressionError, match=r"holds 3 scales for a weight of shape \[2, 5\], it needs 2"):
        grid.rounded(np.ones((2, 5), np.float32), rule)


@given(st.floats(-1e5, 1e5), st.floats(-1e5, 1e5), st.booleans())
def test_an_activation_grid_holds_zero_exactly_and_reaches_both_ends(one, other, symmetric):
    limits = Range(min(one, other), max(one, other))
    own = grid.activation_grid(limits, symmetric=symmetric)
    assert own.lowest <= own.zero <= own.highest
    low, high = (own.lowest - own.zero) * own.scale, (own.highest - own.zero) * own.scale
    assert low - own.scale <= min(limits.low, 0)
    assert high + own.scale >= max(limits.high, 0)
