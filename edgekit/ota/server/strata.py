"""How the devices of a wave are spread over what a fleet is made of. Values in, values out.

A stratum is a hardware class and what its devices have under the plan's fields (a region, a runtime's version): each
that has devices is in the canary, for the fault that only one of them shows is else met in the last wave.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgekit.ota.server.filters import values_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.ota.server.fleet import DeviceState
    from edgekit.ota.server.plan import Amount, Plan

Stratum = tuple[str, ...]


def stratum_of(device: DeviceState, plan: Plan) -> Stratum:
    """Return the stratum of a device: its class, then a text a field."""
    return (device.profile, *(",".join(values_of(device, field)) for field in plan.strata))


def quotas(amount: Amount, sizes: Mapping[Stratum, int]) -> dict[Stratum, int]:
    """Return how many devices of each stratum a wave reaches: rounded up for shares, at least one for counts.

    A count is spread in proportion, what is left over to those that lose most by rounding; where there are more strata
    than the count it is raised to one each.
    """
    if isinstance(amount, float):
        return {one: math.ceil(amount * size - 1e-9) for one, size in sizes.items()}
    total = sum(sizes.values())
    if amount >= total:
        return dict(sizes)
    exact = {one: amount * size / total for one, size in sizes.items()}
    found = {one: max(1, math.floor(part)) if sizes[one] else 0 for one, part in exact.items()}
    left = amount - sum(found.values())
    by_loss = sorted(exact, key=lambda one: (found[one] - exact[one], one))
    for one in by_loss:
        if left > 0 and found[one] < sizes[one]:
            found[one] += 1
            left -= 1
    return found
