"""`edgekit bench`: table and JSON of bundles side by side."""

import json

import pytest
from click.testing import CliRunner
from fakes.bundles import mlp_bundle, null_bundle

from edgekit.cli import cli


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    mlp_bundle(folder / "mlp")
    null_bundle(folder / "text", text=True)
    return folder


def run(*arguments):
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


def test_a_table_compares_bundles(bundles):
    done = run(bundles / "mlp", bundles / "mlp", "--seconds", "0.1")
    assert done.exit_code == 0
    rows = [line for line in done.stdout.splitlines() if line.startswith("| mlp:x86-64")]
    assert len(rows) == 2
    assert "p99" in done.stdout
    assert "onnxruntime" in done.stdout


def test_json_holds_machine_settings_and_measurements(bundles):
    done = run(bundles / "mlp", "--requests", "5", "--threads", "1", "--cpu", "0", "--batch", "2", "--json")
    document = json.loads(done.stdout)
    assert document["measurements"][0]["requests"] == 5
    assert document["settings"]["batch"] == 2
    assert document["machine"]["cores"] >= 1


def test_every_variant_named_is_measured(bundles):
    done = run(bundles / "mlp", "--variant", "x86-64", "--variant", "toaster", "--seconds", "0.1")
    assert done.exit_code == 2
    assert "unknown variant 'toaster'" in done.stderr
    done = run(bundles / "mlp", "--variant", "x86-64", "--seconds", "0.1")
    assert "mlp:x86-64" in done.stdout


def test_a_language_model_is_told_in_tokens(bundles):
    done = run(bundles / "text", "--requests", "4")
    assert "ms/token" in done.stdout
    assert "first token ms" in done.stdout
    assert "p99 stands on" in done.stdout


def test_no_bundle_there_is_told_with_a_hint(tmp_path):
    done = run(tmp_path / "nothing")
    assert done.exit_code == 2
    assert "edgekit export" in done.stderr
    assert done.stdout == ""
