"""Pretraining on formula images: the same bytes from a seed, resumable, learning, and weights that load anywhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from zoo.data.formula import GENERATOR_VERSION
from zoo.errors import Interrupted, ZooError
from zoo.files import home, read_json, sha256_file
from zoo.models.nets import build_timm
from zoo.models.registry import find_model
from zoo.models.weights import load_weights, resolve_weights
from zoo.training.precision import choose_device
from zoo.training.pretrain import FormulaNet, Pretraining, augmented, colour_loss, pretrain

TOY = {
    "families": ("leaves",),
    "images_per_class": 8,
    "epochs": 2,
    "image_sizes": (32,),
    "pool_size": 36,
    "batch_size": 32,
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A home in which a toy was pretrained, and its folder."""
    root = home(tmp_path_factory.mktemp("pretrain"))
    return root, pretrain(Pretraining("test_resnet", **TOY), root)


def test_it_leaves_float16_weights_a_card_and_a_history(toy):
    _, folder = toy
    assert {path.name for path in folder.iterdir()} == {
        "test_resnet.formula.safetensors",
        "test_resnet.formula.json",
        "history.jsonl",
    }
    card = read_json(folder / "test_resnet.formula.json")
    file = folder / "test_resnet.formula.safetensors"
    assert card["sha256"] == sha256_file(file)
    assert card["bytes"] == file.stat().st_size
    assert (card["generator_version"], card["classes"], card["images_seen"]) == (GENERATOR_VERSION, 54, 2 * 54 * 4)
    assert card["settings"]["seed"] == 0
    assert {"torch", "timm", "numpy"} <= set(card["versions"])
    assert card["hardware"].startswith(f"{choose_device('auto').type}: ")
    assert card["hours"] >= 0
    tensors = load_file(file)
    assert {value.dtype for value in tensors.values() if value.is_floating_point()} == {torch.float16}
    assert not [key for key in tensors if key.startswith("fc.")]
    with safe_open(file, framework="pt") as stored:
        assert stored.metadata()["mean"] == "0.5,0.5,0.5"
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(toy, tmp_path):
    _, folder = toy
    name = "test_resnet.formula.safetensors"
    for place in ("again", "other"):
        (tmp_path / place).mkdir()
    again = pretrain(Pretraining("test_resnet", **TOY), home(tmp_path / "again"), processes=2)
    assert sha256_file(again / name) == sha256_file(folder / name)
    other = pretrain(Pretraining("test_resnet", **TOY, seed=1), home(tmp_path / "other"))
    assert sha256_file(other / name) != sha256_file(folder / name)


@pytest.mark.slow
def test_what_was_interrupted_goes_on_and_ends_with_the_same_bytes(toy, tmp_path):
    root, settings = home(tmp_path), Pretraining("test_resnet", **TOY)

    def stop(tick):
        if tick.phase == "training" and tick.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"test_resnet\.formula goes on from its last finished epoch"):
        pretrain(settings, root, on_tick=stop)
    epochs = []
    folder = pretrain(settings, root, on_tick=lambda tick: epochs.append(tick.epoch))
    assert set(epochs) == {2}
    name = "test_resnet.formula.safetensors"
    assert sha256_file(folder / name) == sha256_file(toy[1] / name)
    ticks = []
    assert pretrain(settings, root, on_tick=ticks.append) == folder
    assert ticks == []


@pytest.mark.slow
def test_it_learns(tmp_path):
    settings = Pretraining("test_resnet", **{**TOY, "images_per_class": 12, "epochs": 6})
    folder = pretrain(settings, home(tmp_path))
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert rows[-1]["top1"] > 4 / 54


def test_the_weights_load_by_name_where_zoo_weights_names_the_folder(toy, monkeypatch):
    root, folder = toy
    monkeypatch.setenv("ZOO_WEIGHTS", str(folder))
    spec = find_model("test_resnet.formula")
    assert spec.preprocessing.mean == (0.5, 0.5, 0.5)
    assert spec.preprocessing.interpolation == "bilinear"
    assert spec.preprocessing.image_size == 32
    assert spec.licence == "not stated"
    model = build_timm("test_resnet", 3)
    report = load_weights(model, resolve_weights(spec, "pretrained", root, offline=True), spec)
    assert report.head == "absent"
    stored = load_file(folder / "test_resnet.formula.safetensors")
    assert torch.equal(model.state_dict()["layer1.0.conv1.weight"], stored["layer1.0.conv1.weight"].float())


@pytest.mark.parametrize("arch", ["test_efficientnet", "mobilenetv3_small_050", "test_vit"])
def test_other_architectures_have_the_parts_that_it_needs(arch):
    net = FormulaNet(arch, 7, 160 if arch == "test_vit" else 32)
    size = 160 if arch == "test_vit" else 32
    logits, colour = net(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, 7)
    assert colour.shape == (2, 64 + 27)
    assert not [key for key in net.backbone_state() if key.startswith(("classifier.", "head.", "fc."))]


def test_augmented_images_depend_on_the_generator_alone_and_stay_in_range():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8))
    one, two, other = (augmented(pixels, 32, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert one.shape == (6, 3, 32, 32)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.abs().max() <= 1


def test_the_colour_loss_is_least_where_histogram_and_layout_are_right():
    red = torch.tensor([1.0, -1.0, -1.0])[None, :, None, None].expand(1, 3, 32, 32)
    said = torch.zeros(1, 64 + 27)
    said[0, 48] = 4.0  # the bin of full red: 3 * 16
    said[0, 64:] = red[:, :, :3, :3].flatten()
    right = float(colour_loss(said, red))
    wrong = said.clone()
    wrong[0, 64:] = 0
    blue = torch.tensor([-1.0, -1.0, 1.0])[None, :, None, None].expand(1, 3, 32, 32)
    assert float(colour_loss(wrong, red)) == pytest.approx(right + 1)
    assert float(colour_loss(said, blue)) > right + 3
    assert float(colour_loss(torch.zeros(1, 91), red)) > right + 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arch": "test_resnet.r160_in1k"}, "takes an architecture of timm without a tag. Got 'test_resnet.r160_in1k'"),
        ({"arch": "simple_cnn"}, "takes an architecture of timm"),
        ({"images_per_class": 4}, "images_per_class must be from 5 to 1e.06. Got 4"),
        ({"epochs": 0}, "epochs must be from 1"),
        ({"lr": 0.0}, "lr must be from 1e-07 to 1. Got 0"),
        ({"image_sizes": (16,)}, "image_sizes must lie between 32 px and the 36 px"),
        ({"image_sizes": ()}, "Got none"),
        ({"families": ("leafs",)}, "unknown family 'leafs' of formula images; did you mean 'leaves'"),
        (
            {"arch": "vit_tiny_patch16_224"},
            "'vit_tiny_patch16_224' cannot be pretrained on crops of 32 px: .*; take a convolutional network",
        ),
        ({"precision": "fp16"}, "precision 'fp16' is not offered"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_drawn(tmp_path, changes, said):
    with pytest.raises(ZooError, match=said):
        pretrain(Pretraining(**{"arch": "test_resnet", **TOY, **changes}), home(tmp_path))
    assert not (tmp_path / "data").exists()


def test_other_settings_do_not_overwrite_weights(toy):
    root, _ = toy
    with pytest.raises(ZooError, match="holds weights that were pretrained otherwise; choose another --tag"):
        pretrain(Pretraining("test_resnet", **{**TOY, "epochs": 3}), root)


def test_weights_that_are_gone_or_changed_are_not_taken_for_finished(tmp_path):
    settings = Pretraining("test_resnet", **{**TOY, "epochs": 1})
    folder = pretrain(settings, home(tmp_path))
    file = folder / "test_resnet.formula.safetensors"
    for damage in (lambda: file.write_bytes(file.read_bytes()[:-1]), file.unlink):
        damage()
        with pytest.raises(ZooError, match="is gone or not what its card says; remove the folder to pretrain anew"):
            pretrain(settings, home(tmp_path))


def test_weights_that_grow_beyond_float16_are_refused(tmp_path):
    with pytest.raises(ZooError, match=r"\d+ tensors do not fit float16, 'layer.*running_var' among them; lower --lr"):
        pretrain(Pretraining("test_resnet", **{**TOY, "lr": 1.0}), home(tmp_path))


def _command(*arguments: str) -> list[str]:
    toy = ["--families", "leaves", "--images", "8", "--epochs", "2", "--image-sizes", "32", "--batch-size", "32"]
    return [sys.executable, "-m", "zoo", "pretrain", "test_resnet", *toy, *arguments]


@pytest.mark.slow
def test_the_command_pretrains_says_how_to_use_it_and_is_done_the_second_time(tmp_path):
    said = subprocess.run(
        _command("--home", str(tmp_path), "--json"), capture_output=True, text=True, check=True, timeout=120
    )
    card = json.loads(said.stdout)
    assert (card["name"], card["classes"]) == ("test_resnet.formula", 54)
    again = subprocess.run(_command("--home", str(tmp_path)), capture_output=True, text=True, check=True, timeout=120)
    folder = tmp_path / "models" / "pretrained" / "test_resnet.formula"
    assert again.stdout.startswith("test_resnet.formula: 54 classes, 432 images seen")
    assert f"ZOO_WEIGHTS={folder}" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_with_its_code_and_the_same_command_goes_on(tmp_path, sent, code):
    command = _command("--home", str(tmp_path), "--epochs", "400", "--tag", "long")
    history = tmp_path / "models" / "pretrained" / "test_resnet.long" / "history.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not history.is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert "test_resnet.long goes on from its last finished epoch with the same command" in stderr
    assert (history.parent / "checkpoint").is_dir()
    assert not (history.parent / "test_resnet.long.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--source", "imagenet"), "--source knows formula alone. Got 'imagenet'"),
        (("--image-sizes", "big"), "--image-sizes takes whole numbers with commas, 48,64. Got 'big'"),
        (("--tag", "../x"), "tag"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, arguments, said):
    done = subprocess.run(
        _command("--home", str(tmp_path), *arguments), capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_ctrl_c_while_images_are_drawn_leaves_no_file_no_process_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "zoo", "pretrain", "test_resnet", "--home", str(tmp_path)]
    command += ["--families", "programs", "--images", "1500"]  # a minute and a half of drawing
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    cache = tmp_path / "data" / "formula" / ".cache"
    try:
        deadline = time.monotonic() + 100
        while not (cache.is_dir() and list(cache.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(2)  # long enough for the drawing processes to be at work
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the drawing processes too
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    with pytest.raises(ProcessLookupError):
        for _ in range(200):  # Python's own helper process needs a moment to see that it is alone
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert not list(cache.iterdir())
