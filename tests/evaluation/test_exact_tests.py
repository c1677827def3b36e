import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, mannwhitneyu, ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from zoo.errors import ZooError
from zoo.evaluation.exact_tests import (
    corrected_resampled_t,
    delong,
    delong_p_value,
    equivalence_p_value,
    holm,
    mcnemar_midp,
)

# Drawn once; pROC 1.18.0 (R) gives, for `roc.test(..., method = "delong")`, what PROC holds.
HEALTHY, ILL = 55, 35
ONE = (
    "2.3,-1.2,-0.7,-0.4,-1,-0.9,0.7,-0.1,0.2,2.2,0.4,2.7,2.3,0.3,1.9,0.5,-0.9,-0.3,0,1,0.8,0.7,1.3,-1.4,1.3,0.2,0.8,"
    "0.6,-1,-0.3,-0.9,0.7,0.1,-0.1,-0.4,-0.6,1,-1.1,-0.1,0.3,1.2,-0.7,-0.3,-1.3,-0.4,-0.4,1.4,0.6,0.1,0.9,-0.3,0,0.4,"
    "1.7,0.7,1.4,-0.7,1.2,1.1,0,1,1.1,1.4,1.6,1.2,2,1.7,2.1,2.2,1.6,1.3,0,0.3,0,-0.7,-0.4,0,0.3,0.8,3.3,1.2,0.9,0.9,"
    "0.5,0.1,0.6,0.6,0.6,-0.9,1.5"
)
TWO = (
    "2.7,-1.2,0.1,-0.1,0.1,-1,1.3,-1.3,-0.2,1.2,0.7,2.1,1.3,-0.8,1.4,-1,0.3,0.6,0.7,0.7,0.1,0.8,1.3,-0.4,0.1,1.4,-0.5,"
    "1.2,0.2,0.1,-1.8,1.7,0.6,-0.2,0.3,0.9,1,-0.6,-1.2,1,0.2,0.2,0.5,-0.5,0.7,-0.8,1.2,1.1,0.3,1.3,-1.3,-0.7,0.4,1.2,"
    "0.8,1.3,-0.6,1.6,1.4,-0.4,0.8,2,0.6,1.3,1.8,1.1,0.2,2.7,2.8,1.5,1.6,0.6,0.7,1.1,0.9,0,0.8,1.2,1.2,0.9,-0.7,1.4,2,"
    "-0.2,1.1,1.1,1.4,1.9,0.1,0.9"
)
PROC = {"auroc": [0.679220779221, 0.714025974026], "variance": 0.00328953840489, "p": 0.483845088892}


def scores():
    return np.array([[float(each) for each in text.split(",")] for text in (ONE, TWO)])


def truth():
    return np.arange(HEALTHY + ILL) >= HEALTHY


# Holm -----------------------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.slow
def test_holm_is_that_of_statsmodels():
    rng = np.random.default_rng(0)
    for size in range(1, 30):
        p_values = np.round(rng.random(size) ** 3, 3).tolist()  # with ties
        assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist(), abs=1e-12)


# McNemar --------------------------------------------------------------------------------------------------------------


def test_mcnemar_is_that_of_the_published_example():
    # Fagerland et al. 2013, airway hyper-responsiveness before and after transplantation: 1 and 7 discordant pairs;
    # their table gives .039 for the mid-p test and .070 for the exact conditional one.
    assert mcnemar_midp(1, 7) == pytest.approx(0.039, abs=5e-4)
    assert mcnemar(np.array([[1, 1], [7, 12]]), exact=True).pvalue == pytest.approx(0.070, abs=5e-4)


@given(st.integers(0, 60), st.integers(0, 60))
@settings(deadline=None)
def test_mid_p_takes_half_of_what_was_seen_off_the_exact_test(one, two):
    found = mcnemar_midp(one, two)
    assert found == mcnemar_midp(two, one)
    if one == two:
        assert found == 1.0
    else:
        seen = (
            binomtest(one, one + two, 0.5).pvalue - binomtest(min(one, two) - 1, one + two, 0.5).pvalue
            if min(one, two)
            else 2 * 0.5 ** (one + two)
        )
        assert found == pytest.approx(binomtest(one, one + two, 0.5).pvalue - seen / 2, abs=1e-9)


def test_mcnemar_refuses_negative_counts():
    with pytest.raises(ZooError, match=r"counts of 0 or more\. Got -1 and 2"):
        mcnemar_midp(-1, 2)


# DeLong ---------------------------------------------------------------------------------------------------------------


def test_delong_is_that_of_another_implementation():
    aucs, covariance = delong(truth(), scores())
    assert aucs.tolist() == pytest.approx(PROC["auroc"], abs=1e-10)
    assert covariance[0, 0] == pytest.approx(PROC["variance"], abs=1e-12)
    assert delong_p_value(truth(), *scores()) == pytest.approx(PROC["p"], abs=1e-10)


def test_auroc_is_that_of_scipy():
    for score, auc in zip(scores(), delong(truth(), scores())[0], strict=True):
        u = mannwhitneyu(score[truth()], score[~truth()]).statistic
        assert auc == pytest.approx(u / (HEALTHY * ILL), abs=1e-12)


@pytest.mark.slow
def test_one_versus_rest_is_the_mean_and_its_variance_that_of_the_jackknife():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 240)
    score = rng.normal(size=(2, 240, 3)) + np.eye(3)[y]
    inside = y[:, None] == np.arange(3)
    aucs, covariance = delong(inside, score)

    def mean_auroc(keep, m):
        return np.mean(
            [
                mannwhitneyu(score[m, keep & inside[:, c], c], score[m, keep & ~inside[:, c], c]).statistic
                / ((keep & inside[:, c]).sum() * (keep & ~inside[:, c]).sum())
                for c in range(3)
            ]
        )

    assert aucs.tolist() == pytest.approx([mean_auroc(np.ones(240, bool), m) for m in range(2)])
    left_out = np.array([[mean_auroc(np.arange(240) != i, m) for m in range(2)] for i in range(240)])
    jackknife = np.cov(left_out.T) * (240 - 1) ** 2 / 240
    assert covariance == pytest.approx(jackknife, rel=0.05)


def test_with_groups_the_variance_is_that_of_the_jackknife_over_groups():
    rng = np.random.default_rng(1)
    units = np.repeat(np.arange(50), 6)
    shift = np.repeat(rng.normal(size=50), 6)
    y = units % 2 == 0
    score = 0.5 * rng.normal(size=300) + y + shift
    _, covariance = delong(y, score[None], units)
    left_out = [delong(y[units != g], score[units != g][None])[0][0] for g in range(50)]
    assert covariance[0, 0] == pytest.approx(np.var(left_out) * 49, rel=0.08)
    naive = delong(y, score[None])[1][0, 0]
    assert covariance[0, 0] > 2 * naive


def test_groups_of_one_change_next_to_nothing():
    grouped = delong_p_value(truth(), *scores(), np.arange(HEALTHY + ILL))
    assert grouped == pytest.approx(delong_p_value(truth(), *scores()), abs=0.01)


def test_delong_of_scores_that_are_the_same_or_too_few():
    one = scores()[0]
    assert delong_p_value(truth(), one, one) == 1.0
    with pytest.raises(ZooError, match="two samples in a class and two out of it"):
        delong(np.array([True, False, False]), np.array([[1.0, 2.0, 3.0]]))
    with pytest.raises(ZooError, match="Got fewer"):
        delong(np.zeros(4, bool), np.zeros((1, 4)))


# Equivalence and repeated splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.004, -0.015, 0.05])
def test_equivalence_is_that_of_statsmodels(shift):
    rng = np.random.default_rng(3)
    one = rng.normal(size=60)
    difference = rng.normal(shift, 0.04, 60)
    expected = ttost_paired(one + difference, one, -0.02, 0.02)[0]
    error = difference.std(ddof=1) / np.sqrt(60)
    assert equivalence_p_value(difference.mean(), error, 0.02, 59) == pytest.approx(expected, abs=1e-9)


def test_equivalence_without_any_spread_and_without_a_margin():
    assert equivalence_p_value(0.0, 0.0, 0.02, 10) == 0.0
    assert equivalence_p_value(0.03, 0.0, 0.02, 10) == 1.0
    for margin in (0.0, -1.0, float("nan")):
        with pytest.raises(ZooError, match="a margin of equivalence must be above 0"):
            equivalence_p_value(0.0, 0.1, margin, 10)


def test_repeated_splits_cost_what_nadeau_and_bengio_say():
    differences = np.random.default_rng(0).normal(0.02, 0.01, 10)
    mean, low, high, p_value = corrected_resampled_t(differences, 800, 200)
    # The plain t statistic, shrunk by sqrt((1 / n) / (1 / n + n_test / n_train)).
    plain = ttest_1samp(differences, 0)
    shrunk = plain.statistic * np.sqrt(0.1 / (0.1 + 0.25))
    from scipy.stats import t

    assert p_value == pytest.approx(2 * t.sf(shrunk, 9), abs=1e-12)
    assert mean == pytest.approx(differences.mean())
    assert (high - mean) == pytest.approx(t.ppf(0.975, 9) * mean / shrunk)
    assert low == pytest.approx(2 * mean - high)
    equal = corrected_resampled_t([0.05, 0.05], 100, 20)
    assert equal[1] < 0 < equal[2] and equal[3] > 0.3  # two folds that agree prove nothing
    assert corrected_resampled_t([0.0, 0.0], 10, 5)[3] == 1.0


def test_under_overlapping_training_sets_the_correction_keeps_the_level():
    # Nearest centroid on one of two features that say as much: without a difference over data sets of 200.
    false_plain = false_corrected = 0
    for number in range(200):
        rng = np.random.default_rng(number)
        y = rng.random(200) < 0.5
        features = rng.normal(size=(2, 200)) + 0.8 * y
        differences = []
        for _ in range(10):
            order = rng.permutation(200)
            train, test = order[:160], order[160:]
            cuts = [(x[train][y[train]].mean() + x[train][~y[train]].mean()) / 2 for x in features]
            right = [((x[test] > cut) == y[test]).mean() for x, cut in zip(features, cuts, strict=True)]
            differences.append(right[0] - right[1])
        false_plain += ttest_1samp(differences, 0).pvalue < 0.05
        false_corrected += corrected_resampled_t(differences, 160, 40)[3] < 0.05
    assert false_plain / 200 > 0.2
    assert false_corrected / 200 <= 0.09


def test_repeated_splits_need_two():
    with pytest.raises(ZooError, match="repeated splits need two or more"):
        corrected_resampled_t([0.1], 100, 20)


def test_every_pair_of_p_values_is_ordered_alike():
    raw = [0.2, 0.001, 0.03, 0.03, 1.0]
    adjusted = holm(raw)
    for one, two in itertools.combinations(range(5), 2):
        assert (raw[one] < raw[two]) <= (adjusted[one] <= adjusted[two])
