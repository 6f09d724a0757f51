"""The server's own description: it names every route, and what is made of it at random never breaks the server."""

import json
import subprocess
import sys

import pytest
from fakes import bundles
from fakes.requests_to import ask

import edgekit
from edgekit.runtime.host import Host
from edgekit.runtime.server import serve_in_thread
from edgekit.runtime.server.app import App

MODELS = {
    "mlp": bundles.mlp_bundle,
    "pictures": bundles.brightness_bundle,
    "text": lambda folder: bundles.null_bundle(folder, text=True),
}


@pytest.fixture(params=MODELS)
def running(tmp_path, request):
    MODELS[request.param](tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    with serve_in_thread(host) as running:
        yield running
    host.close()


def test_every_route_is_described(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    app = App(host)
    with serve_in_thread(host) as running:
        document = json.loads(ask(running.url, path="/openapi.json")[2])
    routes = {f"/{'/'.join(path)}": method for path, (method, _) in app._routes.items()}  # nobody else has them
    described = {path: next(iter(one)).upper() for path, one in document["paths"].items() if "MODEL" not in path}
    assert described == {path: method for path, method in routes.items() if path != "/openapi.json"}
    infer = document["paths"]["/v2/models/{MODEL_NAME}/versions/{MODEL_VERSION}/infer"]["post"]
    assert infer["parameters"][0]["schema"]["enum"] == ["mlp"]
    app.close()
    host.close()


@pytest.mark.slow
def test_nothing_made_of_the_description_breaks_the_server(running, tmp_path):
    """Valid and broken requests by the hundred: only documented answers, of the documented kind, and none is a 500."""
    pytest.importorskip("schemathesis", reason="schemathesis makes the requests")
    start = "from schemathesis.cli import schemathesis; schemathesis()"
    # what is valid by the description may still not fit the model: its tensors are no part of it
    flags = ["--max-examples", "10", "--exclude-checks", "positive_data_acceptance", "--seed", "1", "--no-color"]
    command = [sys.executable, "-c", start, "run", f"{running.url}/openapi.json", *flags]
    (tmp_path / "schemathesis.toml").touch()  # else one of a folder above would be taken
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "failure" not in done.stdout


def test_a_method_that_is_not_taken_is_told_which_is(tmp_path):
    bundles.mlp_bundle(tmp_path / "b")
    host = Host(edgekit.load(tmp_path / "b"))
    with serve_in_thread(host) as running:
        for method, path, allowed in (("POST", "/v2", "GET, HEAD"), ("GET", "/v1/classify", "POST")):
            status, headers, _ = ask(running.url, method, path)
            assert (status, {n.lower(): v for n, v in headers.items()}["allow"]) == (405, allowed)
    host.close()
