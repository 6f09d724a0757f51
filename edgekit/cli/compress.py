"""`edgekit compress`: a model, its data and a recipe in; a folder with the compressed model out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

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
@click.option("--dry-run", is_flag=True, help="Say what would be done, and stop.")
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
) -> None:
    """Load, compress, measure, save."""
    from edgekit import workload
    from edgekit.compress import compress
    from edgekit.compress import recipe as recipes

    recipe = recipes.read(recipe_file) if recipe_file else recipes.default()
    if seed is not None:
        recipe = recipe.with_seed(seed)
    workload.refuse_foreign(output)
    model = workload.load(source, checkpoint, workload.load_data(data_source) if data_source else None)
    if dry_run:
        _show_plan(terminal, model, recipe, output)
        return
    compressed = compress(model, recipe, terminal.progress)
    before, after = _judge(model, compressed)
    workload.save(compressed, output, {"recipe.toml": recipes.encode(recipe).encode()})
    terminal.table(["", "before", "after"], [[name, *_written(name, before, after)] for name in after])
    terminal.say(f"\nwrote {output}  ({compressed.precision}; next: edgekit export {output} --target x86-64 -o BUNDLE)")
    lineage = [{"name": s.name, "options": s.options, "measured": s.measured} for s in compressed.lineage]
    document = {"output": str(output), "precision": compressed.precision, "lineage": lineage}
    terminal.result({**document, "before": before, "after": after})


def _show_plan(terminal: Terminal, model: Model, recipe: Recipe, output: Path) -> None:
    import msgspec

    steps = [{"name": name, **msgspec.to_builtins(step)} for name, step in recipe.passes]
    for tensor in (*model.inputs, *model.outputs):
        terminal.say(f"{'input ' if tensor in model.inputs else 'output'}  {tensor}")
    sizes = _split_sizes(model.data)
    terminal.say(f"data    {', '.join(f'{name} {size}' for name, size in sizes.items()) or 'none'}")
    for step in steps:
        options = ", ".join(f"{key}={value}" for key, value in step.items() if key != "name")
        terminal.say(f"pass    {step['name']}: {options or 'no options'}")
    terminal.say(f"output  {output} (dry run: nothing was written)")
    terminal.result({"model": model.name, "data": sizes, "passes": steps, "output": str(output), "dry_run": True})


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
