"""What an operator asks for: which release, for whom, in which waves, how fast, and when to stop. Values only."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import msgspec

from edgekit.errors import UsageError
from edgekit.manifest import Name
from edgekit.ota.messages import MAX_SPREAD
from edgekit.ota.server import filters
from edgekit.ota.server.judging import Judging
from edgekit.ota.server.pacing import Window

if TYPE_CHECKING:
    from collections.abc import Sequence

Share = float
Amount = int | Share
"""So many devices as an int, or a share of them as a float."""
Version = Annotated[int, msgspec.Meta(ge=0)]


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which release, to which devices, in which waves.

    ``waves`` are cumulative: shares of each stratum, or counts of devices, which come before shares. A stratum is a
    hardware class and what the devices have under the fields ``strata``: each that has devices is in the canary.
    ``max_failures`` is a count over the rollout, or a share of the reached devices of any one class; ``judging`` the
    statistics besides. ``dwell`` is how many seconds a wave that has answered is watched before the next one opens;
    ``spread`` the seconds over which downloads begin.

    ``rate`` is how many devices are asked in a minute, ``growth`` times that after each ``growth_after`` that have
    installed; ``in_flight`` how many are at it at once; 0: no limit. A device that has not answered for ``patience``
    seconds holds up neither a slot nor a wave; 0: it does for ever. ``window``: when devices are asked, by their own
    clock. Devices that failed in ``penalty`` of their last rollouts are skipped; 0: none is. ``back``: the version
    that the reached devices go to after a halt: the old bundle, published anew, as versions only rise; 0: they stay.
    """

    model: Name
    version: Annotated[int, msgspec.Meta(ge=1)]
    profiles: tuple[str, ...]
    waves: tuple[Amount, ...] = (0.2, 1.0)
    max_failures: Amount = 0
    dwell: float = 0.0
    spread: float = 0.0
    where: str = ""
    strata: tuple[str, ...] = ()
    judging: Judging | None = None
    rate: float = 0.0
    growth: float = 1.0
    growth_after: Annotated[int, msgspec.Meta(ge=1)] = 100
    in_flight: Version = 0
    patience: float = 0.0
    window: Window | None = None
    penalty: Version = 0
    back: Version = 0

    def __post_init__(self) -> None:
        """Refuse waves and limits that make no sense."""
        self._require_waves()
        most = 1.0 if isinstance(self.max_failures, float) else math.inf
        if not 0 <= self.max_failures <= most or not 0 <= self.dwell < math.inf:
            raise UsageError(
                f"max_failures {self.max_failures} and dwell {self.dwell} s are no limits",
                "give a count as 2 or a share as 10%, and seconds from 0",
            )
        if not 0 <= self.spread <= MAX_SPREAD:
            raise UsageError(f"downloads cannot begin over {self.spread} s", f"give 0 to {MAX_SPREAD:g} seconds")
        if not self.profiles:
            raise UsageError("the plan reaches no hardware class", "publish the release for at least one")
        if not (0 <= self.rate <= 1e6 and 1 <= self.growth <= 1000 and 0 <= self.patience < math.inf):
            raise UsageError(
                f"rate {self.rate}, growth {self.growth} and patience {self.patience} s are no pace",
                "give devices a minute from 0, a factor from 1 to 1000, and seconds from 0",
            )
        if self.back and self.back <= self.version:
            raise UsageError(
                f"version {self.back} is not above {self.version}, and no device ever goes back",
                "publish the old bundle as a new version, and name that",
            )
        if self.where:
            filters.parse(self.where)
        for field in self.strata:
            filters.require_field(field)

    def _require_waves(self) -> None:
        counts = [wave for wave in self.waves if isinstance(wave, int)]
        shares = [wave for wave in self.waves if isinstance(wave, float)]
        rises = all(0 < low < high for part in (counts, shares) for low, high in pairwise(part))
        begins = all(part[0] > 0 for part in (counts, shares) if part)
        if not rises or not begins or not shares or shares[-1] != 1.0 or self.waves != (*counts, *shares):
            raise UsageError(
                f"waves {self.waves} are no plan", "let them rise and end at 100%, as 20%,100% or 10,100,20%,100%"
            )

    @property
    def is_paced(self) -> bool:
        """Say whether devices are asked one by one, and then only those that are online."""
        return self.rate > 0 or self.in_flight > 0 or self.window is not None

    def release(self, profile: str) -> str:
        """Return the target path of the release for one hardware class."""
        return f"models/{self.model}/{profile}/{self.version}.json"


def told(plan: Plan) -> str:
    """Say a plan's waves as a person writes them: ``20%,100%``."""
    return ",".join(str(wave) if isinstance(wave, int) else f"{100 * wave:.4g}%" for wave in plan.waves)


def amount(text: str | float) -> Amount:
    """Read a count as ``10``, or a share as ``20%`` or ``0.2``.

    Raises:
        UsageError: neither.
    """
    if not isinstance(text, str):
        return text
    number = text.strip()
    try:
        if number.endswith("%"):
            return float(number[:-1]) / 100
        return int(number) if number.isdecimal() else float(number)
    except ValueError as error:
        raise UsageError(f"{text!r} is no share, and no count", "write it as 20%, 0.2 or 10") from error


def amounts(texts: Sequence[str | float]) -> tuple[Amount, ...]:
    """Read waves; a last one of ``1`` is the whole fleet, not one device.

    Raises:
        UsageError: one is neither a count nor a share.
    """
    found = [amount(text) for text in texts]
    return (*found[:-1], 1.0 if found[-1] == 1 else found[-1]) if found else ()
