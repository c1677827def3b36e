from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.data.manifest import (
    COLUMNS,
    list_datasets,
    load_dataset,
    manifest_bytes,
    map_files,
    split_summary,
    verify_files,
    write_dataset,
)
from zoo.errors import ZooError
from zoo.files import Home, sha256_bytes

RECORD = {
    "name": "tiny",
    "summary": "six images",
    "root": "images",
    "classes": ["b", "a"],
    "negative_class": "a",
    "bad_images": "fail",
    "counts": {"images": 6},
}


def tiny_rows() -> list[tuple[str, ...]]:
    rows = []
    for number, (label, split) in enumerate((label, split) for label in "ab" for split in ("train", "val", "test")):
        digest = sha256_bytes(f"{label}{split}".encode())
        rows.append((f"id{number}", f"{label}/{split}.png", label, f"g{number}", split, digest, "0" * 64))
    return rows


def make_tiny(tmp_path: Path, rows=None, **changes) -> Home:
    folder = tmp_path / "data" / "tiny"
    write_dataset(folder, tiny_rows() if rows is None else rows, RECORD | changes)
    for _, path, label, _, split, *_ in tiny_rows():
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / path).write_bytes(f"{label}{split}".encode())
    return Home(tmp_path)


def test_a_dataset_is_read_as_it_was_written(tmp_path):
    dataset = load_dataset("tiny", make_tiny(tmp_path))
    assert dataset.name == "tiny"
    assert dataset.classes == ["b", "a"]
    assert dataset.negative_class == "a"
    assert dataset.bad_images == "fail"
    assert dataset.root == tmp_path / "data" / "tiny" / "images"
    assert dataset.facts == {"summary": "six images", "counts": {"images": 6}}
    assert dataset.split_digest == sha256_bytes((dataset.folder / "manifest.csv").read_bytes())
    assert list(dataset.frame.columns) == list(COLUMNS)
    assert sorted(dataset.frame.itertuples(index=False, name=None)) == sorted(tiny_rows())
    assert dataset.frame["path"].is_monotonic_increasing
    assert dataset.of_split("val")["path"].tolist() == ["a/val.png", "b/val.png"]
    assert dataset.of_split("val").index.tolist() == [0, 1]
    assert dataset.image_path("a/val.png").read_bytes() == b"aval"
    with pytest.raises(ZooError, match=r"split must be one of train, val, test. Got 'tests'; did you mean 'test'"):
        dataset.of_split("tests")


def test_the_same_input_in_any_order_gives_the_same_bytes(tmp_path):
    folder = make_tiny(tmp_path).data / "tiny"
    before = [(folder / name).read_bytes() for name in ("manifest.csv", "dataset.toml")]
    make_tiny(tmp_path, rows=tiny_rows()[::-1])
    assert before == [(folder / name).read_bytes() for name in ("manifest.csv", "dataset.toml")]
    assert b"\r" not in before[0]
    assert before[0].startswith(b"sample_id,path,label,group,split,sha256,pixel_sha256\nid")


NAMES = [
    "a, b",
    'say "hi"',
    "two\nlines",
    "lone\rreturn",
    "crlf\r\n",
    "=cmd|' /C calc'!A0",
    " blank ",
    "größe 肺",
    "-",
    "'",
    "\t",
]
texts = st.one_of(
    st.sampled_from(NAMES),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12),
)


@given(labels=st.lists(texts, min_size=2, max_size=4, unique=True), group=texts)
def test_any_name_survives_the_round_trip(tmp_path_factory, labels, group):
    home = Home(tmp_path_factory.mktemp("home"))
    rows = [
        (f"{number}{split}", f"{number}/{split}", label, group, split, "0", "1")
        for number, label in enumerate(labels)
        for split in ("train", "val", "test")
    ]
    write_dataset(home.data / "tiny", rows, RECORD | {"classes": labels, "negative_class": labels[0]})
    dataset = load_dataset("tiny", home)
    assert dataset.classes == labels
    assert sorted(dataset.frame.itertuples(index=False, name=None)) == sorted(rows)


def test_odd_paths_survive_the_round_trip(tmp_path):
    rows = [(each[0], f"{name}/{each[1]}", *each[2:]) for each, name in zip(tiny_rows() * 2, NAMES, strict=False)]
    rows = [(f"s{number}", *row[1:]) for number, row in enumerate(rows)]
    dataset = load_dataset("tiny", make_tiny(tmp_path, rows=rows))
    assert sorted(dataset.frame["path"]) == sorted(row[1] for row in rows)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b",pixel_sha256\n", b"\n", "has no column pixel_sha256"),
        (b"sample_id,path", b"sample_id;path", "has no column sample_id, path"),
        (
            b"g1,val",
            b"g1,valid",
            r"image 'a/val.png': split must be one of train, val, test. Got 'valid'; did you mean",
        ),
        (
            b"a/val.png,a",
            b"a/val.png,A",
            "label 'A' is not among the classes of dataset.toml; did you mean 'a'",
        ),
        (b"a/val.png", b"../val.png", "below the dataset's root, without '..'"),
        (b"a/val.png", b"a/../../b.png", "below the dataset's root, without '..'"),
        (b"a/val.png", b"/etc/passwd", "below the dataset's root, without '..'"),
        (b"a/val.png", b"", "below the dataset's root, without '..'"),
        (b"a/val.png", b"a/test.png", "image 'a/test.png': its path stands there twice"),
        (b"id1", b"id0", "sample_id 'id0' must be there and be unique"),
        (b"id1", b"", "sample_id '' must be there and be unique"),
        (b",g1,", b",,", "its group is empty"),
        (b"id1,", b"id1,more,", "line 4: 8 fields where the header has 7"),
        (b"id1,", b'"id1,', "is no valid CSV"),
        (b"id1", b"id\xff", "is no valid CSV"),
        (b",val,", b",train,", "split 'val' has no image; split again with `zoo data split`"),
        (b"a,g0,train", b"a,g0,test", "class 'a' has no image in train"),
    ],
)
def test_a_wrong_manifest_is_refused_with_the_reason(tmp_path, old, new, reason):
    home = make_tiny(tmp_path)
    path = home.data / "tiny" / "manifest.csv"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(ZooError, match=reason) as caught:
        load_dataset("tiny", home)
    assert "manifest.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"classes": ["a"]}, "classes must be a list of two or more different names"),
        ({"classes": ["a", "a"]}, "classes must be a list of two or more"),
        ({"classes": ["a", 3]}, "classes must be a list of two or more"),
        ({"classes": ["a", ["b"]]}, "classes must be a list of two or more"),
        ({"classes": ["a", ""]}, "classes must be a list of two or more"),
        ({"negative_class": "c"}, "negative_class must be one of the classes. Got 'c'"),
        ({"root": ""}, "root must be the folder of the images"),
        ({"bad_images": "ignore"}, "bad_images must be fail or skip. Got 'ignore'"),
        (
            {"bad_images": 1, "root": 1},
            "root must be the folder of the images; bad_images must be fail or skip",
        ),
    ],
)
def test_a_wrong_record_is_neither_written_nor_read(tmp_path, changes, reason):
    home = make_tiny(tmp_path)
    with pytest.raises(ZooError, match=reason):
        make_tiny(tmp_path, **changes)
    assert load_dataset("tiny", home).classes == ["b", "a"]
    from zoo.files import write_toml

    write_toml(home.data / "tiny" / "dataset.toml", RECORD | changes)
    with pytest.raises(ZooError, match=reason):
        load_dataset("tiny", home)
    assert list_datasets(home)[-1]["name"] == "tiny"
    assert list_datasets(home)[-1]["status"].startswith("damaged: ")


def test_wrong_rows_are_not_written(tmp_path):
    with pytest.raises(ZooError, match="split 'test' has no image"):
        make_tiny(tmp_path, rows=[row for row in tiny_rows() if row[4] != "test"])
    assert not (tmp_path / "data").exists()


def test_missing_files_and_unknown_names_say_what_to_do(tmp_path):
    home = make_tiny(tmp_path)
    with pytest.raises(ZooError, match=r"there is no dataset 'tini'; did you mean 'tiny'.*`zoo data import SOURCE"):
        load_dataset("tini", home)
    with pytest.raises(ZooError, match="dataset name must be"):
        load_dataset("../tiny", home)
    with pytest.raises(ZooError, match="dataset 'digits' is not made yet"):
        load_dataset("digits", home, make_builtin=False)
    (home.data / "tiny" / "manifest.csv").unlink()
    with pytest.raises(ZooError, match=r"cannot read .*manifest.csv.*; import the dataset again"):
        load_dataset("tiny", home)


def test_root_may_be_absolute_or_relative_to_the_datasets_folder(tmp_path):
    assert load_dataset("tiny", make_tiny(tmp_path, root="/somewhere/else")).root == Path("/somewhere/else")
    assert load_dataset("tiny", make_tiny(tmp_path, root="../../pictures")).root == tmp_path / "pictures"


def test_datasets_are_listed_with_the_built_in_ones(tmp_path):
    rows = {row["name"]: row for row in list_datasets(make_tiny(tmp_path))}
    assert rows["tiny"] == {
        "name": "tiny",
        "status": "ready",
        "images": 6,
        "classes": 2,
        "summary": "six images",
    }
    assert {"tiny", "lung-phantom", "digits"} <= set(rows)
    assert rows["digits"]["status"] == "built-in"
    assert list(rows) == sorted(rows)


def test_summary_of_the_splits(tmp_path):
    dataset = load_dataset("tiny", make_tiny(tmp_path))
    summary = split_summary(dataset)
    assert summary["dataset"] == "tiny"
    assert summary["split_digest"] == dataset.split_digest
    assert summary["splits"]["train"] == {"images": 2, "groups": 2, "classes": {"b": 1, "a": 1}}


def test_files_that_are_gone_or_changed_are_found(tmp_path):
    dataset = load_dataset("tiny", make_tiny(tmp_path))
    calls: list[tuple[int, int]] = []
    assert verify_files(dataset, progress=lambda done, total: calls.append((done, total))) == []
    assert calls == [(number, 6) for number in range(1, 7)]
    dataset.image_path("a/train.png").unlink()
    dataset.image_path("a/val.png").write_bytes(b"Aval")
    dataset.image_path("b/test.png").unlink()
    dataset.image_path("b/test.png").mkdir()
    assert verify_files(dataset, ["train"]) == [("id0", "a/train.png", "gone")]
    found = verify_files(dataset)
    assert found[:2] == [("id0", "a/train.png", "gone"), ("id1", "a/val.png", "changed since the import")]
    assert found[2][:2] == ("id5", "b/test.png")


def test_manifest_bytes_quote_only_what_must_be():
    row = ("1", "a b.png", "x,y", 'q"', "val", "s\r", "")
    assert manifest_bytes([row]).decode().split("\n", 1)[1] == '1,a b.png,"x,y","q""",val,"s\r",\n'


def test_files_are_mapped_in_order_and_an_error_stops():
    assert list(map_files(lambda number: number * number, range(1000))) == [number * number for number in range(1000)]
    done = []

    def fail(number: int) -> int:
        done.append(number)
        if number == 5:
            raise ZooError("five")
        return number

    with pytest.raises(ZooError, match="five"):
        list(map_files(fail, range(10_000)))
    assert len(done) < 1000


@pytest.mark.parametrize(
    ("at", "bad", "reason"),
    [
        (40_000, b"\xff", "byte 0xff in position"),
        (40_000, b"\xe4\xb8x", "bytes in position"),
        (60, b"\xff", "byte 0xff"),
    ],
)
def test_an_undecodable_manifest_is_refused_with_the_place_in_the_file(tmp_path, at, bad, reason):
    rows = [(f"s{number}", f"{number:05}.png", "ab"[number % 2], "g", "train", "0", "1") for number in range(3000)]
    home = make_tiny(tmp_path, rows=[*rows, *tiny_rows()])
    path = home.data / "tiny" / "manifest.csv"
    data = path.read_bytes()
    data = data[:at] + bad + data[at:]
    path.write_bytes(data)
    with pytest.raises(UnicodeDecodeError) as expected:
        data.decode("utf-8-sig")
    assert reason in str(expected.value)
    with pytest.raises(ZooError) as caught:
        load_dataset("tiny", home)
    assert str(caught.value).endswith(f"is no valid CSV: {expected.value}; import the dataset again")


def test_a_manifest_of_other_line_ends_columns_and_marks_is_read_alike(tmp_path):
    home = make_tiny(tmp_path)
    path = home.data / "tiny" / "manifest.csv"
    expected = load_dataset("tiny", home).frame
    lines = path.read_text().splitlines()
    cells = [line.split(",") for line in lines]
    for text in (
        "\r\n".join(lines),
        "\r".join(lines),
        "\ufeff" + "\n".join(lines),
        "\n".join(",".join(["more", *row[::-1]]) for row in cells),
    ):
        path.write_bytes(text.encode())
        dataset = load_dataset("tiny", home)
        assert dataset.split_digest == sha256_bytes(text.encode())
        assert dataset.frame.equals(expected)


def test_a_frame_and_its_parts_hold_each_text_once(tmp_path):
    rows = [(*row[:3], row[0] if row[4] == "val" else "one group for all", *row[4:]) for row in tiny_rows()]
    dataset = load_dataset("tiny", make_tiny(tmp_path, rows=rows))
    for split in ("train", "val"):
        part = dataset.of_split(split)
        whole = dataset.frame[dataset.frame["split"] == split]
        for column in COLUMNS:
            assert [id(each) for each in part[column]] == [id(each) for each in whole[column]]
    assert len({id(each) for each in dataset.frame["label"]}) == 2
    assert len({id(each) for each in dataset.of_split("train")["group"]}) == 1
    alone = dataset.of_split("val")
    assert [id(each) for each in alone["group"]] == [id(each) for each in alone["sample_id"]]


MEMORY = """
import resource, sys, time
import pandas
import zoo
import zoo.data.manifest
from zoo.files import home

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

imports, started = peak(), time.perf_counter()
dataset = zoo.load_dataset("tiny", home(sys.argv[1]))
parts = [dataset.of_split(split) for split in ("train", "val", "test")]
summary = zoo.split_summary(dataset)
print(sum(map(len, parts)), summary["splits"]["train"]["groups"], peak() - imports, time.perf_counter() - started)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [200_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_manifest_of_many_rows_takes_less_than_900_bytes_a_row(tmp_path, count):
    """A million rows in 1.5 GiB leaves 1610 bytes a row for everything, about 600 of which are a training's imports."""
    home = make_tiny(tmp_path)
    with (home.data / "tiny" / "manifest.csv").open("w") as stream:
        stream.write(",".join(COLUMNS) + "\n")
        for number in range(count):
            group, pixels = number // 20, sha256_bytes(str(number).encode())
            path = f"hospital-{group % 100:03}/patient-{group:07}/series-01/slice-{number:08}.png"
            split = ("train", "val", "test", "train", "train")[group % 5]
            line = [pixels[:16], path, "ab"[number % 2], f"patient-{group:07}", split, sha256_bytes(pixels.encode())]
            stream.write(",".join([*line, pixels]) + "\n")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True)
    rows, groups, taken, seconds = done.stdout.split()
    assert (int(rows), int(groups)) == (count, count // 20 * 3 // 5)
    assert int(taken) < 900 * count
    assert float(seconds) < 120 * count / 1_000_000 + 10
