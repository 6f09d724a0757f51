"""Core ML weights in 4 bits on a depthwise CNN: tables and integers, zeros left out, beside coremltools' own k-means.

The DS-CNN of `litert`, which learned Fashion-MNIST. Each package is computed from its bytes (no Core ML runs here) on
test pictures and compared with the float network; sizes are those of the weight file. The peers compress the float16
package that edgekit writes with ``coremltools.optimize.coreml``: k-means in one table a layer and in one for each run
of channels, linear in 4 bits by channel.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from litert import CALIBRATED, PICTURES, STEPS, TRAINED, read, scaled, trained

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "compress"))
from _setting import Row, run, sqnr, top1

import edgekit.compress
from edgekit import device_profiles, workload
from edgekit.compress.recipe import Recipe
from edgekit.export import export, mil
from edgekit.model import Data, Split
from edgekit.plugins import load

if TYPE_CHECKING:
    from edgekit.model import Model
    from edgekit.tensors import Array

RUN = 8
"""How many channels share a table, here and at the peer."""
OURS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "float16": (),
    "int8": (("quantize", {"activations": "none"}),),
    "int4, a scale a channel": (("quantize", {"activations": "none", "bits": 4, "weights": "mse"}),),
    "4-bit table a layer": (("palettize", {}),),
    f"4-bit table for {RUN} channels": (("palettize", {"group": RUN}),),
    "3-bit table for 8 channels": (("palettize", {"group": RUN, "bits": 3}),),
    "half zeros, 4-bit table": (
        ("sparsify", {"pattern": "unstructured", "sparsity": 0.5, "epochs": 0}),
        ("palettize", {"group": RUN}),
    ),
}
