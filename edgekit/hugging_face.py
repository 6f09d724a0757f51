"""Reads a Hugging Face folder as a plain PyTorch network, and writes a changed network back as such a folder.

Knows no data but the length of its token windows, and nothing of passes.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from edgekit import token_numbers
from edgekit.errors import CompressionError, UsageError
from edgekit.manifest import Embedding
from edgekit.model import TextReading, TorchNetwork
from edgekit.network_files import broken_file_errors
from edgekit.plugins import extra
from edgekit.sources import first_line

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from edgekit.model import Model, Split

Kind = TypeVar("Kind")
CAUSAL = "AutoModelForCausalLM"
HEADS = {
    "ForCausalLM": (CAUSAL, "logits"),
    "LMHeadModel": (CAUSAL, "logits"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "logits"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "logits"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "logits"),
    "ForImageClassification": ("AutoModelForImageClassification", "logits"),
    "Model": ("AutoModel", "last_hidden_state"),
}
"""By the end of an architecture's name: what of transformers opens it, and which of its outputs is ours."""

POOLINGS: dict[str, Literal["mean", "max", "cls", "last"]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
"""Sentence Transformers' names of what makes one vector of many."""
SINGLE = "single_label_classification"
INNER = "inner"
PICTURES = 4
"""Axes of a batch of pictures, [N, C, H, W]."""
FAR = -1e4
"""Added to the score of a token that must not be seen: exp of it is 0, and half precision still holds it."""

CARRIED = ("*.json", "*.txt", "*.jinja", "tokenizer.model", "tok*.bin")
"""What goes with the weights into a new folder."""


def is_folder(folder: Path) -> bool:
    """Say whether a folder describes a network of transformers."""
    return (folder / "config.json").is_file()


def speaks(folder: Path) -> bool:
    """Say whether the folder's network continues text, as far as its config tells: GGUF is written from some such."""
    return (_architecture(folder) or CAUSAL).endswith("ForCausalLM")


def is_causal(folder: Path) -> bool:
    """Say whether the folder's network scores the next word for each token: masked ones and tags are named logits too.

    Raises:
        UsageError: a damaged folder, or an architecture that is not known.
    """
    return _head(folder)[0] == CAUSAL


def labels(folder: Path) -> tuple[str, ...]:
    """Return the names of the classes that the folder's network chooses one of for a sample; none where it does not."""
    config = _config(folder)
    named = config.get("id2label")
    chooses = _architecture(folder).endswith(("ForSequenceClassification", "ForImageClassification"))
    if not chooses or not isinstance(named, dict) or (config.get("problem_type") or SINGLE) != SINGLE:
        return ()
    found = tuple(str(named.get(str(number))) for number in range(len(named)))
    return () if len(found) < 2 or found == tuple(f"LABEL_{number}" for number in range(len(found))) else found


def reading(folder: Path, samples: Split) -> TextReading | None:
    """Return how texts become windows of the samples' length.

    None for pictures, for networks that continue text, and where there is no tokenizer that can be read: the samples
    were made without it.
    """
    windows = samples.inputs.get("input_ids")
    if windows is None or windows.ndim != 2 or is_causal(folder) or not token_numbers.is_there(folder):
        return None
    try:
        written = token_numbers.read(folder).written(int(windows.shape[1]))
    except UsageError:
        return None
    return TextReading(written, int(windows.shape[1])) if written else None


def embedding(folder: Path) -> Embedding | None:
    """Return how a folder of Sentence Transformers makes a vector of a text; None for other folders.

    Raises:
        UsageError: it adds layers of its own, or pools in a way that is not known.
    """
    path = folder / "modules.json"
    if not path.is_file() or _head(folder)[1] != HEADS["Model"][1]:
        return None
    modules = [(str(one.get("type", "")).rpartition(".")[2], str(one.get("path", ""))) for one in _listed(path)]
    kinds = [kind for kind, _ in modules]
    if kinds[:1] != ["Transformer"] or not set(kinds[1:]) <= {"Pooling", "Normalize"}:
        raise UsageError(
            f"{path} describes {', '.join(kinds)}; a transformer, its pooling and a normalization are read",
            "wrap the whole of it in a Python workload: file.py:build",
        )
    pooling = next((where for kind, where in modules if kind == "Pooling"), None)
    if pooling is None:
        return None
    stated = _decoded(folder / pooling / "config.json", dict[str, Any])
    found = [name for key, name in POOLINGS.items() if stated.get(key)]
    if len(found) != 1:
        raise UsageError(
            f"{folder / pooling} pools by {' and '.join(found) or 'something else'}",
            f"one is read of {', '.join(POOLINGS.values())}",
        )
    return Embedding(output=HEADS["Model"][1], pooling=found[0], normalize="Normalize" in kinds)


def network(folder: Path, samples: Split) -> TorchNetwork:
    """Open the folder's network in float32 for token windows of the samples' length, or for pictures.

    Its inputs are the samples' (``input_ids``, ``attention_mask`` … as int64; pictures by any name), its output
    ``logits`` or ``last_hidden_state``. Attention is computed step by step and without cache, so that it can be traced;
    masks and rotations are constants of the length.

    Raises:
        UsageError: a damaged folder, an architecture that is not known, or samples without ``input_ids``.
    """
    pictures = [name for name, array in samples.inputs.items() if array.ndim == PICTURES]
    if len(pictures) == len(samples.inputs) == 1:
        opener, output = _head(folder)
        return TorchNetwork(_of_pictures(_opened(folder, opener), output).eval(), tuple(pictures), (output,), folder)
    opener, output = _head(folder)
    tokens = refuse_windows(folder, samples)
    inner = _opened(folder, opener)
    module = _wrapped(inner, tuple(samples.inputs), output, tokens if opener == CAUSAL else 0)
    return TorchNetwork(module.eval(), tuple(samples.inputs), (output,), folder)


def refuse_windows(folder: Path, samples: Split) -> int:
    """Return the length of the samples' windows of tokens, which the folder's network has to take.

    Raises:
        UsageError: a damaged folder, samples without ``input_ids``, or longer windows than the network takes.
    """
    if "input_ids" not in samples.inputs or samples.inputs["input_ids"].ndim != 2:
        raise UsageError(
            f"{folder.name} takes input_ids [samples, tokens], the data has {', '.join(samples.inputs)}",
            'give a data.toml of kind = "text" or "tsv", or arrays of that name',
        )
    with extra("compress"):
        from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)  # knows defaults, and what GPT-2 calls it
    except broken_file_errors() as error:
        raise UsageError(f"{folder} cannot be opened: {first_line(error)}", "fetch the folder again") from error
    tokens = int(samples.inputs["input_ids"].shape[1])
    most = getattr(config, "max_position_embeddings", tokens)
    if tokens > most:
        raise UsageError(f"the data has windows of {tokens} tokens, {folder.name} takes {most}", "state fewer tokens")
    return tokens


def write(model: Model, folder: Path) -> None:
    """Write the model's weights as a Hugging Face folder, with the configuration and tokenizer that it came with.

    Raises:
        CompressionError: it came from no such folder, or its tensors have other shapes than the configuration says.
    """
    with extra("compress"):
        from safetensors.torch import save_file
    source = model.network.folder if isinstance(model.network, TorchNetwork) else None
    if not isinstance(model.network, TorchNetwork) or source is None:
        raise CompressionError(f"{model.name} came from no Hugging Face folder", "load it from one, with data")
    ours = {n.removeprefix(f"{INNER}."): t for n, t in model.network.module.state_dict().items()}
    state = {}
    for name, wanted in _described(source).items():
        changed = ours.get(name)
        if changed is None or changed.shape != wanted:
            raise CompressionError(
                f"{name} is {None if changed is None else list(changed.shape)} now, the configuration of "
                f"{source.name} says {list(wanted)}",
                "a folder of transformers holds no pruned layers: export to ONNX instead",
            )
        state[name] = changed.detach().contiguous().clone()
    folder.mkdir(parents=True, exist_ok=True)
    carry(source, folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def carry(source: Path, folder: Path) -> None:
    """Copy all that a folder holds beside weights; llama2.c's tokenizer may lie beside the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in CARRIED:
        for path in source.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
    if not list(source.glob("tok*.*")):
        for path in source.resolve().parent.glob("tok*.bin"):
            shutil.copyfile(path, folder / path.name)


def _described(folder: Path) -> dict[str, torch.Size]:
    """Return the shape of each tensor that a configuration describes, tied ones once."""
    import torch
    import transformers

    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        inner = getattr(transformers, _head(folder)[0]).from_config(config)
    own = {name for name, _ in (*inner.named_parameters(), *inner.named_buffers())}  # tied ones by their first name
    return {name: tensor.shape for name, tensor in inner.state_dict().items() if name in own}


def _architecture(folder: Path) -> str:
    named = _config(folder).get("architectures") or [""]
    return str(named[0])


def _config(folder: Path) -> dict[str, Any]:
    return _decoded(folder / "config.json", dict[str, Any])


def _listed(path: Path) -> list[dict[str, Any]]:
    return _decoded(path, list[dict[str, Any]])


def _decoded(path: Path, kind: type[Kind]) -> Kind:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is damaged: {error}", "fetch the folder again") from error


def _head(folder: Path) -> tuple[str, str]:
    name = _architecture(folder)
    for end, found in HEADS.items():
        if name.endswith(end):
            return found
    raise UsageError(
        f"{folder.name} is a {name or 'network without architectures in its config.json'}, which is not read",
        f"known are …{', …'.join(HEADS)}; or wrap it in a Python workload: file.py:build",
    )


def _opened(folder: Path, opener: str) -> Any:  # noqa: ANN401  # transformers is untyped here
    with extra("compress"):
        import torch
        import transformers
    if not list(folder.glob("*.safetensors")):
        raise UsageError(f"{folder} has no .safetensors file", "pickled weights are not read: convert them first")
    how = {"local_files_only": True, "use_safetensors": True, "attn_implementation": "eager"}
    try:
        inner = getattr(transformers, opener).from_pretrained(folder, dtype=torch.float32, **how)
    except broken_file_errors() as error:
        raise UsageError(f"{folder} cannot be opened: {first_line(error)}", "fetch the folder again") from error
    inner.config.use_cache = False
    return inner.eval()


def _wrapped(inner: Any, names: tuple[str, ...], output: str, causal: int) -> torch.nn.Module:  # noqa: ANN401  # the same
    """Make a module of tensors in, tensor out; ``causal`` is the length of its windows, 0 for an encoder."""
    import torch

    if causal:
        _fix_rotations(inner, causal)
    else:
        _soften_masks(inner)
    window = getattr(inner.config, "sliding_window", None)
    masks = bool(causal) and not (window and window < causal)  # transformers makes its own for sliding windows

    class HuggingFace(torch.nn.Module):
        unseen: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner = inner
            if masks:
                above = torch.full((causal, causal), FAR).triu(1)[None, None]
                self.register_buffer("unseen", above, persistent=False)

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            given = dict(zip(names, tensors, strict=True))
            if masks:
                unseen = self.unseen
                if "attention_mask" in given:
                    padding = (1 - given["attention_mask"].to(unseen.dtype)) * FAR
                    unseen = torch.clamp(unseen + padding[:, None, None, :], min=FAR)
                given["attention_mask"] = unseen
            found: torch.Tensor = self.inner(**given, return_dict=True)[output]
            return found

    return HuggingFace()


def _of_pictures(inner: Any, output: str) -> torch.nn.Module:  # noqa: ANN401  # the same
    import torch

    class Pictures(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.inner(pixel_values=image, return_dict=True)[output]
            return found

    return Pictures()


def _fix_rotations(inner: torch.nn.Module, tokens: int) -> None:
    """Put the sines and cosines of every position in the place of what computes them again for every batch."""
    import torch

    class Rotation(torch.nn.Module):
        cos: torch.Tensor
        sin: torch.Tensor

        def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            del x, position_ids
            return self.cos, self.sin

    for name, module in list(inner.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding") and hasattr(module, "inv_freq"):
            cos, sin = module(torch.zeros(1, tokens, 1), torch.arange(tokens)[None])
            parent, _, own = name.rpartition(".")
            setattr(inner.get_submodule(parent), own, Rotation(cos, sin))


def _soften_masks(inner: torch.nn.Module) -> None:
    """Let encoders add `FAR` instead of the lowest float, which no integer range and no half could hold."""

    def extended(mask: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return (1.0 - mask[:, None, None, :].to(dtype=_float())) * FAR

    for module in inner.modules():
        if hasattr(module, "get_extended_attention_mask"):
            module.get_extended_attention_mask = extended  # type: ignore[assignment]  # transformers calls it on itself


def _float() -> torch.dtype:
    import torch

    return torch.float32
