from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.data.find import builtin_names
from zoo.data.manifest import list_datasets, load_dataset, split_summary, verify_files
from zoo.data.resplit import resplit_dataset
from zoo.data.sources import describe_import, import_dataset
from zoo.errors import ZooError
from zoo.files import Home, sha256_bytes
from zoo.runs import SPLITS


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_folder(folder: Path, classes=("Benign cases", "Normal cases"), count: int = 20, offset: int = 0) -> Path:
    for place, label in enumerate(classes):
        for number in range(1, count + 1):
            picture(folder / label / f"case ({number}).png", offset + place * 1000 + number)
    return folder


def files_of(home: Home, name: str = "mine") -> list[bytes]:
    return [(home.data / name / each).read_bytes() for each in ("manifest.csv", "dataset.toml")]


@pytest.fixture
def root(tmp_path) -> Home:
    (tmp_path / "home").mkdir()
    return Home(tmp_path / "home")


@pytest.fixture
def source(tmp_path) -> Path:
    return make_folder(tmp_path / "source")


def test_a_folder_is_imported_where_it_lies(root, source):
    calls: list[tuple[int, int]] = []
    dataset = import_dataset(source, "mine", root, progress=lambda done, total: calls.append((done, total)))
    assert dataset.classes == ["Benign cases", "Normal cases"]
    assert dataset.negative_class == "Normal cases"
    assert dataset.root == source
    assert len(dataset.frame) == 40
    assert calls == [(number, 40) for number in range(1, 41)]
    summary = split_summary(dataset)["splits"]
    assert {split: summary[split]["images"] for split in SPLITS} == {"train": 28, "val": 6, "test": 6}
    assert summary["val"]["classes"] == {"Benign cases": 3, "Normal cases": 3}
    row = dataset.frame.iloc[0]
    assert row["path"] == "Benign cases/case (1).png"
    assert row["sample_id"] == sha256_bytes(row["path"].encode())[:16]
    assert row["group"] == row["sample_id"]
    assert row["sha256"] == sha256_bytes((source / row["path"]).read_bytes())
    assert verify_files(dataset) == []
    assert [each.name for each in root.data.iterdir()] == ["mine"]
    assert sorted(each.name for each in dataset.folder.iterdir()) == [".cache", "dataset.toml", "manifest.csv"]


def test_the_same_import_twice_gives_the_same_bytes_also_in_another_process(root, source):
    import_dataset(source, "mine", root, seed=3)
    before = files_of(root)
    import_dataset(source, "mine", root, seed=3)
    assert files_of(root) == before
    import_dataset(source, "mine", root, seed=3, overwrite=True)
    assert files_of(root) == before
    program = (
        "import sys; from zoo.data.sources import import_dataset; from zoo.files import home\n"
        "import_dataset(sys.argv[1], 'mine', home(sys.argv[2]), seed=3, overwrite=True)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program, str(source), str(root.root)], check=True, env=environment)
    assert files_of(root) == before


def test_other_content_of_the_same_name_is_refused_unless_overwritten(root, source):
    import_dataset(source, "mine", root)
    before = files_of(root)
    with pytest.raises(ZooError, match=r"'mine' is there already with other content \(split, manifest differ\)"):
        import_dataset(source, "mine", root, seed=1)
    with pytest.raises(ZooError, match=r"other content \(bad_images differ\); .*--overwrite"):
        import_dataset(source, "mine", root, bad_images="skip")
    picture(source / "Normal cases" / "case (1).png", 7777)
    with pytest.raises(ZooError, match=r"other content \(manifest differ\)"):
        import_dataset(source, "mine", root)
    assert files_of(root) == before
    import_dataset(source, "mine", root, overwrite=True)
    assert files_of(root) != before
    (root.data / "mine" / "dataset.toml").write_text("no toml")
    with pytest.raises(ZooError, match=r"is no valid TOML.*--overwrite"):
        import_dataset(source, "mine", root)


def test_what_a_person_wrote_into_dataset_toml_stays(root, source):
    import_dataset(source, "mine", root)
    path = root.data / "mine" / "dataset.toml"
    path.write_text('licence = "CC0"\nnote = "from the ward"\nmedical = true\n' + path.read_text())
    dataset = import_dataset(source, "mine", root)
    assert dataset.facts["licence"] == "CC0"
    assert dataset.facts["medical"] is True


def test_a_source_given_relatively_is_named_relatively_and_may_move(root, source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    dataset = import_dataset("source", "mine", root)
    assert 'root = "../../../source"' in files_of(root)[1].decode()
    assert dataset.root == source
    before = dataset.split_digest
    shutil.move(source, tmp_path / "moved")
    assert import_dataset(str(tmp_path / "moved"), "mine", root).root == tmp_path / "moved"
    assert load_dataset("mine", root).split_digest == before


def test_images_are_copied_where_asked(root, source):
    (source / "Normal cases" / "notes.txt").write_text("x")
    dataset = import_dataset(source, "mine", root, copy=True)
    assert dataset.root == root.data / "mine" / "images"
    assert 'root = "images"' in files_of(root)[1].decode()
    assert sorted(each.relative_to(dataset.root).as_posix() for each in dataset.root.rglob("*.*")) == sorted(
        dataset.frame["path"]
    )
    shutil.rmtree(source)
    assert verify_files(dataset) == []


def test_copied_images_that_were_lost_come_back(root, source):
    import_dataset(source, "mine", root, copy=True)
    before = files_of(root)
    shutil.rmtree(root.data / "mine" / "images")
    dataset = import_dataset(source, "mine", root, copy=True)
    assert verify_files(dataset) == []
    assert files_of(root) == before
    dataset = import_dataset(source, "mine", root, copy=True, overwrite=True)
    assert verify_files(dataset) == []
    assert [each.name for each in root.data.iterdir()] == ["mine"]


def test_odd_names_survive_the_import(root, tmp_path):
    names = ['a, "b"', "=1+1", "größe 肺", "two\nlines"]
    source = make_folder(tmp_path / "source", names, count=4)
    dataset = import_dataset(source, "mine", root)
    assert dataset.classes == sorted(names)
    assert verify_files(dataset) == []


def test_bad_images_fail_the_import_or_are_skipped(root, source):
    whole = (source / "Benign cases" / "case (1).png").read_bytes()
    (source / "Benign cases" / "case (2).png").write_bytes(whole[: len(whole) // 2])
    (source / "Normal cases" / "empty.jpg").write_bytes(b"")
    (source / "Normal cases" / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(source / "Normal cases" / "pipe.jpg")
    with pytest.raises(ZooError) as caught:
        import_dataset(source, "mine", root)
    assert str(caught.value) == (
        "4 of 43 images cannot be used; the first is 'Benign cases/case (2).png': truncated; mend them, or "
        "leave such images out with --bad-images skip"
    )
    assert list(root.data.iterdir()) == []
    dataset = import_dataset(source, "mine", root, bad_images="skip")
    assert len(dataset.frame) == 39
    assert dataset.bad_images == "skip"
    assert dataset.facts["skipped"] == {
        "Benign cases/case (2).png": "truncated",
        "Normal cases/empty.jpg": "zero bytes",
        "Normal cases/gone.jpg": "gone",
        "Normal cases/pipe.jpg": "no regular file",
    }
    assert any("skipped: 4 images" in line and "truncated" in line for line in describe_import(dataset))
    resplit_dataset("mine", root, seed=1)
    assert len(load_dataset("mine", root).facts["skipped"]) == 4


def test_a_file_name_that_is_no_utf_8_is_a_bad_image(root, source):
    odd = os.fsencode(source / "Normal cases") + b"/caf\xe9.png"
    shutil.copyfile(os.fsencode(source / "Normal cases" / "case (1).png"), odd)
    with pytest.raises(ZooError, match=r"1 of 41 images cannot be used; .*no valid UTF-8; mend it"):
        import_dataset(source, "mine", root)
    dataset = import_dataset(source, "mine", root, bad_images="skip")
    assert dataset.facts["skipped"] == {"Normal cases/caf\\udce9.png": "its name is no valid UTF-8"}


def test_a_class_of_which_no_image_is_left_is_named(root, source):
    (source / "c").mkdir()
    (source / "c" / "1.png").write_bytes(b"x")
    with pytest.raises(ZooError, match="no image of class 'c' can be used"):
        import_dataset(source, "mine", root, bad_images="skip")


def test_all_images_bad_is_an_error_under_either_policy(root, tmp_path):
    for label in "ab":
        (tmp_path / "source" / label).mkdir(parents=True)
        (tmp_path / "source" / label / "1.png").write_bytes(b"x")
    with pytest.raises(ZooError, match=r"2 of 2 images cannot be used; the first is 'a/1.png': no image"):
        import_dataset(tmp_path / "source", "mine", root, bad_images="skip")


def test_left_out_files_are_counted_and_said(root, source):
    (source / "about.txt").write_text("x")
    picture(source / "stray.png", 1)
    dataset = import_dataset(source, "mine", root)
    assert dataset.facts["left_out"] == {
        "files that are no image (.txt)": 1,
        "images outside any class folder": 1,
    }
    assert "left out: files that are no image (.txt): 1" in describe_import(dataset)


def test_groups_by_blocks_stay_together(root, source):
    dataset = import_dataset(source, "mine", root, group_blocks=5)
    assert dataset.facts["split"]["group_blocks"] == 5
    assert dataset.facts["counts"]["groups"] == 8
    assert (dataset.frame.groupby("group")["split"].nunique() == 1).all()
    assert set(dataset.frame["group"]) == {f"{label}/{block}" for label in dataset.classes for block in range(4)}


def test_groups_by_regex_stay_together(root, source):
    dataset = import_dataset(source, "mine", root, group_regex=r"\(\d*(\d)\)")
    assert dataset.facts["counts"]["groups"] == 10
    assert (dataset.frame.groupby("group")["split"].nunique() == 1).all()
    assert (dataset.frame.groupby("label")["split"].nunique() == 3).all()


def test_images_of_the_same_pixels_share_a_group(root, source):
    for number in (3, 9):
        path = source / "Normal cases" / f"case ({number}).png"
        with Image.open(path) as image:
            image.save(source / "Benign cases" / f"copy ({number}).bmp")
    dataset = import_dataset(source, "mine", root, group_blocks=5)
    groups = dict(zip(dataset.frame["path"], dataset.frame["group"], strict=True))
    assert groups["Benign cases/copy (3).bmp"] == groups["Normal cases/case (3).png"] == "Benign cases/0"
    assert groups["Normal cases/case (5).png"] == "Benign cases/0"
    assert groups["Normal cases/case (9).png"] == groups["Benign cases/case (6).png"] == "Benign cases/1"
    assert dataset.facts["counts"]["pixel_copies"] == 2
    assert dataset.facts["counts"]["copies_across_splits"] == 0
    assert any("2 images have the same pixels" in line for line in describe_import(dataset))


def make_splits(tmp_path: Path, *names: str) -> Path:
    for place, name in enumerate(names):
        make_folder(tmp_path / "source" / name, ("a", "b"), 20 if name == "train" else 5, offset=place * 5000)
    return tmp_path / "source"


def test_shipped_splits_are_kept(root, tmp_path):
    source = make_splits(tmp_path, "train", "valid", "test")
    dataset = import_dataset(source, "mine", root)
    assert dataset.facts["split"] == {"shipped": ["train", "val", "test"], "drawn": []}
    assert {split: len(dataset.of_split(split)) for split in SPLITS} == {"train": 40, "val": 10, "test": 10}
    assert all(path.startswith("valid/") for path in dataset.of_split("val")["path"])
    assert "kept as shipped: train, val, test" in describe_import(dataset)


def test_leaks_between_shipped_splits_are_counted_and_not_mended(root, tmp_path):
    source = make_splits(tmp_path, "train", "valid", "test")
    shutil.copyfile(source / "train/a/case (1).png", source / "test/a/case (1).png")
    dataset = import_dataset(source, "mine", root, group_regex=r"(\w)/case")
    assert dataset.facts["counts"]["copies_across_splits"] == 1
    assert dataset.facts["counts"]["groups_across_splits"] == 2
    assert len(dataset.of_split("test")) == 10
    said = " ".join(describe_import(dataset))
    assert "1 pairs of the same picture stand in different splits" in said
    assert "2 groups stand in more than one split" in said


@pytest.mark.parametrize(("shipped", "cut"), [(("train", "test"), "val"), (("train", "valid"), "test")])
def test_a_split_that_is_missing_is_cut_from_train_by_groups(root, tmp_path, shipped, cut):
    source = make_splits(tmp_path, *shipped)
    dataset = import_dataset(source, "mine", root, group_blocks=4)
    assert dataset.facts["split"]["drawn"] == [cut]
    assert dataset.facts["split"]["ratios"] == [0.7, 0.15, 0.15]
    rows = dataset.of_split(cut)
    assert len(rows) == 8
    assert all(path.startswith("train/") for path in rows["path"])
    of_train = dataset.frame[dataset.frame["path"].str.startswith("train/")]
    assert (of_train.groupby("group")["split"].nunique() == 1).all()
    assert f"cut from train: {cut}" in " ".join(describe_import(dataset))
    before = files_of(root)
    resplit_dataset("mine", root)
    assert files_of(root) == before
    again = resplit_dataset("mine", root, seed=5)
    kept = next(split for split in ("val", "test") if split != cut)
    assert again.of_split(kept)["path"].tolist() == dataset.of_split(kept)["path"].tolist()
    assert again.split_digest != dataset.split_digest


def test_train_alone_is_cut_in_three(root, tmp_path):
    dataset = import_dataset(make_splits(tmp_path, "train"), "mine", root)
    assert {split: len(dataset.of_split(split)) for split in SPLITS} == {"train": 28, "val": 6, "test": 6}
    assert dataset.classes == ["a", "b"]


def test_a_csv_with_groups_is_split_by_them(root, source):
    lines = ["path;label;patient"]
    for path in sorted(source.rglob("*.png")):
        number = int(path.stem.split("(")[1].rstrip(")"))
        lines.append(f"{path.relative_to(source)};{'ill' if 'Ben' in str(path) else 'no finding'};p{number % 7}")
    (source / "labels.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    dataset = import_dataset(source / "labels.csv", "mine", root, group_column="patient")
    assert dataset.negative_class == "no finding"
    assert dataset.facts["split"]["group_column"] == "patient"
    assert set(dataset.frame["group"]) == {f"p{number}" for number in range(7)}
    assert (dataset.frame.groupby("group")["split"].nunique() == 1).all()
    assert dataset.root == source


def test_a_csv_with_shipped_splits_and_a_missing_file(root, source):
    paths = sorted(source.rglob("*.png"))
    lines = ["path,label,split"]
    for place, path in enumerate(paths):
        lines.append(f"{path},{path.parent.name},{('train', 'dev', 'test', 'train')[place % 4]}")
    (source / "labels.csv").write_text("\n".join([*lines, "missing.png,Normal cases,train"]))
    with pytest.raises(ZooError, match=r"1 of 41 images cannot be used; the first is 'missing.png': gone"):
        import_dataset(source / "labels.csv", "mine", root)
    dataset = import_dataset(source / "labels.csv", "mine", root, bad_images="skip")
    assert {split: len(dataset.of_split(split)) for split in SPLITS} == {"train": 20, "val": 10, "test": 10}


def test_a_class_that_a_shipped_csv_split_lacks_in_train_is_refused(root, source):
    lines = [f"{path},{path.parent.name},{'train' if 'Ben' in str(path) else 'test'}" for path in source.rglob("*.png")]
    lines = [line.replace("(1).png,Benign cases,train", "(1).png,Benign cases,val") for line in lines]
    (source / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
    with pytest.raises(ZooError, match="class 'Normal cases' has no image in train"):
        import_dataset(source / "labels.csv", "mine", root)
    assert list(root.data.iterdir()) == []


def test_an_npz_is_extracted_with_its_splits(root, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 40), ("val", 12), ("test", 15)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 11)[:, None].astype(np.uint8)
    np.savez_compressed(tmp_path / "mnist.npz", **arrays)
    dataset = import_dataset(tmp_path / "mnist.npz", "mine", root)
    assert dataset.classes == [str(number) for number in range(11)]
    assert dataset.root == root.data / "mine" / "images"
    assert {split: len(dataset.of_split(split)) for split in SPLITS} == {"train": 40, "val": 12, "test": 15}
    with Image.open(dataset.image_path("val/03.png")) as image:
        np.testing.assert_array_equal(np.array(image), arrays["val_images"][3])
    before = files_of(root)
    import_dataset(tmp_path / "mnist.npz", "mine", root)
    assert files_of(root) == before
    assert verify_files(dataset) == []


def test_resplitting_draws_the_recorded_split_or_another(root, source):
    dataset = import_dataset(source, "mine", root, group_blocks=4, seed=2)
    before = files_of(root)
    assert resplit_dataset("mine", root).split_digest == dataset.split_digest
    assert files_of(root) == before
    other = resplit_dataset("mine", root, ratios=(0.5, 0.25, 0.25))
    assert other.facts["split"]["ratios"] == [0.5, 0.25, 0.25]
    assert other.facts["split"]["seed"] == 2
    assert other.facts["split"]["group_blocks"] == 4
    assert {split: len(other.of_split(split)) for split in SPLITS} == {"train": 24, "val": 8, "test": 8}
    resplit_dataset("mine", root, ratios=(0.7, 0.15, 0.15))
    assert files_of(root) == before
    finer = resplit_dataset("mine", root, group_blocks=2)
    assert finer.facts["split"]["group_blocks"] == 2
    assert finer.facts["counts"]["groups"] == 20
    by_regex = resplit_dataset("mine", root, group_regex=r"\d+")
    assert "group_blocks" not in by_regex.facts["split"]
    for wrong in (
        {"ratios": (1, 1, 1)},
        {"seed": -1},
        {"group_regex": "("},
        {"group_regex": "a", "group_blocks": 2},
    ):
        with pytest.raises(ZooError):
            resplit_dataset("mine", root, **wrong)


def test_shipped_splits_are_drawn_again_by_force_alone(root, tmp_path):
    dataset = import_dataset(make_splits(tmp_path, "train", "val", "test"), "mine", root)
    before = files_of(root)
    assert resplit_dataset("mine", root).split_digest == dataset.split_digest
    with pytest.raises(ZooError, match="the splits of 'mine' were shipped with the data and are kept; --repair drops"):
        resplit_dataset("mine", root, seed=1)
    assert files_of(root) == before
    forced = resplit_dataset("mine", root, force=True)
    assert forced.facts["split"]["shipped"] == []
    assert {split: len(forced.of_split(split)) for split in SPLITS} == {"train": 42, "val": 9, "test": 9}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ratios": (0.5, 0.5)}, "ratios must be three numbers"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"bad_images": "ignore"}, "bad_images must be fail or skip. Got 'ignore'"),
        ({"group_blocks": 0}, "group blocks must be a whole number of 1 or more"),
        ({"group_regex": "["}, "is no valid regular expression"),
        ({"group_regex": "x(y)"}, "finds no group in 'Benign cases/case"),
        ({"window": "lungs"}, "window must be lung, mediastinum, bone or CENTRE/WIDTH.*did you mean 'lung'"),
        ({"rescale": "0,5"}, "rescale must be SLOPE,INTERCEPT"),
        ({"from_": "x"}, "--from goes with a public data set"),
        ({"group_column": "patient"}, "group_column is for a CSV"),
        (
            {"negative_class": "normal cases"},
            "negative_class must be one of the classes .*did you mean 'Normal cases'",
        ),
        (
            {"group_blocks": 20},
            "class 'Benign cases' has 1 group and needs at least 3 to stand in train, val, test",
        ),
        ({"group_regex": "case"}, "class 'Benign cases' has 1 group"),
        ({"patients": 3}, "the option 'patients' is for built-in data alone"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_left(root, source, options, reason):
    with pytest.raises(ZooError, match=reason) as caught:
        import_dataset(source, "mine", root, **options)
    assert "\n" not in str(caught.value)
    assert not root.data.exists() or list(root.data.iterdir()) == []


def test_groups_that_would_have_to_be_torn_are_an_error(root, tmp_path):
    # Seven classes, each in three of seven groups, any two sharing one: no split can show each class thrice.
    lines = ["path,label,group"]
    for label, groups in enumerate(((0, 1, 2), (0, 3, 4), (0, 5, 6), (1, 3, 5), (1, 4, 6), (2, 3, 6), (2, 4, 5))):
        for group in groups:
            path = picture(tmp_path / "fano" / f"{label}-{group}.png", label * 10 + group)
            lines.append(f"{path.name},class {label},{group}")
    (tmp_path / "fano" / "labels.csv").write_text("\n".join(lines))
    with pytest.raises(ZooError, match=r"class 'class .' cannot stand in .* without tearing a group apart"):
        import_dataset(tmp_path / "fano" / "labels.csv", "mine", root)


def test_wrong_sources_are_refused(root, source, tmp_path):
    (tmp_path / "archive.zip").write_bytes(b"PK")
    one = make_folder(tmp_path / "one", ("a",), 1)
    wrong = {
        str(tmp_path / "nowhere"): "there is nothing at '.*nowhere'; give a folder, a .csv or .npz file, or built-in",
        "digit": "there is nothing at 'digit'; did you mean 'digits'",
        "x" * 300: "there is nothing at",
        str(tmp_path / "archive.zip"): "the source must be a folder.*archive.zip'; unpack an archive first",
        str(one): r"two or more classes. Got 1 image of 1, 'a'",
    }
    for name, reason in wrong.items():
        with pytest.raises(ZooError, match=reason):
            import_dataset(name, "mine", root)
    with pytest.raises(ZooError, match="dataset name must be"):
        import_dataset(source, "my data", root)
    shutil.copytree(source, root.data / "mine" / "pictures")
    for inside in (root.data / "mine", root.data / "mine" / "pictures"):
        with pytest.raises(ZooError, match="lies in the dataset's own folder"):
            import_dataset(inside, "mine", root)
    assert len(import_dataset(root.data / "mine" / "pictures", "other", root).frame) == 40


def test_the_zoos_own_folders_are_no_classes(source):
    root = Home(source)
    first = import_dataset(source, "mine", root)
    before = files_of(root)
    assert import_dataset(source, "mine", root).classes == first.classes == ["Benign cases", "Normal cases"]
    assert files_of(root) == before


def test_a_home_that_cannot_be_written_is_said_before_the_work(source, tmp_path):
    (tmp_path / "home").write_text("a file")
    with pytest.raises(ZooError, match="cannot write"):
        import_dataset(source, "mine", Home(tmp_path / "home"))


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (("NORMAL", "PNEUMONIA"), "NORMAL"),
        (("abnormal", "normal_chest"), "normal_chest"),
        (("No Finding", "mass"), "No Finding"),
        (("Covid", "covid-negative"), "covid-negative"),
        (("normal a", "normal b"), None),
        (("rose", "tulip"), None),
    ],
)
def test_the_class_of_the_healthy_is_found_by_its_name(root, tmp_path, classes, expected):
    dataset = import_dataset(make_folder(tmp_path / "source", classes, 4), "mine", root)
    assert dataset.negative_class == expected
    given = import_dataset(tmp_path / "source", "given", root, negative_class=classes[1])
    assert given.negative_class == classes[1]


def test_built_in_data_are_made_on_first_use(root):
    assert {"lung-phantom", "digits"} <= set(builtin_names())
    dataset = load_dataset("digits", root)
    assert dataset.facts["made_now"] is True
    assert dataset.classes == [str(number) for number in range(10)]
    assert len(dataset.frame) == 1797
    assert dataset.facts["licence"]
    assert dataset.facts["import"] == {"kind": "built-in", "name": "digits"}
    again = load_dataset("digits", root)
    assert "made_now" not in again.facts
    assert again.split_digest == dataset.split_digest
    assert next(row["status"] for row in list_datasets(root) if row["name"] == "digits") == "ready"


def test_the_phantom_is_imported_with_options_and_by_patient(root):
    options = {"patients": 12, "slices_per_patient": 2, "image_size_px": 48}
    dataset = import_dataset("lung-phantom", "small", root, **options)
    assert len(dataset.frame) == 24
    assert dataset.frame["group"].nunique() == 12
    assert (dataset.frame.groupby("group")["split"].nunique() == 1).all()
    assert dataset.negative_class == "normal"
    assert dataset.facts["medical"] is True
    assert "Synthetic" in dataset.facts["note"]
    assert dataset.facts["import"] == {"kind": "built-in", "name": "lung-phantom", **options}
    before = files_of(root, "small")
    import_dataset("lung-phantom", "small", root, **options)
    assert files_of(root, "small") == before
    other = import_dataset("lung-phantom", "other", root, data_seed=1, **options)
    assert set(other.frame["sha256"]).isdisjoint(dataset.frame["sha256"])
    with pytest.raises(ZooError, match="lung-phantom has no option 'patient'"):
        import_dataset("lung-phantom", "third", root, patient=3)


@pytest.mark.slow
@pytest.mark.assets
def test_iq_othnccd_by_blocks_of_numbers(root, assets):
    start = time.perf_counter()
    dataset = import_dataset(assets / "data" / "iq_othnccd", "iq_othnccd", root, group_blocks=20)
    assert time.perf_counter() - start < 60  # 4 s on two cores; other work may share them
    assert len(dataset.frame) == 1097
    assert dataset.classes == ["Bengin cases", "Malignant cases", "Normal cases"]
    assert dataset.negative_class == "Normal cases"
    assert dataset.facts["left_out"] == {"files that are no image (.txt)": 1}
    assert dataset.facts["counts"]["pixel_copies"] == 42
    assert (dataset.frame.groupby("group")["split"].nunique() == 1).all()
    assert (dataset.frame.groupby("pixel_sha256")["split"].nunique() == 1).all()
    for split, share in zip(SPLITS, (0.7, 0.15, 0.15), strict=True):
        assert abs(len(dataset.of_split(split)) / 1097 - share) < 0.02
        assert set(dataset.of_split(split)["label"]) == set(dataset.classes)
    before = files_of(root, "iq_othnccd")
    resplit_dataset("iq_othnccd", root)
    assert files_of(root, "iq_othnccd") == before


@pytest.mark.slow
@pytest.mark.assets
def test_flowers(root, assets):
    dataset = import_dataset(assets / "data" / "flowers", "flowers", root)
    assert len(dataset.frame) == 4317
    assert dataset.classes == ["daisy", "dandelion", "rose", "sunflower", "tulip"]
    assert dataset.negative_class is None
    assert dataset.facts["counts"]["pixel_copies"] == 6
    assert verify_files(dataset, ["val"]) == []


def test_a_disk_that_is_full_is_said_and_nothing_stays(full_disk):
    with pytest.raises(ZooError, match=r"cannot write .*No space left on device; free space on that disk"):
        import_dataset("digits", "digits", Home(full_disk))
    assert list((full_disk / "data").iterdir()) == []


def test_an_overwrite_that_fails_leaves_the_old_images(root, tmp_path, source):
    dataset = import_dataset(source, "mine", root, copy=True)
    images = sorted(path for path in dataset.root.rglob("*.png"))
    other = make_folder(tmp_path / "other", ("a", "b"), 9, 5000)
    lines = ["path,label,split"] + [
        f"{path.relative_to(tmp_path)},x,train" for path in sorted(other.rglob("*.png"))[:9]
    ]
    lines += [
        f"{path.relative_to(tmp_path)},y,{'val' if n % 2 else 'test'}"
        for n, path in enumerate(sorted(other.rglob("*.png"))[9:])
    ]
    (tmp_path / "bad.csv").write_text("\n".join(lines))
    with pytest.raises(ZooError, match="class 'y' has no image in train"):
        import_dataset(tmp_path / "bad.csv", "mine", root, copy=True, overwrite=True)
    assert sorted(path for path in dataset.root.rglob("*.png")) == images
    assert load_dataset("mine", root).split_digest == dataset.split_digest


def test_an_overwrite_by_images_elsewhere_takes_the_copies_away(root, source):
    import_dataset(source, "mine", root, copy=True)
    import_dataset(source, "mine", root, overwrite=True)
    assert not (root.data / "mine" / "images").exists()


@pytest.mark.parametrize("path", ["~nosuchuser/x", "~nosuchuser/x.csv"])
def test_a_user_who_is_not_there(root, path):
    with pytest.raises(ZooError, match="no home folder for"):
        import_dataset(path, "mine", root)
