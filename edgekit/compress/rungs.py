"""The rungs of the ladder: what each tries, what it can mend, and the recipes it makes of the best one so far.

A rung is offered where its passes are installed and the model's data allow it. Runs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from edgekit import device_profiles, grid, plugins
from edgekit.compress.evaluate import stored_bytes
from edgekit.compress.layers import layers
from edgekit.compress.observers import Observer
from edgekit.compress.passes.fold import fold
from edgekit.compress.recipe import PASSES, Recipe
from edgekit.compress.saturation import may_saturate
from edgekit.errors import UnknownName
from edgekit.model import OnnxNetwork
from edgekit.plan import WeightRule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from edgekit.compress.blame import Cause
    from edgekit.compress.budget import Budget, Kind, Reached
    from edgekit.compress.passes import CompressionPass
    from edgekit.model import Model

ORDER = (
    "distill",
    "prune",
    "fold",
    "equalize",
    "smooth",
    "quantize",
    "mixed_precision",
    "bias_correction",
    "gptq",
    "adaround",
    "qat",
)
"""Where a pass stands in a recipe: what re-scales floats before the plan, what compensates for the plan behind it."""

MIXED_GROWTHS = (1.1, 1.3)
"""How much larger the weights may become so that the most sensitive layers get more bits."""

MARGINS = (0.95, 0.8, 0.65)
"""How far below a budget pruning aims, until it fits."""
QAT_SCHEDULES = ((3, 2e-4), (10, 1e-3))
"""Epochs and learning rates: little first."""


@dataclass(frozen=True)
class Settings:
    """A recipe in the making: options by the name of the pass."""

    passes: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()

    def put(self, name: str, **options: Any) -> Settings:  # noqa: ANN401  # what a recipe can spell
        """Add a pass at its place, or change options of the one that is there."""
        found = dict(self.passes)
        found[name] = tuple({**dict(found.get(name, ())), **options}.items())
        return Settings(tuple(sorted(found.items(), key=lambda entry: ORDER.index(entry[0]))))

    def without(self, *names: str) -> Settings:
        """Leave passes out."""
        return Settings(tuple(entry for entry in self.passes if entry[0] not in names))

    def option(self, name: str, key: str) -> Any:  # noqa: ANN401  # the same
        """Return an option that was put, None where none was."""
        return dict(dict(self.passes).get(name, ())).get(key)

    def recipe(self) -> Recipe:
        """Return the recipe."""
        return Recipe(tuple((name, msgspec.convert(dict(options), _kind(name))) for name, options in self.passes))


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What decides which rungs there are: the model, the budgets, the target, the bits to begin with.

    ``planned`` are the bytes of the weights at those bits, ``others`` of what stays float; ``reached`` is what the
    candidate reached that is built on.
    """

    model: Model
    budget: Budget
    target: str
    bits: int = 8
    planned: int = 0
    others: int = 0
    reached: Reached | None = None


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One step of the ladder. ``grow`` makes of the best settings so far those to try, one after the other.

    ``mends`` are the budgets that it may help to keep, ``cures`` the causes of `blame` that it is made for.
    """

    name: str
    does: str
    passes: tuple[str, ...]
    grow: Callable[[Settings, Situation], Iterable[Settings]]
    mends: frozenset[Kind] = frozenset({"drop"})
    cures: frozenset[Cause] = frozenset()
    trains: bool = False
    takes_onnx: bool = True

    def is_offered(self, situation: Situation) -> bool:
        """Say whether the passes are there, the model's data suffice, and a budget is asked for that it mends."""
        data, budget = situation.model.data, situation.budget
        asked = {"drop", *(["size"] if budget.size else []), *(["latency"] if budget.latency else [])}
        asked |= {"saturation"} if may_saturate(device_profiles.load(situation.target)) else set()
        return (
            bool(self.mends & asked)
            and set(self.passes) <= set(plugins.names(PASSES))
            and not (self.trains and (data is None or data.train is None))
            and (self.takes_onnx or not isinstance(situation.model.network, OnnxNetwork))
        )


def situation(model: Model, budget: Budget, target: str) -> Situation:
    """Return where to begin: with 8 bits, with 4 where the weights of 8 bits do not fit the budget of bytes.

    Raises:
        CompressionError: no network to look into.
    """
    folded, _ = fold(model)
    found = layers(folded)
    others = stored_bytes(folded) - 4 * sum(layer.values.size for layer in found)
    planned = {
        bits: sum(grid.stored_bytes(layer.values.shape, WeightRule(bits=bits)) for layer in found) for bits in (8, 4)
    }
    bits = 8 if budget.size is None or planned[8] + others <= budget.size else 4
    return Situation(model=model, budget=budget, target=target, bits=bits, planned=planned[bits], others=others)


def offered(situation: Situation) -> tuple[Rung, ...]:
    """Return the rungs for this model, the cheapest first."""
    return tuple(rung for rung in RUNGS if rung.is_offered(situation))


def _kind(name: str) -> type[CompressionPass]:
    found = plugins.load(PASSES, name, "pass")
    if not isinstance(found, type):
        raise UnknownName("pass", name, plugins.names(PASSES))
    return found


def _options(name: str) -> tuple[str, ...]:
    return _kind(name).__struct_fields__


def _int8(_best: Settings, situation: Situation) -> Iterable[Settings]:
    yield Settings().put("quantize", bits=situation.bits, observer="minmax")


def _seven_bits(best: Settings, situation: Situation) -> Iterable[Settings]:
    yield best.put("quantize", target=situation.target)
    yield best.put("quantize", bits=7)  # where other data than those of calibration saturate


def _observers(best: Settings, _situation: Situation) -> Iterable[Settings]:
    for observer in get_args(Observer):
        if observer != best.option("quantize", "observer"):
            yield best.put("quantize", observer=observer)


def _weight_scales(best: Settings, _situation: Situation) -> Iterable[Settings]:
    yield best.put("quantize", weights="mse")


def _equalize(best: Settings, _situation: Situation) -> Iterable[Settings]:
    yield best.put("equalize")
    if best.option("quantize", "observer") != "minmax":  # what equal channels no longer need
        yield best.put("equalize").put("quantize", observer="minmax")


def _bias_correction(best: Settings, _situation: Situation) -> Iterable[Settings]:
    yield best.put("bias_correction")


def _adaround(best: Settings, _situation: Situation) -> Iterable[Settings]:
    yield best.without("bias_correction", "gptq").put("adaround")


def _gptq(best: Settings, _situation: Situation) -> Iterable[Settings]:
    yield best.without("bias_correction").put("gptq")


def _mixed_precision(best: Settings, situation: Situation) -> Iterable[Settings]:
    room = math.inf if situation.budget.size is None else situation.budget.size - situation.others
    wider = 8 if situation.bits < 8 else 32
    for growth in MIXED_GROWTHS:
        size = int(min(room, growth * situation.planned))
        if size > situation.planned:
            yield best.put("mixed_precision", widths=(wider, situation.bits), size=size)


def _prune(best: Settings, situation: Situation) -> Iterable[Settings]:
    """Cut as much as the budgets ask for, then more: channels are whole numbers, and some have to stay.

    A layer that loses a share of its channels loses it on both sides, so bytes fall with the square.
    """
    reached, budget = situation.reached, situation.budget
    if reached is None:
        yield best.put("prune")
        return
    for margin in MARGINS:
        if reached.latency and budget.latency and reached.latency > budget.latency:
            yield best.put("prune", latency=round(margin * budget.latency / reached.latency, 4))
        elif budget.size and reached.bytes > budget.size:
            yield best.put("prune", ratio=round(1 - math.sqrt(margin * budget.size / reached.bytes), 4))


def _qat(best: Settings, _situation: Situation) -> Iterable[Settings]:
    for epochs, lr in QAT_SCHEDULES:
        yield best.put("qat", epochs=epochs, lr=lr)


RUNGS = (
    Rung(
        name="fold",
        does="fold batch normalization, quantize with the extremes of the calibration data",
        passes=("quantize",),
        grow=_int8,
        mends=frozenset({"drop", "size", "latency"}),
    ),
    Rung(
        name="seven-bits",
        does="7 bits for layers whose sums leave 16 bits on the target, else for all",
        passes=("quantize",),
        grow=_seven_bits,
        mends=frozenset({"saturation"}),
        cures=frozenset({"saturation"}),
    ),
    Rung(
        name="prune",
        does="remove channels until size and latency fit, and train what is left",
        passes=("prune",),
        grow=_prune,
        mends=frozenset({"size", "latency"}),
        trains=True,
        takes_onnx=False,
    ),
    Rung(
        name="observers",
        does="other ranges for activations",
        passes=("quantize",),
        grow=_observers,
        cures=frozenset({"input outlier", "input"}),
    ),
    Rung(
        name="weight-scales",
        does="scales of weights by the least squared error",
        passes=("quantize",),
        grow=_weight_scales,
        cures=frozenset({"weights", "weight channels"}),
    ),
    Rung(
        name="equalize",
        does="even out the channels between layers",
        passes=("equalize",),
        grow=_equalize,
        cures=frozenset({"input channels"}),
    ),
    Rung(
        name="bias-correction",
        does="take back the shift that rounding gives each channel",
        passes=("bias_correction",),
        grow=_bias_correction,
    ),
    Rung(
        name="gptq",
        does="round weights one by one, each making up for those before it",
        passes=("gptq",),
        grow=_gptq,
        cures=frozenset({"weights"}),
    ),
    Rung(name="adaround", does="learn which weights to round up or down", passes=("adaround",), grow=_adaround),
    Rung(
        name="mixed-precision",
        does="more bits for the layers that need them, chosen by an integer program",
        passes=("mixed_precision",),
        grow=_mixed_precision,
    ),
    Rung(
        name="qat",
        does="train with weights and activations rounded, taught by the float network",
        passes=("qat",),
        grow=_qat,
        trains=True,
        takes_onnx=False,
    ),
)
"""In the order in which they are tried: what costs least stands first."""
