from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.data.ecosystem import find_in_npz
from zoo.data.layouts import find_in_folder
from zoo.data.listings import find_in_csv
from zoo.errors import ZooError

COLUMNS = ("path", "label", None)


def touch(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")
    return folder


def write_csv(tmp_path: Path, text: str, encoding: str = "utf-8") -> Path:
    (tmp_path / "labels.csv").write_bytes(text.encode(encoding))
    return tmp_path / "labels.csv"


def test_a_folder_per_class(tmp_path):
    touch(tmp_path, "Normal cases/a (1).JPG", "Normal cases/deep/er/b.png", "größe 肺/c.tiff", "größe 肺/d.Webp")
    found = find_in_folder(tmp_path, {})
    assert found.kind == "folder"
    assert found.paths == [
        "Normal cases/a (1).JPG",
        "Normal cases/deep/er/b.png",
        "größe 肺/c.tiff",
        "größe 肺/d.Webp",
    ]
    assert found.labels == ["Normal cases", "Normal cases", "größe 肺", "größe 肺"]
    assert found.splits == [""] * 4
    assert found.left_out == {}


def test_hidden_files_are_passed_over_and_others_counted(tmp_path):
    touch(
        tmp_path,
        "a/1.png",
        "b/1.png",
        "a/.hidden.png",
        ".git/x.png",
        "__MACOSX/a/1.png",
        "a/Thumbs.db",
        ".DS_Store",
    )
    touch(tmp_path, "about us.txt", "a/notes.TXT", "b/README", "stray.png", "other.jpg")
    found = find_in_folder(tmp_path, {})
    assert found.paths == ["a/1.png", "b/1.png"]
    assert found.left_out == {
        "files that are no image (.txt)": 2,
        "files that are no image (no suffix)": 1,
        "images outside any class folder": 2,
    }


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path / "real", "1.png", "sub/2.png")
    touch(tmp_path / "source", "b/1.png")
    (tmp_path / "source" / "a").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "sub" / "up").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "self.png").symlink_to("self.png")
    found = find_in_folder(tmp_path / "source", {})
    assert found.paths == ["a/1.png", "a/self.png", "a/sub/2.png", "b/1.png"]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ((), "has no image in a class folder .found: nothing."),
        (("1.png", "2.png"), "has no image in a class folder .found: 2 images outside any class folder."),
        (("notes.txt",), "has no image in a class folder"),
        (("a/1.png", "b/notes.txt"), "the class folder 'b' holds no image; fill or remove it"),
        (
            ("data/a/1.png", "data/b/1.png"),
            "has one class folder, 'data', and folders in it; did you mean .*/data'",
        ),
    ],
)
def test_folders_without_classes_are_refused(tmp_path, files, reason):
    (touch(tmp_path, *files)).mkdir(exist_ok=True)
    with pytest.raises(ZooError, match=reason):
        find_in_folder(tmp_path, {})


def test_an_empty_class_folder_is_named(tmp_path):
    touch(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "c d").mkdir()
    with pytest.raises(ZooError, match="the class folder 'c d' holds no image"):
        find_in_folder(tmp_path, {})


def test_a_class_name_that_is_no_utf_8_is_refused(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)  # noqa: PTH102
    touch(tmp_path, "b/1.png")
    with open(folder + b"/1.png", "wb"):  # noqa: PTH123
        pass
    with pytest.raises(ZooError, match=r"the name of the class folder 'caf.*udce9' is no valid UTF-8"):
        find_in_folder(tmp_path, {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    touch(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "b").chmod(0)
    with pytest.raises(ZooError, match=r"cannot read the folder .*b': Permission denied"):
        find_in_folder(tmp_path, {})


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "dev"])
def test_ready_splits_are_kept(tmp_path, name):
    touch(
        tmp_path,
        "Train/a/1.png",
        "Train/b/2.png",
        f"{name}/a/3.png",
        f"{name}/b/4.png",
        "test/a/5.png",
        "test/b/6.png",
    )
    found = find_in_folder(tmp_path, {})
    assert found.kind == "splits"
    by_path = dict(zip(found.paths, zip(found.labels, found.splits, strict=True), strict=True))
    assert by_path["Train/a/1.png"] == ("a", "train")
    assert by_path[f"{name}/b/4.png"] == ("b", "val")
    assert by_path["test/b/6.png"] == ("b", "test")


def test_images_beside_ready_splits_are_counted(tmp_path):
    touch(
        tmp_path,
        "train/a/1.png",
        "train/b/2.png",
        "train/stray.png",
        "test/a/5.png",
        "test/b/6.png",
        "pred/7.png",
    )
    found = find_in_folder(tmp_path, {})
    assert len(found.paths) == 4
    assert found.left_out == {"images outside any class folder": 1, "images outside the split folders": 1}


def test_a_class_may_be_called_train(tmp_path):
    touch(tmp_path, "train/1.png", "bus/1.png", "car/1.png")
    found = find_in_folder(tmp_path, {})
    assert found.labels == ["bus", "car", "train"]
    assert found.splits == [""] * 3


def test_classes_that_differ_between_splits_are_listed(tmp_path):
    touch(tmp_path, "train/normal/1.png", "train/adeno left/1.png", "test/normal/1.png", "test/benign/1.png")
    with pytest.raises(ZooError) as caught:
        find_in_folder(tmp_path, {})
    assert "test has 'benign' that train has not" in str(caught.value)
    assert "test lacks 'adeno left'" in str(caught.value)


def test_two_folders_of_one_split_and_an_empty_class_of_a_split_are_refused(tmp_path):
    touch(tmp_path, "train/a/1.png", "train/b/1.png", "val/a/1.png", "valid/a/1.png")
    with pytest.raises(ZooError, match="the folders val and valid are both the split val; keep one"):
        find_in_folder(tmp_path, {})
    touch(tmp_path / "x", "train/a/1.png", "test/a/1.png", "train/b/2.png", "test/b/notes.txt")
    with pytest.raises(ZooError, match="the class folder 'test/b' holds no image"):
        find_in_folder(tmp_path / "x", {})


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_with_split_and_group(tmp_path, separator):
    lines = ["path,label,split,group", "x/1.png,a,train,p1", "2.png , b,valid,p2", "3.png,b,test,p3", ""]
    path = write_csv(tmp_path, "\r\n".join(lines).replace(",", separator), "utf-8-sig")
    found = find_in_csv(path, *COLUMNS)
    assert found.root == tmp_path
    assert found.paths == ["x/1.png", "2.png", "3.png"]
    assert found.labels == ["a", "b", "b"]
    assert found.splits == ["train", "val", "test"]
    assert found.groups == ["p1", "p2", "p3"]
    assert found.grouped_by == {"group_column": "group"}


def test_a_csv_with_other_column_names_quotes_and_formulas(tmp_path):
    path = write_csv(tmp_path, 'file,class,patient\n"a, ""b"".png",=1+1,p1\n"two\nlines.png",肺,p2\n')
    found = find_in_csv(path, "file", "class", "patient")
    assert found.paths == ['a, "b".png', "two\nlines.png"]
    assert found.labels == ["=1+1", "肺"]
    assert found.grouped_by == {"group_column": "patient"}


def test_the_root_of_a_csv_is_the_folder_that_holds_all(tmp_path):
    inner = tmp_path / "lists"
    inner.mkdir()
    path = write_csv(inner, f"path,label\n../images/1.png,a\n{tmp_path}/images/deep/2.png,b\n")
    found = find_in_csv(path, *COLUMNS)
    assert found.root == tmp_path / "images"
    assert found.paths == ["1.png", "deep/2.png"]
    path = write_csv(inner, f"path,label\n{inner}/1.png,a\n2.png,b\n")
    assert find_in_csv(path, *COLUMNS).root == inner
    path = write_csv(inner, "path,label\n/one/1.png,a\n/two/2.png,b\n")
    with pytest.raises(ZooError, match="must lie below one folder; they share none"):
        find_in_csv(path, *COLUMNS)


def test_empty_columns_count_as_none(tmp_path):
    found = find_in_csv(write_csv(tmp_path, "path,label,split,group\n1.png,a,,\n2.png,b,,\n"), *COLUMNS)
    assert found.splits == ["", ""]
    assert found.groups == ["", ""]
    assert found.grouped_by == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no column 'path'. It has none"),
        ("pat,label\n1.png,a\n", "has no column 'path'; did you mean 'pat'.*It has pat, label"),
        ("path,label\n", "has no rows; it must list images"),
        ("path,label\n1.png\n", "line 2: 1 fields where the header has 2"),
        ("path,label\n1.png,a\n1.png,b\n", r"row 2 \(1.png\): its path stands there twice"),
        ("path,label\n1.png,a\n./x/../1.png,b\n", "row 2 .*: its path stands there twice"),
        ("path,label\n1.png,\n", r"row 1 \(1.png\): its label is empty"),
        ("path,label\n,a\n", "row 1 .*: its path is empty"),
        ("path,label,split\n1.png,a,trian\n", "row 1 .*: split must be one of train, val, test. Got 'trian'"),
        (
            "path,label,split\n1.png,a,train\n2.png,a,\n",
            "column 'split' is empty in 1 of 2 rows, first in row 2",
        ),
        ("path,label,group\n1.png,a,p\n2.png,a,\n", "column 'group' is empty in 1 of 2 rows"),
        ("path,label,split\n1.png,a,test\n2.png,a,test\n", "no row of train"),
        ('path,label\n"1.png,a\n', "is no valid CSV"),
        ("path,label\n1\0.png,a\n", "a field has a zero byte"),
    ],
)
def test_a_wrong_csv_is_refused_with_the_row(tmp_path, text, reason):
    with pytest.raises(ZooError, match=reason) as caught:
        find_in_csv(write_csv(tmp_path, text), *COLUMNS)
    assert "labels.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_csv_that_is_no_text_or_lacks_the_group_column_is_refused(tmp_path):
    with pytest.raises(ZooError, match="is no text in UTF-8"):
        find_in_csv(write_csv(tmp_path, "path,label\ncafé,a\n", "latin-1"), *COLUMNS)
    path = write_csv(tmp_path, "path,label\n1.png,a\n")
    with pytest.raises(ZooError, match="has no column 'patient'"):
        find_in_csv(path, "path", "label", "patient")


def npz(tmp_path: Path, **arrays: np.ndarray) -> Path:
    np.savez(tmp_path / "mnist.npz", **arrays)
    return tmp_path / "mnist.npz"


def medmnist(shape: tuple[int, ...] = (28, 28), count: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 3).astype(np.uint8)[:, None]
    return arrays


@pytest.mark.parametrize("shape", [(28, 28), (28, 20, 3), (9, 9, 1)])
def test_a_medmnist_npz_is_written_as_images(tmp_path, shape):
    arrays = medmnist(shape)
    found = find_in_npz(npz(tmp_path, **arrays), tmp_path / "images")
    assert len(found.paths) == 36
    assert found.paths[0] == "train/00.png"
    assert found.splits.count("val") == 12
    assert set(found.labels) == {"0", "1", "2"}
    for place in (0, 11, 12, 35):
        split, number = found.splits[place], int(found.paths[place].split("/")[1].removesuffix(".png"))
        with Image.open(tmp_path / "images" / found.paths[place]) as image:
            np.testing.assert_array_equal(np.array(image), np.squeeze(arrays[f"{split}_images"][number]))
        assert found.labels[place] == str(arrays[f"{split}_labels"][number, 0])


def test_labels_of_one_dimension_and_splits_that_are_missing(tmp_path):
    arrays = medmnist()
    labels = arrays["train_labels"][:, 0]
    found = find_in_npz(npz(tmp_path, train_images=arrays["train_images"], train_labels=labels), tmp_path / "images")
    assert set(found.splits) == {"train"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"train_images": None}, "must hold train_images and train_labels .*It holds"),
        ({"val_labels": None}, "must hold both val_images and val_labels, or neither"),
        (
            {"train_labels": np.zeros((12, 14), np.uint8)},
            "train_labels has 14 labels per image; only one label",
        ),
        ({"train_labels": np.zeros(11, np.uint8)}, "train_labels must be 12 whole numbers"),
        ({"train_labels": np.zeros(12, np.float32)}, "train_labels must be 12 whole numbers.*Got float32"),
        ({"test_images": np.zeros((12, 8, 8), np.float32)}, "test_images must be uint8 .*Got float32"),
        (
            {"test_images": np.zeros((12, 8, 8, 8), np.uint8)},
            r"test_images must be uint8 .*Got uint8 of \(12, 8, 8, 8\)",
        ),
        (
            {"test_images": np.zeros((0, 8, 8), np.uint8), "test_labels": np.zeros(0, np.uint8)},
            "has no pixels",
        ),
        ({"train_labels": np.array([{}] * 12, dtype=object)}, "is no .npz of plain arrays"),
    ],
)
def test_a_wrong_npz_is_refused(tmp_path, change, reason):
    arrays = {key: value for key, value in (medmnist() | change).items() if value is not None}
    with pytest.raises(ZooError, match=reason):
        find_in_npz(npz(tmp_path, **arrays), tmp_path / "images")


def test_files_that_are_no_npz_are_refused(tmp_path):
    whole = npz(tmp_path, **medmnist()).read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 3] ^= 0xFF
    np.save(tmp_path / "array.npy", np.zeros(3))
    array = (tmp_path / "array.npy").read_bytes()
    for data in (b"", b"hello", whole[: len(whole) // 2], bytes(middle), array, b"PK\x03\x04" + b"\0" * 50):
        (tmp_path / "bad.npz").write_bytes(data)
        with pytest.raises(ZooError, match=r"bad.npz"):
            find_in_npz(tmp_path / "bad.npz", tmp_path / "images")


def test_a_link_into_a_folder_that_may_not_be_read_costs_no_other_file(tmp_path, as_nobody):
    touch(tmp_path, "data/a/1.png", "secret/sub/2.png")
    (tmp_path / "data" / "a" / "link.png").symlink_to("../../secret/sub")
    (tmp_path / "secret").chmod(0o700)
    tmp_path.chmod(0o755)
    imports = "from zoo.data.layouts import find_in_folder; from pathlib import Path"
    assert as_nobody(imports, "print(find_in_folder(Path('data'), {}).paths)", tmp_path) == (
        "['a/1.png', 'a/link.png']\n"
    )
