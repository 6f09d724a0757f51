"""TensorSpec: which arrays fit."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.tensors import DYNAMIC, TensorSpec

SIZES = st.lists(st.integers(1, 64), max_size=5).map(tuple)


@given(SIZES)
def test_a_spec_takes_its_own_shape_and_no_other_rank(shape):
    spec = TensorSpec("x", "float32", shape)
    assert spec.accepts(shape)
    assert not spec.accepts((*shape, 1))


@given(SIZES, st.data())
def test_a_dynamic_dimension_takes_any_size_a_fixed_one_only_its_own(shape, data):
    if not shape:
        return
    axis = data.draw(st.integers(0, len(shape) - 1))
    other = tuple(n + 1 if i == axis else n for i, n in enumerate(shape))
    fixed = TensorSpec("x", "float32", shape)
    free = TensorSpec("x", "float32", tuple(DYNAMIC if i == axis else n for i, n in enumerate(shape)))
    assert not fixed.accepts(other)
    assert free.accepts(other)
    assert free.accepts(shape)


@given(SIZES)
def test_specs_survive_json(shape):
    spec = TensorSpec("image", "uint8", (DYNAMIC, *shape))
    assert msgspec.json.decode(msgspec.json.encode(spec), type=TensorSpec) == spec


def test_a_spec_reads_well():
    assert str(TensorSpec("image", "float32", (-1, 3, 224, 224))) == "image: float32[?, 3, 224, 224]"


def test_a_spec_with_an_unknown_field_is_refused():
    with pytest.raises(msgspec.ValidationError, match="layout"):
        msgspec.json.decode(b'{"name":"x","dtype":"int8","shape":[1],"layout":"NHWC"}', type=TensorSpec)
