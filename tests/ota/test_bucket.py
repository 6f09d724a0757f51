"""Blobs in an S3-compatible store: moto's server in a process of its own, where it is installed."""

import contextlib
import shutil
import socket
import subprocess
import time

import pytest
from click.testing import CliRunner
from fakes.brokers import free_port
from fakes.fleets import PROFILE, tiny_bundle

from edgekit.cli import cli
from edgekit.errors import ResourceError, TransferError, UsageError
from edgekit.ota.messages import Block, BlockRequest
from edgekit.ota.server import bucket, publisher, repository

obstore = pytest.importorskip("obstore")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip("moto_server is not installed (pipx install 'moto[server]': it fits into no environment of ours)")
    port = free_port()
    log = (tmp_path_factory.mktemp("moto") / "log").open("w")
    with log, subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


@pytest.fixture
def environment(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    bucket._opened.cache_clear()


@pytest.fixture
def s3(endpoint, environment, monkeypatch):
    import http.client

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"))
    connection.request("PUT", "/fleet-blobs")  # makes the bucket
    assert connection.getresponse().status in (200, 409)
    connection.close()
    return "s3://fleet-blobs/home"


def ota(*arguments, code=0):
    done = CliRunner().invoke(cli, ["ota", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.output


def ask(fleet, path, offset=0, length=1000):
    return repository.read_block(fleet, BlockRequest(path=path, offset=offset, length=length))


def test_a_server_without_the_files_answers_out_of_the_bucket(s3, tmp_path):
    fleet = tmp_path / "fleet"
    ota("init", fleet, "--name", "home", "--blobs", s3)
    ota("publish", fleet, tiny_bundle(tmp_path / "bundle", size=2000).folder, "--target", PROFILE)
    blobs = {file.name: file.read_bytes() for file in (fleet / "repository" / "blobs").iterdir()}
    assert blobs
    shutil.rmtree(fleet / "repository" / "blobs")
    for name, data in blobs.items():
        for offset, length in ((0, 1000), (len(data) - 3, 1000), (0, 1), (len(data), 10), (len(data) + 5, 10)):
            block = ask(fleet, f"blobs/{name}", offset, length)
            assert block == Block(total=len(data), data=data[offset : offset + length])


def test_deltas_go_there_too_and_metadata_stay_files(s3, tmp_path):
    fleet = tmp_path / "fleet"
    ota("init", fleet, "--blobs", s3)
    for seed in (1, 2):
        ota("publish", fleet, tiny_bundle(tmp_path / f"b{seed}", seed=seed, size=9000).folder, "--model", "digits")
    store = bucket.of(fleet)
    local = {f"{kind}/{file.name}" for kind in ("blobs", "deltas") for file in (fleet / "repository" / kind).glob("*")}
    kept = {name for name in local if store._size(name) is not None}
    assert kept == local
    assert store._size("metadata/1.root.json") is None


@pytest.mark.attack("path traversal")
@pytest.mark.parametrize("path", ["blobs/../keys/root.pem", "keys/root.pem", "blobs/x", "blobs/" + "a" * 63, "blobs/"])
def test_nothing_but_blobs_and_deltas_is_asked_for(environment, tmp_path, path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    bucket.note(tmp_path, "s3://fleet-blobs")
    assert ask(tmp_path, path) == Block(error="not found")


def test_a_blob_that_is_nowhere_is_not_found_and_found_once_it_is_there(s3, tmp_path):
    bucket.note(tmp_path, s3)
    name = "blobs/" + "e" * 64
    assert ask(tmp_path, name) == Block(error="not found")
    (tmp_path / "file").write_bytes(b"late")
    bucket.of(tmp_path).write(name, tmp_path / "file")
    assert ask(tmp_path, name) == Block(total=4, data=b"late")


def test_a_store_that_is_away_stops_a_publish_before_anything_is_signed(environment, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    fleet = tmp_path / "fleet"
    ota("init", fleet, "--blobs", "s3://fleet-blobs")
    monkeypatch.setattr(bucket, "RETRIES", 0)
    bucket._opened.cache_clear()
    told = ota("publish", fleet, tiny_bundle(tmp_path / "bundle").folder, code=TransferError.exit_code)
    assert "s3://fleet-blobs" in told
    assert publisher.releases(fleet) == []


def test_what_is_no_bucket_is_refused_and_a_damaged_note_is_named(tmp_path):
    for url in ("https://x/y", "s3://", "s3://UPPER/x", "/srv/x"):
        with pytest.raises(UsageError, match="no address of a bucket"):
            bucket.note(tmp_path, url)
    assert bucket.of(tmp_path) is None
    (tmp_path / bucket.FILE).write_bytes(b"{")
    with pytest.raises(ResourceError, match="damaged"):
        bucket.of(tmp_path)
