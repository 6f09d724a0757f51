"""``edgekit run``: a picture, arrays or a prompt, once."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from fakes import bundles
from PIL import Image

from edgekit.cli.run import COMMAND


def run(*arguments):
    return CliRunner().invoke(COMMAND, [str(a) for a in arguments])


def test_picture_gives_a_table_of_labels(tmp_path):
    sealed = bundles.brightness_bundle(tmp_path / "b")
    Image.new("RGB", (30, 20), (9, 9, 9)).save(tmp_path / "night.png")
    result = run(tmp_path / "b", tmp_path / "night.png", "--top", 1)
    assert result.exit_code == 0
    assert "| dark  | 100.0%" in result.output
    assert "bright" not in result.output
    document = json.loads(run(tmp_path / "b", tmp_path / "night.png", "--json").output)
    assert document["labels"][0]["label"] == "dark"
    assert document["digest"] == sealed.digest


def test_array_gives_a_summary_or_a_file(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    image = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    np.save(tmp_path / "x.npy", image)
    np.savez(tmp_path / "x.npz", image=image)
    shown = run(tmp_path / "b", tmp_path / "x.npy")
    assert "| scores | float32 | 2 x 10 |" in shown.output
    written = run(tmp_path / "b", tmp_path / "x.npz", "-o", tmp_path / "y.npz", "--variant", "x86-64")
    assert written.exit_code == 0
    with np.load(tmp_path / "y.npz") as outputs:
        np.testing.assert_allclose(outputs["scores"], bundles.mlp_numpy(image), atol=1e-5)
    document = json.loads(run(tmp_path / "b", tmp_path / "x.npy", "--json").output)
    assert document["considered"] == {document["variant"]: document["choice"]}
    np.testing.assert_allclose(document["outputs"]["scores"], bundles.mlp_numpy(image), atol=1e-5)


def test_prompt_is_answered(tmp_path):
    bundles.null_bundle(tmp_path / "b", text=True)
    assert run(tmp_path / "b", "one two three", "--max-tokens", 2).output == "one two \n"
    document = json.loads(run(tmp_path / "b", "one two three", "--json").output)
    assert (document["text"], document["finish"]) == ("one two three ", "stop")
    assert run(tmp_path / "b", "one", "--quiet").output == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "there is no file"),
        ("broken.png", b"no picture", "are no picture"),
        ("broken.npy", b"no array", "holds no arrays"),
        ("broken.npz", b"PK no zip", "holds no arrays"),
    ],
)
def test_bad_input_is_exit_code_2(tmp_path, name, content, message):
    bundles.brightness_bundle(tmp_path / "b")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = run(tmp_path / "b", tmp_path / name)
    assert result.exit_code == 2
    assert message in result.output


def test_array_of_another_shape_names_the_input(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    np.save(tmp_path / "x.npy", np.zeros((2, 63), np.float32))
    result = run(tmp_path / "b", tmp_path / "x.npy")
    assert result.exit_code == 2
    assert "input 'image' has shape [2, 63]" in result.output


def test_single_array_for_two_inputs_asks_for_names(tmp_path):
    import msgspec

    from edgekit import bundle
    from edgekit.manifest import Manifest
    from edgekit.tensors import TensorSpec

    variant = bundles.variant("any", "null", "m.json")
    outputs = (TensorSpec("text", "object", (-1,)),)
    inputs = (TensorSpec("a", "float32", (-1,)), TensorSpec("b", "float32", (-1,)))
    manifest = Manifest(
        name="two", version="1", task="tensor", inputs=inputs, outputs=outputs, variants=(variant,), files=()
    )
    bundle.seal(tmp_path / "b", manifest, {"m.json": msgspec.json.encode({"outputs": outputs})})
    np.save(tmp_path / "x.npy", np.zeros(2, np.float32))
    result = run(tmp_path / "b", tmp_path / "x.npy")
    assert result.exit_code == 2
    assert "2 inputs: a, b" in result.output
    np.savez(tmp_path / "x.npz", a=np.zeros(2, np.float32), b=np.zeros(2, np.float32))
    assert "| text   | object | 2" in run(tmp_path / "b", tmp_path / "x.npz").output
