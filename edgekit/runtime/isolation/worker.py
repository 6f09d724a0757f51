"""The process that runs an engine: opens one variant, then serves each lane that it is given in a thread of its own.

``python -m edgekit.runtime.isolation.worker FD`` speaks `lanes` over that socket. Ends with its parent.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgekit import bundle
from edgekit.errors import BundleError, EdgekitError, HealthError
from edgekit.runtime import failures
from edgekit.runtime.backends import EngineOptions
from edgekit.runtime.isolation.lanes import (
    UNBOUNDED,
    Asked,
    Chat,
    Complete,
    Done,
    Embed,
    Embedded,
    Lane,
    Link,
    Piece,
    Ran,
    Ready,
    Run,
    Score,
    Scored,
    Start,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgekit.runtime.backends import Engine, TextEngine, TextPiece

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Be the process: open what the parent names, serve the lanes that it sends, and leave when it has left."""
    control = Link(socket.socket(fileno=int(sys.argv[1])))
    control.socket.set_inheritable(False)
    _outlive_nobody()
    start = control.question()
    if not isinstance(start, Start):
        return
    try:
        engine = _opened(start)
    except EdgekitError as error:
        control.send(failures.told(error))
        return
    control.send(Ready(engine.engine, getattr(engine, "embeds", False), getattr(engine, "room", UNBOUNDED)))
    while (lane := _next_lane(control.socket)) is not None:
        threading.Thread(target=_serve, args=(engine, lane), daemon=True).start()
    engine.close()
    # Threads that still compute for a parent that has left hold nothing up.
    os._exit(0)


def _outlive_nobody() -> None:
    """Die with the parent, also where an engine keeps every thread from noticing; leave signals to the parent.

    systemd and a terminal send theirs to all processes of a service, and the parent still has requests to answer.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda *_: None)  # SIG_IGN would be inherited by what an engine starts


def _opened(start: Start) -> Engine | TextEngine:
    from edgekit.runtime import opening

    folder, variant = Path(start.folder), start.variant
    if start.digest and bundle.read(folder, variant.name).digest != start.digest:
        raise BundleError(f"{folder} holds another bundle than the one that served", "load it again")
    own = None
    if start.engines is not None:
        own = opening.own_engine(folder, opening.read_manifest(folder), variant, Path(start.engines))
    options = EngineOptions(
        start.threads, context=start.context, most_threads=start.most_threads, runtime=start.runtime, own=own
    )
    return opening.open_engine(folder, variant, options)


def _next_lane(control: socket.socket) -> Lane | None:
    try:
        came, descriptors, _, _ = socket.recv_fds(control, 1, 2, socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None
    if not came:
        return None
    return Lane(socket.socket(fileno=descriptors[0]), descriptors[1])


def _serve(engine: Engine | TextEngine, lane: Lane) -> None:
    """Answer the requests of one lane until it is closed, or one fails."""
    name = engine.engine
    with lane:
        while (asked := lane.link.question()) is not None:
            try:
                if isinstance(asked, Run):
                    name = _run(cast("Engine", engine), asked, lane, name)
                else:
                    _say(cast("TextEngine", engine), asked, lane)
            except EdgekitError as error:
                _refuse(lane, error)
                return
            except ConnectionError:  # nobody waits for the rest
                return
            except BaseException as error:
                _refuse(lane, HealthError(f"the engine failed: {type(error).__name__}: {error}"))
                raise


def _refuse(lane: Lane, error: EdgekitError) -> None:
    lane.link.send(failures.told(error))


def _run(engine: Engine, asked: Run, lane: Lane, name: str) -> str:
    """Compute a batch; return the engine's name, which the parent knows now."""
    outputs = engine.run(lane.get(asked.tensors, asked.size))
    # Behind the inputs: an output may be one of them.
    end = max((one.offset + one.length for one in asked.tensors), default=0)
    tensors, now = lane.put(outputs, end), engine.engine
    lane.link.send(Ran(tensors, lane.size, "" if now == name else now))
    return now


def _say(engine: TextEngine, asked: Asked, lane: Lane) -> None:
    if isinstance(asked, Score):
        lane.link.send(Scored(dict(engine.next_scores(asked.tokens, asked.most))))
        return
    if isinstance(asked, Embed):
        lane.get((), asked.size)
        vectors, tokens = engine.embed(asked.texts)
        tensors = lane.put({"vectors": vectors})
        lane.link.send(Embedded(tensors, lane.size, tokens))
        return
    for piece in _pieces(engine, asked):
        lane.link.send(Piece(piece))
    lane.link.send(Done())


def _pieces(engine: TextEngine, asked: Asked) -> Iterator[TextPiece]:
    if isinstance(asked, Chat):
        return engine.stream(asked.messages, asked.sampling)
    if isinstance(asked, Complete):
        return engine.complete(asked.prompt, asked.sampling)
    raise HealthError(f"nobody asks a lane for {type(asked).__name__}")


if __name__ == "__main__":
    main()
