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

from zoo.errors import Hindered, ZooError, one_line
from zoo.files import atomic_writer, read_json, sha256_bytes, sha256_file, write_json

_OWN_FILES = ("epoch-", "best-", "average-")


@dataclass
class Progress:
    """How far a run has come, and what it has cost.

    epoch: finished epochs. step: batches done of the next one, whose sums so far are in partial. updates: of the
    optimiser. parts: into how many a batch is divided, because a whole one needs more memory than there is. threads,
    precision: those that the run began with. uncached: splits whose frozen stages' activations had no room on the disk.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_value: float | None = None
    stale_epochs: int = 0
    updates: int = 0
    train_s: float = 0.0
    images_seen: int = 0
    step_s: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    parts: int = 1
    threads: int = 0
    partial: dict[str, float] = field(default_factory=dict)
    precision: dict[str, Any] = field(default_factory=dict)
    uncached: list[str] = field(default_factory=list)

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Count an epoch as finished: its row is history, its sums are added to the run's."""
        self.step_s += self.partial.get("seconds", 0.0)
        self.images_seen += int(self.partial.get("images", 0))
        self.epoch, self.step, self.partial = row["epoch"], 0, {}
        self.history.append(row)


@dataclass(frozen=True)
class Kept:
    """A file of tensors in the checkpoint's folder that many checkpoints share: the best so far, an epoch's weights."""

    file: str
    sha256: str


def keep_tensors(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> Kept:
    """Write tensors once, for every checkpoint from now on that names them; one that is not named is removed."""
    file = f"{name}.safetensors"
    return Kept(file, save_tensors(folder / file, tensors))


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write tensors as safetensors, atomically, and return the file's SHA-256."""
    plain = {key: value.detach().contiguous().to("cpu", copy=True) for key, value in tensors.items()}
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
    *,
    scaler: dict[str, Any] | None = None,
    kept: dict[str, Kept] | None = None,
) -> None:
    """Write a checkpoint beside the one before, which is removed only when the new one is whole.

    tensors: name of a part (`model`, `best`, `ema`) to its state dict. scaler: the state of fp16's gradient scaler.
    kept: parts that `keep_tensors` has written. Raises ZooError where the disk is full; the one before stays.
    """
    flat = {f"{part}/{key}": value for part, state in tensors.items() for key, value in state.items()}
    scalars: dict[str, Any] = {}
    for place, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                flat[f"optimizer/{place}/{key}"] = value
            else:
                scalars[f"{place}/{key}"] = value
    name = f"epoch-{progress.epoch:05d}" + (f"-step-{progress.step:07d}" if progress.step else "")
    sha256 = save_tensors(folder / f"{name}.safetensors", flat)
    # Some optimisers count their steps in the group, as a number or a tensor (timm's LAMB).
    groups = [{key: float(value) for key, value in group.items() if key == "step"} for group in optimizer.param_groups]
    facts: dict[str, Any] = {"run_digest": digest, "sha256": sha256, "progress": asdict(progress)}
    facts |= {"scalars": scalars, "groups": groups, "scaler": scaler}
    facts["kept"] = {part: asdict(file) for part, file in (kept or {}).items()}
    write_json(folder / f"{name}.json", facts)
    _remove_all_but(folder, {f"{name}.json", f"{name}.safetensors", *(each.file for each in (kept or {}).values())})


def _remove_all_but(folder: Path, names: set[str]) -> None:
    """Remove older checkpoints, their facts first, and what processes that were killed have left half written."""
    for old in sorted(folder.iterdir(), key=lambda path: path.suffix != ".json"):
        if old.name not in names and old.name.lstrip(".").startswith(_OWN_FILES):
            old.unlink(missing_ok=True)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back."""

    progress: Progress
    tensors: dict[str, torch.Tensor]
    scalars: dict[str, Any]
    groups: list[dict[str, float]]
    scaler: dict[str, Any] | None = None
    kept: dict[str, Kept] = field(default_factory=dict)
    folder: Path = Path()

    def kept_tensors(self, part: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a kept part; empty where the checkpoint names none."""
        return load_file(self.folder / self.kept[part].file) if part in self.kept else {}

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

    One that was cut off or changed is passed over for the one before. Raises ZooError for that of another run, and
    where there are some, but none is whole.
    """
    found = sorted(folder.glob("epoch-*.json"), key=lambda file: file.stem, reverse=True)
    faults = []
    for file in found:
        try:
            facts = read_json(file)
            if facts["run_digest"] != digest:
                raise _Foreign(str(facts["run_digest"]))
            return _read_checkpoint(file, facts)
        except _Foreign as other:
            raise Hindered(
                f"{str(folder)!r} holds the checkpoint of another run ({other.digest[:8]}, this is {digest[:8]}): of "
                "another recipe, split or seed; move the folder away to start anew"
            ) from None
        except ZooError as error:
            faults.append(str(error))
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            faults.append(f"{file.name}: {type(error).__name__}")
    if faults:
        raise Hindered(
            f"no checkpoint in {str(folder)!r} is whole ({one_line(faults[0], 160)}); move the folder away to start "
            "anew"
        )
    return None


class _Foreign(Exception):
    def __init__(self, digest: str) -> None:
        super().__init__(digest)
        self.digest = digest


def _read_checkpoint(file: Path, facts: dict[str, Any]) -> Checkpoint:
    """Return a checkpoint, every file of it verified; raises OSError, KeyError, TypeError, or ValueError."""
    tensors_file = file.with_suffix(".safetensors")
    kept = {part: Kept(**each) for part, each in facts.get("kept", {}).items()}
    for path, sha256 in (
        (tensors_file, facts["sha256"]),
        *((file.parent / each.file, each.sha256) for each in kept.values()),
    ):
        if sha256_file(path) != sha256:
            raise ValueError(f"{path.name} was changed or cut off")
    progress = Progress(**facts["progress"])
    tensors = load_file(tensors_file)
    return Checkpoint(progress, tensors, facts["scalars"], facts["groups"], facts.get("scaler"), kept, file.parent)


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished run."""
    shutil.rmtree(folder, ignore_errors=True)  # another process may remove them, too
