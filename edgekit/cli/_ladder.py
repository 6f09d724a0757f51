"""`edgekit compress --max-drop`: the ladder's options, its plan beforehand, and what it bought afterwards."""

from __future__ import annotations

import functools
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec.structs import replace as replace_fields

from edgekit.cli._terminal import finite
from edgekit.errors import BudgetError, EdgekitError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgekit.cli._terminal import Terminal
    from edgekit.compress.blame import Suspect
    from edgekit.compress.budget import Budget
    from edgekit.compress.ladder import Climb, Try, Work
    from edgekit.compress.recipe import Recipe
    from edgekit.compress.rungs import Settings, Situation, Times
    from edgekit.compress.weighing import Scales
    from edgekit.device_profiles import DeviceProfile
    from edgekit.manifest import Step
    from edgekit.model import Model

TIMES = "times.json"
"""The file in the output folder with the milliseconds of layers that the kept recipe reads."""

OPTIONS = (
    click.option("--max-drop", type=float, callback=finite, help="Find a recipe that loses at most so much of METRIC."),
    click.option("--metric", help="What is lost: top1, top5, f1, mse, mae, cosine, agreement, perplexity, kl, f.py:f."),
    click.option("--target", help="Hardware class to fit, as raspberry-pi-5; see: edgekit devices list."),
    click.option("--latency", help="Most time a sample on the target, as 20ms."),
    click.option(
        "--latency-of",
        type=click.Path(path_type=Path),
        help="What edgekit bench --json told of the float bundle on the target, to estimate latencies from.",
    ),
    click.option("--size", help="Most bytes of the weights, as 2MB or 1.5MiB."),
    click.option("--teacher", help="A larger network that may teach the model as a last resort, given like SOURCE."),
    click.option("--teacher-checkpoint", type=click.Path(path_type=Path), help="Its weights."),
    click.option("--budget", "time_budget", help="Most time for the search, as 30m; then the best so far is kept."),
)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What was asked of the ladder, as it was spelled."""

    max_drop: float | None
    metric: str | None
    target: str | None
    latency: str | None
    latency_of: Path | None
    size: str | None
    teacher: str | None
    teacher_checkpoint: Path | None
    time_budget: str | None

    def is_ladder(self, recipe: object) -> bool:
        """Say whether a recipe is to be found.

        Raises:
            UsageError: options of the ladder without a loss that is allowed; or with a recipe; or without a target; a
                teacher's checkpoint without a teacher.
        """
        others = {
            "--target": self.target,
            "--latency": self.latency,
            "--latency-of": self.latency_of,
            "--size": self.size,
            "--budget": self.time_budget,
        }
        given = [name for name, value in others.items() if value is not None]
        if self.max_drop is None:
            if given:
                raise UsageError(
                    f"{given[0]} is kept by searching a recipe, which needs to know what may be lost",
                    "add --max-drop, as --max-drop 0.5",
                )
            if self.teacher or self.teacher_checkpoint:
                raise UsageError(
                    "--teacher teaches what a search finds, which needs to know what may be lost",
                    "add --max-drop, as --max-drop 0.5, or write the pass distill into a recipe",
                )
            return False
        if self.teacher_checkpoint and not self.teacher:
            raise UsageError("--teacher-checkpoint are the weights of a teacher that is not given", "add --teacher")
        if recipe is not None:
            raise UsageError("--max-drop searches a recipe, --recipe gives one", "drop one of the two")
        if self.target is None:
            raise UsageError("the ladder needs a target to fit", "add --target; see: edgekit devices list")
        return True

    def budget(self) -> Budget:
        """Parse the budgets.

        Raises:
            UsageError: no number, no unit, or nothing above zero.
        """
        from edgekit.compress import budget

        return budget.Budget(
            max_drop=self.max_drop or 0.0,
            size=None if self.size is None else budget.size(self.size, "--size"),
            latency=None if self.latency is None else budget.seconds(self.latency, "--latency"),
        )

    def limit(self) -> float | None:
        """Parse the seconds that all may take."""
        from edgekit.compress import budget

        return None if self.time_budget is None else budget.seconds(self.time_budget, "--budget")


def options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the ladder's options, which it gets together as ``wanted``."""

    @functools.wraps(function)
    def run(terminal: Terminal, **given: Any) -> None:  # noqa: ANN401  # what click parsed
        own = {name: given.pop(name) for name in Wanted.__dataclass_fields__}
        function(terminal, wanted=Wanted(**own), **given)

    made: Callable[..., None] = run
    for option in reversed(OPTIONS):
        made = option(made)
    return made


class Search:
    """One search for a recipe: prepared from a model and what is wanted, told, and climbed.

    What it keeps goes to ``output``; what it measures once lies in the folder ``measured`` for a search that goes on.

    Raises:
        UsageError: a budget that cannot be read or measured, an unknown target or metric, no validation split, a
            teacher that cannot be read or teach.
    """

    def __init__(  # noqa: PLR0913  # four positional; the rest are keywords
        self,
        terminal: Terminal,
        model: Model,
        wanted: Wanted,
        work: Work,
        *,
        output: Path,
        seed: int | None = None,
        measured: Path | None = None,
    ) -> None:
        from edgekit import device_profiles
        from edgekit.compress import estimate, ladder, rungs
        from edgekit.compress.weighing import Scales

        self._terminal = terminal
        self._wanted = wanted
        self._output = output
        self._scratch = None if measured else tempfile.TemporaryDirectory(prefix="edgekit-times-")
        self._measured = measured or Path(self._scratch.name if self._scratch else "")
        self.model = model
        budget = wanted.budget()
        limit = wanted.limit()
        self._profile = device_profiles.load(wanted.target or "")
        _refuse_unfit_target(model, self._profile)
        self._latency = _latency(model, wanted, self._profile)
        self._scales = Scales(model, wanted.metric, self._latency, self._profile)
        situation = self._situation(rungs.situation(model, budget, wanted.target or ""))
        self.ladder = ladder.Ladder(
            situation=situation,
            rungs=rungs.offered(situation),
            work=work,
            weigh=self._scales.weigh,
            pace=estimate.pace(model, time.perf_counter),
            clock=time.monotonic,
            diagnose=self._diagnose,
            limit=limit,
            seed=seed,
            progress=terminal.progress,
            told=self._tell_try,
        )

    def _situation(self, bare: Situation) -> Situation:
        wanted = self._wanted
        if wanted.teacher:
            _refuse_unfit_teacher(self.model, wanted)
        weights = str(wanted.teacher_checkpoint or "")
        return replace(
            bare,
            teacher=(wanted.teacher, weights) if wanted.teacher else None,
            timing=self._times if self._latency else None,
        )

    def _times(self, candidates: Mapping[int, Settings]) -> Times | None:
        progress = self._terminal.progress
        try:
            made = {
                bits: self.ladder.work(self.model, self.ladder.recipe(settings), progress)
                for bits, settings in candidates.items()
            }
            progress("milliseconds of layers", 0, 0)
            found: Times = self._latency.times(made, self._measured)
        except (EdgekitError, OSError) as error:
            told = error.message if isinstance(error, EdgekitError) else error
            self._terminal.warn(f"milliseconds of layers cannot be told, so bytes alone choose their widths: {told}")
            return None
        return found

    def _diagnose(self, candidate: Model) -> tuple[Suspect, ...]:
        from edgekit.compress.blame import blame, cut_off

        found = cut_off(self._scales.saturations(candidate))
        return (*found, *blame(candidate, self._scales.fidelity, self._terminal.progress))

    def show_plan(self) -> dict[str, object]:
        """Tell what will be tried and how long each may take; return it for a program."""
        rows, total = [], 0.0
        for rung, seconds in self.ladder.plan():
            total += seconds
            rows.append({"rung": rung.name, "does": rung.does, "seconds": round(seconds, 1)})
        say = self._terminal.say
        say(f"budget  {_spelled_budget(self.ladder.budget, self._scales)}")
        say(f"target  {self._profile.name}: {self._profile.title}{self._latency_note()}\n")
        self._terminal.table(
            ["rung", "what it tries", "at most about"],
            [[row["rung"], row["does"], duration(float(str(row["seconds"])))] for row in rows],
        )
        limit = "" if self.ladder.limit is None else f", of {duration(self.ladder.limit)} allowed"
        say(f"\nall of it about {duration(total)}{limit}; it ends as soon as every budget is kept\n")
        return {"plan": rows, "seconds": round(total, 1), "rungs": [row["rung"] for row in rows]}

    def climb(self) -> Climb:
        """Search; tell every try as it ends, then what each bought and which layers were to blame."""
        climb = self.ladder.climb()
        columns = ["rung", "recipe", "lost", "bytes", "SQNR", *(["latency"] if self._latency else []), "took", ""]
        self._terminal.say()
        self._terminal.table(columns, [self._row(tried, climb) for tried in climb.tries])
        return climb

    def tell_blame(self, climb: Climb) -> None:
        """Tell which layers broke the first candidate, and which the kept one still suffers from."""
        for what, suspects in (
            ("what broke the first candidate that is not good enough:", climb.broke),
            ("what the kept one still suffers from:", climb.left),
        ):
            if suspects:
                self._terminal.say(f"\n{what}")
            for suspect in suspects:
                self._terminal.say(f"  {suspect.told}")

    def document(self, climb: Climb) -> dict[str, Any]:
        """Return all of it for a program and for the file ``ladder.json``."""
        budget = climb.budget
        return {
            "target": self._profile.name,
            "metric": self._scales.metric.name,
            "budget": {"max_drop": budget.max_drop, "size": budget.size, "latency": budget.latency},
            "latency_is": self._latency and ("an estimate" if self._latency.is_estimate else "measured here"),
            "met": not climb.misses,
            "missed": climb.misses,
            "before": self._scales.before,
            "tries": [_told(tried, is_best=tried is climb.best) for tried in climb.tries],
            "broke": [_blamed(suspect) for suspect in climb.broke],
            "left": [_blamed(suspect) for suspect in climb.left],
        }

    def marked(self, climb: Climb) -> Model:
        """Return the best model with a step in its lineage that tells the budgets, and whether they are kept."""
        from edgekit.manifest import Step

        budget, reached = climb.budget, climb.best.reached
        wanted = {"max_drop": budget.max_drop, "size": budget.size, "latency": budget.latency}
        options = {name: value for name, value in wanted.items() if value is not None}
        step = Step(
            name="ladder",
            options={
                "target": self._profile.name,
                "metric": self._scales.metric.name,
                **options,
                "keeps_budgets": not climb.misses,
            },
            measured={"tries": len(climb.tries), **({} if reached is None else {"drop": reached.drop})},
        )
        old = len(self.model.lineage)
        lineage = tuple(self._moved(step) for step in climb.model.lineage)
        return replace(climb.model, lineage=(*lineage[:old], step, *lineage[old:]))

    def _moved(self, step: Step) -> Step:
        """Let a step of the lineage name the times that lie in the output folder."""
        if not step.options.get("times"):
            return step
        return replace_fields(step, options={**step.options, "times": self._kept_times()})

    def kept(self, climb: Climb) -> tuple[Recipe, dict[str, bytes]]:
        """Return the best recipe, and the file beside it that it reads from now on: the milliseconds of its layers."""
        from edgekit.compress.recipe import Recipe

        recipe = climb.best.recipe
        read = [path for _, step in recipe.passes if (path := getattr(step, "times", ""))]
        if not read:
            return recipe, {}
        passes = [
            (name, replace_fields(step, times=self._kept_times()) if getattr(step, "times", "") else step)
            for name, step in recipe.passes
        ]
        return Recipe(tuple(passes)), {TIMES: Path(read[0]).read_bytes()}

    def _kept_times(self) -> str:
        return str(self._output / TIMES)

    def error(self, climb: Climb, output: Path) -> BudgetError | None:
        """Return the error that a missed budget is, None where all are kept."""
        reached = climb.best.reached
        if not climb.misses or reached is None:
            return None
        words = {
            "drop": f"lost {self._lost(reached.drop)}, allowed {self._lost(climb.budget.max_drop)}",
            "size": f"{reached.bytes:,} bytes, allowed {climb.budget.size or 0:,}",
            "latency": f"{_milliseconds(reached.latency)}, allowed {_milliseconds(climb.budget.latency)}",
            "saturation": f"{reached.saturated:.2%} of the sums of a layer are cut off on {self._profile.name}",
        }
        left_out = [t for t in climb.tries if t.note.startswith("takes about")]
        ways = ["loosen it"]
        ways += [f"give more than --budget {self._wanted.time_budget}"] if left_out else []
        ways += [f"look at {climb.left[0].layer}"] if climb.left else []
        return BudgetError(
            f"no recipe keeps every budget: {'; '.join(words[kind] for kind in climb.misses)}",
            f"the best of {len([t for t in climb.tries if t.reached])} is kept in {output}, marked as missing it; "
            f"{', '.join(ways)}",
        )

    def _tell_try(self, tried: Try) -> None:
        if tried.reached is None:
            self._terminal.say(f"{tried.rung}: not tried: {tried.note}")
            return
        self._terminal.say(f"{tried.rung}: {self._lost(tried.reached.drop)} lost, {duration(tried.seconds)}")

    def _row(self, tried: Try, climb: Climb) -> list[str]:
        reached = tried.reached
        if reached is None:
            figures = ["-"] * (4 if self._latency else 3)
        else:
            figures = [self._lost(reached.drop), f"{reached.bytes:,}", f"{reached.fidelity:.1f} dB"]
            figures += [_milliseconds(reached.latency)] if self._latency else []
        note = "kept" if tried is climb.best else tried.note
        return [tried.rung, spelled(tried.recipe), *figures, duration(tried.seconds) if reached else "-", note]

    def _lost(self, drop: float) -> str:
        return f"{drop:.2f} points" if self._scales.metric.points else f"{drop:.3g}"

    def _latency_note(self) -> str:
        if self._latency is None:
            return ""
        if not self._latency.is_estimate:
            return "; this machine is one, so latency is measured"
        return f"; latency is an ESTIMATE: this machine's times {self._latency.scale:.2f}"


def estimated(model: Model, recipe: Recipe) -> list[float] | None:
    """Return the seconds that each pass will take, judging included; None where the model cannot be run here."""
    from edgekit.compress import estimate
    from edgekit.model import OnnxNetwork, TorchNetwork

    if model.data is None or not isinstance(model.network, TorchNetwork | OnnxNetwork):
        return None
    pace = estimate.pace(model, time.perf_counter)
    return [pace.of_pass(step) + pace.of_judging() for _, step in recipe.passes]


def _latency(model: Model, wanted: Wanted, profile: DeviceProfile) -> Any:  # noqa: ANN401  # TargetLatency, whose module is heavy
    if wanted.latency is None:
        if wanted.latency_of is not None:
            raise UsageError("--latency-of helps to estimate a latency that is not asked for", "add --latency, as 20ms")
        return None
    from edgekit.cli._latency import TargetLatency

    return TargetLatency(model, profile, wanted.latency_of)


def _refuse_unfit_target(model: Model, profile: DeviceProfile) -> None:
    from edgekit.compress.losses import is_language_model

    if set(profile.formats) == {"gguf"} and not is_language_model(model):
        raise UsageError(
            f"--target {profile.name} runs language models, {model.name} is none", "see: edgekit devices list"
        )


def _refuse_unfit_teacher(model: Model, wanted: Wanted) -> None:
    """Raise, before anything is tried, where the teacher cannot be read, or could not teach this model."""
    from edgekit import workload
    from edgekit.compress.passes._learning import train_split, trainable

    trainable(model, "distill")
    train_split(model, "distill", "learn from:give data with one, or drop --teacher")
    teacher = workload.load(wanted.teacher or "", wanted.teacher_checkpoint, model.data)
    theirs, mine = ([list(spec.shape[1:]) for spec in one.outputs] for one in (teacher, model))
    if theirs != mine:
        raise UsageError(
            f"--teacher {wanted.teacher} gives {theirs} a sample, {model.name} {mine}",
            "choose a teacher with the same outputs, for the same classes",
        )


def _blamed(suspect: Suspect) -> dict[str, Any]:
    import msgspec

    return {**msgspec.to_builtins(suspect), "told": suspect.told}


def _told(tried: Try, *, is_best: bool) -> dict[str, Any]:
    figures = {} if tried.reached is None else asdict(tried.reached)
    return {"rung": tried.rung, "recipe": spelled(tried.recipe), **figures, "note": tried.note, "kept": is_best}


def spelled(recipe: Recipe) -> str:
    """Name the passes with the options that are not their defaults, but for the file of times, which tells nothing."""
    import msgspec

    parts = []
    for name, step in recipe.passes:
        shown = [field for field in msgspec.structs.fields(step) if field.name != "times"]
        given = [(field, getattr(step, field.name)) for field in shown]
        own = [f"{field.name}={value}" for field, value in given if value != field.default]
        parts.append(f"{name}({', '.join(own)})" if own else name)
    return " + ".join(parts)


def _spelled_budget(budget: Budget, scales: Scales) -> str:
    unit = "points of " if scales.metric.points else "of "
    parts = [f"at most {budget.max_drop:g} {unit}{scales.metric.name} ({scales.before:.4g} before)"]
    parts += [f"at most {budget.size:,} bytes"] if budget.size else []
    parts += [f"at most {_milliseconds(budget.latency)} a sample"] if budget.latency else []
    return ", ".join(parts)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g} ms"


def duration(seconds: float) -> str:
    """Write a time for a person: 0.4 s, 12 s, 3 min, 2.5 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
