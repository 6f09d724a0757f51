"""One conformance test for every tensor backend that is found: the same promises, whatever the engine."""

import threading

import msgspec
import numpy as np
import pytest
from fakes import bundles, core_ml, gguf_files
from fakes.engine_files import CONTRACT, HELD, KINDS, WEIGHTS, WRITERS, echo_contract, echoed, ports, write

from edgekit import guards, plugins
from edgekit.errors import EdgekitError, HealthError, InputError, MissingExtra, UsageError
from edgekit.runtime import Contract, open_variant
from edgekit.runtime.backends import EngineOptions
from edgekit.tensors import TensorSpec

BACKENDS = plugins.names("edgekit.runtime.backends")
GUARDS = plugins.names("edgekit.guards")
TENSOR_BACKENDS = [name for name in BACKENDS if name != "gguf"]


@pytest.fixture(autouse=True)
def a_mac(request, monkeypatch):
    """Core ML's engine exists on a Mac only: its file is computed by a stand-in."""
    if "coreml" in request.node.name:
        core_ml.stand_in(monkeypatch)


@pytest.fixture(scope="module", params=TENSOR_BACKENDS)
def written(request, tmp_path_factory):
    if request.param not in WRITERS or request.param not in HELD:
        pytest.fail(f"the backend {request.param} has no writer in tests/fakes/engine_files.py: add one")
    folder = tmp_path_factory.mktemp(request.param)
    try:
        return folder, write(request.param, folder)
    except MissingExtra as error:
        pytest.skip(error.message)


@pytest.fixture
def session(written):
    with open_variant(*written, CONTRACT, EngineOptions(threads=1), choice="test") as opened:
        yield opened


def expected(session, image):
    return np.full((len(image), 4), 7, np.float32) if session.variant.format == "null" else image @ WEIGHTS


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_any_batch_is_computed_whatever_batch_the_file_has(session, batch):
    image = np.random.default_rng(batch).normal(size=(batch, 3)).astype(np.float32)
    scores = session.run({"image": image})["scores"]
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected(session, image), rtol=1e-4, atol=1e-4)


def test_array_that_is_not_contiguous_gives_the_same(session):
    image = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32).T[:, :]
    np.testing.assert_allclose(session.run({"image": image})["scores"], expected(session, image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"picture": np.zeros((1, 3), np.float32)}, "no input 'picture'"),
        ({}, "'image' is missing"),
        ({"image": np.zeros((1, 3))}, "'image' is float64, the model wants float32"),
        ({"image": np.zeros((1, 4), np.float32)}, r"'image' has shape \[1, 4\]"),
        ({"image": np.zeros(3, np.float32)}, r"'image' has shape \[3\]"),
        ({"image": np.zeros((0, 3), np.float32)}, "'image' is an empty batch"),
        ({"image": [[1.0, 2.0, 3.0]]}, "'image' is a list"),
        ({"image": np.zeros((1, 3), np.float32), "more": np.zeros(1)}, "no input 'more'"),
    ],
)
def test_input_that_does_not_fit_is_named(session, inputs, message):
    with pytest.raises(InputError, match=message):
        session.run(inputs)


def test_many_threads_get_their_own_answers(session):
    wrong = []

    def ask(seed):
        random = np.random.default_rng(seed)
        for _ in range(30):
            image = random.normal(size=(2, 3)).astype(np.float32)
            if not np.allclose(session.run({"image": image})["scores"], expected(session, image), atol=1e-3):
                wrong.append(seed)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_closed_session_says_so_and_closes_twice(session):
    session.close()
    session.close()
    with pytest.raises(UsageError, match="closed"):
        session.run({"image": np.zeros((1, 3), np.float32)})


def test_close_while_running_answers_rightly_or_says_that_it_is_closed(written):
    session = open_variant(*written, CONTRACT, EngineOptions(threads=1))
    surprises, answered, started = [], [], threading.Semaphore(0)

    def ask(seed):
        image = np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)
        try:
            while True:
                scores = session.run({"image": image})["scores"]
                answered.append(seed)
                if not np.allclose(scores, expected(session, image), atol=1e-3):
                    surprises.append(scores)
                started.release()
        except UsageError:
            pass
        except EdgekitError as error:
            surprises.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        assert started.acquire(timeout=60)
    session.close()
    session.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not surprises
    assert len(answered) >= 20


def test_an_answer_is_its_callers_own(session):
    """Nothing that is asked later changes it, and who writes into it changes nobody else's."""
    first, second = (np.full((2, 3), value, np.float32) for value in (1, 2))
    mine = session.run({"image": first})["scores"]
    other = session.run({"image": second})["scores"]
    assert not np.shares_memory(mine, other)
    np.testing.assert_allclose(mine, expected(session, first), rtol=1e-4)
    other[:] = -1
    np.testing.assert_allclose(mine, expected(session, first), rtol=1e-4)
    np.testing.assert_allclose(session.run({"image": second})["scores"], expected(session, second), rtol=1e-4)


def test_nan_goes_in_and_nan_comes_out_of_its_own_sample_only(session):
    image = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    image[1, 2] = np.nan
    scores = session.run({"image": image})["scores"]
    if session.variant.format == "null":
        assert np.isfinite(scores).all()
        return
    assert np.isnan(scores[1]).all()
    np.testing.assert_allclose(scores[[0, 2]], image[[0, 2]] @ WEIGHTS, rtol=1e-4, atol=1e-4)


def test_infinity_is_an_answer_and_no_crash(session):
    scores = session.run({"image": np.full((1, 3), np.inf, np.float32)})["scores"]
    assert scores.shape == (1, 4)


SAMPLES = {
    "float16": np.array([[0.5, -2, 6.1e-5], [1024, 0, -0.25], [3, 4, 5]], np.float16),
    "int64": np.array([[1, -2, 3], [0, 1 << 29, -(1 << 29)], [7, 8, 9]], np.int64),
    "bool": np.array([[True, False, True], [False, False, False], [True, True, True]]),
    "text": np.array([["one", "", "three"], ["vier", "fünf", "六"], ["7", "8", "9"]], object),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TENSOR_BACKENDS)
def test_every_type_that_a_format_holds_goes_through_unchanged(name, kind, tmp_path):
    variant = write(name, tmp_path, kind)
    given = SAMPLES[kind]
    with open_variant(tmp_path, variant, echo_contract(kind), EngineOptions(threads=1)) as session:
        scores = session.run({"image": given})["scores"]
        assert scores.dtype == given.dtype
        wanted = np.full_like(given, 7) if name == "null" else echoed(given)
        np.testing.assert_array_equal(scores, wanted)
        with pytest.raises(InputError, match="the model wants"):
            session.run({"image": np.zeros((1, 3), np.uint16)})


def test_session_tells_engine_variant_and_choice(session):
    assert session.engine
    assert session.variant.name == "any"
    assert session.choice == "test"


@pytest.mark.parametrize("name", BACKENDS)
def test_corrupt_file_is_a_health_error_and_never_reaches_the_engine(name, tmp_path):
    (tmp_path / "broken").write_bytes(b"this is no model at all" * 10)
    task = "text-generation" if name == "gguf" else "tensor"
    variant = bundles.variant("any", name, "broken")
    with pytest.raises(HealthError, match=r"refuses broken, byte" if name in GUARDS else "broken is no"):
        open_variant(tmp_path, variant, Contract(task=task, inputs=CONTRACT.inputs, outputs=CONTRACT.outputs))


def test_truncated_gguf_never_reaches_llama_cpp_and_one_without_weights_is_a_health_error(tmp_path):
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    cut = {
        r"edgekit refuses cut\.gguf, byte 8": b"GGUF\x03\x00\x00\x00" + b"\xff" * 64,
        r"llama.cpp refuses cut\.gguf": gguf_files.header(general__architecture="llama"),
    }
    for told, content in cut.items():
        (tmp_path / "cut.gguf").write_bytes(content)
        with pytest.raises(HealthError, match=told):
            open_variant(tmp_path, bundles.variant("any", "gguf", "cut.gguf"), Contract(task="text-generation"))


def test_file_with_other_tensors_than_the_manifest_says_is_a_health_error(tmp_path):
    variant = write("onnx", tmp_path)
    with pytest.raises(HealthError, match="no output 'z'"):
        open_variant(tmp_path, msgspec.structs.replace(variant, **ports("x", "z")), CONTRACT)
    with pytest.raises(HealthError):
        open_variant(tmp_path, msgspec.structs.replace(variant, **ports("q", "y")), CONTRACT)


def test_output_of_another_shape_than_the_manifest_says_is_a_health_error(tmp_path):
    variant = write("onnx", tmp_path)
    wrong = Contract(inputs=CONTRACT.inputs, outputs=(TensorSpec("scores", "float32", (-1, 5)),))
    with pytest.raises(HealthError, match="the manifest says"):
        open_variant(tmp_path, variant, wrong)


def test_tensorrt_backend_says_where_it_really_runs(tmp_path):
    with open_variant(tmp_path, write("tensorrt", tmp_path), CONTRACT) as session:
        assert "no TensorRT" in session.engine


@pytest.mark.parametrize(
    ("name", "missing"),
    [("onnx", "onnxruntime"), ("tflite", "ai_edge_litert.interpreter"), ("executorch", "executorch.runtime")],
)
def test_missing_engine_names_the_pip_command(name, missing, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    monkeypatch.setattr(guards, "check", lambda *_: None)  # the file, which is looked at first, is beside the point
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(MissingExtra) as caught:
        open_variant(tmp_path, bundles.variant("any", name, "file"), CONTRACT)
    assert caught.value.hint == f"pip install 'edgekit[{name}]'"
