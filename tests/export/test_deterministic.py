"""Two fresh processes, apart in hash seed, clock and folders, write the same bytes: all formats at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekit import bundle, plugins
from edgekit.export import PACKAGE

TESTS = Path(__file__).resolve().parents[1]
SCRIPT = """
import json
from pathlib import Path

from fakes.exportable import llama_folder, tiny_model

from edgekit import device_profiles, workload
from edgekit.compress.passes.palettize import Palettize
from edgekit.compress.passes.quantize import Quantize
from edgekit.export import export
from edgekit.progress import silent

model = Quantize().apply(Palettize().apply(tiny_model(), silent), silent)
language = workload.load(str(llama_folder(Path("llama"))))
gguf = ["gguf"]
found = {}
for name, given, formats, precision in (
    ("int8", model, FORMATS, None), ("fp32", model, FORMATS, "fp32"),
    ("f16", language, gguf, "f16"), ("q4_0", language, gguf, "q4_0"),
):
    profiles = [device_profiles.of_format(one) for one in formats]
    for row in export(given, profiles, Path(name), precision=precision).rows:
        found[f"{name} {row.target}"] = type(row.error).__name__ if row.error else ""
print(json.dumps(found))
"""


def test_two_fresh_runs_give_the_same_bytes_in_every_format(tmp_path):
    pytest.importorskip("torch", reason="exporters need torch")
    formats = [name for name in plugins.names(PACKAGE) if name != "gguf"]
    script = SCRIPT.replace("FORMATS", repr(formats))
    started = []
    for number, zone in enumerate(("UTC", "Asia/Kathmandu")):
        place = tmp_path / f"run{number}"
        (place / "tmp").mkdir(parents=True)
        changed = {"PYTHONHASHSEED": str(number), "TMPDIR": str(place / "tmp"), "TZ": zone}
        paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        faked = {**os.environ, **changed, "PYTHONPATH": paths}
        line = [sys.executable, "-c", script]
        started.append(subprocess.Popen(line, cwd=place, env=faked, stdout=subprocess.PIPE, text=True))
    first, second = (json.loads(process.communicate()[0].splitlines()[-1]) for process in started)
    assert [process.returncode for process in started] == [0, 0]
    assert first == second
    assert set(first.values()) <= {"", "MissingExtra"}, first
    assert first["int8 onnx"] == first["fp32 coreml"] == first["q4_0 gguf"] == ""
    for name in ("int8", "fp32", "f16", "q4_0"):
        one, other = (bundle.read(tmp_path / run / name) for run in ("run0", "run1"))
        hashes = [{entry.path: entry.sha256 for entry in opened.manifest.files} for opened in (one, other)]
        assert hashes[0] == hashes[1]
        assert one.digest == other.digest
        for entry in one.manifest.files:
            assert str(tmp_path).encode() not in one.path(entry.path).read_bytes(), entry.path
