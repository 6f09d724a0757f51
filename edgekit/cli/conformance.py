"""``edgekit conformance``: ask any server whether it speaks the protocols as they are specified."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgekit.cli._terminal import command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgekit.cli._terminal import Terminal
    from edgekit.runtime.conformance import Check

VERDICTS = {True: "yes", False: "NO", None: "not asked"}


@command(short_help="Ask any server whether it speaks the protocols.")
@click.argument("url")
@click.option("--model", default="", help="Model to ask; by default the first that the server names.")
@click.option("--token", envvar="EDGEKIT_TOKEN", default="", help="Bearer token. [env: EDGEKIT_TOKEN]")
def COMMAND(terminal: Terminal, *, url: str, model: str, token: str) -> None:  # noqa: N802  # the name under which the command line finds it
    """Ask the server at URL whether it speaks the Open Inference Protocol v2 and OpenAI's API.

    Both are asked where they are answered at all: what should work, and what should be refused. grpc://HOST:PORT and
    grpcs://HOST:PORT ask for the former over gRPC. The exit code is 1 where one does not hold, or none is asked.
    """
    found = []
    for number, check in enumerate(_checks(url, model, token)):
        terminal.progress(check.what, number, 0)
        found.append(check)
    rows = [(one.protocol, one.what, VERDICTS[one.holds], " ".join(one.told.split())[:100]) for one in found]
    terminal.table(("protocol", "check", "holds", "what came"), rows)
    asked = [one.holds for one in found if one.holds is not None]
    terminal.say(f"\n{sum(asked)} of {len(asked)} checks hold")
    listed = [{"protocol": c.protocol, "check": c.what, "holds": c.holds, "told": c.told} for c in found]
    terminal.result({"url": url, "checks": listed, "held": sum(asked), "asked": len(asked)})
    if not asked or not all(asked):
        click.get_current_context().exit(1)


def _checks(url: str, model: str, token: str) -> Iterator[Check]:
    if url.startswith(("grpc://", "grpcs://")):
        from edgekit.runtime import conformance_grpc

        return conformance_grpc.run(url, model, token)
    from edgekit.runtime import conformance

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return conformance.run(conformance.Server(url, headers), model)
