"""Suspends coverage inside converters: minutes of Python that is not ours, and twice as slow while it is watched."""

import functools
import sys

CONVERTERS = {
    "torch.export": ("export", "ExportedProgram.run_decompositions"),
    "torch.onnx": ("export",),
    "litert_torch": ("convert",),
    "coremltools": ("convert",),
    "executorch.exir": ("to_edge_transform_and_lower", "EdgeProgramManager.to_executorch"),
    "onnxscript.optimizer": ("fold_constants", "remove_unused_nodes"),
    "matplotlib.figure": ("Figure.savefig",),
    "ai_edge_quantizer.quantizer": ("Quantizer.calibrate", "Quantizer.quantize"),
}
"""What takes long, by module. None of it calls back into edgekit, but for the forward pass of a network's wrapper."""


def suspend():
    """Wrap those that are imported by now; does nothing where nothing watches."""
    if sys.gettrace() is None:
        return
    for module, names in CONVERTERS.items():
        for name in names:
            *path, last = name.split(".")
            place = functools.reduce(lambda whole, part: getattr(whole, part, None), path, sys.modules.get(module))
            known = getattr(place, last, None)
            if known is not None and not hasattr(known, "unobserved"):
                setattr(place, last, _unobserved(known))


def _unobserved(converter):
    @functools.wraps(converter)
    def converted(*arguments, **options):
        watcher = sys.gettrace()
        sys.settrace(None)
        try:
            return converter(*arguments, **options)
        finally:
            sys.settrace(watcher)

    converted.unobserved = True
    return converted
