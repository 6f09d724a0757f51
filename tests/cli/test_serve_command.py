"""``edgekit serve`` as a person starts it: the ready line, a request, Ctrl-C or SIGTERM, and what goes wrong."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from fakes import bundles
from fakes.requests_to import ask


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
        on_ready(f"http://{options.address}:{port}")
        raise KeyboardInterrupt

    before = signals.getsignal(signals.SIGTERM)
    monkeypatch.setattr(server, "serve", interrupted)
    bundles.null_bundle(tmp_path / "b")
    result = CliRunner().invoke(COMMAND, [str(tmp_path / "b"), "--port", "1234"])
    signals.signal(signals.SIGTERM, before)
    assert result.exit_code == 0
    assert "ready at http://127.0.0.1:1234" in result.output
    assert "stopped after 0 requests" in result.output


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
