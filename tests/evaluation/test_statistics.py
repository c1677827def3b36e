import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtri
from scipy.stats import binomtest, bootstrap

from zoo.errors import ZooError
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.statistics import (
    affordable_metrics,
    metric_intervals,
    paired_comparisons,
    paired_letters,
    paired_p_values,
    top1_interval,
    wilson_interval,
)


def run(correct, groups=None, ids=None):
    """Predictions of two classes that are right where `correct` is 1."""
    correct = np.asarray(correct, dtype=np.float64)
    ids = np.array([f"s{i:05}" for i in range(len(correct))]) if ids is None else np.array(ids)
    groups = np.full(len(ids), "") if groups is None else np.array(groups)
    return Predictions(ids, groups, np.zeros(len(ids), int), np.stack([correct, 1 - correct], 1))


def correlated(rng, p, n_groups, size, runs=1, share=0.7, seed_sd=0.0):
    """Runs with a true top1 of p whose errors go together within groups, by a probit model."""
    groups = np.repeat([f"g{i}" for i in range(n_groups)], size)
    hard = np.sqrt(share) * np.repeat(rng.normal(size=n_groups), size)
    scale = np.sqrt(1 + seed_sd**2)
    return [
        run(
            (hard + np.sqrt(1 - share) * rng.normal(size=n_groups * size) + seed_sd * rng.normal()) / scale < ndtri(p),
            groups,
        )
        for _ in range(runs)
    ]


# Wilson ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_is_that_of_the_published_examples(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 3000), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
@settings(max_examples=100, deadline=None)
def test_wilson_is_that_of_scipy(n, part, confidence):
    correct = round(part * n)
    expected = binomtest(correct, n).proportion_ci(confidence, method="wilson")
    low, high = wilson_interval(correct, n, confidence)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= correct / n <= high <= 1


@pytest.mark.parametrize("arguments", [(1, 0), (3, 2), (-1, 2), (1, 2, 1.0), (float("nan"), 2)])
def test_wilson_refuses_what_is_no_proportion(arguments):
    with pytest.raises(ZooError, match="an interval needs 0 <= correct <= n"):
        wilson_interval(*arguments)


# The interval of top1 -------------------------------------------------------------------------------------------------


def test_one_run_of_independent_samples_has_wilsons_interval():
    assert top1_interval([run([1] * 15 + [0] * 5)]) == wilson_interval(15, 20)
    each_alone = [f"g{i}" for i in range(20)]
    assert top1_interval([run([1] * 15 + [0] * 5, each_alone)]) == wilson_interval(15, 20)


def test_the_same_seed_gives_the_same_interval():
    runs = correlated(np.random.default_rng(0), 0.8, 30, 5, runs=3)
    assert top1_interval(runs) == top1_interval(runs)
    assert top1_interval(runs) != top1_interval(runs, seed=1)
    assert top1_interval(runs, seed=1) == pytest.approx(top1_interval(runs), abs=0.01)


def test_the_variance_is_that_of_the_mean_over_groups():
    # Groups of one size: the bootstrap must agree with the textbook variance of a mean of group means.
    rng = np.random.default_rng(3)
    (one,) = correlated(rng, 0.7, 60, 5)
    means = (one.y_pred == one.y_true).reshape(60, 5).mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(60)
    low, high = top1_interval([one], replicates=20_000)
    assert high - low == pytest.approx(2 * 2.0 * error, rel=0.03)  # t of 59 degrees: 2.00


def test_copies_of_a_sample_in_its_group_add_no_certainty():
    rng = np.random.default_rng(0)
    right = rng.random(80) < 0.8
    groups = [f"g{i}" for i in range(80)]
    alone = top1_interval([run(right, groups)])
    copied = top1_interval([run(np.repeat(right, 10), np.repeat(groups, 10))], replicates=20_000)
    assert copied == pytest.approx(alone, abs=0.01)


def test_seeds_that_differ_widen_the_interval():
    # Three seeds with the same score, and three with the same mean that lie far apart.
    rng = np.random.default_rng(0)

    def at(p):
        return run(rng.permutation(np.arange(400) < 400 * p))

    close, apart = [at(0.8), at(0.8), at(0.8)], [at(0.7), at(0.8), at(0.9)]
    width_close, width_apart = (high - low for low, high in map(top1_interval, (close, apart)))
    assert width_apart > 1.5 * width_close


@pytest.mark.parametrize("runs", [1, 3])
def test_all_right_is_not_certain(runs):
    perfect = [run([1] * 40, np.repeat([f"g{i}" for i in range(8)], 5)) for _ in range(runs)]
    assert top1_interval(perfect) == wilson_interval(8, 8)
    wrong = [run([0] * 40, np.repeat([f"g{i}" for i in range(8)], 5)) for _ in range(runs)]
    assert top1_interval(wrong) == wilson_interval(0, 8)


def test_one_group_alone_says_next_to_nothing():
    low, high = top1_interval([run([1, 1, 0, 1], ["p"] * 4)])
    assert high - low > 0.7
    assert low < 0.75 < high


@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 6), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_the_interval_holds_the_score_and_stays_in_bounds(seed, n_groups, size, runs):
    rng = np.random.default_rng(seed)
    made = correlated(rng, rng.uniform(0.05, 0.95), n_groups, size, runs)
    low, high = top1_interval(made, replicates=200)
    top1 = np.mean([each.y_pred == each.y_true for each in made])
    assert 0 <= low <= top1 + 1e-12
    assert top1 - 1e-12 <= high <= 1


def coverage(interval, draw, truth, simulations):
    hits = 0
    for number in range(simulations):
        low, high = interval(draw(np.random.default_rng(number)))
        hits += low <= truth <= high
    return hits / simulations


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.7, 0.85, 0.95])
def test_of_200_independent_samples_it_covers_what_it_says(p):
    def draw(rng):
        return [run(rng.random(200) < p)]

    assert 0.91 <= coverage(top1_interval, draw, p, 300) <= 0.985


@pytest.mark.slow
def test_with_seeds_it_covers_what_it_says():
    def draw(rng):
        return correlated(rng, 0.85, 200, 1, runs=3, share=0.6, seed_sd=0.15)

    assert 0.91 <= coverage(lambda runs: top1_interval(runs, replicates=400), draw, 0.85, 300) <= 0.995


@pytest.mark.slow
def test_in_groups_wilson_claims_too_much_and_the_bootstrap_does_not():
    def draw(rng):
        return correlated(rng, 0.8, 40, 10)

    def naive(runs):
        return wilson_interval((runs[0].y_pred == runs[0].y_true).sum(), 400)

    assert coverage(naive, draw, 0.8, 300) < 0.7
    assert 0.91 <= coverage(lambda runs: top1_interval(runs, replicates=400), draw, 0.8, 300) <= 0.985


# Paired tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("only_one", "only_two"), [(5, 0), (8, 0), (12, 2), (15, 6), (30, 14), (20, 20)])
def test_of_one_run_each_the_p_value_is_near_that_of_exact_mcnemar(only_one, only_two):
    # 300 samples, of which a few are right in one of the two runs only.
    one, two = np.ones(300), np.ones(300)
    two[:only_one] = 0
    one[only_one : only_one + only_two] = 0
    exact = binomtest(only_one, only_one + only_two).pvalue
    found = paired_p_values({"one": [run(one)], "two": [run(two)]}, replicates=20_000)[("one", "two")]
    assert found == pytest.approx(exact, rel=0.45, abs=0.01)


def test_a_real_difference_is_found_and_equal_recipes_tie():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=300)

    def seeds(p):
        return [run((0.8 * hard + 0.6 * rng.normal(size=300)) < ndtri(p)) for _ in range(3)]

    letters = paired_letters({"poor": seeds(0.6), "good": seeds(0.9), "as good": seeds(0.9), "middling": seeds(0.75)})
    assert letters["good"] == letters["as good"] == "a"
    assert letters["middling"] == "b"
    assert letters["poor"] == "c"


def test_identical_recipes_are_not_told_apart():
    same = run(np.arange(50) % 3 > 0)
    assert paired_p_values({"a": [same], "b": [same]}) == {("a", "b"): 1.0}
    assert paired_letters({"a": [same], "b": [same]}) == {"a": "a", "b": "a"}


def test_equal_answers_on_few_images_prove_no_equivalence():
    few, many = np.arange(20) % 3 > 0, np.arange(2000) % 3 > 0
    (pair,) = paired_comparisons({"a": [run(few)], "b": [run(few)]})
    assert not pair.different and not pair.equivalent and pair.difference == 0
    (pair,) = paired_comparisons({"a": [run(many)], "b": [run(many)]})
    assert pair.equivalent and pair.equivalence_p < 0.001


def test_a_difference_without_any_variance_is_no_certainty_of_few():
    for n in (2, 3, 4):
        (pair,) = paired_comparisons({"a": [run(np.ones(n))], "b": [run(np.zeros(n))]})
        assert not pair.different and pair.low < 1 and pair.p >= pair.mcnemar_p[0] - 0.01
    (pair,) = paired_comparisons({"a": [run(np.ones(100))], "b": [run(np.zeros(100))]})
    assert pair.different and 0.9 < pair.low < 1
    for metric in ("macro_f1", "auroc", "balanced_accuracy"):
        y_true = np.array([0, 1, 0, 1])
        perfect = Predictions(np.arange(4).astype(str), np.full(4, ""), y_true, 5.0 * np.eye(2)[y_true])
        (pair,) = paired_comparisons({"a": [perfect], "b": [perfect]}, metric)
        assert not pair.equivalent, metric


def test_an_interval_of_a_difference_agrees_with_its_p_value():
    rng = np.random.default_rng(0)
    for _ in range(20):
        hard = rng.normal(size=200)
        one, two = (run(0.7 * hard + 0.7 * rng.normal(size=200) < ndtri(p)) for p in (0.8, rng.uniform(0.7, 0.9)))
        (pair,) = paired_comparisons({"a": [one], "b": [two]}, replicates=4000)
        assert pair.low <= pair.difference <= pair.high
        if abs(pair.p - 0.05) > 0.02:
            assert (pair.low > 0 or pair.high < 0) == (pair.p < 0.05)


def test_the_interval_of_a_metric_is_that_of_scipys_bca():
    # Brier's score of one run without groups is a mean, which scipy's BCa knows; ours draws one fewer, with t.
    rng = np.random.default_rng(0)
    score = rng.beta(4, 2, 150)
    logits = np.log(np.stack([score, 1 - score], 1))
    ids = np.array([f"s{i:05}" for i in range(150)])
    one = Predictions(ids, np.full(150, ""), np.zeros(150, int), logits)
    found = metric_intervals({"a": [one]}, ["brier"], replicates=20_000)["brier"]["a"]
    expected = bootstrap(((1 - score) ** 2,), np.mean, n_resamples=20_000, method="BCa", random_state=1)
    low, high = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02 * (high - low) + 1e-3)
    assert found.test_se == pytest.approx(expected.standard_error, rel=0.03)


def test_seeds_and_test_images_are_told_apart_in_an_interval():
    rng = np.random.default_rng(0)
    spread = [run(rng.random(4000) < p) for p in (0.7, 0.8, 0.9)]
    interval = metric_intervals({"a": spread}, ["top1"])["top1"]["a"]
    assert interval.seed_se > 5 * interval.test_se and interval.seed_sd == pytest.approx(0.1, abs=0.02)
    assert interval.seed_se == pytest.approx(interval.seed_sd / np.sqrt(3))
    steady = run(rng.random(100) < 0.8)
    interval = metric_intervals({"a": [steady, steady]}, ["top1"])["top1"]["a"]
    assert interval.seed_se == 0 and interval.test_se == pytest.approx(0.04, rel=0.2)


def test_metrics_that_cost_too_much_have_no_interval():
    assert "auroc" in affordable_metrics(10_000, 10, 60)
    assert "auroc" not in affordable_metrics(50_000, 1000, 60) and "top1" in affordable_metrics(50_000, 1000, 60)


def test_one_group_tells_nothing_apart():
    runs = {"a": [run([1] * 30, ["p"] * 30)], "b": [run([0] * 30, ["p"] * 30)]}
    assert paired_letters(runs) == {"a": "a", "b": "a"}


def test_many_recipes_can_still_be_told_apart():
    # With 120 pairs Holm asks for p < 0.0005; 2000 replicates alone could not give that.
    rng = np.random.default_rng(0)
    runs = {f"r{i:02}": [run(rng.random(200) < 0.7)] for i in range(15)} | {"best": [run(np.ones(200))]}
    letters = paired_letters(runs)
    assert letters["best"] == "a"
    assert all("a" not in text for name, text in letters.items() if name != "best")


def test_the_order_of_the_samples_does_not_matter():
    rng = np.random.default_rng(0)
    one, two = rng.random(80) < 0.9, rng.random(80) < 0.6
    order = rng.permutation(80)
    ids = np.array([f"s{i:05}" for i in range(80)])
    straight = paired_p_values({"a": [run(one)], "b": [run(two)]})
    turned = paired_p_values({"a": [run(one)], "b": [run(two[order], ids=ids[order])]})
    assert straight == turned


@pytest.mark.slow
def test_under_no_difference_few_pairs_are_told_apart():
    false = 0
    for number in range(150):
        rng = np.random.default_rng(number)
        hard = rng.normal(size=150)
        runs = {f"r{i}": [run((0.8 * hard + 0.6 * rng.normal(size=150)) < ndtri(0.85))] for i in range(4)}
        false += len(set(paired_letters(runs, replicates=500).values())) > 1
    assert false / 150 <= 0.09


@pytest.mark.slow
def test_two_lucky_seeds_are_not_taken_for_a_difference_of_recipes():
    # Large test set, scores that depend on the seed: the seeds, not the samples, are what is scarce.
    false = 0
    for number in range(80):
        rng = np.random.default_rng(number)
        runs = {name: [run(rng.random(1500) < 0.8 + 0.03 * rng.normal()) for _ in range(3)] for name in ("one", "two")}
        false += paired_p_values(runs, replicates=200)[("one", "two")] < 0.05
    assert false / 80 <= 0.1


# Bad input ------------------------------------------------------------------------------------------------------------


def test_no_recipe_and_one_recipe():
    assert paired_letters({}) == {}
    assert paired_letters({"a": [run([1, 0])]}) == {"a": "a"}


def test_what_cannot_be_compared_is_refused():
    good = run([1, 0, 1])
    with pytest.raises(ZooError, match="runs of different samples cannot be compared: recipe 'b'"):
        paired_letters({"a": [good], "b": [run([1, 0, 1], ids=["s00000", "s00001", "other"])]})
    with pytest.raises(ZooError, match="runs of different samples"):
        paired_letters({"a": [good], "b": [run([1, 0])]})
    with pytest.raises(ZooError, match="runs of different samples"):
        top1_interval([good, run([1, 0])])
    with pytest.raises(ZooError, match="runs of different groups"):
        paired_letters({"a": [good], "b": [run([1, 0, 1], ["p", "p", "q"])]})
    relabelled = Predictions(good.sample_ids, good.groups, np.array([0, 1, 0]), good.logits)
    with pytest.raises(ZooError, match="runs of different true labels"):
        paired_letters({"a": [good], "b": [relabelled]})
    with pytest.raises(ZooError, match=r"samples must have different ids to be compared. Got 1 ids for 2 samples"):
        top1_interval([run([1, 0], ids=["x", "x"])])
    for runs in ([], [run([])]):
        with pytest.raises(ZooError, match="has no scored samples to compare"):
            top1_interval(runs)
