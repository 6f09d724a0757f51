"""Bundles whose versions are small steps from each other: each byte of the model moves by one or stays."""

from __future__ import annotations

import msgspec
import numpy as np

from edgekit import bundle
from edgekit.manifest import Manifest

from .bundles import variant
from .fleets import PROFILE, noise

SIZE = 60_000
WEIGHTS = np.frombuffer(noise("weights", SIZE), np.uint8)
STEPS = np.random.default_rng(5).integers(-1, 2, (6, SIZE)).astype(np.int8).view(np.uint8)


def weights(version):
    """Return the model file of a version, up to 6."""
    return (WEIGHTS + STEPS[:version].sum(0, dtype=np.uint8)).tobytes()


def sealed(folder, data, name="model.bin", **more):
    """Seal a bundle of one class with these bytes as its model, and more files of that class by name."""
    main = f"{PROFILE}/{name}"
    files = {main: data, **{f"{PROFILE}/{other}": one for other, one in more.items()}}
    manifest = Manifest(
        name="digits",
        version="1",
        task="tensor",
        variants=(msgspec.structs.replace(variant(PROFILE, "onnx", main), files=tuple(files)),),
        files=(),
    )
    return bundle.seal(folder, manifest, {**files, "labels.txt": b"zero\none\n"})
