"""The parent's end of one engine's process: starts it, opens lanes to it, and learns how it ended.

Knows neither when a process is started again nor what an engine computes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgekit.errors import EngineCrashed, HealthError, from_os
from edgekit.runtime import failures
from edgekit.runtime.failures import Failed
from edgekit.runtime.isolation import crashes, lanes
from edgekit.runtime.isolation.lanes import Lane, Link, Nonsense, Ready, Start

if TYPE_CHECKING:
    from collections.abc import Iterator

WORKER = f"{__package__}.worker"
START_SECONDS = 600.0
"""An engine may compile its model when it is opened."""
LEAVE_SECONDS = 5.0
KEPT_LANES = 8
"""So many lanes wait for the next request; what more requests at once need is opened for them."""


class Died(Exception):
    """The process died under a request."""


class EngineProcess:
    """A process that has opened its engine.

    Has to be made by the thread that then waits for its end: Linux kills the child of a thread that ended.
    ``gone`` is set by that thread once ``how`` it ended has been counted.

    Raises:
        EngineCrashed: it died, or took longer than `START_SECONDS`.
        EdgekitError: what opening the engine raised.
    """

    def __init__(self, start: Start) -> None:
        self.gone = threading.Event()
        self.how = ""
        self._lock = threading.Lock()
        self._free: list[Lane] = []
        self._is_open = True
        control, self._process = _started()
        self._control = Link(control)
        self.pid = self._process.pid
        try:
            self.ready = self._opened(start)
        except BaseException:
            self.leave()
            self.wait()
            raise

    def wait(self) -> str:
        """Wait until it has ended, free what belongs to it, and return what ended it."""
        with contextlib.suppress(OSError):
            self._control.socket.recv(1)  # nothing ever comes, but the end: its death, or `leave`
        code = self._reaped()
        self.how = self.how or crashes.named(code)
        self._end_group()
        with self._lock:
            self._is_open, free, self._free = False, self._free, []
            self._control.socket.close()
        for lane in free:
            lane.close()
        return self.how

    def leave(self) -> None:
        """Let it end once its engine is closed."""
        with self._lock, contextlib.suppress(OSError):
            self._control.socket.shutdown(socket.SHUT_RDWR)

    def kill(self, how: str) -> None:
        """End it, and all that it started, at once; ``how`` is what is told of it."""
        self.how = self.how or how
        self._end_group()

    @contextmanager
    def lane(self, seconds: float) -> Iterator[Lane]:
        """Lend a lane to one request, whose every wait lasts at most so long.

        Raises:
            Died: the process died, or was killed, because it took longer or because it talked nonsense.
            ResourceError: no file descriptor is left.
        """
        lane, finished = self._taken(), False
        try:
            lane.link.socket.settimeout(seconds)
            yield lane
            finished = True
        except (EOFError, ConnectionError) as error:
            raise self._died(crashes.NONSENSE) from error
        except TimeoutError as error:
            self.kill(crashes.HANG)
            raise self._died(crashes.HANG) from error
        except Nonsense as error:
            self.kill(crashes.NONSENSE)
            raise self._died(crashes.NONSENSE) from error
        finally:
            if not (finished and self._kept(lane)):
                lane.close()

    def _opened(self, start: Start) -> Ready:
        self._control.socket.settimeout(START_SECONDS)
        try:
            self._control.send(start)
            told = self._control.answer()
        except TimeoutError as error:
            self.kill(crashes.HANG)
            raise EngineCrashed(f"the engine was not ready within {START_SECONDS:g} s, and was killed") from error
        except (EOFError, ConnectionError) as error:
            how = crashes.named(self._reaped())
            raise EngineCrashed(f"the engine crashed with {how} when it was opened") from error
        except Nonsense as error:
            raise HealthError(f"the engine's process answered what makes no sense: {error}") from error
        if isinstance(told, Failed):
            raise failures.rebuilt(told)
        if not isinstance(told, Ready):
            raise HealthError(f"the engine's process answered {type(told).__name__} when it was started")
        self._control.socket.settimeout(None)
        return told

    def _died(self, how: str) -> Died:
        """Wait until the death has been counted; a process that only left this request alone is killed."""
        if not self.gone.wait(LEAVE_SECONDS):
            self.kill(how)
            self.gone.wait(LEAVE_SECONDS)
        return Died()

    def _end_group(self) -> None:
        """Kill the process, and what it started: TensorRT's builder would compute for an hour for nobody."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _reaped(self) -> int:
        try:
            return self._process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill(crashes.NONSENSE)
            return self._process.wait()

    def _taken(self) -> Lane:
        with self._lock:
            if self._free:
                return self._free.pop()
        try:
            return self._new_lane()
        except ConnectionError as error:
            raise self._died(crashes.NONSENSE) from error
        except OSError as error:
            raise from_os(error, "opening a lane to the engine's process") from error

    def _new_lane(self) -> Lane:
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair()
            undo.callback(ours.close)
            with theirs:
                memory = lanes.shared_memory()
                undo.callback(os.close, memory)
                self._hand_over(theirs.fileno(), memory)
            lane = Lane(ours, memory)
            undo.pop_all()
        return lane

    def _hand_over(self, *descriptors: int) -> None:
        with self._lock:
            if not self._is_open:
                raise ConnectionError("the process is gone")
            socket.send_fds(self._control.socket, [b"L"], descriptors)

    def _kept(self, lane: Lane) -> bool:
        with self._lock:
            keep = self._is_open and len(self._free) < KEPT_LANES and lane.size <= lanes.KEPT_BYTES
            if keep:
                self._free.append(lane)
            return keep


def _started() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start the process. Never a fork: a copy of a program with threads may hang at once."""
    if not hasattr(os, "memfd_create"):
        raise HealthError("an engine has a process of its own on Linux only", "serve without --isolate")
    try:
        ours, theirs = socket.socketpair()
    except OSError as error:
        raise from_os(error, "starting the engine's process") from error
    # -P: the folder one stands in must not shadow a package of the child. Where it crashes, Python tells where it was.
    command = [sys.executable, "-P", "-X", "faulthandler", "-m", WORKER, str(theirs.fileno())]
    with theirs:
        try:
            # What engines print goes to standard error: the parent's output may be read by a program.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=(theirs.fileno(),), start_new_session=True
            )
        except OSError as error:
            ours.close()
            raise from_os(error, "starting the engine's process") from error
    return ours, process
