"""What "good" means: each metric by name, the numbers it takes from one batch, and how they join to one figure.

A metric turns the answers to a batch into one row of numbers a sample; a figure is made of rows, so that the same
rows give the figure of a class, of a group and of a resample (Efron 1979). Computes no network.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from edgekit.compress.losses import is_language_model, is_scores
from edgekit.datasets import IGNORED, class_axis
from edgekit.errors import CompressionError, InputError, UnknownName, UsageError
from edgekit.sources import invoke, named_object

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgekit.model import Model, Split
    from edgekit.tensors import Array


@dataclass(frozen=True)
class Answers:
    """What a network gave for a split; ``ask`` gives what the reference gives for the same samples."""

    outputs: Mapping[str, Array]
    split: Split
    ask: Callable[[], Mapping[str, Array]]

    @functools.cached_property
    def reference(self) -> Mapping[str, Array]:
        """The outputs of the reference, computed when a metric first wants them."""
        return self.ask()


class Rows(Protocol):
    """From the answers to a batch to an array [samples, numbers]."""

    def __call__(self, answers: Answers) -> Array:
        """Return one row a sample."""
        ...


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A name, a direction, and the rows and their figure.

    ``points``: a share, whose losses are told in points of a hundred. ``positions``: it takes labels that are one a
    position, too. ``rows`` is None for a function of the user (``whole``), which sees all answers at once.
    """

    name: str
    higher_is_better: bool = True
    points: bool = False
    positions: bool = False
    needs: str = ""
    rows: Rows | None = None
    figure: Callable[[Array], float]
    by_class: Callable[[Array], dict[int, float]] | None = None
    whole: Callable[[Mapping[str, Array], Split], float] | None = None


def by_name(name: str) -> Metric:
    """Return a metric by its name, or the user's function ``file.py:name``.

    A function takes the outputs by name and the `Split`, and returns a number. More is better unless it says
    ``name.higher_is_better = False``.

    Raises:
        UnknownName: neither; the nearest names are offered.
        UsageError: the file or the function is not there.
    """
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        raise UnknownName("metric", name, METRICS)
    function = named_object(name)
    upward = bool(getattr(function, "higher_is_better", True))
    return Metric(
        name=name.rpartition(":")[2],
        higher_is_better=upward,
        figure=_mean,
        whole=lambda outputs, split: _number(name, invoke(name, function, dict(outputs), split)),
    )


def choose(name: str | None, model: Model) -> Metric:
    """Return the metric of that name, else the one that fits the model and its data best.

    ``perplexity`` for a language model, ``top1`` where labels are classes that the model scores, ``mse`` where they are
    targets, ``agreement`` for scores of classes without labels, else ``cosine`` to the reference.

    Raises:
        UnknownName: no metric has that name.
        UsageError: the metric needs labels, and neither validation nor test has any, or it needs a language model.
    """
    judged = [] if model.data is None else [s for s in (model.data.validation, model.data.test) if s is not None]
    labels = [split.labels for split in judged if split.labels is not None]
    if name is not None:
        metric = by_name(name)
        if judged and not labels and metric.needs == "labels":
            _refuse_unlabelled(metric)
        if metric.needs == "input_ids" and not is_language_model(model):
            _refuse_wordless(metric, model)
        return metric
    if is_language_model(model):
        return METRICS["perplexity"]
    if labels and labels[0].dtype.kind == "f":
        return METRICS["mse"]
    if not model.outputs:
        return METRICS["top1" if labels else "cosine"]
    if labels:  # more than one number a sample may be what only a function of the user understands
        is_strange = labels[0].ndim > 1 and class_axis(labels[0].shape, model.outputs[0].shape) is None
        return METRICS["cosine" if is_strange else "top1"]
    return METRICS["agreement" if is_scores(model, 0) else "cosine"]


def refuse_unfit(metric: Metric, split: Split) -> None:
    """Raise UsageError where a metric needs what a split has not."""
    labels = split.labels
    if metric.needs == "labels":
        if labels is None or labels.dtype.kind not in "iu":
            _refuse_unlabelled(metric)
        elif labels.ndim != 1 and not metric.positions:
            raise UsageError(
                f"{metric.name} judges one class a sample, the labels of this split are {labels.dtype}"
                f"{list(labels.shape)}",
                "choose top1, which counts positions, or a function of your own: file.py:name",
            )
    if metric.needs == "input_ids" and "input_ids" not in split.inputs:
        raise UsageError(
            f"{metric.name} needs tokens as input_ids, this split has {', '.join(split.inputs)}",
            "choose another metric, or give text",
        )


def _refuse_unlabelled(metric: Metric) -> None:
    raise UsageError(
        f"{metric.name} needs labels, the class of each sample; this split has none",
        "add labels, or choose agreement, cosine or kl, which compare with the uncompressed model",
    )


def _refuse_wordless(metric: Metric, model: Model) -> None:
    raise UsageError(
        f"{metric.name} is for causal language models, {model.name} takes {', '.join(map(str, model.inputs))} and "
        f"gives {', '.join(map(str, model.outputs))}",
        'choose another metric; a language model of your own names its output: Data(…, outputs=("logits",))',
    )


def _number(name: str, value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # whatever a stranger's function returned
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} returned {value!r}, not a number", "return a float") from error
    if not math.isfinite(number):
        raise CompressionError(f"{name} returned {number}", "check what it divides by")
    return number


def _first(outputs: Mapping[str, Array]) -> Array:
    return next(iter(outputs.values()))


def _scores(outputs: Mapping[str, Array]) -> Array:
    scores = _first(outputs)
    if scores.ndim != 2 or not len(scores):
        raise InputError(
            f"the first output has the shape {list(scores.shape)}, not [samples, classes]",
            "choose cosine, mse or kl, or a function of your own",
        )
    return scores


def _top1(answers: Answers) -> Array:
    """Return whether each sample is right, or of its positions that count, how many are and how many those are."""
    import numpy as np

    labels = np.asarray(answers.split.labels)
    if labels.ndim == 1:
        rows: Array = (_scores(answers.outputs).argmax(1) == labels)[:, None]
        return rows
    scores = _first(answers.outputs)
    axis = class_axis(labels.shape, scores.shape)
    if axis is None:
        raise InputError(
            f"the first output has the shape {list(scores.shape)}, no scores of the classes of {list(labels.shape)}",
            "choose cosine, mse or kl, or a function of your own",
        )
    return _tokens(answers, scores.argmax(axis) == labels, labels != IGNORED)


def _top5(answers: Answers) -> Array:
    import numpy as np

    scores, labels = _scores(answers.outputs), answers.split.labels
    if scores.shape[1] <= 5:
        raise InputError(f"the label is always among the five highest of {scores.shape[1]} scores", "choose top1")
    own = np.take_along_axis(scores, np.asarray(labels)[:, None], 1)
    before = np.arange(scores.shape[1]) < np.asarray(labels)[:, None]
    better = (scores > own) | ((scores == own) & before)  # equal scores: the first one wins, as in argmax
    rows: Array = (better.sum(1) < 5)[:, None]
    return rows


def _classes(answers: Answers) -> Array:
    import numpy as np

    return np.stack([np.asarray(answers.split.labels), _scores(answers.outputs).argmax(1)], 1)


def _f1_by_class(rows: Array) -> dict[int, float]:
    """Return 2 hits / (labelled + chosen) of each class that has a label."""
    import numpy as np

    labels, chosen = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64)
    size = int(rows.max()) + 1
    hits = np.bincount(labels[labels == chosen], minlength=size)
    either = np.bincount(labels, minlength=size) + np.bincount(chosen, minlength=size)
    return {int(c): 2 * float(hits[c]) / float(either[c]) for c in np.unique(labels)}


def _macro_f1(rows: Array) -> float:
    found = _f1_by_class(rows).values()
    return sum(found) / len(found)


def _mean(rows: Array) -> float:
    return float(rows[:, 0].mean())


def _ratio(rows: Array) -> float:
    """Return the mean over tokens of rows that hold a sum and its count."""
    return float(rows[:, 0].sum() / max(1, rows[:, 1].sum()))


def _share(rows: Array) -> float:
    return _mean(rows) if rows.shape[1] == 1 else _ratio(rows)


def _tokens(answers: Answers, values: Array, counted: Array | None = None) -> Array:
    """Sum values [samples] or [samples, tokens …] over the tokens that count; add how many those are.

    No padding counts, and nothing outside ``counted``.
    """
    import numpy as np

    mask = np.ones(values.shape, np.float64) if counted is None else counted.astype(np.float64)
    given = answers.split.inputs.get("attention_mask")
    if given is not None and values.ndim == 2 and given.shape == values.shape:
        mask = mask * given
    axes = tuple(range(1, values.ndim))
    return np.stack([(values * mask).sum(axes), mask.sum(axes)], 1)


def _agreement(answers: Answers) -> Array:
    rows: Array = (_scores(answers.outputs).argmax(1) == _scores(answers.reference).argmax(1))[:, None]
    return rows


def _pairs(answers: Answers) -> list[tuple[Array, Array]]:
    """Return what to compare in float64: the first output with targets in labels, else every output with the reference.

    Raises:
        CompressionError: the reference has other outputs.
    """
    import numpy as np

    labels = answers.split.labels
    if labels is not None and labels.dtype.kind == "f":
        found = _first(answers.outputs)
        return [(found.astype(np.float64), labels.reshape(found.shape).astype(np.float64))]
    pairs = []
    for name, output in answers.outputs.items():
        wanted = answers.reference.get(name)
        if wanted is None or wanted.shape != output.shape:
            raise CompressionError(
                f"output {name!r} is {list(output.shape)}, the reference gives "
                f"{None if wanted is None else list(wanted.shape)}",
                "compare models with equal outputs",
            )
        pairs.append((output.astype(np.float64), wanted.astype(np.float64)))
    return pairs


def _errors(answers: Answers, power: int) -> Array:
    import numpy as np

    parts = []
    for found, wanted in _pairs(answers):
        error = np.abs(found - wanted) ** power
        sums = _tokens(answers, error.mean(-1) if error.ndim == 3 else error.reshape(len(error), -1).mean(1))
        parts.append(sums[:, 0] / np.maximum(sums[:, 1], 1))  # nothing but padding: no error, and no 0/0
    rows: Array = np.mean(parts, axis=0)[:, None]
    return rows


def _cosine(answers: Answers) -> Array:
    """Return the cosine of the flattened outputs of each sample, padding left out; 1 for two outputs of zeros."""
    import numpy as np

    mask = answers.split.inputs.get("attention_mask")
    parts = []
    for found, wanted in _pairs(answers):
        weight = mask[..., None] if mask is not None and found.ndim == 3 and mask.shape == found.shape[:2] else 1.0
        left, right = ((array * weight).reshape(len(array), -1) for array in (found, wanted))
        lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
        products = (left * right).sum(1)
        same = (left == right).all(1)
        parts.append(np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1), same))
    rows: Array = np.mean(parts, axis=0)[:, None]
    return rows


def _log_softmax(scores: Array) -> Array:
    import numpy as np

    shifted = scores - scores.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _next_token(answers: Answers) -> Array:
    """Return the negative log-likelihood of each sequence's tokens after its first, and how many those are."""
    import numpy as np

    logits, tokens = _first(answers.outputs), answers.split.inputs["input_ids"]
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape or tokens.shape[1] < 2 or tokens.max() >= logits.shape[2]:
        raise CompressionError(
            f"the first output has the shape {list(logits.shape)}, not [samples, tokens, vocabulary] for tokens "
            f"{list(tokens.shape)} up to {tokens.max()}",
            "perplexity is for causal language models and windows of 2 tokens or more",
        )
    chances = np.take_along_axis(_log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)[..., 0]
    mask = answers.split.inputs.get("attention_mask", np.ones_like(tokens))[:, 1:]
    return np.stack([-(chances * mask).sum(1, dtype=np.float64), mask.sum(1)], 1)


def _perplexity(rows: Array) -> float:
    return math.exp(min(_ratio(rows), 700.0))


def _divergence(answers: Answers) -> Array:
    """Return the sum over tokens of KL(reference || model) of the softmax of the first output, and their count."""
    import numpy as np

    wanted, found = _first(answers.reference), _first(answers.outputs)
    if wanted.shape != found.shape or found.ndim < 2:
        raise CompressionError(
            f"the outputs are {list(found.shape)}, those of the reference {list(wanted.shape)}",
            "compare models with equal outputs [samples, …, classes]",
        )
    wanted, found = _log_softmax(wanted.astype(np.float64)), _log_softmax(found.astype(np.float64))
    return _tokens(answers, (np.exp(wanted) * (wanted - found)).sum(-1))


_ALL = (
    Metric(name="top1", points=True, positions=True, needs="labels", rows=_top1, figure=_share),
    Metric(name="top5", points=True, needs="labels", rows=_top5, figure=_mean),
    Metric(name="f1", points=True, needs="labels", rows=_classes, figure=_macro_f1, by_class=_f1_by_class),
    Metric(name="mse", higher_is_better=False, rows=lambda a: _errors(a, 2), figure=_mean),
    Metric(name="mae", higher_is_better=False, rows=lambda a: _errors(a, 1), figure=_mean),
    Metric(name="cosine", rows=_cosine, figure=_mean),
    Metric(name="agreement", points=True, rows=_agreement, figure=_mean),
    Metric(name="perplexity", higher_is_better=False, needs="input_ids", rows=_next_token, figure=_perplexity),
    Metric(name="kl", higher_is_better=False, rows=_divergence, figure=_ratio),
)
METRICS = {metric.name: metric for metric in _ALL}


def drop(metric: Metric, before: float, after: float) -> float:
    """Return what was lost: positive is worse, in points of a hundred for shares, else in the metric's own unit."""
    lost = before - after if metric.higher_is_better else after - before
    return 100 * lost if metric.points else lost
