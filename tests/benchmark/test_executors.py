from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from pathlib import Path

import psutil
import pytest
import torch

from zoo.benchmark import executors
from zoo.benchmark.contrasts import bench_all
from zoo.benchmark.suite import bench
from zoo.cores import cores
from zoo.errors import ZooError
from zoo.files import home, sha256_file, write_toml
from zoo.models.registry import register_model
from zoo.models.spec import own_models
from zoo.runs import list_runs, run_lock

# A network that others than this process know, too; it notes each forward pass, and may end its process.
PLUGIN = """
import os, signal
from pathlib import Path
import torch
from torch import nn
from zoo import register_model

class Net(nn.Module):
    def __init__(self, num_classes, end):
        super().__init__()
        self.end = end
        self.head = nn.Linear(3, num_classes)

    def forward(self, images):
        if images.device.type != "meta":
            said = (os.getpid(), len(images), self.training, torch.get_num_threads())
            with open(__file__ + ".log", "a") as stream:
                print(*said, os.environ.get("CUDA_VISIBLE_DEVICES"), file=stream)
            ends = self.end if self.training and "PLUGIN_ENDS" in os.environ else ""
            if ends == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if ends == "left":
                os._exit(7)
            trained = list(Path(os.environ["ZOO_HOME"]).glob("models/runs/*--unscored--*/run.json"))
            if self.end == "unscored" and trained and len(images) > 2 and "PLUGIN_ENDS" in os.environ:
                raise ValueError("out of\\norder")
        return self.head(images.mean((2, 3)))

@register_model("plugged")
def plugged(num_classes: int, end: str = "") -> nn.Module:
    return Net(num_classes, end)
"""
TIMED = ("train_s", "images_per_s", "runs")


def plain(rows):
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def children():
    return [each for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(autouse=True)
def _no_process_is_left():
    before = children()
    yield
    assert children() == before


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The file of the network `plugged`, named by ZOO_PLUGINS; beside it, `.log`, one line for each forward pass."""
    file = tmp_path / "plugin.py"
    file.write_text(PLUGIN, encoding="utf-8")
    monkeypatch.setenv("ZOO_PLUGINS", str(file))
    yield file
    own_models.pop("plugged", None)


def log_of(plugin: Path) -> list[list[str]]:
    file = plugin.with_name(plugin.name + ".log")
    return [line.split() for line in file.read_text().splitlines()] if file.is_file() else []


def write_plugged(root, name, **changes):
    table = {
        "model": {"name": "plugged", "weights": "scratch", "image_size": 32, **changes.pop("model", {})},
        "finetune": {"strategy": "full", "epochs": 1, "batch_size": 6, **changes},
        "augment": {"policy": "none"},
    }
    write_toml(root.recipes / f"{name}.toml", table)


@pytest.mark.slow
def test_the_table_is_the_same_for_any_number_of_jobs(tiny, tmp_path):
    shutil.copytree(tiny.root, tmp_path / "two")
    recipes = ["wild", "tiny", "absent", "tiny-lp"]
    ticks, steps = [], []
    one = bench(data="tiny", recipes=recipes, seeds=2)
    second = home(tmp_path / "two")
    two = bench(data="tiny", recipes=recipes, seeds=2, jobs=2, root=second, on_tick=ticks.append, on_step=steps.append)
    assert (one.failed, two.failed) == (4, 4)
    assert plain(two.comparison.rows) == plain(one.comparison.rows)
    assert [row["runs"] for row in two.comparison.rows] == [row["runs"] for row in one.comparison.rows]
    assert two.comparison.notes == one.comparison.notes
    runs = {run.name: run for run in list_runs(tiny)}
    others = {run.name: run for run in list_runs(second)}
    finished = [name for name, run in runs.items() if run.finished]
    assert runs.keys() == others.keys() and len(finished) == 4
    for name in finished:
        for file in ("weights.safetensors", "predictions-val.npz", "predictions-test.npz"):
            assert sha256_file(runs[name].path / file) == sha256_file(others[name].path / file), (name, file)
    # Every run begins and ends, and both processes' signs of life come back.
    ended = {step.number: step.state for step in steps if step.state in ("finished", "failed")}
    assert [ended[number] for number in range(1, 9)] == [*["failed", "failed", "finished", "finished"] * 2]
    assert {tick.run for tick in ticks if tick.epoch} >= set(finished)
    # No two processes decode the same.
    decoded = [tick.phase for tick in ticks if tick.phase.startswith("decoding") and tick.done == tick.total]
    assert sorted(decoded) == ["decoding train", "decoding val"]
    again = bench(data="tiny", recipes=recipes[1:], seeds=2, jobs=2, root=second, on_step=(steps := []).append)
    assert [step.state for step in steps].count("reused") == 4 and again.failed == 2


@pytest.mark.parametrize("jobs", [0, -1, 100_000, True, 2.0, "2"])
def test_a_number_of_jobs_that_cannot_be_is_refused_before_any_work(tiny, jobs):
    most = max(16, 4 * cores())
    for call in (lambda: bench(data="tinny", recipes=["x"], jobs=jobs), lambda: bench_all("nothing", jobs=jobs)):
        with pytest.raises(ZooError, match=rf"jobs must be from 1 to {most} on this machine of \d+ cores. Got {jobs}"):
            call()


@pytest.mark.slow
def test_the_command_line_refuses_it_too(tiny):
    command = [sys.executable, "-m", "zoo", "bench", "--data", "tiny", "--recipes", "tiny", "--jobs", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("error: jobs must be from 1 to ")
    assert not tiny.runs.exists()


@pytest.mark.slow
def test_a_process_that_dies_is_a_failed_row_and_the_others_go_on(tiny, plugin):
    write_plugged(tiny, "killed", model={"options": {"end": "killed"}})
    write_plugged(tiny, "left", model={"options": {"end": "left"}})
    write_plugged(tiny, "fine")
    command = ["zoo", "bench", "--data", "tiny", "--recipes", "killed,fine,left,tiny", "--seeds", "1", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--jobs", "2"],
        env={**os.environ, "PLUGIN_ENDS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    rows = {row["recipe"]: row for row in json.loads(done.stdout)["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "killed": "failed",
        "left": "failed",
        "fine": "finished",
        "tiny": "finished",
    }
    assert rows["killed"]["reason"] == "its process was killed by signal 9, perhaps out of memory"
    assert rows["left"]["reason"] == "its process ended with exit code 7"
    reasons = {run.record.recipe: run.record.reason for run in list_runs(tiny)}
    assert reasons == {name: rows[name]["reason"] for name in rows}
    # Nothing holds its lock, and once the cause is gone the same benchmark goes on.
    again = bench(data="tiny", recipes=["killed", "fine", "left", "tiny"], seeds=1)
    assert again.failed == 0
    assert not list(tiny.locks.glob("*.json"))


def test_a_process_s_death_is_not_recorded_of_a_run_that_another_is_at(tiny, make_recipe):
    from zoo.training.plan import make_plan

    plan = make_plan(make_recipe(), "tiny", 0, tiny)
    plan.run.path.mkdir(parents=True)

    def bury():
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
        mine, theirs = Pipe()
        theirs.close()
        crew = executors._Crew([plan], [0], 2, None, lambda _: None, lambda _: None, {})
        crew.workers.append(executors._Worker(process, mine, ready=True, number=0))
        crew._bury(crew.workers[0])
        return crew.results[0].reason

    with run_lock(tiny, plan.run.name):
        assert bury() == "its process ended with exit code 7"
        assert not (plan.run.path / "run.json").exists()
    assert bury() == plan.run.record.reason == "its process ended with exit code 7"


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_cannot_be_scored_is_a_failed_row_and_the_others_go_on(tiny, plugin, monkeypatch, jobs):
    write_plugged(tiny, "unscored", model={"options": {"end": "unscored"}})
    write_plugged(tiny, "fine")
    monkeypatch.setenv("PLUGIN_ENDS", "1")
    first = bench(data="tiny", recipes=["unscored", "fine"], seeds=1, jobs=jobs)
    rows = {row["recipe"]: row for row in first.comparison.rows}
    assert first.failed == 1 and rows["fine"]["status"] == "finished"
    said = rows["unscored"]["reason"]
    assert rows["unscored"]["status"] == "failed"
    assert re.fullmatch(r"scoring run '.*' on test failed: ValueError: out of order; the traceback is.*", said)
    run = next(run for run in list_runs(tiny) if run.record.recipe == "unscored")
    assert "in forward" in (run.path / "traceback.txt").read_text(encoding="utf-8")
    # It is trained, and is only scored once the cause is gone.
    monkeypatch.delenv("PLUGIN_ENDS")
    before = sha256_file(run.path / "run.json")
    again = bench(data="tiny", recipes=["unscored", "fine"], seeds=1, jobs=jobs)
    assert again.failed == 0 and run.scored("test") and sha256_file(run.path / "run.json") == before
    assert not (run.path / "traceback.txt").exists()


@pytest.mark.slow
def test_threads_are_divided_devices_dealt_out_and_features_computed_once(tiny, plugin, monkeypatch):
    write_plugged(tiny, "source")
    source = bench(data="tiny", recipes=["source"], seeds=1).comparison.rows[0]["runs"][0]
    plugin.with_name(plugin.name + ".log").unlink()
    write_plugged(tiny, "probe", strategy="linear-probe", model={"weights": source})
    write_plugged(tiny, "whole")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setattr(executors, "cores", lambda: 4)
    # Two devices cannot be had here: what their numbers would be is given, and a CPU run carries it.
    monkeypatch.setattr(executors, "_devices", lambda _: ["2", "5"])
    result = bench(data="tiny", recipes=["probe", "whole"], seeds=3, jobs=2)
    assert result.failed == 0
    lines = log_of(plugin)
    assert {line[3] for line in lines} == {"2"}
    assert {run.record.threads for run in list_runs(tiny) if run.name != source} == {2}
    by_process = {line[0]: line[4] for line in lines}
    assert sorted(by_process.values()) == ["2", "5"]
    training = [line for line in lines if line[1:3] == ["18", "False"]]
    assert len(training) == 1, lines


def test_devices_are_dealt_out_where_there_are_several(tiny, monkeypatch, make_recipe):
    from zoo.training.plan import make_plan

    plan = make_plan(make_recipe(device="cpu"), "tiny", 0, tiny)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, given, expected in (
        (1, "", []),
        (1, "3", []),
        (3, "", ["0", "1", "2"]),
        (2, "4, GPU-8a", ["4", "GPU-8a"]),
        (2, "4,5,-1", ["4", "5"]),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert executors._devices([plan]) == expected
    named = make_recipe(device="cpu").model_copy(update={"device": "cuda:1"})
    assert executors._devices([plan, executors.Plan(**{**vars(plan), "recipe": named})]) == []


@pytest.mark.slow
def test_a_network_that_only_this_python_knows_is_trained_here_after_the_others(tiny):
    from torch import nn

    where = []

    class Here(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.head = nn.Linear(3, num_classes)

        def forward(self, images):
            where.append(os.getpid())
            return self.head(images.mean((2, 3)))

    register_model("only_here", image_size=32)(Here)
    try:
        write_plugged(tiny, "own", model={"name": "only_here"})
        steps = []
        result = bench(data="tiny", recipes=["own", "tiny"], seeds=2, jobs=2, on_step=steps.append)
    finally:
        del own_models["only_here"]
    assert result.failed == 0 and set(where) == {os.getpid()}
    assert [(step.number, step.state) for step in steps[:2]] == [(1, "waits"), (2, "waits")]
    assert "registered in this Python alone" in steps[0].detail
    assert [(step.number, step.state) for step in steps[-4:]] == [
        (1, "begins"),
        (1, "finished"),
        (2, "begins"),
        (2, "finished"),
    ]


@pytest.mark.slow
def test_what_a_callback_raises_ends_the_processes(tiny):
    class Enough(Exception):
        pass

    def enough(step):
        if step.state == "begins":
            raise Enough

    with pytest.raises(Enough):
        bench(data="tiny", recipes=["tiny"], seeds=2, jobs=2, on_step=enough)


@pytest.mark.slow
def test_processes_that_cannot_start_are_said_once(tiny, plugin):
    write_plugged(tiny, "plain")
    plugin.write_text(PLUGIN + f"\nif os.getpid() != {os.getpid()}:\n    os._exit(5)\n", encoding="utf-8")
    with pytest.raises(ZooError, match="a process of the benchmark cannot start: its process ended with exit code 5"):
        bench(data="tiny", recipes=["plain"], seeds=2, jobs=2)


@pytest.mark.slow
def test_processes_whose_parent_is_killed_save_and_leave(tiny):
    command = [sys.executable, "-m", "zoo", "bench", "--data", "tiny", "--recipes", "tiny", "--seeds", "2"]
    long = [*command, "--jobs", "2", "--set", "epochs=400", "--set", "patience=400"]
    parent = subprocess.Popen(long, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(4800):
        if len({each.parent for each in tiny.runs.glob("*/checkpoint/*.json")}) == 2:
            break
        time.sleep(0.05)
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=15)
    assert alive == []
    states = list(tiny.runs.glob("*/checkpoint/*.json"))
    assert len({each.parent for each in states}) == 2
    assert not list(tiny.locks.glob("*.json"))  # they left by themselves


@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "left"), [(2, 1), (3, 2)])
def test_what_is_left_of_a_benchmark_is_trained_with_the_threads_of_the_rest(tiny, monkeypatch, jobs, left):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(executors, "cores", lambda: 4)
    share = min(4 // jobs, cores())
    bench(data="tiny", recipes=["tiny"], seeds=jobs, jobs=jobs)
    for run in list_runs(tiny)[:left]:
        shutil.rmtree(run.path)
    steps = []
    again = bench(data="tiny", recipes=["tiny"], seeds=jobs, jobs=jobs, on_step=steps.append)
    assert sorted(step.state for step in steps if step.state != "begins") == ["finished"] * left + ["reused"] * (
        jobs - left
    )
    assert again.failed == 0
    assert [run.record.threads for run in list_runs(tiny)] == [share] * jobs


@pytest.mark.slow
@pytest.mark.parametrize("names", [["net-tta", "net"], ["net-tta", "net-crops"], ["net-soup-tta", "net-soup", "net"]])
def test_runs_that_are_made_of_others_wait_for_them_and_for_each_other(trained, make_recipe, names):
    source = next(run.name for run in list_runs(trained) if "--tiny--s0" in run.name)
    scores = {"net-tta": "flip", "net-crops": "crops", "net-soup-tta": "flip"}
    for name in names:
        changes = {"weights": source, "image_size": 32}
        if name in scores:
            changes["score.tta"] = scores[name]
        if "soup" in name:
            changes["average.seeds"] = 2
        make_recipe(name, **changes).write(trained.recipes / f"{name}.toml")
    steps = []
    result = bench(data="tiny", recipes=names, seeds=2, jobs=2, on_step=steps.append)
    assert result.failed == 0, [step.detail for step in steps if step.state == "failed"]
    runs = {run.name: run.record for run in list_runs(trained)}
    digests = [(record.recipe_digest, record.seed) for record in runs.values()]
    assert len(set(digests)) == len(digests)  # nothing was trained under two names
    ended = [step.run for step in steps if step.state == "finished"]
    assert len(ended) == 2 * len(names)
    for name in ended:
        listed = [ended.index(source) for source in runs[name].made_of if source in ended]
        assert all(place < ended.index(name) for place in listed)
