from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from zoo.errors import ZooError
from zoo.files import sha256_file
from zoo.training.checkpoint import (
    Progress,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
    save_tensors,
)

DIGEST = "0123456789abcdef"


def stepped(name: str, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    optimizer = create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.1, momentum=0.9)
    go_on(model, optimizer, 0, steps)
    return model, optimizer


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()


def saved(folder: Path, epoch: int = 1, digest: str = DIGEST) -> nn.Module:
    model, optimizer = stepped("adamw")
    save_checkpoint(folder, digest, Progress(epoch=epoch), {"model": model.state_dict()}, optimizer)
    return model


@pytest.mark.parametrize("name", ["adamw", "sgd", "adam", "lamb", "nadamw", "rmsprop"])
def test_an_optimiser_goes_on_bit_for_bit(tmp_path, name):
    model, optimizer = stepped(name)
    progress = Progress(epoch=3, best_value=0.5, updates=3, history=[{"epoch": 1, "val_top1": 0.25}])
    save_checkpoint(tmp_path, DIGEST, progress, {"model": model.state_dict(), "best": {}}, optimizer)
    found = load_checkpoint(tmp_path, DIGEST)
    assert found.progress == progress
    assert found.part("best") == {}
    other, theirs = stepped(name, steps=0)
    other.load_state_dict(found.part("model"))
    found.restore_optimizer(theirs)
    go_on(model, optimizer, 3, 4)
    go_on(other, theirs, 3, 4)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_the_newest_alone_is_kept(tmp_path):
    for epoch in (1, 2, 10):
        saved(tmp_path, epoch)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["epoch-00010.json", "epoch-00010.safetensors"]
    assert load_checkpoint(tmp_path, DIGEST).progress.epoch == 10
    remove_checkpoints(tmp_path)
    assert not tmp_path.exists()
    remove_checkpoints(tmp_path)


@pytest.mark.parametrize("harm", ["cut tensors", "changed tensors", "no tensors", "cut facts", "no facts"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, harm):
    saved(tmp_path / "old", 1)
    saved(tmp_path, 2)
    for file in (tmp_path / "old").iterdir():
        file.rename(tmp_path / file.name)
    tensors, facts = tmp_path / "epoch-00002.safetensors", tmp_path / "epoch-00002.json"
    data = tensors.read_bytes()
    if harm == "cut tensors":
        tensors.write_bytes(data[:-5])
    elif harm == "changed tensors":
        tensors.write_bytes(data[:-5] + b"12345")
    elif harm == "no tensors":
        tensors.unlink()
    elif harm == "cut facts":
        facts.write_bytes(facts.read_bytes()[:-40])
    else:
        changed = {key: value for key, value in json.loads(facts.read_text()).items() if key != "progress"}
        facts.write_text(json.dumps(changed))
    assert load_checkpoint(tmp_path, DIGEST).progress.epoch == 1


def test_there_may_be_none(tmp_path):
    assert load_checkpoint(tmp_path / "none", DIGEST) is None


def test_that_of_another_run_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(ZooError, match=r"checkpoint of another run \(01234567, this is ffff"):
        load_checkpoint(tmp_path, "f" * 16)


def test_tensors_come_back_and_the_digest_is_the_file_s(tmp_path):
    from safetensors.torch import load_file

    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": shared, "b": shared, "t": shared.T, "n": torch.tensor(3)}
    digest = save_tensors(tmp_path / "x.safetensors", tensors, {"a": "b"})
    assert digest == sha256_file(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
