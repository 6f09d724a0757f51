"""Puts tests/ on the import path, so that every test may use what lies in tests/fakes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
