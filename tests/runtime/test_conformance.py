"""`edgekit conformance`: our own servers hold every check, and each fault that is planted is found by its check."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner
from fakes import bundles

import edgekit
from edgekit.cli import cli
from edgekit.runtime import conformance
from edgekit.runtime.host import Host
from edgekit.runtime.server import serve_in_thread


def invoked(*arguments):
    return CliRunner().invoke(cli, ["conformance", *map(str, arguments)])


@pytest.fixture
def served(tmp_path):
    opened = []

    def serve(make, **options):
        make(tmp_path / str(len(opened)), **options)
        host = Host(edgekit.load(tmp_path / str(len(opened))))
        opened.append((serve_in_thread(host), host))
        return opened[-1][0].url

    yield serve
    for running, host in opened:
        running.stop()
        host.close()


def test_our_server_of_tensors_holds_every_check(served):
    url = served(bundles.mlp_bundle)
    done = invoked(url)
    assert done.exit_code == 0, done.output
    assert "19 of 20 checks hold" not in done.output
    document = json.loads(invoked(url, "--json", "--model", "mlp").output)
    asked = {one["check"]: one["holds"] for one in document["checks"] if one["protocol"].startswith("Open Inf")}
    assert set(asked.values()) == {True}
    assert len(asked) == 19
    assert document["held"] == document["asked"]


def test_our_server_of_text_holds_every_check(served):
    found = list(conformance.run(conformance.Server(served(bundles.null_bundle, text=True)), ""))
    chats = {one.what: (one.holds, one.told) for one in found if one.protocol == "OpenAI"}
    assert len(chats) == 9
    assert {holds for holds, _ in chats.values()} == {True}, chats


def test_a_picture_model_has_no_rows_to_nest(served):
    found = {one.what: one for one in conformance.run(conformance.Server(served(bundles.brightness_bundle)), "")}
    assert found["data may be nested by rows"].holds is None
    assert found["data may be nested by rows"].told == "no input is a row"
    assert all(one.holds is not False for one in found.values())


class Faulty(BaseHTTPRequestHandler):
    """Passes requests on to a good server, and spoils the answers of one kind."""

    good = None
    spoil = None

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kept = {n: v for n, v in self.headers.items() if n.lower() not in ("host", "content-length")}
        reply = conformance.Server(self.good).ask(self.command, self.path, body or None, kept)
        reply = type(self).spoil(self.path, body, reply)
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            if name not in ("content-length", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, *_):
        pass


def changed(path_part, change):
    """Spoil JSON answers at a path."""

    def spoil(path, _, reply):
        if not path.endswith(path_part) or reply.status != 200 or reply.document is None:
            return reply
        document = reply.document
        change(document)
        return conformance.Reply(reply.status, reply.headers, json.dumps(document).encode())

    return spoil


def forgiving(_, __, reply):
    """Answer every fault of the caller with 500."""
    return conformance.Reply(500, reply.headers, reply.body) if reply.status == 400 else reply


FAULTS = {
    "the server names itself and its extensions": changed("/v2", lambda d: d.pop("extensions", None)),
    "the model describes its tensors": changed("/models/mlp", lambda d: d.pop("platform", None)),
    "an inference gives the output that is asked for": changed("/models/mlp", lambda d: d.update(outputs=[])),
    "an identifier comes back": changed("/infer", lambda d: d.pop("id", None)),
    "an inference without names of outputs gives all": changed(
        "/infer", lambda d: d["outputs"].append(d["outputs"][0])
    ),
    "broken JSON is refused": forgiving,
    "an unknown input is refused": forgiving,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_the_check_that_asks_for_it(served, fault):
    handler = type("Handler", (Faulty,), {"good": served(bundles.mlp_bundle), "spoil": staticmethod(FAULTS[fault])})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        done = invoked(url, "--json")
        assert done.exit_code == 1
        broken = {one["check"] for one in json.loads(done.output)["checks"] if one["holds"] is False}
        assert fault in broken
        assert "server and model live and are ready" not in broken
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [("nonsense", 2, "is no URL"), ("http://127.0.0.1:9", 8, "is the server up"), ("ftp://x", 2, "is no URL")],
)
def test_what_is_no_server_is_told(url, code, message):
    done = invoked(url)
    assert done.exit_code == code
    assert message in done.output


def test_a_server_of_something_else_is_told():
    class Web(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    done = invoked(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    server.server_close()
    assert done.exit_code == 2
    assert "answers neither /v2 (404) nor /v1/models (404)" in done.output


def test_a_server_of_which_nothing_could_be_asked_has_shown_nothing(monkeypatch):
    from edgekit.cli import conformance as command

    unasked = conformance.Check("any", "the model describes its tensors", holds=None, told="it takes none")
    monkeypatch.setattr(command, "_checks", lambda *_: iter([unasked]))
    done = invoked("http://127.0.0.1:1")
    assert done.exit_code == 1
    assert "0 of 0 checks hold" in done.output
