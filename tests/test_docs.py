"""The documents are true: what they name exists, the code they show runs, and the checker of both notices lies."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes.bundles import npy, variant

from edgekit import bundle, device_profiles, plugins, runtime
from edgekit.errors import HealthError
from edgekit.manifest import Golden, Manifest
from edgekit.progress import silent
from edgekit.tensors import TensorSpec

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def _checker():
    spec = importlib.util.spec_from_file_location("checks_readme", ROOT / "checks/readme.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


readme = _checker()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_option_and_link_of_a_document_exists(path):
    assert readme.faults_of(path) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("```sh\nedgekit fly x\n```", "no command fly"),
        ("```sh\nedgekit bench x --warp\n```", "no option --warp"),
        ("```sh\nedgekit ota \\\n    fly\n```", "no command fly"),
        ("Call `edgekit bench --warp` now.", "no option --warp"),
        ("Call `make tea` now.", "no `make tea`"),
        ("[here](nowhere.md)", "leads nowhere"),
        ("```text help\n$ edgekit devices --help\nUsage: something else\n```", "is now"),
    ],
)
def test_the_checker_notices_a_lie(tmp_path, text, says):
    path = tmp_path / "lie.md"
    path.write_text(text + "\n")
    assert says in readme.faults_of(path)[0]


def test_the_checker_takes_the_truth(tmp_path):
    path = tmp_path / "truth.md"
    path.write_text(
        "```sh\n$ edgekit bench a b --seconds=2 --json | head  # nothing\nmake test PYTEST=x\nls\n```\n"
        "`edgekit ota …`, `edgekit -h`, [this](truth.md), [that](https://example.org), [top](#top)\n"
    )
    assert readme.faults_of(path) == []


def test_blocks_that_ask_for_it_are_run(tmp_path):
    path = tmp_path / "run.md"
    path.write_text("```sh run\ntest -f photo.png\nedgekit devices list\n```\n```sh\nfalse\n```\n")
    assert readme.run_blocks(path) == 1
    path.write_text("```sh run\nfalse\n```\n")
    with pytest.raises(readme.subprocess.CalledProcessError):
        readme.run_blocks(path)


def shown(name):
    """Return the code that CONTRIBUTING.md shows for that file."""
    for _, kind, body in readme.blocks_of((ROOT / "CONTRIBUTING.md").read_text()):
        if kind == name:
            return body
    pytest.fail(f"CONTRIBUTING.md shows no {name}")


def install(monkeypatch, tmp_path, name):
    """Lay the shown file where a plugin of that folder is found."""
    package = name.rpartition("/")[0].replace("/", ".")
    folder = importlib.import_module(package)
    (tmp_path / Path(name).name).write_text(shown(name))
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])


def tiny_model():
    import torch

    from edgekit.model import Data, Split
    from edgekit.workload import from_module

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    network[0].weight.data[0, 0] = 50.0
    samples = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    return from_module("tiny", network, Data(Split({"x": samples})))


def test_the_shown_pass_does_what_it_says(monkeypatch, tmp_path):
    from edgekit.compress import compress, recipe

    install(monkeypatch, tmp_path, "edgekit/compress/passes/clip.py")
    model = tiny_model()
    before = model.network.module[0].weight
    clipped = compress(model, recipe.decode('version = 1\n[[pass]]\nname = "clip"\ndeviations = 2.0\n'), silent)
    after = clipped.network.module[0].weight
    assert before.max() == 50.0, "the model that came in is untouched"
    assert after.max() < 25.0
    assert clipped.lineage[-1].name == "clip"
    assert clipped.lineage[-1].options["deviations"] == 2.0


def test_the_shown_target_gives_a_file_that_computes_the_same(monkeypatch, tmp_path):
    from edgekit.export import export

    install(monkeypatch, tmp_path, "edgekit/export/targets/pt2.py")
    own = tmp_path / "shelf.toml"
    own.write_text(
        'title = "T"\nsummary = "s"\narch = "any"\nmemory_mb = 64\nthreads = 1\nformats = ["pt2"]\nsource = "me"\n'
    )
    done = export(tiny_model(), [device_profiles.load(str(own))], tmp_path / "bundle")
    assert done.first_error is None, done.first_error
    parity = done.bundle.manifest.variant("shelf").parity
    assert parity.status == "evaluated"
    assert parity.sqnr_db > 100


def test_the_shown_backend_computes(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path, "edgekit/runtime/backends/npz.py")
    np.savez(tmp_path / "model.npz", w=np.eye(2, dtype=np.float32) * 3, b=np.ones(2, np.float32))
    one = variant("any", "npz", "any/model.npz")
    specs = {"inputs": (TensorSpec("x", "float32", (-1, 2)),), "outputs": (TensorSpec("y", "float32", (-1, 2)),)}
    draft = Manifest(name="linear", version="1", task="tensor", variants=(one,), golden=Golden(), files=(), **specs)
    bundle.seal(tmp_path / "bundle", draft, {one.main: tmp_path / "model.npz"})
    with runtime.load(tmp_path / "bundle") as session:
        assert session.run({"x": np.array([[1, 2]], np.float32)})["y"].tolist() == [[4, 7]]
        assert session.engine.startswith("numpy")
    bundle.seal(tmp_path / "broken", draft, {one.main: npy(np.zeros(3))[:40]})
    with pytest.raises(HealthError, match="no linear model"):
        runtime.load(tmp_path / "broken")


def test_the_shown_profile_is_a_hardware_class(tmp_path):
    name = "edgekit/device_profiles/orange-pi-5.toml"
    (tmp_path / Path(name).name).write_text(shown(name))
    profile = device_profiles.load(str(tmp_path / Path(name).name))
    assert profile.format == "onnx"
    assert profile.detect.device_tree == "Orange Pi 5"


def test_no_document_or_file_names_a_place_on_one_machine_or_a_registry():
    hosts = ["/" + "work" + "/", "pypi" + ".org", "pythonhosted" + ".org", "download." + "pytorch", "opt/" + "wheels"]
    folders = ("*", "docs/**/*", "edgekit/**/*.py", "checks/*", "examples/**/*", "benchmarks/*")
    suffixes = {".md", ".txt", ".toml", ".py", ".sh", ""}
    found = (path for pattern in folders for path in ROOT.glob(pattern))
    text_files = [p for p in found if p.is_file() and p.suffix in suffixes and p.name != ".coverage"]
    for path in text_files:
        text = path.read_text(encoding="utf-8", errors="replace")
        assert [host for host in hosts if host in text] == [], path


def test_the_matrix_of_models_and_formats_has_a_cell_for_each():
    from edgekit.export import PACKAGE

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- figures of benchmarks/export/matrix.py -->\n\n")[2].partition("\n\n")[0]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert head == ["model", "precision", *sorted(plugins.names(PACKAGE))]
    assert [row[1] for row in rows] == ["fp32", "int8", "int4"] * 9
    assert all(cell for row in rows for cell in row)
    notes = {cell for row in rows for cell in row if cell.startswith("[")}
    assert {f"{note[1:-1]}." for note in notes} <= {line.split(" ")[0] for line in text.splitlines()}
