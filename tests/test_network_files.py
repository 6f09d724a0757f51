"""A network as two files: the same bytes anywhere, weights once, and no half that passes for a whole."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgekit import network_files, saving, workload  # noqa: E402  # torch may be missing
from edgekit.errors import UsageError  # noqa: E402  # the same
from edgekit.model import Data, Split  # noqa: E402  # the same
from edgekit.tracing import trace  # noqa: E402  # the same

X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.last = torch.nn.Linear(8, 8)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def model():
    torch.manual_seed(0)
    return workload.from_module("tied", Tied().eval(), Data(Split({"x": X})))


def test_the_graph_holds_no_weight_and_the_weights_file_holds_each_once(tmp_path):
    network_files.write(trace(model()), tmp_path)
    with zipfile.ZipFile(tmp_path / "network.pt2") as archive:
        assert sum(i.file_size for i in archive.infolist() if "/weights/weight_" in i.filename) == 0
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "weights.safetensors")
    assert sum(name.endswith("weight") and tensor.dim() == 2 for name, tensor in stored.items()) == 1
    read = network_files.read(tmp_path)
    np.testing.assert_array_equal(read(torch.as_tensor(X)).detach(), model().network.run({"x": X})["scores"])


@pytest.mark.slow
def test_the_bytes_are_the_same_in_another_process_and_from_another_place(tmp_path):
    text = Path(__file__).read_text()
    script = "\nnetwork_files.write(trace(model()), Path(sys.argv[1]))\n"
    for name in ("a", "b"):
        place = tmp_path / ("source" * (1 + (name == "b")))
        place.mkdir()
        (place / f"net_{name}.py").write_text(text + script)
        (tmp_path / name).mkdir()
        subprocess.run([sys.executable, place / f"net_{name}.py", tmp_path / name], check=True)
    for name in ("network.pt2", "weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert b"net_a" not in (tmp_path / "a" / "network.pt2").read_bytes()


def test_two_halves_that_do_not_belong_together_are_refused(tmp_path):
    saving.save(model(), tmp_path / "m")
    other = network_files.tensors_to_bytes({"first.weight": torch.zeros(3, 3)})
    (tmp_path / "m" / "weights.safetensors").write_bytes(other)
    with pytest.raises(UsageError, match="does not fit"):
        workload.load(str(tmp_path / "m"))
    (tmp_path / "m" / "weights.safetensors").unlink()
    with pytest.raises(UsageError, match="is damaged"):
        workload.load(str(tmp_path / "m"))


def test_a_folder_of_the_first_version_with_the_weights_in_the_graph_still_loads(tmp_path):
    saving.save(model(), tmp_path / "m")
    (tmp_path / "m" / "weights.safetensors").unlink()
    torch.export.save(trace(model()), tmp_path / "m" / "network.pt2")
    again = workload.load(str(tmp_path / "m"))
    np.testing.assert_array_equal(again.network.run({"x": X})["scores"], model().network.run({"x": X})["scores"])


def test_writing_leaves_the_program_whole(tmp_path):
    program = trace(model())
    network_files.write(program, tmp_path)
    assert not any(tensor.is_meta for tensor in program.state_dict.values())
    assert any("nn_module_stack" in node.meta for node in program.graph.nodes)
    first = (tmp_path / "network.pt2").read_bytes()
    network_files.write(program, tmp_path)
    assert (tmp_path / "network.pt2").read_bytes() == first
