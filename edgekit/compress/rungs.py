"""The rungs of the ladder: what each tries, what it can mend, and the recipes it makes of the best one so far.

A rung is offered where its passes are installed and the model's data allow it. Runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from edgekit import plugins
from edgekit.compress.evaluate import stored_bytes
from edgekit.compress.layers import layers
from edgekit.compress.observers import Observer
from edgekit.compress.passes.fold import fold
from edgekit.compress.recipe import PASSES, Recipe
from edgekit.errors import UnknownName
from edgekit.model import OnnxNetwork
from edgekit.plan import QuantizationPlan, WeightRule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from edgekit.compress.budget import Budget, Kind
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
    "adaround",
    "qat",
    "bias_correction",
)
"""Where a pass stands in a recipe: what re-scales floats before the plan, what compensates for the plan behind it."""


@dataclass(frozen=True)
class Settings:
    """A recipe in the making: options by the name of the pass."""

    passes: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()

    def put(self, name: str, **options: Any) -> Settings:  # noqa: ANN401  # what a recipe can spell
        """Add a pass at its place, or change options of the one that is there."""
        found = dict(self.passes)
        found[name] = tuple({**dict(found.get(name, ())), **options}.items())
        return Settings(tuple(sorted(found.items(), key=lambda entry: ORDER.index(entry[0]))))

    def option(self, name: str, key: str) -> Any:  # noqa: ANN401  # the same
        """Return an option that was put, None where none was."""
        return dict(dict(self.passes).get(name, ())).get(key)

    def recipe(self) -> Recipe:
        """Return the recipe."""
        return Recipe(tuple((name, msgspec.convert(dict(options), _kind(name))) for name, options in self.passes))


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What decides which rungs there are: the model, the budgets, the target, the bits to begin with."""

    model: Model
    budget: Budget
    target: str
    bits: int = 8


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One step of the ladder. ``grow`` makes of the best settings so far those to try, one after the other."""

    name: str
    does: str
    passes: tuple[str, ...]
    grow: Callable[[Settings, Situation], Iterable[Settings]]
    mends: frozenset[Kind] = frozenset({"drop"})
    trains: bool = False
    takes_onnx: bool = True

    def is_offered(self, situation: Situation) -> bool:
        """Say whether the passes are there and the model's data suffice."""
        data = situation.model.data
        return (
            set(self.passes) <= set(plugins.names(PASSES))
            and not (self.trains and (data is None or data.train is None))
            and (self.takes_onnx or not isinstance(situation.model.network, OnnxNetwork))
        )


def situation(model: Model, budget: Budget, target: str) -> Situation:
    """Return where to begin: with 8 bits, with 4 where the weights of 8 bits do not fit the budget of bytes.

    Raises:
        CompressionError: no network to look into.
    """
    fits = budget.size is None or size_at(model, 8) <= budget.size
    return Situation(model=model, budget=budget, target=target, bits=8 if fits else 4)


def size_at(model: Model, bits: int) -> int:
    """Return the bytes of the folded model with weights of so many bits, one scale a channel."""
    folded, _ = fold(model)
    rules = {layer.weight: WeightRule(bits=bits, axis=layer.axis) for layer in layers(folded)}
    return stored_bytes(replace(folded, plan=QuantizationPlan(bits, "none", rules, {})))


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


def _observers(best: Settings, _situation: Situation) -> Iterable[Settings]:
    for observer in reversed(get_args(Observer)):
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
    yield best.put("adaround")


RUNGS = (
    Rung(
        name="fold",
        does="fold batch normalization, quantize with the extremes of the calibration data",
        passes=("quantize",),
        grow=_int8,
        mends=frozenset({"drop", "size", "latency"}),
    ),
    Rung(name="observers", does="other ranges for activations", passes=("quantize",), grow=_observers),
    Rung(
        name="weight-scales",
        does="scales of weights by the least squared error",
        passes=("quantize",),
        grow=_weight_scales,
    ),
    Rung(name="equalize", does="even out the channels between layers", passes=("equalize",), grow=_equalize),
    Rung(
        name="bias-correction",
        does="take back the shift that rounding gives each channel",
        passes=("bias_correction",),
        grow=_bias_correction,
    ),
    Rung(name="adaround", does="learn which weights to round up or down", passes=("adaround",), grow=_adaround),
)
"""In the order in which they are tried: what costs least stands first."""
