"""Real processes that are killed, stopped, run out of disk or lose their files: they go on, and end with the same bits.

A process that has imported everything forks one for each command, so that twenty commands cost twenty forks.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from zoo.data.sources import import_dataset
from zoo.files import Home, home, sha256_file, write_toml
from zoo.models import spec
from zoo.recipe import load_recipe
from zoo.runs import Run, run_lock
from zoo.training.checkpoint import Checkpoint, load_checkpoint
from zoo.training.interruption import Interruption, Stopped
from zoo.training.plan import Plan, make_plan

SERVER = """
import json, os, sys
import albumentations, timm.data, timm.optim, timm.scheduler, timm.utils, torch
import zoo.benchmark.suite, zoo.cli, zoo.cli.screen, zoo.training.loop
torch.set_num_threads(1)
print("up", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        for number, file in enumerate((os.devnull, request["out"], request["err"])):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.environ.update(request["environment"])
        sys.argv = ["zoo", *request["arguments"]]
        zoo.cli.main()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

# A network whose steps take their time, and which notes them. And a kill -9 within a save: as the n-th file of a folder
# is about to get its name, with only a part of it written. (A watcher that polls does not see so short a moment on a
# machine that is busy.)
PLUGIN = """
import os, signal, sys, time
from pathlib import Path
from torch import nn
from zoo import register_model

writes = []

def die(event, arguments):
    if event != "os.rename" or "DIES_WRITING" not in os.environ:
        return
    source, target = (Path(os.fsdecode(each)) for each in arguments[:2])
    if os.environ["DIES_WRITING"] in (target.name, target.parent.name):
        writes.append(target)
        if len(writes) == int(os.environ.get("DIES_AT", "1")):
            os.truncate(source, int(source.stat().st_size * float(os.environ["DIES_WITH"])))
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)

class Slow(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.wide = nn.Linear(8, width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        if self.training and images.device.type != "meta":
            with open(os.environ["SLOW_LOG"], "a") as stream:
                print(os.getpid(), file=stream)
            time.sleep(float(os.environ.get("SLOW_S", "0")))
        return self.head(self.wide(self.stem(images).mean((2, 3))))

@register_model("slow")
def slow(num_classes: int, width: int = 64) -> nn.Module:
    return Slow(num_classes, width)
"""
SIGNALS = [(signal.SIGINT, "group", 130), (signal.SIGTERM, "process", 143), (signal.SIGTERM, "group", 143)]
SAVED_S = 10  # in which a run that is told to stop has saved its state
CLOCK_S = 0.02  # by which the time of a file may lag behind the clock
LEFT_S = 20  # in which it has left, on a machine that is busy with other things


@dataclass
class Launcher:
    """Starts commands of the zoo, each in a process group of its own, one at a time."""

    folder: Path
    environment: dict[str, str]
    server: subprocess.Popen[str] = field(init=False)
    pid: int = 0
    running: bool = False

    def __post_init__(self) -> None:
        command = [sys.executable, "-c", SERVER]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._line(120) == "up"

    def _line(self, seconds: float) -> str:
        assert self.server.stdout is not None
        if not select.select([self.server.stdout], [], [], max(0.0, seconds))[0]:
            raise TimeoutError(f"no answer within {seconds} s")
        return self.server.stdout.readline().strip()

    def start(self, root: Home, *arguments: str, **environment: str) -> int:
        """Start a command in a home and return its process id."""
        request = {
            "arguments": arguments,
            "environment": {**self.environment, "ZOO_HOME": str(root.root), **environment},
            "out": str(self.folder / "out"),
            "err": str(self.folder / "err"),
        }
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.pid, self.running = int(self._line(60)), True
        return self.pid

    def wait(self, seconds: float = 240) -> int:
        """Return the command's exit code, or the negative number of the signal that killed it."""
        code = int(self._line(seconds))
        self.running = False
        return code

    def run(self, root: Home, *arguments: str, **environment: str) -> int:
        """Run a command to its end and return its exit code."""
        self.start(root, *arguments, **environment)
        return self.wait()

    def ended(self) -> bool:
        return bool(select.select([self.server.stdout], [], [], 0)[0])

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8")

    def stop(self) -> None:
        """End what a test that failed has left."""
        for process in group_of(self.pid) if self.pid else []:
            process.kill()
        if self.running:
            self.wait()

    def close(self) -> None:
        self.stop()
        self.server.kill()
        self.server.communicate()


def group_of(group: int) -> list[psutil.Process]:
    """Return the living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def until(true: Callable[[], Any], seconds: float = 120) -> Any:
    """Return the first true value; raises TimeoutError where none comes in time."""
    end = time.monotonic() + seconds
    while not (value := true()):
        if time.monotonic() > end:
            raise TimeoutError("it never came")
        time.sleep(0.005)
    return value


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the dataset `many` (60 images for training, 30 for val, 30 for test) and three recipes."""
    folder = tmp_path_factory.mktemp("many")
    draw = np.random.default_rng(1)
    for place, name in enumerate(("a", "b", "c")):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(40):
            pixels = draw.integers(0, 150, (36, 36, 3))
            pixels[8:28, 8:28, place] += 60
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name / f"{number:02}.png")
    root = folder / "home"
    root.mkdir()
    import_dataset(folder / "images", "many", home(root), copy=True, ratios=(0.5, 0.25, 0.25))
    table: dict[str, Any] = {
        "model": {"name": "simple_cnn", "weights": "scratch", "image_size": 32, "drop_rate": 0.2},
        "finetune": {"epochs": 3, "batch_size": 3, "ema_decay": 0.9, "clip_grad": 1.0, "patience": 2},
        "augment": {"policy": "light", "mixup": 0.2, "cutmix": 0.2},
        "optimizer": {"lr": 3e-3},
        "schedule": {"name": "cosine", "warmup_epochs": 1},
        "precision": "float32",
    }
    write_toml(root / "recipes" / "killed.toml", {**table, "checkpoint_minutes": 0})
    slow = {**table, "model": {**table["model"], "name": "slow", "drop_rate": 0.0}, "checkpoint_minutes": 1440}
    write_toml(root / "recipes" / "slow.toml", slow)
    # Its state is 5 MB: a disk of 8 MB takes one of them, but not the next beside it.
    big = {**slow, "model": {**slow["model"], "options": {"width": 34_000}}, "checkpoint_minutes": 0}
    write_toml(root / "recipes" / "big.toml", big)
    return root


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    folder = tmp_path_factory.mktemp("launcher")
    (folder / "plugin.py").write_text(PLUGIN, encoding="utf-8")
    environment = {
        "ZOO_PLUGINS": str(folder / "plugin.py"),
        "SLOW_LOG": str(folder / "log"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    made = Launcher(folder, environment)
    yield made
    made.close()
    # What this process has loaded of it too, to look at the runs.
    spec.own_models.pop("slow", None)
    spec._loaded_plugins.discard((folder / "plugin.py").resolve())


@pytest.fixture
def many(template: Path, tmp_path: Path, launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A home of this test's own, and what the launcher's commands know of their surroundings."""
    for name, value in launcher.environment.items():
        monkeypatch.setenv(name, value)
    Path(launcher.environment["SLOW_LOG"]).write_text("", encoding="utf-8")
    shutil.copytree(template, tmp_path / "home")
    yield home(tmp_path / "home")
    launcher.stop()


@pytest.fixture
def other(template: Path, tmp_path: Path) -> Home:
    """Another home like it, for what is not interrupted."""
    shutil.copytree(template, tmp_path / "other")
    return home(tmp_path / "other")


def plan_of(recipe: str, root: Home, seed: int = 0) -> Plan:
    return make_plan(load_recipe(recipe, root=root), "many", seed, root)


def checkpoint_of(plan: Plan) -> Checkpoint | None:
    """Return a run's checkpoint, its digests verified."""
    return load_checkpoint(plan.run.path / "checkpoint", plan.digest)


def position(plan: Plan) -> tuple[int, int]:
    """Return finished epochs and steps of the next one in the last whole checkpoint."""
    checkpoint = checkpoint_of(plan)
    return (checkpoint.progress.epoch, checkpoint.progress.step) if checkpoint else (0, 0)


def saved_at(plan: Plan) -> float:
    """Return when the last checkpoint was saved, in seconds since 1970."""
    return max(file.stat().st_mtime for file in (plan.run.path / "checkpoint").glob("*.json"))


def steps_noted(launcher: Launcher) -> int:
    return Path(launcher.environment["SLOW_LOG"]).read_text(encoding="utf-8").count("\n")


def lasting(run: Run) -> dict[str, Any]:
    """Return what two runs that are the same have in common: all but how long it took."""
    history = [{key: value for key, value in row.items() if key != "images_per_s"} for row in run.history()]
    record = run.record.model_dump(exclude={"train_s", "images_per_s"})
    files = {each.name for each in run.path.iterdir()}
    kept = [name for name in files if name.endswith((".safetensors", ".npz")) or name.startswith("metrics")]
    return {
        "history": history,
        "record": record,
        "files": files,
        "bits": {name: sha256_file(run.path / name) for name in kept},
    }


def half_written(folder: Path) -> set[str]:
    """Return the temporary files that saves have open, or that killed ones have left."""
    try:
        with os.scandir(folder) as entries:
            return {each.name for each in entries if each.name.startswith(".")}
    except FileNotFoundError:
        return set()


# Kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_20_times_ends_with_the_same_bits(launcher, many, other):
    command = ("train", "killed", "--data", "many", "--json")
    assert launcher.run(other, *command) == 0, launcher.err
    whole = plan_of("killed", other)

    plan = plan_of("killed", many)
    folder = plan.run.path / "checkpoint"
    draw = np.random.default_rng(20261125)
    within, last, usual_s = 0, (0, 0), 0.0
    for kill in range(20):
        # Each save writes two files. So many may come that the 20 kills are spread over the run, and end before it.
        saves = max(1, round(54 * (kill + 1) / 19) - last[0] * 20 - last[1])
        file = 2 * saves - int(draw.integers(0, 2))  # of the tensors or of the facts
        part = draw.choice([0, draw.uniform(), 1])
        before = half_written(folder)
        launcher.start(many, *command, DIES_WRITING="checkpoint", DIES_AT=str(file), DIES_WITH=str(part))
        started = time.monotonic()
        if kill % 2:  # at any moment from the start on, and at the latest in that save
            end = started + draw.uniform(0, usual_s)
            while time.monotonic() < end and not launcher.ended():
                time.sleep(0.001)
            with contextlib.suppress(ProcessLookupError):
                os.kill(launcher.pid, signal.SIGKILL)
        assert launcher.wait() == -signal.SIGKILL, (kill, last, launcher.err)
        usual_s = usual_s if kill % 2 else time.monotonic() - started
        within += bool(half_written(folder) - before)  # it died with the file half written
        now = position(plan)
        assert now >= last, f"kill {kill} lost what was saved: {last}, now {now}"
        last = now
    print(f"{within} of 20 kills fell into a save; saved up to epoch and step {last}")
    assert within >= 10
    assert (2, 0) <= last < (3, 0), last
    assert launcher.run(many, *command) == 0, launcher.err
    assert lasting(plan.run) == lasting(whole.run)
    assert len(plan.run.history()) == 3
    assert not list(many.root.rglob(".*.????????.*")) and not half_written(many.locks)


@pytest.mark.slow
def test_a_run_killed_while_it_writes_its_results_ends_with_the_same_bits(launcher, many, other):
    command = ("train", "killed", "--data", "many", "--json", "--set", "epochs=1", "--set", "warmup_epochs=0")
    plan, whole = (
        make_plan(load_recipe("killed", {"epochs": 1, "warmup_epochs": 0}, root), "many", 0, root)
        for root in (many, other)
    )
    assert launcher.run(other, *command) == 0, launcher.err
    for name in ("weights.safetensors", "predictions-val.npz", "metrics-val.json", "run.json"):
        for part in ("0.5", "1"):
            dies = {"DIES_WRITING": name, "DIES_WITH": part}
            assert launcher.run(many, *command, **dies) == -signal.SIGKILL, (name, part, launcher.err)
            assert any(each.startswith(f".{name}.") for each in half_written(plan.run.path)), (name, part)
            assert not plan.run.finished, (name, part)
    assert launcher.run(many, *command) == 0, launcher.err
    assert lasting(plan.run) == lasting(whole.run)


# SIGTERM and SIGINT -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to", "code"), SIGNALS)
def test_a_signal_in_mid_epoch_saves_the_step_and_leaves_nobody(launcher, many, other, number, to, code):
    command = ("train", "slow", "--data", "many", "--json")
    whole, plan = plan_of("slow", other), plan_of("slow", many)
    assert launcher.run(other, *command) == 0, launcher.err
    total = steps_noted(launcher)
    steps = -(-len(plan.dataset.of_split("train")) // 3)
    assert total == 3 * steps
    pid = launcher.start(many, *command, "--set", "workers=2", SLOW_S="0.1")
    until(lambda: steps_noted(launcher) >= total + 5)
    assert len(group_of(pid)) >= 3
    told = time.time() - CLOCK_S
    os.killpg(pid, number) if to == "group" else os.kill(pid, number)
    assert launcher.wait(LEFT_S) == code, launcher.err
    took = saved_at(plan) - told
    assert 0 < took < SAVED_S, (took, launcher.err)
    until(lambda: not group_of(pid), LEFT_S)
    assert launcher.err.count("\n") == 1 and "interrupted" in launcher.err, launcher.err
    assert launcher.out == ""
    begun = steps_noted(launcher) - total
    epoch, step = position(plan)
    assert (epoch, step) == (0, begun) and begun < steps  # the step that was under way was ended and saved
    with run_lock(many, plan.run.name):
        pass
    assert launcher.run(many, *command, "--set", "workers=2") == 0, launcher.err
    assert steps_noted(launcher) == total + 3 * steps  # and no step was done twice
    assert lasting(plan.run) == lasting(whole.run)


@pytest.mark.slow
def test_a_step_that_does_not_end_is_given_up_for_the_checkpoint_before_it(launcher, many):
    plan = plan_of("slow", many)
    command = ("train", "slow", "--data", "many", "--json", "--set", "checkpoint_minutes=0")
    launcher.start(many, *command, SLOW_S="0.05")
    until(lambda: position(plan) >= (0, 3))
    os.kill(launcher.pid, signal.SIGINT)
    assert launcher.wait() == 130
    saved, noted = position(plan), steps_noted(launcher)
    pid = launcher.start(many, *command, SLOW_S="600")
    until(lambda: steps_noted(launcher) > noted)
    os.kill(pid, signal.SIGTERM)
    assert launcher.wait(LEFT_S) == 143
    assert not group_of(pid)
    assert position(plan) == saved
    assert launcher.run(many, *command) == 0, launcher.err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_benchmark_side_by_side_is_stopped_and_goes_on(launcher, many, other):
    command = ("bench", "--data", "many", "--recipes", "slow", "--seeds", "2", "--json")
    assert launcher.run(other, *command) == 0, launcher.err
    plans = [plan_of("slow", many, seed) for seed in (0, 1)]
    before: tuple[Any, ...] = ((0, 0), (0, 0))
    log = Path(launcher.environment["SLOW_LOG"])
    for number, to, code in SIGNALS:
        noted = steps_noted(launcher)
        pid = launcher.start(many, *command, "--jobs", "2", "--set", "workers=1", SLOW_S="0.1")
        until(lambda noted=noted: len(set(log.read_text().splitlines()[noted:])) == 2)
        time.sleep(0.5)
        told = time.time() - CLOCK_S
        os.killpg(pid, number) if to == "group" else os.kill(pid, number)
        assert launcher.wait(LEFT_S) == code, launcher.err
        took = [saved_at(plan) - told for plan in plans]
        assert all(0 < each < SAVED_S for each in took), (took, launcher.err)
        until(lambda pid=pid: not group_of(pid), LEFT_S)
        assert launcher.out == "" and "Traceback" not in launcher.err
        now = tuple(position(plan) for plan in plans)
        assert all(new > old for new, old in zip(now, before, strict=True)), (before, now)
        before = now
    assert launcher.run(many, *command, "--jobs", "2") == 0, launcher.err
    for plan in plans:
        whole = plan_of("slow", other, plan.seed)
        assert lasting(plan.run) == lasting(whole.run)
    assert steps_noted(launcher) == 2 * 2 * 60


# Disks and files that fail ------------------------------------------------------------------------------------------


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this container cannot mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(many: Home) -> Iterator[Home]:
    """`many`, whose folder models/ is a disk of 8 MB."""
    models = many.root / "models"
    models.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(models))
    yield many
    subprocess.run(["umount", str(models)], check=True)


@pytest.mark.slow
def test_a_full_disk_fails_the_run_keeps_its_checkpoint_and_the_benchmark_goes_on(launcher, small_disk, other):
    command = ("bench", "--data", "many", "--recipes", "big,slow", "--seeds", "1", "--json")
    assert launcher.run(other, *command) == 0, launcher.err
    plan = plan_of("big", small_disk)
    assert launcher.run(small_disk, *command) == 3, launcher.err
    rows = {row["recipe"]: row for row in json.loads(launcher.out)["rows"]}
    assert (rows["big"]["status"], rows["slow"]["status"]) == ("failed", "finished")
    assert "cannot write" in rows["big"]["reason"] and "No space left on device; free space" in rows["big"]["reason"]
    assert position(plan) == (0, 1)
    assert plan.run.record.status == "failed" and not half_written(plan.run.path / "checkpoint")
    mount("-o", "remount,size=64m", str(small_disk.root / "models"))
    assert launcher.run(small_disk, *command) == 0, launcher.err
    for name in ("big", "slow"):
        assert lasting(plan_of(name, small_disk).run) == lasting(plan_of(name, other).run)


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_fails_the_run_and_keeps_its_checkpoint(launcher, many, other):
    command = ("train", "slow", "--data", "many", "--json", "--set", "checkpoint_minutes=0")
    assert launcher.run(other, *command) == 0, launcher.err
    plan = plan_of("slow", many)
    folder = str(plan.run.path)
    plan.run.path.mkdir(parents=True)
    mount("--bind", folder, folder)
    try:
        launcher.start(many, *command, SLOW_S="0.1")
        until(lambda: position(plan) >= (0, 2))
        readonly = ["mount", "-o", "remount,bind,ro", folder]  # refused while a save has a file open
        until(lambda: subprocess.run(readonly, capture_output=True, check=False).returncode == 0, 20)
        assert launcher.wait() == 1
        assert launcher.err.startswith("error: cannot write") and "Read-only file system" in launcher.err
        assert launcher.err.count("\n") == 1
        assert position(plan) >= (0, 2)
        # Started again, it says so before any work.
        noted = steps_noted(launcher)
        assert launcher.run(many, *command) == 1
        assert "Read-only file system" in launcher.err and steps_noted(launcher) == noted
    finally:
        subprocess.run(["umount", folder], check=True)
    assert launcher.run(many, *command) == 0, launcher.err
    assert lasting(plan.run) == lasting(plan_of("slow", other).run)


@pytest.mark.slow
def test_images_that_vanish_are_a_typed_failure_and_nothing_saved_is_lost(launcher, many, other):
    command = ("bench", "--data", "many", "--recipes", "slow,killed", "--seeds", "1", "--json")
    assert launcher.run(other, *command) == 0, launcher.err
    plan = plan_of("slow", many)
    images = plan.dataset.image_path(plan.dataset.of_split("train")["path"].iloc[0]).parent
    pid = launcher.start(many, *command, SLOW_S="0.1")
    noted = steps_noted(launcher)
    until(lambda: steps_noted(launcher) >= noted + 4)
    os.kill(pid, signal.SIGTERM)
    assert launcher.wait() == 143
    saved = position(plan)
    assert saved > (0, 0)
    shutil.rmtree(plan.dataset.folder / ".cache")
    images.rename(many.root / "away")
    assert launcher.run(many, *command) == 3, launcher.err
    document = json.loads(launcher.out)
    assert [row["status"] for row in document["rows"]] == ["failed", "failed"]
    assert all("of split 'train': gone; mend it" in row["reason"] for row in document["rows"])
    assert document["floors"] == [] and any("no floors: image" in note for note in document["notes"])
    assert (many.benchmarks / "many" / "table.md").is_file()
    assert position(plan) == saved
    (many.root / "away").rename(images)
    assert launcher.run(many, *command) == 0, launcher.err
    for name in ("slow", "killed"):
        assert lasting(plan_of(name, many).run) == lasting(plan_of(name, other).run)


def test_a_step_within_a_step_ends_neither():
    with Interruption() as interruption:
        with pytest.raises(Stopped), interruption.step():
            with interruption.step():
                pass
            os.kill(os.getpid(), signal.SIGINT)
            ended = True
            interruption.check()
        assert ended
