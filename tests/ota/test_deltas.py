"""Whatever two files are, the delta between them gives the second; whatever a delta is, it gives that or an error."""

import hashlib
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import zstandard
from fakes.weight_files import WRITERS, numbers, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.errors import BundleError
from edgekit.manifest import FileEntry
from edgekit.ota.deltas import applying, coders, container, layouts, making, residuals
from edgekit.ota.deltas.container import Change, Copy, Fresh, Header, Left, Part, Plane, Prefixed
from edgekit.ota.deltas.layouts import LAYOUTS, NUMBERS
from edgekit.ota.deltas.making import Source

LAW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind == "litert" else ()) for kind in WRITERS]
BASE = np.random.default_rng(1).integers(0, 256, 5000, dtype=np.uint8).tobytes()


def entry_of(data):
    return FileEntry(path="model", size=len(data), sha256=hashlib.sha256(data).hexdigest())


def delta_of(folder, old, new):
    (folder / "old").write_bytes(old)
    (folder / "new").write_bytes(new)
    with (folder / "delta").open("wb") as out:
        size = making.make(Source(folder / "old"), Source(folder / "new"), out, name="model")
    assert size in (None, (folder / "delta").stat().st_size)
    return size


def applied(folder, new):
    applying.apply(folder / "delta", folder / "old", entry_of(new), folder / "made")
    return (folder / "made").read_bytes()


@pytest.fixture
def always(monkeypatch):
    """Write deltas that do not pay, too."""
    monkeypatch.setattr(making, "MOST", 100)


edits = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 60), st.binary(max_size=60)), max_size=6)


@LAW
@given(changes=edits, keep=st.integers(0, 5000))
def test_delta_gives_the_new_file_whatever_was_cut_put_in_or_replaced(tmp_path, always, changes, keep):
    new = BASE[:keep]
    for at, length, data in changes:
        new = new[:at] + data + new[at + length :]
    if delta_of(tmp_path, BASE, new) is None:
        assert new == b""  # an empty file is not worth a header
    else:
        assert applied(tmp_path, new) == new


@LAW
@given(old=st.binary(max_size=300), new=st.binary(min_size=1, max_size=300))
def test_delta_between_any_two_files_gives_the_second(tmp_path, always, old, new):
    delta_of(tmp_path, old, new)
    assert applied(tmp_path, new) == new


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_every_format_are_rebuilt_to_the_byte_and_one_changed_tensor_is_cheap(tmp_path, kind):
    arrays = numbers(1, first=(64, 256), second=(64, 256), third=(32, 256))
    old = write(kind, tmp_path / "a", arrays).read_bytes()
    step = numbers(2, third=(32, 256))["third"] * np.float32(0.001)
    new = write(kind, tmp_path / "b", {**arrays, "third": arrays["third"] + step}).read_bytes()
    size = delta_of(tmp_path, old, new)
    assert size < 0.18 * len(new), f"{size} of {len(new)}"
    assert applied(tmp_path, new) == new


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_trade_places_are_found_by_name(tmp_path, kind):
    arrays = numbers(1, first=(64, 256), second=(64, 256), third=(32, 256))
    old = write(kind, tmp_path / "a", arrays).read_bytes()
    new = write(kind, tmp_path / "b", dict(reversed(arrays.items()))).read_bytes()
    assert delta_of(tmp_path, old, new) < 0.1 * len(new)
    assert applied(tmp_path, new) == new


def test_file_that_is_another_one_is_fetched_whole(tmp_path):
    chance = np.random.default_rng(3)
    assert delta_of(tmp_path, BASE, chance.integers(0, 256, 5000, dtype=np.uint8).tobytes()) is None


def test_unchanged_file_costs_nothing_but_a_header(tmp_path):
    assert delta_of(tmp_path, BASE * 1000, BASE * 1000) < 120
    assert applied(tmp_path, BASE * 1000) == BASE * 1000


def test_integers_that_moved_a_step_cost_a_quarter(tmp_path):
    """Goal of int8 networks: all weights nudged, and quantized again."""
    chance = np.random.default_rng(4)
    old = chance.integers(-127, 128, (300, 300)).astype(np.int8)
    new = old + chance.integers(-1, 2, old.shape, dtype=np.int8)
    write("safetensors", tmp_path / "a", {"w": old})
    write("safetensors", tmp_path / "b", {"w": new})
    assert delta_of(tmp_path, (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()) < 0.24 * new.size


@pytest.mark.parametrize("spread", [0.7, 1.2, 3.0])
def test_rows_that_moved_by_one_cost_nothing_however_small_their_numbers_are(tmp_path, spread):
    """A token was put into a vocabulary: the difference of rows looks cheap, and is not the cheapest."""
    chance = np.random.default_rng(0)
    old = np.rint(chance.normal(0, spread, (1000, 256))).astype(np.int8)
    new = np.vstack([np.rint(chance.normal(0, spread, (1, 256))).astype(np.int8), old[:-1]])
    paths = [write("safetensors", tmp_path / name, {"w": one}) for name, one in (("a", old), ("b", new))]
    data = [path.read_bytes() for path in paths]
    assert delta_of(tmp_path, *data) < 0.005 * new.size
    assert applied(tmp_path, data[1]) == data[1]


def test_levels_are_foretold_from_their_scales(tmp_path):
    """All weights of a block grow by the same: the scales say it all."""
    arrays = numbers(1, w=(64, 256))
    grown = {"w": arrays["w"] * np.float32(1.25)}
    old, new = (write("gguf Q5_0", tmp_path / name, one).read_bytes() for name, one in (("a", arrays), ("b", grown)))
    assert old != new
    assert delta_of(tmp_path, old, new) < 0.12 * len(new)


@LAW
@given(layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 1 << 32), count=st.integers(0, 5))
def test_layouts_move_bits_and_lose_none(layout, seed, count):
    data = np.random.default_rng(seed).bytes(layout.size * count)
    assert layouts.join(layout, layouts.cut(layout, data)) == data


@LAW
@given(layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 1 << 32))
def test_what_every_way_leaves_gives_the_new_symbols_back(layout, seed):
    """For random bytes, whose scales are NaN, infinite and zero as well."""
    chance = np.random.default_rng(seed)
    data = [bytearray(chance.bytes(layout.size * 3)) for _ in range(2)]
    if seed % 3 == 0:
        data[seed % 2][: layout.size] = bytes(layout.size)
    old, new = (layouts.cut(layout, bytes(one)) for one in data)
    for index in range(len(layout.fields)):
        for way in residuals.ways(layout, index):
            left = residuals.take(way, layout, old, new, index=index)
            assert int(left.max()) >> layout.fields[index].bits == 0
            assert (residuals.give(way, layout, old, new[:index], left=left) == new[index]).all()


@pytest.mark.parametrize("layout", [one for one in LAYOUTS if one.scale], ids=lambda one: one.name)
def test_block_layouts_say_what_ggml_says(layout):
    gguf = pytest.importorskip("gguf")
    chance = np.random.default_rng(0)
    items = chance.integers(0, 256, (20, layout.size), dtype=np.uint8)
    for field in layout.fields:
        if isinstance(field, layouts.Whole) and field.width == 2:
            halves = chance.normal(size=(20, 1)).astype("<f2").view(np.uint8)
            items[:, field.start : field.start + 2] = halves
    fields = layouts.cut(layout, items.tobytes())
    factor, offset = layout.scale(fields)
    levels = fields[-1].astype(np.int8) if layout.is_signed else fields[-1].astype(np.int64)
    ours = levels.reshape(*factor.shape, -1) * factor[..., None] + offset[..., None]
    theirs = gguf.quants.dequantize(items, gguf.GGMLQuantizationType[layout.name.upper()])
    np.testing.assert_allclose(ours.ravel(), theirs.ravel(), rtol=1e-5, atol=1e-6)


@LAW
@given(
    values=st.lists(st.integers(0, 255), max_size=400),
    zeros=st.lists(st.integers(0, 700), max_size=400),
    most=st.sampled_from([1, 15, 255]),
)
def test_plane_comes_back_however_its_zeros_lie(values, zeros, most):
    gaps = iter(zeros)
    plane = np.array([n for v in values for n in (*([0] * next(gaps, 0)), min(v, most))], np.uint8)
    packed, data = coders.pack_plane(plane)
    assert (coders.unpack_plane(packed, data, len(plane)) == plane).all()


@given(numbers=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), width=st.sampled_from([1, 2, 4, 8]))
def test_bytes_of_symbols_join_to_the_symbols(numbers, width):
    symbols = np.array(numbers, np.uint64).astype(f"<u{width}")
    assert (coders.symbols(coders.planes(symbols, 8 * width)) == symbols).all()


# From here on: attacks. A delta is signed, and read as if it were not.


def hostile(folder, *records, new=BASE, head=None, tail=b""):
    """Write a delta by hand, for a new file that is as long as ``new``."""
    base, made = (hashlib.sha256(one).digest() for one in (BASE, new))
    with (folder / "delta").open("wb") as out:
        out.write(container.MAGIC)
        container.write(out, head or Header(base, len(BASE), made, len(new)), [])
        for record, *parts in records:
            container.write(out, record, list(parts))
        out.write(tail)
    (folder / "old").write_bytes(BASE)
    return FileEntry(path="model", size=len(new), sha256=made.hex())


def refused(folder, entry, words=""):
    with pytest.raises(BundleError, match=words):
        applying.apply(folder / "delta", folder / "old", entry, folder / "made")


def changed(layout, *fields, length=5000, base=0):
    return Change(base, length, NUMBERS[layout], fields)


def bomb(length):
    """Return a frame of zstd that says less than it gives."""
    return zstandard.ZstdCompressor(write_content_size=False).compress(bytes(length))


HUGE = 1 << 53
ONE = Part(1, 1)
ATTACKS = {
    "nothing follows": [],
    "copy outside the base": [(Copy(1, 5000),)],
    "copy far outside the base": [(Copy(HUGE, 5000),)],
    "copy without end": [(Copy(0, HUGE),)],
    "more than the file": [(Copy(0, 4999),), (Copy(0, 2),)],
    "less than the file": [(Copy(0, 4999),)],
    "the wrong bytes": [(Copy(0, 2500),), (Copy(0, 2500),)],
    "prefix outside the base": [(Prefixed(4000, 2000, ONE), b"x"), (Copy(1, 4999),)],
    "no zstd": [(Fresh(Part(5000, 3)), b"abc")],
    "zstd of another length": [(Fresh(Part(5000, len(d := zstandard.compress(bytes(4000))))), d)],
    "zstd of no length": [(Fresh(Part(5000, len(d := bomb(5000)))), d)],
    "zstd bomb": [(Fresh(Part(5000, len(d := zstandard.compress(bytes(1 << 28))))), d)],
    "zstd with a tail": [(Fresh(Part(5000, len(d := zstandard.compress(bytes(5000)) + b"x"))), d)],
    "raw bytes that are fewer": [(Fresh(Part(5000, 5000)), b"x" * 4999)],
    "unknown layout": [(Change(0, 5000, 200, ()),)],
    "too few fields": [(changed("bytes"),)],
    "too many fields": [(changed("bytes", Left(0, ()), Left(0, ())),)],
    "broken items": [(changed("q8_0", Left(0, ()), Left(0, ())),)],
    "unknown way": [(changed("bytes", Left(9, (Plane(0, ()),))),)],
    "foretold without scales": [(changed("bytes", Left(residuals.SCALED, (Plane(0, ()),))),)],
    "floats that are none": [(changed("bytes", Left(residuals.ORDERED, (Plane(0, ()),))),)],
    "planes of what is the same": [(changed("bytes", Left(0, (Plane(0, ()),))),)],
    "no plane": [(changed("bytes", Left(residuals.XOR, ())),)],
    "unknown form": [(changed("bytes", Left(residuals.XOR, (Plane(7, ()),))),)],
    "form with too many parts": [(changed("bytes", Left(residuals.XOR, (Plane(0, (ONE,)),))), b"x")],
    "plane too short": [(changed("bytes", Left(residuals.XOR, (Plane(1, (ONE,)),))), b"x")],
    "pairs too many": [(changed("bytes", Left(residuals.XOR, (Plane(2, (Part(2501, 2501),)),))), bytes(2501))],
    "gap out of the field": [
        (changed("bytes", Left(residuals.XOR, (Plane(3, (Part(21, 21), ONE)),))), b"\xff" * 20 + b"\xfe", b"x")
    ],
    "gaps without values": [(changed("bytes", Left(residuals.XOR, (Plane(3, (ONE, Part(0, 0))),))), b"\1")],
    "number wider than its field": [
        (changed("nibbles", Left(residuals.XOR, (Plane(1, (Part(10000, 10000),)),))), b"\x10" * 10000)
    ],
    "change outside the base": [(changed("bytes", Left(0, ()), base=1),)],
}  # fmt: skip


@pytest.mark.parametrize("records", ATTACKS.values(), ids=ATTACKS)
def test_hostile_records_end_in_one_kind_of_error(tmp_path, records):
    new = BASE[1:] + b"!"
    refused(tmp_path, hostile(tmp_path, *records, new=new))


def test_hostile_lengths_are_refused_before_anything_is_read_for_them(tmp_path):
    for record in (Fresh(Part(4 << 20, 10)), Fresh(Part(5000, 4 << 20)), Fresh(Part(0, 0))):
        refused(tmp_path, hostile(tmp_path, (record, b"x" * 10)), "record")
    many = Left(residuals.XOR, tuple(Plane(3, (Part(1 << 20, 1 << 20),) * 2) for _ in range(8)))
    refused(tmp_path, hostile(tmp_path, (changed("bytes", many),)), "longer")


def test_delta_for_another_file_or_from_another_base_is_refused(tmp_path):
    base, new = hashlib.sha256(BASE).digest(), hashlib.sha256(BASE).digest()
    for head, words in (
        (Header(base, len(BASE) + 1, new, len(BASE)), "begins at"),
        (Header(base, len(BASE), bytes(32), len(BASE)), "another file"),
        (Header(base, len(BASE), new, len(BASE) + 1), "another file"),
    ):
        refused(tmp_path, hostile(tmp_path, (Copy(0, 5000),), head=head), words)


def test_what_follows_the_end_is_refused(tmp_path):
    refused(tmp_path, hostile(tmp_path, (Copy(0, 5000),), tail=b"\0"), "behind its end")
    applying.apply(tmp_path / "delta", tmp_path / "old", hostile(tmp_path, (Copy(0, 5000),)), tmp_path / "made")


@pytest.mark.parametrize("magic", [b"", b"EKDELTA", b"EKDELTA\x02", b"BSDIFF40", container.MAGIC])
def test_other_files_and_later_versions_are_no_deltas(tmp_path, magic):
    (tmp_path / "old").write_bytes(BASE)
    (tmp_path / "delta").write_bytes(magic)
    refused(tmp_path, entry_of(BASE))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A delta with records of every kind, and what it makes."""
    folder = tmp_path_factory.mktemp("made")
    arrays = numbers(1, first=(16, 256), second=(16, 256))
    one = write("gguf Q4_1", folder / "a", arrays).read_bytes()
    other = write("gguf Q4_1", folder / "b", {**arrays, "second": arrays["second"] * np.float32(1.01)}).read_bytes()
    old, new = one + BASE, other + np.random.default_rng(2).bytes(50) + BASE[100:]
    delta_of(folder, old, new)
    return folder, new


@LAW
@given(data=st.data())
def test_no_changed_byte_of_a_delta_goes_unnoticed(made, data):
    folder, new = made
    whole = (folder / "delta").read_bytes()
    at, flip = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    (folder / "bad").write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    _right_or_refused(folder, new)


@LAW
@given(data=st.data())
def test_delta_cut_anywhere_is_refused(made, data):
    folder, new = made
    whole = (folder / "delta").read_bytes()
    (folder / "bad").write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(BundleError):
        applying.apply(folder / "bad", folder / "old", entry_of(new), folder / "made")


def _right_or_refused(folder, new):
    """A flipped bit may change nothing, as in the hash of the base; it never makes a wrong file."""
    try:
        applying.apply(folder / "bad", folder / "old", entry_of(new), folder / "made")
    except BundleError:
        return
    assert (folder / "made").read_bytes() == new


@LAW
@given(junk=st.binary(max_size=200))
def test_junk_behind_a_good_header_is_refused(tmp_path, junk):
    refused(tmp_path, hostile(tmp_path, tail=junk))


def test_record_is_decoded_strictly(tmp_path):
    for record in ([0, 0], [0, 0, 5000, 1], [9, 0, 5000], [0, -1, 5000], [0, "0", 5000], {"base": 0}):
        data = msgspec.msgpack.encode(record)
        entry = hostile(tmp_path, tail=len(data).to_bytes(2, "little") + data)
        refused(tmp_path, entry, "malformed")


APPLY = """
import sys, hashlib
from pathlib import Path
import numpy, zstandard
from edgekit.manifest import FileEntry
from edgekit.ota.deltas import applying, coders, layouts, residuals
def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))
folder = Path(sys.argv[1]); before = peak()
entry = FileEntry(path='m', size=int(sys.argv[2]), sha256=sys.argv[3])
applying.apply(folder / 'delta', folder / 'old', entry, folder / 'made')
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gguf Q5_0", "gguf F16"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    arrays = numbers(1, w=(12_288, 1024))
    nudged = {"w": arrays["w"] + numbers(2, w=(12_288, 1024))["w"] * np.float32(0.002)}
    old, new = (write(kind, tmp_path / name, one).read_bytes() for name, one in (("a", arrays), ("b", nudged)))
    assert delta_of(tmp_path, old, new) is not None
    entry = entry_of(new)
    command = [sys.executable, "-c", APPLY, str(tmp_path), str(entry.size), entry.sha256]
    kib = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert kib < 64 << 10, f"{kib} KiB"
