"""Opening a bundle: which variant, which engine, and why; ports that rename, transpose and cast."""

import sys

import msgspec
import numpy as np
import pytest
from fakes import bundles
from hypothesis import given
from hypothesis import strategies as st

import edgekit
from edgekit import bundle, device_profiles
from edgekit.device_profiles import Detection
from edgekit.errors import BundleError, HealthError, InputError, MissingExtra, UnknownName, UsageError
from edgekit.manifest import Manifest, Port
from edgekit.runtime import Contract, Session, TextSession, open_variant
from edgekit.runtime import ports as port_laws
from edgekit.runtime.backends import Message, Sampling
from edgekit.tensors import TensorSpec


def several(folder, *formats):
    variants = tuple(bundles.variant(name, form) for name, form in formats)
    contents = {
        "onnx": bundles.gemm_onnx(np.ones((3, 4), np.float32), names=("image", "scores")),
        "null": b'{"outputs": [{"name": "scores", "dtype": "float32", "shape": [-1, 4]}]}',
    }
    manifest = Manifest(
        name="several",
        version="1",
        task="tensor",
        inputs=(TensorSpec("image", "float32", (-1, 3)),),
        outputs=(TensorSpec("scores", "float32", (-1, 4)),),
        variants=variants,
        files=(),
    )
    bundle.seal(folder, manifest, {v.main: contents.get(v.format, b"opaque") for v in variants})
    return folder


@pytest.fixture
def on_raspberry_pi(monkeypatch):
    profile = device_profiles.load("raspberry-pi-5")
    monkeypatch.setattr(device_profiles, "detect", lambda: msgspec.structs.replace(profile, detect=Detection()))


def test_detected_hardware_class_wins(tmp_path, on_raspberry_pi):
    with edgekit.load(several(tmp_path / "b", ("x86-64", "null"), ("raspberry-pi-5", "onnx"))) as session:
        assert session.variant.name == "raspberry-pi-5"
        assert session.choice == "the detected hardware class"


def test_named_variant_wins_over_the_detected_one(tmp_path, on_raspberry_pi):
    folder = several(tmp_path / "b", ("x86-64", "null"), ("raspberry-pi-5", "onnx"))
    with edgekit.load(folder, variant="x86-64") as session:
        assert (session.variant.name, session.engine, session.choice) == ("x86-64", "null", "named by the caller")


def test_first_installed_engine_serves_where_the_class_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(device_profiles, "detect", lambda: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    folder = several(tmp_path / "b", ("iphone-15", "coreml"), ("pc", "onnx"), ("dry", "null"))
    with edgekit.load(folder) as session:
        assert session.variant.name == "dry"
        assert "first whose engine (null) is installed" in session.choice


def test_every_variant_that_was_considered_is_told_with_its_reason(tmp_path, on_raspberry_pi, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    folder = several(
        tmp_path / "b",
        ("strange", "qnn"),
        ("dry", "null"),
        ("raspberry-pi-5", "onnx"),
        ("late", "null"),
        ("gone", "null"),
    )
    (folder / "gone/model.null").unlink()
    with edgekit.load(folder) as session:
        assert session.considered == (
            ("raspberry-pi-5", "this needs onnxruntime, which is not installed"),
            ("dry", "first whose engine (null) is installed"),
            ("late", "comes after dry"),
            ("strange", "no engine runs qnn"),
            ("gone", "its file is not in this folder"),
        )
        assert dict(session.considered)[session.variant.name] == session.choice
    with edgekit.load(folder, variant="late") as session:
        assert session.considered[0] == ("late", "named by the caller")
        assert set(session.considered[1:]) == {
            (name, "late was named") for name in ("strange", "dry", "raspberry-pi-5", "gone")
        }


def broken_first(folder, *formats):
    """Seal a bundle whose first variant's file is the right one byte by byte, and no engine takes it."""
    variants = tuple(bundles.variant(name, form) for name, form in formats)
    contents = {v.main: b'{"outputs": [{"name": "scores", "dtype": "float32", "shape": [-1, 4]}]}' for v in variants}
    contents[variants[0].main] = b"no model of any kind"
    tensors = {
        "inputs": (TensorSpec("image", "float32", (-1, 3)),),
        "outputs": (TensorSpec("scores", "float32", (-1, 4)),),
    }
    manifest = Manifest(name="broken", version="1", task="tensor", variants=variants, files=(), **tensors)
    bundle.seal(folder, manifest, contents)
    return folder


def test_a_variant_that_its_engine_refuses_leaves_the_next_with_a_warning(tmp_path, on_raspberry_pi, caplog):
    folder = broken_first(tmp_path / "b", ("raspberry-pi-5", "onnx"), ("dry", "null"))
    with edgekit.load(folder) as session:
        assert session.variant.name == "dry"
        assert "refuses model.onnx" in dict(session.considered)["raspberry-pi-5"]
    assert "variant raspberry-pi-5 does not open, the next one is tried: " in caplog.text


def test_a_variant_that_was_named_is_never_left_for_another(tmp_path, on_raspberry_pi, caplog):
    folder = broken_first(tmp_path / "b", ("raspberry-pi-5", "onnx"), ("dry", "null"))
    with pytest.raises(HealthError, match=r"refuses model\.onnx"):
        edgekit.load(folder, variant="raspberry-pi-5")
    assert not caplog.records


def test_the_refusal_of_an_engine_outweighs_an_engine_that_is_missing(tmp_path, monkeypatch):
    folder = broken_first(tmp_path / "b", ("dry", "null"), ("pc", "onnx"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(HealthError, match="no file of the null backend"):
        edgekit.load(folder)


def test_a_class_that_is_given_takes_the_place_of_the_detected_one(tmp_path, on_raspberry_pi):
    folder = several(tmp_path / "b", ("raspberry-pi-5", "null"), ("pixel-8", "null"))
    with edgekit.load(folder, profile="pixel-8") as session:
        assert (session.variant.name, session.choice) == ("pixel-8", "the given hardware class")
    with pytest.raises(UnknownName):
        edgekit.load(folder, profile="pixel-88")


def test_missing_engine_of_the_only_variant_names_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match="onnxruntime"):
        edgekit.load(several(tmp_path / "b", ("pc", "onnx")))


def test_bundle_that_cannot_run_here_says_what_it_holds(tmp_path):
    folder = several(tmp_path / "b", ("iphone-15", "coreml"))
    with pytest.raises(UsageError, match="it holds coreml"):
        edgekit.load(folder)
    with pytest.raises(UsageError, match="no engine runs coreml here"):
        edgekit.load(folder, variant="iphone-15")


def test_unknown_variant_offers_the_nearest_name(tmp_path):
    with pytest.raises(UnknownName) as caught:
        edgekit.load(several(tmp_path / "b", ("x86-64", "null")), variant="x86_64")
    assert "x86-64" in caught.value.hint


def test_folder_without_manifest_is_no_bundle(tmp_path):
    with pytest.raises(UsageError, match="is no bundle"):
        edgekit.load(tmp_path)


def test_changed_byte_is_never_loaded(tmp_path):
    folder = several(tmp_path / "b", ("pc", "onnx"))
    main = folder / "pc/model.onnx"
    main.write_bytes(main.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match="not the file that was sealed"):
        edgekit.load(folder)


def test_device_that_holds_only_its_own_files_loads(tmp_path, on_raspberry_pi):
    folder = several(tmp_path / "b", ("x86-64", "null"), ("raspberry-pi-5", "onnx"))
    (folder / "x86-64/model.null").unlink()
    with edgekit.load(folder) as session:
        assert session.variant.name == "raspberry-pi-5"


def test_session_carries_the_digest_of_its_bundle(tmp_path):
    sealed = bundles.mlp_bundle(tmp_path / "b")
    with edgekit.load(tmp_path / "b") as session:
        assert session.digest == sealed.digest


def test_int8_and_channel_last_file_is_used_through_public_names(tmp_path):
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Identity", ["nhwc"], ["same"])],
        "identity",
        [helper.make_tensor_value_info("nhwc", TensorProto.INT8, [1, 4, 5, 3])],
        [helper.make_tensor_value_info("same", TensorProto.INT8, [1, 4, 5, 3])],
    )
    (tmp_path / "m.onnx").write_bytes(bundles._model(graph))
    variant = bundles.variant(
        "pc",
        "onnx",
        "m.onnx",
        batch=1,
        inputs=(Port(name="image", key="nhwc", dtype="int8", axes=(0, 2, 3, 1)),),
        outputs=(Port(name="scores", key="same", dtype="int8", axes=(0, 2, 3, 1)),),
    )
    spec = (-1, 3, 4, 5)
    contract = Contract(
        inputs=(TensorSpec("image", "float32", spec),), outputs=(TensorSpec("scores", "float32", spec),)
    )
    image = np.random.default_rng(0).integers(-128, 128, (3, 3, 4, 5)).astype(np.float32)
    with open_variant(tmp_path, variant, contract) as session:
        scores = session.run({"image": image})["scores"]
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, image)


def test_port_that_names_no_tensor_is_refused(tmp_path):
    variant = bundles.variant("pc", "null", "m.json", inputs=(Port(name="img", key="x", dtype="float32"),))
    (tmp_path / "m.json").write_bytes(b"{}")
    with pytest.raises(InputError, match="a port for 'img'"):
        open_variant(tmp_path, variant, Contract(inputs=(TensorSpec("image", "float32", (-1, 3)),)))


def test_inputs_of_different_batches_are_refused():
    specs = (TensorSpec("a", "float32", (-1, 2)), TensorSpec("b", "float32", (-1, 2)))
    arrays = {"a": np.zeros((2, 2), np.float32), "b": np.zeros((3, 2), np.float32)}
    with pytest.raises(InputError, match="'b' has 3 samples, another input has 2"):
        port_laws.check_inputs(arrays, specs)


@given(axes=st.permutations(range(4)), dtype=st.sampled_from(["float32", "float16", "int16"]))
def test_from_file_undoes_to_file(axes, dtype):
    array = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    spec = TensorSpec("t", "float32", (-1, 3, 4, 5))
    port = Port(name="t", key="k", dtype=dtype, axes=tuple(axes))
    back = port_laws.from_file(port_laws.to_file({"t": array}, [port]), [port], [spec])
    np.testing.assert_array_equal(back["t"], array)


@given(batch=st.integers(1, 20), size=st.integers(1, 7))
def test_chunks_have_one_size_and_join_to_the_whole(batch, size):
    spec = TensorSpec("t", "int64", (-1, 2))
    fixed = TensorSpec("f", "int64", (3,))
    arrays = {"t": np.arange(batch * 2).reshape(batch, 2), "f": np.arange(3)}
    parts = port_laws.chunks(arrays, [spec, fixed], size)
    assert {len(part["t"]) for part in parts} == {size}
    whole = port_laws.joined(parts, [spec, fixed], batch)
    np.testing.assert_array_equal(whole["t"], arrays["t"])
    np.testing.assert_array_equal(whole["f"], arrays["f"])


def test_text_bundle_gives_a_text_session_that_echoes(tmp_path):
    bundles.null_bundle(tmp_path / "b", text=True)
    with edgekit.load(tmp_path / "b") as session:
        assert isinstance(session, TextSession)
        pieces = list(session.stream([Message("user", "one two three")], Sampling(max_tokens=2)))
        assert "".join(p.text for p in pieces) == "one two "
        assert pieces[-1].finish == "length"
        with pytest.raises(InputError):
            session.complete("")
        with pytest.raises(InputError):
            session.stream([])
    with pytest.raises(UsageError, match="closed"):
        session.complete("more")


def test_import_of_the_runtime_brings_no_numpy_and_no_engine():
    import subprocess

    code = "import sys, edgekit.runtime.host; print([m for m in ('numpy', 'onnxruntime', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_tensor_bundle_gives_a_tensor_session(tmp_path):
    bundles.null_bundle(tmp_path / "b", value=2.5)
    with edgekit.load(str(tmp_path / "b"), threads=1) as session:
        assert isinstance(session, Session)
        assert session.run({"image": np.zeros((2, 3), np.float32)})["scores"].tolist() == [[2.5] * 4] * 2
