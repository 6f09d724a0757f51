"""A bundle that knows its data, standard normal numbers, and a host that is asked with the same numbers or others."""

import msgspec
import numpy as np
from fakes import bundles

from edgekit import baseline as baselines
from edgekit import bundle
from edgekit.export.baselines import baseline_of
from edgekit.model import Data, Model, OnnxNetwork, Split
from edgekit.runtime.session import Contract
from edgekit.runtime.sketches import HALF


def watched_bundle(folder, **draft):
    """Seal the perceptron in ``folder``/b with a baseline of standard normal inputs."""
    plain = bundles.mlp_bundle(folder / "plain", **draft)
    inputs, outputs, labels = plain.manifest.inputs, plain.manifest.outputs, plain.manifest.postprocess
    (folder / "named.onnx").write_bytes(bundles.mlp_onnx(names=("image", "scores")))
    samples = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    model = Model(
        name="m",
        task="tensor",
        network=OnnxNetwork(folder / "named.onnx"),
        inputs=inputs,
        outputs=outputs,
        data=Data(Split({"image": samples})),
    )
    found = baseline_of(model, Contract(inputs=inputs, outputs=outputs, postprocess=labels))
    sources = {f.path: plain.path(f.path) for f in plain.manifest.files}
    told = msgspec.structs.replace(plain.manifest, baseline=baselines.FILE)
    return bundle.seal(folder / "b", told, {**sources, baselines.FILE: baselines.encode(found)})


def always(host):
    """Let the host look at every request."""
    for drift in host.watch._drifts.values():
        drift.clock = lambda: 0.0
        drift._due = 0.0


def ask_many(host, scale, count=HALF, seed=1):
    """Ask with normal numbers of that deviation."""
    chance = np.random.default_rng(seed)
    for _ in range(count):
        host.run({"image": (scale * chance.normal(size=(1, 64))).astype(np.float32)})
        always(host)
