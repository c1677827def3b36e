import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.evaluation.metrics import compute_metrics
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.resampling import METRICS, RARE, Aligned


def drawn(seed, n, classes, groups=0, ties=0, signal=1.0):
    """Predictions with a signal; `ties` rounds the logits so that scores are equal."""
    rng = np.random.default_rng(seed)
    y_true = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + signal * np.eye(classes)[y_true]
    logits = np.round(logits * ties) / ties if ties else logits
    names = [f"g{each}" for each in rng.integers(0, groups, n)] if groups else [""] * n
    return Predictions(np.array([f"s{i:04}" for i in range(n)]), np.array(names), y_true, logits)


def repeated(predictions, counts):
    """What one would have with each sample as often as it was drawn."""
    place = np.repeat(np.arange(len(counts)), counts)
    ids = np.arange(len(place)).astype(str)
    return Predictions(ids, np.full(len(place), ""), predictions.y_true[place], predictions.logits[place])


@pytest.mark.slow
@given(st.integers(0, 10_000), st.integers(2, 90), st.integers(2, 6), st.sampled_from([0, 7]), st.sampled_from([0, 2]))
@settings(max_examples=60, deadline=None)
def test_with_every_sample_once_it_is_scikit_learns_metric(seed, n, classes, groups, ties):
    predictions = drawn(seed, n, classes, groups, ties)
    names = [f"c{i}" for i in range(classes)]
    for negative in (None, "c0", "c1"):
        expected = compute_metrics(predictions, names, negative)
        table = Aligned({"a": [predictions]}, None if negative is None else names.index(negative))
        for metric in METRICS:
            (found,) = table.values(metric)["a"]
            if expected[metric] is None:
                assert np.isnan(found), metric
            else:
                assert found == pytest.approx(expected[metric], abs=1e-6), metric


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3, 90])
@pytest.mark.parametrize("groups", [0, 40])
def test_a_replicate_is_scikit_learns_metric_of_what_was_drawn(classes, groups):
    predictions = drawn(1, 400, classes, groups, ties=3)
    table = Aligned({"a": [predictions]})
    ordered = table.runs["a"][0].predictions
    # The mean of these metrics over a replicate's samples gives away how often each unit was drawn.
    units, n_units = table.samples.units, table.samples.n_units
    from zoo.evaluation.resampling import _weights

    strata = np.zeros(n_units, dtype=int)
    (weights,) = _weights(strata, 400, 6, seed=5)
    assert (weights.sum(axis=0) == n_units - 1).all()
    wanted = [metric for metric in METRICS if not table.samples.strata.any() or metric in ("top1", "brier", "ece")]
    found = table.replicates(wanted, 6, seed=5)
    for number in range(6):
        expected = compute_metrics(
            repeated(ordered, weights[units, number].astype(int)), [str(i) for i in range(classes)]
        )
        for metric in wanted:
            seen = found[metric]["a"][number, 0]
            assert (expected[metric] is None and np.isnan(seen)) or seen == pytest.approx(expected[metric], abs=2e-6)


def test_all_recipes_and_seeds_see_the_same_draws():
    one = drawn(0, 200, 3, groups=30)
    found = Aligned({"a": [one, one], "b": [one]}).replicates(METRICS, 50)
    for metric in METRICS:
        assert np.array_equal(found[metric]["a"][:, 0], found[metric]["b"][:, 0], equal_nan=True), metric
        assert np.array_equal(found[metric]["a"][:, 0], found[metric]["a"][:, 1], equal_nan=True), metric


def test_groups_are_drawn_whole():
    # All samples of a group are alike, so every replicate's top1 is a share of groups.
    right = np.repeat(np.arange(20) % 2 == 0, 10)
    groups = np.repeat([f"g{i:02}" for i in range(20)], 10)
    ids = np.array([f"s{i:04}" for i in range(200)])
    one = Predictions(ids, groups, np.zeros(200, int), np.stack([right, ~right], 1) * 1.0)
    found = Aligned({"a": [one]}).replicates(["top1"], 300)["top1"]["a"][:, 0]
    assert np.allclose(found * 19, np.round(found * 19))
    assert len(np.unique(found)) > 5


def test_where_a_class_is_rare_no_replicate_lacks_it():
    y_true = np.array([0] * 150 + [1] * (RARE - 7))
    rng = np.random.default_rng(0)
    ids = np.array([f"s{i:04}" for i in range(len(y_true))])
    one = Predictions(ids, np.full(len(y_true), ""), y_true, rng.normal(size=(len(y_true), 2)))
    table = Aligned({"a": [one]})
    assert table.samples.strata.max() == 1
    found = table.replicates(["auroc", "sensitivity", "balanced_accuracy"], 400)
    assert all(np.isfinite(values["a"]).all() for values in found.values())
    # Plain draws would leave the three out of 4 to 5 % of the replicates.
    plenty = np.array([0] * 150 + [1] * RARE)
    ids = np.array([f"s{i:04}" for i in range(len(plenty))])
    many = Predictions(ids, np.full(len(plenty), ""), plenty, rng.normal(size=(len(plenty), 2)))
    assert not Aligned({"a": [many]}).samples.strata.any()


def test_a_group_of_several_classes_counts_for_its_rarest():
    y_true = np.array([0, 0, 1] + [0] * 30)
    groups = np.array(["p", "p", "p"] + [f"q{i}" for i in range(30)])
    ids = np.array([f"s{i:04}" for i in range(33)])
    table = Aligned({"a": [Predictions(ids, groups, y_true, np.zeros((33, 2)))]})
    of_p = table.samples.units[0]
    assert (table.samples.strata == table.samples.strata[of_p]).sum() == 1


def test_the_jackknife_leaves_one_out():
    one = drawn(4, 60, 2)
    found = Aligned({"a": [one]}).jackknife(["top1"])["top1"]["a"][:, 0]
    right = one.y_pred == one.y_true
    assert sorted(found) == pytest.approx(sorted((right.sum() - right) / 59))
    blocks = Aligned({"a": [drawn(4, 900, 2)]}).jackknife(["auroc"])["auroc"]["a"]
    assert blocks.shape == (200, 1)


def test_draws_do_not_depend_on_which_metrics_are_asked_for():
    table = Aligned({"a": [drawn(0, 300, 3)]})
    alone = table.replicates(["auroc"], 40, seed=2)["auroc"]["a"]
    assert np.array_equal(alone, table.replicates(METRICS, 40, seed=2)["auroc"]["a"])
    assert not np.array_equal(alone, table.replicates(["auroc"], 40, seed=3)["auroc"]["a"])


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(ZooError, match=r"metric must be one of top1, .*Got 'macro_f2'; did you mean 'macro_f1'"):
        Aligned({"a": [drawn(0, 10, 2)]}).values("macro_f2")
    wider = drawn(0, 10, 2)
    wider = Predictions(wider.sample_ids, wider.groups, wider.y_true, np.zeros((10, 3)))
    with pytest.raises(ZooError, match="runs of different classes cannot be compared: recipe 'b' has 3 logits"):
        Aligned({"a": [drawn(0, 10, 2)], "b": [wider]})
