"""A GGUF file that exists already is sealed as it stands, after its engine took it."""

import pytest
from fakes.exportable import llama_folder

from edgekit import device_profiles, workload
from edgekit.compress import compress
from edgekit.compress import recipe as recipes
from edgekit.errors import CompressionError, ExportError, UsageError
from edgekit.export import export


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    bundle = sealed(llama_folder(folder / "hf"), folder / "first").bundle
    target = folder / "ready.gguf"
    target.write_bytes(bundle.path(bundle.manifest.variants[0].main).read_bytes())
    return target


def sealed(source, out, target="llama-cpp"):
    return export(workload.load(str(source)), [device_profiles.load(target)], out)


def test_a_finished_file_is_sealed_byte_for_byte(file, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs an engine for GGUF")
    bundle = sealed(file, tmp_path / "b").bundle
    variant = bundle.manifest.variants[0]
    assert bundle.path(variant.main).read_bytes() == file.read_bytes()
    assert (variant.precision, variant.parity.status) == ("q8_0", "checked")
    assert "Q8_0" in variant.notes[0]


@pytest.mark.parametrize("kept", [40, 3000])
def test_a_cut_file_is_refused_by_name_and_nothing_is_written(file, tmp_path, kept):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UsageError, match=r"cut\.gguf is no GGUF file: cut\.gguf, byte \d+"):
        sealed(cut, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_without_an_engine_nobody_vouches_for_the_file(file, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    parity = sealed(file, tmp_path / "b").bundle.manifest.variants[0].parity
    assert parity.status == "unverified"
    assert "xllamacpp" in parity.reason


def test_other_targets_and_compress_say_what_to_give_instead(file, tmp_path):
    error = sealed(file, tmp_path / "b", "x86-64").rows[0].error
    assert isinstance(error, ExportError)
    with pytest.raises(CompressionError, match="GGUF"):
        compress(workload.load(str(file)), recipes.default())


def test_a_file_that_only_claims_to_be_gguf_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no GGUF file"):
        workload.load(str(tmp_path / "missing.gguf"))
    (tmp_path / "fake.gguf").write_bytes(b"PK\3\4 something else")
    with pytest.raises(UsageError, match="is no GGUF file"):
        workload.load(str(tmp_path / "fake.gguf"))


def test_a_precision_that_a_finished_file_does_not_take_is_refused(file, tmp_path):
    with pytest.raises(UsageError, match="sealed as it stands"):
        export(workload.load(str(file)), [device_profiles.load("llama-cpp")], tmp_path / "b", precision="f16")
