"""What the model must give: reference outputs to compare files with, and the golden ones that travel in the bundle.

Knows no format. The reference is the compressed float model, before any plan is lowered.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import msgspec

from edgekit import plugins
from edgekit.errors import HealthError, MissingExtra, UsageError
from edgekit.export.labelled import labels_of
from edgekit.export.parity import Reference
from edgekit.export.quiet import silence
from edgekit.manifest import Classification, Expected, Golden, TextPreprocess, Variant
from edgekit.model import GgufFile, LlamaFolder, Model, Split, run_batched, whole_batches
from edgekit.plugins import extra
from edgekit.runtime import Contract, TextSession, backends, open_variant
from edgekit.runtime.backends import EngineOptions, Sampling
from edgekit.tensors import DYNAMIC

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from edgekit.tensors import Array, TensorSpec

GOLDEN_SAMPLES = 8
GOLDEN_BYTES = 8 << 20
"""Golden inputs and outputs together stay below this, but for one sample: every device fetches them."""
PARITY_SAMPLES = 64
TOKENIZER = "preprocess/tokenizer.json"
PROMPTS = ("Once upon a time", "The quick brown fox")
PROMPT_TOKENS = 16
TEXT_LENGTH = 48
TEXT_SAMPLES = 4


def reference_of(model: Model, name: str, version: str) -> Reference:
    """Compute the outputs of the compressed float model on its first calibration samples, and its metric on labels.

    Raises:
        UsageError: a tensor model without calibration data, or with less than its fixed batch.
        InputError: the model gives NaN or infinity.
    """
    with extra("export"):
        import numpy as np
    contract = Contract(
        name=name,
        version=version,
        task=model.task,
        inputs=_any_batch(model.inputs),
        outputs=_any_batch(model.outputs),
        preprocess=model.data.preprocess if model.data else None,
        text=_text(model),
        postprocess=_postprocess(model),
        detection=model.data.detection if model.data else None,
        embedding=model.data.embedding if model.data and model.inputs else None,
    )
    if isinstance(model.network, LlamaFolder):
        tokens = _tokens(model.network)
        with silence():  # transformers warns of what it does not know in config.json
            outputs = model.network.run(tokens.inputs)
        return Reference(tokens, outputs, contract, "logits")
    if isinstance(model.network, GgufFile):
        return Reference(Split({"input_ids": np.zeros((1, 1), np.int64)}), {}, contract)
    if model.data is None:
        raise UsageError(f"{model.name} has no data to compare files on", "give --data file.py:function or data.npz")
    samples, size = whole_batches(model, model.data.calibration.head(PARITY_SAMPLES))
    outputs = run_batched(model.network, samples, size)
    _refuse_unreadable(contract, outputs)
    scores = contract.postprocess.output if contract.postprocess else None
    return Reference(samples, outputs, contract, scores, labels_of(model, scores))


def _any_batch(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """Promise any batch: a file that takes one size only says so in its variant, and the session cuts to it."""
    return tuple(msgspec.structs.replace(s, shape=(DYNAMIC, *s.shape[1:])) if s.shape else s for s in specs)


def _postprocess(model: Model) -> Classification | None:
    if model.task != "classification":
        return None
    return Classification(output=model.outputs[0].name, labels=model.data.labels if model.data else ())


def _text(model: Model) -> TextPreprocess | None:
    if model.data is None or model.data.text is None:
        return None
    names = {spec.name for spec in model.inputs}
    mask, types = (name if name in names else "" for name in ("attention_mask", "token_type_ids"))
    how = TextPreprocess(tokenizer=TOKENIZER, tokens=model.data.text.tokens, mask=mask, types=types)
    fit = all(spec.dtype in ("int64", "int32") and spec.shape[1:] == (how.tokens,) for spec in model.inputs)
    return how if fit and names == set(how.inputs) else None  # llama.cpp, for one, reads texts by itself


def _refuse_unreadable(contract: Contract, outputs: Mapping[str, Array]) -> None:
    """Read objects and vectors as a device will, from what the model itself gives."""
    from edgekit.runtime import detection, vectors

    try:
        if contract.detection:
            detection.refuse_misread(outputs, contract.detection)
        if contract.embedding:
            vectors.pooled(outputs[contract.embedding.output], None, contract.embedding)
    except HealthError as error:
        raise UsageError(error.message, error.hint) from error


def _tokens(network: LlamaFolder) -> Split:
    """Return token sequences that any vocabulary has, spread over it without chance, with room for one token more."""
    with extra("export"):
        import numpy as np
    path = network.path / "config.json"
    try:
        config = msgspec.json.decode(path.read_bytes())
        size, context = int(config["vocab_size"]), int(config.get("max_position_embeddings") or TEXT_LENGTH + 1)
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} does not say vocab_size: {error}", "give a Hugging Face folder of a Llama") from error
    length = max(1, min(TEXT_LENGTH, context - 1))
    return Split({"input_ids": ((np.arange(TEXT_SAMPLES * length) * 7919 + 3) % size).reshape(TEXT_SAMPLES, -1)})


def golden_of(reference: Reference, variants: Sequence[Variant], folder: Path) -> tuple[Golden, dict[str, bytes]]:
    """Return the bundle's golden part and its files; language models get prompts that every variant answers alike."""
    if reference.contract.task == "text-generation":
        return Golden(prompts=_prompts(reference.contract, variants, folder)), {}
    count = golden_count(reference)
    samples = reference.inputs.head(count).inputs
    golden = Golden(inputs=_paths("golden/inputs", samples), outputs=_paths("golden/outputs", reference.outputs))
    files = {path: _npy(samples[name]) for name, path in golden.inputs.items()}
    files |= {path: _npy(reference.outputs[name][:count]) for name, path in golden.outputs.items()}
    return golden, files


def _paths(folder: str, names: Iterable[str]) -> dict[str, str]:
    """Name a file after each tensor; a tensor's name that is no file name, as ``input/0:1``, gets its number."""
    return {
        name: f"{folder}/{name if re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}', name) else f'tensor {number}'}.npy"
        for number, name in enumerate(names)
    }


def golden_count(reference: Reference) -> int:
    """Return how many samples become golden: eight, fewer where they are large, at least one."""
    total = sum(array.nbytes for array in (*reference.inputs.inputs.values(), *reference.outputs.values()))
    return max(1, min(GOLDEN_SAMPLES, GOLDEN_BYTES * len(reference.inputs) // max(1, total)))


def expected_of(variant: Variant, outputs: Mapping[str, Array], folder: Path, count: int) -> Expected:
    """Write what the file answered to the ``count`` golden inputs, for devices to compare with; return where it lies.

    Integer kernels agree across machines but for the last bit of a rounding; the limit leaves room for a few of those
    and none for saturation, which costs more than 20 dB.
    """
    paths = _paths(f"golden/expected/{variant.name}", outputs)
    (folder / "golden" / "expected" / variant.name).mkdir(parents=True)
    for name, path in paths.items():
        (folder / path).write_bytes(_npy(outputs[name][:count]))
    sqnr = 25.0 if variant.precision.startswith(("int", "w", "mixed")) else 40.0
    return Expected(outputs=paths, min_sqnr_db=sqnr, min_top1_agreement=0.85)


def _npy(array: Array) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _prompts(contract: Contract, variants: Sequence[Variant], folder: Path) -> tuple[tuple[str, str], ...]:
    answers = [_answers(contract, variant, folder) for variant in variants]
    return tuple((p, a) for p, a in answers[0].items() if a and all(other.get(p) == a for other in answers))


def _answers(contract: Contract, variant: Variant, folder: Path) -> dict[str, str]:
    """Continue the prompts greedily in the real engine; empty where it is not installed."""
    if variant.format not in plugins.names(backends.__name__):
        return {}
    sampling = Sampling(max_tokens=PROMPT_TOKENS, temperature=0.0)
    try:
        with silence():  # llama.cpp tells of every step
            session = open_variant(folder, variant, contract, EngineOptions(threads=1, context=256))
            if not isinstance(session, TextSession) or session.embeds:
                return {}
            with session:
                return {p: "".join(piece.text for piece in session.complete(p, sampling)) for p in PROMPTS}
    except MissingExtra:
        return {}
