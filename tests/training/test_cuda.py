"""What is promised of runs on a CUDA card; skipped where there is none, as in CI."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from zoo.data.sources import import_dataset
from zoo.deployment.predictor import Predictor
from zoo.files import home, write_toml
from zoo.models.registry import register_model
from zoo.models.spec import own_models
from zoo.recipe import parse_recipe
from zoo.runs import list_runs
from zoo.training.loop import train
from zoo.training.scoring import evaluate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")

CUDA = torch.device("cuda")
# All that draws or remembers: dropout, mixing, a moving average, a schedule, odd batches.
DRAWS = {"drop_rate": 0.3, "mixup": 0.3, "ema_decay": 0.9, "label_smoothing": 0.1, "device": "cuda"}
NETWORKS = {
    "simple_cnn": 32,
    "resnet18": 64,
    "efficientnet_b0": 64,
    "mobilenetv3_small_100": 64,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 64,
}


@pytest.fixture
def again(tiny, tmp_path):
    """A maker of homes that are like `tiny`, with nothing trained."""

    def make(name: str):
        shutil.copytree(tiny.root, tmp_path / name)
        return home(tmp_path / name)

    return make


@pytest.fixture
def scenes(root, write_scenes):
    """The dataset `scenes`: 64 training images of two classes, 8 for val and 8 for test."""
    sizes = {"train": 32, "val": 4, "test": 4}
    ends = iter(np.cumsum([0, *(size for size in sizes.values() for _ in "ab")]).tolist())
    start, wanted = next(ends), {}
    for split in sizes:
        for label in "ab":
            stop = next(ends)
            wanted[f"{split}/{label}"] = range(start, stop)
            start = stop
    import_dataset(write_scenes(root.root / "pictures", wanted), "scenes", root, copy=True)
    return root


def bits(run) -> bytes:
    return run.weights_file.read_bytes()


# The same bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["linear-probe", "full", "lp-ft", "gradual"])
@pytest.mark.parametrize("model", ["simple_cnn", "test_resnet.zoo_formula"])
def test_a_run_again_has_the_same_bits_with_any_workers(again, make_recipe, model, strategy):
    pretrained = {"model__weights": "pretrained", "image_size": 64} if "." in model else {}
    epochs = {"epochs": 3} | ({"head_epochs": 1} if strategy in ("lp-ft", "gradual") else {})
    draws = {"device": "cuda"} if strategy == "linear-probe" else DRAWS
    keys = {"model__name": model, "strategy": strategy, **pretrained, **epochs, **draws}
    policy = {"policy": "none"} if strategy == "linear-probe" else {}
    runs = [
        train(make_recipe("it", **keys, **policy, workers=workers), "tiny", 0, again(str(workers)))
        for workers in (0, 1, 2)
    ]
    assert runs[0].record.device.startswith("cuda: ")
    assert len({bits(run) for run in runs}) == 1
    assert not [note for note in runs[0].record.notes if "other bits" in note]
    metrics = [evaluate(run, "test", home(run.path.parents[2])) for run in runs]
    assert metrics[0]["top1"] == metrics[1]["top1"] == metrics[2]["top1"]


@pytest.mark.filterwarnings("default")  # what the compiler warns of is its own
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16", "bf16-nchw", "bf16-channels-last-compile"])
@pytest.mark.parametrize("model", NETWORKS)
def test_every_network_and_number_format_has_the_same_bits_again(again, make_recipe, model, precision):
    if "compile" in precision and model not in ("simple_cnn", "resnet18", "vit_tiny_patch16_224"):
        pytest.skip("compiling takes long")
    keys = {**DRAWS, "model__name": model, "image_size": NETWORKS[model], "precision": precision, "mixup": 0.0}
    runs = [train(make_recipe("it", **keys), "tiny", 0, again(name)) for name in ("one", "two")]
    assert bits(runs[0]) == bits(runs[1])
    assert not [note for note in runs[0].record.notes if "other bits" in note]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet50", "efficientnet_b0", "vit_tiny_patch16_224"])
def test_large_batches_of_large_images_have_the_same_bits_again(tmp_path, root, make_recipe, model):
    folder = tmp_path / "noise"
    draw = np.random.default_rng(0)
    from PIL import Image

    for place, count in {"train": 320, "val": 8, "test": 8}.items():
        for label in "ab":
            (folder / place / label).mkdir(parents=True)
            for number in range(count // 2):
                pixels = draw.integers(0, 256, (256, 256, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / place / label / f"{number}.bmp")
    import_dataset(folder, "noise", root, copy=False, near_duplicates=False)
    found = []
    for number in range(2):
        keys = {"model__name": model, "image_size": 224, "batch_size": 128, "precision": "bf16", "device": "cuda"}
        run = train(make_recipe(f"it{number}", **keys), "noise", 0, root, accept_leaks=True)
        found.append(bits(run))
    assert found[0] == found[1]


class Unsteady(nn.Module):
    """torch has one kernel alone for the gradient of this pooling, which adds in any order."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(5)
        self.head = nn.Linear(200, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.stem(images)).flatten(1))


def test_a_network_without_steady_kernels_is_trained_and_the_run_says_so(tiny, make_recipe):
    register_model("unsteady_net")(Unsteady)
    try:
        run = train(make_recipe(model__name="unsteady_net", epochs=70, device="cuda"), "tiny", 0, tiny)
    finally:
        del own_models["unsteady_net"]
    assert run.record.status == "finished"
    (note,) = run.record.notes
    assert note.startswith("trained again it may have other bits: adaptive_avg_pool2d_backward_cuda")
    assert run.record.precision["source"] == "measured"
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic


# Interrupted --------------------------------------------------------------------------------------------------------


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "zoo", *words],
        env={**os.environ, "ZOO_HOME": str(folder), "PYTHONWARNINGS": "default"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "strategy", "number"),
    [
        ("float32", "full", signal.SIGKILL),
        ("fp16", "full", signal.SIGKILL),
        ("bf16", "lp-ft", signal.SIGKILL),
        ("bf16", "full", signal.SIGTERM),
    ],
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(scenes, tmp_path, precision, strategy, number):
    """Killed in the middle of its second and of its third epoch on the network."""
    table = {
        "model": {"name": "test_resnet.zoo_formula", "weights": "pretrained", "image_size": 64, "drop_rate": 0.3},
        "finetune": {"strategy": strategy, "epochs": 4, "batch_size": 2, "ema_decay": 0.9},
        "augment": {"policy": "light", "mixup": 0.3},
        "optimizer": {"lr": 1e-3},
        "device": "cuda",
        "precision": precision,
        "workers": 2,
        "checkpoint_minutes": 0,
    }
    if strategy == "lp-ft":
        table["finetune"]["head_epochs"] = 1
    write_toml(scenes.root / "recipes" / "it.toml", table)
    shutil.copytree(scenes.root, tmp_path / "stopped")
    whole = train(parse_recipe(table, "it"), "scenes", 0, scenes)
    words = ("train", "it", "--data", "scenes")
    stopped = tmp_path / "stopped"
    checkpoints = stopped / "models" / "runs" / whole.name / "checkpoint"
    for epoch in (2, 3):
        process = command(stopped, *words)
        limit = time.monotonic() + 120
        wanted = f"epoch-{epoch - 1:05d}-step-*.json"  # of the epoch after that one
        while not list(checkpoints.glob(wanted)) and process.poll() is None:
            assert time.monotonic() < limit, "no checkpoint in the middle of the epoch"
            time.sleep(0.002)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == (-9 if number == signal.SIGKILL else 143), out + err
        assert list(checkpoints.glob("epoch-*.json"))
    process = command(stopped, *words)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    (run,) = list_runs(home(stopped))
    assert bits(run) == bits(whole)
    assert (run.path / "predictions-val.npz").read_bytes() == (whole.path / "predictions-val.npz").read_bytes()
    assert [row["train_loss"] for row in run.history()] == [row["train_loss"] for row in whole.history()]


# Memory -------------------------------------------------------------------------------------------------------------


def test_a_batch_that_the_card_has_no_memory_for_is_computed_in_parts(root, tmp_path, make_recipe, image_folder):
    import_dataset(image_folder, "one", root, copy=False, ratios=(0.8, 0.1, 0.1))
    keys = {"model__name": "resnet18", "image_size": 224, "batch_size": 24, "device": "cuda", "precision": "float32"}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begun = torch.cuda.memory_reserved()
    whole = train(make_recipe("whole", **keys), "one", 0, root)
    needed = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    phases = []
    try:
        torch.cuda.set_per_process_memory_fraction((begun + 0.6 * (needed - begun)) / total)
        parts = train(make_recipe("parts", **keys), "one", 0, root, on_tick=lambda tick: phases.append(tick.phase))
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(begun / total)
        with pytest.raises(Exception, match=r"out of memory"):
            train(make_recipe("none", **keys), "one", 0, root)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert whole.record.notes == []
    assert any(re.match("out of memory: batches in [24] parts", phase) for phase in phases), phases
    assert "a batch of 24 needed more memory than there is" in parts.record.notes[0]
    assert train(make_recipe("after", **keys), "one", 0, root).record.notes == []


# Formats, scores, predictions ---------------------------------------------------------------------------------------


def test_the_precision_plan_is_measured_on_the_card(tiny, make_recipe):
    recipe = make_recipe(model__name="resnet18", image_size=64, epochs=70, device="cuda")
    run = train(recipe, "tiny", 0, tiny)
    plan = run.record.precision
    names = {f"{dtype}-{order}" for dtype in ("float32", "bf16", "fp16") for order in ("channels-last", "nchw")}
    assert plan["source"] == "measured" and set(plan["images_per_s"]) == names
    assert all(rate for rate in plan["images_per_s"].values())
    assert train(recipe, "tiny", 1, tiny).record.precision["source"] == "cached"


def test_scores_on_the_card_are_those_on_the_cpu(trained, make_recipe):
    run = train(make_recipe("it", device="cuda", workers=2), "tiny", 0, trained)
    test = evaluate(run, "test", trained)
    assert (run.path / "predictions-test.npz").is_file() and 0 <= test["top1"] <= 1
    files = sorted((trained.data / "tiny").rglob("*.png"))
    on_card, on_cpu = (Predictor.load(run, trained, device) for device in ("cuda", "cpu"))
    assert [each.network.device.type for each in (on_card, on_cpu)] == ["cuda", "cpu"]
    ours, theirs = on_card.predict(files, explain=trained.root / "shown"), on_cpu.predict(files)
    assert len(ours) == len(files)
    for one, two in zip(ours, theirs, strict=True):
        assert one.error is None and Path(one.explanation or "").is_file()
        assert one.scores == pytest.approx(two.scores, abs=5e-3)  # convolutions in TF32
    of_the_cpu = next(each for each in list_runs(trained) if each.name != run.name)
    assert not [each for each in Predictor.load(of_the_cpu, trained, "cuda").predict(files) if each.error]


def test_frozen_stages_are_kept_and_give_the_same_bits_again(again, make_recipe, monkeypatch):
    monkeypatch.setattr("zoo.training.boundary.WORTH", {"cuda": 0.0})  # however little it saves
    keys = {
        "model__name": "resnet18",
        "image_size": 64,
        "freeze": ["conv1", "bn1", "layer1", "layer2"],
        "policy": "none",
        "device": "cuda",
    }
    one, two = (train(make_recipe("it", **keys), "tiny", 0, again(name)) for name in ("one", "two"))
    assert bits(one) == bits(two)


def test_a_command_trains_benchmarks_and_predicts(scenes, tmp_path):
    process = command(
        scenes.root, "bench", "--data", "scenes", "--recipes", "simple_cnn,test_resnet-lp", "--seeds", "2", "--jobs",
        "2", "--offline", "--json", "--set", "model.image_size=64", "--set", "epochs=3", "--set", "device=cuda",
    )  # fmt: skip
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, out + err
    runs = list_runs(scenes)
    assert len(runs) == 4 and all(run.record.device.startswith("cuda") for run in runs)
    process = command(scenes.root, "predict", runs[0].name, str(scenes.root / "pictures"), "--json", "--device", "cuda")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and len(out.splitlines()) == 80, out + err


# Several processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_on_one_card_give_what_one_gives(tiny, make_recipe, tmp_path):
    other = tmp_path / "two"
    shutil.copytree(tiny.root, other)
    keys = {"batch_size": 7, "accumulate": 2, "drop_rate": 0.3, "mixup": 0.3, "optimizer.name": "sgd", "epochs": 3}
    keys |= {"device": "cuda", "precision": "float32"}
    one = train(make_recipe(**{key.replace(".", "__"): value for key, value in keys.items()}), "tiny", 0, tiny)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "zoo"]
    words = ["train", "tiny", "--data", "tiny", *(w for k, v in keys.items() for w in ("--set", f"{k}={v}"))]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *words],
        env={**os.environ, "ZOO_HOME": str(other), "PYTHONWARNINGS": "default"},
        capture_output=True, text=True, timeout=240, cwd=other, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (two,) = list_runs(home(other))
    assert two.record.processes == 2 and two.record.device.startswith("cuda")
    ours, theirs = load_file(two.weights_file), load_file(one.weights_file)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=5e-3, atol=2e-3, msg=lambda text, key=key: f"{key}: {text}")


NCCL = """
import os
import torch
import torch.distributed as dist
from torch import nn

os.environ.update(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
from zoo.training import parallel
from zoo.training.precision import choose_device

device = choose_device("cuda")
assert device == torch.device("cuda:0"), device
assert not parallel._cards_are_shared()
# One card can meet nobody else: a group of one, which the rest is told is of two.
really = dist.init_process_group
dist.init_process_group = lambda backend, **more: really(backend, rank=0, world_size=1, store=dist.HashStore(), **more)
with parallel.joined(device) as group:
    assert dist.get_backend() == "nccl", dist.get_backend()
    both = parallel.Group(0, 2)
    assert both.total([1.5, 2.0], device) == [1.5, 2.0]
    assert both.shared({"a": torch.ones(2)})["a"].sum() == 2
    assert both.agreed(15, True, 7, device) == (15, True, 7)
    both.wait()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)).to(device)
    images = torch.randn(6, 3, 8, 8, device=device)
    model(images).sum().backward()
    alone = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    with parallel.shared_batch_norm(model, both):
        network = parallel.across(model, both, device)
        network(images).sum().backward()
    for one, two in zip(alone, model.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one, rtol=1e-3, atol=1e-4)
print("met")
"""


def test_what_processes_share_travels_by_nccl():
    done = subprocess.run([sys.executable, "-c", NCCL], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout.strip().endswith("met"), done.stdout + done.stderr


def test_torchrun_with_one_process_trains_on_the_card(tiny):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "zoo", "train",
         "tiny", "--data",
         "tiny", "--set", "device=cuda"],
        env={**os.environ, "ZOO_HOME": str(tiny.root), "PYTHONWARNINGS": "default"},
        capture_output=True, text=True, timeout=120, cwd=tiny.root, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = list_runs(tiny)
    assert run.record.device.startswith("cuda") and run.record.processes == 1
