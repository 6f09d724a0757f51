"""Compares what the documents say with what is there: commands, options, make targets, links, the help text.

Every ``edgekit …`` and ``make …`` in a shell block or in backticks must exist. Blocks that open with ``sh run``
or ``python run`` are run as well, in a scratch folder beside a copy of the examples. A block that opens with
``text help`` must be what its first line prints.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from edgekit.cli import cli

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:edgekit|make) [^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
STOPS = {"|", "&", "&&", ";", ">", "||"}
RUN_SECONDS = 600


def main() -> None:
    documents = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    faults = [f"{path.relative_to(ROOT)}: {fault}" for path in documents for fault in faults_of(path)]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        sys.exit(1)
    count = sum(run_blocks(path) for path in documents)
    print(f"{len(documents)} documents agree with reality; {count} shell blocks were run")


def faults_of(path: Path) -> list[str]:
    """List what a document says that is not so."""
    text = path.read_text(encoding="utf-8")
    found = [wrong_call(words) for words in calls_in(text)]
    found += [wrong_help(body) for language, kind, body in blocks_of(text) if (language, kind) == ("text", "help")]
    found += [dead_link(path, target) for target in LINK.findall(FENCE.sub("", text))]
    return [fault for fault in found if fault]


def blocks_of(text: str) -> list[tuple[str, str, str]]:
    """Return each fenced block's language, the rest of its first line, and its body."""
    return [(language, kind.strip(), body) for language, kind, body in FENCE.findall(text)]


def calls_in(text: str) -> list[list[str]]:
    """Return every call of edgekit and make as words, from shell blocks and from backticks."""
    lines = [line for language, _, body in blocks_of(text) if language == "sh" for line in _joined(body).splitlines()]
    lines += INLINE.findall(FENCE.sub("", text))
    words = (_words(line.removeprefix("$ ")) for line in lines)
    return [call for call in words if call[:1] in (["edgekit"], ["make"])]


def wrong_call(words: list[str]) -> str:
    """Say what is wrong with a call; empty where every command, option or target exists."""
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wrong = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"there is no `make {wrong[0]}`" if wrong else ""
    command: click.Command = cli
    context = click.Context(cli, help_option_names=["-h", "--help"])
    for word in words[1:]:
        if word.startswith("-") and word != "-":
            name = word.partition("=")[0]
            options = {o for p in command.get_params(context) for o in (*p.opts, *p.secondary_opts)}
            if name not in options:
                return f"`{' '.join(words)}`: {command.name} has no option {name}"
        elif isinstance(command, click.Group) and word.islower():
            inner = command.get_command(context, word)
            if inner is None:
                return f"`{' '.join(words)}`: there is no command {word}"
            command = inner
    return ""


def wrong_help(body: str) -> str:
    """Compare a shown help text with the real one; the spacing does not count."""
    call, _, shown = body.partition("\n")
    words = shlex.split(call.removeprefix("$ "))
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    if shown.split() == done.stdout.split():
        return ""
    return f"the help text of `{call.removeprefix('$ ')}` is now:\n{done.stdout}"


def dead_link(path: Path, target: str) -> str:
    """Say that a link to a file of the repository leads nowhere; links elsewhere are not followed."""
    if "://" in target or target.startswith(("#", "mailto:")):
        return ""
    place = path.parent / target.partition("#")[0]
    return "" if place.exists() else f"the link {target} leads nowhere"


def run_blocks(path: Path) -> int:
    """Run the blocks that ask for it, in order, in one scratch folder; return how many there were."""
    blocks = [(language, body) for language, kind, body in blocks_of(path.read_text()) if kind == "run"]
    programs = {"sh": ["bash", "-euxo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory() as scratch:
        for language, body in blocks:
            _stage(Path(scratch))
            command = [*programs[language], body]
            subprocess.run(command, cwd=scratch, env=environment, check=True, timeout=RUN_SECONDS)
    return len(blocks)


def _stage(folder: Path) -> None:
    """Put there what a reader of the README has: the examples, and a photograph of something."""
    import skimage

    shutil.copytree(ROOT / "examples", folder / "examples", dirs_exist_ok=True)
    shutil.copy(Path(skimage.__path__[0]) / "data/chelsea.png", folder / "photo.png")


def _joined(body: str) -> str:
    return body.replace("\\\n", " ")


def _words(line: str) -> list[str]:
    words = shlex.split(line.replace("…", " ").replace("'", '"'), comments=True)
    stop = next((i for i, word in enumerate(words) if word in STOPS), len(words))
    return words[:stop]


if __name__ == "__main__":
    main()
