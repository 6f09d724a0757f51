"""ONNX Runtime's execution providers: the order of the class, the processor where one fails, and the reason told.

A real provider other than the processor's is in checks/openvino.py.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from fakes import bundles
from fakes.engine_files import CONTRACT, WEIGHTS, write
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

import edgekit
from edgekit.device_profiles import RuntimeSettings
from edgekit.errors import HealthError
from edgekit.runtime import memory, open_variant
from edgekit.runtime.backends import EngineOptions

IMAGE = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
NAMES = {"cuda": "CUDAExecutionProvider", "xnnpack": "XnnpackExecutionProvider"}


def settings(*providers):
    return EngineOptions(threads=1, runtime=RuntimeSettings(providers=providers))


def opened(folder, options, backend="onnx"):
    return open_variant(folder, write(backend, folder), CONTRACT, options)


def computes(session):
    np.testing.assert_allclose(session.run({"image": IMAGE})["scores"], IMAGE @ WEIGHTS, rtol=1e-4, atol=1e-4)


@pytest.fixture
def pretended(monkeypatch):
    """Let ONNX Runtime name providers that it does not have, as a package does whose libraries are missing."""
    present = [*NAMES.values(), *onnxruntime.get_available_providers()]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: present)


class Broken(onnxruntime.InferenceSession):
    """Starts on whatever provider is asked for, and fails on the first run if that is CUDA."""

    def __init__(self, path, options, providers):
        first = providers[0]
        self.first = first if isinstance(first, str) else first[0]
        super().__init__(path, options, providers=["CPUExecutionProvider"])

    def get_providers(self):
        return [self.first]

    def run(self, *arguments):
        if self.first == NAMES["cuda"]:
            raise EPFail("CUDA error 700: an illegal memory access was encountered\nin a kernel")
        return super().run(*arguments)


def test_a_provider_that_the_class_names_and_nobody_installed_is_told(tmp_path):
    with opened(tmp_path, settings("tensorrt", "cuda")) as session:
        assert "CPUExecutionProvider (tensorrt: not in this ONNX Runtime; cuda: not in" in session.engine
        computes(session)


def test_nothing_is_told_where_the_class_names_none(tmp_path):
    for options in (EngineOptions(threads=1), EngineOptions(threads=1, runtime=RuntimeSettings()), settings()):
        with opened(tmp_path, options) as session:
            assert session.engine.endswith("CPUExecutionProvider")


def test_a_provider_that_does_not_start_leaves_the_processor_with_a_warning(tmp_path, pretended, caplog):
    with caplog.at_level(logging.WARNING), opened(tmp_path, settings("cuda")) as session:
        assert "CPUExecutionProvider (cuda: it does not start here" in session.engine
        computes(session)
    assert "model.onnx is not served by CUDAExecutionProvider" in caplog.text


def test_a_provider_that_fails_on_the_first_run_leaves_the_next_in_the_order(tmp_path, pretended, monkeypatch, caplog):
    monkeypatch.setattr(onnxruntime, "InferenceSession", Broken)
    with opened(tmp_path, settings("cuda", "xnnpack")) as session:
        assert "XnnpackExecutionProvider (cuda: ONNX Runtime failed: " in session.engine
        assert session.engine.endswith("CUDA error 700: an illegal memory access was encountered)")
        computes(session)
    assert "CUDA error 700" in caplog.text
    with opened(tmp_path, settings("xnnpack", "cuda")) as session:
        assert session.engine.endswith("XnnpackExecutionProvider")


def test_the_backend_of_tensorrt_falls_back_as_well(tmp_path, pretended, monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", Broken)
    with opened(tmp_path, EngineOptions(threads=1), "tensorrt") as session:
        assert "CPUExecutionProvider (cuda: ONNX Runtime failed: " in session.engine
        computes(session)


def test_a_file_that_every_provider_refuses_is_a_health_error(tmp_path, pretended):
    (tmp_path / "model.onnx").write_bytes(b"no model" * 20)
    with pytest.raises(HealthError, match=r"refuses model\.onnx"):
        open_variant(tmp_path, bundles.variant("any", "onnx", "model.onnx"), CONTRACT, settings("cuda"))


def test_openvino_is_not_taken_where_it_might_cut_sums_off(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", Broken)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["OpenVINOExecutionProvider"])
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    usual = RuntimeSettings()
    for has_dot_product, wanted in ((False, "CPUExecutionProvider (openvino: it may add"), (True, "OpenVINOExec")):
        options = EngineOptions(threads=1, runtime=usual, has_dot_product=has_dot_product)
        with opened(tmp_path, options) as session:
            assert wanted in session.engine


OWN = """
title = "T"
summary = "s"
arch = "any"
memory_mb = 64
threads = 3
formats = ["onnx"]
source = "me"
[runtime]
providers = ["cuda"]
arena = false
"""


def of_engine(session):
    return session._engine._session.get_session_options()


def test_the_class_says_threads_providers_and_arena_and_a_number_of_the_caller_wins(tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.device_profiles.machine.usable_cores", lambda: 8)
    (tmp_path / "toaster.toml").write_text(OWN)
    bundles.mlp_bundle(tmp_path / "b")  # its variant is called x86-64, a class of four threads
    with edgekit.load(tmp_path / "b") as session:
        assert of_engine(session).intra_op_num_threads == 4
        assert of_engine(session).enable_cpu_mem_arena
    with edgekit.load(tmp_path / "b", profile=str(tmp_path / "toaster.toml")) as session:
        assert of_engine(session).intra_op_num_threads == 3
        assert not of_engine(session).enable_cpu_mem_arena
        assert "(cuda: not in this ONNX Runtime)" in session.engine
    with edgekit.load(tmp_path / "b", profile=str(tmp_path / "toaster.toml"), threads=5) as session:
        assert of_engine(session).intra_op_num_threads == 5
    monkeypatch.setattr("edgekit.device_profiles.machine.usable_cores", lambda: 2)
    with edgekit.load(tmp_path / "b", profile="raspberry-pi-zero-2") as session:
        assert of_engine(session).intra_op_num_threads == 2
        assert not of_engine(session).enable_cpu_mem_arena


GROWTH = """
import sys
from pathlib import Path
import numpy as np
from edgekit.device_profiles import RuntimeSettings
from edgekit.runtime.backends import EngineOptions, onnx
from edgekit.runtime.memory import rss_mib
runtime = RuntimeSettings(providers=(), arena=sys.argv[2] == "True")
engine = onnx.PLUGIN.open(Path(sys.argv[1]), EngineOptions(threads=1, runtime=runtime))
engine.run({"x": np.zeros((1, 64), np.float32)})
before = rss_mib()
engine.run({"x": np.zeros((256, 64), np.float32)})
engine.run({"x": np.zeros((1, 64), np.float32)})
print(rss_mib() - before)
"""


def test_without_an_arena_the_memory_of_a_large_batch_is_given_back(tmp_path):
    (tmp_path / "wide.onnx").write_bytes(bundles.mlp_onnx(sizes=(64, 65536, 1)))  # 64 MiB between its layers

    def grown(arena):
        command = [sys.executable, "-c", GROWTH, str(tmp_path / "wide.onnx"), str(arena)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    assert grown(arena=True) > 48
    assert grown(arena=False) < 24


def test_two_answers_lie_in_memory_of_their_own(tmp_path):
    with opened(tmp_path, settings()) as session:
        first = session.run({"image": IMAGE})["scores"]
        kept = first.copy()
        second = session.run({"image": -IMAGE})["scores"]
        assert not np.shares_memory(first, second)
        np.testing.assert_array_equal(first, kept)


def test_openvino_serves_where_its_package_is_installed():
    """Opt-in: the package replaces onnxruntime, so it lives in an environment of its own."""
    python = os.environ.get("EDGEKIT_OPENVINO_PYTHON")
    if not python:
        pytest.skip("EDGEKIT_OPENVINO_PYTHON names no Python that has numpy, msgspec and onnxruntime-openvino")
    script = Path(__file__).parents[2] / "checks/openvino.py"
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([python, script], capture_output=True, text=True, check=False, env=environment, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the usual order takes it" in done.stdout, done.stdout


def test_where_the_c_library_cannot_trim_nothing_is_asked_of_it(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    memory._trim.cache_clear()
    memory.give_back()
    memory._trim.cache_clear()


LOADED = """
import sys
from pathlib import Path
from edgekit.runtime import memory
from edgekit.runtime.backends import EngineOptions, onnx
if sys.argv[2] == "False":
    memory.give_back = lambda: None
import onnxruntime
before = memory.rss_mib()
engine = onnx.PLUGIN.open(Path(sys.argv[1]), EngineOptions(threads=1))
print(memory.rss_mib() - before)
"""


@pytest.mark.skipif(memory._trim() is None, reason="this C library has no malloc_trim")
def test_what_parsing_a_file_leaves_behind_is_given_back(tmp_path):
    (tmp_path / "deep.onnx").write_bytes(bundles.mlp_onnx(sizes=(128,) * 400))  # 26 MB in pieces of 64 kB

    def held(given_back):
        command = [sys.executable, "-c", LOADED, str(tmp_path / "deep.onnx"), str(given_back)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)

    kept, given = held(given_back=False), held(given_back=True)
    assert given < kept - 8, (kept, given)
