"""One run on several processes that torchrun started: who they are, what they share, batch statistics of all."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from zoo.errors import ZooError, one_line

_PATIENCE = timedelta(hours=6)  # the others wait while the first decodes a large dataset


@dataclass(frozen=True)
class Group:
    """The processes of a run; alone, rank 0 of 1."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Return whether this process writes files and speaks."""
        return self.rank == 0

    def total(self, values: list[float], device: torch.device) -> list[float]:
        """Return the sums of numbers over all processes."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
        dist.all_reduce(tensor)
        return cast("list[float]", tensor.tolist())

    def agreed(self, stop: int, due: bool, updates: int, device: torch.device) -> tuple[int, bool, int]:
        """Return the signal that any process has got, or 0, and whether the first finds it time to save.

        And after how many updates, of which each process names a number above 0, the first wants to be asked again.
        """
        votes = self.gathered((stop, due, updates)) if device.type == "cuda" else None
        if votes is None:
            flags = torch.tensor([stop, int(due and self.leads), updates if self.leads else 0])
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            votes = [(int(flags[0]), bool(flags[1]), int(flags[2]))]
        return max(each for each, _, _ in votes), votes[0][1], votes[0][2]

    def shared(self, value: Any) -> Any:
        """Return the first process's value in every process; it must be picklable, and is our own."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: Any) -> list[Any]:
        """Return the values of all processes, in their order."""
        if self.world == 1:
            return [value]
        boxes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(boxes, value)
        return boxes

    def wait(self) -> None:
        """Return when every process is here."""
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Run the block in the first process, and then in the others, which find what it has written."""
        if not self.leads:
            self.wait()
        yield
        if self.leads:
            self.wait()

    def noise(self, rows: list[int], whole: int) -> AbstractContextManager[Any]:
        """Return the context in which dropout draws as one process would; rows: this one's places in the batch."""
        return nullcontext() if self.world == 1 else SharedNoise(rows, whole)


ALONE = Group()


def expected_world() -> int:
    """Return how many processes torchrun started this one among; 1 where it did not."""
    world = os.environ.get("WORLD_SIZE", "")
    return int(world) if world.isdecimal() and "RANK" in os.environ and "MASTER_ADDR" in os.environ else 1


def refuse_torchrun(what: str, instead: str = "") -> None:
    """Raise ZooError where torchrun started this process among others, for what each of them would do anew."""
    if expected_world() > 1:
        raise ZooError(
            f"{what} is the work of one process, and torchrun started {expected_world()}; run it without torchrun"
            + instead
        )


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """Join the processes that torchrun started, for the block; alone where there are none.

    NCCL between CUDA cards, gloo between processes on CPUs or on one card. Raises ZooError where they cannot meet.
    """
    if expected_world() == 1:
        yield ALONE
        return
    if dist.is_initialized():  # a run that another is made of
        yield Group(dist.get_rank(), dist.get_world_size())
        return
    backend = "nccl" if device.type == "cuda" and not _cards_are_shared() else "gloo"
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=_PATIENCE, device_id=device if backend == "nccl" else None)
    except (RuntimeError, ValueError, OSError) as error:
        raise ZooError(
            f"the {expected_world()} processes of torchrun cannot meet by {backend}: {error}; start them again"
        ) from error
    try:
        yield Group(dist.get_rank(), dist.get_world_size())
    except RuntimeError as error:
        # What is wrong with the run itself is wrong in the first process too, which says it.
        if dist.get_rank() == 0:
            raise
        raise ZooError(
            f"process {dist.get_rank()} stops ({one_line(error, 120)}); see what the first one says"
        ) from None
    finally:
        dist.destroy_process_group()


def _cards_are_shared() -> bool:
    """Return whether torchrun started more processes here than there are CUDA cards, which NCCL refuses."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return local.isdecimal() and int(local) > torch.cuda.device_count()


def across(
    model: nn.Module, group: Group, device: torch.device, dry: Callable[[], torch.Tensor] | None = None
) -> nn.Module:
    """Return what is called to train the model in all processes: its gradients are their mean.

    Wrapped anew where other parameters are trained; alone it is the model itself. dry: gives logits of a few made-up
    images, by which is seen whether all parameters have a part in them; left out, they are taken to.
    """
    if group.world == 1 or not any(each.requires_grad for each in model.parameters()):
        return model
    idle = dry is not None and any(group.gathered(has_idle_parameters(model, dry, device)))
    from torch.nn.parallel import DistributedDataParallel

    devices = [device.index or 0] if device.type == "cuda" else None
    # Buffers are alike in all processes: batch statistics are shared. torch has renamed the switch.
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # To look for idle parameters costs a walk through the graph in each step: else the others would wait for them.
    options: dict[str, Any] = {switch: False, "find_unused_parameters": idle}
    return DistributedDataParallel(model, device_ids=devices, **options)


def has_idle_parameters(model: nn.Module, dry: Callable[[], torch.Tensor], device: torch.device) -> bool:
    """Return whether a trained parameter has no part in the logits that dry gives; the model stays as it was."""
    trained = [each for each in model.parameters() if each.requires_grad]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            gradients = torch.autograd.grad(dry().float().sum(), trained, allow_unused=True)
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return any(each is None for each in gradients)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; so is its gradient's."""

    @staticmethod
    def forward(_: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


@contextmanager
def shared_batch_norm(model: nn.Module, group: Group) -> Iterator[None]:
    """Let batch normalisation in training take the statistics of all processes' images, within the block.

    The parameters and buffers keep their names. torch's SyncBatchNorm does not run on CPUs.
    """
    norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    patched = [] if group.world == 1 else [each for each in norms if not isinstance(each, nn.SyncBatchNorm)]
    for module in patched:
        module.forward = functools.partial(_shared_batch_norm, module, type(module).forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in patched:
            module.__dict__.pop("forward", None)


def _shared_batch_norm(module: Any, alone: Any, x: torch.Tensor) -> Any:
    """Normalise by the mean and variance over all processes (Ioffe and Szegedy 2015, arXiv 1502.03167)."""
    if not module.training:
        return alone(module, x)
    all_reduce = cast("Any", _Sum).apply

    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    values = x.float()
    count = torch.tensor(float(x.numel() / x.shape[1]), device=x.device)
    dist.all_reduce(count)
    mean = all_reduce(values.sum(axes)) / count
    centred = values - mean.view(shape)
    variance = all_reduce(centred.square().sum(axes)) / count
    with torch.no_grad():
        if module.track_running_stats and module.running_mean is not None:
            module.num_batches_tracked += 1
            share = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
            module.running_mean.lerp_(mean.detach().to(module.running_mean.dtype), share)
            unbiased = variance.detach() * (count / (count - 1).clamp(min=1))
            module.running_var.lerp_(unbiased.to(module.running_var.dtype), share)
    out = centred * torch.rsqrt(variance + module.eps).view(shape)
    if module.weight is not None:
        out = out * module.weight.view(shape) + module.bias.view(shape)
    out = out.to(x.dtype)
    for name in ("drop", "act"):  # timm's batch norms have the activation in them
        if hasattr(module, name):
            out = getattr(module, name)(out)
    return out


class SharedNoise(TorchFunctionMode):
    """Within the block, dropout and drop-path draw for the images of all processes, and take this process's part.

    So the noise is that of one process which computes the whole batch, from the same seed. rows: places of this
    process's images in a batch of `whole`.
    """

    def __init__(self, rows: list[int], whole: int) -> None:
        super().__init__()
        self.rows, self.whole = rows, whole

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace what draws a number for each image; leave all else as it is."""
        kwargs = kwargs or {}
        drawn = args[0] if args else kwargs.get("input")
        if function not in _NOISE or not isinstance(drawn, torch.Tensor) or drawn.shape[:1] != (len(self.rows),):
            return function(*args, **kwargs)
        like = torch.empty_like(drawn[:1]).expand(self.whole, *drawn.shape[1:])
        whole = torch.ones_like(like, memory_format=torch.preserve_format, requires_grad=False)
        if drawn.ndim == 4 and drawn.is_contiguous(memory_format=torch.channels_last):
            whole = whole.contiguous(memory_format=torch.channels_last)
        if function is torch.Tensor.bernoulli_:
            return drawn.copy_(function(whole, *args[1:], **kwargs)[self.rows])
        kwargs = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
        return drawn * function(whole, *args[1:3], **kwargs)[self.rows]


_NOISE = {functional.dropout, functional.dropout2d, torch.Tensor.bernoulli_}
