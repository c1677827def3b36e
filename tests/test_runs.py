from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from zoo.errors import ZooError
from zoo.runs import Preprocessing, Run, RunRecord, find_run, list_runs, run_lock, run_name

RECORD = RunRecord(
    run="digits--cnn--s0--01234567",
    status="finished",
    dataset="digits",
    recipe="cnn",
    recipe_digest="ab",
    seed=0,
    split_digest="cd",
    classes=["a", "b"],
    model="simple_cnn",
)


def make_run(root, name=RECORD.run, **changes) -> Run:
    run = Run(root.runs / name)
    run.path.mkdir(parents=True)
    run.write_record(RECORD.model_copy(update={"run": name, **changes}))
    return run


@pytest.mark.parametrize(("size", "crop", "expected"), [(224, 0.875, 256), (224, 0.95, 235), (32, 1.0, 32)])
def test_the_shorter_side_before_the_crop_is_timm_s(size, crop, expected):
    kept = {"interpolation": "bicubic", "mean": (0, 0, 0), "std": (1, 1, 1)}
    assert Preprocessing(image_size=size, crop_pct=crop, **kept).resize_size == expected


def test_a_record_comes_back(root):
    run = make_run(root)
    assert run.record == RECORD and run.finished
    assert find_run(run.name, root) == find_run(str(run.path), root) == run
    assert run.name == run_name("digits", "cnn", 0, "0123456789")
    assert json.loads((run.path / "run.json").read_text())["schema_version"] == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": 3}', '{"schema_version": 1}', "\xff"])
def test_a_damaged_record_is_no_finished_run(root, text):
    run = make_run(root)
    (run.path / "run.json").write_text(text, encoding="latin-1")
    assert not run.finished
    with pytest.raises(ZooError, match=r"run.json"):
        _ = run.record


def test_a_newer_record_is_refused_politely(root):
    run = make_run(root)
    (run.path / "run.json").write_text('{"schema_version": 99}')
    with pytest.raises(ZooError, match="schema_version 99; this zoo reads up to 1: update the zoo"):
        _ = run.record


def test_runs_are_listed_by_dataset(root):
    for name in ("digits--b--s0--1", "digits--a--s0--1", "digits-2--a--s0--1"):
        make_run(root, name)
    (root.runs / "digits--c--s0--1").mkdir()  # unfinished: no record yet
    assert [run.name for run in list_runs(root)] == ["digits--a--s0--1", "digits--b--s0--1", "digits-2--a--s0--1"]
    assert [run.name for run in list_runs(root, "digits")] == ["digits--a--s0--1", "digits--b--s0--1"]
    assert list_runs(root, "d.gits") == []


def test_an_unknown_run_is_said_with_the_nearest(root):
    with pytest.raises(ZooError, match="there is no run 'x'; train one with"):
        find_run("x", root)
    make_run(root)
    with pytest.raises(ZooError, match="did you mean 'digits--cnn--s0--01234567'"):
        find_run("digits--cnn--s0--01234568", root)
    with pytest.raises(ZooError, match="there is no run"):
        find_run("a" * 5000, root)


def test_a_history_leaves_out_a_line_that_was_cut_off(root):
    run = make_run(root)
    assert run.history() == []
    run.history_file.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert run.history() == [{"epoch": 1}, {"epoch": 2}]


def test_a_lock_is_held_by_one_and_freed_by_death(root):
    hold = (
        "import os, sys, time\nfrom zoo.files import home\nfrom zoo.runs import run_lock\n"
        "with run_lock(home(sys.argv[1]), 'r'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    held = subprocess.Popen([sys.executable, "-c", hold, str(root.root)], stdout=subprocess.PIPE, text=True)
    try:
        assert held.stdout.readline() == "held\n"
        refused = pytest.raises(ZooError, match=f"being trained by process {held.pid} on .*; wait for it, or stop it")
        with refused, run_lock(root, "r"):
            pass
        with run_lock(root, "other"):
            pass
    finally:
        held.kill()
        held.wait()
        held.stdout.close()
    with run_lock(root, "r"):
        assert json.loads((root.locks / "r.json").read_text())["pid"] == os.getpid()
    assert not (root.locks / "r.json").exists()
