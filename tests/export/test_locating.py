"""A file that fails its parity check: the error names the layer at which it breaks."""

import dataclasses

import msgspec
import pytest
from fakes.exportable import tiny_model, with_plan

from edgekit import device_profiles, workload
from edgekit.errors import ParityError
from edgekit.export import export, locating
from edgekit.export.onnx_file import float_graph
from edgekit.model import OnnxNetwork
from edgekit.plan import Range

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")


def with_a_broken_range(model, name):
    """Return the model with a range that cuts off nearly everything an activation holds."""
    ranges = {**model.plan.activations, name: Range(0.0, 1e-4)}
    return dataclasses.replace(model, plan=msgspec.structs.replace(model.plan, activations=ranges))


@pytest.mark.parametrize(("activation", "layer"), [("relu6", "depthwise"), ("relu_1", "down")])
@pytest.mark.parametrize("target", ["x86-64", "jetson-orin-nano"])
def test_the_first_layer_that_breaks_is_named(tiny_int8, tmp_path, activation, layer, target):
    made = with_a_broken_range(tiny_int8, activation)
    error = export(made, [device_profiles.load(target)], tmp_path / "b").first_error
    assert isinstance(error, ParityError)
    assert f"it breaks first at {layer!r}" in error.message
    assert not (tmp_path / "b").exists()


def test_of_an_onnx_file_it_is_the_value(tiny, tmp_path):
    path = tmp_path / "tiny.onnx"
    path.write_bytes(float_graph(tiny, 21).proto.SerializeToString())
    model = workload.load(str(path), data=tiny.data)
    assert isinstance(model.network, OnnxNetwork)
    from edgekit.compress.passes.quantize import Quantize
    from edgekit.progress import silent

    planned = Quantize().apply(model, silent)
    name = next(one for one in planned.plan.activations if "relu6" in one or "clip" in one.lower())
    error = export(with_a_broken_range(planned, name), [device_profiles.load("x86-64")], tmp_path / "b").first_error
    assert f"it breaks first at {name!r}" in error.message


def test_the_probed_network_computes_the_same_and_its_layers_in_order(tiny):
    probed, names = locating._probed(tiny)
    inputs = tiny.data.calibration.head(4).inputs
    want, got = tiny.network.run(inputs), probed.network.run(inputs)
    assert list(names.values()) == ["stem", "depthwise", "down", "head"]
    assert (got["scores"] == want["scores"]).all()
    assert got["probe_0"].min() >= 0, "it is what comes behind the ReLU"


def test_where_nothing_can_be_told_the_error_stays(tiny_int8, monkeypatch):
    from edgekit.errors import ExportError

    def fail(*_):
        raise ExportError("no such export")

    monkeypatch.setattr(locating, "_measured", fail)
    assert locating.first_broken(tiny_int8, device_profiles.load("x86-64"), None, 10.0) is None
    plain = with_plan(tiny_model())
    nothing = dataclasses.replace(plain, network=object())
    assert locating.first_broken(nothing, device_profiles.load("x86-64"), None, 10.0) is None
