"""``edgekit serve``: a bundle over HTTP until SIGINT or SIGTERM."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from click.core import ParameterSource

from edgekit.cli import _isolating, _listening, _watching
from edgekit.cli._terminal import command

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekit.cli._terminal import Terminal
    from edgekit.runtime.batching import Batching
    from edgekit.runtime.conversations import Room
    from edgekit.runtime.repository import Repository
    from edgekit.runtime.session import Session, TextSession
    from edgekit.runtime.watch import Watch


@command(short_help="Serve a bundle over HTTP (Open Inference Protocol, OpenAI).")
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--variant", help="Variant to serve; by default the one of this hardware.")
@click.option(
    "--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option(
    "--threads",
    default=0,
    type=click.IntRange(min=0),
    help="Threads of the engine; 0: one a core, at most as many as the hardware class has.",
)
@click.option("--profile", help="Hardware class of this machine, by name or .toml file; by default it is detected.")
@click.option(
    "--context",
    default=0,
    type=click.IntRange(min=0),
    help="Tokens of a conversation with a language model; 0: what it was trained for, where memory allows.",
)
@click.option(
    "--engines",
    type=click.Path(path_type=Path),
    help="Folder of engines built on this device, TensorRT's. [default: ~/.cache/edgekit/engines]",
)
@click.option(
    "--memory-budget",
    type=click.FloatRange(0, min_open=True),
    help="MiB that the loaded models may take; who was not asked for the longest makes room. [default: no bound]",
)
@click.option(
    "--batch",
    type=click.IntRange(1, 1024),
    help="Compute so many samples together at most, where that is faster. [default: as the hardware class says]",
)
@click.option(
    "--batch-window",
    type=click.FloatRange(0, 1000),
    help="Milliseconds that a batch may wait for requests that are being prepared. [default: as the class says, or 5]",
)
@click.option("--canary", type=click.Path(path_type=Path), help="Let this bundle answer a part of the requests.")
@click.option(
    "--canary-share",
    default=10.0,
    show_default=True,
    type=click.FloatRange(0, 100),
    help="Which part, in percent; /metrics tells how often both agree.",
)
@click.option("--systemd", is_flag=True, help="Print the unit of a service that runs this command, and end.")
@_isolating.options(default=False)
@_listening.options
@_watching.options
def COMMAND(  # noqa: N802, PLR0913  # the name the frame looks for; one parameter an option
    terminal: Terminal,
    bundles: tuple[Path, ...],
    *,
    engines: Path | None,
    memory_budget: float | None,
    canary: Path | None,
    canary_share: float,
    batch: int | None,
    batch_window: float | None,
    isolate: bool,
    engine_timeout: float | None,
    **flags: Any,  # noqa: ANN401  # as click typed it
) -> None:
    """Serve BUNDLES over HTTP until SIGINT or SIGTERM, then answer what is in flight and stop.

    Open Inference Protocol v2 under /v2, OpenAI's API for language models and embeddings under /v1, pictures and
    texts at /v1/classify, pictures at /v1/detect, and /healthz, /readyz, /metrics; /openapi.json describes all of it.
    With --grpc-port the Open Inference Protocol over gRPC too, for the same clients and within the same limits.
    Other addresses than loopback want a file of tokens or an authority of certificates.
    """
    if flags.pop("systemd"):
        _tell_unit(terminal)
        return
    import signal

    from edgekit.runtime import engine_cache, load
    from edgekit.runtime.server import serve

    port = flags.pop("port")
    loading = {name: flags.pop(name) for name in ("variant", "threads", "context", "profile")}
    options = _listening.told(**flags)
    isolated = _isolating.told(isolate=isolate, engine_timeout=engine_timeout, request_timeout=options.limits.seconds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while the model loads, too, it ends as Ctrl-C does
    built = engines or engine_cache.default_folder()

    def loaded(bundle: Path) -> Session | TextSession:
        return load(bundle, engines=built, isolated=isolated or False, **loading)

    batching = _batching(batch, batch_window, loading)
    if batching:
        options = replace(options, limits=options.limits.for_batches(batching.workers))
    with contextlib.closing(_watching.told(flags)) as watch:
        models = _models(loaded, bundles, (canary, canary_share / 100), (memory_budget, batching, watch))
        serve(models, port, options, on_ready=lambda *urls: _announce(terminal, models, *urls))
    counted = [host.statistics(session.digest) for host in models for session in host.sessions]
    requests, errors = sum(one.requests for one in counted), sum(one.errors for one in counted)
    terminal.say(f"stopped after {requests} requests, {errors} failed")


def _batching(most: int | None, window_ms: float | None, loading: dict[str, Any]) -> Batching | None:
    """Return what the flags say of batches, and what the hardware class says where they do not."""
    from edgekit import device_profiles
    from edgekit.runtime import batching

    name = loading["profile"]
    profile = device_profiles.load(name) if name else device_profiles.detect() or device_profiles.of_format("any")
    said = profile.runtime
    window = said.batch_window_ms if window_ms is None else window_ms
    asked = msgspec.structs.replace(said, batch=said.batch if most is None else most, batch_window_ms=window)
    return batching.of_class(msgspec.structs.replace(profile, runtime=asked), loading["threads"])


def _models(
    loaded: Callable[[Path], Session | TextSession],
    bundles: tuple[Path, ...],
    canary: tuple[Path | None, float],
    bounds: tuple[float | None, Batching | None, Watch],
) -> Repository:
    """Load all bundles, and the canary beside the first."""
    from edgekit.errors import UsageError
    from edgekit.runtime.repository import Repository

    beside, share = canary
    if beside and len(bundles) > 1:
        raise UsageError("--canary stands beside one bundle", f"serve {bundles[0]} with it, the others elsewhere")
    models = Repository(*bounds)
    for bundle in bundles:
        models.add(functools.partial(loaded, bundle))
    if beside:
        models.default.swap(loaded(beside), share=share)
    return models


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
            words += [str(one.resolve()) for one in value or ()]
        elif isinstance(parameter, click.Option) and parameter.is_flag:
            flags.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            flags += [parameter.opts[0], text]
    made = unit([*words, *flags], f"edgekit serves {', '.join(map(str, context.params['bundles']))}")
    terminal.say(made.rstrip())
    terminal.result({"unit": made})


def _announce(terminal: Terminal, models: Repository, url: str, grpc: str) -> None:
    sessions = [session for host in models for session in host.sessions]
    for session in sessions:
        name = f"{session.contract.name} {session.contract.version}"
        terminal.say(f"{name}, variant {session.variant.name} ({session.choice}), {session.engine}")
        room = _room(session)
        if room and room.context:
            kept = f"; {room.cache_mib} MiB keep earlier ones" if room.cache_mib else ""
            terminal.say(f"{room.at_once} conversations at once, {room.context} tokens each{kept}")
        for other, why in session.considered:
            if other != session.variant.name:
                terminal.say(f"not served: variant {other} ({why})")
    digests = ", ".join(session.digest[:12] for session in sessions)
    if grpc:
        terminal.say(f"gRPC at {grpc}")
    terminal.say(f"ready at {url} (digest {digests}); stop with Ctrl-C")
    told = [_told(session) for session in sessions]
    terminal.result({"url": url, "grpc": grpc, **told[0], **({"models": told} if len(told) > 1 else {})})


def _room(session: Session | TextSession) -> Room | None:
    from edgekit.runtime import Session

    return None if isinstance(session, Session) else session.room


def _told(session: Session | TextSession) -> dict[str, Any]:
    room = _room(session)
    return {
        "model": session.contract.name,
        "version": session.contract.version,
        "digest": session.digest,
        "variant": session.variant.name,
        "engine": session.engine,
        "considered": dict(session.considered),
        "choice": session.choice,
        "context": room.context if room else 0,
        "conversations": room.at_once if room else 0,
    }
