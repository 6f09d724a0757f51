"""What an engine's process and its parent speak: small messages over a socket, tensors in memory that both see.

A lane carries one request at a time: whoever asks waits on its socket and nobody else does, so that an answer wakes one
thread and needs no number. The other end is not believed: a process whose memory is broken may say anything.
Knows no engine and no process.
"""

from __future__ import annotations

import fcntl
import functools
import math
import mmap
import os
import struct
from typing import TYPE_CHECKING, Any, Self

import msgspec

from edgekit.device_profiles import RuntimeSettings
from edgekit.errors import HealthError, InputError, ResourceError, from_os
from edgekit.manifest import Variant
from edgekit.runtime.backends import Message, Sampling, TextPiece
from edgekit.runtime.conversations import Room
from edgekit.runtime.failures import Failed

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

    import numpy as np

    from edgekit.tensors import Array

FIRST_BYTES = 64 << 10
MOST_BYTES = 4 << 30
"""The largest body that the server can be told to take."""
MOST_MESSAGE_BYTES = 64 << 20
KEPT_BYTES = 16 << 20
"""A lane that grew beyond is not kept: one large request must not hold memory for ever."""
ALIGNED = 64
TYPES = frozenset(
    ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
     "float16", "float32", "float64", "complex64", "complex128", "object")
)  # fmt: skip


class Nonsense(Exception):
    """What came from the other end makes no sense."""


UNBOUNDED = Room(0)


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """Where an array lies in the shared memory; one of objects lies there as MessagePack."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """Open this variant. ``digest`` is given where the bundle's bytes are to be checked first: at every restart."""

    folder: str
    variant: Variant
    threads: int
    most_threads: int
    runtime: RuntimeSettings
    context: int
    engines: str | None
    digest: str = ""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine is open; this is its name and version, and what a language model says of itself."""

    engine: str
    embeds: bool = False
    room: Room = UNBOUNDED


class Run(msgspec.Struct, frozen=True, tag="run"):
    """Compute a batch; the shared memory has ``size`` bytes."""

    tensors: tuple[Tensor, ...]
    size: int


class Chat(msgspec.Struct, frozen=True, tag="chat"):
    """Answer a conversation, piece by piece."""

    messages: tuple[Message, ...]
    sampling: Sampling


class Complete(msgspec.Struct, frozen=True, tag="complete"):
    """Continue a text, piece by piece."""

    prompt: str
    sampling: Sampling


class Score(msgspec.Struct, frozen=True, tag="score"):
    """Tell the log probabilities of the next tokens."""

    tokens: tuple[int, ...]
    most: int


class Embed(msgspec.Struct, frozen=True, tag="embed"):
    """Make a vector of each text; the shared memory has ``size`` bytes."""

    texts: tuple[str, ...]
    size: int


class Embedded(msgspec.Struct, frozen=True, tag="embedded"):
    """The vectors, and how many tokens were read."""

    tensors: tuple[Tensor, ...]
    size: int
    tokens: int


class Ran(msgspec.Struct, frozen=True, tag="ran"):
    """The outputs; ``engine`` where the engine has become another one."""

    tensors: tuple[Tensor, ...]
    size: int
    engine: str = ""


class Piece(msgspec.Struct, frozen=True, tag="piece"):
    """A piece of an answer."""

    piece: TextPiece


class Done(msgspec.Struct, frozen=True, tag="done"):
    """There is no further piece."""


class Scored(msgspec.Struct, frozen=True, tag="scored"):
    """Log probabilities by token."""

    scores: dict[int, float]


Asked = Start | Run | Chat | Complete | Score | Embed
Told = Ready | Ran | Embedded | Piece | Done | Scored | Failed

_HEAD = struct.Struct("<I")
_encoded = msgspec.msgpack.Encoder().encode
_asked = msgspec.msgpack.Decoder(Asked).decode
_told = msgspec.msgpack.Decoder(Told).decode


class Link:
    """One end of a socket that carries messages, each behind its length. Not thread-safe."""

    def __init__(self, socket: socket.socket) -> None:
        self.socket = socket
        self._rest = b""

    def send(self, message: Asked | Told) -> None:
        """Write a message.

        Raises:
            ConnectionError: the other end is gone.
            TimeoutError: it does not read.
            ResourceError: the message is too long.
        """
        data = _encoded(message)
        if len(data) > MOST_MESSAGE_BYTES:
            raise ResourceError(f"a message of {len(data)} bytes is too long for an engine's process", "ask for less")
        self.socket.sendall(_HEAD.pack(len(data)) + data)

    def question(self) -> Asked | None:
        """Read what the parent asks; None where it has left."""
        try:
            asked: Asked = _asked(self._message())
        except (EOFError, ConnectionError):
            return None
        return asked

    def answer(self) -> Told:
        """Read what the process answers.

        Raises:
            EOFError, ConnectionError: it is gone.
            TimeoutError: it takes too long.
            Nonsense: it is no answer.
        """
        try:
            told: Told = _told(self._message())
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Nonsense(str(error)) from error
        return told

    def _message(self) -> bytes:
        came = self._rest or self._more()
        while len(came) < _HEAD.size:
            came += self._more()
        end = _HEAD.size + _HEAD.unpack_from(came)[0]
        if end > MOST_MESSAGE_BYTES + _HEAD.size:
            raise Nonsense(f"a message of {end} bytes")
        if len(came) < end:
            pieces, length = [came], len(came)
            while length < end:
                pieces.append(self._more())
                length += len(pieces[-1])
            came = b"".join(pieces)
        self._rest = came[end:]  # pieces of a text may come faster than they are read
        return came[_HEAD.size : end]

    def _more(self) -> bytes:
        came = self.socket.recv(65536)
        if not came:
            raise EOFError("the other end is gone")
        return came


class Lane:
    """One end of a lane: its socket, and its memory by file descriptor. Not thread-safe."""

    def __init__(self, socket: socket.socket, memory: int) -> None:
        self.link = Link(socket)
        self._memory = memory
        self._size = os.fstat(memory).st_size
        self._map = mmap.mmap(memory, self._size)

    @property
    def size(self) -> int:
        """Return the bytes of the shared memory."""
        return self._size

    def put(self, arrays: Mapping[str, Array], start: int = 0) -> tuple[Tensor, ...]:
        """Write arrays from ``start`` on, and return where they lie.

        Raises:
            InputError: an object is none that MessagePack knows.
            HealthError: an array has a type that cannot be shared.
            ResourceError: they are larger than `MOST_BYTES` together.
        """
        import numpy as np

        texts = {name: _text(name, array) for name, array in arrays.items() if array.dtype.kind == "O"}
        places, end = [], start
        for name, array in arrays.items():
            dtype = _type(array.dtype)
            if dtype not in TYPES:
                raise HealthError(f"{name!r} is {dtype}, which no engine of a process of its own takes or gives")
            length = len(texts[name]) if name in texts else array.nbytes
            offset = -(-end // ALIGNED) * ALIGNED
            places.append(Tensor(name, dtype, array.shape, offset, length))
            end = offset + length
        self._reach(end)
        for place in places:
            if place.name in texts:
                self._map[place.offset : place.offset + place.length] = texts[place.name]
            else:
                np.ndarray(place.shape, place.dtype, self._map, place.offset)[...] = arrays[place.name]
        return tuple(places)

    def get(self, tensors: Sequence[Tensor], size: int) -> dict[str, Array]:
        """Return arrays that lie in the shared memory, without a copy; the next `put` may overwrite them.

        Raises:
            Nonsense: there cannot be such arrays.
        """
        if size > self._size:
            self._remap(size)
        return {tensor.name: self._one(tensor) for tensor in tensors}

    def close(self) -> None:
        """Give the lane up; the other end notices."""
        self.link.socket.close()
        os.close(self._memory)
        del self._map  # not closed: an engine may hold an array of it

    def _one(self, tensor: Tensor) -> Array:
        import numpy as np

        if tensor.dtype not in TYPES or min(tensor.offset, tensor.length, *tensor.shape) < 0:
            raise Nonsense(f"a tensor {tensor}")
        if tensor.offset + tensor.length > self._size:
            raise Nonsense(f"{tensor} lies outside of {self._size} bytes")
        if tensor.dtype == "object":
            return _objects(tensor, self._map[tensor.offset : tensor.offset + tensor.length])
        dtype = np.dtype(tensor.dtype)
        if math.prod(tensor.shape) * dtype.itemsize != tensor.length:
            raise Nonsense(f"{tensor} has another length")
        return np.ndarray(tensor.shape, dtype, self._map, tensor.offset)

    def _reach(self, size: int) -> None:
        if size <= self._size:
            return
        if size > MOST_BYTES:
            raise ResourceError(f"tensors of {size} bytes are too large for an engine's process", "use smaller batches")
        larger = min(MOST_BYTES, max(size, 2 * self._size))
        try:
            os.ftruncate(self._memory, larger)
            self._remap(larger)
        except OSError as error:
            raise from_os(error, f"sharing {larger} bytes with an engine's process") from error

    def _remap(self, size: int) -> None:
        # Touching what the file does not have would kill this process: its size is asked, and it cannot shrink.
        if not self._size <= size <= min(MOST_BYTES, os.fstat(self._memory).st_size):
            raise Nonsense(f"a memory of {size} bytes")
        self._map = mmap.mmap(self._memory, size)
        self._size = size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shared_memory() -> int:
    """Return the descriptor of new memory that two processes may map; it may grow, never shrink.

    Raises:
        OSError: no descriptor is left.
    """
    memory = os.memfd_create("edgekit", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, FIRST_BYTES)
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return memory


@functools.lru_cache(64)
def _type(dtype: np.dtype[Any]) -> str:
    return dtype.name  # asked anew, it takes NumPy 2 us


def _text(name: str, array: Array) -> bytes:
    try:
        return msgspec.msgpack.encode(array.ravel().tolist(), enc_hook=_plain)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name!r} holds what is no text: {error}", "give str or bytes") from error


def _plain(value: Any) -> str:  # noqa: ANN401  # whatever lies in an array of objects
    """Return NumPy's own kind of str as str; refuse what is none."""
    return str.__str__(value)


def _objects(tensor: Tensor, data: bytes) -> Array:
    import numpy as np

    try:
        values = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Nonsense(f"{tensor}: {error}") from error
    if not isinstance(values, list) or len(values) != math.prod(tensor.shape):
        raise Nonsense(f"{tensor} has other objects")
    array = np.empty(len(values), object)
    array[:] = values
    return array.reshape(tensor.shape)
