"""What two models have to answer to be alike: each kind by what its callers read of it."""

import numpy as np
import pytest
from fakes.bundles import brightness_bundle, mlp_bundle

import edgekit
from edgekit.manifest import Classification
from edgekit.runtime import comparison
from edgekit.runtime.comparison import Agreement, Comparison
from edgekit.tensors import TensorSpec


def same(one, other):
    return comparison._same_choices(np.array(one, np.float32), np.array(other, np.float32))


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ([[5.0]], [[-100.0]], 0),  # one number has one place: the largest is always there
        ([[100.0]], [[96.0]], 1),
        ([[100.0]], [[94.0]], 0),
        ([[0.0]], [[0.0]], 1),
        ([5.0, 3.0, 1.0], [-1e9, 3.1, 1.0], 2),  # a number a sample, without an axis for it
        (4.0, 4.1, 1),
        (4.0, 40.0, 0),
    ],
)
def test_one_number_agrees_with_one_that_is_near(one, other, alike):
    assert same(one, other) == (np.array(one).size, alike)


def test_classes_agree_where_the_largest_score_is_in_the_same_place():
    assert same([[1, 2], [3, 1], [0, 9]], [[5, 6], [1, 3], [8, 9]]) == (3, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_agrees_with_no_answer(bad):
    assert same([[1, 2]], [[0, bad]]) == (1, 0)
    assert same([[1.0]], [[bad]]) == (1, 0)
    assert same([[1, bad]], [[0, bad]]) == (1, 1)  # a caller that sends NaN gets it from both


def test_another_shape_or_no_such_output_agrees_with_nothing():
    assert same([[1, 2]], [[1, 2, 3]]) == (1, 0)
    assert comparison._same_choices(None, np.ones((3, 2))) == (3, 0)
    assert same(np.ones((0, 2)), np.ones((0, 2))) == (0, 0)


def test_vectors_agree_by_their_direction_whatever_their_largest_number_is():
    one = np.array([[1.0, 0.99, 0.0], [1.0, 0.0, 0.0], [1.0, 0.5, 0.2]], np.float32)
    other = np.array([[0.99, 1.0, 0.0], [0.8, 0.6, 0.0], [-1.0, -0.5, -0.2]], np.float32)
    assert comparison._same_directions(one, other) == (3, 1)
    assert comparison._same_directions(one, other[:, :2]) == (3, 0)


def test_classifiers_are_compared_by_the_output_that_has_the_labels(tmp_path):
    made = mlp_bundle(tmp_path / "a")
    session = edgekit.load(made.folder)
    first = {"noise": np.ones((1, 3)), "scores": np.array([[1.0, 9.0]])}
    assert session.contract.postprocess == Classification(output="scores", labels=tuple("abcdefghij"), top_k=3)
    second = {"noise": np.eye(3)[:1], "scores": np.array([[9.0, 1.0]])}
    assert comparison._same((session, first), (session, second), {}) == (1, 0)
    session.close()


def test_a_model_that_takes_no_such_request_has_failed_on_it(tmp_path):
    one, other = edgekit.load(mlp_bundle(tmp_path / "a").folder), edgekit.load(brightness_bundle(tmp_path / "b").folder)
    assert other.contract.inputs[0] != TensorSpec("image", "float32", (-1, 64))
    compared, inputs = Comparison(), {"image": np.zeros((1, 64), np.float32)}
    compared.compare((one, one.run(inputs)), other, inputs)
    assert compared.settled(30) == Agreement(skipped=1, failed=1)
    assert compared.finish() == compared.settled(30)  # also after its end
    one.close(), other.close()
