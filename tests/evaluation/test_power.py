import math

import numpy as np
import pytest
from statsmodels.stats.power import TTestPower

from zoo.errors import ZooError
from zoo.evaluation.power import design_effect, detectable_difference, intraclass_correlation, seeds_needed
from zoo.evaluation.predictions import Predictions
from zoo.evaluation.statistics import paired_p_values


def pair(rng, n, disagreement, difference, groups=0, alike=0.0):
    """Two runs that disagree on so many images, the first right on `difference` more of them."""
    shares = np.cumsum([(disagreement + difference) / 2, (disagreement - difference) / 2])
    units = np.arange(n) if not groups else np.repeat(np.arange(groups), n // groups)
    own, shared = rng.random(n), rng.random(units.max() + 1)[units]
    taken = np.where(rng.random(n) < math.sqrt(alike), shared, own)  # two of a group are alike with chance `alike`
    right = np.stack([taken >= shares[0], (taken < shares[0]) | (taken >= shares[1])])[::-1]
    ids = np.array([f"s{i:05}" for i in range(n)])
    names = np.full(n, "") if not groups else np.array([f"g{unit:04}" for unit in units])
    return [Predictions(ids, names, np.zeros(n, int), np.stack([row, ~row], 1) * 1.0) for row in right]


@pytest.mark.slow
@pytest.mark.parametrize(("n", "disagreement", "groups", "alike"), [(400, 0.2, 0, 0), (600, 0.3, 60, 0.4)])
def test_what_is_said_to_be_detectable_is_detected_four_times_in_five(n, disagreement, groups, alike):
    effect = design_effect([n // groups] * groups, alike) if groups else 1.0
    difference = detectable_difference(disagreement, n, design_effect=effect, units=groups or None)
    found = 0
    for number in range(200):
        one, two = pair(np.random.default_rng(number), n, disagreement, difference, groups, alike)
        found += paired_p_values({"one": [one], "two": [two]}, replicates=400)[("one", "two")] < 0.05
    assert 0.7 <= found / 200 <= 0.88


def test_it_is_the_power_of_the_paired_t_test():
    for n, disagreement in ((100, 0.3), (1000, 0.05)):
        difference = detectable_difference(disagreement, n)
        spread = math.sqrt(disagreement - difference**2)
        power = TTestPower().power(difference / spread, n, 0.05)
        assert power == pytest.approx(0.8, abs=0.005)


def test_less_disagreement_more_images_and_fewer_groups():
    assert detectable_difference(0.05, 1000) < detectable_difference(0.2, 1000) < detectable_difference(0.2, 300)
    assert detectable_difference(0.2, 300) < detectable_difference(0.2, 300, design_effect=2.0)
    assert detectable_difference(0.2, 300, units=10) > detectable_difference(0.2, 300)
    assert detectable_difference(0.02, 50) is None  # not even one that is never right alone
    assert detectable_difference(0.5, 300, units=1) is None


def test_a_design_effect_is_between_none_and_the_size():
    assert design_effect([1, 1, 1], 0.9) == 1.0
    assert design_effect([10] * 5, 0.0) == 1.0
    assert design_effect([10] * 5, 1.0) == pytest.approx(10)
    assert design_effect([19, 1], 1.0) > 10  # unequal groups cost more


def test_likeness_within_groups_is_that_of_the_simulation_and_of_a_textbook():
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(400), rng.integers(1, 9, 400))
    for share in (0.0, 0.3, 0.8):
        values = np.sqrt(share) * rng.normal(size=400)[units] + np.sqrt(1 - share) * rng.normal(size=len(units))
        assert intraclass_correlation(values, units) == pytest.approx(share, abs=0.06)
    # Shrout and Fleiss 1979, table 2: six targets, four judges; ICC(1, 1) = .17.
    ratings = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)
    assert intraclass_correlation(ratings.ravel(), np.repeat(np.arange(6), 4)) == pytest.approx(0.17, abs=0.005)
    assert intraclass_correlation(np.ones(6), np.repeat([0, 1], 3)) == 0.0
    assert intraclass_correlation(np.arange(3.0), np.arange(3)) == 0.0


def test_seeds_are_needed_where_they_spread():
    assert seeds_needed(0.0, 0.02) == 1
    assert seeds_needed(0.01, 0.0) == 20
    assert seeds_needed(0.02, 0.02) == 10
    for count in range(2, 20):
        spread = 0.02 * math.sqrt(0.1 * count)
        assert seeds_needed(spread, 0.02) == count


@pytest.mark.parametrize("arguments", [(0.0, 100), (1.2, 100), (0.1, 0)])
def test_power_refuses_what_makes_no_sense(arguments):
    with pytest.raises(ZooError, match=r"power needs a disagreement in \(0, 1\]"):
        detectable_difference(*arguments)
