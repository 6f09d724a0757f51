"""Where the bytes of a repository come from: over a channel, or out of a folder such as a USB stick.

Trusts nothing that it delivers: whoever asked compares hashes. Writes no file.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from edgekit.errors import MessageError, TransferError
from edgekit.ota import blocks, messages
from edgekit.ota.device.pace import Pace
from edgekit.ota.messages import MAX_BLOCK_BYTES, Block, BlockRequest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgekit.ota.channel import Arrival, Back, Channel


log = logging.getLogger(__name__)

FIRST_BYTES = 64 << 10
LEAST_BYTES = 16 << 10
SLOW_SECONDS, QUICK_SECONDS = 2.0, 0.25
"""A block that takes longer than the first makes the next ones half as long, one faster than the second twice."""
LONGEST_SILENCE = 60.0
REMEMBERED_ASKINGS = 4


class MissingFile(TransferError):
    """The repository has no such file; TUF asks for the next root until it meets this."""


class UnreadableFile(TransferError):
    """The repository has the file and cannot read it: asking again soon does not help."""


class Fetcher(Protocol):
    """Reads files of a repository, from any offset on."""

    def stream(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes ``start`` up to ``end`` of a file in order, or up to its own end where that comes first.

        Raises:
            MissingFile: there is no such file.
            TransferError: the bytes did not come, or not as asked for.
        """
        ...


class Counted:
    """Counts the bytes that another fetcher gives."""

    def __init__(self, fetcher: Fetcher) -> None:
        self.received = 0
        self._fetcher = fetcher

    def stream(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes asked for; see `Fetcher`."""
        for piece in self._fetcher.stream(path, start, end):
            self.received += len(piece)
            yield piece


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
    answer: Block | None = None
    tries: int = 0
    asked: float = 0.0
    sent: dict[bytes, int] = field(default_factory=dict)
    """Correlation data, each time it was asked, and the place among all that was sent. Answers come in that order."""

    @property
    def place(self) -> int:
        return max(self.sent.values(), default=0)


class ChannelFetcher:
    """Asks for blocks over a channel, several at a time, and asks again for what does not come.

    An answer counts only with the correlation data of an open question, 128 random bits; all else is dropped
    and counted in ``dropped``. Nothing that may still be on its way is asked for twice: a question is sent again when
    the connection broke, a later one was answered, or after a silence that grows. Blocks of a slow link get smaller.
    """

    def __init__(self, channel: Channel, fleet: str, device: str, patience: Patience | None = None) -> None:
        self.dropped = 0
        self._channel = channel
        self._requests = messages.topic(fleet, device, "request")
        self._blocks = messages.topic(fleet, device, "blocks")
        self._patience = patience or Patience()
        self._open: dict[bytes, _Question] = {}
        self._sending = threading.Lock()
        self._news = threading.Condition()
        self._closed = False
        self._length = FIRST_BYTES
        self._places = itertools.count(1)
        self._arrived = self._turnaround = self._broken = 0.0
        channel.when_back(self._on_back)
        channel.subscribe(self._blocks, self._on_block)

    def stream(self, path: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes asked for, with a window of questions in flight; see `Fetcher`."""
        asked: deque[_Question] = deque()
        pace = Pace(self._patience.least_rate, self._patience.rate_seconds)
        try:
            asked.append(self._ask(path, start, end))
            block = self._timed(asked[0], pace)
            total = block.total
            start += len(block.data)
            asked.popleft()
            yield block.data
            while asked or start < min(end, total):
                while start < min(end, total) and len(asked) < self._patience.window:
                    asked.append(self._ask(path, start, min(end, total)))
                    start += asked[-1].request.length
                block = self._timed(asked[0], pace)
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
        request = BlockRequest(path=path, offset=start, length=min(self._length, end - start))
        question = _Question(request)
        self._send(question, 0)
        return question

    def _send(self, question: _Question, place: int) -> None:
        """Ask, unless the answer came or another thread asked since somebody saw the question at that place."""
        correlation = secrets.token_bytes(16)
        with self._sending:  # so that places say in which order they went out
            with self._news:
                if question.answer is not None or question.place != place:
                    return
                while len(question.sent) >= REMEMBERED_ASKINGS:
                    self._open.pop(oldest := next(iter(question.sent)), None)
                    del question.sent[oldest]
                question.sent[correlation] = next(self._places)
                question.asked = time.monotonic()  # before it leaves: the answer may be quicker than `publish` returns
                self._open[correlation] = question
            payload = messages.encode(question.request)
            self._channel.publish(self._requests, payload, reply_to=self._blocks, correlation=correlation)

    def _timed(self, question: _Question, pace: Pace) -> Block:
        """Wait for an answer; give up where all of them trickle. A time without a connection is nobody's slowness."""
        began, broken = time.monotonic(), self._broken
        block = self._wait(question)
        if broken == self._broken:
            pace.took(time.monotonic() - began, len(block.data))
        return block

    def _wait(self, question: _Question) -> Block:
        while True:
            with self._news:
                while question.answer is None and not self._closed and (left := self._seconds_left(question)):
                    self._news.wait(left)  # other blocks put it off: the link is slow, not silent
                if question.answer is not None:
                    _checked(question.request, question.answer)
                    return question.answer
                if self._closed:
                    raise TransferError(f"stopped while {question.request.path} was fetched")
                if question.asked > self._broken:
                    question.tries += 1
                    self._length = max(LEAST_BYTES, self._length // 2)
                place = question.place
            if question.tries >= self._patience.attempts:
                break
            self._send(question, place)
        self._forget(question)
        raise TransferError(
            f"no answer for {question.request.path} at byte {question.request.offset} after "
            f"{self._patience.attempts} tries, the first of {self._patience.seconds:g} s",
            "see that the fleet server runs: edgekit ota server",
        )

    def _seconds_left(self, question: _Question) -> float:
        if question.asked <= self._broken:  # lost, unless its answer was late and comes over the new connection
            return max(0.0, self._broken + min(2 * self._turnaround, self._patience.seconds) - time.monotonic())
        first = max(self._patience.seconds, 2 * self._turnaround)
        silence = min(first * 2.0**question.tries, max(first, LONGEST_SILENCE))
        return max(0.0, max(question.asked, self._arrived) + silence - time.monotonic())

    def _forget(self, question: _Question) -> None:
        with self._news:
            for correlation in question.sent:
                self._open.pop(correlation, None)

    def _on_block(self, arrival: Arrival) -> None:
        with self._news:
            question = self._open.get(arrival.correlation)
        block = _parsed(arrival) if question else None
        if question is None or block is None:
            self.dropped += 1
            return
        with self._news:
            self._forget(question)
            self._adapt(question)
            question.answer = block
            still = {id(one): one for one in self._open.values()}.values()
            answered = question.sent.get(arrival.correlation, 0)
            lost = sorted(((one.place, one) for one in still if one.place < answered), key=lambda pair: pair[0])
            self._news.notify_all()
        for place, one in lost:
            self._send_again(one, place)

    def _adapt(self, question: _Question) -> None:
        now = time.monotonic()
        if self._arrived > question.asked:  # it came right behind another one: the gap is its own time on the link
            gap = now - self._arrived
            if gap > SLOW_SECONDS:
                self._length = max(LEAST_BYTES, self._length // 2)
            elif gap < QUICK_SECONDS:
                self._length = min(MAX_BLOCK_BYTES, self._length * 2)
        if not question.tries:
            self._turnaround = now - question.asked
        self._arrived = now

    def _on_back(self, back: Back) -> None:
        """Let what the broken connection lost be asked for again, the first of it first."""
        with self._news:
            self._broken = back.at
            self._news.notify_all()

    def _send_again(self, question: _Question, place: int) -> None:
        try:
            self._send(question, place)
        except TransferError as error:  # the channel's thread must live; the silence asks again
            log.debug("a question waits: %s", error)


def _parsed(arrival: Arrival) -> Block | None:
    try:
        return messages.decode_block(arrival.payload)
    except MessageError:
        return None


@dataclass(frozen=True)
class Patience:
    """How many blocks are in flight, how long a first silence may be (each next is twice as long), and how often.

    Fewer than ``least_rate`` bytes a second over ``rate_seconds`` of waiting end a transfer, and so does a block that
    takes longer than all its tries.
    """

    window: int = 8
    seconds: float = 5.0
    attempts: int = 6
    least_rate: float = 1000.0
    rate_seconds: float = 60.0

    def within(self, bandwidth: int) -> Patience:
        """Return it with as few blocks in flight as suit a limit of bytes a second; 0: no limit."""
        window = min(self.window, bandwidth // MAX_BLOCK_BYTES) if bandwidth else self.window
        return replace(self, window=max(1, window))


def _checked(request: BlockRequest, block: Block) -> bytes:
    if block.error == blocks.NOT_FOUND:
        raise MissingFile(f"the repository has no {request.path}", "publish it: edgekit ota publish")
    if block.error:
        raise UnreadableFile(f"the repository cannot read {request.path}: {block.error}", "see the server's log")
    expected = max(0, min(request.length, block.total - request.offset))
    if len(block.data) != expected:
        raise TransferError(
            f"asked for {expected} bytes of {request.path} at {request.offset}, got {len(block.data)}", "try again"
        )
    return block.data
