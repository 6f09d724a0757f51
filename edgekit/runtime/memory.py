"""How much memory this process holds. Knows no model."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_PAGES = Path("/proc/self/statm")


def rss_mib() -> float:
    """Return the resident memory in MiB; its peak where the system does not tell the present."""
    try:
        return int(_PAGES.read_bytes().split()[1]) * resource.getpagesize() / (1 << 20)
    except OSError:
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
