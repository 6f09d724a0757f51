"""How far a position turns a head: rope scaling in config.json, in a GGUF file's keys and tensors, and back.

What llama.cpp computes in another way than transformers is refused. Knows no families: those say what they take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgekit.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from edgekit.tensors import Array

TENSORS = DIVISORS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
"""The tensors that GGUF has for it: one number for each pair of entries of a head."""
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""What llama.cpp takes from no key of these families (measured: it scores as if they had not been there)."""
KNOWN = frozenset({
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "attention_factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "mscale",
    "mscale_all_dim", "finetuned", *YARN,
})  # fmt: skip
"""What transformers knows, and leaves alone where another kind is meant."""
PHI3_CONTEXT = 4096
"""The context before scaling where a Phi-3 does not say."""


_CONVERTER = "use llama.cpp's own converter"


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What becomes of the frequencies; ``kind`` in GGUF's words: ``none``, ``linear``, ``yarn`` or ``longrope``.

    ``original``: the context before scaling, in tokens. ``attention``: what sines and cosines are multiplied by.
    ``divisors``: what each frequency is divided by, ``long``: the same where there are more tokens than ``original``.
    """

    kind: str = "none"
    factor: float = 1.0
    original: int = 0
    attention: float = 1.0
    divisors: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


def of_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what config.json says of rotation, under the name of transformers 4 or 5; for all tokens, not windows."""
    found: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    whole: Mapping[str, Any] = found.get("full_attention") or found
    return whole


def kind_of(rope: Mapping[str, Any]) -> str:
    """Name the scaling in transformers' words; Phi-3's older files call longrope ``su`` or ``yarn``."""
    if "short_factor" in rope:
        return "longrope"
    return str(rope.get("rope_type") or rope.get("type") or "default")


def read(config: Mapping[str, Any], takes: AbstractSet[str], rotated: int, theta: float) -> Scaling:
    """Read the scaling of ``rotated`` entries of a head with the base ``theta``; ``takes``: what the family may have.

    ``dynamic`` scales beyond ``max_position_embeddings`` only, which stays the file's context.

    Raises:
        ExportError: another scaling, or one that llama.cpp computes otherwise.
        KeyError, TypeError, ValueError: a number is missing or is none.
    """
    rope = of_config(config)
    kind = kind_of(rope)
    if kind not in takes:
        known = ", ".join(sorted(takes - {"default"}))
        raise ExportError(f"llama.cpp's {config['architectures'][0]} has no rope scaling {kind!r}", f"it has {known}")
    if unknown := sorted({name for name, value in rope.items() if value is not None} - KNOWN):
        raise ExportError(f"rope scaling {kind!r} with {', '.join(unknown)} is not known", _CONVERTER)
    if kind in ("default", "dynamic"):
        return Scaling()
    if kind == "longrope":
        return _longrope(config, rope, rotated)
    factor = float(rope["factor"])
    if kind == "linear":
        return Scaling(kind="linear", factor=factor)
    if kind == "llama3":
        return Scaling(divisors=tuple(_llama3(rope, rotated, theta)))
    return _yarn(config, rope, factor)


def _longrope(config: Mapping[str, Any], rope: Mapping[str, Any], rotated: int) -> Scaling:
    original = int(
        config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or PHI3_CONTEXT
    )
    factor = int(config["max_position_embeddings"]) / original
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (tuple(float(one) for one in rope[name]) for name in ("short_factor", "long_factor"))
    if {len(short), len(long)} != {rotated // 2}:
        raise ValueError(f"{len(short)} and {len(long)} factors of {rotated // 2} frequencies")
    return Scaling(
        kind="longrope",
        original=original,
        attention=float(rope.get("attention_factor") or usual),
        divisors=short,
        long=long,
    )


def _llama3(rope: Mapping[str, Any], rotated: int, theta: float) -> Iterator[float]:
    """Divide slow frequencies by the factor, leave fast ones, and go from one to the other between."""
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    for number in range(0, rotated, 2):
        turns = original * theta ** (-number / rotated) / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        yield 1 / ((1 - share) / factor + share)


def _yarn(config: Mapping[str, Any], rope: Mapping[str, Any], factor: float) -> Scaling:
    usual = _yarn_attention(factor)
    given = rope.get("attention_factor")
    if given is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        given = _yarn_attention(factor, rope["mscale"]) / _yarn_attention(factor, rope["mscale_all_dim"])
    for name, constant in YARN.items():
        if rope.get(name, constant) not in (constant, None):
            raise ExportError(f"llama.cpp's yarn has {name} {constant!r} in every file, this model has {rope[name]!r}")
    return Scaling(
        kind="yarn",
        factor=factor,
        original=int(rope.get("original_max_position_embeddings") or config["max_position_embeddings"]),
        attention=float(given or usual),
    )


def _yarn_attention(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def add(writer: Any, scaling: Scaling) -> None:  # noqa: ANN401  # gguf's writer is untyped here
    """Add the keys by which llama.cpp scales."""
    import gguf

    if scaling.kind == "none":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.original:
        writer.add_rope_scaling_orig_ctx_len(scaling.original)
    if scaling.kind == "longrope":
        writer.add_rope_scaling_attn_factors(scaling.attention)
    if scaling.kind == "yarn":
        # llama.cpp multiplies by what is usual itself
        writer.add_rope_scaling_attn_factors(scaling.attention / _yarn_attention(scaling.factor))


def tensors(scaling: Scaling) -> Iterator[tuple[str, Array]]:
    """Yield the tensors that belong to it, in float32."""
    import numpy as np

    if scaling.divisors:
        yield (SHORT if scaling.long else DIVISORS), np.array(scaling.divisors, np.float32)
    if scaling.long:
        yield LONG, np.array(scaling.long, np.float32)


def stored(value: Callable[[str, Any], Any], tensor: Callable[[str], tuple[float, ...]]) -> Scaling:
    """Read a file: ``value`` gives a key's value or what stands for it, ``tensor`` a tensor's numbers, or none."""
    kind, factor = value("rope.scaling.type", "none"), value("rope.scaling.factor", 1.0)
    usual = _yarn_attention(factor) if kind == "yarn" else 1.0
    return Scaling(
        kind=kind,
        factor=factor,
        original=value("rope.scaling.original_context_length", 0),
        attention=value("rope.scaling.attn_factor", 1.0) * usual,
        divisors=tensor(SHORT) or tensor(DIVISORS),
        long=tensor(LONG),
    )


def configuration(scaling: Scaling) -> dict[str, Any]:
    """Return what transformers' configuration takes for it."""
    if scaling.kind == "none":
        return {}
    if scaling.kind == "longrope":  # Phi-3's configuration takes these three and no more
        rope: dict[str, Any] = {"short_factor": list(scaling.divisors), "long_factor": list(scaling.long)}
        return {
            "rope_scaling": {"type": "longrope", **rope},
            "original_max_position_embeddings": scaling.original,
        }
    rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn":
        rope |= {
            "original_max_position_embeddings": scaling.original,
            "attention_factor": scaling.attention,
        }
    return {"rope_scaling": rope}


def apply(rotary: Any, scaling: Scaling) -> None:  # noqa: ANN401  # a module of transformers, untyped here
    """Give transformers' module of rotation what its configuration does not hold."""
    import torch

    if scaling.kind == "longrope":
        rotary.attention_scaling = scaling.attention
    elif scaling.divisors:
        rotary.inv_freq = rotary.original_inv_freq = rotary.inv_freq / torch.tensor(scaling.divisors)
