"""`zoo predict`: what it takes, what it prints and writes, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zoo.data.manifest import load_dataset
from zoo.deployment.bundle import list_bundles

pytestmark = pytest.mark.slow  # processes and servers of their own


@pytest.fixture
def predict(bundled, tmp_path):
    """Run `zoo predict BUNDLE ...` as a user does, in a folder of its own."""
    (name,) = list_bundles(bundled)
    work = tmp_path / "work"
    work.mkdir()

    def run(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "zoo", "predict", name, *map(os.fsencode, map(os.fspath, map(_word, arguments)))],
            input=stdin,
            capture_output=True,
            cwd=work,
            env={**os.environ, **environment},
            check=False,
        )

    run.folder, run.bundle = work, name
    return run


def _word(argument: object) -> str | Path:
    return argument if isinstance(argument, Path) else str(argument)


@pytest.fixture
def picture(bundled) -> bytes:
    return next(load_dataset("tiny", bundled).root.rglob("*.png")).read_bytes()


def rows_of(done) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


KEYS = {"path", "label", "scores", "prediction_set", "refer", "refer_reason", "operating_points", "error"}


def test_each_bad_file_is_a_row_with_its_reason(predict, picture):
    folder = predict.folder
    (folder / "good.png").write_bytes(picture)
    (folder / "cut.png").write_bytes(picture[: len(picture) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_bytes(b"no image at all")
    (folder / "big.pgm").write_bytes(b"P5 40000 40000 255\n")
    (folder / "list").write_text("good.png\ncut.png\nempty.png\ntext.png\nbig.pgm\ngone/with/folder.png\n")
    done = predict("--json", "--paths-from", "list", "--batch-size", 4)
    rows = rows_of(done)
    assert done.returncode == 0 and done.stderr == b"" and all(set(row) == KEYS for row in rows)
    said = {row["path"]: row["error"] for row in rows}
    assert said == {
        "good.png": None,
        "cut.png": "truncated",
        "empty.png": "zero bytes",
        "text.png": "no image (PNG, JPEG, BMP, TIFF, WEBP, GIF, PPM, DICOM)",
        "big.pgm": "too large: 40000 x 40000 pixels, more than 64000000",
        "gone/with/folder.png": "No such file or directory",
    }
    assert all(row["refer"] and row["label"] is None and row["scores"] == {} for row in rows[1:])
    assert predict("cut.png", "empty.png").returncode == 1  # nothing could be answered


def test_patterns_lists_and_standard_input_mean_images(predict, picture):
    for name in ("a/1.png", "a/2.png", "b/deep/3.png"):
        (predict.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (predict.folder / name).write_bytes(picture)
    paths = [row["path"] for row in rows_of(predict("**/*.png", "a", "--json"))]
    assert paths == ["a/1.png", "a/2.png", "b/deep/3.png", "a/1.png", "a/2.png"]
    one = rows_of(predict("-", "--json", stdin=picture))
    assert [row["path"] for row in one] == ["-"]
    assert one[0]["scores"] == pytest.approx(rows_of(predict("a/1.png", "--json"))[0]["scores"])
    listed = rows_of(predict("--paths-from", "-", "--json", stdin=b"a/2.png\0b\0"))
    assert [row["path"] for row in listed] == ["a/2.png", "b/deep/3.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-", "--paths-from", "-"], b"standard input was named twice; name it once"),
        (["-", "-"], b"standard input was named twice"),
        (["*.png"], b"pattern '*.png' matches no image"),
        (["--paths-from", "gone"], b"cannot read the list 'gone': No such file or directory; check the path"),
        (["--paths-from", "-"], b"list '-' names no path"),
        (["x.png", "--json", "--csv"], b"--json and --csv exclude each other"),
        (["x.png", "-o", "rows.xlsx"], b"--output must end in .csv or .jsonl"),
        (["x.png", "-o", "rows.json"], b"--output must end in .csv or .jsonl"),
        (
            ["x.png", "--csv", "-o", "rows.jsonl"],
            b"--csv writes .csv. Got 'rows.jsonl'; leave out --csv, or name a .csv",
        ),
        (
            ["x.png", "--json", "-o", "rows.csv"],
            b"--json writes .jsonl. Got 'rows.csv'; leave out --json, or name a .j",
        ),
        (["x.png", "--explain", "file"], b"explain needs a folder for its pictures. Got the file 'file'"),
        (["x.png", "--device", "cuda"], b"bundles run on the CPU. Got device 'cuda'"),
        (["x.png", "-o", "file/rows.csv"], b"cannot write"),
        (["x.png", "-o", "folder.csv"], b"cannot write 'folder.csv': it is a folder; name a file"),
        ([""], b"a path is empty"),
        (["x.png", "--explain", "file/maps"], b"cannot write"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(predict, picture, arguments, said):
    (predict.folder / "x.png").write_bytes(picture)
    if "*.png" in arguments:
        (predict.folder / "x.png").unlink()
    (predict.folder / "file").write_text("in the way")
    (predict.folder / "folder.csv").mkdir()
    done = predict(*arguments)
    assert (done.returncode, done.stdout) == (1, b""), done
    assert done.stderr.startswith(b"error: ") and said in done.stderr and done.stderr.count(b"\n") == 1


def test_bad_usage_is_exit_code_2(predict):
    for arguments in (
        [],
        ["x.png", "--threads", "0"],
        ["x.png", "--threads", "99999999999"],
        ["x.png", "--batch-size", "0"],
        ["x.png", "--list"],
    ):
        done = predict(*arguments)
        assert done.returncode == 2 and done.stdout == b"" and b"Traceback" not in done.stderr


def test_closed_standard_streams_are_no_traceback(predict, picture):
    (predict.folder / "x.png").write_bytes(picture)

    def closed(which: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = ["sh", "-c", f'exec "$@" {which}', "sh", sys.executable, "-m", "zoo", "predict", predict.bundle]
        return subprocess.run([*command, *arguments], cwd=predict.folder, capture_output=True, check=False)

    for arguments in (["-"], ["--paths-from", "-"]):
        done = closed("<&-", *arguments)
        assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)
        assert done.stderr.startswith(b"error: standard input is closed; ")
    for arguments in (["x.png"], ["x.png", "--json"], ["x.png", "-o", "rows.csv"]):
        done = closed(">&-", *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (predict.folder / "rows.csv").read_bytes() == predict("x.png", "--csv").stdout
    assert closed("2>&-", "gone.png").returncode == 1


def test_a_folder_of_a_list_that_gives_nothing_is_a_row(predict, picture):
    (predict.folder / "x.png").write_bytes(picture)
    (predict.folder / "empty").mkdir()
    rows = rows_of(predict("--paths-from", "-", "--json", stdin=b"empty\nx.png"))
    assert [(row["path"], row["error"]) for row in rows] == [("empty", "the folder holds no image"), ("x.png", None)]


HOSTILE = [
    b"=cmd|' !A1.png",
    b"+1.png",
    b"-1.png",
    b"@sum.png",
    b"a\nb.png",
    b'q"uo,te.png',
    b"caf\xe9.png",
    b"\x1b[31m.png",
]


def test_hostile_names_stay_whole_and_start_no_formula(predict, picture):
    folder = os.fsencode(predict.folder)
    for name in HOSTILE:
        with open(os.path.join(folder, name), "wb") as stream:  # noqa: PTH118, PTH123
            stream.write(picture)
    listed = b"\0".join(HOSTILE)
    rows = rows_of(predict("--paths-from", "-", "--json", stdin=listed))
    assert [os.fsencode(row["path"]) for row in rows] == HOSTILE
    done = predict("--paths-from", "-", "--csv", stdin=listed)
    found = list(csv.DictReader(io.StringIO(done.stdout.decode(), newline="")))
    assert [row["path"][0] == "'" for row in found] == [True] * 4 + [False] * 4
    assert found[4]["path"] == "a\nb.png" and found[5]["path"] == 'q"uo,te.png' and found[6]["path"] == "caf\\udce9.png"
    shown = predict("--paths-from", "-", stdin=listed)
    assert shown.returncode == 0 and b"\x1b" not in shown.stdout and b"\\x1b[31m" in shown.stdout


def test_csv_holds_what_json_holds(predict, picture, bundled):
    (predict.folder / "a.png").write_bytes(picture)
    (predict.folder / "b.png").write_bytes(b"no")
    rows = rows_of(predict("a.png", "b.png", "--json"))
    done = predict("a.png", "b.png", "--csv")
    table = list(csv.DictReader(io.StringIO(done.stdout.decode())))
    classes = load_dataset("tiny", bundled).classes
    heads = ["path", "label", "refer", "refer_reason", "prediction_set", "error"]
    points = rows[0]["operating_points"]
    named = [*(f"score {name}" for name in classes), *(f"positive at {name}" for name in points)]
    assert list(table[0]) == [*heads, *named] and points
    assert {name: table[0][f"positive at {name}"] == "true" for name in points} == points
    assert all(table[1][name] == "" for name in named)
    assert {name: float(table[0][f"score {name}"]) for name in classes} == rows[0]["scores"]
    assert table[0]["prediction_set"].split(" | ") == rows[0]["prediction_set"]
    assert [row["refer"] for row in table] == ["true", "true"] and table[1]["error"] == rows[1]["error"]


def test_a_file_is_written_whole_and_said(predict, picture):
    (predict.folder / "a.png").write_bytes(picture)
    plain = predict("a.png", "--json").stdout
    done = predict("a.png", "-o", "rows.jsonl")
    assert (
        done.returncode == 0
        and b"1 image: 1 answered, 1 of them referred to a human, 0 unreadable; rows.jsonl" in done.stdout
    )
    assert (predict.folder / "rows.jsonl").read_bytes() == plain
    quiet = predict("a.png", "-o", "rows.csv", "--csv")
    assert (quiet.stdout, quiet.stderr) == (b"", b"")
    assert (predict.folder / "rows.csv").read_bytes() == predict("a.png", "--csv").stdout


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_leaves_no_half_file(predict, picture, sent, code):
    images = predict.folder / "images"
    images.mkdir()
    for number in range(4000):
        (images / f"{number:05}.png").hardlink_to(predict.folder / "first.png") if number else (
            predict.folder / "first.png"
        ).write_bytes(picture)
    (predict.folder / "rows.csv").write_text("of yesterday")
    command = [sys.executable, "-m", "zoo", "predict", predict.bundle, "images", "-o", "rows.csv", "--batch-size", "1"]
    with subprocess.Popen(command, cwd=predict.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        deadline = time.monotonic() + 60
        while not list(predict.folder.glob(".rows.csv.*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        running.send_signal(sent)
        _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (code, b"interrupted\n")
    assert (predict.folder / "rows.csv").read_text() == "of yesterday"
    assert sorted(path.name for path in predict.folder.iterdir()) == ["first.png", "images", "rows.csv"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "words", [("predict",), ("predict", "--json"), ("list", "bundles"), ("list", "runs", "--json")]
)
def test_a_full_standard_output_is_one_line(predict, picture, words):
    (predict.folder / "a.png").write_bytes(picture)
    if words[0] == "predict":
        words = ("predict", predict.bundle, "a.png", *words[1:])
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "zoo", *words], stdout=full, stderr=subprocess.PIPE, cwd=predict.folder, check=False
        )
    assert done.returncode == 1
    assert done.stderr == (
        b"error: cannot write standard output: No space left on device; free space there, or send it elsewhere\n"
    )


def test_a_reader_that_leaves_is_no_error(predict, picture):
    (predict.folder / "a.png").write_bytes(picture)
    command = [sys.executable, "-m", "zoo", "predict", predict.bundle, *["a.png"] * 3000, "--json", "--batch-size", "1"]
    with subprocess.Popen(command, cwd=predict.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert json.loads(running.stdout.readline())["path"] == "a.png"
        running.stdout.close()
        said = running.stderr.read()
        assert (running.wait(timeout=60), said) == (0, b"")


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_and_says_when_to_refer(predict, picture, width):
    (predict.folder / "a rather long name of a picture.png").write_bytes(picture)
    (predict.folder / "b.png").write_bytes(b"no")
    done = predict(".", COLUMNS=str(width))
    text = done.stdout.decode()
    table = text[: text.index("one of:")]
    assert max(map(len, table.splitlines())) <= width
    assert "2 images: 1 answered, 1 of them referred to a human, 1 unreadable" in text
    assert (
        "no image (PNG" in text and "every image, for val has no 20 that could be answered with so few errors" in text
    )
