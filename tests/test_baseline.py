"""What may call itself a baseline: histograms of tensors that the model has, of bounded size."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit import baseline as baselines
from edgekit.baseline import Baseline, Observed, Series
from edgekit.errors import BundleError
from edgekit.tensors import TensorSpec

INPUTS, OUTPUTS = (TensorSpec("x", "float32", (-1, 2)),), (TensorSpec("y", "float32", (-1, 3)),)


def made(**changed):
    series = Series(name="number 0", edges=(0.0, 1.0), counts=(3, 4, 5))
    observed = Observed(role="input", tensor="x", reading="columns", series=(series, series), seen=b"\x00\xff")
    return Baseline(**{"samples": 12, "split": "validation", "tensors": (observed,), **changed})


def refused(data):
    with pytest.raises(BundleError) as caught:
        baselines.decode(data, INPUTS, OUTPUTS)
    return caught.value.message


def test_what_is_written_is_read():
    told = made(shifts={"x86-64": {"y: number 0": 0.25}})
    assert baselines.decode(baselines.encode(told), INPUTS, OUTPUTS) == told


def changed(**fields):
    """Return the bytes of a baseline whose first series has other fields."""
    told = msgspec.to_builtins(made())
    told["tensors"][0]["series"][0].update(fields)
    return msgspec.json.encode(told)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no baseline"),
        (b"\xff{}", "no baseline"),
        (b'{"format":2,"samples":1,"split":"","tensors":[]}', "no baseline"),
        (b'{"samples":1,"split":"","tensors":[],"more":1}', "no baseline"),
        (changed(edges=[1.0, 0.0]), "no histogram"),
        (changed(edges=[1.0, 1.0]), "no histogram"),
        (changed(counts=[3, 4]), "no histogram"),
        (changed(counts=[0, 0, 0]), "no histogram"),
        (changed(counts=[-1, 4, 5]), "no baseline"),
        (changed(edges=["x", 1.0]), "no baseline"),
        (b" " * (baselines.MAX_BASELINE_BYTES + 1), "more than"),
    ],
)
def test_what_is_no_baseline_is_refused(data, why):
    assert why in refused(data)


def test_a_tensor_that_the_model_has_not_is_refused():
    for role, name in (("input", "y"), ("output", "x"), ("input", "z")):
        told = made(tensors=(msgspec.structs.replace(made().tensors[0], role=role, tensor=name),))
        assert "which the model has not" in refused(baselines.encode(told))


def test_bounds_come_in_pairs():
    told = made(tensors=(msgspec.structs.replace(made().tensors[0], least=(0.0,), most=()),))
    assert "no bounds" in refused(baselines.encode(told))


def test_too_many_series_are_refused():
    observed = msgspec.structs.replace(made().tensors[0], series=made().tensors[0].series * 32)
    assert "more than 256 series" in refused(baselines.encode(made(tensors=(observed,) * 5)))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_baseline_or_an_error_of_ours(data):
    with contextlib.suppress(BundleError):
        baselines.decode(data, INPUTS, OUTPUTS)
