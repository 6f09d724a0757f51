"""The operator's commands for keys: a fleet whose root is kept on three sticks, from init to recovery, and verify."""

import json
import os
import pty
import shutil
import sys

import msgspec
import pytest
from fakes.bundles import mlp_bundle
from fakes.fleets import NOW, OTHER, PROFILE, Fleet, operator_signs, tiny_bundle
from test_ota_commands import FAST, ota, say

from edgekit.cli.ota import _fleet
from edgekit.ota.server import metadata, publisher

SECRET = "correct horse battery"


@pytest.fixture
def fleet(tmp_path):
    ota("init", tmp_path / "fleet")
    ota("publish", tmp_path / "fleet", mlp_bundle(tmp_path / "b").folder, *FAST)
    return tmp_path / "fleet"


@pytest.fixture
def passphrase(monkeypatch):
    monkeypatch.setenv("EDGEKIT_PASSPHRASE", SECRET)


def key_of(fleet, role):
    return next(row for row in say("keys", fleet)["keys"] if row["role"] == role)


def test_a_root_on_three_sticks_from_init_to_recovery(tmp_path, passphrase):
    fleet, away = tmp_path / "fleet", tmp_path / "away"
    told = ota("init", fleet, "--offline-keys", away, "--root-keys", 3, "--root-threshold", 2).output
    assert f"{fleet / 'keys'}, NOT encrypted" in told
    assert f"{away}, encrypted" in told
    assert sorted(p.name for p in away.iterdir()) == [
        "authority.pem", "root-1.pem", "root-2.pem", "root-3.pem", "targets.pem",
    ]  # fmt: skip
    ota("publish", fleet, mlp_bundle(tmp_path / "b").folder, *FAST)
    sticks = [tmp_path / f"stick-{n}" for n in (1, 2, 3)]
    for number, stick in enumerate(sticks, 1):
        stick.mkdir()
        shutil.move(away / f"root-{number}.pem", stick)
    online = fleet / "keys" / "timestamp.pem"
    told = say("revoke", fleet, "timestamp", "--keys", sticks[0])
    assert (told["root"], told["missing"]) == (2, 1)
    assert say("keys", fleet)["pending_root"] == 2
    assert "root 2 waits for signatures" in ota("keys", fleet).output
    # On the second machine there is a stick and the file, no fleet.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(told["pending"], elsewhere)
    key = f"file:{sticks[1]}/root-2.pem?encrypted"
    assert say("sign", elsewhere / "2.root.json", "--key", key)["signatures"] == 2
    told = say("sign", fleet, "--from", elsewhere / "2.root.json")
    assert (told["root"], told["missing"]) == (2, 0)
    assert set(told["dropped"]) == {"file:keys/timestamp.pem", "file:keys/snapshot.pem"}
    online.unlink()
    ota("publish", fleet, mlp_bundle(tmp_path / "b2").folder, *FAST)
    assert say("verify", fleet)["roots"] == 2
    stolen = key_of(fleet, "root")["keyid"]
    told = say("revoke", fleet, stolen[:10], "--keys", sticks[1], "--keys", sticks[2])
    assert (told["root"], told["missing"], told["made"]) == (3, 0, [])
    assert say("verify", fleet)["problems"] == []


def test_rotate_refresh_and_keys_tell_what_they_did(fleet):
    before = key_of(fleet, "snapshot")
    told = ota("rotate", fleet, "snapshot").output
    assert "root 2 is in force" in told
    assert "no longer trusted, delete it: file:keys/snapshot.pem" in told
    assert key_of(fleet, "snapshot")["keyid"] != before["keyid"]
    assert say("refresh", fleet) == {"warnings": []}
    assert say("refresh", fleet, "root", "targets", "model-mlp")["root"] == 3
    assert "unknown role 'model-x'" in ota("refresh", fleet, "model-x", code=2).output
    assert "unknown role or key" in ota("rotate", fleet, "model-x", code=2).output
    assert "nothing in" in ota("sign", fleet, code=2).output
    (fleet / "keys" / "targets.pem").unlink()
    assert "targets key is missing" in ota("refresh", fleet, "targets", code=10).output
    for command in ("keys", "verify", "refresh"):
        assert "holds no fleet" in ota(command, fleet / "x", code=2).output
    for command in ("rotate", "revoke"):
        assert "holds no fleet" in ota(command, fleet / "x", "root", code=2).output
    assert not (fleet / "x").exists()


def test_waiting_root_is_given_up_by_a_word(tmp_path):
    fleet = tmp_path / "fleet"
    ota("init", fleet, "--root-keys", 2, "--root-threshold", 2)
    shutil.move(fleet / "keys" / "root-2.pem", tmp_path)
    assert say("rotate", fleet, "targets")["missing"] == 1
    assert "waits for signatures" in ota("rotate", fleet, "targets", code=2).output
    assert say("sign", fleet, "--drop") == {"dropped": True}
    assert say("keys", fleet)["pending_root"] is None
    assert "no key is named" in ota("sign", metadata.place(fleet, "1.root"), code=2).output
    assert "cannot sign" in ota("init", tmp_path / "g", "--root-threshold", 2, code=2).output


def test_passphrase_comes_from_a_variable_of_the_key_a_file_or_nowhere(tmp_path, monkeypatch):
    fleet, file = tmp_path / "fleet", tmp_path / "secret"
    file.write_text(f"{SECRET}\nanything else\n")
    assert "is locked" in ota("init", fleet, "--encrypt", code=10).output
    ota("init", fleet, "--encrypt", "--passphrase-file", file)
    assert "EDGEKIT_PASSPHRASE" in ota("refresh", fleet, code=10).output
    monkeypatch.setenv("EDGEKIT_PASSPHRASE", "something quite else")
    assert "does not open" in ota("refresh", fleet, code=10).output
    monkeypatch.setenv("EDGEKIT_PASSPHRASE_TIMESTAMP", SECRET)
    assert "snapshot.pem" in ota("refresh", fleet, code=10).output
    monkeypatch.setenv("EDGEKIT_PASSPHRASE_SNAPSHOT", SECRET)
    ota("refresh", fleet)


def on_a_terminal(answers, *words):
    """Run a command of `ota` on a terminal of its own and answer what it asks, line by line; return all it showed."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.pop("EDGEKIT_PASSPHRASE", None)
        arguments = [sys.executable, "-m", "edgekit", "ota", *map(str, words)]
        os.execv(sys.executable, arguments)  # noqa: S606  # the child of a fork
    seen, left = b"", list(answers)
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        seen += piece
        if not piece:
            break
        if seen.endswith(b": ") and left:
            os.write(terminal, left.pop(0).encode() + b"\n")
    assert os.waitpid(child, 0)[1] == 0, seen.decode()
    assert left == [], seen.decode()
    assert not any(answer and answer in seen.decode() for answer in answers)
    return seen.decode()


def test_passphrase_is_asked_for_once_a_key_and_never_shown(tmp_path, monkeypatch):
    words = ("init", tmp_path / "fleet", "--offline-keys", tmp_path / "away", "--root-keys", 2)
    seen = on_a_terminal(
        [SECRET, "a slip of the pen", SECRET, SECRET, "another one's own", "another one's own", "", ""], *words
    )
    assert "new passphrase for root-1.pem" in seen
    assert "they differ" in seen
    assert "(Enter: as before)" in seen
    (tmp_path / "secret").write_text(SECRET)
    told = ota("refresh", tmp_path / "fleet", "root", "--passphrase-file", tmp_path / "secret").output
    assert "root 2 is in force" in told
    seen = on_a_terminal(["another one's own"], "refresh", tmp_path / "fleet", "targets")
    assert "passphrase of file:" in seen


def test_verify_finds_everything_whole_also_in_a_copy(fleet, tmp_path):
    told = ota("verify", fleet).output
    assert "1 root(s), 1 release(s)" in told
    assert "| model-mlp" in told
    shutil.copytree(fleet / "repository", tmp_path / "stick")
    document = say("verify", tmp_path / "stick")
    assert (document["releases"], document["problems"]) == (1, [])
    assert {row["role"] for row in document["roles"]} == {"root", "timestamp", "snapshot", "targets", "model-mlp"}
    ota("rotate", fleet, "root")
    newest = metadata.place(fleet, "2.root")
    assert say("verify", fleet, "--root", newest)["problems"] == []


def damage(path):
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    ("what", "words", "code"),
    [
        ("blobs/*", "is damaged", 7),
        ("targets/models/mlp/*/*", "a device refuses this", 10),
        ("metadata/timestamp.json", "damaged", 10),
        ("metadata/1.model-mlp.json", "damaged", 10),
    ],
)
def test_verify_names_what_is_damaged(fleet, what, words, code):
    damage(next((fleet / "repository").glob(what)))
    assert words in ota("verify", fleet, code=code).output
    problems = json.loads(ota("verify", fleet, "--json", code=code).stdout)["problems"]
    assert problems[0]["exit_code"] == code


@pytest.mark.attack("release for another class")
def test_verify_finds_a_release_that_names_a_variant_of_another_class(tmp_path, monkeypatch):
    fleet = Fleet(tmp_path / "fleet")
    made = tiny_bundle(tmp_path / "sealed")
    release = next(r for r in publisher.publish(fleet.folder, made, now=NOW) if r.profile == PROFILE)
    foreign = msgspec.structs.replace(release, variants=(OTHER,))
    operator_signs(fleet, "digits", lambda signed: publisher._add_target(fleet.folder, signed, foreign, made))
    monkeypatch.setattr(_fleet, "now", lambda: NOW)
    told = f"is signed for {PROFILE} and names the variant {OTHER}"
    assert told in ota("verify", fleet.folder, code=10).output


def test_verify_names_what_is_missing_forged_or_expired(fleet, tmp_path, monkeypatch):
    ota("init", tmp_path / "other")
    assert "a device refuses" in ota(
        "verify", fleet, "--root", metadata.place(tmp_path / "other", "1.root"), code=10
    ).output  # fmt: skip
    next((fleet / "repository" / "blobs").iterdir()).unlink()
    assert "is missing" in ota("verify", fleet, code=7).output
    from datetime import timedelta

    today = _fleet.now()
    monkeypatch.setattr(_fleet, "now", lambda: today + timedelta(days=5))
    assert "timestamp expires in 1 days" in ota("verify", fleet, code=7).output
    monkeypatch.setattr(_fleet, "now", lambda: today + timedelta(days=8))
    assert "timestamp expired on" in ota("verify", fleet, code=10).output
