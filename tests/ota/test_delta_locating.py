"""Tensors are found where each format's own package finds them; damaged files have none, and hang nobody."""

import numpy as np
import pytest
from fakes.weight_files import WRITERS, numbers, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.ota.deltas import locating
from edgekit.ota.deltas.locating import Tensor

ARRAYS = numbers(1, first=(16, 64), second=(8, 64), third=(4, 64))
QUICK = [kind for kind in WRITERS if kind != "litert"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {kind: write(kind, folder / kind, ARRAYS).read_bytes() for kind in QUICK}


def found_in(data):
    return {t.name: data[t.start : t.start + t.size] for t in locating.tensors(data)}


@pytest.mark.parametrize("kind", ["safetensors", "onnx", "gguf"])
def test_floats_are_found_with_name_shape_and_bytes(files, kind):
    found = found_in(files[kind])
    assert {name: found[name] for name in ARRAYS} == {name: array.tobytes() for name, array in ARRAYS.items()}
    shapes = {t.name: t.shape for t in locating.tensors(files[kind]) if t.name in ARRAYS}
    assert {name: tuple(sorted(shape)) for name, shape in shapes.items()} == {
        name: tuple(sorted(array.shape)) for name, array in ARRAYS.items()
    }
    assert {t.layout for t in locating.tensors(files[kind])} == {"float32"}


@pytest.mark.parametrize("kind", [kind for kind in QUICK if kind.startswith("gguf ")])
def test_blocks_of_gguf_are_found_as_its_own_package_finds_them(files, kind, tmp_path):
    gguf = pytest.importorskip("gguf")
    (tmp_path / "file").write_bytes(files[kind])
    theirs = {t.name: t.data.tobytes() for t in gguf.GGUFReader(tmp_path / "file").tensors}
    assert found_in(files[kind]) == theirs
    layout = kind.removeprefix("gguf ").lower().replace("f16", "float16")
    assert {t.layout for t in locating.tensors(files[kind])} == {layout}


def test_sizes_of_all_types_of_ggml_are_its_own():
    gguf = pytest.importorskip("gguf")
    from edgekit.ota.deltas.locating.gguf import KINDS

    assert {number: (count, size) for number, (_, count, size) in KINDS.items()} == {
        number: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] for number in KINDS
    }


def test_constants_in_nodes_of_onnx_are_found(files):
    assert found_in(files["onnx"])["constant"] == np.arange(40, dtype=np.float32).tobytes()


@pytest.mark.slow
def test_buffers_of_litert_are_found(tmp_path):
    data = write("litert", tmp_path / "file", ARRAYS).read_bytes()
    bytes_found = list(found_in(data).values())
    assert all(array.tobytes() in bytes_found for array in ARRAYS.values())
    assert "float32" in {t.layout for t in locating.tensors(data)}


@pytest.mark.parametrize("kind", QUICK)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_to_no_harm(files, kind, data):
    whole = bytearray(files[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, min(400, len(whole) - 1)))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    for tensor in locating.apart(locating.tensors(cut), len(cut)):
        assert tensor.start >= 0
        assert tensor.start + tensor.size <= len(cut)
    locating.beside(cut)


@given(data=st.binary(max_size=200), magic=st.sampled_from([b"GGUF\3\0\0\0", b"\x1c\0\0\0TFL3", b"\x08\x07", b""]))
def test_junk_has_no_tensors_that_leave_it(data, magic):
    junk = magic + data
    assert all(t.start + t.size <= len(junk) for t in locating.apart(locating.tensors(junk), len(junk)))


def test_tensors_that_overlap_or_leave_the_file_are_dropped():
    good = Tensor("a", "bytes", (), 100, 100)
    over = Tensor("b", "bytes", (), 150, 100)
    out = Tensor("c", "bytes", (), 900, 200)
    short = Tensor("d", "bytes", (), 300, 8)
    before = Tensor("e", "bytes", (), -100, 100)
    assert locating.apart([out, over, good, short, before], 1000) == [good]


def test_tensors_are_matched_by_name_then_by_shape_then_by_name_alone():
    def named(name, shape=(8,), start=0):
        return Tensor(name, "float32", shape, start, 4 * shape[0])

    old = [named("a"), named("b", (9,)), named("c", (10,)), named("d", (11,))]
    new = [named("a"), named("renamed", (9,)), named("c", (12,)), named("new", (99,))]
    pairs = locating.matched(old, new)
    assert {one.name: other.name for one, other in pairs.items()} == {"a": "a", "renamed": "b", "c": "c"}
