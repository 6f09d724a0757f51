"""Small sealed bundles for tests: tiny ONNX models that are built in place, and what the null backend answers."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgekit import bundle
from edgekit.manifest import Classification, Golden, ImagePreprocess, Manifest, Parity, Port, Variant
from edgekit.tensors import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

CHECKED = Parity(status="checked")


def gemm_onnx(weights, bias=None, batch="n", names=("x", "y")):
    """Return the bytes of ``y = x @ weights + bias``."""
    from onnx import TensorProto, helper, numpy_helper

    weights = np.asarray(weights, np.float32)
    bias = np.zeros(weights.shape[1], np.float32) if bias is None else np.asarray(bias, np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", [names[0], "w", "b"], [names[1]])],
        "gemm",
        [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, [batch, weights.shape[0]])],
        [helper.make_tensor_value_info(names[1], TensorProto.FLOAT, [batch, weights.shape[1]])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")],
    )
    return _model(graph)


def mlp_onnx(seed=0, sizes=(64, 64, 64, 10), names=("x", "y")):
    """Return the bytes of a perceptron with ReLU between its layers; float32 [n, sizes[0]] to [n, sizes[-1]]."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(seed)
    nodes, weights, last = [], [], names[0]
    for i, (a, b) in enumerate(pairwise(sizes)):
        weights.append(numpy_helper.from_array(random.normal(0, a**-0.5, (a, b)).astype(np.float32), f"w{i}"))
        weights.append(numpy_helper.from_array(random.normal(0, 0.1, b).astype(np.float32), f"b{i}"))
        final = i == len(sizes) - 2
        nodes.append(helper.make_node("Gemm", [last, f"w{i}", f"b{i}"], [names[1] if final else f"h{i}"]))
        last = f"h{i}"
        if not final:
            nodes.append(helper.make_node("Relu", [last], [f"r{i}"]))
            last = f"r{i}"
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, ["n", sizes[0]])],
        [helper.make_tensor_value_info(names[1], TensorProto.FLOAT, ["n", sizes[-1]])],
        weights,
    )
    return _model(graph)


def _model(graph):
    from onnx import checker, helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    checker.check_model(model)
    return model.SerializeToString()


def npy(array) -> bytes:
    """Return the bytes of a ``.npy`` file."""
    import io

    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def variant(name="x86-64", file_format="onnx", main=None, **fields) -> Variant:
    """Return a variant with one file, whose parity is what the test says."""
    main = main or f"{name}/model.{file_format}"
    defaults = {"precision": "fp32", "files": (main,), "parity": CHECKED}
    return Variant(name=name, format=file_format, main=main, **{**defaults, **fields})


def mlp_bundle(folder: Path, *, seed=0, name="mlp", version="1", wrong_golden=False, parity=None, **draft):
    """Seal a classifier x[n, 64] -> y[n, 10] with golden samples that an independent NumPy computation made."""
    sizes = (64, 64, 64, 10)
    data = mlp_onnx(seed, sizes)
    samples = np.random.default_rng(99).normal(size=(8, 64)).astype(np.float32)
    expected = mlp_numpy(samples, seed, sizes)
    if wrong_golden:
        expected = -expected
    limits = parity or Parity(status="checked", min_sqnr_db=40.0, min_top1_agreement=0.99)
    one = variant(
        inputs=(Port(name="image", key="x", dtype="float32"),),
        outputs=(Port(name="scores", key="y", dtype="float32"),),
        parity=limits,
    )
    manifest = Manifest(
        **{
            "name": name,
            "version": version,
            "task": "classification",
            "inputs": (TensorSpec("image", "float32", (-1, 64)),),
            "outputs": (TensorSpec("scores", "float32", (-1, 10)),),
            "postprocess": Classification(output="scores", labels=tuple("abcdefghij"), top_k=3),
            "variants": (one,),
            "golden": Golden(inputs={"image": "golden/image.npy"}, outputs={"scores": "golden/scores.npy"}),
            "files": (),
            **draft,
        }
    )
    files = {one.main: data, "golden/image.npy": npy(samples), "golden/scores.npy": npy(expected)}
    return bundle.seal(folder, manifest, files)


def wide_bundle(folder: Path, *, name="wide", width=2048, seed=0):
    """Seal one square matrix of float32, 16 MiB by default: x[n, width] -> y[n, width]."""
    weights = np.random.default_rng(seed).normal(0, width**-0.5, (width, width)).astype(np.float32)
    one = variant(
        inputs=(Port(name="image", key="x", dtype="float32"),), outputs=(Port(name="scores", key="y", dtype="float32"),)
    )
    manifest = Manifest(
        name=name,
        version="1",
        task="tensor",
        inputs=(TensorSpec("image", "float32", (-1, width)),),
        outputs=(TensorSpec("scores", "float32", (-1, width)),),
        variants=(one,),
        files=(),
    )
    return bundle.seal(folder, manifest, {one.main: gemm_onnx(weights)})


def mlp_numpy(x, seed=0, sizes=(64, 64, 64, 10)):
    """Compute what `mlp_onnx` computes, in NumPy and float64."""
    random = np.random.default_rng(seed)
    x = np.asarray(x, np.float64)
    for i, (a, b) in enumerate(pairwise(sizes)):
        weights = random.normal(0, a**-0.5, (a, b)).astype(np.float32)
        x = x @ weights + random.normal(0, 0.1, b).astype(np.float32)
        if i < len(sizes) - 2:
            x = np.maximum(x, 0)
    return x.astype(np.float32)


def brightness_bundle(folder: Path, **draft):
    """Seal a classifier of 8 x 8 grey pictures by their mean: below 128 it is dark, else bright."""
    weights = np.stack([np.full(64, -1 / 64), np.full(64, 1 / 64)], 1)
    one = variant(
        inputs=(Port(name="image", key="x", dtype="float32"),),
        outputs=(Port(name="scores", key="y", dtype="float32"),),
        main="x86-64/model.onnx",
    )
    manifest = Manifest(
        **{
            "name": "brightness",
            "version": "1",
            "task": "classification",
            "inputs": (TensorSpec("image", "float32", (-1, 1, 8, 8)),),
            "outputs": (TensorSpec("scores", "float32", (-1, 2)),),
            "preprocess": ImagePreprocess(input="image", resize=8, crop=8, mode="L", mean=(128.0,), std=(1.0,)),
            "postprocess": Classification(output="scores", labels=("dark", "bright")),
            "variants": (one,),
            "files": (),
            **draft,
        }
    )
    return bundle.seal(folder, manifest, {one.main: _flat_gemm(weights)})


def _flat_gemm(weights):
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])],
        "brightness",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weights.shape[1]])],
        [numpy_helper.from_array(weights.astype(np.float32), "w")],
    )
    return _model(graph)


def constant_bundle(folder: Path, value, **draft):
    """Seal a model of 32 x 32 grey pictures that answers ``value`` to each, as ``y`` [n, *value.shape]."""
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("ReduceSum", ["x", "axes"], ["s"], keepdims=0),
        helper.make_node("Mul", ["s", "zero"], ["z"]),
        helper.make_node("Reshape", ["z", "shape"], ["r"]),
        helper.make_node("Add", ["r", "value"], ["y"]),
    ]
    constants = {
        "axes": np.array([1, 2, 3]),
        "zero": np.zeros(1, np.float32),
        "shape": np.array([-1] + [1] * value.ndim),
        "value": value[None],
    }
    graph = helper.make_graph(
        nodes,
        "constant",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", *value.shape])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    one = variant(
        inputs=(Port(name="image", key="x", dtype="float32"),),
        outputs=(Port(name="y", key="y", dtype="float32"),),
        main="x86-64/model.onnx",
    )
    tensors = {"inputs": (TensorSpec("image", "float32", (-1, 1, 32, 32)),)}
    manifest = Manifest(**{"name": "constant", "version": "1", "variants": (one,), "files": (), **tensors, **draft})
    return bundle.seal(folder, manifest, {one.main: _model(graph)})


def null_bundle(folder: Path, *, value=0.0, name="null", version="1", text=False, file_format="null"):
    """Seal a bundle of the null backend: every score is ``value``; or an echo of text."""
    outputs = [{"name": "scores", "dtype": "float32", "shape": [-1, 4]}]
    content = {"text": True} if text else {"outputs": outputs, "value": value}
    one = variant("any", file_format, "any/model.json")
    tensors = {
        "inputs": (TensorSpec("image", "float32", (-1, 3)),),
        "outputs": (TensorSpec("scores", "float32", (-1, 4)),),
    }
    manifest = Manifest(
        name=name,
        version=version,
        task="text-generation" if text else "tensor",
        variants=(one,),
        files=(),
        **({} if text else tensors),
    )
    return bundle.seal(folder, manifest, {one.main: msgspec.json.encode(content)})
