"""From a detector's outputs to objects in the picture: boxes, scores, suppression, and the way back."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from fakes import bundles, detector
from fakes.requests_to import ask
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import edgekit
from edgekit.cli.inspect import COMMAND as INSPECT
from edgekit.cli.run import COMMAND as RUN
from edgekit.errors import HealthError, InputError
from edgekit.manifest import Detection, ImagePreprocess
from edgekit.pictures import placed
from edgekit.runtime import detection
from edgekit.runtime.host import Host
from edgekit.runtime.server import serve_in_thread
from edgekit.tensors import TensorSpec

PLAIN = Detection(boxes="boxes", scores="scores", score_threshold=0.1)


def objects(how, boxes, scores=None, side=100):
    outputs = {how.boxes: np.asarray([boxes], np.float32)}
    if scores is not None:
        outputs[how.scores] = np.asarray([scores], np.float32)
    return detection.objects(outputs, how, side, (None,))[0]


def plain(found):
    return [(one.label, round(one.score, 4), tuple(round(number, 3) for number in one.box)) for one in found]


def by_onnx(boxes, scores, threshold):
    """Suppress by ONNX Runtime's own operator: per class, boxes as corners."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    inputs = [helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, None, 4]),
              helper.make_tensor_value_info("s", TensorProto.FLOAT, [1, None, None])]  # fmt: skip
    limits = [
        helper.make_tensor("m", TensorProto.INT64, [1], [1000]),
        helper.make_tensor("t", TensorProto.FLOAT, [1], [threshold]),
    ]
    node = helper.make_node("NonMaxSuppression", ["b", "s", "m", "t"], ["o"])
    graph = helper.make_graph(
        [node], "nms", inputs, [helper.make_tensor_value_info("o", TensorProto.INT64, [None, 3])], limits
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"b": boxes[None], "s": scores[None]})[0]


@given(st.integers(1, 60), st.integers(0, 10_000), st.sampled_from([0.2, 0.45, 0.7]))
@settings(max_examples=60, deadline=None)
def test_suppression_keeps_what_onnx_runtimes_operator_keeps(count, seed, threshold):
    chance = np.random.default_rng(seed)
    corner, size = chance.random((count, 2)) * 60, chance.random((count, 2)) * 40 + 1
    boxes = np.concatenate([corner, corner + size], 1).astype(np.float32)
    best = np.sort(chance.random(count).astype(np.float32))[::-1]
    groups = chance.integers(0, 3, count)
    scores = np.zeros((3, count), np.float32)
    scores[groups, np.arange(count)] = best
    wanted = {int(box) for _, group, box in by_onnx(boxes, scores, threshold) if groups[box] == group}
    assert set(detection.suppress(boxes.astype(np.float64), groups, threshold)) == wanted


def test_the_best_of_overlapping_boxes_of_a_class_stays():
    boxes = [[10, 10, 30, 30], [12, 10, 32, 30], [60, 60, 80, 80], [11, 10, 31, 30]]
    scores = [[0.9, 0.0], [0.8, 0.0], [0.3, 0.0], [0.0, 0.7]]
    found = plain(objects(PLAIN, boxes, scores))
    assert found == [("0", 0.9, (10, 10, 30, 30)), ("1", 0.7, (11, 10, 31, 30)), ("0", 0.3, (60, 60, 80, 80))]
    anyone = plain(objects(Detection(boxes="boxes", scores="scores", class_agnostic=True), boxes, scores))
    assert [box for _, _, box in anyone] == [(10, 10, 30, 30), (60, 60, 80, 80)]
    everyone = objects(Detection(boxes="boxes", scores="scores", iou_threshold=1.0), boxes, scores)
    assert len(everyone) == 4


@pytest.mark.parametrize(
    ("box_format", "box"),
    [("xyxy", [10, 20, 40, 60]), ("yxyx", [20, 10, 60, 40]), ("xywh", [10, 20, 30, 40]), ("cxcywh", [25, 40, 30, 40])],
)
@pytest.mark.parametrize("normalized", [False, True])
def test_every_format_of_boxes_means_the_same_box(box_format, box, normalized):
    how = Detection(boxes="boxes", scores="scores", box_format=box_format, normalized=normalized)
    found = objects(how, [np.array(box) / (100 if normalized else 1)], [[0.5]])
    assert plain(found) == [("0", 0.5, (10, 20, 40, 60))]


def test_one_output_may_hold_box_objectness_and_classes():
    row = [10, 20, 40, 60, 0.8, 0.1, 0.5]
    how = Detection(boxes="all", scores="all", objectness=True, labels=("cat", "dog"), score_threshold=0.3)
    assert plain(objects(how, [row])) == [("dog", 0.4, (10, 20, 40, 60))]
    across = Detection(boxes="all", scores="all", objectness=True, labels=("cat", "dog"), channels_first=True)
    assert plain(objects(across, np.array([row]).T)) == [("dog", 0.4, (10, 20, 40, 60))]


def test_scores_before_their_softmax_or_sigmoid_are_shares_afterwards():
    soft = Detection(boxes="boxes", scores="scores", activation="softmax", background=True, labels=("cat", "dog"))
    scores = np.log([[0.1, 0.2, 0.7], [0.9, 0.06, 0.04]])
    assert plain(objects(soft, [[0, 0, 9, 9], [50, 50, 60, 60]], scores)) == [("dog", 0.7, (0, 0, 9, 9))]
    sigmoid = Detection(boxes="boxes", scores="scores", activation="sigmoid")
    assert plain(objects(sigmoid, [[0, 0, 9, 9]], [[np.log(3)]])) == [("0", 0.75, (0, 0, 9, 9))]
    assert plain(objects(sigmoid, [[0, 0, 9, 9]], [[-1e4]])) == []


def test_objectness_has_a_sigmoid_of_its_own_beside_the_classes_softmax():
    """As in YOLOv2 (Redmon and Farhadi 2016): how sure of an object, times which class if there is one."""
    row = [10, 20, 40, 60, 4.0, 6.0, 1.0, 1.0]
    how = Detection(boxes="all", scores="all", objectness=True, activation="softmax")
    share = np.exp(6) / (np.exp(6) + 2 * np.exp(1)) / (1 + np.exp(-4))
    assert plain(objects(how, [row])) == [("0", round(float(share), 4), (10, 20, 40, 60))]


def test_objects_beside_the_picture_take_nobodys_place():
    _, placement = placed(bundles_png((64, 32)), ImagePreprocess(input="i", resize=32, crop=32, fit="pad", mode="L"))
    outputs = {"boxes": np.array([[[2, 1, 20, 6], [8, 12, 24, 20.0]]]), "scores": np.array([[[0.9], [0.8]]])}
    how = Detection(boxes="boxes", scores="scores", max_detections=1)
    (found,) = detection.objects(outputs, how, 32, (placement,))
    assert plain(found) == [("0", 0.8, (16, 8, 48, 24))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("cat",)}, "are of 2 classes, detection names 1"),
        ({"labels": ("cat", "dog"), "background": True}, "are of 1 classes, detection names 2"),
        ({"activation": "none"}, r"go from -1 to 7, shares from 0 to 1"),
    ],
)
def test_a_detector_that_is_described_wrongly_is_refused(changes, message):
    outputs = {"boxes": np.zeros((1, 1, 4)), "scores": np.array([[[7.0, -1.0]]])}
    given = {"boxes": "boxes", "scores": "scores", "activation": "sigmoid", "labels": ("cat", "dog")}
    detection.refuse_misread(outputs, Detection(**given))
    with pytest.raises(HealthError, match=message):
        detection.refuse_misread(outputs, Detection(**{**given, **changes}))


def test_at_most_so_many_objects_are_told_the_best_ones():
    how = Detection(boxes="boxes", scores="scores", max_detections=2, score_threshold=0.0)
    boxes = [[10 * i, 0, 10 * i + 5, 5] for i in range(6)]
    assert [one.score for one in objects(how, boxes, [[i / 8] for i in range(6)])] == [0.625, 0.5]


def test_a_network_gone_wild_is_read_in_seconds():
    how = Detection(boxes="boxes", scores="scores", score_threshold=0.0, iou_threshold=1.0)
    chance = np.random.default_rng(0)
    found = objects(how, chance.random((30_000, 4)) * [50, 50, 50, 50] + [0, 0, 50, 50], chance.random((30_000, 5)))
    assert len(found) == how.max_detections


@pytest.mark.parametrize(
    ("boxes", "scores", "message"),
    [
        ([[np.nan, 0, 1, 1]], [[0.5]], "NaN"),
        ([[0, 0, 1, 1]], [[np.inf]], "NaN"),
        ([[0, 0, 1]], [[0.5]], r"'boxes' \[1, 1, 3\] and 'scores' \[1, 1, 1\] are no boxes"),
        ([[0, 0, 1, 1]], [[0.5], [0.5]], "are no boxes and scores"),
        ([0, 0, 1, 1], [[0.5]], "are no boxes and scores"),
    ],
)
def test_outputs_that_are_no_boxes_are_told(boxes, scores, message):
    with pytest.raises(HealthError, match=message):
        objects(PLAIN, boxes, scores)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(120, 80), (50, 90), (64, 64), (1, 40)])
def test_a_box_comes_back_to_where_its_pixels_came_from(fit, size):
    how = ImagePreprocess(input="image", resize=32, crop=32, fit=fit, mode="L", interpolation="nearest")
    tensor, placement = placed(bundles_png(size), how)
    assert tensor.shape == (1, 1, 32, 32)
    picture = np.array(gradient(size))
    boxes = np.array([[[x, y, x + 1, y + 1] for x in range(32) for y in range(32)]], np.float64)
    plan = Detection(boxes="boxes", scores="scores", score_threshold=0.0, iou_threshold=1.0, max_detections=1024)
    outputs = {"boxes": boxes, "scores": np.linspace(1, 0.5, 1024)[None, :, None]}
    found = detection.objects(outputs, plan, 32, (placement,))[0]
    number = {one.score: one.box for one in found}
    inside = 0
    for index, score in enumerate(outputs["scores"].ravel()):
        box = number.get(score)
        if box is None:  # padding: nothing of the picture
            continue
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        around = picture[max(0, int(y) - 2) : int(y) + 3, max(0, int(x) - 2) : int(x) + 3]
        value = tensor[0, 0, index % 32, index // 32]
        assert around.min() <= value <= around.max()
        inside += 1
    assert inside >= 32


def gradient(size):
    width, height = size
    values = np.add.outer(np.arange(height) % 100, np.arange(width)) % 250
    return Image.fromarray(values.astype(np.uint8))


def bundles_png(size):
    import io

    file = io.BytesIO()
    gradient(size).save(file, "PNG")
    return file.getvalue()


def test_padding_is_filled_and_the_whole_picture_is_there():
    how = ImagePreprocess(input="image", resize=32, crop=32, fit="pad", fill=77, mode="RGB")
    tensor, placement = placed(bundles_png((64, 32)), how)
    assert (tensor[0, :, :8] == 77).all()
    assert (tensor[0, :, 24:] == 77).all()
    assert (placement.size, placement.scale, placement.offset) == ((64, 32), (0.5, 0.5), (0.0, 8.0))


def test_a_thread_of_a_picture_is_refused_before_it_becomes_gigabytes():
    with pytest.raises(InputError, match="shorter side cannot become 4096"):
        placed(bundles_png((2000, 1)), ImagePreprocess(input="image", resize=4096, crop=8, mode="L"))


ROWS = [[8, 8, 24, 24, 0.9, 0.1], [9, 8, 25, 24, 0.8, 0.1], [0, 0, 8, 8, 0.1, 0.6]]


CATS = Detection(boxes="y", scores="y", labels=("cat", "dog"), score_threshold=0.5)


def sealed(folder, rows=ROWS, how=CATS):
    """Seal a detector without a network: three boxes for any picture."""
    picture = ImagePreprocess(input="image", resize=32, crop=32, fit="stretch", mode="L")
    told = {"preprocess": picture, "detection": how, "outputs": (TensorSpec("y", "float32", (-1, 3, 6)),)}
    return bundles.constant_bundle(folder, np.array(rows, np.float32), task="detection", **told)


def test_program_server_and_command_line_tell_the_same_objects(tmp_path):
    digest = sealed(tmp_path / "b").digest
    picture = tmp_path / "p.png"
    picture.write_bytes(bundles_png((64, 128)))
    wanted = [("cat", [16.0, 32.0, 48.0, 96.0]), ("dog", [0.0, 0.0, 16.0, 32.0])]
    with edgekit.load(tmp_path / "b") as session:
        found = session.detect(picture.read_bytes())
        assert [(one.label, list(one.box)) for one in found] == wanted
        unplaced = session.objects(session.run(session.picture_inputs(picture.read_bytes())))
        assert unplaced[0][1].box == (0.0, 0.0, 8.0, 8.0)
        with pytest.raises(InputError, match="gives no labels"):
            session.run_raw(picture.read_bytes())
        outputs = session.run(session.picture_inputs(picture.read_bytes()))
        with pytest.raises(InputError, match="1 samples have 2 placements"):
            session.objects(outputs, [session.placed(picture.read_bytes())[1]] * 2)
        with pytest.raises(InputError, match="output 'y' too"):
            session.objects({})
    host = Host(edgekit.load(tmp_path / "b"))
    with serve_in_thread(host) as running:
        status, _, body = ask(running.url, "POST", "/v1/detect", picture.read_bytes())
        answer = json.loads(body)
        assert (status, answer["digest"]) == (200, digest)
        assert [(one["label"], one["box"]) for one in answer["objects"]] == wanted
        assert ask(running.url, "POST", "/v1/detect", b"nothing")[0] == 400
        assert ask(running.url, "POST", "/v1/classify", picture.read_bytes())[0] == 400
    host.close()
    shown = CliRunner().invoke(RUN, [str(tmp_path / "b"), str(picture)])
    assert "| cat   | 90.0% | 16.0, 32.0, 48.0, 96.0   |" in shown.output
    told = json.loads(CliRunner().invoke(RUN, [str(tmp_path / "b"), str(picture), "--json"]).output)
    assert [(one["label"], one["box"]) for one in told["objects"]] == wanted
    described = CliRunner().invoke(INSPECT, [str(tmp_path / "b")]).output
    assert "stretched to 32 x 32" in described
    assert "objects of 2 labels, from y as xyxy, scores from 0.5, overlap (IoU) up to 0.45, at most 100" in described


def test_a_model_that_finds_no_objects_says_so(tmp_path):
    bundles.brightness_bundle(tmp_path / "b")
    with edgekit.load(tmp_path / "b") as session, pytest.raises(InputError, match="finds no objects"):
        session.detect(detector.scene())


OTHER_BOX = [[0, 0, 9, 9, 0.6, 0.1], *ROWS[1:]]
OTHER_LABEL = [[8, 8, 24, 24, 0.1, 0.9], *ROWS[1:]]
NOTHING = [[*row[:4], 0.1, 0.1] for row in ROWS]


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [(ROWS, OTHER_BOX, 3), (ROWS, OTHER_LABEL, 0), (ROWS, NOTHING, 0), (NOTHING, NOTHING, 3)],
)
def test_two_detectors_agree_where_their_best_object_is_of_one_kind(tmp_path, old, new, same):
    for name, rows in (("old", old), ("new", new)):
        sealed(tmp_path / name, rows)
    host = Host(edgekit.load(tmp_path / "old"))
    host.swap(edgekit.load(tmp_path / "new"), shadow=True)
    for _ in range(3):
        host.detect(bundles_png((64, 64)))
    agreement = host.end_shadow()
    host.close()
    assert (agreement.samples, agreement.same, agreement.skipped) == (3, same, 0)


def test_each_detector_is_read_by_its_own_manifest(tmp_path):
    """The new one has its classes in another order and gives numbers before the sigmoid, and sees the same."""
    sealed(tmp_path / "old")
    rows = np.array(ROWS)
    swapped = np.concatenate([rows[:, :4], np.log(rows[:, :3:-1] / (1 - rows[:, :3:-1]))], 1)
    how = Detection(boxes="y", scores="y", labels=("dog", "cat"), score_threshold=0.5, activation="sigmoid")
    sealed(tmp_path / "new", swapped, how)
    host = Host(edgekit.load(tmp_path / "old"))
    host.swap(edgekit.load(tmp_path / "new"), shadow=True)
    assert host.detect(bundles_png((64, 64)))[0][0].label == "cat"
    agreement = host.end_shadow()
    host.close()
    assert (agreement.samples, agreement.same) == (1, 1)
