"""Which devices fail again and again, and sit out until somebody lets them go. Values in, values out."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgekit.ota.server.rollout import Rollout

RECENT = 5
"""So many of the last rollouts that reached a device are looked at."""
FAILURES = ("rolled-back", "refused")


def boxed(rollouts: Sequence[Rollout], penalty: int, released: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Name the devices that failed in ``penalty`` of the last five rollouts that reached them; 0: nobody is.

    ``rollouts`` are in the order they were started. One that was halted speaks of the release, not of its devices,
    and does not count. ``released``: up to which rollout a device's failures are forgiven.
    """
    if not penalty:
        return ()
    records: dict[str, list[bool]] = defaultdict(list)
    forgiven = released or {}
    for rollout in rollouts:
        if rollout.status != "halted" and not rollout.halted_by:
            for device, assignment in rollout.assigned.items():
                if assignment.outcome not in ("pending", "none"):
                    records[device].append(assignment.outcome in FAILURES)
        for device in [one for one, last in forgiven.items() if last == rollout.id]:
            records.pop(device, None)
    return tuple(sorted(one for one, row in records.items() if sum(row[-RECENT:]) >= penalty))
