"""From an ONNX file to a TensorRT engine that is warm and answers as ONNX Runtime does, or the reason why not.

The cache first, else a build in a child process. Knows neither the driver's calls nor TensorRT's.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgekit.errors import HealthError, from_os
from edgekit.runtime import acceptance
from edgekit.runtime.engine_cache import EngineCache, Key
from edgekit.runtime.tensorrt_build import Job

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from edgekit.runtime.backends import Engine, OwnEngine
    from edgekit.runtime.tensorrt_tools import Tools

TIMEOUT = 3 * 3600.0
"""Seconds; builds of large networks take most of an hour on a small Jetson."""
POLL = 0.1


@dataclass(frozen=True)
class Ready:
    """Makes the engine of one file; the `Prepare` of `engine_swap`."""

    main: Path
    own: OwnEngine
    find: Callable[[], Tools]

    def __call__(self, first: Engine, stop: threading.Event) -> Engine:
        """Return the engine of the cache, else build one, compare it with ``first``, and keep it.

        Raises:
            HealthError: no GPU or no TensorRT, the build fails or crashes, or the engine answers otherwise.
            ResourceError: the cache cannot be written.
        """
        tools = self.find()
        key = Key(gpu=tools.gpu.name, driver=tools.gpu.driver, builder=tools.builder,
                  digest=self.own.digest, options=self.own.how)  # fmt: skip
        cache = EngineCache(self.own.folder, self.own.model)
        if cache.crashed(key):  # asked before the build: it would be done in vain at every start
            raise HealthError("its engine took the process with it twice", f"remove {self.own.folder} to retry")
        try:
            return self._cached(cache, key, tools, first) or self._built(cache, key, tools, (first, stop))
        except OSError as error:
            raise from_os(error, "keeping TensorRT's engine") from error

    def _cached(self, cache: EngineCache, key: Key, tools: Tools, first: Engine) -> Engine | None:
        data = cache.find(key)
        if data is None:
            return None
        try:
            return self._opened(cache, key, lambda: tools.open(data, self.own.how.max_batch), first)
        except HealthError:  # what cannot be opened or answers otherwise is built again
            cache.discard(key)
            return None

    def _built(self, cache: EngineCache, key: Key, tools: Tools, serving: tuple[Engine, threading.Event]) -> Engine:
        first, stop = serving
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch, "engine")
            job = Job(module=tools.module, onnx=str(self.main.resolve()), engine=str(target),
                      timing=str(cache.timing(key)), how=self.own.how)  # fmt: skip
            build_apart(tools.command(job, Path(scratch)), stop, Path(scratch))
            data = target.read_bytes()
        engine = self._opened(cache, key, lambda: tools.open(data, self.own.how.max_batch), first)
        cache.keep(key, data)
        return engine

    def _opened(self, cache: EngineCache, key: Key, opened: Callable[[], Engine], first: Engine) -> Engine:
        """Open an engine and run the samples, which warms it as well; native code may die in here."""
        with cache.attempt(key):
            engine = opened()
            try:
                self._judge(engine, first)
            except BaseException:
                engine.close()
                raise
            return engine

    def _judge(self, engine: Engine, first: Engine) -> None:
        inputs = self.own.samples()
        figures = acceptance.compare(engine.run(inputs), first.run(inputs))
        top1 = figures.get("top1_agreement", 1.0)
        if figures["sqnr_db"] < self.own.min_sqnr_db or top1 < self.own.min_top1_agreement:
            raise HealthError(
                f"its engine answers otherwise than {first.engine}: {figures['sqnr_db']:.1f} dB "
                f"(at least {self.own.min_sqnr_db:g}), same top-1 {top1:.3f} (at least "
                f"{self.own.min_top1_agreement:g})"
            )


def build_apart(command: Sequence[str], stop: threading.Event, scratch: Path) -> None:
    """Run a build in a process of its own until it ends, or ``stop`` is set.

    Raises:
        HealthError: it failed, crashed, was stopped, or ran longer than three hours; tells its last line.
    """
    told = scratch / "told"
    began = time.monotonic()
    with told.open("wb") as file, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=file
    ) as child:  # fmt: skip
        while child.returncode is None:
            if stop.is_set() or time.monotonic() - began > TIMEOUT:
                child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL)
    if stop.is_set():
        raise HealthError("the build was given up, the model was closed")
    if child.returncode == 0:
        return
    last = told.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2][:300]
    if child.returncode < 0:
        raise HealthError(f"the build crashed with {signal.Signals(-child.returncode).name}")
    raise HealthError(last or f"the build ended with exit code {child.returncode}")
