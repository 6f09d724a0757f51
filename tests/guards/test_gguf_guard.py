"""GGUF headers that would lead llama.cpp out of the file, and sound ones that must pass."""

import struct

import numpy as np
import pytest
from fakes import gguf_files
from fakes.gguf_files import model, pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import BundleError
from edgekit.guards import ModelFile, check_file, gguf

F32, Q8 = 0, 8
U32, U64, TEXT, LIST = 4, 10, 8, 9
SOUND = model([("a", (8, 2), F32, 0), ("b", (32, 3), Q8, 64)], data=bytes(64 + 102))


def look(folder, content):
    (folder / "m.gguf").write_bytes(content)
    check_file(ModelFile(folder, "m.gguf", frozenset(["m.gguf"])), "gguf")


def is_refused(folder, content, because):
    with pytest.raises(BundleError, match=because) as caught:
        look(folder, content)
    assert caught.value.message.startswith("m.gguf, byte ")


def test_a_sound_file_passes_and_is_read_rightly(tmp_path):
    look(tmp_path, SOUND)
    header = gguf.read(ModelFile(tmp_path, "m.gguf"))
    assert [(t.name, t.shape, t.offset, t.size) for t in header.tensors] == [
        ("a", (8, 2), 0, 64),
        ("b", (32, 3), 64, 102),
    ]
    assert header.data + 64 + 102 == len(SOUND)


def test_what_the_gguf_package_writes_passes_with_the_same_places(tmp_path):
    package = pytest.importorskip("gguf", reason="gguf is not installed")
    writer = package.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list(["a", "é", ""])
    writer.add_custom_alignment(64)
    writer.add_array("scales", [0.5, 1.5])
    writer.add_bool("flag", val=True)
    for name, kind in (("f", np.float32), ("h", np.float16), ("i", np.int8)):
        writer.add_tensor(name, np.ones((3, 5), kind))
    q4 = package.GGMLQuantizationType.Q4_0
    writer.add_tensor("q", package.quantize(np.ones((2, 64), np.float32), q4), raw_dtype=q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_file(ModelFile(tmp_path, "m.gguf"), "gguf")
    header = gguf.read(ModelFile(tmp_path, "m.gguf"))
    theirs = package.GGUFReader(tmp_path / "m.gguf").tensors
    assert [(t.name, header.data + t.offset, t.size) for t in header.tensors] == [
        (t.name, int(t.data_offset), int(t.n_bytes)) for t in theirs
    ]


def test_every_tensor_type_that_the_gguf_package_knows_has_its_size():
    package = pytest.importorskip("gguf", reason="gguf is not installed")
    theirs = {int(kind): sizes for kind, sizes in package.GGML_QUANT_SIZES.items()}
    q8_1 = 9  # never stored; the package counts its two halves as floats, ggml-common.h as halves
    assert {kind: sizes for kind, sizes in gguf.BLOCKS.items() if kind != q8_1} == {
        kind: sizes for kind, sizes in theirs.items() if kind != q8_1
    }


@pytest.mark.attack("truncated GGUF")
def test_a_file_cut_anywhere_is_refused(tmp_path):
    for end in range(len(SOUND)):
        is_refused(tmp_path, SOUND[:end], "byte")


@pytest.mark.attack("truncated GGUF")
def test_a_header_with_texts_and_lists_cut_anywhere_is_refused(tmp_path):
    whole = gguf_files.header(general__architecture="llama", names=["a", "bc"], numbers=[1, 2, 3])
    look(tmp_path, whole)
    for end in range(len(whole)):
        is_refused(tmp_path, whole[:end], "byte")


HUGE = 2**64 - 1
LIES = {
    "more tensors than anybody has": (model([], counts=(HUGE, 0)), "tensors"),
    "more tensors than there are": (model([("a", (8,), F32, 0)], counts=(9, 0), data=bytes(32)), "byte"),
    "more keys than anybody has": (model([], counts=(0, 2**61)), "keys"),
    "a key longer than memory": (model([], pairs=[struct.pack("<Q", HUGE)], counts=(0, 1)), "bytes in a text"),
    "a text longer than the file": (model([], pairs=[pair("k", TEXT, struct.pack("<Q", 2000))]), "are left"),
    "a list whose bytes wrap around": (model([], pairs=[pair("k", LIST, struct.pack("<IQ", U64, 2**61))]), "are left"),
    "a list of texts without end": (model([], pairs=[pair("k", LIST, struct.pack("<IQ", TEXT, HUGE))]), "texts"),
    "a text in a list that wraps around": (
        model([], pairs=[pair("k", LIST, struct.pack("<IQQ", TEXT, 2, HUGE - 7) + bytes(64))]), "leaves the file",
    ),
    "lists in lists": (model([], pairs=[pair("k", LIST, struct.pack("<IQ", LIST, 1) * 3)]), "list of values of type 9"),
    "a value of no type": (model([], pairs=[pair("k", 77, bytes(8))]), "value of type 77"),
    "the same key twice": (model([], pairs=[pair("k", U32, bytes(4))] * 2), "comes twice"),
    "an alignment of zero": (model([], pairs=[pair("general.alignment", U32, bytes(4))]), "alignment of 0"),
    "an alignment that is no power of two": (
        model([], pairs=[pair("general.alignment", U32, struct.pack("<I", 48))]), "alignment of 48",
    ),
    "an alignment larger than memory": (
        model([], pairs=[pair("general.alignment", U64, struct.pack("<Q", 1 << 63))]), "alignment of 9223",
    ),
    "an alignment that is a text": (
        model([], pairs=[pair("general.alignment", TEXT, struct.pack("<Q", 2) + b"32")]), "alignment of 32",
    ),
    "more axes than llama.cpp has room for": (model([("a", (1,) * 5, F32, 0)], data=bytes(32)), "axes"),
    "axes whose product wraps around": (model([("a", (2**32, 2**32), F32, 0)], data=bytes(64)), "can be counted"),
    "an axis below zero": (model([("a", (HUGE, 1), F32, 0)], data=bytes(64)), "can be counted"),
    "a tensor of no type": (model([("a", (8,), 99, 0)], data=bytes(32)), "type 99"),
    "rows that no block divides": (model([("a", (31,), Q8, 0)], data=bytes(64)), "rows of 31"),
    "a tensor behind the end": (model([("a", (8,), F32, 4096)], data=bytes(32)), "behind the file's end"),
    "a tensor at an offset that wraps around": (model([("a", (8,), F32, HUGE - 31)], data=bytes(32)), "behind the"),
    "a tensor between two places": (model([("a", (8,), F32, 7)], data=bytes(64)), "no multiple"),
    "two tensors in one place": (
        model([("a", (16,), F32, 0), ("b", (8,), F32, 32)], data=bytes(64)), "within the tensor before",
    ),
    "two tensors of one name": (model([("a", (8,), F32, 0), ("a", (8,), F32, 32)], data=bytes(64)), "comes twice"),
    "a name longer than llama.cpp has room for": (model([("a" * 64, (8,), F32, 0)], data=bytes(32)), "bytes in a text"),
    "another byte order": (b"GGUF\0\0\0\3" + bytes(64), "version 50331648"),
    "parts that lie elsewhere": (model([], pairs=[pair("split.count", 2, struct.pack("<H", 3))]), "one of 3 parts"),
    "bytes that are no text": (model([], pairs=[pair("k", TEXT, struct.pack("<Q", 2) + b"\xff\xff")]), "no UTF-8"),
}  # fmt: skip


@pytest.mark.attack("oversized GGUF")
@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path, lie):
    is_refused(tmp_path, *LIES[lie])


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_changed_byte_is_taken_or_refused_with_one_kind_of_error(tmp_path, changes):
    texts = gguf_files.header(general__architecture="llama", names=["a", "bc"], numbers=[1, 2])
    for content in (bytearray(SOUND), bytearray(texts)):
        for at, byte in changes:
            content[at % len(content)] = byte
        try:
            look(tmp_path, content)
        except BundleError:
            continue
        header = gguf.read(ModelFile(tmp_path, "m.gguf"))
        assert all(header.data + tensor.offset + tensor.size <= len(content) for tensor in header.tensors)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=300))
def test_noise_behind_the_magic_is_taken_or_refused_with_one_kind_of_error(tmp_path, noise):
    for start in (b"", b"GGUF", b"GGUF\3\0\0\0", b"GGUF\3\0\0\0" + struct.pack("<QQ", 1, 1)):
        try:
            look(tmp_path, start + noise)
        except BundleError:
            continue
