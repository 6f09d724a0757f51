"""The rungs of the ladder: what each tries, what it can mend, and the recipes it makes of the best one so far.

A rung is offered where its passes are installed and the model's data allow it. Runs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, get_args

import msgspec

from edgekit import device_profiles, grid, plugins
from edgekit.compress.evaluate import stored_bytes
from edgekit.compress.layers import layers
from edgekit.compress.losses import is_language_model
from edgekit.compress.observers import Observer
from edgekit.compress.passes.fold import fold
from edgekit.compress.recipe import PASSES, Recipe
from edgekit.compress.saturation import may_saturate
from edgekit.errors import UnknownName
from edgekit.model import OnnxNetwork
from edgekit.plan import WeightRule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from edgekit.compress.blame import Cause
    from edgekit.compress.budget import Budget, Kind, Reached
    from edgekit.compress.passes import CompressionPass
    from edgekit.model import Model

ORDER = (
    "prune",
    "distill",
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
"""Where a pass stands in a recipe: what re-scales floats before the plan, what compensates for the plan behind it.

A teacher teaches what was pruned, not what is going to be.
"""

MIXED_GROWTHS = (1.1, 1.3)
"""How much larger the weights may become so that the most sensitive layers get more bits."""

ANY_DAMAGE = 1e9
"""A budget of damage that nothing misses: the fewest bytes are asked for."""

MARGINS = (0.95, 0.8, 0.65)
"""How far below a budget pruning aims, until it fits."""
TIME_MARGINS = (1.0, 0.9, 0.8)
"""How far below a budget of milliseconds mixed precision aims: sums of layers tell nearly what the whole takes."""
QAT_SCHEDULES = ((3, 2e-4), (10, 1e-3))
"""Epochs and learning rates: little first."""
DISTILL_SCHEDULES = ((10, 1e-3), (20, 5e-3))
"""The same, of learning from a teacher."""


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


@dataclass(frozen=True)
class Times:
    """What each weight takes at each width, in the ``file`` that mixed_precision reads.

    ``slowest`` are the seconds on the target of one sample with every weight at its slowest width.
    """

    file: str
    slowest: float


class Timing(Protocol):
    """Measures how long layers take at several widths."""

    def __call__(self, candidates: Mapping[int, Settings]) -> Times | None:
        """Return the times of the candidates, given by their width, and of their floats; None where nobody can."""
        ...


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What decides which rungs there are: the model, the budgets, the target, the bits to begin with.

    ``planned`` are the bytes of the weights at those bits, ``others`` of what stays float; ``reached`` is what the
    candidate reached that is built on. ``teacher`` is a larger network and its checkpoint, as `workload.load` reads
    them; ``timing`` measures layers where milliseconds are budgeted.
    """

    model: Model
    budget: Budget
    target: str
    bits: int = 8
    planned: int = 0
    others: int = 0
    reached: Reached | None = None
    teacher: tuple[str, str] | None = None
    timing: Timing | None = None


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
    is_taught: bool = False
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
            and not (self.is_taught and situation.teacher is None)
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
    """Give some weights more bits, within the bytes, and within the milliseconds where those are budgeted.

    A candidate that is too slow gets floats where they are faster: if it loses too much besides, as many as bytes and
    milliseconds leave room for, else as few as the milliseconds allow.
    """
    bits, budget = situation.bits, situation.budget
    room = math.inf if budget.size is None else budget.size - situation.others
    widths: tuple[int, ...] = (32, 8) if bits == 8 else (8, bits)
    missed = situation.reached.misses(budget).keys() if situation.reached else frozenset()
    is_slow, times = "latency" in missed, None
    if budget.latency and situation.timing and missed & {"drop", "latency"}:
        widths = (32, 8) if bits == 8 else (32, 8, bits)
        times = situation.timing(_untouched(best, widths[1:]))
    if is_slow and times is None:
        return
    tries = [(32 / bits, margin) for margin in TIME_MARGINS] if is_slow else [(growth, 1.0) for growth in MIXED_GROWTHS]
    for growth, margin in tries:
        size = int(min(room, growth * situation.planned))
        options = _in_time(times, margin * (budget.latency or 0.0)) if times else {}
        if missed == {"latency"}:
            yield best.put("mixed_precision", widths=widths, damage=ANY_DAMAGE, **options)
        elif size > situation.planned:
            yield best.put("mixed_precision", widths=widths, size=size, **options)


def _untouched(best: Settings, widths: Sequence[int]) -> dict[int, Settings]:
    """Return by width the settings that give every weight that width, without what only chooses other integers."""
    plain = best.without(*ORDER[ORDER.index("mixed_precision") :])
    return {bits: plain.put("quantize", bits=bits) for bits in widths}


def _in_time(times: Times, seconds: float) -> dict[str, Any]:
    return {"time": min(1.0, max(1e-4, round(seconds / times.slowest, 4))), "times": times.file}


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


def _qat(best: Settings, situation: Situation) -> Iterable[Settings]:
    for epochs, lr in QAT_SCHEDULES:
        yield best.put("qat", epochs=epochs, lr=lr, **_share(situation.model))


def _distill(best: Settings, situation: Situation) -> Iterable[Settings]:
    """Let the teacher teach what the best settings make of the model before quantizing, then train it rounded."""
    source, checkpoint = situation.teacher or ("", "")
    share = _share(situation.model)
    taught = best
    for epochs, lr in DISTILL_SCHEDULES:
        taught = best.put("distill", teacher=source, teacher_checkpoint=checkpoint, epochs=epochs, lr=lr, **share)
        yield taught
    if best.option("qat", "epochs") is None and "qat" in plugins.names(PASSES):
        epochs, lr = QAT_SCHEDULES[0]
        yield taught.put("qat", epochs=epochs, lr=lr, **share)


def _share(model: Model) -> dict[str, float]:
    """Return whose share in what is learned is not the default: without labels, the teacher's is all of it."""
    train = model.data.train if model.data else None
    return {} if train is None or train.labels is not None or is_language_model(model) else {"alpha": 1.0}


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
        mends=frozenset({"drop", "latency"}),
    ),
    Rung(
        name="qat",
        does="train with weights and activations rounded, taught by the float network",
        passes=("qat",),
        grow=_qat,
        trains=True,
        takes_onnx=False,
    ),
    Rung(
        name="distill",
        does="train before quantizing, taught by the teacher",
        passes=("distill",),
        grow=_distill,
        trains=True,
        is_taught=True,
        takes_onnx=False,
    ),
)
"""In the order in which they are tried: what costs least stands first."""
