"""The client that the public conformance suite asks, on a repository as the publisher makes it."""

import functools
import http.server
import threading

import pytest
from test_publisher import NOW, PROFILE, tiny_bundle

from edgekit.ota.device import tuf_cli
from edgekit.ota.server import publisher


@pytest.fixture
def served(tmp_path, monkeypatch):
    folder = tmp_path / "fleet"
    publisher.init(folder, NOW)
    publisher.publish(folder, tiny_bundle(tmp_path / "b"), now=NOW)
    monkeypatch.setattr(tuf_cli, "_now", lambda: NOW)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder / "repository"))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(place, *arguments):
    return tuf_cli.main(["--metadata-dir", str(place / "metadata"), *map(str, arguments)])


def test_a_target_is_fetched_by_the_rules(served, tmp_path, capsys):
    fleet, url = served
    release = next(one for one in publisher.releases(fleet) if one.profile == PROFILE)
    assert run(tmp_path, "init", fleet / "repository/metadata/1.root.json") == 0
    assert run(tmp_path, "--metadata-url", f"{url}/metadata", "refresh") == 0
    assert (tmp_path / "metadata/root.json").is_file()
    (tmp_path / "targets").mkdir()
    place = ["--target-base-url", f"{url}/targets", "--target-dir", tmp_path / "targets"]
    asked = ["--metadata-url", f"{url}/metadata", "--target-name", release.path, *place]
    assert run(tmp_path, *asked, "download") == 0
    (fetched,) = (tmp_path / "targets").iterdir()
    assert fetched.read_bytes() == (tmp_path / "b/manifest.json").read_bytes()
    before = fetched.stat().st_mtime_ns
    assert run(tmp_path, *asked, "download") == 0
    assert fetched.stat().st_mtime_ns == before
    assert run(tmp_path, "--metadata-url", f"{url}/metadata", "--target-name", "nobody", *place, "download") == 1
    assert "nobody signed a target nobody" in capsys.readouterr().err


def test_what_was_changed_on_the_way_is_refused(served, tmp_path, capsys):
    fleet, url = served
    assert run(tmp_path, "init", fleet / "repository/metadata/1.root.json") == 0
    timestamp = fleet / "repository/metadata/timestamp.json"
    timestamp.write_bytes(
        timestamp.read_bytes().replace(b'"version": 2', b'"version": 3').replace(b'"version":2', b'"version":3')
    )
    assert run(tmp_path, "--metadata-url", f"{url}/metadata", "refresh") == 1
    assert "UnsignedMetadataError" in capsys.readouterr().err


def test_what_is_not_said_is_asked_for(served, tmp_path, capsys):
    fleet, url = served
    assert run(tmp_path, "init", tmp_path / "nowhere") == 1
    assert run(tmp_path, "init", fleet / "repository/metadata/1.root.json") == 0
    assert run(tmp_path, "refresh") == 1
    assert run(tmp_path, "--metadata-url", url, "download") == 1
    told = capsys.readouterr().err
    assert "no repository is named" in told
    assert "what is to be downloaded is not said" in told
