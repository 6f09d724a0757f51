"""`edgekit compress`: a model, its data and a recipe in; a folder with the compressed model out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from edgekit.cli import _ladder
from edgekit.cli._stopping import told_when_stopped
from edgekit.cli._terminal import Terminal, command
from edgekit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.cli._speed import Speed
    from edgekit.compress.cache import Cache
    from edgekit.compress.origin import Sources
    from edgekit.compress.outcome import Outcome, Stages
    from edgekit.compress.recipe import Recipe
    from edgekit.model import Data, Model
    from edgekit.progress import Progress


@command(
    name="compress",
    short_help="Make a model smaller by a recipe.",
    help="""Make a model smaller by a recipe, and tell what it cost.

    SOURCE is file.py:build or package.module:build (a function that returns a torch.nn.Module), a .pt2 or .onnx file,
    a Hugging Face folder, or a folder that this command wrote. Without --recipe the model is quantized to int8; with
    --max-drop and --target a recipe is searched. The folder OUT is written in one step at the end, with a report, a
    model card and a bill of materials; export it with `edgekit export`. Finished passes are cached: what was
    interrupted goes on when the same command runs again.
    """,
)
@click.argument("source")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Weights for file.py:build: .safetensors, .pt, .pt2."
)
@click.option(
    "--data", "data_source", help="Data: file.py:function, an .npz, a data.toml, or a folder of pictures with one."
)
@click.option(
    "--recipe", "recipe_file", type=click.Path(path_type=Path), help="Recipe in TOML, or the name of a shipped one."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Seed for every pass that has one.")
@click.option("--cache", "cache_folder", type=click.Path(path_type=Path), help="Where finished passes are kept.")
@click.option("--no-cache", is_flag=True, help="Keep nothing for a later run.")
@click.option("--no-latency", is_flag=True, help="Measure no milliseconds: quicker.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and how long it takes, and stop.")
@_ladder.options
def COMMAND(  # noqa: N802, PLR0913  # the name is the plugin's; each parameter is an option of the command line
    terminal: Terminal,
    *,
    source: str,
    checkpoint: Path | None,
    data_source: str | None,
    recipe_file: Path | None,
    output: Path,
    seed: int | None,
    cache_folder: Path | None,
    no_cache: bool,
    no_latency: bool,
    dry_run: bool,
    wanted: _ladder.Wanted,
) -> None:
    """Load, compress, measure, save."""
    from edgekit import workload
    from edgekit.compress import compress
    from edgekit.compress import recipe as recipes
    from edgekit.compress.origin import sources_of
    from edgekit.compress.processes import rank_and_size

    searches = wanted.is_ladder(recipe_file)
    if searches and rank_and_size()[1] > 1:
        raise UsageError(
            "the ladder runs in one process", "search without torchrun, then train the recipe it found with it"
        )
    recipe = recipes.read(recipe_file) if recipe_file else recipes.default()
    if seed is not None:
        recipe = recipe.with_seed(seed)
    workload.refuse_foreign(output)
    model = workload.load(source, checkpoint, workload.load_data(data_source) if data_source else None)
    if dry_run and not searches:
        _show_plan(terminal, model, recipe, output)
        return
    rank, size = rank_and_size()
    no_cache = no_cache or size > 1  # one process would wait for the other's entry, and the other for it
    if rank:  # started by torchrun: learn with the others, and leave the rest to the first
        compress(model, recipe)
        return
    told = "nothing was written" if no_cache else "the same command goes on from the last finished pass"
    with told_when_stopped(terminal, told):
        cache = None if no_cache else _cache(cache_folder)
        sources = sources_of(source, checkpoint, data_source)
        job = _Job(terminal, model, output, cache, wanted.metric, sources, seed, wanted.target or "x86-64")
        speed = None if no_latency else _speed_of(model)
        if searches:
            _search(job, wanted, speed, dry_run=dry_run)
        else:
            terminal.result(_keep(job, *_run(job, recipe, speed)))


@dataclass(frozen=True)
class _Job:
    """What a run of the command works on, and how it speaks."""

    terminal: Terminal
    model: Model
    output: Path
    cache: Cache | None
    metric: str | None
    sources: Sources
    seed: int | None
    target: str

    def compress(
        self, model: Model, recipe: Recipe, progress: Progress, follow: Callable[[Model], None] | None = None
    ) -> Model:
        """Run a recipe, passes from the cache where they are there."""
        from edgekit.compress import compress

        return compress(model, recipe, progress, metric=self.metric, cache=self.cache, follow=follow)


def _cache(folder: Path | None) -> Cache:
    from edgekit.compress.cache import Cache, default_folder

    return Cache(folder or default_folder())


def _speed_of(model: Model) -> Speed:
    from edgekit.cli._speed import Speed

    return Speed(model)


def _stages(model: Model, speed: Speed | None) -> Stages:
    from edgekit.compress.outcome import Stages

    return Stages(model, speed.compare if speed else None, speed.note if speed else "not measured")


def _run(job: _Job, recipe: Recipe, speed: Speed | None) -> tuple[Outcome, dict[str, bytes]]:
    """Compress by a recipe, and measure every stage on the way."""
    stages = _stages(job.model, speed)
    compressed = job.compress(job.model, recipe, job.terminal.progress, stages.seen)
    return _outcome(job, compressed, recipe, stages), {}


def _search(job: _Job, wanted: _ladder.Wanted, speed: Speed | None, *, dry_run: bool) -> None:
    """Climb the ladder and keep the best candidate; a missed budget is an error all the same."""
    from edgekit.compress.outcome import Floats

    floats = Floats()
    search = _ladder.Search(
        job.terminal,
        job.model,
        wanted,
        floats.remembering(job.compress),
        output=job.output,
        seed=job.seed,
        measured=job.cache.measured if job.cache else None,
    )
    plan = search.show_plan()
    if dry_run:
        job.terminal.result({**plan, "output": str(job.output), "dry_run": True})
        return
    climb = search.climb()
    search.tell_blame(climb)
    told = search.document(climb)
    stages = _stages(job.model, speed)
    stages.floats = floats.of(climb.model)
    best = search.marked(climb)
    stages.climbed(climb, best)
    job.terminal.say()
    error = search.error(climb, job.output)
    recipe, beside = search.kept(climb)
    outcome = _outcome(job, best, recipe, stages)
    outcome = replace(outcome, ladder=told, missed=() if error is None else (error.message,))
    files = {"ladder.json": msgspec.json.format(msgspec.json.encode(told)), **beside}
    document = {**_keep(job, outcome, files), "ladder": told}
    if error is None:
        job.terminal.result(document)
        return
    told_error = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    job.terminal.result({**document, "error": {**told_error, "exit_code": error.exit_code}})
    click.echo(f"error: {error.message}\nhint: {error.hint}", err=True)
    click.get_current_context().exit(error.exit_code)


def _outcome(job: _Job, compressed: Model, recipe: Recipe, stages: Stages) -> Outcome:
    from edgekit.compress.origin import origin_of
    from edgekit.compress.outcome import outcome_of

    made_of = recipe, origin_of(job.model, recipe, job.sources)
    outcome = outcome_of(job.model, compressed, made_of, stages, metric=job.metric, progress=job.terminal.progress)
    for note in outcome.notes:
        job.terminal.say(f"note: {note}\n")
    return outcome


def _keep(job: _Job, outcome: Outcome, files: dict[str, bytes]) -> dict[str, object]:
    """Write the folder, tell a person what is in it, and return that for a program."""
    from edgekit.compress import output as outputs

    terminal, output, table = job.terminal, job.output, outcome.table()
    terminal.progress("write", 0, 0)
    digest = outputs.write(outcome, output, files)
    terminal.table(["", "before", "after"], [[n, _figure(n, one), _figure(n, two)] for n, (one, two) in table.items()])
    for warning in (*outcome.warnings, *(job.cache.notes if job.cache else ())):
        terminal.warn(warning)
    compressed = outcome.compressed
    then = f"edgekit export {output} --target {job.target} -o BUNDLE"
    terminal.say(f"\nwrote {output}  ({compressed.precision}; next: {then})")
    terminal.say(f"report {output / 'report.html'}\ndigest {digest}")
    return {
        "output": str(output),
        "digest": digest,
        "lineage": [{"name": s.name, "options": s.options, "measured": s.measured} for s in compressed.lineage],
        "files": {path.name: str(path) for path in sorted(output.iterdir())},
        "cache": {"found": len(job.cache.found), "kept": len(job.cache.kept)} if job.cache else {},
        **outputs.figures(outcome),
    }


def _show_plan(terminal: Terminal, model: Model, recipe: Recipe, output: Path) -> None:
    steps = [{"name": name, **msgspec.to_builtins(step)} for name, step in recipe.passes]
    seconds = _ladder.estimated(model, recipe)
    for tensor in (*model.inputs, *model.outputs):
        terminal.say(f"{'input ' if tensor in model.inputs else 'output'}  {tensor}")
    sizes = _split_sizes(model.data)
    terminal.say(f"data    {', '.join(f'{name} {size}' for name, size in sizes.items()) or 'none'}")
    for step, needed in zip(steps, seconds or itertools.repeat(None, len(steps)), strict=True):
        options = ", ".join(f"{key}={value}" for key, value in step.items() if key != "name")
        about = "" if needed is None else f"  (about {_ladder.duration(needed)})"
        terminal.say(f"pass    {step['name']}: {options or 'no options'}{about}")
    terminal.say(f"output  {output} (dry run: nothing was written)")
    plan = {"model": model.name, "data": sizes, "passes": steps, "seconds": seconds and round(sum(seconds), 1)}
    terminal.result({**plan, "output": str(output), "dry_run": True})


def _split_sizes(data: Data | None) -> dict[str, int]:
    names = ("train", "calibration", "validation", "test")
    splits = {name: getattr(data, name, None) for name in names}
    return {name: len(split) for name, split in splits.items() if split is not None}


def _figure(name: str, value: float) -> str:
    if name == "bytes":
        return f"{value / (1 << 20):.3f} MiB"
    if name in ("parameters", "macs"):
        return f"{value:,.0f}"
    if name == "latency_ms":
        return f"{value:.3g}"
    share = name.rpartition("_")[2] in ("top1", "top5", "agreement", "f1")
    return f"{value:.2%}" if share else f"{value:.4g}"
