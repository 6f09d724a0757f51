"""Mixed precision: chooses the bits of each weight under a budget, by what rounding it alone does to the outputs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import msgspec

from edgekit.compress.feedback import alone
from edgekit.compress.layers import layers
from edgekit.compress.passes import CompressionPass
from edgekit.compress.sensitivity import FLOAT, How, Sensitivity, candidate, sensitivities
from edgekit.errors import CompressionError, UsageError
from edgekit.manifest import Step
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from edgekit.model import Model, Split
    from edgekit.plan import QuantizationPlan
    from edgekit.progress import Progress

Width = Literal[2, 3, 4, 5, 6, 7, 8, 32]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Cost = dict[tuple[str, int], float]


class MixedPrecision(CompressionPass, frozen=True):
    """Give each planned weight one of ``widths`` bits, 32 for float, so that the damage is least under a budget.

    The budget, the one that is not 0, is ``bits``, the mean bits a weight with its scales, or ``size``, the bytes of
    all planned weights, or ``damage``, what the outputs may take, where the bytes are least. ``time`` bounds the time
    besides, as a share of that at the widest: of the milliseconds by weight and width in the JSON file ``times``, else
    of multiplications times bits. The damage of a layer is measured on ``samples`` calibration samples
    (`sensitivity`) and adds up over layers; the choice is an integer program (Yao et al. 2021, "HAWQ-V3", section
    3.4). Passes that compensate weights follow after it: with ``rounding = "gptq"`` the damage is that of what `gptq`
    makes of a layer, which is not where rounding to nearest hurts most.
    """

    widths: Annotated[tuple[Width, ...], msgspec.Meta(min_length=1)] = (8, 4)
    bits: NotNegative = 0.0
    size: Annotated[int, msgspec.Meta(ge=0)] = 0
    damage: NotNegative = 0.0
    time: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    times: str = ""
    rounding: Literal["nearest", "gptq"] = "nearest"
    samples: Annotated[int, msgspec.Meta(ge=2)] = 16

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return the model with other widths in its plan.

        Raises:
            CompressionError: no plan, no calibration data, not exactly one budget, one that no choice meets, or one
                that only float weights meet.
            UsageError: ``times`` is no such file.
        """
        plan, samples = self._needed(model)
        how = How(rounds=alone) if self.rounding == "gptq" else How()
        table = sensitivities(model, samples, sorted(set(self.widths), reverse=True), how=how, progress=progress)
        count = sum({entry.name: entry.weights for entry in table}.values())
        size = math.floor(self.bits * count / 8) if self.bits else self.size
        chosen = choose(table, Budget(size or None, self.damage or None, self.time), _times(self.times, table))
        rules = {name: rule for name, rule in plan.weights.items() if name not in chosen}
        for layer in layers(model):
            if layer.weight in chosen and chosen[layer.weight].bits != FLOAT:
                rules[layer.weight] = candidate(layer, plan, chosen[layer.weight].bits)
        if not rules:
            raise CompressionError(
                f"damage {self.damage} leaves every weight of {model.name} float", "allow more damage, or drop the pass"
            )
        # the widths that the rules have: what quantize gave 7 bits lest sums saturate never gets 8
        given = {name: rules[name].bits if name in rules else FLOAT for name in chosen}
        note = Step(
            name="mixed_precision",
            measured=_measured(msgspec.structs.replace(entry, bits=given[name]) for name, entry in chosen.items()),
        )
        changed = msgspec.structs.replace(plan, weights={name: rules[name] for name in plan.weights if name in rules})
        return replace(model, plan=changed, lineage=(*model.lineage, note))

    def _needed(self, model: Model) -> tuple[QuantizationPlan, Split]:
        if sum(budget > 0 for budget in (self.bits, self.size, self.damage)) != 1:
            raise CompressionError(
                "mixed_precision takes one budget: bits, size or damage",
                "set bits = 5.0 for a mean of five bits a weight",
            )
        if model.plan is None or not model.plan.weights:
            raise CompressionError(
                f"{model.name} has no plan with integer weights ({model.precision})",
                "put quantize before mixed_precision in the recipe",
            )
        if model.data is None:
            raise CompressionError(f"{model.name} has no calibration data", "give --data file.py:function or data.npz")
        return model.plan, model.data.calibration.head(self.samples)


class Budget(NamedTuple):
    """At most ``size`` bytes with the least damage, or at most ``damage`` with the least bytes; a share of the time."""

    size: int | None
    damage: float | None
    time: float = 1.0


def choose(table: Sequence[Sensitivity], budget: Budget, times: Cost) -> dict[str, Sensitivity]:
    """Return one entry of the table for each weight, the best under the budget.

    Raises:
        CompressionError: no choice meets it; tells the least that can be reached.
    """
    with extra("compress"):
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
    names = list(dict.fromkeys(entry.name for entry in table))
    sizes, damages = [float(entry.bytes) for entry in table], [entry.damage for entry in table]
    costs = [times[entry.name, entry.bits] for entry in table]
    slowest = _total(table, lambda entry: times[entry.name, entry.bits], max)
    bounded, wanted = (damages, sizes) if budget.size is None else (sizes, damages)
    most = budget.damage if budget.size is None else budget.size
    rows = [_row(bounded, most or 0.0), _row(costs, budget.time * slowest)]
    found = milp(
        _row(wanted, 0.0)[0],
        constraints=[
            LinearConstraint(np.array([[entry.name == name for entry in table] for name in names], float), 1, 1),
            *(LinearConstraint(np.array([row]), -np.inf, limit) for row, limit in rows),
        ],
        integrality=np.ones(len(table)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    if found.x is None:
        raise _out_of_reach(table, budget, times)
    return {entry.name: entry for entry, taken in zip(table, found.x, strict=True) if taken > 0.5}


def _row(numbers: Sequence[float], limit: float) -> tuple[list[float], float]:
    """Scale a row and its limit to 1: damages may be tiny beside the solver's tolerances."""
    largest = max(*numbers, 1e-30)
    return [number / largest for number in numbers], limit / largest * (1 + 1e-9)


def _total(table: Sequence[Sensitivity], of: Callable[[Sensitivity], float], pick: Callable[..., float]) -> float:
    """Add up the least or the most that each weight can have."""
    every: dict[str, list[float]] = {}
    for entry in table:
        every.setdefault(entry.name, []).append(of(entry))
    return sum(pick(found) for found in every.values())


def _out_of_reach(table: Sequence[Sensitivity], budget: Budget, times: Cost) -> CompressionError:
    least_bytes = _total(table, lambda entry: entry.bytes, min)
    least_damage = _total(table, lambda entry: entry.damage, min)
    fastest, slowest = (_total(table, lambda e: times[e.name, e.bits], pick) for pick in (min, max))
    widths = ", ".join(str(bits) for bits in sorted({entry.bits for entry in table}))
    asked = f"damage {budget.damage}"
    if budget.size is not None:
        asked = f"{budget.size} bytes ({_mean_bits(table, budget.size):.2f} bits a weight)"
    return CompressionError(
        f"no choice of widths {widths} stays within {asked} and {budget.time:.0%} of the time: the least are "
        f"{least_bytes:.0f} bytes ({_mean_bits(table, least_bytes):.2f} bits a weight), damage {least_damage:.3g}, "
        f"and {fastest / slowest:.0%} of the time",
        "allow more, or add a narrower width" if budget.size is not None else "allow more, or add a wider width",
    )


def _mean_bits(table: Sequence[Sensitivity], size: float) -> float:
    return 8 * size / sum({entry.name: entry.weights for entry in table}.values())


def _times(file: str, table: Sequence[Sensitivity]) -> Cost:
    """Read the milliseconds of each weight at each width; without a file, count multiplications times bits."""
    if not file:
        return {(entry.name, entry.bits): float(entry.macs * entry.bits) for entry in table}
    try:
        found = msgspec.json.decode(Path(file).read_bytes(), type=dict[str, dict[int, float]])
        return {(entry.name, entry.bits): found[entry.name][entry.bits] for entry in table}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file} holds no times: {error}", 'write JSON, milliseconds by weight and width: {"fc.weight": {"8": 0.1}}'
        ) from error
    except KeyError as error:
        raise UsageError(f"{file} lacks the time of {error}", "measure every planned weight at every width") from error


def _measured(chosen: Iterable[Sensitivity]) -> dict[str, float]:
    found = tuple(chosen)
    size = sum(entry.bytes for entry in found)
    counts = {f"weights_{bits}bit": sum(e.weights for e in found if e.bits == bits) for bits in {e.bits for e in found}}
    measured: dict[str, float] = {"weight_bytes": size, "mean_bits": _mean_bits(found, size)}
    return measured | {"damage": sum(entry.damage for entry in found)} | dict(sorted(counts.items()))


PLUGIN: type[CompressionPass] = MixedPrecision
