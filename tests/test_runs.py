from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import psutil
import pytest

from zoo.errors import ZooError
from zoo.files import Home
from zoo.runs import Preprocessing, Run, RunRecord, begun_runs, find_run, list_runs, run_lock, run_name

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


def test_a_record_comes_back(root, monkeypatch):
    run = make_run(root)
    assert run.record == RECORD and run.finished
    assert find_run(run.name, root) == find_run(str(run.path), root) == run
    monkeypatch.chdir(run.path)
    assert find_run(".", root).name == run.name
    (run.path / "exports").mkdir()
    monkeypatch.chdir(run.path / "exports")
    assert find_run("..", root).name == run.name
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


def test_a_run_that_has_not_ended_is_listed_and_named(root):
    from typer.testing import CliRunner

    from zoo.cli import app

    name = run_name("digits", "tiny", 0, "0123456789abcdef")
    (root.runs / name).mkdir(parents=True)
    (root.runs / "figures-alone").mkdir()
    assert begun_runs(root) == []
    (root.runs / name / "recipe.toml").write_text("")
    assert begun_runs(root) == [name] and list_runs(root) == []
    with pytest.raises(ZooError, match=rf"run '{name}' has not ended; the same `zoo train` goes on with it"):
        find_run(name, root)
    assert json.loads(CliRunner().invoke(app, ["list", "runs", "--json"]).stdout) == [
        {"name": name, "status": "not ended", "val_top1": None, "test_top1": None, "train_s": None, "reason": None}
    ]
    (root.runs / name / "run.json").write_text("{}")
    assert begun_runs(root) == []


def test_a_history_leaves_out_a_line_that_was_cut_off(root):
    run = make_run(root)
    assert run.history() == []
    run.history_file.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert run.history() == [{"epoch": 1}, {"epoch": 2}]


HOLD = """
import os, sys, time
from zoo.files import home
from zoo.runs import run_lock
with run_lock(home(sys.argv[1]), "r"):
    child = os.fork() if "fork" in sys.argv else 0
    if "fork" not in sys.argv or child:
        print(child, flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(root, *more):
    """A process that holds the lock of run `r`; the second value is its forked child, or 0."""
    command = [sys.executable, "-c", HOLD, str(root.root), *more]
    held = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    child = 0
    try:
        child = int(held.stdout.readline())
        yield held, child
    finally:
        held.kill()
        held.wait()
        held.stdout.close()
        if child:
            os.kill(child, signal.SIGKILL)


def test_a_lock_is_held_by_one_and_freed_by_death(root):
    with holder(root) as (held, _):
        who = f"being trained by process {held.pid} on {re.escape(socket.gethostname())}; wait for it, or stop it"
        with pytest.raises(ZooError, match=who), run_lock(root, "r"):
            pass
        with run_lock(root, "other"):
            pass
    assert json.loads((root.locks / "r.json").read_text())["pid"] == held.pid  # killed: its card is left over
    with run_lock(root, "r"):
        assert json.loads((root.locks / "r.json").read_text())["pid"] == os.getpid()
    assert not (root.locks / "r.json").exists()


def test_a_loading_process_that_outlives_its_parent_does_not_hold_the_lock(root):
    with holder(root, "fork") as (held, child):
        held.kill()
        held.wait()
        assert child and psutil.pid_exists(child)
        with run_lock(root, "r"):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("card", ["", '{"pid"', "[]", "[1e99]", "[-1]", '{"host": "x"}', "gone", "dead"])
def test_a_holder_that_cannot_be_told_is_another_process(root, card):
    with holder(root):
        file = root.locks / "r.json"
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        file.unlink() if card == "gone" else file.write_text(card)
        pids = {"dead": gone.pid, "[1e99]": 1e99, "[-1]": -1}
        if card in pids:
            file.write_text(json.dumps({"pid": pids[card], "host": socket.gethostname()}))
        refused = pytest.raises(ZooError, match="run 'r' is being trained by another process; wait for it, or stop it")
        with refused, run_lock(root, "r"):
            pass


def test_a_lock_that_is_about_to_be_free_is_waited_for(root):
    with holder(root) as (held, _):
        (root.locks / "r.json").unlink()  # as a holder does just before it leaves
        threading.Timer(0.5, held.kill).start()
        with run_lock(root, "r"):
            assert held.wait() == -signal.SIGKILL


def test_one_process_holds_a_lock_once(root):
    said = []

    def other_thread():
        try:
            with run_lock(root, "r"):
                said.append("held twice")
        except ZooError as error:
            said.append(str(error))

    with run_lock(root, "r"):
        for _ in range(2):
            thread = threading.Thread(target=other_thread)
            thread.start()
            thread.join()
        with pytest.raises(ZooError, match=f"by process {os.getpid()} on"), run_lock(root, "r"):
            pass
    assert len(said) == 2 and all(f"by process {os.getpid()} on" in each for each in said)
    with run_lock(root, "r"):
        pass


def test_what_a_killed_process_left_half_written_is_removed(root):
    run = make_run(root, "r")
    (run.path / "checkpoint").mkdir()
    left = [run.path / ".weights.safetensors.ab_12345", run.path / "checkpoint" / ".epoch-00001.json.abcdefgh"]
    kept = [run.path / ".keep", run.path / ".hidden.json", run.path / "weights.safetensors.abcdefgh"]
    other = root.runs / "other" / ".weights.safetensors.abcdefgh"
    other.parent.mkdir()
    for file in (*left, *kept, other):
        file.write_text("x")
    with run_lock(root, "r"):
        assert not any(file.exists() for file in left)
    assert all(file.exists() for file in (*kept, other))


def test_a_lock_in_a_folder_that_cannot_be_written_says_so(root, full_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(full_disk)], check=True)
    with pytest.raises(ZooError, match=r"cannot write .*Read-only file system; choose"), run_lock(Home(full_disk), "r"):
        pass
    subprocess.run(["mount", "-o", "remount,rw", str(full_disk)], check=True)
    with run_lock(Home(full_disk), "r"):
        pass
    subprocess.run(["mount", "-o", "remount,ro", str(full_disk)], check=True)
    with pytest.raises(ZooError, match=r"cannot write .*Read-only file system"), run_lock(Home(full_disk), "r"):
        pass


@pytest.mark.slow
def test_of_two_processes_with_one_command_exactly_one_trains(tiny):
    command = [sys.executable, "-m", "zoo", "train", "tiny", "--data", "tiny", "--json", "--set", "epochs=60"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process: process.communicate(timeout=120) for process in both}
    done, refused = sorted(both, key=lambda each: each.returncode)
    assert (done.returncode, refused.returncode) == (0, 1), said
    run = find_run(json.loads(said[done][0])["run"], tiny)
    assert run.finished and len(run.history()) == 60
    assert said[refused] == (
        "",
        f"error: run {run.name!r} is being trained by process {done.pid} on {socket.gethostname()}; wait for it, or "
        "stop it\n",
    )


@pytest.mark.slow
def test_a_lock_may_be_waited_for_until_its_living_holder_ends(root):
    with holder(root) as (held, _):
        threading.Timer(3, held.kill).start()  # longer than a holder that cannot be told is given
        with run_lock(root, "r", wait=True):
            assert held.wait() == -signal.SIGKILL
