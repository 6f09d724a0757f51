"""Runs bundles on the device: `load` gives a session. Imports no engine before it is needed, nor torch."""

from edgekit.runtime.opening import load, open_variant
from edgekit.runtime.session import Contract, Session, TextSession

__all__ = ["Contract", "Session", "TextSession", "load", "open_variant"]
