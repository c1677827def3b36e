"""Where and in which number format a run is computed, and how the fastest format is found."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zoo.cores import cores
from zoo.errors import ZooError, one_line
from zoo.files import digest_of, read_json, write_json
from zoo.training.kernels import lacks_steady_kernel

FEWEST_STEPS = 200  # below, measuring would cost more than it brings
LONG_RUN_S = 900.0  # from here on torch.compile, which costs a minute or two, is tried as well
CLOSE = 0.05  # relative difference of a loss from float32's
GAIN = 1.1  # what float32 in channels-last order gives way for: noise must not decide the bits of a run
TIE = 1.05  # plans nearer than that are alike, and the more exact one is taken
_ROUNDS = 3
_TIMED_STEPS = 2
_MOST_TIMED_STEPS = 10
_TIMED_S = 0.5  # of fast steps so many that one of them, at least, is not disturbed by the machine's other work
_HOPELESS = 2.5  # times the fastest; such a plan is not measured again
_STUCK, _STUCK_S = 20, 2.0  # times the fastest, and seconds, of a first step after which there is no second
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PrecisionPlan:
    """The number format of the forward pass; weights, gradients and optimiser stay float32.

    source: `forced`, `default`, `measured` or `cached`. measured: images per second of each plan that was tried, None
    for one whose loss was not finite, or far from float32's. compile_s: what compiling took where it was tried.
    """

    dtype: str
    channels_last: bool
    compiled: bool = False
    source: str = field(default="default", compare=False)
    measured: dict[str, float | None] = field(default_factory=dict, compare=False)
    compile_s: float | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Return the name that `--set precision=...` takes.

        >>> PrecisionPlan("bf16", channels_last=False).name
        'bf16-nchw'
        """
        return f"{self.dtype}-{'channels-last' if self.channels_last else 'nchw'}{'-compile' if self.compiled else ''}"

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context in which a forward pass runs."""
        return nullcontext() if self.dtype == "float32" else torch.autocast(device.type, dtype=_DTYPES[self.dtype])

    def place(self, images: torch.Tensor) -> torch.Tensor:
        """Return images of shape (B, C, H, W) in the plan's memory format."""
        return images.contiguous(memory_format=self.memory_format)

    @property
    def memory_format(self) -> torch.memory_format:
        """Return torch's name of the memory format."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def scaler(self, device: torch.device) -> torch.amp.GradScaler | None:
        """Return what keeps small gradients of fp16 from vanishing; None for other formats."""
        return torch.amp.GradScaler(device.type, init_scale=2.0**14) if self.dtype == "fp16" else None

    def facts(self) -> dict[str, Any]:
        """Return what decides the numbers; `compiled` only where it is so."""
        plain = {"dtype": self.dtype, "channels_last": self.channels_last}
        return {**plain, "compiled": True} if self.compiled else plain

    def record(self) -> dict[str, Any]:
        """Return the plan as run.json records it."""
        more: dict[str, Any] = {"images_per_s": self.measured} if self.measured else {}
        if self.compile_s is not None:
            more["compile_s"] = self.compile_s
        return {**self.facts(), "name": self.name, "source": self.source, **more}


def recorded_plan(facts: dict[str, Any]) -> PrecisionPlan:
    """Return the plan of a `run.json`; torch.compile changes only training, never how a run is scored."""
    return PrecisionPlan(facts.get("dtype", "float32"), channels_last=facts.get("channels_last", True))


def begun_plan(facts: dict[str, Any]) -> PrecisionPlan:
    """Return the plan with which a run that goes on was begun, as `record` gave it."""
    return PrecisionPlan(
        facts["dtype"],
        facts["channels_last"],
        facts.get("compiled", False),
        facts.get("source", "default"),
        facts.get("images_per_s", {}),
        facts.get("compile_s"),
    )


def choose_device(wanted: str) -> torch.device:
    """Return the device: `auto` takes CUDA, then MPS, then the CPU.

    Of several processes that torchrun started on this machine, each has a CUDA card of its own, as far as they reach.
    Raises ZooError where the wanted device is not there.
    """
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    wanted = there[0] if wanted == "auto" else wanted
    local = os.environ.get("LOCAL_RANK", "")
    if wanted == there[0] == "cuda" and local.isdecimal():
        return torch.device("cuda", int(local) % torch.cuda.device_count())
    kind, colon, index = wanted.partition(":")
    counts = {"cuda": torch.cuda.device_count()}
    if kind not in there or (colon and not (index.isdecimal() and int(index) < counts.get(kind, 1))):
        listed = ", ".join(there)
        raise ZooError(f"device {one_line(wanted, 60)!r} is not on this machine; take auto or one of {listed}")
    return torch.device(wanted)


def choose_plan(wanted: str, device: torch.device) -> PrecisionPlan:
    """Return the plan of a name, or what `auto` is without measuring: bf16 on CUDA cards that have it, else float32.

    A dtype alone means channels-last order. Raises ZooError where the device cannot compute in it.
    """
    if wanted == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return PrecisionPlan("bf16" if has_bf16 else "float32", channels_last=True)
    dtype = wanted.partition("-")[0]
    if dtype != "float32" and not torch.amp.is_autocast_available(device.type):
        raise ZooError(f"precision {wanted!r} is not to be had on device {device.type!r}; take float32 or auto")
    return PrecisionPlan(dtype, "-nchw" not in wanted, "-compile" in wanted, source="forced")


# avx512_fp16 alone is none: torch has no gradients of convolutions for it, which then take 300 times as long.
_FP16_UNITS = {"amx_fp16", "fphp"}


def cpu_flags() -> set[str]:
    """Return what the processor says that it can do, by Linux's names; elsewhere nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    found = [line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))]
    return set(found[0].split()) if found else set()


def candidates(device: torch.device) -> list[PrecisionPlan]:
    """Return the plans worth measuring on a device, the most exact and usual first."""
    dtypes = ["float32"]
    if torch.amp.is_autocast_available(device.type):
        # A CPU without units for fp16 emulates it, many times slower: not worth even a try.
        dtypes += ["bf16", "fp16"] if device.type != "cpu" or _FP16_UNITS & cpu_flags() else ["bf16"]
    return [PrecisionPlan(dtype, channels_last) for dtype in dtypes for channels_last in (True, False)]


def measured_plan(
    steps: Callable[[PrecisionPlan, int], list[tuple[float, float]]],
    plans: Sequence[PrecisionPlan],
    images: int,
    seconds_left: Callable[[float], float] | None = None,
) -> PrecisionPlan:
    """Return the fastest plan whose losses are finite and close to float32's.

    steps: called with a plan and a number of steps, trains so many from one and the same start and returns seconds and
    loss of each; the first is a warm-up. plans: the first is what others have to beat by a tenth. images: of a step.
    seconds_left: of the run at so many seconds a step; where they are many, the winner is tried compiled, too.

    Plans take turns, so that a drift of the machine hits all alike. A plan that fails is left out.
    """
    times: dict[PrecisionPlan, list[float]] = {plan: [] for plan in plans}
    losses: dict[PrecisionPlan, list[float]] = {}
    for _ in range(_ROUNDS):
        for plan in plans:
            best = min((min(each) for each in times.values() if each), default=math.inf)
            if plan in losses and (not times[plan] or min(times[plan]) > _HOPELESS * best):
                continue
            if plan not in losses and (stuck := _stuck_step(plan, steps, best)):
                times[plan], losses[plan] = [stuck[0]], [stuck[1]]
                continue
            enough = 0 if math.isinf(best) else min(_MOST_TIMED_STEPS, math.ceil(_TIMED_S / max(best, 1e-6)))
            found = _tried(steps, plan, max(_TIMED_STEPS, enough))
            losses[plan] = [loss for _, loss in found]
            if not _close(losses[plan], losses[plans[0]]):
                times[plan] = []
                continue
            times[plan] += [seconds for seconds, _ in found[1:]]
    rates = {plan.name: round(images / min(each), 2) if each else None for plan, each in times.items()}
    fastest = _fastest({plan: min(each) for plan, each in times.items() if each}, plans)
    chosen = replace(fastest, source="measured", measured=rates)
    if seconds_left is None or not times[chosen] or seconds_left(min(times[chosen])) < LONG_RUN_S:
        return chosen
    return _maybe_compiled(steps, chosen, min(times[chosen]), images, seconds_left, losses[plans[0]])


def _stuck_step(
    plan: PrecisionPlan, steps: Callable[[PrecisionPlan, int], list[tuple[float, float]]], best: float
) -> tuple[float, float] | None:
    """Return seconds and loss of a plan's first step where it took so long that it is not worth a second."""
    found = [] if math.isinf(best) else _tried(steps, plan, 0)
    return found[0] if found and found[0][0] > max(_STUCK * best, _STUCK_S) else None


def _tried(
    steps: Callable[[PrecisionPlan, int], list[tuple[float, float]]], plan: PrecisionPlan, count: int
) -> list[tuple[float, float]]:
    try:
        return steps(plan, 1 + count)
    except (RuntimeError, MemoryError, NotImplementedError) as error:
        if lacks_steady_kernel(error):  # in no format
            raise
        return []  # a format that this network or machine cannot do


def _close(losses: list[float], reference: list[float]) -> bool:
    """Return whether losses are there, finite, and near those of float32."""
    near = [
        abs(loss - wanted) <= CLOSE * max(1.0, abs(wanted)) for loss, wanted in zip(losses, reference, strict=False)
    ]
    return bool(losses) and all(math.isfinite(loss) for loss in losses) and all(near)


def _fastest(seconds: dict[PrecisionPlan, float], plans: Sequence[PrecisionPlan]) -> PrecisionPlan:
    """Return the first of the plans that are as fast as the fastest; the usual one unless it is clearly beaten."""
    usual = plans[0]
    if not seconds:
        return usual
    best = min(seconds.values())
    if usual in seconds and seconds[usual] <= GAIN * best:
        return usual
    return next(plan for plan in plans if plan in seconds and seconds[plan] <= TIE * best)


def _maybe_compiled(
    steps: Callable[[PrecisionPlan, int], list[tuple[float, float]]],
    plan: PrecisionPlan,
    step_s: float,
    images: int,
    seconds_left: Callable[[float], float],
    reference: list[float],
) -> PrecisionPlan:
    """Return the plan compiled where that pays, else as it is; what was measured says in both cases what was found."""
    compiled = replace(plan, compiled=True)
    started = time.perf_counter()
    try:
        found = steps(compiled, 1 + _TIMED_STEPS)
    except Exception as error:  # no compiler, or a network that it cannot do: compilers raise kinds of their own
        if lacks_steady_kernel(error):
            raise
        found = []
    cost = time.perf_counter() - started
    if not _close([loss for _, loss in found], reference):
        return replace(plan, measured={**plan.measured, compiled.name: None})
    fastest = min(seconds for seconds, _ in found[1:])
    rates = {**plan.measured, compiled.name: round(images / fastest, 2)}
    pays = _compiling_pays(step_s, fastest, cost, seconds_left)
    return replace(plan, compiled=pays, measured=rates, compile_s=round(cost, 3))


def _compiling_pays(step_s: float, compiled_s: float, cost_s: float, seconds_left: Callable[[float], float]) -> bool:
    """Return whether what compiling saves over the run is more than it takes."""
    return GAIN * compiled_s < step_s and seconds_left(step_s) - seconds_left(compiled_s) > 2 * cost_s


def fitting_plan(
    known: PrecisionPlan,
    steps: Callable[[PrecisionPlan, int], list[tuple[float, float]]],
    usual: PrecisionPlan,
    images: int,
    seconds_left: Callable[[float], float] | None,
) -> PrecisionPlan:
    """Return a plan that was measured for a run of any length as it fits one of this length: compiled, or not.

    steps, images, seconds_left: as for `measured_plan`. Where the run is long and compiling was never tried, it is
    tried now, its losses held against those of `usual`; the plan's source then is `measured`.
    """
    plain = replace(known, compiled=False)
    rate = known.measured.get(plain.name)
    if seconds_left is None or not rate or seconds_left(images / rate) < LONG_RUN_S:
        return plain
    name = replace(plain, compiled=True).name
    faster = known.measured.get(name)
    if name in known.measured and faster is None:
        return plain
    if faster is None or known.compile_s is None:
        reference = [loss for _, loss in _tried(steps, usual, _TIMED_STEPS)]
        return _maybe_compiled(steps, replace(plain, source="measured"), images / rate, images, seconds_left, reference)
    pays = _compiling_pays(images / rate, images / faster, known.compile_s, seconds_left)
    return replace(plain, compiled=pays)


# The plans that this machine has found -------------------------------------------------------------------------


def plan_file(identity: dict[str, Any]) -> Path:
    """Return where this machine keeps the plan of a network, image size, batch and number of threads."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return folder / "zoo" / "precision" / f"{digest_of(identity)[:24]}.json"


def known_plan(identity: dict[str, Any]) -> PrecisionPlan | None:
    """Return the plan that was measured before, or None."""
    try:
        stored = read_json(plan_file(identity))
        return PrecisionPlan(
            stored["dtype"],
            bool(stored["channels_last"]),
            bool(stored.get("compiled", False)),
            source="cached",
            measured=dict(stored.get("images_per_s", {})),
            compile_s=stored.get("compile_s"),
        )
    except (ZooError, KeyError, TypeError, ValueError, RuntimeError):
        return None


def keep_plan(identity: dict[str, Any], plan: PrecisionPlan) -> None:
    """Remember a measured plan; where the folder cannot be written, it is measured again the next time."""
    try:
        write_json(plan_file(identity), {**plan.record(), "of": identity})
    except (ZooError, RuntimeError):
        return


def most_processes() -> int:
    """Return how many processes this machine can sensibly be asked for."""
    return max(16, 4 * cores())


def choose_workers(wanted: int | str, device: torch.device) -> int:
    """Return the loading processes: none beside CPU training, which needs every core itself.

    Cached pixels make loading cheap; a GPU gets up to eight. Raises ZooError for more than the machine can bear.
    """
    if isinstance(wanted, int):
        if wanted > most_processes():
            raise ZooError(
                f"workers must be from 0 to {most_processes()} on this machine of {cores()} cores. Got {wanted}; "
                "leave it at auto"
            )
        return wanted
    return 0 if device.type == "cpu" else max(0, min(8, cores() - 1))


def set_threads() -> int:
    """Let torch use the cores that this process may use, and return their number."""
    if torch.get_num_threads() > cores():
        torch.set_num_threads(cores())
    return torch.get_num_threads()
