"""What a device says of itself and of its updates, as messages. Reads the state folder; sends nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import edgekit
from edgekit.ota.device import facts, slots
from edgekit.ota.device.wishes import OWN
from edgekit.ota.messages import Chosen, Failed, Hello, Waiting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.errors import EdgekitError
    from edgekit.ota.device.policy import Hold
    from edgekit.ota.device.update import Device
    from edgekit.ota.messages import Desired


def hello(device: Device, boot: str, revisions: Mapping[str, int], *, online: bool) -> Hello:
    """Say who a device is, what it serves, and the highest revisions that it has met (`Wishes.revisions`)."""
    state = slots.known(device.state)
    current = None if state.dark else state.current
    return Hello(
        device=device.name,
        profile=device.profile,
        boot=boot,
        online=online,
        release=current.path if current else "",
        version=current.version if current else 0,
        bundle=current.bundle if current else "",
        agent=f"edgekit {edgekit.__version__}",
        revision=revisions[OWN],
        groups={name: revision for name, revision in revisions.items() if name != OWN},
        facts=facts.gather(),
    )


def chosen(device: Device) -> Chosen | None:
    """Say which variant runs; None where the fleet's owner did not sign several."""
    state = slots.load(device.state)
    if state.current is None or len(state.current.order) < 2 or state.current.path not in state.choices:
        return None
    choice = state.choices[state.current.path]
    left = {name: why[:500] for name, why in choice.left.items()}
    return Chosen(device=device.name, bundle=state.current.bundle, variant=choice.variant, left=left)


def failed(device: Device, wanted: Desired, error: EdgekitError) -> Failed:
    """Say that an update failed for now."""
    return Failed(
        device=device.name,
        deployment=wanted.deployment,
        attempt=wanted.attempt,
        version=wanted.version,
        reason=error.message[:2000],
    )


def waiting(device: Device, wanted: Desired, held: Hold) -> Waiting:
    """Say that the device's policy holds an update back, and until when."""
    return Waiting(
        device=device.name,
        deployment=wanted.deployment,
        attempt=wanted.attempt,
        version=wanted.version,
        reason=held.reason[:2000],
        until=max(0, round(held.until.timestamp())) if held.until else 0,
    )
