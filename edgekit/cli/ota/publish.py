"""``edgekit ota publish``: sign a bundle as the next version of a model."""

from __future__ import annotations

from pathlib import Path

import click

from edgekit.cli._terminal import Terminal, command


@command(name="publish")
@click.argument("fleet", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", help="The line of versions it belongs to. [default: the bundle's name]")
@click.option("--version", type=click.IntRange(1), help="[default: the last one plus one]")
@click.option("--target", "targets", multiple=True, help="Hardware class, repeatable. [default: all verified ones]")
@click.option("--max-p95-ms", type=click.FloatRange(0, min_open=True), help="Roll back above this 95th percentile.")
@click.option(
    "--max-error-rate",
    type=click.FloatRange(0, 1),
    default=0.02,
    show_default=True,
    help="Roll back above this share of failed requests.",
)
@click.option("--min-agreement", type=click.FloatRange(0, 1), help="Roll back if old and new model agree less often.")
@click.option(
    "--probation-requests", type=click.IntRange(0), default=20, show_default=True, help="Watch so many live requests …"
)
@click.option(
    "--probation-seconds", type=click.FloatRange(0), default=30.0, show_default=True, help="… but no longer than this."
)
@click.option("--allow-unverified", is_flag=True, help="Also sign variants that were neither run nor evaluated.")
def COMMAND(  # noqa: N802, PLR0913  # the name the frame looks for; one parameter an option
    terminal: Terminal,
    *,
    fleet: Path,
    bundle: Path,
    model: str | None,
    version: int | None,
    targets: tuple[str, ...],
    max_p95_ms: float | None,
    max_error_rate: float,
    min_agreement: float | None,
    probation_requests: int,
    probation_seconds: float,
    allow_unverified: bool,
) -> None:
    """Sign BUNDLE as the next version of its model, one release per hardware class."""
    import msgspec

    from edgekit import bundle as bundles
    from edgekit.cli.ota._fleet import now
    from edgekit.ota.release import Limits
    from edgekit.ota.server import publisher

    limits = Limits(
        max_p95_ms=max_p95_ms,
        max_error_rate=max_error_rate,
        min_agreement=min_agreement,
        probation_requests=probation_requests,
        probation_seconds=probation_seconds,
    )
    releases = publisher.publish(
        fleet,
        bundles.read(bundle),
        now=now(),
        model=model,
        version=version,
        profiles=list(targets) or None,
        limits=limits,
        allow_unverified=allow_unverified,
    )
    first = releases[0]
    terminal.table(
        ("model", "version", "hardware class", "bundle"),
        [(r.model, r.version, r.profile, r.bundle[:12]) for r in releases],
    )
    terminal.say(f"next: edgekit ota rollout start {fleet} {first.model} {first.version}")
    terminal.result({"releases": [msgspec.to_builtins(r) for r in releases]})
