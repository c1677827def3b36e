"""What an interrupted run goes on from: tensors as safetensors, numbers as JSON, no pickle."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from zoo.errors import ZooError
from zoo.files import atomic_writer, read_json, sha256_bytes, sha256_file, write_json


@dataclass
class Progress:
    """How far a run has come: finished epochs, the best on val, and what it has cost."""

    epoch: int = 0
    best_epoch: int = 0
    best_value: float | None = None
    stale_epochs: int = 0
    updates: int = 0
    train_s: float = 0.0
    images_seen: int = 0
    step_s: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write tensors as safetensors, atomically, and return the file's SHA-256."""
    plain = {key: value.detach().to("cpu").contiguous().clone() for key, value in tensors.items()}
    data = _ordered(save(plain, metadata)) if metadata else save(plain)
    with atomic_writer(path) as stream:
        stream.write(data)
    return sha256_bytes(data)


def _ordered(data: bytes) -> bytes:
    """Return a safetensors file with its metadata in order of their names; the library writes them in any order.

    The format: the header's length in 8 bytes, the header as JSON, the tensors' bytes, which stay where they are.
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def save_checkpoint(
    folder: Path,
    digest: str,
    progress: Progress,
    tensors: dict[str, dict[str, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint beside the one before, which is removed only when the new one is whole.

    tensors: name of a part (`model`, `best`, `ema`) to its state dict.
    """
    flat = {f"{part}/{key}": value for part, state in tensors.items() for key, value in state.items()}
    scalars: dict[str, Any] = {}
    for place, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                flat[f"optimizer/{place}/{key}"] = value
            else:
                scalars[f"{place}/{key}"] = value
    name = f"epoch-{progress.epoch:05d}"
    sha256 = save_tensors(folder / f"{name}.safetensors", flat)
    # Some optimisers count their steps in the group, as a number or a tensor (timm's LAMB).
    groups = [{key: float(value) for key, value in group.items() if key == "step"} for group in optimizer.param_groups]
    facts: dict[str, Any] = {"run_digest": digest, "sha256": sha256, "progress": asdict(progress)}
    facts |= {"scalars": scalars, "groups": groups}
    write_json(folder / f"{name}.json", facts)
    for old in folder.glob("epoch-*"):
        if old.stem != name:
            old.unlink()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back."""

    progress: Progress
    tensors: dict[str, torch.Tensor]
    scalars: dict[str, Any]
    groups: list[dict[str, float]]

    def part(self, name: str) -> dict[str, torch.Tensor]:
        """Return the state dict of one part; empty where the checkpoint has no such part."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): each for key, each in self.tensors.items() if key.startswith(prefix)}

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimiser the state that it had."""
        state: dict[int, dict[str, Any]] = {}
        for full, value in {**self.part("optimizer"), **self.scalars}.items():
            place, key = full.split("/", 1)
            state.setdefault(int(place), {})[key] = value
        groups = [
            {**group, **numbers}
            for group, numbers in zip(optimizer.state_dict()["param_groups"], self.groups, strict=True)
        ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                # Sums over another memory format round otherwise, and LAMB takes norms.
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def load_checkpoint(folder: Path, digest: str) -> Checkpoint | None:
    """Return the newest whole checkpoint of the run with this digest, or None where there is none.

    A checkpoint that was cut off or changed is passed over. Raises ZooError for that of another run.
    """
    for file in sorted(folder.glob("epoch-*.json"), reverse=True):
        try:
            facts = read_json(file)
        except ZooError:
            continue
        try:
            tensors_file = file.with_suffix(".safetensors")
            if sha256_file(tensors_file) != facts["sha256"]:
                continue
            if facts["run_digest"] != digest:
                raise ZooError(
                    f"{str(folder)!r} holds the checkpoint of another run ({facts['run_digest'][:8]}, "
                    f"this is {digest[:8]}); remove the folder to start anew"
                )
            progress = Progress(**facts["progress"])
            return Checkpoint(progress, load_file(tensors_file), facts["scalars"], facts["groups"])
        except (OSError, KeyError, TypeError, SafetensorError):
            continue
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished run."""
    if folder.is_dir():
        shutil.rmtree(folder)
