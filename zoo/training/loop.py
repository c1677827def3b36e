"""Training from a plan to a finished run folder; an interrupted run goes on where it stopped."""

from __future__ import annotations

import traceback
from contextlib import nullcontext

import torch

from zoo.data.manifest import Dataset
from zoo.errors import Hindered, Interrupted, ZooError, one_line
from zoo.files import Home, write_text
from zoo.recipe import Recipe
from zoo.runs import Run, RunHeld, run_lock
from zoo.training.checkpoint import remove_checkpoints
from zoo.training.derived import derive, is_derived, sources
from zoo.training.interruption import Interruption
from zoo.training.kernels import lacks_steady_kernel
from zoo.training.memory import OUT_OF_MEMORY_FIX, freed_memory_kept, give_back, is_out_of_memory
from zoo.training.parallel import Group, joined
from zoo.training.plan import Plan, finished_run, make_plan
from zoo.training.precision import choose_device
from zoo.training.trainer import OnEpoch, OnTick, Tick, Trainer

__all__ = ["OnEpoch", "OnTick", "StopRun", "Tick", "train", "train_plan"]


class StopRun(Exception):
    """Raised by `on_epoch` to end a run for good; its last checkpoint stays."""


def train(
    recipe: Recipe | str,
    data: Dataset | str,
    seed: int = 0,
    root: Home | None = None,
    *,
    offline: bool = False,
    bad_images: str | None = None,
    accept_leaks: bool = False,
    on_tick: OnTick | None = None,
    on_epoch: OnEpoch | None = None,
) -> Run:
    """Train a recipe on a dataset and return the run; a finished run is returned as it is.

    Only train and val are opened; the kept weights are the best on val by the recipe's metric. A dataset whose
    splits leak (`zoo.data.leaks`) is refused unless accept_leaks, which every table of the run then says.
    on_epoch: called after each epoch with its row of the history. Raises ZooError for what the user can mend, before
    work where it can be known, and Interrupted after Ctrl-C or SIGTERM: the same call then goes on where it stopped.
    """
    plan = make_plan(recipe, data, seed, root, offline=offline, bad_images=bad_images, accept_leaks=accept_leaks)
    return train_plan(plan, on_tick, on_epoch)


def train_plan(plan: Plan, on_tick: OnTick | None = None, on_epoch: OnEpoch | None = None) -> Run:
    """Train what a plan says and return the run; a failure is recorded in the run folder and raised.

    Where torchrun has started several processes, each calls this, and they train the run together.
    """
    with joined(choose_device(plan.recipe.device)) as group:
        if group.shared(_finished(plan) is not None):
            return plan.run
        with run_lock(plan.home, plan.run.name) if group.leads else nullcontext():
            # Another process may have ended between the look and the lock.
            if group.shared(_finished(plan) is not None):
                return plan.run
            if group.leads:
                if plan.run.finished and plan.run.weights_file.is_file() and on_tick is not None:
                    on_tick(Tick(plan.run.name, "its weights were changed: trained again", 0, 1))
                # What a failed run has saved is good: it goes on from there once the cause is mended.
                plan.run.clear()
            return _guarded(plan, group, on_tick or (lambda _: None), on_epoch or (lambda _: None))


def _finished(plan: Plan) -> Run | None:
    done = finished_run(plan)
    if done is not None and (done.path / "checkpoint").is_dir():
        remove_checkpoints(done.path / "checkpoint")  # killed after the record was written
    return done


def _derived(plan: Plan, group: Group, on_tick: OnTick, on_epoch: OnEpoch) -> Run:
    """Train what a derived run is made of, where that is not done yet, and make it."""
    runs = [train_plan(each, on_tick, on_epoch) for each in sources(plan)]
    if group.leads:
        on_tick(Tick(plan.run.name, "deriving", 0, 1))
        derive(plan, runs)
    group.wait()
    return plan.run


def _guarded(plan: Plan, group: Group, on_tick: OnTick, on_epoch: OnEpoch) -> Run:
    """Train or derive a run; say in its folder why, where that fails."""
    try:
        if is_derived(plan.recipe):
            return _derived(plan, group, on_tick, on_epoch)
        with Interruption() as interruption:
            return _with_less_memory(plan, group, interruption, on_tick, on_epoch)
    except KeyboardInterrupt as stop:
        code = getattr(stop, "exit_code", 130)
        raise Interrupted(
            f"interrupted; run {plan.run.name!r} goes on where it stopped with the same command", code
        ) from None
    except (StopRun, Interrupted, RunHeld):
        # An interrupted run is no failed one, nor is what would have been made of it, or of one that another trains.
        raise
    except ZooError as error:
        _record_failure(plan, group, str(error))
        raise
    except Exception as error:
        if not group.leads:
            raise  # the first process says it
        # A network may break in any way; that must not take the benchmark down, nor lose the traceback.
        said = f"{type(error).__name__}: {one_line(error, 200)}"
        _record_failure(plan, group, said, traceback.format_exc())
        file = plan.run.path / "traceback.txt"
        kind = Hindered if isinstance(error, OSError) else ZooError
        raise kind(f"run {plan.run.name!r} failed: {said}; the traceback is in {str(file)!r}") from error


def _with_less_memory(plan: Plan, group: Group, interruption: Interruption, on_tick: OnTick, on_epoch: OnEpoch) -> Run:
    """Train; where an update lacks memory, go on from the last checkpoint with batches computed in twice the parts.

    Where a forward pass alone lacks it, that takes fewer images at a time (`zoo.training.memory.in_pieces`).
    """
    parts, unsteady, said = 1, "", "found before"
    while True:
        oldest = torch.zeros((), requires_grad=True) * 1
        trainer = Trainer(plan, group, interruption, on_tick, on_epoch, parts, unsteady)
        on_tick(Tick(plan.run.name, "begins", 0, 1))
        try:
            # What is short is not kept from other uses.
            with freed_memory_kept() if parts == 1 else nullcontext():
                return trainer.run()
        except ValueError as error:
            if trainer.progress.parts > 1 and trainer.updating and "more than 1 value per channel" in str(error):
                raise ZooError(
                    f"out of memory even with two images at a time ({said}), and batch normalisation cannot do with "
                    f"one; {OUT_OF_MEMORY_FIX}"
                ) from error
            raise
        except (RuntimeError, MemoryError) as error:
            said, short = one_line(error, 120), is_out_of_memory(error)
            if not (short or (lacks_steady_kernel(error) and not unsteady)) or group.world > 1:
                raise
            if short and not trainer.updating:  # smaller parts of a batch would change nothing
                raise ZooError(f"out of memory ({said}); {OUT_OF_MEMORY_FIX}") from error
            parts = 2 * trainer.progress.parts if short else parts
            unsteady = unsteady if short else said
        del trainer
        # autograd's queue holds on to a backward pass that broke until it is asked for something older than that.
        oldest.backward()  # type: ignore[no-untyped-call]
        give_back()
        if parts >= 2 * plan.recipe.finetune.batch_size:
            raise ZooError(f"out of memory even with one image at a time ({said}); {OUT_OF_MEMORY_FIX}")
        on_tick(Tick(plan.run.name, f"out of memory: batches in {parts} parts" if short else said, 0, 1))


def _record_failure(plan: Plan, group: Group, reason: str, trace: str = "") -> None:
    if not group.leads:
        return
    try:
        if trace:
            write_text(plan.run.path / "traceback.txt", trace)
        plan.run.write_record(plan.record("failed", reason))
    except ZooError:
        return  # the disk is full: the error itself says so
