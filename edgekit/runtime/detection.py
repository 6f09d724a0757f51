"""From a detector's boxes and scores to objects in the picture. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekit.errors import HealthError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgekit.manifest import Detection
    from edgekit.pictures import Placement
    from edgekit.tensors import Array

MAX_CANDIDATES = 4096
"""So many of the best are compared with each other: a network gone wild must not take minutes."""

ROUNDING = 1e-3


@dataclass(frozen=True)
class Detected:
    """One object: its label, its score from 0 to 1, and its box as left, top, right, bottom in pixels."""

    label: str
    score: float
    box: tuple[float, float, float, float]


def objects(
    outputs: Mapping[str, Array], how: Detection, side: int, placements: tuple[Placement | None, ...]
) -> list[list[Detected]]:
    """Return the objects of each sample, best first; ``side`` is that of the network's square input in pixels.

    Boxes are in pixels of the picture where its placement is told, cut at its edges, else of the input.

    Raises:
        HealthError: a score or a box is NaN or infinite, or an output has another shape than the manifest says.
    """
    boxes, scores = _candidates(outputs, how)
    pairs = zip(boxes, scores, placements, strict=True)
    return [_of_sample(box, score, how, _Frame(side, placement)) for box, score, placement in pairs]


def refuse_misread(outputs: Mapping[str, Array], how: Detection) -> None:
    """Raise HealthError where a detector's outputs are other than the manifest says: shapes, classes, shares."""
    shares = _shares(_candidates(outputs, how)[1], how)
    if how.labels and len(how.labels) != shares.shape[-1]:
        raise HealthError(
            f"the scores {how.scores!r} are of {shares.shape[-1]} classes, detection names {len(how.labels)}",
            "name every class but the background, and say background and objectness where there are such numbers",
        )
    if shares.size and not -ROUNDING <= float(shares.min()) <= float(shares.max()) <= 1 + ROUNDING:
        raise HealthError(
            f"the scores {how.scores!r} go from {shares.min():.3g} to {shares.max():.3g}, shares from 0 to 1",
            'say activation = "sigmoid" or "softmax" in detection',
        )


def surest(outputs: Mapping[str, Array], how: Detection) -> Array:
    """Return of each sample the class of its surest candidate, how sure it is, and how many count: float64 [batch, 3].

    The class is -1 where none counts. Candidates that overlap are not suppressed.

    Raises:
        HealthError: a score or a box is NaN or infinite, or an output has another shape than the manifest says.
    """
    import numpy as np

    shares = _shares(_candidates(outputs, how)[1], how)
    best = shares.max(-1)
    count = (best >= how.score_threshold).sum(1)
    if not best.shape[1]:
        return np.stack([count - 1, count, count], 1).astype(np.float64)
    classes = shares.reshape(len(shares), -1).argmax(1) % shares.shape[-1]
    return np.stack([np.where(count, classes, -1), best.max(1), count], 1)


@dataclass(frozen=True)
class _Frame:
    """From the network's input back to the picture."""

    side: int
    placement: Placement | None

    def back(self, boxes: Array) -> Array:
        import numpy as np

        if self.placement is None:
            return np.asarray(np.clip(boxes, 0, self.side))
        scale, offset = (np.array(pair * 2) for pair in (self.placement.scale, self.placement.offset))
        return np.asarray(np.clip((boxes - offset) / scale, 0, np.array(self.placement.size * 2)))


def _candidates(outputs: Mapping[str, Array], how: Detection) -> tuple[Array, Array]:
    """Return boxes [batch, candidates, 4] and scores [batch, candidates, classes] in float64, as they came."""
    import numpy as np

    boxes, scores = (np.asarray(outputs[name], np.float64) for name in (how.boxes, how.scores))
    if how.channels_first and boxes.ndim == scores.ndim == 3:
        boxes, scores = boxes.transpose(0, 2, 1), scores.transpose(0, 2, 1)
    if how.boxes == how.scores:
        boxes, scores = boxes[..., :4], scores[..., 4:]
    least = 1 + how.objectness + how.background
    if boxes.ndim != 3 or boxes.shape[-1] != 4 or scores.shape[:-1] != boxes.shape[:-1] or scores.shape[-1] < least:
        names = dict.fromkeys((how.boxes, how.scores))
        shapes = " and ".join(f"{name!r} {list(outputs[name].shape)}" for name in names)
        raise HealthError(f"{shapes} are no boxes and scores of candidates", "check detection in the manifest")
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise HealthError(f"the boxes {how.boxes!r} or the scores {how.scores!r} hold NaN or infinity")
    return boxes, scores


def _of_sample(boxes: Array, scores: Array, how: Detection, frame: _Frame) -> list[Detected]:
    import numpy as np

    shares = _shares(scores, how)
    classes = shares.argmax(1)
    best = shares[np.arange(len(shares)), classes]
    order = np.argsort(-best, kind="stable")[:MAX_CANDIDATES]
    order = order[best[order] >= how.score_threshold]
    corners = _corners(boxes[order], how) * (frame.side if how.normalized else 1)
    groups = np.zeros(len(order)) if how.class_agnostic else classes[order]
    kept = suppress(corners, groups, how.iou_threshold)
    numbers, sure = classes[order][kept].tolist(), best[order][kept].tolist()
    found = [
        Detected(how.labels[number] if number < len(how.labels) else str(number), score, tuple(box))
        for number, score, box in zip(numbers, sure, frame.back(corners[kept]).tolist(), strict=True)
        if box[0] < box[2] and box[1] < box[3]  # else it lies beside the picture
    ]
    return found[: how.max_detections]


def _shares(scores: Array, how: Detection) -> Array:
    """Return how sure each candidate is of each class, both on the last axes: [..., candidates, classes]."""
    import numpy as np

    sure, scores = (scores[..., :1], scores[..., 1:]) if how.objectness else (None, scores)
    if how.activation == "softmax":
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        scores = powers / powers.sum(-1, keepdims=True)
    elif how.activation == "sigmoid":
        scores = _sigmoid(scores)
    if sure is not None:
        scores = (sure if how.activation == "none" else _sigmoid(sure)) * scores
    return scores[..., 1:] if how.background else scores


def _sigmoid(values: Array) -> Array:
    import numpy as np

    return np.asarray(0.5 * (1 + np.tanh(0.5 * values)))  # which overflows nowhere


def _corners(boxes: Array, how: Detection) -> Array:
    """Return boxes as left, top, right, bottom."""
    import numpy as np

    if how.box_format == "xyxy":
        return boxes
    if how.box_format == "yxyx":
        return boxes[:, [1, 0, 3, 2]]
    corner = boxes[:, :2] - boxes[:, 2:] / 2 if how.box_format == "cxcywh" else boxes[:, :2]
    return np.concatenate([corner, corner + boxes[:, 2:]], 1)


def suppress(boxes: Array, groups: Array, iou_threshold: float) -> list[int]:
    """Return which boxes stay, given best first as left, top, right, bottom.

    A box leaves where one that stays, of its group, overlaps it by more than ``iou_threshold``: their intersection by
    their union.
    """
    import numpy as np

    areas = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    left = np.arange(len(boxes))
    kept: list[int] = []
    while len(left):
        first, left = left[0], left[1:]
        kept.append(int(first))
        corner, far = np.maximum(boxes[first, :2], boxes[left, :2]), np.minimum(boxes[first, 2:], boxes[left, 2:])
        common = np.prod(np.maximum(far - corner, 0), axis=1)
        union = np.maximum(areas[first] + areas[left] - common, np.finfo(np.float64).tiny)
        left = left[(common <= iou_threshold * union) | (groups[left] != groups[first])]
    return kept
