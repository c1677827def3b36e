from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zoo.data.split import (
    check_enough_groups,
    check_ratios,
    groups_by_blocks,
    groups_by_regex,
    merge_identical,
    split_groups,
    split_into,
    stratification_error,
)
from zoo.errors import ZooError
from zoo.runs import SPLITS

RATIOS = (0.7, 0.15, 0.15)


def samples_of(groups: list[list[int]]) -> tuple[list[str], list[str]]:
    """Return labels and groups of the samples; groups lists the classes of each group's samples."""
    labels = [f"class {cls}" for group in groups for cls in group]
    return labels, [f"group {number}" for number, group in enumerate(groups) for _ in group]


def groups_of_class(labels, groups) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        found.setdefault(label, set()).add(group)
    return found


def splits_of_class(labels, splits) -> dict[str, set[str]]:
    return groups_of_class(labels, [str(split) for split in splits])


pure_groups = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 30)).map(lambda pair: [pair[0]] * pair[1]),
    min_size=1,
    max_size=40,
)
mixed_groups = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=8), min_size=1, max_size=30)
ratios = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)).map(
    lambda parts: tuple(part / sum(parts) for part in parts)
)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(groups=st.one_of(pure_groups, mixed_groups), ratios=ratios, seed=st.integers(0, 1000))
def test_no_group_is_torn_nothing_is_lost_and_the_seed_decides(groups, ratios, seed):
    labels, names = samples_of(groups)
    splits = split_groups(labels, names, ratios, seed)
    assert len(splits) == len(labels)
    assert set(splits) <= set(SPLITS)
    where = {name: set() for name in names}
    for name, split in zip(names, splits, strict=True):
        where[name].add(split)
    assert all(len(each) == 1 for each in where.values())
    np.testing.assert_array_equal(splits, split_groups(labels, names, ratios, seed))


@settings(max_examples=100, deadline=None)
@given(groups=st.one_of(pure_groups, mixed_groups), seed=st.integers(0, 1000))
def test_the_order_of_the_samples_changes_nothing(groups, seed):
    labels, names = samples_of(groups)
    splits = split_groups(labels, names, RATIOS, seed)
    turned = np.random.default_rng(seed).permutation(len(labels))
    again = split_groups(np.array(labels)[turned], np.array(names)[turned], RATIOS, seed)
    np.testing.assert_array_equal(splits[turned], again)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(groups=pure_groups, ratios=ratios, seed=st.integers(0, 1000))
def test_each_class_of_three_groups_stands_in_every_split_and_each_class_in_train(groups, ratios, seed):
    labels, names = samples_of(groups)
    where = splits_of_class(labels, split_groups(labels, names, ratios, seed))
    for label, found in groups_of_class(labels, names).items():
        assert "train" in where[label]
        if len(found) >= 2:
            assert "test" in where[label]
        if len(found) >= 3:
            assert where[label] == set(SPLITS)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=3, max_size=6),
    seed=st.integers(0, 1000),
)
def test_where_groups_hold_several_classes_a_covering_split_is_found_if_there_is_one(groups, seed):
    labels, names = samples_of(groups)
    enough = [label for label, found in groups_of_class(labels, names).items() if len(found) >= 3]
    assume(enough)

    def covers(splits) -> bool:
        where = splits_of_class(labels, splits)
        return all(where[label] == set(SPLITS) for label in enough)

    if not covers(split_groups(labels, names, RATIOS, seed)):
        every = itertools.product(SPLITS, repeat=len(groups))
        assert not any(covers([each[int(name.split()[1])] for name in names]) for each in every)


@settings(max_examples=200, deadline=None)
@given(counts=st.lists(st.integers(3, 400), min_size=1, max_size=6), ratios=ratios, seed=st.integers(0, 1000))
def test_single_images_are_shared_out_to_less_than_one_image(counts, ratios, seed):
    labels = [f"class {cls}" for cls, count in enumerate(counts) for _ in range(count)]
    splits = split_groups(labels, [str(number) for number in range(len(labels))], ratios, seed)
    for cls, count in enumerate(counts):
        of_class = splits[np.array(labels) == f"class {cls}"]
        for split, ratio in zip(SPLITS, ratios, strict=True):
            have = int((of_class == split).sum())
            # A split that would get none of the class gets one, which the others give.
            slack = 1 if min(ratios) * count >= 1 else 3
            assert abs(have - ratio * count) < slack + 1e-6
            assert have >= 1


def test_seeds_give_different_splits_even_of_unequal_groups():
    rng = np.random.default_rng(0)
    groups = [[cls] * int(size) for cls in range(3) for size in rng.permutation(60)[:25] + 1]
    labels, names = samples_of(groups)
    seen = {tuple(split_groups(labels, names, RATIOS, seed)) for seed in range(10)}
    assert len(seen) == 10
    for splits in seen:
        assert stratification_error(labels, np.array(splits)) < 0.02


def test_few_large_groups_come_near_to_the_ratios():
    labels, names = samples_of([[0] * 20] * 6 + [[1] * 20] * 28 + [[1]] + [[2] * 20] * 20 + [[2] * 16])
    for seed in range(5):
        splits = split_groups(labels, names, RATIOS, seed)
        shares = [float((splits == split).mean()) for split in SPLITS]
        assert np.abs(np.array(shares) - RATIOS).max() < 0.02
        assert stratification_error(labels, splits) < 0.03


def test_one_giant_group_does_not_starve_the_other_splits():
    labels, names = samples_of([[0] * 1000, [0], [0], [1] * 5, [1] * 5, [1] * 5])
    where = splits_of_class(labels, split_groups(labels, names, RATIOS, 0))
    assert where == {"class 0": set(SPLITS), "class 1": set(SPLITS)}


@pytest.mark.slow
def test_a_million_single_images_are_split_in_seconds():
    labels = np.random.default_rng(0).integers(0, 10, 1_000_000).astype(str)
    names = np.arange(1_000_000).astype(str)
    start = time.perf_counter()
    splits = split_groups(labels, names, RATIOS, 0)
    assert time.perf_counter() - start < 10
    is_test = splits == "test"
    assert abs(float(is_test.mean()) - 0.15) < 1e-4
    assert abs(float(is_test[labels == "7"].mean()) - 0.15) < 1e-4


def test_stratification_error_is_the_largest_difference_of_a_share():
    labels = ["a", "a", "a", "b"]
    assert stratification_error(labels, ["train", "train", "test", "test"]) == pytest.approx(0.25)
    assert stratification_error(labels, ["train"] * 4) == 0.0


def test_two_splits_are_cut_for_shipped_data():
    labels = ["a"] * 10 + ["b"] * 10
    splits = split_into(labels, [str(number) for number in range(20)], ("train", "val"), (0.7, 0.15), 0)
    assert (splits[:10] == "val").sum() == 2
    assert (splits[10:] == "val").sum() == 2
    assert len(split_into([], [], ("train", "val"), (0.7, 0.15), 0)) == 0


@pytest.mark.parametrize(
    "ratios",
    [
        (0.7, 0.3),
        (0.5, 0.5, 0.5),
        (1, 0, 0),
        (0.8, 0.2, 0),
        (1.2, -0.1, -0.1),
        "abc",
        None,
        (0.7, 0.2, float("nan")),
    ],
)
def test_ratios_out_of_range_are_refused(ratios):
    with pytest.raises(ZooError, match=r"ratios must be three numbers above 0 that sum to 1.*Got"):
        check_ratios(ratios)
    with pytest.raises(ZooError, match="ratios must be"):
        split_groups(["a"], ["g"], ratios, 0)


@pytest.mark.parametrize("seed", [-1, 1.5, True, "0"])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ZooError, match="seed must be a whole number of 0 or more"):
        split_groups(["a"], ["g"], RATIOS, seed)


def test_regex_groups():
    paths = ["covid/2020.02.10.p12_a.png", "covid/2020.02.11.p7_b.png"]
    assert groups_by_regex(paths, r"\.(p\d+)_") == ["p12", "p7"]
    assert groups_by_regex(paths, r"p\d+") == ["p12", "p7"]
    with pytest.raises(ZooError, match=r"finds no group in 'covid/2020.02.11.p7_b.png'"):
        groups_by_regex(paths, "p12")
    with pytest.raises(ZooError, match="finds no group"):
        groups_by_regex(paths, "(x)?p")
    with pytest.raises(ZooError, match="is no valid regular expression: "):
        groups_by_regex(paths, "(p")


def test_block_groups_take_the_last_number_of_the_stem():
    paths = ["a 2/case (1).jpg", "a 2/case (20).jpg", "a 2/case (21).jpg", "a 2/v3_0040.png"]
    assert groups_by_blocks(paths, ["a 2"] * 4, 20) == ["a 2/0", "a 2/0", "a 2/1", "a 2/1"]
    with pytest.raises(ZooError, match=r"'a 2/case.jp2' has none"):
        groups_by_blocks(["a 2/case.jp2"], ["a 2"], 20)
    for size in (0, -1, 2.5, True):
        with pytest.raises(ZooError, match="group blocks must be a whole number of 1 or more"):
            groups_by_blocks(paths, ["a 2"] * 4, size)


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 6)), max_size=30))
def test_merged_groups_are_the_connected_components(pairs):
    groups, keys = [group for group, _ in pairs], [str(key) for _, key in pairs]
    merged = merge_identical(groups, keys)
    component = {group: {group} for group in groups}
    for _ in groups:
        for one, key_one in pairs:
            for other, key_other in pairs:
                if key_one == key_other:
                    joined = component[one] | component[other]
                    component[one] = component[other] = joined
        component = {group: set().union(*(component[each] for each in found)) for group, found in component.items()}
    assert merged == [min(component[group]) for group in groups]


def test_classes_of_too_few_groups_are_named():
    check_enough_groups(["a"] * 3, ["1", "2", "3"], SPLITS)
    with pytest.raises(ZooError, match="class 'a' has 1 group and needs at least 3 to stand in train, val, test; add"):
        check_enough_groups(["a"] * 9, ["1"] * 9, SPLITS)
    with pytest.raises(ZooError, match=r"class 'a' has 2 groups and needs at least 3 .*\(2 classes have too few\)"):
        check_enough_groups(["a", "a", "b"], ["1", "2", "1"], SPLITS)
