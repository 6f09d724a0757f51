"""Half precision: planned without data, nearer than int8, and refused where a half cannot hold a weight."""

from dataclasses import replace

import numpy as np
import pytest
from fakes import digits

from edgekit import workload
from edgekit.compress.passes.float16 import Float16
from edgekit.compress.simulation import planned_network
from edgekit.errors import CompressionError
from edgekit.model import LlamaFolder, Model
from edgekit.progress import silent

torch = pytest.importorskip("torch")


def half(model):
    return Float16().apply(model, silent)


def test_halves_are_nearer_to_the_float_model_than_integers_and_not_equal_to_it():
    model = digits.model()
    images = model.data.test.inputs
    truth = model.network.run(images)["scores"]
    errors = [np.abs(planned_network(m).run(images)["scores"] - truth).max() for m in (half(model), digits.quantized())]
    assert 1e-5 < errors[0] < errors[1] / 10
    assert half(model).precision == "fp16"


def test_no_data_is_needed_and_the_bytes_are_half():
    from edgekit.compress import evaluate

    model = digits.model()
    planned = half(replace(model, data=None))
    assert planned.lineage[-1].measured["folded"] > 0
    assert evaluate.stored_bytes(planned) == pytest.approx(evaluate.stored_bytes(planned_as_float(planned)) / 2)


def planned_as_float(model):
    return replace(model, plan=None)


def test_an_onnx_file_is_taken_too():
    model = workload.load(str(digits.onnx_file()), None, digits.example().data())
    planned = half(model)
    images = model.data.test.inputs
    assert planned.precision == "fp16"
    np.testing.assert_allclose(
        planned_network(planned).run(images)["scores"], model.network.run(images)["scores"], atol=0.05
    )


def test_what_a_half_cannot_hold_is_named():
    images = digits.model().data.calibration.inputs["image"]
    from edgekit.model import Data, Split

    net = torch.nn.Conv2d(1, 2, 3)
    with torch.no_grad():
        net.weight[1, 0, 0, 0] = 70000.0
    with pytest.raises(CompressionError, match=r"weight 'weight' holds 70000; 16-bit floats end at 65504"):
        half(workload.from_module("large", net.eval(), Data(Split({"image": images}))))


def test_planned_models_and_language_models_are_refused(tmp_path):
    with pytest.raises(CompressionError, match="quantized already"):
        half(digits.quantized())
    with pytest.raises(CompressionError, match="GGUF chooses"):
        half(Model(name="llama", task="text-generation", network=LlamaFolder(tmp_path)))
