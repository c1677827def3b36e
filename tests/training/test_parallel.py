"""Several processes of torchrun train one run: real processes that meet by gloo."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import zoo
from zoo.benchmark.contrasts import bench_all
from zoo.data.loader import share
from zoo.errors import ZooError
from zoo.runs import Run, list_runs
from zoo.training.loop import train
from zoo.training.parallel import SharedNoise, has_idle_parameters
from zoo.training.plan import make_plan

# What may differ between one process and several is in here: batch norm, dropout, mixing, class weights, smoothing,
# odd batches, several of them for an update.
KEYS = {
    "batch_size": 7,
    "accumulate": 2,
    "drop_rate": 0.3,
    "mixup": 0.3,
    "class_weights": "balanced",
    "label_smoothing": 0.1,
    "optimizer.name": "sgd",
    "checkpoint_minutes": 0.0,
}


def torchrun(folder: Path, *words: str, processes: int = 2, **variables: str) -> subprocess.Popen[str]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "zoo"]
    command = [sys.executable, "-m", *launcher, *words]
    environment = {
        **os.environ,
        "ZOO_HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "default",
        **variables,
    }
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        start_new_session=True,
    )


def settings(**keys) -> list[str]:
    return [word for key, value in {**KEYS, **keys}.items() for word in ("--set", f"{key}={value}")]


def same(one: Run, two: Run) -> None:
    ours, theirs = load_file(one.weights_file), load_file(two.weights_file)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_give_what_one_gives_and_go_on_after_a_signal(tiny, make_recipe, tmp_path):
    other = tmp_path / "two"
    shutil.copytree(tiny.root, other)
    keys = {key.replace(".", "__"): value for key, value in KEYS.items()}
    one = train(make_recipe(epochs=4, **keys), "tiny", 0, tiny)
    words = ["train", "tiny", "--data", "tiny", *settings(epochs=4)]
    started = torchrun(other, *words)
    checkpoints = other / "models" / "runs" / one.name / "checkpoint"
    limit = time.monotonic() + 120
    while not list(checkpoints.glob("epoch-00001-step*.json")) and started.poll() is None:
        assert time.monotonic() < limit, "no checkpoint in the second epoch"
        time.sleep(0.005)
    os.killpg(started.pid, signal.SIGTERM)
    out, err = started.communicate(timeout=60)
    if started.returncode != 0:  # else it was done before the signal
        assert list(checkpoints.glob("epoch-*.json")), err
        assert not (checkpoints.parent / "run.json").exists()
        started = torchrun(other, *words, "--json")
        out, err = started.communicate(timeout=120)
    assert started.returncode == 0, err
    assert out.count('"status": "finished"') <= 1 and "Warning" not in err, err
    (two,) = list_runs(type(tiny)(other))
    assert two.name == one.name
    assert (one.record.processes, two.record.processes) == (1, 2)
    same(two, one)
    for row, wanted in zip(two.history(), one.history(), strict=True):
        assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-4)
        assert row["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_average_of_epochs_is_made_by_the_first_process_alone(tiny, make_recipe, tmp_path):
    other = tmp_path / "two"
    shutil.copytree(tiny.root, other)
    keys = {"optimizer.name": "sgd", "average.method": "swa", "batch_size": 6, "finetune.epochs": 3}
    one = train(make_recipe(**{key.replace(".", "__"): value for key, value in keys.items()}), "tiny", 0, tiny)
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    started = torchrun(other, "train", "tiny", "--data", "tiny", *words)
    try:
        _, err = started.communicate(timeout=120)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, err
    (two,) = list_runs(type(tiny)(other))
    assert two.name == one.name and two.record.notes[0].startswith("swa of epochs 2, 3")
    same(two, one)


# A network with weights that no image meets, dropout and batch norm.
IDLE = """
import torch
from torch import nn
from zoo import register_model

class Idle(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2))
        self.idle = nn.Linear(8, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.head(self.stem(images).mean((2, 3)))

register_model("idle")(Idle)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_weights_that_take_no_part_are_trained_in_two_processes_as_in_one(tiny, tmp_path):
    keys = {"model.name": "idle", "batch_size": 7, "accumulate": 2, "epochs": 3, "optimizer.name": "sgd"}
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    (tiny.root / "idle.py").write_text(IDLE)
    other = tmp_path / "two"
    shutil.copytree(tiny.root, other)
    runs = []
    for folder, processes in ((tiny.root, 1), (other, 2)):
        command = ["train", "tiny", "--data", "tiny", *words]
        started = torchrun(folder, *command, processes=processes, ZOO_PLUGINS=str(folder / "idle.py"))
        try:
            _, err = started.communicate(timeout=120)
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
        assert started.returncode == 0 and "Warning" not in err, err
        runs += list_runs(type(tiny)(folder))
    assert [run.record.processes for run in runs] == [1, 2]
    same(runs[1], runs[0])


def test_idle_weights_are_found_and_the_look_changes_nothing():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
            self.idle = nn.Linear(4, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, images):
            return self.head(self.stem(images).mean((2, 3)))

    network = Net()
    before, drawn = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    images = torch.zeros(2, 3, 8, 8)
    for trained, found in ((True, True), (False, False)):
        network.idle.requires_grad_(trained)
        assert has_idle_parameters(network, lambda: network(images), torch.device("cpu")) is found
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(each.grad is None for each in network.parameters()) and network.training


# A network whose updates take two seconds each, in processes that look up from them as seldom as on a card.
SLOW = """
import time
from pathlib import Path
from torch import nn
from zoo import register_model
from zoo.training import step

def as_on_a_card(self, begin=step.EpochTrainer.__post_init__):
    begin(self)
    self.check_every = step.CHECK_EVERY

step.EpochTrainer.__post_init__ = as_on_a_card

class Slow(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images):
        if self.training and images.device.type != "meta" and images.any():
            with open(Path(__file__).with_suffix(".log"), "a") as stream:
                print("update", file=stream)
            time.sleep(2)
        return self.head(images.mean((2, 3)))

register_model("slow_net")(Slow)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_signal_is_agreed_on_within_seconds_however_slow_updates_are(tiny):
    plugin, log = tiny.root / "slow.py", tiny.root / "slow.log"
    plugin.write_text(SLOW)
    log.touch()
    keys = {"model.name": "slow_net", "batch_size": 3, "epochs": 3}
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    started = torchrun(tiny.root, "train", "tiny", "--data", "tiny", *words, ZOO_PLUGINS=str(plugin))
    try:
        limit = time.monotonic() + 120
        while log.read_text().count("\n") < 4 and started.poll() is None:
            assert time.monotonic() < limit, "no second update"
            time.sleep(0.01)
        told = time.time()
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGTERM)
        _, err = started.communicate(timeout=60)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode != 0 and "interrupted; run" in err, err
    (saved,) = (tiny.root / "models" / "runs").glob("*/checkpoint/epoch-*.json")
    assert saved.stat().st_mtime - told < 10
    step = int(saved.name.removeprefix("epoch-00000-step-").split("-")[0].split(".")[0])
    assert step == log.read_text().count("\n") // 2  # by both processes; none was given up or lost


@pytest.mark.slow
def test_more_processes_than_a_batch_can_be_shared_by_are_refused_before_work(tiny):
    started = torchrun(tiny.root, "train", "tiny", "--data", "tiny", "--set", "batch_size=4", processes=3)
    _, err = started.communicate(timeout=120)
    assert started.returncode != 0
    assert (
        "error: torchrun started 3 processes, but 18 training images in batches of 4 leave one of 2, which 1 can" in err
    )
    assert not list_runs(tiny)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["bench", "tune"])
def test_what_each_process_would_do_anew_is_refused_before_work(tiny, verb):
    search = ("--set", 'search={"optimizer.lr"={low=1e-4,high=1e-2,log=true}}')
    words = {"bench": ["--recipes", "tiny", "--seeds", "1"], "tune": ["--trials", "2", *search]}[verb]
    started = torchrun(tiny.root, verb, *(["tiny"] if verb == "tune" else []), "--data", "tiny", *words)
    try:
        out, err = started.communicate(timeout=120)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode != 0 and out == ""
    said = f"error: zoo {verb} is the work of one process, and torchrun started 2; run it without torchrun, with --jobs"
    assert said in err
    assert not tiny.runs.exists() and not (tiny.root / "models" / "tune").exists()


def test_every_function_of_one_process_refuses_several(tiny, monkeypatch):
    for key, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(key, value)
    for call in (
        lambda: zoo.bench(data="tiny", recipes=["tiny"], seeds=1),
        lambda: zoo.bench(data="tiny", recipes=["tiny"], seeds=1, jobs=2),
        lambda: bench_all("formula_transfer"),
        lambda: zoo.tune("tiny", "tiny"),
        lambda: zoo.find_lr("tiny", "tiny"),
    ):
        with pytest.raises(ZooError, match=r"is the work of one process, and torchrun started 2; run it without torch"):
            call()
    assert not tiny.runs.exists() and not (tiny.root / "models" / "tune").exists()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["dropout", "dropout2d", "drop path"])
def test_noise_of_a_part_is_a_part_of_the_whole_s(kind, channels_last):
    from timm.layers import DropPath

    layer = {
        "dropout": lambda x: functional.dropout(x, 0.3, training=True),
        "dropout2d": torch.nn.Dropout2d(0.4),
        "drop path": DropPath(0.5),
    }[kind]
    x = torch.randn(11, 5, 4, 4)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    torch.manual_seed(3)
    whole = layer(x)
    assert (whole == 0).any()
    seen = []
    for rank in range(3):
        rows = share(11, rank, 3)
        part = x[rows].contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        torch.manual_seed(3)
        with SharedNoise(rows, 11):
            torch.testing.assert_close(layer(part), whole[rows])
        seen += rows
    assert sorted(seen) == list(range(11))


def test_one_named_card_is_no_place_for_several_processes(tiny, make_recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ZooError, match=r"device 'cuda:0' names one card, and torchrun started 2 .*; set device=cuda"):
        make_plan(make_recipe(device="cuda:0"), "tiny", 0, tiny)
