"""Hugging Face folders without data: optimum says what an architecture takes, export does the rest."""

import builtins

import numpy as np
import pytest
from click.testing import CliRunner

from edgekit import architectures, bundle, load
from edgekit.cli import cli
from edgekit.errors import MissingExtra, UsageError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def made(folder, kind, config):
    torch.manual_seed(0)
    network = getattr(transformers, kind)(config).eval()
    network.save_pretrained(folder)
    return network


def bert(folder):
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=24, num_labels=3, **SIZES)
    return made(folder, "BertForSequenceClassification", config)


def vit(folder):
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=5, **SIZES)
    return made(folder, "ViTForImageClassification", config)


@pytest.mark.parametrize("make", [bert, vit])
def test_a_folder_without_data_is_exported_and_answers_as_transformers_does(tmp_path, make):
    pytest.importorskip("optimum.exporters.onnx")
    network = make(tmp_path / "folder")
    done = CliRunner().invoke(cli, ["export", str(tmp_path / "folder"), "--format", "onnx", "-o", str(tmp_path / "b")])
    assert done.exit_code == 0, done.output
    assert "compared on inputs at random" in done.output
    given = architectures.invented(tmp_path / "folder").calibration.inputs
    with torch.no_grad():
        wanted = network(**{name: torch.as_tensor(array) for name, array in given.items()})["logits"].numpy()
    with load(tmp_path / "b") as session:
        found = session.run(given)["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert bundle.read(tmp_path / "b").manifest.variants[0].parity.status == "checked"


def test_the_inputs_are_the_same_every_time_and_leave_other_randomness_alone(tmp_path):
    pytest.importorskip("optimum.exporters.onnx")
    bert(tmp_path)
    torch.manual_seed(5)
    one = architectures.invented(tmp_path).calibration.inputs
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert drawn == torch.rand(1)
    other = architectures.invented(tmp_path).calibration.inputs
    assert {name: array.shape for name, array in one.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "token_type_ids"), (architectures.SAMPLES, 24)
    )
    assert all((one[name] == other[name]).all() for name in one)
    assert 0 < one["attention_mask"].mean() < 1


def test_what_optimum_does_not_know_needs_data(tmp_path):
    pytest.importorskip("optimum.exporters.onnx")
    made(tmp_path, "FNetModel", transformers.FNetConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(UsageError, match="optimum knows no inputs for") as told:
        architectures.invented(tmp_path)
    assert "--data" in told.value.hint


def test_without_optimum_the_command_is_told(tmp_path, monkeypatch):
    bert(tmp_path)
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name.startswith("optimum"):
            raise ModuleNotFoundError(name=name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra) as told:
        architectures.invented(tmp_path)
    assert "edgekit[optimum]" in told.value.hint


def test_compress_still_asks_for_data(tmp_path):
    bert(tmp_path)
    done = CliRunner().invoke(cli, ["compress", str(tmp_path), "-o", str(tmp_path / "o")])
    assert done.exit_code == 2
    assert "needs data" in done.output
