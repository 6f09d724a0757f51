"""Walks once through a network with all calibration samples, in float and as planned side by side.

At each weighted layer a visitor sees what the layer takes in both worlds, and may answer with a new weight or bias,
which the planned world uses from there on: so a later layer learns what the earlier ones did to its inputs
(Nagel et al. 2020, "Up or Down?", section 4). Costs two passes, however many layers there are.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

from edgekit.compress import graph, onnx_layers, rounding
from edgekit.compress.layer import Change, Layer
from edgekit.compress.layers import layers, layers_of
from edgekit.errors import CompressionError
from edgekit.model import OnnxNetwork, TorchNetwork, whole_batches
from edgekit.plugins import extra
from edgekit.workload import trace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from edgekit.model import Model, Split
    from edgekit.plan import QuantizationPlan
    from edgekit.progress import Progress


class Visit(Protocol):
    """Called at each weighted layer in execution order, once for each weight."""

    def __call__(self, layer: Layer, floats: Sequence[torch.Tensor], planned: Sequence[torch.Tensor]) -> Change | None:
        """Take the inputs of the layer in float and as planned, batch by batch; answer with what shall change."""
        ...


class Step(Protocol):
    """One node: which values it takes, which it makes, and how. ``layer`` where it multiplies with a weight."""

    name: str
    sources: tuple[str, ...]
    makes: tuple[str, ...]
    layer: Layer | None
    is_fused_away: bool

    def compute(self, values: dict[str, Any]) -> list[Any]:
        """Compute what the node makes from what lies in ``values``."""
        ...


def walk(model: Model, samples: Split, visit: Visit, progress: Progress, *, what: str = "walk") -> dict[str, Change]:
    """Visit every weighted layer of a model; return the changes by the names of the weights.

    The planned world rounds weights and activations by the model's plan, if it has one.

    Raises:
        CompressionError: a network that cannot be walked through (control flow, a language model without data).
    """
    with extra("compress"):
        import torch
    whole, size = whole_batches(model, samples)
    steps, ends = steps_of(model)
    worlds = [_World(batch.inputs, model.plan) for batch in whole.batches(size)]
    uses = Counter(name for step in steps for name in step.sources) + Counter(ends)
    changes: dict[str, Change] = {}
    seen: set[str] = set()
    with torch.no_grad():
        for done, step in enumerate(steps):
            if step.layer is not None and step.layer.weight not in seen:
                seen.add(step.layer.weight)
                progress(what, done, len(steps))
                change = visit(
                    step.layer, [w.floats[step.layer.source] for w in worlds], [w.input_of(step) for w in worlds]
                )
                if change is not None:
                    changes[step.layer.weight] = change
            for world in worlds:
                world.advance(step, changes)
            for name in step.sources:
                uses[name] -= 1
                if not uses[name]:
                    for world in worlds:
                        world.forget(name)
    progress(what, len(steps), len(steps))
    return changes


class _World:
    """One batch of samples, in float and as planned."""

    def __init__(self, inputs: Any, plan: QuantizationPlan | None) -> None:  # noqa: ANN401  # arrays by input name
        import torch

        self._plan = plan
        self.floats: dict[str, Any] = {name: torch.as_tensor(array) for name, array in inputs.items()}
        # copies, for what one world writes in place must not reach the other
        self.planned = {name: self._rounded(name, value.clone()) for name, value in self.floats.items()}

    def input_of(self, step: Step) -> torch.Tensor:
        """Return what a weighted step takes as planned: rounded at this moment where the plan is dynamic."""
        layer = step.layer
        if layer is None:
            raise CompressionError(f"{step.name!r} has no weight")
        value: torch.Tensor = self.planned[layer.source]
        if self._plan and self._plan.scheme == "dynamic" and layer.weight in self._plan.weights:
            return rounding.round_dynamically(value)
        return value

    def advance(self, step: Step, changes: dict[str, Change]) -> None:
        """Compute a step in both worlds."""
        for name, value in zip(step.makes, step.compute(self.floats), strict=True):
            self.floats[name] = value
        if step.layer is None:
            made = step.compute(self.planned)
        else:
            made = [self._weighted(step, step.layer, changes.get(step.layer.weight, Change()))]
        for name, value in zip(step.makes, made, strict=True):
            self.planned[name] = value if step.is_fused_away else self._rounded(name, value)

    def forget(self, name: str) -> None:
        """Free a value that no later step takes."""
        self.floats.pop(name, None)
        self.planned.pop(name, None)

    def _weighted(self, step: Step, layer: Layer, change: Change) -> torch.Tensor:
        import torch

        values = change.values
        if values is None:
            values = rounding.planned_weight(layer, self._plan)
        offsets = layer.offsets if change.offsets is None else change.offsets
        return layer.compute(
            self.input_of(step), torch.as_tensor(values), None if offsets is None else torch.as_tensor(offsets)
        )

    def _rounded(self, name: str, value: Any) -> Any:  # noqa: ANN401  # a graph holds numbers beside tensors
        limits = self._plan.activations.get(name) if self._plan else None
        return value if limits is None else rounding.round_value(value, limits)


def steps_of(model: Model) -> tuple[list[Step], list[str]]:
    """Return the steps of a network and the names of what it gives.

    Raises:
        CompressionError: a language model without data, whose network is not at hand, or a node that branches.
    """
    if isinstance(model.network, OnnxNetwork):
        return list(onnx_layers.steps_of(model.network.proto(), layers(model))), [o.name for o in model.outputs]
    if not isinstance(model.network, TorchNetwork):
        raise CompressionError(
            f"{model.name} has no network to walk through", "give the Hugging Face folder with --data"
        )
    module = trace(model).module(check_guards=False)
    places = module.graph.find_nodes(op="placeholder")
    public = {node.name: spec.name for node, spec in zip(places, model.inputs, strict=True)}
    found = {layer.node: layer for layer in layers_of(module, public)}
    nodes = [n for n in module.graph.nodes if n.op in ("call_function", "get_attr", "call_module")]
    ends = [public.get(n.name, n.name) for n in module.graph.output_node().all_input_nodes]
    return [_TorchStep(module, n, found.get(n.name), public) for n in nodes if _is_needed(n)], ends


def writes_in_place(step: Step) -> bool:
    """Say whether a step changes a value that it takes; no node of ONNX does."""
    return isinstance(step, _TorchStep) and step.is_writing


def _is_needed(node: torch.fx.Node) -> bool:
    return node.op != "call_module"  # torch.export's guard checks compute nothing


class _TorchStep:
    """A node of a traced graph."""

    def __init__(
        self, module: torch.fx.GraphModule, node: torch.fx.Node, layer: Layer | None, public: dict[str, str]
    ) -> None:
        self._module, self._node, self._public = module, node, public
        self.name = node.name
        self.sources = tuple(public.get(n.name, n.name) for n in node.all_input_nodes)
        self.makes: tuple[str, ...] = (node.name,)
        self.layer = layer
        self.is_fused_away = graph.is_fused_away(node)
        self.is_writing = bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))

    def compute(self, values: dict[str, Any]) -> list[Any]:
        from torch.fx.node import map_arg

        if self._node.op == "get_attr":
            owner, _, leaf = str(self._node.target).rpartition(".")
            return [getattr(self._module.get_submodule(owner), leaf)]
        fetch: Callable[[Any], Any] = lambda node: values[self._public.get(node.name, node.name)]  # noqa: E731  # map_arg wants a callable
        args, kwargs = map_arg(self._node.args, fetch), map_arg(self._node.kwargs, fetch)
        return [self._node.target(*args, **kwargs)]  # type: ignore[operator]  # a call_function node
