"""Where commands find the fleet's memory: a flag, the environment, or what its folder remembers, never a password."""

import json

import pytest
import yaml
from click.testing import CliRunner
from fakes.fleets import tiny_bundle

from edgekit.cli import cli
from edgekit.ota.server import publisher, whereabouts
from edgekit.ota.server.store import Store


def ota(*arguments, code=0, **environment):
    done = CliRunner().invoke(cli, ["ota", *map(str, arguments)], env=environment)
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def url(postgresql):
    return postgresql.create()


def test_every_command_finds_the_database_that_init_was_told_of(url, tmp_path):
    fleet = tmp_path / "fleet"
    ota("init", fleet, "--name", "home", EDGEKIT_DATABASE=url)
    ota("publish", fleet, tiny_bundle(tmp_path / "bundle").folder)
    ota("rollout", "start", fleet, "digits")
    ota("group", "add", fleet, "lab", "pi-1")
    assert json.loads(ota("status", fleet, "--json"))["fleet"] == "home"
    assert [r["id"] for r in json.loads(ota("rollout", "list", fleet, "--json"))["rollouts"]] == ["digits-v1"]
    assert not (fleet / whereabouts.SQLITE).exists()
    store = Store(url, "home")
    assert (len(store.rollouts()), list(store.groups())) == (1, ["lab"])
    store.close()


def test_no_password_is_written_into_the_folder(url, tmp_path):
    told = url.replace("edgekit@", "edgekit:s3cret@") + "?sslpassword=s3cret"
    fleet = tmp_path / "fleet"
    ota("init", fleet, "--database", url.replace("edgekit@", "edgekit:s3cret@"))
    assert whereabouts.find(fleet) == (url, "fleet")
    whereabouts.note(tmp_path, told, "x")
    for file in (fleet / whereabouts.FILE, tmp_path / whereabouts.FILE):
        assert "s3cret" not in file.read_text()


def test_a_fleet_in_a_file_is_not_looked_for_elsewhere(url, tmp_path):
    ota("init", tmp_path / "fleet")
    told = ota("status", tmp_path / "fleet", "--database", url, code=2)
    assert "is its own file fleet.sqlite" in told
    assert "has one server" in ota("server", tmp_path / "fleet", "--worker", "a", "--port", "0", code=2)


def test_nothing_is_signed_that_cannot_be_recorded(url, tmp_path):
    fleet, gone = tmp_path / "fleet", "postgresql+psycopg://edgekit@127.0.0.1:1/edgekit"
    ota("init", fleet, "--database", url)
    bundle = tiny_bundle(tmp_path / "bundle").folder
    ota("publish", fleet, bundle, "--database", gone, code=12)
    ota("rotate", fleet, "timestamp", "--database", gone, code=12)
    assert (publisher.releases(fleet), len(list((fleet / "repository/metadata").glob("*.root.json")))) == ([], 1)


def test_a_damaged_note_is_named(url, tmp_path):
    ota("init", tmp_path / "fleet", "--database", url)
    (tmp_path / "fleet" / whereabouts.FILE).write_bytes(b"\xff{")
    assert "database.json is damaged" in ota("status", tmp_path / "fleet", code=12)


def test_the_compose_file_has_two_workers_whose_commands_there_are(pytestconfig):
    told = yaml.safe_load((pytestconfig.rootpath / "docs/guides/compose.yml").read_text())
    workers = [one for name, one in told["services"].items() if name.startswith("worker")]
    assert len(workers) == 2
    flags = {option for parameter in _server().params for option in parameter.opts}
    for worker in workers:
        assert {word for word in worker["command"] if word.startswith("--")} <= flags
        assert "POSTGRES_PASSWORD" in worker["environment"]["PGPASSWORD"]


def _server():
    return cli.get_command(None, "ota").get_command(None, "server")
