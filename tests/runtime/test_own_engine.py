"""An engine of the device's own: built by TensorRT-RTX in a child process, run by a seam, swapped in under load."""

import dataclasses
import os
import sys
import threading
import time

import numpy as np
import pytest
from fakes import bundles

from edgekit import bundle
from edgekit.errors import HealthError, UsageError
from edgekit.manifest import EngineBuild, Manifest
from edgekit.runtime import Contract, load, open_variant, ports, tensorrt_tools
from edgekit.runtime.backends import EngineOptions, OwnEngine
from edgekit.runtime.cuda import Gpu
from edgekit.tensors import TensorSpec

WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
CONTRACT = Contract(inputs=(TensorSpec("x", "float32", (-1, 3)),), outputs=(TensorSpec("y", "float32", (-1, 4)),))


class SeamEngine:
    """Stands for an engine on a GPU."""

    engine = "tensorrt on a seam"

    def __init__(self, sign=1):
        self.sign = sign

    def run(self, inputs):
        return {"y": self.sign * inputs["x"] @ WEIGHTS}

    def close(self):
        pass


class Seam:
    """The tools of a machine with a GPU: builds are real unless a command is given, running is NumPy's."""

    def __init__(self, command=tensorrt_tools.child_command, driver="1", sign=1, opens=()):
        self.command, self.driver, self.sign, self.opens, self.builds = command, driver, sign, list(opens), 0

    def __call__(self):
        def counted(job, folder):
            self.builds += 1
            return self.command(job, folder)

        def opened(data, batch):
            if self.opens and self.opens.pop(0):
                raise HealthError("deserializing fails")
            return SeamEngine(self.sign)

        return tensorrt_tools.Tools(Gpu("seam 8.7", self.driver), "rtx 1", "tensorrt_rtx", counted, opened)


def quick(job, folder):
    return [sys.executable, "-c", f"open({job.engine!r}, 'wb').write(b'engine')"]


def served(folder, seam, monkeypatch):
    monkeypatch.setattr(tensorrt_tools, "find", seam)
    (folder / "model.onnx").write_bytes(bundles.gemm_onnx(WEIGHTS))
    samples = {"x": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)}
    own = OwnEngine(folder=folder / "cache", model="gemm", digest="d", how=EngineBuild(workspace_mb=64),
                    samples=lambda: samples, min_sqnr_db=25.0, min_top1_agreement=0.85)  # fmt: skip
    one = bundles.variant("any", "tensorrt", "model.onnx")
    return open_variant(folder, one, CONTRACT, EngineOptions(threads=1, own=own))


def settle(session):
    assert session._engine.settled(60)
    return session.engine


def test_real_build_is_kept_and_the_next_start_finds_it(tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    seam = Seam()
    for _ in range(2):
        with served(tmp_path, seam, monkeypatch) as session:
            assert settle(session) == SeamEngine.engine
    assert seam.builds == 1
    assert list((tmp_path / "cache").glob("*.timing"))
    (kept,) = (tmp_path / "cache/gemm").glob("*.engine")
    assert kept.stat().st_size > 10_000


def test_another_driver_builds_again_and_prunes(tmp_path, monkeypatch):
    for driver in "12":
        seam = Seam(quick, driver)
        with served(tmp_path, seam, monkeypatch) as session:
            settle(session)
        assert seam.builds == 1
    assert len(list((tmp_path / "cache/gemm").glob("*.engine"))) == 1


@pytest.mark.parametrize("how", ["bytes", "opening"])
def test_corrupt_engine_is_built_again(tmp_path, monkeypatch, how):
    with served(tmp_path, Seam(quick), monkeypatch) as session:
        settle(session)
    (kept,) = (tmp_path / "cache/gemm").glob("*.engine")
    if how == "bytes":
        kept.write_bytes(kept.read_bytes()[:-1] + b"!")
    seam = Seam(quick, opens=[how == "opening"])
    with served(tmp_path, seam, monkeypatch) as session:
        assert settle(session) == SeamEngine.engine
    assert seam.builds == 1


def test_no_request_is_lost_while_the_engine_is_swapped(tmp_path, monkeypatch):
    go = threading.Event()

    def held(job, folder):
        go.wait(20)
        return quick(job, folder)

    wrong, names, done = [], set(), threading.Event()
    with served(tmp_path, Seam(held), monkeypatch) as session:

        def ask():
            while not done.is_set():
                x = np.random.default_rng().normal(size=(2, 3)).astype(np.float32)
                names.add(session.engine)
                if not np.allclose(session.run({"x": x})["y"], x @ WEIGHTS, atol=1e-3):
                    wrong.append(x)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        while not any("getting ready" in name for name in names):
            pass
        go.set()
        settle(session)
        while SeamEngine.engine not in names:
            pass
        done.set()
        for thread in threads:
            thread.join(20)
    assert not wrong


@pytest.mark.parametrize(
    ("seam", "told"),
    [
        (Seam(lambda job, folder: [sys.executable, "-c", "import os; os.abort()"]), "crashed with SIGABRT"),
        (Seam(quick, sign=-1), "answers otherwise than onnxruntime"),
    ],
)
def test_what_fails_leaves_onnx_runtime_serving_and_says_why(tmp_path, monkeypatch, seam, told):
    with served(tmp_path, seam, monkeypatch) as session:
        name = settle(session)
        assert name.startswith("onnxruntime")
        assert told in name
        x = np.ones((1, 3), np.float32)
        np.testing.assert_allclose(session.run({"x": x})["y"], x @ WEIGHTS)
    assert not list((tmp_path / "cache/gemm").glob("*.engine"))


def test_an_engine_that_took_two_processes_with_it_is_neither_opened_nor_built_again(tmp_path, monkeypatch):
    with served(tmp_path, Seam(quick), monkeypatch) as session:
        settle(session)
    (kept,) = (tmp_path / "cache/gemm").glob("*.engine")
    kept.with_suffix(".trying").write_bytes(b"..")
    seam = Seam(quick)
    with served(tmp_path, seam, monkeypatch) as session:
        assert "took the process with it twice" in settle(session)
    assert seam.builds == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_builders_own_is_not_told_as_getting_ready(tmp_path, monkeypatch):
    def broken(job, folder):
        raise AttributeError("no such flag")

    with served(tmp_path, Seam(broken), monkeypatch) as session:
        name = settle(session)
    assert name.startswith("onnxruntime")
    assert "failed" in name


class FailingEngine(SeamEngine):
    """Answers the samples and so many requests, then fails as a GPU does."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def run(self, inputs):
        if not self.answers:
            raise HealthError("cuStreamSynchronize of the NVIDIA driver fails with 700")
        self.answers -= 1
        return super().run(inputs)

    def close(self):
        raise HealthError("cuMemFree_v2 of the NVIDIA driver fails with 700")


def failing(command, answers):
    """Return tools whose engine fails after so many answers, the first of which are those of the samples."""
    tools = Seam(command)()
    return dataclasses.replace(tools, open=lambda data, batch: FailingEngine(answers))


def test_an_engine_that_fails_later_is_left_and_its_request_is_answered(tmp_path, monkeypatch):
    with served(tmp_path, lambda: failing(quick, 2), monkeypatch) as session:
        assert settle(session) == SeamEngine.engine
        x = np.ones((2, 3), np.float32)
        for _ in range(3):
            np.testing.assert_allclose(session.run({"x": x})["y"], x @ WEIGHTS)
        assert session.engine.startswith("onnxruntime")
        assert "CPUExecutionProvider (TensorRT failed: cuStreamSynchronize" in session.engine


def test_many_requests_that_meet_a_failure_are_all_answered(tmp_path, monkeypatch):
    wrong = []
    with served(tmp_path, lambda: failing(quick, 1), monkeypatch) as session:
        assert settle(session) == SeamEngine.engine

        def ask(seed):
            x = np.random.default_rng(seed).normal(size=(2, 3)).astype(np.float32)
            if not np.allclose(session.run({"x": x})["y"], x @ WEIGHTS, atol=1e-4):
                wrong.append(seed)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        assert session.engine.startswith("onnxruntime")
    assert not wrong


def test_onnx_runtime_failing_is_an_error_and_nothing_takes_its_place(tmp_path, monkeypatch):
    with served(tmp_path, Seam(quick, sign=-1), monkeypatch) as session:
        settle(session)
        monkeypatch.setattr(type(session._engine._serving), "run", FailingEngine(0).run)
        with pytest.raises(HealthError, match="fails with 700"):
            session.run({"x": np.ones((1, 3), np.float32)})


def test_closing_during_a_build_ends_the_build(tmp_path, monkeypatch):
    mark = tmp_path / "child"
    endless = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    session = served(tmp_path, Seam(lambda job, folder: [sys.executable, "-c", endless]), monkeypatch)
    swapping, deadline = session._engine, time.monotonic() + 20
    while not (mark.is_file() and mark.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    session.close()
    assert swapping.settled(10)
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
    assert not list((tmp_path / "cache").rglob("*.engine"))
    with pytest.raises(UsageError, match="closed"):
        session.run({"x": np.ones((1, 3), np.float32)})


def sealed(folder, **fields):
    """Seal a bundle without golden inputs."""
    one = bundles.variant("any", "tensorrt", "any/model.onnx", **fields)
    manifest = Manifest(name="gemm", version="1", task="tensor", inputs=CONTRACT.inputs, outputs=CONTRACT.outputs,
                        variants=(one,), files=())  # fmt: skip
    bundle.seal(folder, manifest, {one.main: bundles.gemm_onnx(WEIGHTS)})
    return folder


def test_a_bundle_says_how_its_engine_is_built(tmp_path, monkeypatch):
    asked, batches = [], []

    def watched(job, folder):
        asked.append(job.how)
        return quick(job, folder)

    tools = dataclasses.replace(Seam(watched)(), open=lambda data, batch: batches.append(batch) or SeamEngine())
    monkeypatch.setattr(tensorrt_tools, "find", lambda: tools)
    how = EngineBuild(max_batch=3, workspace_mb=77)
    with load(sealed(tmp_path / "b", engine=how), engines=tmp_path / "engines") as session:
        assert settle(session) == SeamEngine.engine
    assert (asked, batches) == ([how], [3])


def test_without_golden_inputs_an_engine_is_judged_on_noise_which_zeros_would_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_tools, "find", Seam(quick, sign=-1))
    with load(sealed(tmp_path / "b"), engines=tmp_path / "engines") as session:
        assert "answers otherwise than onnxruntime" in settle(session)


def test_noise_fits_the_specs_and_is_the_same_at_every_call():
    given = {"x": ("float32", (-1, 3)), "pixels": ("uint8", (-1, 8, 8)), "ids": ("int64", (-1, -1)),
             "mask": ("bool", (2,)), "t": ("object", (-1,))}  # fmt: skip
    specs = [TensorSpec(name, *what) for name, what in given.items()]
    one, other = ports.noise(specs, 4), ports.noise(specs, 4)
    assert {name: (array.shape, array.dtype.name) for name, array in one.items()} == {
        "x": ((4, 3), "float32"), "pixels": ((4, 8, 8), "uint8"), "ids": ((4, 1), "int64"), "mask": ((2,), "bool"),
        "t": ((4,), "object"),
    }  # fmt: skip
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert one["x"].std() > 0.3
    assert one["pixels"].max() > 200
    assert set(one["ids"].ravel()) <= {0, 1}
