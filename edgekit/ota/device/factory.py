"""The bundle that was shipped with the device: served where nothing else is whole. It is only ever read.

Nobody signed it: it lies in the image, which is trusted as this code is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit import bundle as bundles
from edgekit.errors import BundleError
from edgekit.ota.device.needs import lacks
from edgekit.ota.release import is_of_class

if TYPE_CHECKING:
    from pathlib import Path

    from edgekit.bundle import Bundle
    from edgekit.ota.device.needs import Capabilities


@dataclass(frozen=True)
class Factory:
    """Where the shipped bundle lies, and its digest where somebody wrote that down."""

    folder: Path
    digest: str = ""

    def open(self, profile: str, here: Capabilities | None) -> Bundle:
        """Open the variant of a class that runs here, its own before ``class.…``, and check every byte.

        Raises:
            BundleError: it is damaged, another one than the digest says, or has no variant that runs here.
            UsageError: there is no bundle.
        """
        manifest = bundles.read_manifest(self.folder)
        mine = [one for one in manifest.variants if is_of_class(one.name, profile) and not lacks(one, here)]
        if not mine:
            raise BundleError(f"the factory bundle {self.folder} has no variant of {profile} that runs here")
        best = min(mine, key=lambda one: one.name != profile)
        opened = bundles.read(self.folder, best.name)
        if self.digest and opened.digest != self.digest:
            raise BundleError(f"the factory bundle {self.folder} is {opened.digest[:12]}…, not {self.digest[:12]}…")
        return opened
