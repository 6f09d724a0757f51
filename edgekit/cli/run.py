"""``edgekit run``: one inference from the shell."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from edgekit.cli._terminal import command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.cli._terminal import Terminal
    from edgekit.runtime import Session, TextSession
    from edgekit.tensors import Array

ARRAYS = (".npy", ".npz")


@command(short_help="Run a bundle once, on a picture, an array or a text.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("source", metavar="INPUT")
@click.option("--variant", help="Variant to run; by default the one of this hardware.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(min=1), help="Labels to show.")
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(min=1), help="Length of an answer.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the outputs to this .npz file.")
def COMMAND(  # noqa: N802  # the name under which the command line finds it
    terminal: Terminal, *, bundle: Path, source: str, variant: str | None, output: Path | None, **limits: int
) -> None:
    """Run BUNDLE once on INPUT.

    INPUT is a picture, a text for a model that reads texts, a .npy or .npz file of arrays by input name, or, for a
    language model, the prompt. The best labels or the objects are printed, the outputs of other models and of arrays
    summarized (or written with -o), the answer of a language model streamed.
    """
    from edgekit.errors import UsageError
    from edgekit.runtime import TextSession, load

    with load(bundle, variant=variant) as session:
        if isinstance(session, TextSession):
            _chat(terminal, session, source, limits["max_tokens"])
            return
        path = Path(source)
        is_text = session.contract.text is not None and path.suffix not in ARRAYS
        if not is_text and not path.is_file():
            raise UsageError(f"there is no file {source}", "give a picture, a .npy or a .npz file")
        if session.contract.detection and path.suffix not in ARRAYS:
            _objects(terminal, session, path)
            return
        inputs = session.text_inputs(source) if is_text else _inputs(session, path)
        if session.contract.postprocess and path.suffix not in ARRAYS:
            _labels(terminal, session, inputs, limits["top"])
        else:
            _tensors(terminal, session, inputs, output)


def _inputs(session: Session, path: Path) -> dict[str, Array]:
    return _arrays(session, path) if path.suffix in ARRAYS else session.picture_inputs(path.read_bytes())


def _objects(terminal: Terminal, session: Session, path: Path) -> None:
    found = session.detect(path.read_bytes())
    rows = [(one.label, f"{one.score:.1%}", ", ".join(f"{number:.1f}" for number in one.box)) for one in found]
    terminal.table(("label", "score", "left, top, right, bottom"), rows)
    listed = [{"label": one.label, "score": one.score, "box": list(one.box)} for one in found]
    terminal.result({**_about(session), "objects": listed})


def _labels(terminal: Terminal, session: Session, inputs: dict[str, Array], top: int) -> None:
    labels = session.labels(session.run(inputs), top)[0]
    terminal.table(("label", "probability"), [(name, f"{share:.1%}") for name, share in labels])
    terminal.result({**_about(session), "labels": [{"label": name, "probability": share} for name, share in labels]})


def _tensors(terminal: Terminal, session: Session, inputs: dict[str, Array], output: Path | None) -> None:
    outputs = session.run(inputs)
    terminal.table(("output", "dtype", "shape", "min", "mean", "max"), [_row(n, a) for n, a in outputs.items()])
    document: dict[str, object] = {**_about(session), "shapes": {n: list(a.shape) for n, a in outputs.items()}}
    if output is None:
        document["outputs"] = {name: array.tolist() for name, array in outputs.items()}
    else:
        _write(outputs, output)
        terminal.say(f"wrote {output}")
        document["file"] = str(output)
    terminal.result(document)


def _chat(terminal: Terminal, session: TextSession, prompt: str, max_tokens: int) -> None:
    from edgekit.runtime.backends import Message, Sampling, TextPiece

    text, last = "", TextPiece("")
    for last in session.stream([Message("user", prompt)], Sampling(max_tokens=max_tokens, temperature=0.0)):
        text += last.text
        if not (terminal.as_json or terminal.quiet):
            click.echo(last.text, nl=False)
    terminal.say()
    counts = {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens}
    terminal.result({**_about(session), "text": text, "finish": last.finish, **counts})


def _arrays(session: Session, path: Path) -> dict[str, Array]:
    import numpy as np

    from edgekit.errors import InputError

    try:
        with path.open("rb") as file:
            if path.suffix == ".npz":
                with np.load(file, allow_pickle=False) as arrays:
                    return dict(arrays)
            loaded = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} holds no arrays", f"write the {path.suffix} file with NumPy") from error
    names = [spec.name for spec in session.contract.inputs]
    if len(names) != 1:
        raise InputError(f"the model takes {len(names)} inputs: {', '.join(names)}", "give a .npz with these names")
    return {names[0]: cast("Array", loaded)}


def _write(outputs: Mapping[str, Array], path: Path) -> None:
    import numpy as np

    from edgekit.durable import write_file

    file = io.BytesIO()
    np.savez(file, **outputs)  # type: ignore[arg-type]  # NumPy types allow_pickle into **kwds
    write_file(path, file.getvalue())


def _row(name: str, array: Array) -> tuple[str, ...]:
    shape = " x ".join(map(str, array.shape))
    if array.dtype.kind not in "fiub":
        return name, array.dtype.name, shape, "", "", ""
    return name, array.dtype.name, shape, *(f"{value:.5g}" for value in (array.min(), array.mean(), array.max()))


def _about(session: Session | TextSession) -> dict[str, object]:
    model = session.contract
    return {
        "model": model.name,
        "version": model.version,
        "digest": session.digest,
        "variant": session.variant.name,
        "engine": session.engine,
        "considered": dict(session.considered),
        "choice": session.choice,
    }
