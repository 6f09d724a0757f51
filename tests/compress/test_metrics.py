"""Metrics against what scikit-learn, NumPy and a pencil say, their intervals, and what they refuse."""

import math
from dataclasses import replace

import numpy as np
import pytest
from fakes import digits
from scipy import stats
from sklearn import metrics as known

from edgekit import workload
from edgekit.compress import evaluate, intervals, losses, metrics
from edgekit.errors import CompressionError, UnknownName, UsageError
from edgekit.model import Data, Model, OnnxNetwork, Split
from edgekit.tensors import TensorSpec

torch = pytest.importorskip("torch")


class Given:
    """A network whose answers are its input ``x``, times ``scale``."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def run(self, inputs):
        return {"scores": inputs["x"] * np.float32(self.scale)}


def answers(outputs, labels=None, reference=None, **inputs):
    split = Split(inputs or {"x": outputs}, None if labels is None else np.asarray(labels))
    return metrics.Answers({"y": outputs}, split, lambda: {"y": reference})


def figure(name, *arguments, **more):
    metric = metrics.METRICS[name]
    return metric.figure(metric.rows(answers(*arguments, **more)))


def model_of(scores, labels=None, network=None, **more):
    split = Split({"x": scores}, labels, **more)
    spec = TensorSpec("x", "float32", (-1, *scores.shape[1:]))
    data = Data(split, validation=split)
    task = "tensor" if labels is None else "classification"
    return Model(name="m", task=task, network=network or Given(), inputs=(spec,), outputs=(spec,), data=data)


RANDOM = np.random.default_rng(7)
SCORES = RANDOM.normal(size=(200, 7)).astype(np.float32)
LABELS = np.where(RANDOM.random(200) < 0.6, SCORES.argmax(1), RANDOM.integers(0, 7, 200))
OTHER = SCORES + RANDOM.normal(size=SCORES.shape).astype(np.float32)


# --- figures


def test_shares_are_those_of_scikit_learn():
    assert figure("top1", SCORES, LABELS) == known.accuracy_score(LABELS, SCORES.argmax(1))
    assert figure("top5", SCORES, LABELS) == known.top_k_accuracy_score(LABELS, SCORES, k=5)
    assert figure("f1", SCORES, LABELS) == pytest.approx(known.f1_score(LABELS, SCORES.argmax(1), average="macro"))


def test_a_network_that_collapsed_to_one_value_does_not_have_every_label_among_its_five():
    assert figure("top5", np.zeros((10, 10), np.float32), np.arange(10)) == 0.5


def test_errors_are_taken_to_targets_or_else_to_the_reference():
    assert figure("mse", SCORES, reference=OTHER) == pytest.approx(known.mean_squared_error(OTHER, SCORES))
    assert figure("mae", SCORES, OTHER, reference=None) == pytest.approx(known.mean_absolute_error(OTHER, SCORES))
    assert figure("mae", SCORES[:, :1], OTHER[:, 0], reference=None) == pytest.approx(
        np.abs(SCORES - OTHER)[:, 0].mean()
    )


def test_cosine_is_one_for_the_same_direction_and_for_two_nothings():
    x = np.array([[1, 0], [0, 0], [3, 4]], np.float32)
    y = np.array([[5, 0], [0, 0], [4, -3]], np.float32)
    metric = metrics.METRICS["cosine"]
    np.testing.assert_allclose(metric.rows(answers(x, reference=y))[:, 0], [1, 1, 0], atol=1e-12)


def test_cosine_of_tokens_leaves_the_padding_out():
    x, y = np.ones((1, 3, 2), np.float32), np.ones((1, 3, 2), np.float32)
    y[0, 2] = -100
    mask = np.array([[1, 1, 0]])
    ids = np.zeros((1, 3), np.int64)
    assert figure("cosine", x, reference=y, input_ids=ids, attention_mask=mask) == pytest.approx(1)
    assert figure("mse", x, reference=y, input_ids=ids, attention_mask=mask) == 0
    assert figure("cosine", x, reference=y, input_ids=ids) < 0


def test_perplexity_is_that_of_pytorch_and_leaves_padding_out():
    logits = RANDOM.normal(size=(3, 6, 11)).astype(np.float32)
    ids = RANDOM.integers(0, 11, (3, 6))
    mask = np.array([[1] * 6, [1] * 6, [1, 1, 1, 0, 0, 0]])
    loss = torch.nn.functional.cross_entropy(
        torch.as_tensor(logits)[:, :-1].reshape(-1, 11), torch.as_tensor(ids)[:, 1:].reshape(-1), reduction="none"
    )
    kept = torch.as_tensor(mask)[:, 1:].reshape(-1).bool()
    assert figure("perplexity", logits, input_ids=ids) == pytest.approx(math.exp(loss.mean()), rel=1e-5)
    masked = figure("perplexity", logits, input_ids=ids, attention_mask=mask)
    assert masked == pytest.approx(math.exp(loss[kept].mean()), rel=1e-5)


def test_a_row_of_padding_alone_has_no_error_instead_of_none_at_all():
    x, ids = RANDOM.normal(size=(2, 3, 4)).astype(np.float32), np.zeros((2, 3), np.int64)
    mask = np.array([[1, 1, 0], [0, 0, 0]])
    metric = metrics.METRICS["mse"]
    found = metric.rows(answers(x, reference=x + 2, input_ids=ids, attention_mask=mask))
    np.testing.assert_allclose(found, [[4], [0]], rtol=1e-5)
    assert metrics.METRICS["kl"].figure(np.zeros((3, 2))) == 0


def test_labels_of_positions_are_counted_where_they_say_a_class():
    pictures, masks = RANDOM.normal(size=(6, 5, 4, 3)).astype(np.float32), RANDOM.integers(0, 5, (6, 4, 3))
    assert figure("top1", pictures, masks) == pytest.approx(
        known.accuracy_score(masks.ravel(), pictures.argmax(1).ravel())
    )
    tokens, tags = RANDOM.normal(size=(6, 4, 5)).astype(np.float32), RANDOM.integers(0, 5, (6, 4))
    mask = RANDOM.integers(0, 2, (6, 4))
    given = np.where(RANDOM.random((6, 4)) < 0.3, -100, tags)
    counted = (given >= 0) & (mask == 1)
    wanted = known.accuracy_score(tags[counted], tokens.argmax(-1)[counted])
    ids = np.zeros((6, 4), np.int64)
    assert figure("top1", tokens, given, input_ids=ids, attention_mask=mask) == pytest.approx(wanted)


def test_kl_is_that_of_scipy_and_nothing_to_itself():
    chances = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (OTHER, SCORES)]
    assert figure("kl", SCORES, reference=OTHER) == pytest.approx(stats.entropy(*chances, axis=1).mean(), rel=1e-5)
    assert figure("kl", SCORES, reference=SCORES + 3) == pytest.approx(0, abs=1e-9)


# --- what a judge tells


def test_wilson_is_scipys():
    for hits, samples in ((0, 9), (9, 9), (187, 200), (1, 1)):
        wanted = stats.binomtest(hits, samples).proportion_ci(method="wilson")
        assert intervals.wilson(hits, samples) == pytest.approx((wanted.low, wanted.high), abs=1e-9)


def test_the_bootstrap_holds_the_error_of_a_mean_and_is_the_same_every_time():
    rows = RANDOM.normal(3, 2, (400, 1))
    low, high = intervals.bootstrap(rows, lambda r: float(r.mean()))
    reach = 1.96 * rows.std() / math.sqrt(len(rows))
    assert (low, high) == pytest.approx((rows.mean() - reach, rows.mean() + reach), abs=0.1 * reach)
    assert (low, high) == intervals.bootstrap(rows, lambda r: float(r.mean()))


def test_a_score_tells_its_interval_its_classes_and_its_groups():
    groups = np.where(np.arange(200) < 50, "old", "new")
    model = model_of(SCORES, LABELS, groups=groups)
    model = replace(model, data=replace(model.data, labels=("zero", "one")))
    hits = SCORES.argmax(1) == LABELS
    found = evaluate.judge(model, model, model.data.validation, "top1")
    assert (found.value, found.samples) == (hits.mean(), 200)
    assert (found.low, found.high) == intervals.wilson(hits.sum(), 200)
    assert found.by_group == {"new": hits[50:].mean(), "old": hits[:50].mean()}
    assert list(found.by_class) == ["zero", "one", "2", "3", "4", "5", "6"]
    assert found.by_class["one"] == hits[LABELS == 1].mean()


def test_f1_by_class_is_scikit_learns():
    model = model_of(SCORES, LABELS)
    found = evaluate.judge(model, model, model.data.validation, "f1")
    np.testing.assert_allclose(list(found.by_class.values()), known.f1_score(LABELS, SCORES.argmax(1), average=None))
    assert found.low < found.value < found.high


def test_many_batches_give_what_one_gives():
    model = model_of(SCORES, network=Given(0.5))
    reference = model_of(SCORES)
    found = evaluate.judge(model, reference, reference.data.validation, "mse")
    assert found.value == pytest.approx(float(((SCORES / 2) ** 2).mean()), rel=1e-6)


def test_the_reference_is_computed_once_for_many_models():
    class Counting(Given):
        calls = 0

        def run(self, inputs):
            self.calls += 1
            return super().run(inputs)

    reference = model_of(SCORES, network=Counting())
    judge = evaluate.Judge(reference, reference.data.validation, "cosine")
    for scale in (0.5, 2.0):
        assert judge.score(model_of(SCORES, network=Given(scale))).value == pytest.approx(1)
    assert reference.network.calls == 13, "200 samples in batches of 16"


def test_a_model_is_judged_with_its_plan():
    model, whole = digits.quantized(), digits.model()
    split = whole.data.validation
    assert evaluate.judge(replace(model, plan=None), whole, split, "mse").value < 1e-6
    assert evaluate.judge(model, whole, split, "mse").value > 1e-4
    assert evaluate.score(model, whole, split) == ("top1", evaluate.judge(model, whole, split).value)


def test_figures_are_told_by_the_metric_that_was_asked_for():
    model = digits.model()
    assert set(evaluate.figures(model, model)) == {"parameters", "bytes", "validation_top1"}
    assert evaluate.figures(model, model, "kl")["validation_kl"] == 0


# --- functions of the user


MINE = """
import numpy as np
def spread(outputs, split):
    return float(np.abs(outputs["scores"] - split.inputs["x"]).mean())
spread.higher_is_better = False
def words(outputs, split):
    return "many"
def broken(outputs, split):
    return outputs["nothing"]
def fragile(outputs, split):
    return 1 / (len(np.unique(split.inputs["x"][:, 0])) == len(split))
"""


def mine(tmp_path, name):
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path / 'mine.py'}:{name}"


def test_a_function_of_the_user_is_a_metric_with_direction_interval_and_groups(tmp_path):
    metric = metrics.by_name(mine(tmp_path, "spread"))
    assert (metric.name, metric.higher_is_better) == ("spread", False)
    model = model_of(SCORES, groups=np.array(["a", "b"] * 100), network=Given(3.0))
    found = evaluate.judge(model, model, model.data.validation, metric)
    assert found.value == pytest.approx(2 * np.abs(SCORES).mean(), rel=1e-5)
    assert found.low < found.value < found.high
    assert found.by_group["a"] == pytest.approx(2 * np.abs(SCORES[::2]).mean(), rel=1e-5)


def test_a_function_that_fails_on_a_resample_has_no_interval(tmp_path):
    model = model_of(SCORES)
    found = evaluate.judge(model, model, model.data.validation, mine(tmp_path, "fragile"))
    assert found.value == 1
    assert math.isnan(found.low)


@pytest.mark.parametrize(
    ("name", "message"),
    [("words", "returned 'many', not a number"), ("broken", "failed with KeyError"), ("none", "no function 'none'")],
)
def test_a_function_that_gives_no_number_is_named(tmp_path, name, message):
    model = model_of(SCORES)
    with pytest.raises(UsageError, match=message):
        evaluate.judge(model, model, model.data.validation, mine(tmp_path, name))


# --- the choice


def language(scores=SCORES, *, tokens=8, words=50, highest=49, **more):
    ids = np.full((4, tokens), highest)
    taken, given = TensorSpec("input_ids", "int64", (-1, 8)), TensorSpec("logits", "float32", (-1, 8, words))
    data = Data(Split({"input_ids": ids}))
    return replace(model_of(scores), inputs=(taken,), outputs=(given,), data=data, **more)


def test_the_metric_fits_the_data():
    assert metrics.choose(None, model_of(SCORES, LABELS)).name == "top1"
    assert metrics.choose(None, model_of(SCORES, OTHER)).name == "mse"
    assert metrics.choose(None, model_of(SCORES)).name == "cosine"
    assert metrics.choose(None, replace(model_of(SCORES), task="classification")).name == "agreement"
    assert metrics.choose(None, language()).name == "perplexity"
    masks = model_of(RANDOM.normal(size=(4, 3, 2, 2)).astype(np.float32), np.zeros((4, 2, 2), int))
    assert metrics.choose(None, masks).name == "top1"
    boxes = model_of(SCORES[:4], np.zeros((4, 9, 5), int))
    assert metrics.choose(None, boxes).name == "cosine", "labels that only a function of the user understands"
    named = replace(masks, data=Data(Split(masks.data.calibration.inputs)))
    assert metrics.choose(None, named).name == "cosine", "agreement is for one class a sample"


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (("input_ids", (-1, 8)), ("last_hidden_state", (-1, 8, 50))),
        (("input_ids", (-1, 8)), ("logits", (-1, 8, 49))),
        (("input_ids", (-1, 8)), ("logits", (-1, 9, 50))),
        (("input_ids", (-1, 8)), ("logits", (-1, 50))),
        (("numbers", (-1, 8)), ("logits", (-1, 8, 50))),
    ],
    ids=["states", "tags", "another length", "one answer", "no tokens"],
)
def test_what_only_looks_like_a_language_model_is_none_for_learning_and_for_judging(inputs, outputs):
    specs = TensorSpec(inputs[0], "int64", inputs[1]), TensorSpec(outputs[0], "float32", outputs[1])
    model = replace(language(), inputs=specs[:1], outputs=specs[1:])
    assert losses.is_language_model(language())
    assert not losses.is_language_model(model)
    assert losses.truth_of(model, model.data.calibration) is None
    assert losses.mimicry(model, 1.0, 2.0) == (losses.Matched(1.0, 0),)
    assert metrics.choose(None, model).name == "cosine"
    with pytest.raises(UsageError, match="perplexity is for causal language models") as caught:
        metrics.choose("perplexity", model)
    assert 'outputs=("logits",)' in caught.value.hint


def test_of_a_language_model_only_the_logits_are_scores():
    model = language()
    model = replace(model, outputs=(*model.outputs, TensorSpec("states", "float32", (-1, 8, 4))))
    assert losses.mimicry(model, 1.0, 2.0) == (losses.Softened(0.5, 2.0, 0), losses.Matched(0.5, 1))


def test_an_unknown_metric_offers_the_nearest():
    with pytest.raises(UnknownName) as caught:
        metrics.by_name("perplexitty")
    assert caught.value.hint == "did you mean perplexity?"


@pytest.mark.parametrize("labels", [None, OTHER])
def test_a_metric_of_classes_without_classes_is_refused_with_the_way_out(labels):
    model = model_of(SCORES, labels)
    with pytest.raises(UsageError, match="top1 needs labels") as caught:
        evaluate.judge(model, model, model.data.validation, "top1")
    assert "agreement" in caught.value.hint


def test_what_a_metric_cannot_judge_is_refused():
    model = model_of(SCORES)
    with pytest.raises(UsageError, match="needs tokens as input_ids, this split has x"):
        evaluate.judge(model, model, model.data.validation, metrics.METRICS["perplexity"])
    with pytest.raises(CompressionError, match=r"\[2, 3, 7\], not \[samples, tokens, vocabulary\] .* up to 7"):
        figure("perplexity", SCORES[:6].reshape(2, 3, 7), input_ids=np.array([[1, 2, 7]] * 2))
    images = model_of(np.zeros((4, 3, 3), np.float32))
    with pytest.raises(CompressionError, match=r"cannot be judged: .*\[4, 3, 3\], not \[samples, classes\]"):
        evaluate.judge(images, images, images.data.validation, "agreement")
    with pytest.raises(UsageError, match="no sample to judge"):
        evaluate.judge(model, model, Split({"x": SCORES[:0]}), "cosine")
    with pytest.raises(CompressionError, match=r"the reference gives \[8, 3\]"):
        evaluate.judge(model, replace(model, network=Cut()), Split({"x": SCORES[:8]}), "cosine")


@pytest.mark.parametrize("name", ["top5", "f1"])
def test_a_metric_of_one_class_a_sample_refuses_masks_with_the_way_out(name):
    masks = model_of(RANDOM.normal(size=(4, 9, 2, 2)).astype(np.float32), np.zeros((4, 2, 2), int))
    with pytest.raises(UsageError, match=rf"{name} judges one class a sample, .* int64\[4, 2, 2\]") as caught:
        evaluate.judge(masks, masks, masks.data.validation, name)
    assert "top1" in caught.value.hint
    boxes = model_of(SCORES[:4], np.zeros((4, 9, 5), int))
    with pytest.raises(CompressionError, match=r"no scores of the classes of \[4, 9, 5\]"):
        evaluate.judge(boxes, boxes, boxes.data.validation, "top1")


def test_masks_are_judged_with_an_interval_and_by_group():
    pictures, masks = RANDOM.normal(size=(40, 3, 4, 4)).astype(np.float32), RANDOM.integers(0, 3, (40, 4, 4))
    model = model_of(pictures, masks, groups=np.array(["a", "b"] * 20))
    found = evaluate.judge(model, model, model.data.validation)
    hits = pictures.argmax(1) == masks
    assert (found.metric, found.value) == ("top1", pytest.approx(hits.mean()))
    assert found.low < found.value < found.high
    assert found.by_group["a"] == pytest.approx(hits[::2].mean())
    assert found.by_class == {}


class Cut:
    def run(self, inputs):
        return {"scores": inputs["x"][:, :3]}


def test_a_network_that_gives_nan_cannot_be_judged():
    model = model_of(SCORES)
    with pytest.raises(CompressionError, match="cannot be judged: output 'scores' holds NaN"):
        evaluate.judge(replace(model, network=Given(math.nan)), model, model.data.validation, "cosine")


# --- what is lost, and what is computed


@pytest.mark.parametrize(
    ("name", "before", "after", "lost"),
    [("top1", 0.9, 0.88, 2), ("perplexity", 3.9, 4.4, 0.5), ("cosine", 1, 0.99, 0.01), ("mse", 0.3, 0.2, -0.1)],
)
def test_a_drop_is_positive_where_it_got_worse(name, before, after, lost):
    assert evaluate.drop(metrics.METRICS[name], before, after) == pytest.approx(lost)


def test_multiplications_are_counted_by_hand_in_both_kinds_of_network(tmp_path):
    onnx = pytest.importorskip("onnx")
    stem = 64 * 24 * 9
    near, far = 64 * 24 * 24 * 9, 16 * 48 * 48 * 9
    whole = stem + 2 * near + 16 * 24 * 48 * 9 + 2 * far + 48 * 10
    assert evaluate.macs(digits.model()) == whole
    assert evaluate.macs(workload.load(str(digits.onnx_file()))) == whole
    proto = onnx.load(digits.onnx_file())
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(proto, tmp_path / "four.onnx")
    assert evaluate.macs(replace(model_of(SCORES), network=OnnxNetwork(tmp_path / "four.onnx"))) == whole


def test_tied_weights_are_counted_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(9, 4)
            self.head = torch.nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    model = workload.from_module("tied", Tied(), Data(Split({"ids": np.zeros((2, 3), np.int64)})))
    assert evaluate.parameters(model) == 36
    assert evaluate.macs(model) == 3 * 4 * 9
