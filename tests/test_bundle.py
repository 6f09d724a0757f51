"""A sealed bundle: any changed, missing, unlisted or linked byte is noticed; sealing is whole or undone."""

import shutil

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit import bundle
from edgekit.errors import BundleError, UnknownName, UsageError
from edgekit.manifest import Golden, Manifest, Parity, Step, Variant
from edgekit.tensors import TensorSpec

FILES = {
    "a/model.onnx": b"the first model",
    "b/model.onnx": b"the second model, a little longer",
    "golden/inputs/x.npy": b"\x93NUMPY",
    "empty": b"",
}


def draft(**changes):
    variants = tuple(
        Variant(name=n, format="onnx", precision="fp32", main=f"{n}/model.onnx", files=(f"{n}/model.onnx",),
                parity=Parity(status="checked"))
        for n in ("a", "b")
    )  # fmt: skip
    settings = {
        "name": "tiny",
        "version": "1",
        "task": "tensor",
        "inputs": (TensorSpec("x", "float32", (-1, 4)),),
        "variants": variants,
        "golden": Golden(inputs={"x": "golden/inputs/x.npy"}),
        "lineage": (Step(name="load", options={"source": "tiny.py"}),),
        "files": (),
    }
    return Manifest(**settings | changes)


@pytest.fixture
def folder(tmp_path):
    bundle.seal(tmp_path / "bundle", draft(), FILES)
    return tmp_path / "bundle"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "bundle"
    bundle.seal(folder, draft(), FILES)
    return folder


def test_what_was_sealed_is_read_back(folder):
    opened = bundle.read(folder)
    assert {e.path: (folder / e.path).read_bytes() for e in opened.manifest.files} == FILES
    assert opened.size == sum(map(len, FILES.values()))
    assert opened.path("empty").is_file()
    assert opened.digest == bundle.hash_file(folder / "manifest.json")


def test_the_same_draft_and_bytes_give_the_same_digest_anywhere(folder, tmp_path):
    from_disk = {name: folder / name for name in reversed(FILES)}
    again = bundle.seal(tmp_path / "elsewhere", draft(), from_disk)
    assert again.digest == bundle.read(folder).digest


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_of_any_file_is_noticed(shared, data):
    digest = bundle.read(shared).digest
    path = shared / data.draw(st.sampled_from([*[n for n in FILES if FILES[n]], "manifest.json"]))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    broken = bytearray(whole)
    broken[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(broken)
    try:
        changed = bundle.read(shared)
    except BundleError:
        return
    finally:
        path.write_bytes(whole)
    # A manifest may still be a manifest, but then it is another bundle: whoever signed a digest sees it.
    assert path.name == "manifest.json"
    assert changed.digest != digest


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cut_or_longer_file_is_noticed(shared, data):
    path = shared / data.draw(st.sampled_from([n for n in FILES if FILES[n]]))
    whole = path.read_bytes()
    path.write_bytes(data.draw(st.sampled_from([whole + b"\0", whole[: data.draw(st.integers(0, len(whole) - 1))]])))
    try:
        with pytest.raises(BundleError, match="is not the file that was sealed"):
            bundle.read(shared)
    finally:
        path.write_bytes(whole)


def test_a_missing_file_is_named(folder):
    (folder / "empty").unlink()
    with pytest.raises(BundleError, match="empty is missing"):
        bundle.read(folder)


@pytest.mark.attack("unlisted file")
@pytest.mark.parametrize("name", ["extra", "a/extra", ".hidden", "deep/er/extra"])
def test_an_unlisted_file_is_named(folder, name):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"smuggled")
    with pytest.raises(BundleError, match=f"{name} is not listed"):
        bundle.read(folder)


@pytest.mark.attack("symlink")
def test_a_link_in_place_of_a_file_is_refused(folder, tmp_path):
    (tmp_path / "outside").write_bytes(FILES["a/model.onnx"])
    (folder / "a/model.onnx").unlink()
    (folder / "a/model.onnx").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match=r"a/model.onnx is a link"):
        bundle.read(folder)


@pytest.mark.attack("symlink")
def test_a_link_in_place_of_a_folder_is_refused(folder, tmp_path):
    shutil.move(folder / "a", tmp_path / "a")
    (folder / "a").symlink_to(tmp_path / "a")
    with pytest.raises(BundleError, match="a is a link"):
        bundle.read(folder)


def test_a_folder_in_place_of_a_file_is_refused(folder):
    (folder / "empty").unlink()
    (folder / "empty").mkdir()
    with pytest.raises(BundleError, match="empty is missing"):
        bundle.read(folder)


def test_a_device_needs_its_own_variant_and_what_no_variant_claims(folder):
    (folder / "b/model.onnx").unlink()
    opened = bundle.read(folder, variant="a")
    assert {e.path for e in opened.manifest.files_of("a")} == set(FILES) - {"b/model.onnx"}
    with pytest.raises(BundleError, match=r"b/model.onnx is missing"):
        bundle.read(folder, variant="b")
    with pytest.raises(UnknownName):
        bundle.read(folder, variant="c")


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path):
    with pytest.raises(UsageError, match="is no bundle"):
        bundle.read(tmp_path)


@pytest.mark.attack("bomb")
def test_a_manifest_that_would_fill_the_memory_is_refused_unread(folder):
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(BundleError, match="longer than"):
        bundle.read(folder)


def test_a_draft_that_uses_a_file_nobody_gives_leaves_nothing(tmp_path):
    few = {k: v for k, v in FILES.items() if k != "b/model.onnx"}
    with pytest.raises(BundleError, match=r"uses 'b/model.onnx' but does not list it"):
        bundle.seal(tmp_path / "bundle", draft(), few)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_vanished_leaves_the_old_bundle(folder, tmp_path):
    before = bundle.read(folder).digest
    with pytest.raises(FileNotFoundError):
        bundle.seal(folder, draft(version="2"), {**FILES, "empty": tmp_path / "gone"})
    assert bundle.read(folder).digest == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_sealing_again_replaces_the_whole_bundle(folder):
    changed = msgspec.structs.replace(draft(), golden=Golden())
    bundle.seal(folder, changed, {k: v for k, v in FILES.items() if not k.startswith("golden")})
    assert bundle.read(folder).manifest.golden == Golden()
    assert not (folder / "golden").exists()


@pytest.mark.attack("zip-slip")
@pytest.mark.parametrize("path", ["../outside", "OUTSIDE", "a/../../outside", "a//b", "./a", "manifest.json", ".x"])
def test_sealing_never_writes_outside_its_folder(tmp_path, path):
    # Every path stays below tmp_path, the absolute one too: where this test fails, files really are overwritten.
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BundleError):
        bundle.seal(tmp_path / "bundle", draft(), {**FILES, path.replace("OUTSIDE", str(outside)): b"smuggled"})
    assert outside.read_bytes() == b"precious"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_bundle_is_never_replaced_by_one(tmp_path, kind):
    place = tmp_path / "thesis"
    precious = place / "chapter.txt" if kind == "folder" else place
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("years of work")
    with pytest.raises(UsageError, match="is no bundle, so it is not replaced"):
        bundle.seal(place, draft(), FILES)
    assert precious.read_text() == "years of work"
