from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.deployment.answers import answers_of, check_sample, heat_of
from zoo.deployment.bundle import Conformal, Refer, Rules
from zoo.deployment.rules import fit_rules
from zoo.errors import ZooError
from zoo.evaluation.calibration import apply_temperature, prediction_sets
from zoo.evaluation.predictions import Predictions

CLASSES = ["benign", "malignant", "normal"]


def scored(n: int = 400, seed: int = 0) -> Predictions:
    draw = np.random.default_rng(seed)
    y_true = draw.integers(0, 3, n)
    logits = 2 * np.eye(3)[y_true] + draw.normal(0, 1.2, (n, 3))
    ids = np.arange(n).astype(str)
    return Predictions(ids, ids, y_true, logits)


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_what_the_evaluation_measured(seed):
    val, test = scored(seed=seed), scored(200, seed + 10)
    rules = fit_rules(val, CLASSES, "normal")
    answers = answers_of(test.logits, CLASSES, rules, "normal")
    scaled = apply_temperature(test, rules.temperature)
    np.testing.assert_allclose([list(each.scores.values()) for each in answers], scaled.y_score, rtol=1e-6)
    assert [each.label for each in answers] == [CLASSES[place] for place in test.y_pred]
    held = prediction_sets(scaled.y_score, rules.conformal.quantile, rules.conformal.method)
    assert [each.prediction_set for each in answers] == [[CLASSES[at] for at in np.flatnonzero(row)] for row in held]
    referred = [each.refer for each in answers]
    assert 0 < sum(referred) < len(referred)
    assert referred == (scaled.y_score.max(axis=1) < rules.refer.threshold).tolist()
    assert all(("is below" in each.refer_reason) if each.refer else each.refer_reason is None for each in answers)
    disease = 1 - scaled.y_score[:, 2]
    for name, point in rules.operating_points.items():
        assert [each.points[name] for each in answers] == (disease >= point["threshold"]).tolist()


def test_without_rules_scores_are_the_plain_softmax_and_nothing_is_referred():
    (answer,) = answers_of(np.array([[1.0, 0.0, 0.0]], np.float32), CLASSES, Rules())
    assert answer.scores["benign"] == pytest.approx(math.e / (math.e + 2))
    assert (answer.prediction_set, answer.refer, answer.refer_reason, answer.points) == ([], False, None, None)


def test_a_val_that_was_too_small_puts_every_class_in_and_refers_every_image():
    rules = Rules(
        conformal=Conformal(method="aps", coverage=0.9, quantile=None), refer=Refer(threshold=None, max_error=0.05)
    )
    (answer,) = answers_of(np.array([[90.0, 0, 0]], np.float32), CLASSES, rules)
    assert answer.prediction_set == CLASSES
    assert answer.refer and answer.refer_reason == (
        "val has no 20 images that could be answered with an error of 5 % or less: every image is referred"
    )


def test_the_reason_tells_two_confidences_apart_that_round_alike():
    score = answers_of(np.array([[0.2, 0.0, 0.1]]), CLASSES, Rules())[0].scores["benign"]
    rules = Rules(refer=Refer(threshold=score + 1e-6, max_error=0.025))
    reason = answers_of(np.array([[0.2, 0.0, 0.1]]), CLASSES, rules)[0].refer_reason
    one, other = (word for word in reason.replace(",", "").split() if word.startswith("0."))
    assert one < other and reason.endswith("from which on val's error was 2.5 % or less")
    exactly = Rules(refer=Refer(threshold=score, max_error=0.05))
    assert not answers_of(np.array([[0.2, 0.0, 0.1]]), CLASSES, exactly)[0].refer


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3), st.floats(0.05, 20))
def test_scores_are_a_distribution_and_the_label_is_of_the_highest_logit(row, temperature):
    logits = np.array([row], np.float32)
    (answer,) = answers_of(logits, CLASSES, Rules(temperature=temperature))
    scores = list(answer.scores.values())
    assert answer.label == CLASSES[int(logits[0].argmax())]
    assert sum(scores) == pytest.approx(1) and min(scores) >= 0 and answer.scores[answer.label] == max(scores)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_of_logits_that_are_not_finite_nothing_is_said(odd):
    with pytest.raises(ZooError, match="the network's answer is not finite"):
        answers_of(np.array([[0, odd, 1]], np.float32), CLASSES, Rules())


def test_heat_is_evidence_for_the_class_scaled_to_one():
    maps = np.random.default_rng(2).normal(size=(4, 3, 5, 6)).astype(np.float32)
    maps[3] = -1
    heat = heat_of(maps, [0, 1, 2, 0])
    assert heat.shape == (4, 5, 6) and heat.min() == 0
    assert heat.max(axis=(1, 2)).tolist() == [1, 1, 1, 0]
    beyond = maps[1, 1] - maps[1].mean(axis=0)
    np.testing.assert_allclose(heat[1], np.maximum(beyond, 0) / beyond.max(), rtol=1e-5)
    np.testing.assert_allclose(heat_of(maps + 7, [0, 1, 2, 0])[:3], heat[:3], atol=1e-5)  # softmax is blind to it


def test_a_sample_may_differ_by_rounding_alone():
    expected = np.array([10.0, -2, 0])
    check_sample(expected + 0.009, expected, 1e-3, "b")
    check_sample(expected / 100 + 0.0009, expected / 100, 1e-3, "b")  # logits below 1 count as 1
    for wrong in (expected + 0.02, np.full(3, math.nan), np.array([math.inf, -2, 0])):
        with pytest.raises(ZooError, match=r"bundle 'b' says something else of its sample here.*export it"):
            check_sample(wrong, expected, 1e-3, "b")
    with pytest.raises(ZooError, match="something else"):
        check_sample(expected, [math.nan, -2, 0], 1e-3, "b")
    with pytest.raises(ZooError, match=r"2 logits of its sample stand in bundle.json and its network gives 3"):
        check_sample(expected, expected[:2], 1e-3, "b")
