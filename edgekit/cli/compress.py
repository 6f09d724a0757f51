"""`edgekit compress`: a model, its data and a recipe in; a folder with the compressed model out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from edgekit.cli import _ladder
from edgekit.cli._terminal import Terminal, command

if TYPE_CHECKING:
    from edgekit.compress.recipe import Recipe
    from edgekit.model import Data, Model


@command(
    name="compress",
    short_help="Make a model smaller by a recipe.",
    help="""Make a model smaller by a recipe, and tell what it cost.

    SOURCE is file.py:build or package.module:build (a function that returns a torch.nn.Module), an .onnx file, or a
    folder that this command wrote. Without --recipe the model is quantized to int8. The folder OUT is written in one
    step at the end; export it with `edgekit export`.
    """,
)
@click.argument("source")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights for SOURCE: .safetensors or .pt.")
@click.option("--data", "data_source", help="Data: file.py:function that returns edgekit.model.Data, or an .npz.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="Recipe in TOML; default: int8.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Seed for every pass that has one.")
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
    dry_run: bool,
    wanted: _ladder.Wanted,
) -> None:
    """Load, compress, measure, save."""
    from edgekit import workload
    from edgekit.compress import compress
    from edgekit.compress import recipe as recipes

    searches = wanted.is_ladder(recipe_file)
    recipe = recipes.read(recipe_file) if recipe_file else recipes.default()
    if seed is not None:
        recipe = recipe.with_seed(seed)
    workload.refuse_foreign(output)
    model = workload.load(source, checkpoint, workload.load_data(data_source) if data_source else None)
    if searches:
        _search(terminal, _ladder.Search(terminal, model, wanted, compress), output, dry_run=dry_run)
        return
    if dry_run:
        _show_plan(terminal, model, recipe, output)
        return
    compressed = compress(model, recipe, terminal.progress)
    terminal.result(_keep(terminal, model, compressed, output, {"recipe.toml": recipes.encode(recipe).encode()}))


def _keep(
    terminal: Terminal, model: Model, compressed: Model, output: Path, files: dict[str, bytes]
) -> dict[str, object]:
    """Read test, write the folder, and tell what the compression cost."""
    from edgekit import workload

    before, after = _judge(model, compressed)
    workload.save(compressed, output, files)
    terminal.table(["", "before", "after"], [[name, *_written(name, before, after)] for name in after])
    terminal.say(f"\nwrote {output}  ({compressed.precision}; next: edgekit export {output} --target x86-64 -o BUNDLE)")
    lineage = [{"name": s.name, "options": s.options, "measured": s.measured} for s in compressed.lineage]
    document = {"output": str(output), "precision": compressed.precision, "lineage": lineage}
    return {**document, "before": before, "after": after}


def _search(terminal: Terminal, search: _ladder.Search, output: Path, *, dry_run: bool) -> None:
    """Climb the ladder and keep the best candidate; a missed budget is an error all the same."""
    from edgekit.compress import recipe as recipes

    plan = search.show_plan()
    if dry_run:
        terminal.result({**plan, "output": str(output), "dry_run": True})
        return
    climb = search.climb()
    blamed = search.blamed(climb)
    told = search.document(climb, blamed)
    files = {
        "recipe.toml": recipes.encode(climb.best.recipe).encode(),
        "ladder.json": msgspec.json.format(msgspec.json.encode(told)),
    }
    terminal.say()
    document = {**_keep(terminal, search.model, search.marked(climb), output, files), "ladder": told}
    error = search.error(climb, blamed, output)
    if error is None:
        terminal.result(document)
        return
    told_error = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    terminal.result({**document, "error": {**told_error, "exit_code": error.exit_code}})
    click.echo(f"error: {error.message}\nhint: {error.hint}", err=True)
    click.get_current_context().exit(error.exit_code)


def _show_plan(terminal: Terminal, model: Model, recipe: Recipe, output: Path) -> None:
    steps = [{"name": name, **msgspec.to_builtins(step)} for name, step in recipe.passes]
    seconds = _ladder.estimated(model, recipe)
    for tensor in (*model.inputs, *model.outputs):
        terminal.say(f"{'input ' if tensor in model.inputs else 'output'}  {tensor}")
    sizes = _split_sizes(model.data)
    terminal.say(f"data    {', '.join(f'{name} {size}' for name, size in sizes.items()) or 'none'}")
    for step, needed in zip(steps, seconds or [None] * len(steps), strict=True):
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


def _judge(model: Model, compressed: Model) -> tuple[dict[str, float], dict[str, float]]:
    """Measure both models: on validation, on test (read here and nowhere else), and by size."""
    from edgekit.compress import evaluate

    before = evaluate.figures(model, model)
    after = {name: compressed.lineage[-1].measured[name] for name in before}
    test = model.data.test if model.data else None
    if model.task == "classification" and test is not None and len(test):
        for figures, judged in ((before, model), (after, compressed)):
            kind, value = evaluate.score(judged, model, test)
            figures[f"test_{kind}"] = value
    return before, after


def _written(name: str, before: dict[str, float], after: dict[str, float]) -> tuple[str, str]:
    return _figure(name, before[name]), _figure(name, after[name])


def _figure(name: str, value: float) -> str:
    if name == "bytes":
        return f"{value / (1 << 20):.3f} MiB"
    return f"{value:,.0f}" if name == "parameters" else f"{value:.2%}"
