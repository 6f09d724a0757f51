"""Where the bytes of a repository come from: over a channel, or out of a folder such as a USB stick.

Trusts nothing that it delivers: whoever asked compares hashes. Writes no file.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from edgekit.errors import MessageError, TransferError
from edgekit.ota import blocks, messages
from edgekit.ota.messages import MAX_BLOCK_BYTES, Block, BlockRequest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgekit.ota.channel import Arrival, Channel


class MissingFile(TransferError):
    """The repository has no such file; TUF asks for the next root until it meets this."""


class Fetcher(Protocol):
    """Reads files of a repository, from any offset on."""

    def stream(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes ``start`` up to ``end`` of a file in order, or up to its own end where that comes first.

        Raises:
            MissingFile: there is no such file.
            TransferError: the bytes did not come, or not as asked for.
        """
        ...


class FolderFetcher:
    """Reads a repository that lies in a folder: the ``repository`` folder of a fleet, or a copy of it."""

    def __init__(self, repository: Path) -> None:
        self._repository = repository

    def stream(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes asked for; see `Fetcher`."""
        total = end
        while start < min(end, total):
            request = BlockRequest(path=path, offset=start, length=min(MAX_BLOCK_BYTES, end - start))
            block = blocks.read(self._repository, request)
            data = _checked(request, block)
            total = block.total
            start += len(data)
            yield data


@dataclass
class _Question:
    request: BlockRequest
    correlation: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    answer: Block | None = None


class ChannelFetcher:
    """Asks for blocks over a channel, several at a time, and asks again for what does not come.

    An answer counts only with the correlation data of an open question, 128 random bits; all else is dropped
    and counted in ``dropped``.
    """

    def __init__(self, channel: Channel, fleet: str, device: str, patience: Patience | None = None) -> None:
        self.dropped = 0
        self._channel = channel
        self._requests = messages.topic(fleet, device, "request")
        self._blocks = messages.topic(fleet, device, "blocks")
        self._patience = patience or Patience()
        self._open: dict[bytes, _Question] = {}
        self._news = threading.Condition()
        self._closed = False
        channel.subscribe(self._blocks, self._on_block)

    def stream(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes asked for, with a window of questions in flight; see `Fetcher`."""
        asked: deque[_Question] = deque()
        try:
            asked.append(self._ask(path, start, end))
            block = self._wait(asked[0])
            total = block.total
            start += len(block.data)
            asked.popleft()
            yield block.data
            while asked or start < min(end, total):
                while start < min(end, total) and len(asked) < self._patience.window:
                    asked.append(self._ask(path, start, min(end, total)))
                    start += asked[-1].request.length
                block = self._wait(asked[0])
                asked.popleft()
                if block.total != total:
                    raise TransferError(f"{path} changed its length while it was read", "try again")
                yield block.data
        finally:
            for question in asked:
                self._forget(question)

    def close(self) -> None:
        """Let whoever waits for a block fail at once."""
        with self._news:
            self._closed = True
            self._news.notify_all()

    def _ask(self, path: str, start: int, end: int) -> _Question:
        request = BlockRequest(path=path, offset=start, length=min(MAX_BLOCK_BYTES, end - start))
        question = _Question(request)
        with self._news:
            self._open[question.correlation] = question
        self._send(question)
        return question

    def _send(self, question: _Question) -> None:
        self._channel.publish(
            self._requests,
            messages.encode(question.request),
            reply_to=self._blocks,
            correlation=question.correlation,
        )

    def _wait(self, question: _Question) -> Block:
        for _ in range(self._patience.attempts):
            with self._news:
                self._news.wait_for(lambda: question.answer is not None or self._closed, self._patience.seconds)
                if question.answer is not None:
                    _checked(question.request, question.answer)
                    return question.answer
                if self._closed:
                    raise TransferError(f"stopped while {question.request.path} was fetched")
            self._send(question)
        self._forget(question)
        raise TransferError(
            f"no answer for {question.request.path} at byte {question.request.offset} after "
            f"{self._patience.attempts} tries of {self._patience.seconds:g} s",
            "see that the fleet server runs: edgekit ota server",
        )

    def _forget(self, question: _Question) -> None:
        with self._news:
            self._open.pop(question.correlation, None)

    def _on_block(self, arrival: Arrival) -> None:
        with self._news:
            question = self._open.get(arrival.correlation)
        block = _parsed(arrival) if question else None
        if question is None or block is None:
            self.dropped += 1
            return
        with self._news:
            self._open.pop(arrival.correlation, None)
            question.answer = block
            self._news.notify_all()


def _parsed(arrival: Arrival) -> Block | None:
    try:
        return messages.decode_block(arrival.payload)
    except MessageError:
        return None


@dataclass(frozen=True)
class Patience:
    """How many blocks are in flight, how long one may take, how often it is asked for."""

    window: int = 8
    seconds: float = 5.0
    attempts: int = 6


def _checked(request: BlockRequest, block: Block) -> bytes:
    if block.error == blocks.NOT_FOUND:
        raise MissingFile(f"the repository has no {request.path}", "publish it: edgekit ota publish")
    if block.error:
        raise TransferError(f"the repository cannot read {request.path}: {block.error}", "see the server's log")
    expected = max(0, min(request.length, block.total - request.offset))
    if len(block.data) != expected:
        raise TransferError(
            f"asked for {expected} bytes of {request.path} at {request.offset}, got {len(block.data)}", "try again"
        )
    return block.data
