"""Hyperparameter search: trials of a recipe, each a run of its own, proposed by TPE and given up early by val alone."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

from zoo.benchmark.crew import work_side_by_side
from zoo.benchmark.executors import OnStep
from zoo.benchmark.space import Space, plain_table, probes, settings, space_of
from zoo.benchmark.study import Study, check_pruner, need_optuna, until
from zoo.benchmark.trials import Job, work
from zoo.benchmark.tuned import Tuned, bench_command, check_target, finish
from zoo.data.manifest import Dataset, load_dataset
from zoo.errors import Interrupted, ZooError, one_line
from zoo.files import Home, check_writable, digest_of, home, to_json
from zoo.recipe import Recipe, load_recipe, parse_recipe
from zoo.training.loop import OnTick
from zoo.training.parallel import refuse_torchrun
from zoo.training.plan import Plan, make_plan

TUNE_VERSION = 1
# The keys that a plan may refuse: by the network, the weights, the augmentation, the size of the training set.
_PLANNED = (
    "model.",
    "augment.",
    "precision",
    "finetune.strategy",
    "finetune.layer_decay",
    "finetune.freeze",
    "finetune.batch_size",
    "finetune.accumulate",
    "finetune.image_sizes",
)
_PLANS = 30  # of the other keys' values, to see whether a value can be trained with any of them


def tune(
    recipe: Recipe | str,
    data: Dataset | str,
    trials: int = 20,
    seed: int = 0,
    root: Home | None = None,
    *,
    overrides: dict[str, Any] | None = None,
    timeout: float | None = None,
    jobs: int = 1,
    pruner: str = "halving",
    name: str | None = None,
    offline: bool = False,
    bad_images: str | None = None,
    accept_leaks: bool = False,
    on_tick: OnTick | None = None,
    on_step: OnStep | None = None,
) -> Tuned:
    """Search a recipe's `[search]` space on train and val, and write the best recipe to `recipes/`.

    trials: that the study has in all when it ends, those of earlier calls included; the first is the recipe as it is.
    overrides: of a recipe that is named, as `--set` gives them. timeout: seconds after which no other trial begins.
    jobs: processes at once; other calls with the same arguments join in. pruner: `halving`, `hyperband` or `none`.
    name: of the recipe to write; left out, `<recipe>-tuned`.

    The study lies in `models/tune/<dataset>--<recipe>--<digest8>/`; the same call goes on after an interruption or a
    kill. The test split is never opened. Raises ZooError, before any work, for a wrong space or argument, and where
    every trial failed; Hindered where an image, weights or room on the disk are gone, which fails no trial; and
    Interrupted after Ctrl-C. After both the same call goes on.
    """
    refuse_torchrun("zoo tune", ", with --jobs")
    root = root or home()
    need_optuna()
    _check_arguments(trials, timeout, jobs, pruner)
    asked = recipe if isinstance(recipe, str) else recipe.name
    recipe = load_recipe(recipe, overrides, root) if isinstance(recipe, str) else recipe
    space = space_of(recipe)
    dataset = load_dataset(data, root) if isinstance(data, str) else data
    known: dict[str, Any] = {"offline": offline, "bad_images": bad_images, "accept_leaks": accept_leaks}
    plan = make_plan(recipe, dataset, seed, root, **known)
    _check_plans(space, plan, known)
    facts = [TUNE_VERSION, plan.digest, recipe.finetune.metric, space.spaces, seed, pruner]
    folder = root.root / "models" / "tune" / f"{dataset.name}--{recipe.name}--{digest_of(facts)[:8]}"
    check_writable(folder)
    study = Study(folder, space, seed, pruner)
    check_target(study, root, name)
    job = Job(recipe, dataset, seed, root, folder, trials, pruner, **known)
    _work(job, study, jobs, until(timeout), on_tick or (lambda _: None), on_step or (lambda _: None))
    options = ["--bad-images", bad_images] if bad_images else []
    options += [flag for flag, given in (("--accept-leaks", accept_leaks), ("--offline", offline)) if given]
    command = partial(bench_command, dataset.name, asked, overrides or {}, space.spaces, options)
    return finish(study, plan, trials, root, name, command)


def _work(job: Job, study: Study, jobs: int, deadline: float | None, on_tick: OnTick, tell: OnStep) -> None:
    """Train trials in this process, or in several; raise Interrupted with how far the study has come."""
    try:
        if jobs == 1:
            work(job, study, deadline, on_tick, tell)
        else:
            work_side_by_side(job, study, jobs, deadline, on_tick, tell)
    except (Interrupted, KeyboardInterrupt) as stop:
        ended = f"{study.ended()} of {job.trials} trials have ended"
        raise Interrupted(
            f"interrupted: {ended}; the study goes on with the same command", getattr(stop, "exit_code", 130)
        ) from None


def parse_duration(text: str) -> float:
    """Return the seconds of `90s`, `30m`, `1.5h`, `2d`, or of a plain number; raises ZooError for anything else.

    >>> parse_duration("30m"), parse_duration("90")
    (1800.0, 90.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([smhd]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]] if match else math.nan
    if not 0 < seconds < math.inf:
        raise ZooError(
            f"a time must be a number above 0 and a unit of s, m, h or d, such as 30m. Got {one_line(text)!r}"
        )
    return seconds


def _check_arguments(trials: int, timeout: float | None, jobs: int, pruner: str) -> None:
    if trials < 1:
        raise ZooError(f"trials must be at least 1. Got {trials}")
    if timeout is not None and not 0 < timeout < math.inf:
        raise ZooError(f"the timeout must be seconds above 0. Got {timeout}")
    if not 1 <= jobs <= 256:
        raise ZooError(f"jobs must be from 1 to 256. Got {jobs}")
    check_pruner(pruner)


def _check_plans(space: Space, plan: Plan, known: dict[str, Any]) -> None:
    """Plan each choice and end of range that a plan may refuse, with other values of the space; nothing is trained."""
    faults = []
    for key, value in probes(space):
        refused = _refusal(space, plan, known, key, value) if key.startswith(_PLANNED) else None
        if refused is not None:
            faults.append(f"{key!r} = {one_line(value, 60)}: {refused}")
    if faults:
        raise ZooError(f"the search space of recipe {space.recipe.name!r} cannot be trained: " + "; ".join(faults))


def _refusal(space: Space, plan: Plan, known: dict[str, Any], key: str, value: Any) -> ZooError | None:
    """Return why a value cannot be trained, whatever else is chosen; None where it can be."""
    table, first = plain_table(space.recipe), None
    planned: set[str] = set()
    for others in settings(space):
        facts = to_json({each: chosen for each, chosen in others.items() if each.startswith(_PLANNED) and each != key})
        if facts in planned:
            continue
        try:
            recipe = parse_recipe(table, space.recipe.name, {**others, key: value})
        except ZooError:
            continue  # it goes with other values of other keys alone
        planned.add(facts)
        try:
            make_plan(recipe, plan.dataset, plan.seed, plan.home, **known)
        except ZooError as error:
            first = first or error
        else:
            return None
        if len(planned) == _PLANS:
            break
    return first
