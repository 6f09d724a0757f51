"""``edgekit serve``: a bundle over HTTP until SIGINT or SIGTERM."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edgekit.cli import _listening
from edgekit.cli._terminal import command

if TYPE_CHECKING:
    from edgekit.cli._terminal import Terminal
    from edgekit.runtime.host import Host


@command(short_help="Serve a bundle over HTTP (Open Inference Protocol, OpenAI).")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--variant", help="Variant to serve; by default the one of this hardware.")
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option("--threads", default=0, type=click.IntRange(min=0), help="Threads of the engine; 0: one a core.")
@click.option(
    "--engines",
    type=click.Path(path_type=Path),
    help="Folder of engines built on this device, TensorRT's. [default: ~/.cache/edgekit/engines]",
)
@click.option("--systemd", is_flag=True, help="Print the unit of a service that runs this command, and end.")
@_listening.options
def COMMAND(  # noqa: N802  # the name under which the command line finds it
    terminal: Terminal,
    bundle: Path,
    variant: str | None,
    *,
    threads: int,
    engines: Path | None,
    **listening: Any,  # noqa: ANN401  # as click typed it
) -> None:
    """Serve BUNDLE over HTTP until SIGINT or SIGTERM, then answer what is in flight and stop.

    Open Inference Protocol v2 under /v2, OpenAI's API for language models and embeddings under /v1, pictures and
    texts at /v1/classify, pictures at /v1/detect, and /healthz, /readyz, /metrics; /openapi.json describes all of it.
    Other addresses than loopback want a file of tokens or an authority of certificates.
    """
    if listening.pop("systemd"):
        _tell_unit(terminal)
        return
    import signal

    from edgekit.runtime import engine_cache, load
    from edgekit.runtime.host import Host
    from edgekit.runtime.server import serve

    port = listening.pop("port")
    options = _listening.told(**listening)
    # The server drains on either signal and then raises it again: both end as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    host = Host(load(bundle, variant=variant, threads=threads, engines=engines or engine_cache.default_folder()))
    try:
        serve(host, port, options, on_ready=lambda url: _announce(terminal, host, url))
    except KeyboardInterrupt:
        counted = host.statistics()
        terminal.say(f"stopped after {counted.requests} requests, {counted.errors} failed")


def _tell_unit(terminal: Terminal) -> None:
    """Print a unit with the flags that were typed, their paths made absolute."""
    from edgekit.runtime.server.systemd import unit

    context = click.get_current_context()
    program = shutil.which("edgekit") or str(Path(sys.argv[0]).resolve())
    words, flags = [program, "serve"], []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        typed = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if not typed or parameter.name in ("systemd", "as_json", "quiet", "debug"):
            continue
        text = str(value.resolve()) if isinstance(value, Path) else str(value)
        if isinstance(parameter, click.Argument):
            words.append(text)
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            flags.append(parameter.opts[0])
        else:
            flags += [parameter.opts[0], text]
    made = unit([*words, *flags], f"edgekit serves {context.params['bundle']}")
    terminal.say(made.rstrip())
    terminal.result({"unit": made})


def _announce(terminal: Terminal, host: Host, url: str) -> None:
    session = host.session
    model = session.contract
    terminal.say(f"{model.name} {model.version}, variant {session.variant.name} ({session.choice}), {session.engine}")
    terminal.say(f"ready at {url} (digest {session.digest[:12]}); stop with Ctrl-C")
    terminal.result(
        {
            "url": url,
            "model": model.name,
            "version": model.version,
            "digest": session.digest,
            "variant": session.variant.name,
            "engine": session.engine,
            "choice": session.choice,
        }
    )
