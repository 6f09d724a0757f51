"""Climbs from the cheapest recipe to the dearest and stops as soon as every budget is kept.

Each rung makes recipes of the best settings so far; what they give is weighed on validation. Knows no pass, measures
nothing itself, and reads time only from the clock it is given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from edgekit.compress.rungs import Settings
from edgekit.errors import CompressionError, MissingExtra
from edgekit.progress import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from edgekit.compress.blame import Suspect
    from edgekit.compress.budget import Budget, Kind, Reached
    from edgekit.compress.estimate import Pace
    from edgekit.compress.recipe import Recipe
    from edgekit.compress.rungs import Rung, Situation
    from edgekit.model import Model
    from edgekit.progress import Progress

CACHED = 0.1
"""A try that took less than this share of its estimate came from the cache: it says nothing of the pace."""

ILLNESSES = {"drop", "saturation"}
"""Budgets whose miss is some layer's fault."""


class Work(Protocol):
    """What runs a recipe: `compress`, mostly with a cache."""

    def __call__(self, model: Model, recipe: Recipe, progress: Progress) -> Model:
        """Return the compressed model."""
        ...


@dataclass(frozen=True, kw_only=True)
class Try:
    """One recipe that was tried, or why it was not: ``note``. ``seconds`` is what it took, or would have taken."""

    rung: str
    recipe: Recipe
    seconds: float
    reached: Reached | None = None
    settings: Settings = field(default_factory=Settings)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Climb:
    """All that was tried, and the best of it with its model.

    ``broke`` are the layers that the first candidate suffered from which lost too much, ``left`` those of the best one
    where it still does.
    """

    budget: Budget
    tries: tuple[Try, ...]
    best: Try
    model: Model
    broke: tuple[Suspect, ...]
    left: tuple[Suspect, ...]
    seconds: float

    @property
    def misses(self) -> dict[Kind, float]:
        """By how much each budget is missed, as a share of it; empty where all are kept."""
        return self.best.reached.misses(self.budget) if self.best.reached else {}


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """What is climbed, and with what: ``work`` runs a recipe, ``weigh`` judges, ``told`` hears of every try.

    ``diagnose`` says which layers a candidate suffers from. It is asked once, when a candidate first loses too much,
    and the rung that cures the worst of them comes next.
    ``limit`` bounds the seconds of the climb: a try that is not expected to end within it is not begun. The first is
    always begun, for there has to be something to keep. ``seed`` is that of every pass that has one.
    """

    situation: Situation
    rungs: Sequence[Rung]
    work: Work
    weigh: Callable[[Model], Reached]
    pace: Pace
    clock: Callable[[], float]
    diagnose: Callable[[Model], tuple[Suspect, ...]] = lambda model: ()  # noqa: ARG005  # nobody is to blame
    limit: float | None = None
    seed: int | None = None
    progress: Progress = silent
    told: Callable[[Try], None] = lambda tried: None  # noqa: ARG005  # nobody listens

    @property
    def budget(self) -> Budget:
        """The budgets to keep."""
        return self.situation.budget

    def recipe(self, settings: Settings) -> Recipe:
        """Return the recipe of settings, with the seed where there is one."""
        made = settings.recipe()
        return made if self.seed is None else made.with_seed(self.seed)

    def plan(self) -> Iterator[tuple[Rung, float]]:
        """Return each rung with the seconds that its tries may take, if all of them are needed.

        Settings that a rung will find are not known yet: each is estimated as if it came second.
        """
        first = next(iter(self.rungs[0].grow(Settings(), self.situation)))
        for rung in self.rungs:
            tries = rung.grow(first, self.situation)
            yield rung, sum(self.pace.of_recipe(self.recipe(settings)) for settings in tries)

    def climb(self) -> Climb:
        """Try rung after rung until the budgets are kept or the rungs or the time have come to their end.

        Raises:
            CompressionError: not even the first recipe fits the model; or nothing could be weighed.
        """
        state = _State(self)
        open_rungs = list(self.rungs)
        while open_rungs:
            rung = open_rungs.pop(0)
            place = f"{len(self.rungs) - len(open_rungs)}/{len(self.rungs)}"
            for settings in rung.grow(state.settings, state.situation):
                helps = state.attempt(rung, settings, place)
                if state.is_met:
                    return state.result()
                if not helps:
                    break
            open_rungs.sort(key=lambda later: state.cause not in later.cures)
        return state.result()


class _State:
    """Where a climb stands."""

    def __init__(self, ladder: Ladder) -> None:
        self._ladder = ladder
        self._started = ladder.clock()
        self._tries: list[Try] = []
        self._best: Try | None = None
        self._base: Try | None = None
        self._kept: Model | None = None
        self._broke: tuple[Suspect, ...] | None = None
        self._spent = self._foretold = 0.0

    @property
    def settings(self) -> Settings:
        """What the next rung builds on."""
        return self._base.settings if self._base else Settings()

    @property
    def situation(self) -> Situation:
        return replace(self._ladder.situation, reached=self._base.reached if self._base else None)

    @property
    def cause(self) -> str:
        """What the worst layer of the first bad candidate suffers from; empty while nobody is to blame."""
        return self._broke[0].cause if self._broke else ""

    @property
    def is_met(self) -> bool:
        best = self._best
        return best is not None and best.reached is not None and not best.reached.misses(self._ladder.budget)

    def attempt(self, rung: Rung, settings: Settings, place: str) -> bool:
        """Try a recipe, or note why not; say whether this rung can help at all."""
        recipe = self._ladder.recipe(settings)
        seconds = self._ladder.pace.of_recipe(recipe) * self._factor()
        note = self._reason_against(rung, settings, seconds)
        if note:
            made = Try(rung=rung.name, recipe=recipe, seconds=seconds, settings=settings, note=note)
        else:
            made = self._tried(rung, settings, recipe, place)
        self._tries.append(made)
        self._ladder.told(made)
        return self._can_help(rung)

    def _tried(self, rung: Rung, settings: Settings, recipe: Recipe, place: str) -> Try:
        started = self._ladder.clock()
        live = f": {self._best.reached.drop:+.3g} lost" if self._best and self._best.reached else ""
        reached = None
        note = ""

        def progress(what: str, done: int, total: int) -> None:
            self._ladder.progress(f"{place} {what.removeprefix('compress: ')}{live}", done, total)

        try:
            model = self._ladder.work(self._ladder.situation.model, recipe, progress)
            reached = self._ladder.weigh(model)
        except (CompressionError, MissingExtra) as error:
            if self._best is None:
                raise
            note = f"does not apply: {error.message}"
        seconds = self._ladder.clock() - started
        foretold = self._ladder.pace.of_recipe(recipe)
        if seconds > CACHED * foretold and not note:
            self._spent, self._foretold = self._spent + seconds, self._foretold + foretold
        made = Try(rung=rung.name, recipe=recipe, seconds=seconds, reached=reached, settings=settings, note=note)
        if reached is not None:
            self._keep(made, reached, model)
        return made

    def _keep(self, made: Try, reached: Reached, model: Model) -> None:
        """Remember the best model, no other: they are large."""
        budget = self._ladder.budget
        if self._best is None or self._best.reached is None or reached.rank(budget) < self._best.reached.rank(budget):
            self._best, self._kept = made, model
        if (
            self._base is None
            or self._base.reached is None
            or reached.promise(budget) < self._base.reached.promise(budget)
        ):
            self._base = made
        if self._broke is None and reached.misses(budget).keys() & ILLNESSES:
            self._broke = self._diagnosed(model)

    def _diagnosed(self, model: Model) -> tuple[Suspect, ...]:
        try:
            return self._ladder.diagnose(model)
        except CompressionError:  # a network that cannot be walked through can be compressed all the same
            return ()

    def _reason_against(self, rung: Rung, settings: Settings, seconds: float) -> str:
        """Say why a try is not begun, empty where it is."""
        base = self._base
        if base is None or base.reached is None:
            return ""
        if any(t.settings == settings for t in self._tries):
            return "tried already"
        if not self._can_help(rung):
            return f"cannot help: {' and '.join(sorted(base.reached.misses(self._ladder.budget)))} missed"
        left = math.inf
        if self._ladder.limit is not None:
            left = self._ladder.limit - (self._ladder.clock() - self._started)
        return "" if seconds <= left else f"takes about {seconds:.0f} s, {max(left, 0):.0f} s are left"

    def _can_help(self, rung: Rung) -> bool:
        base = self._base  # what the try builds on: it may miss another budget than the best so far
        return (
            base is None or base.reached is None or bool(rung.mends & base.reached.misses(self._ladder.budget).keys())
        )

    def _factor(self) -> float:
        """Return how much slower than foretold the tries so far were; never trust a machine that seems faster."""
        return max(1.0, self._spent / self._foretold) if self._foretold else 1.0

    def result(self) -> Climb:
        if self._best is None or self._kept is None:
            raise CompressionError("no recipe could be weighed")
        reached = self._best.reached
        still = reached is not None and reached.misses(self._ladder.budget).keys() & ILLNESSES
        return Climb(
            budget=self._ladder.budget,
            tries=tuple(self._tries),
            best=self._best,
            model=self._kept,
            broke=self._broke or (),
            left=self._diagnosed(self._kept) if still else (),
            seconds=self._ladder.clock() - self._started,
        )
