"""`edgekit export` and `edgekit inspect` as a person types them: tables, JSON, exit codes, hints."""

import importlib.util
import json
import subprocess
import sys

import pytest
from fakes.exportable import llama_folder, tiny_model, with_plan

from edgekit import bundle, workload

MAIN = "from edgekit.cli import main; main()"


def edgekit(*words):
    done = subprocess.run(  # a real process: exit codes and streams are what is tested
        [sys.executable, "-c", MAIN, *map(str, words)], capture_output=True, text=True, timeout=240, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "model"
    workload.save(with_plan(tiny_model()), folder)
    return folder


@pytest.fixture(scope="module")
def exported(saved):
    targets = ("--target", "x86-64", "--target", "jetson-orin-nano")
    code, out, err = edgekit("export", saved, *targets, "-o", saved.parent / "b", "--name", "digits", "--version", "3")
    assert code == 0, err
    return saved.parent / "b", out, err


def test_export_shows_a_table_with_what_was_proved(exported):
    folder, out, err = exported
    assert "| x86-64           | onnx     | int8      |" in out
    assert "checked" in out
    assert bundle.read(folder).digest[:16] in out
    assert err == ""


@pytest.mark.slow
def test_one_failure_keeps_the_rest_and_sets_the_exit_code(saved, tmp_path):
    code, out, err = edgekit(
        "export", saved, "--target", "llama-cpp", "--target", "x86-64", "-o", tmp_path / "b", "--json"
    )
    assert code == 5
    document = json.loads(out)
    assert document["digest"] == bundle.read(tmp_path / "b").digest
    failed, done = document["targets"]
    assert failed["error"]["kind"] == "ExportError"
    assert done["variant"]["parity"]["status"] == "checked"
    assert "llama-cpp: " in err


@pytest.mark.slow
def test_all_failures_write_nothing(saved, tmp_path):
    code, out, err = edgekit("export", saved, "--target", "llama-cpp", "-o", tmp_path / "b")
    assert code == 5
    assert "failed" in out
    assert "a .gguf file, or another target" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere", "--target", "x86-64"], "is no model"),
        (["SAVED", "--target", "x86_64"], "did you mean x86-64"),
        (["SAVED"], "SOURCE, --target or --format, and -o are needed"),
        (["SAVED", "--target", "x86-64", "--precision", "int3"], "cannot be exported as int3"),
        (["missing.onnx", "--target", "x86-64"], "no ONNX file"),
        (["SAVED", "--target", "x86-64", "--data", "missing.npz"], "no data at missing.npz"),
    ],
)
def test_a_wrong_call_is_exit_code_2_with_a_hint(saved, tmp_path, words, told):
    words = [str(saved) if w == "SAVED" else w for w in words]
    code, _out, err = edgekit("export", *words, "-o", tmp_path / "b")
    assert code == 2, err
    assert told in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_is_not_replaced(saved, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    code, _, err = edgekit("export", saved, "--target", "x86-64", "-o", tmp_path)
    assert code == 2
    assert "is no bundle" in err
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.slow
def test_list_names_every_target_and_whether_it_can_be_written_here():
    from edgekit import device_profiles

    code, out, _ = edgekit("export", "--list", "--json")
    assert code == 0
    rows = {row["target"]: row for row in json.loads(out)["targets"]}
    assert list(rows) == device_profiles.names()
    assert rows["iphone-15"]["parity"] == "evaluation"
    assert rows["x86-64"]["export"] == "yes"


@pytest.mark.slow
def test_a_format_is_enough_where_no_hardware_class_is_meant(saved, tmp_path):
    code, out, err = edgekit(
        "export", saved, "--format", "onnx", "--format", "tensorrt", "-o", tmp_path / "b", "--json"
    )
    assert code == 0, err
    assert [row["variant"]["name"] for row in json.loads(out)["targets"]] == ["onnx", "tensorrt"]
    assert (tmp_path / "b" / "onnx" / "model.onnx").is_file()
    code, _, err = edgekit("export", saved, "--format", "onx", "-o", tmp_path / "c")
    assert code == 2
    assert "onnx" in err
    listed = json.loads(edgekit("export", "--list", "--json")[1])["formats"]
    assert {row["format"] for row in listed} >= {"onnx", "coreml", "tflite", "tensorrt", "gguf"}


def test_a_file_larger_than_the_memory_of_its_class_is_refused(saved, tmp_path):
    from edgekit import device_profiles
    from edgekit.errors import ExportError
    from edgekit.export import _refuse_too_large
    from edgekit.manifest import Parity, Variant

    text = device_profiles._files()["x86-64"].read_text()
    (tmp_path / "tiny-pc.toml").write_text(text.replace("memory_mb = 8192", "memory_mb = 1"))
    (tmp_path / "none.toml").write_text(text.replace("memory_mb = 8192", "memory_mb = 0"))
    large = tmp_path / "model.onnx"
    large.write_bytes(b"0" * (2**20 + 1))
    variant = Variant(
        name="a", format="onnx", precision="fp32", main=large.name, files=(large.name,), parity=Parity(status="checked")
    )
    with pytest.raises(ExportError, match="has 1 MiB, and tiny-pc has 1 MiB of memory"):
        _refuse_too_large(device_profiles.load(str(tmp_path / "tiny-pc.toml")), variant, tmp_path)
    _refuse_too_large(device_profiles.load(str(tmp_path / "none.toml")), variant, tmp_path)


def test_inspect_shows_tensors_variants_files_and_digest(exported):
    folder, *_ = exported
    code, out, _ = edgekit("inspect", folder)
    assert code == 0
    for told in ("digits 3", bundle.read(folder).digest, "image: float32[?, 3, 8, 8]", "jetson-orin-nano", "golden/",
                 "every byte checked", "RGB, shorter side 8", "labels  10", "lineage: none recorded",
                 "licence not told", ", from scores by softmax, best 5", "x86-64: needs onnxruntime >=1.20",
                 "x86-64: operators ", "DequantizeLinear, ",
                 "| stem.weight      | 8    | one a channel |", "documents/"):  # fmt: skip
        assert told in out, told


def test_inspect_json_is_the_manifest(exported):
    folder, *_ = exported
    document = json.loads(edgekit("inspect", folder, "--json")[1])
    assert document["digest"] == bundle.read(folder).digest
    assert document["manifest"]["name"] == "digits"


def test_inspect_notices_one_changed_byte(exported, tmp_path):
    import shutil

    shutil.copytree(exported[0], tmp_path / "b")
    path = tmp_path / "b" / "x86-64" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    code, out, err = edgekit("inspect", tmp_path / "b")
    assert code == 7
    assert "x86-64/model.onnx is not the file that was sealed" in err
    assert out == ""


def test_inspect_of_a_folder_without_a_bundle_is_exit_code_2(tmp_path):
    code, _, err = edgekit("inspect", tmp_path)
    assert code == 2
    assert "is no bundle" in err


@pytest.mark.slow
def test_a_language_model_is_exported_in_the_precision_asked_for(tmp_path):
    folder = llama_folder(tmp_path / "llama")
    code, out, err = edgekit("export", folder, "--target", "llama-cpp", "--precision", "Q4_0", "-o", tmp_path / "b")
    assert code == 0, err
    assert "tensor types: " in out
    assert ("checked" if importlib.util.find_spec("xllamacpp") else "evaluated") in out
    code, out, _ = edgekit("inspect", tmp_path / "b")
    assert code == 0
    assert "q4_0" in out
