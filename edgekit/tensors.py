"""What a tensor is called, holds and measures. Imports no NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

DYNAMIC = -1
"""A dimension that may have any size, as a rule the batch."""


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output of a model: ``dtype`` by its NumPy name, ``-1`` for a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Say whether an array of that shape fits."""
        if len(shape) != len(self.shape):
            return False
        for want, got in zip(self.shape, shape, strict=True):  # noqa: SIM110  # all() costs every request 1 us more
            if want not in (got, DYNAMIC):
                return False
        return True

    def __str__(self) -> str:
        sizes = ", ".join("?" if n == DYNAMIC else str(n) for n in self.shape)
        return f"{self.name}: {self.dtype}[{sizes}]"
