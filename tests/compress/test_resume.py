"""Kills a compression with SIGKILL at random writes, again and again; the last run ends where an unbroken one does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

TESTS = Path(__file__).parents[1]
STORY = """
import json, os, random, sys
from pathlib import Path

sys.path.insert(0, {tests!r})
import torch

torch.set_num_threads(1)
from fakes import kills, tiny_workload
from edgekit import workload
from edgekit.compress import compress, fingerprint, output
from edgekit.compress.cache import Cache
from edgekit.compress.origin import origin_of, sources_of
from edgekit.compress.outcome import Stages, outcome_of
from edgekit.compress.recipe import decode

place, source = Path({place!r}), tiny_workload.__file__
recipe = decode({recipe!r})


def work(name, told=None):
    # Nothing of PyTorch computes in the parent: its threads would not survive the fork.
    model = workload.from_module("tiny", tiny_workload.build().eval(), tiny_workload.data())
    cache = Cache(place / f"cache-{{name}}")
    stages = Stages(model)
    small = compress(model, recipe, cache=cache, follow=stages.seen)
    origin = origin_of(model, recipe, sources_of(f"{{source}}:build"))
    digest = output.write(outcome_of(model, small, (recipe, origin), stages), place / name)
    if told:
        Path(told).write_text(json.dumps([digest, len(cache.found), len(cache.kept), cache.notes]))


def forked(call):
    child = os.fork()
    if child == 0:
        call()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


fingerprint.code()  # once for all: someone may be at work on the code
forked(lambda: work("whole", place / "whole.json"))
seed = random.randrange(1 << 30)
random.seed(seed)
killed, looked = 0, []
# The first two come early, so that there is something left to kill; the others anywhere, behind the end as well.
for at in [*random.sample(range(1, 12), 2), *sorted(random.sample(range(12, 90), 4))]:
    killed += kills.run_and_kill(lambda: work("broken"), at)
    if (place / "broken").exists():
        from edgekit import saving
        looked.append((place / "broken" / "bom.cdx.json").is_file() and saving._is_saved(place / "broken"))
forked(lambda: work("broken", place / "broken.json"))
forked(lambda: work("broken", place / "again.json"))
print(json.dumps({{"seed": seed, "killed": killed, "looked": looked}}))
"""
RECIPE = """version = 1
[[pass]]
name = "fold"
[[pass]]
name = "prune"
ratio = 0.5
epochs = 3
[[pass]]
name = "quantize"
"""


@pytest.mark.slow
def test_killed_at_random_writes_it_ends_with_the_digest_of_an_unbroken_run_and_does_nothing_twice(tmp_path):
    story = STORY.format(tests=str(TESTS), place=str(tmp_path), recipe=RECIPE)
    done = subprocess.run([sys.executable, "-c", story], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    whole, broken, again = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("whole", "broken", "again"))
    assert told["killed"] >= 2, told
    assert all(told["looked"]), f"a half-written folder: {told}"
    assert whole[1:3] == [0, 3]
    assert broken[0] == whole[0], told
    assert broken[1] + broken[2] == 3, told
    assert again == [whole[0], 3, 0, []]
    for name in ("weights.safetensors", "network.pt2", "plan.json", "model.json", "lineage.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
