"""One file a pass: its file name is its name in a recipe, its fields are its options, its `PLUGIN` is the class.

Knows what every pass must be; knows no pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from edgekit.model import Model
    from edgekit.progress import Progress


class CompressionPass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step of a recipe. Subclasses add their options as fields."""

    def apply(self, model: Model, progress: Progress) -> Model:
        """Return a changed copy; never touch the model that came in.

        Raises:
            CompressionError: the pass does not fit the model or its data.
        """
        raise NotImplementedError
