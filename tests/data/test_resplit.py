from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scenes import READY_SPLIT

from zoo.data.leaks import find_leaks
from zoo.data.manifest import load_dataset, manifest_bytes
from zoo.data.resplit import fold_dataset, resplit_dataset
from zoo.data.rows import join_groups, repair_rows
from zoo.data.sources import import_dataset
from zoo.data.split import split_groups, stratification_error
from zoo.errors import ZooError
from zoo.runs import SPLITS


@pytest.fixture
def photos(root, tmp_path, write_scenes):
    folder = write_scenes(tmp_path / "photos", {"a": range(300, 340), "b": range(400, 440)})
    return import_dataset(folder, "photos", root)


@pytest.fixture
def leaking(root, tmp_path, write_scenes):
    folder = write_scenes(tmp_path / "leaking", READY_SPLIT)
    shutil.copy(folder / "train/a/00003.png", folder / "test/a/copy.png")
    shutil.copy(folder / "train/a/00003.png", folder / "val/a/copy.png")
    Image.open(folder / "train/b/00025.png").save(folder / "test/b/again.jpg", quality=70)
    Image.open(folder / "val/b/00047.png").resize((48, 48)).save(folder / "test/b/smaller.png")
    shutil.copy(folder / "test/b/00060.png", folder / "test/b/twice.png")
    return import_dataset(folder, "leaking", root)


def test_repair_drops_copies_from_train_and_val_and_never_from_test(leaking, root):
    before = leaking.of_split("test")["path"].tolist()
    dataset = resplit_dataset("leaking", root, repair=True)
    assert dataset.of_split("test")["path"].tolist() == before
    dropped = dataset.facts["dropped"]
    assert set(dropped) == {"train/a/00003.png", "val/a/copy.png", "train/b/00025.png", "val/b/00047.png"}
    assert dropped["train/a/00003.png"] == "the same picture stands in test: test/a/copy.png"
    assert dropped["val/b/00047.png"] == "nearly the same picture stands in test: test/b/smaller.png"
    assert find_leaks(dataset).ok
    assert dataset.facts["counts"]["images"] == len(dataset.frame) == len(leaking.frame) - 4
    assert resplit_dataset("leaking", root, repair=True).split_digest == dataset.split_digest


def test_repair_and_dropping_duplicates_together_keep_tests_copy(leaking, root):
    dataset = resplit_dataset("leaking", root, repair=True, drop_duplicates=True)
    assert "test/b/twice.png" in dataset.facts["dropped"]
    assert "test/a/copy.png" not in dataset.facts["dropped"]
    assert find_leaks(dataset).ok


def test_repair_is_for_shipped_splits_alone(photos, root):
    with pytest.raises(ZooError, match="--repair is for splits that were shipped"):
        resplit_dataset("photos", root, repair=True)


def test_a_repair_that_leaves_a_class_without_training_images_changes_nothing(root, tmp_path, write_scenes):
    folder = write_scenes(
        tmp_path / "x",
        {"train/a": range(3), "train/b": range(3, 9), "val/a": [20], "val/b": [21], "test/a": range(3), "test/b": [22]},
    )
    import_dataset(folder, "x", root)
    before = (root.data / "x" / "manifest.csv").read_bytes()
    with pytest.raises(ZooError, match="class 'a' has no image in train"):
        resplit_dataset("x", root, repair=True)
    assert (root.data / "x" / "manifest.csv").read_bytes() == before


def test_groups_of_several_ways_are_joined(photos, root, tmp_path):
    # One hospital for images 304 to 307, which stand in two blocks of five; the rest by themselves.
    numbers = photos.frame["path"].str[-9:-4].astype(int)
    hospitals = ["h" if 304 <= number <= 307 else f"h{number}" for number in numbers]
    lines = [
        "path,hospital",
        *(f"{path},{hospital}" for path, hospital in zip(photos.frame["path"], hospitals, strict=True)),
    ]
    (tmp_path / "hospitals.csv").write_text("\n".join(lines))
    dataset = resplit_dataset(
        "photos", root, group_blocks=5, group_column="hospital", group_csv=tmp_path / "hospitals.csv"
    )
    groups = dataset.frame["group"]
    for way in (hospitals, dataset.frame["label"] + ((numbers - 1) // 5).astype(str)):
        assert (groups.groupby(list(way)).nunique() == 1).all()
    assert groups[(numbers >= 301) & (numbers <= 310)].nunique() == 1
    assert dataset.facts["split"]["group_csv"] == "hospitals.csv"
    with pytest.raises(ZooError, match="class 'a' has 1 group and needs at least 3"):
        resplit_dataset("photos", root, group_column="label")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"group_column": "hospital"}, "the manifest's columns to group by are group and label"),
        ({"group_patient": True}, "no image of 'photos' is a DICOM"),
        ({"group_regex": "("}, "no valid regular expression"),
        ({"ratios": (1, 1, 1)}, "ratios must be"),
    ],
)
def test_wrong_ways_are_refused_and_change_nothing(photos, root, options, said):
    with pytest.raises(ZooError, match=said):
        resplit_dataset("photos", root, **options)
    assert load_dataset("photos", root).split_digest == photos.split_digest


def test_no_option_gives_the_same_bytes(photos, root):
    before = [(photos.folder / name).read_bytes() for name in ("manifest.csv", "dataset.toml")]
    assert resplit_dataset("photos", root).split_digest == photos.split_digest
    assert [(photos.folder / name).read_bytes() for name in ("manifest.csv", "dataset.toml")] == before


def test_folds_share_out_every_image_to_test_once_and_to_val_once(photos, root):
    folds = fold_dataset("photos", 4, root, seed=3)
    assert [each.name for each in folds] == [f"photos-fold{number}" for number in range(4)]
    for split in ("val", "test"):
        stood = [path for each in folds for path in each.of_split(split)["path"]]
        assert sorted(stood) == sorted(photos.frame["path"])
    for each in folds:
        assert find_leaks(each).ok
        assert each.root == photos.root
        assert set(each.of_split("test")["label"]) == {"a", "b"}
        assert each.facts["split"]["folds"] == 4
    assert [each.split_digest for each in fold_dataset("photos", 4, root, seed=3)] == [
        each.split_digest for each in folds
    ]
    assert len({each.split_digest for each in folds}) == 4
    with pytest.raises(ZooError, match="is one of 4 folds"):
        resplit_dataset("photos-fold0", root, seed=1)
    assert resplit_dataset("photos-fold0", root).split_digest == folds[0].split_digest


def test_folds_of_copied_images_find_them(root, tmp_path, write_scenes):
    folder = write_scenes(tmp_path / "p", {"a": range(9), "b": range(20, 29)})
    import_dataset(folder, "p", root, copy=True)
    for each in fold_dataset("p", 3, root):
        assert all(each.image_path(path).is_file() for path in each.frame["path"])


@pytest.mark.parametrize("folds", [2, 51, True])
def test_wrong_numbers_of_folds(photos, root, folds):
    with pytest.raises(ZooError, match="folds must be from 3 to 50"):
        fold_dataset("photos", folds, root)


def test_more_folds_than_groups_of_a_class(root, tmp_path, write_scenes):
    folder = write_scenes(tmp_path / "p", {"a": range(4), "b": range(20, 40)})
    import_dataset(folder, "p", root)
    with pytest.raises(ZooError, match="class 'a' has groups for 4 folds alone"):
        fold_dataset("p", 5, root)


structures = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 4), min_size=1, max_size=6)), min_size=1, max_size=40
)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(structures, st.integers(0, 2**31 - 1))
def test_no_group_in_two_splits_nothing_lost_and_the_same_seed_the_same_split(structure, seed):
    labels, groups = [], []
    for number, (_, members) in enumerate(structure):
        labels += [f"c{each}" for each in members]
        groups += [f"g{number}"] * len(members)
    splits = split_groups(labels, groups, seed=seed)
    assert len(splits) == len(labels)
    assert set(splits) <= set(SPLITS)
    of_group: dict[str, set[str]] = {}
    for group, split in zip(groups, splits, strict=True):
        of_group.setdefault(group, set()).add(split)
    assert all(len(each) == 1 for each in of_group.values())
    assert (split_groups(labels, groups, seed=seed) == splits).all()
    assert 0 <= stratification_error(labels, splits) <= 1


names = st.sampled_from(["", "p", "q", "r", "s", "t"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(names, names, names), min_size=1, max_size=30))
def test_joined_groups_tear_none_of_their_ways(rows):
    ways = [list(way) for way in zip(*rows, strict=True)]
    paths = [f"{number}" for number in range(len(rows))]
    joined = join_groups(ways, paths)
    own = [group or f"alone {path}" for group, path in zip(joined, paths, strict=True)]
    for way in ways:
        of_name: dict[str, set[str]] = {}
        for name, group in zip(way, own, strict=True):
            if name:
                of_name.setdefault(name, set()).add(group)
        assert all(len(each) == 1 for each in of_name.values())
    for row, group in zip(rows, joined, strict=True):
        assert (group == "") == (not any(row))


rows_strategy = st.lists(
    st.tuples(st.sampled_from(SPLITS), st.integers(0, 5), st.integers(0, 8), st.sampled_from("ab")),
    min_size=1,
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(rows_strategy, st.booleans())
def test_a_repair_leaves_no_leak_and_takes_nothing_from_test(drawn, drop):
    rows = [
        (f"{place}", f"{place}.png", label, f"g{group}", split, f"{place}", f"p{pixel}")
        for place, (split, group, pixel, label) in enumerate(drawn)
    ]
    kept, dropped = repair_rows(rows, np.zeros((0, 2), np.int64), drop_duplicates=drop)
    assert len(kept) + len(dropped) == len(rows)
    for place in (3, 6):
        of_name: dict[str, set[str]] = {}
        for row in kept:
            of_name.setdefault(row[place], set()).add(row[4])
        assert all(len(each) == 1 for each in of_name.values())
    if not drop:
        assert [row for row in kept if row[4] == "test"] == [row for row in rows if row[4] == "test"]
    else:
        assert len({row[6] for row in kept}) == len(kept)
    assert manifest_bytes(kept) == manifest_bytes(
        repair_rows(rows, np.zeros((0, 2), np.int64), drop_duplicates=drop)[0]
    )


def test_one_repair_is_enough_where_near_copies_have_copies(root, tmp_path, write_scenes):
    folder = write_scenes(
        tmp_path / "x",
        {"train/a": range(9), "train/b": range(20, 29), "val/a": [60], "val/b": [61], "test/a": [62], "test/b": [63]},
    )
    shutil.copy(folder / "train/a/00001.png", folder / "test/a/copy.png")
    Image.open(folder / "train/a/00001.png").save(folder / "train/a/near.jpg", quality=75)
    import_dataset(folder, "x", root)
    repaired = resplit_dataset("x", root, repair=True)
    assert {"train/a/00001.png", "train/a/near.jpg"} == set(repaired.facts["dropped"])
    assert find_leaks(repaired).ok


def test_folds_keep_exact_copies_of_shipped_splits_together(leaking, root):
    for each in fold_dataset("leaking", 3, root):
        assert find_leaks(each).ok


def test_a_fold_never_replaces_another_dataset(photos, root, tmp_path, write_scenes):
    other = write_scenes(tmp_path / "other", {"a": range(5), "b": range(9, 14)})
    stranger = import_dataset(other, "photos-fold1", root)
    with pytest.raises(ZooError, match="there is a dataset 'photos-fold1' already"):
        fold_dataset("photos", 3, root)
    assert load_dataset("photos-fold1", root).split_digest == stranger.split_digest
    assert not (root.data / "photos-fold0").exists()


def test_options_without_effect_are_refused(photos, root):
    with pytest.raises(ZooError, match="--group-csv needs --group-column"):
        resplit_dataset("photos", root, group_csv="x.csv")
    with pytest.raises(ZooError, match="hold near-duplicates already"):
        resplit_dataset("photos", root, near_duplicates=False)


def test_names_of_two_ways_that_mean_different_things_join_nothing():
    joined = join_groups([["1", "", ""], ["x", "1", "1"]], ["p", "q", "r"])
    assert joined[0] != joined[1] == joined[2]
