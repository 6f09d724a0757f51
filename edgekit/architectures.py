"""What optimum knows of Hugging Face architectures: inputs that a network takes, where nobody gives data.

Knows no network of our own: names, types and shapes come from optimum's table of ONNX exports
(https://huggingface.co/docs/optimum-onnx), and values at random, seeded.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from edgekit.errors import UsageError
from edgekit.model import Data, Split
from edgekit.plugins import extra

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.tensors import Array

SAMPLES = 16
TOKENS = 128
"""Length of the windows, or as many positions as the network has."""
SEED = 0


def invented(folder: Path) -> Data:
    """Make inputs for a folder's architecture and task: `SAMPLES` of them, tokens in windows of `TOKENS`.

    They say what shapes there are, not how real ones are distributed: no range is to be learned from them.

    Raises:
        UsageError: an architecture that optimum does not know, or a damaged configuration.
        MissingExtra: optimum is not installed.
    """
    with extra("optimum"):
        import optimum.exporters.onnx.model_configs  # noqa: F401  # fills the table that is asked below
        import torch
        import transformers
        from optimum.exporters.tasks import TasksManager
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        name = str((config.architectures or [""])[0])
        task = TasksManager.infer_task_from_model(getattr(transformers, name))
        known = TasksManager.get_supported_tasks_for_model_type(
            config.model_type, exporter="onnx", library_name="transformers"
        )
        described = known[task](config)
    except (KeyError, ValueError, AttributeError, OSError) as error:
        raise UsageError(
            f"optimum knows no inputs for {folder.name}: {str(error).splitlines()[0][:200] or 'no architecture'}",
            "give --data with samples of what it takes",
        ) from error
    tokens = min(TOKENS, getattr(config, "max_position_embeddings", TOKENS))
    before = random.getstate()
    random.seed(SEED)  # optimum draws the lengths of masks from Python's own generator
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            made = described.generate_dummy_inputs(framework="pt", batch_size=SAMPLES, sequence_length=tokens)
    finally:
        random.setstate(before)
    inputs: dict[str, Array] = {name: tensor.numpy() for name, tensor in made.items()}
    return Data(Split(inputs))
