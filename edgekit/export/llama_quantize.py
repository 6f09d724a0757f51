"""Lets llama.cpp turn a float GGUF file into its K and IQ types, in a process of its own. Chooses nothing.

llama.cpp writes its log to the process's own streams and may abort: neither reaches whoever asks. Run as a module,
this file is that process.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import deque
from typing import TYPE_CHECKING

from edgekit.errors import ExportError
from edgekit.plugins import extra

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgekit.progress import Progress
    from edgekit.tensors import Array

PRECISIONS = {
    "q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q4_k_m": 15, "q4_k_s": 14, "q3_k_l": 13, "q3_k_m": 12, "q3_k_s": 11,
    "q2_k": 10, "q2_k_s": 21, "iq4_nl": 25, "iq4_xs": 30, "iq3_m": 27, "iq3_s": 26, "iq3_xs": 22, "iq3_xxs": 23,
    "iq2_m": 29, "iq2_s": 28, "iq2_xs": 20, "iq2_xxs": 19, "iq1_m": 31, "iq1_s": 24,
}  # fmt: skip
"""Mixtures that llama.cpp makes, with its number for each (``llama_ftype``)."""
BLIND = frozenset({"q2_k_s", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"})
"""Those that llama.cpp does not make, or makes badly, without an importance matrix."""


def need_llama_cpp() -> None:
    """Look for llama-cpp-python without loading it.

    Raises:
        MissingExtra: it is not installed; gives the command that builds it.
    """
    with extra("llama-cpp"):
        if importlib.util.find_spec("llama_cpp") is None:
            raise ModuleNotFoundError(name="llama_cpp")


def quantize(source: Path, target: Path, precision: str, columns: Mapping[str, Array], *, progress: Progress) -> None:
    """Write ``source``, a GGUF file of floats, as ``target`` in one of `PRECISIONS`.

    ``columns``: the importance of each input column by tensor name; empty for none.

    Raises:
        ExportError: llama.cpp refuses; says its last words.
    """
    import numpy as np

    command = [sys.executable, "-m", __name__, str(source), str(target), str(PRECISIONS[precision])]
    if columns:
        path = target.with_name("importance.npz")
        np.savez(path, allow_pickle=False, **columns)
        command.append(str(path))
    last: deque[str] = deque(maxlen=3)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        for line in child.stdout or ():
            if found := re.search(r"\[\s*(\d+)/\s*(\d+)\]", line):
                progress("quantize tensors with llama.cpp", int(found[1]), int(found[2]))
            elif line.strip():
                last.append(line.strip())
    if columns:
        path.unlink()
    if child.returncode:
        raise ExportError(
            f"llama.cpp does not write {precision}: {'; '.join(last)[-300:] or f'it ended with {child.returncode}'}",
            "give calibration text (--data data.toml), or another --precision",
        )


def _main(source: str, target: str, number: str, importance: str = "") -> int:
    import ctypes

    import llama_cpp
    import numpy as np

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]  # ctypes' own
    def told(level: int, text: bytes, data: object) -> None:
        del level, data
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()

    llama_cpp.llama_log_set(told, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = int(number)
    settings.nthread = len(os.sched_getaffinity(0))
    kept = []
    if importance:
        with np.load(importance, allow_pickle=False) as stored:
            kept = [(name.encode(), np.ascontiguousarray(stored[name], np.float32)) for name in stored.files]
        entry = llama_cpp.llama_cpp.llama_model_imatrix_data
        table = (entry * (len(kept) + 1))()  # the last one, all zero, ends it
        for place, (name, array) in enumerate(kept):
            table[place] = entry(name, array.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), array.size)
        settings.imatrix = ctypes.cast(table, ctypes.POINTER(entry))
    status: int = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings))
    return status


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
