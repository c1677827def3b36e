"""What came of a study: the best recipe as a file, tuned against default on val, importances, figures."""

from __future__ import annotations

import itertools
import math
import shlex
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo.benchmark.space import Space, plain_table
from zoo.benchmark.study import Study
from zoo.errors import ZooError, one_line
from zoo.evaluation.predictions import read_predictions
from zoo.evaluation.statistics import metric_intervals, paired_comparisons
from zoo.files import Home, check_name, sha256_file, to_toml, write_json, write_text, write_toml
from zoo.recipe import full_key, list_recipes, load_recipe, parse_assignment
from zoo.reporting import plots, tuning
from zoo.training.plan import Plan

LEAST_FOR_IMPORTANCE = 6  # complete trials; a forest on fewer says nothing
_ROUGH = 30  # complete trials below which importances are rough


@dataclass(frozen=True)
class Tuned:
    """What a study found.

    sign: -1 where a lower metric is better. recipe: the name of the recipe that was written, loadable with
    `load_recipe`; file: where. best, default: rows of trials, as in `trials` (number, state, value, params, epochs,
    seconds, reason). comparison: tuned minus default on val, with its interval; None where the recipe as it is failed.
    importance: of each key, adding up to 1 at the most; None where too few trials are complete. folder: of the
    journal, the trials and the figures. next_command: what compares tuned and default fairly, on test, in the same
    home.
    """

    study: str
    dataset: str
    base: str
    recipe: str
    file: Path
    folder: Path
    metric: str
    sign: int
    space: dict[str, dict[str, Any]]
    best: dict[str, Any]
    default: dict[str, Any]
    trials: list[dict[str, Any]]
    comparison: dict[str, Any] | None
    importance: dict[str, float] | None
    notes: list[str]
    next_command: str

    def document(self) -> dict[str, Any]:
        """Return everything as `study.json` has it."""
        states = [row["state"] for row in self.trials]
        return {
            "study": self.study,
            "dataset": self.dataset,
            "recipe": self.base,
            "tuned_recipe": self.recipe,
            "metric": self.metric,
            "sign": self.sign,
            "space": self.space,
            "best": self.best,
            "default": self.default,
            "counts": {state: states.count(state) for state in ("complete", "pruned", "failed", "running")},
            "comparison": self.comparison,
            "importance": self.importance,
            "trials": self.trials,
            "notes": self.notes,
            "next": self.next_command,
        }


def bench_command(
    dataset: str, recipe: str, overrides: dict[str, Any], searched: Iterable[str], options: list[str], tuned: str
) -> str:
    """Return the command that scores a recipe and its tuned one on test.

    overrides: of the recipe, which go to both, but for what was searched, which would undo the tuning. options: words
    that go on to the command as they are.
    """
    words = ["zoo", "bench", "--data", dataset, "--recipes", f"{recipe},{tuned}", "--seeds", "3"]
    for key, value in overrides.items():
        for each, part in _not_searched(full_key(key), value, frozenset(searched)):
            # By the key as it was given, where the whole of it goes on.
            words += ["--set", f"{key if each == full_key(key) else each}={_assigned(part)}"]
    return shlex.join([*words, *options])


def _not_searched(key: str, value: Any, searched: frozenset[str]) -> Iterator[tuple[str, Any]]:
    """Yield what is left of an override, as key and value; a table in which something is searched falls into keys."""
    if key in searched or key == "search" or value is None:
        return
    if isinstance(value, dict) and any(each.startswith(f"{key}.") for each in searched):
        for inner, part in value.items():
            yield from _not_searched(f"{key}.{inner}", part, searched)
    else:
        yield key, value


def _assigned(value: Any) -> str:
    """Return a value as `--set` reads it; text that would be read as something else in quotes."""
    if isinstance(value, str) and parse_assignment(f"key={value}")[1] == value:
        return value
    return to_toml(value)


def finish(study: Study, plan: Plan, most: int, root: Home, name: str | None, command: Callable[[str], str]) -> Tuned:
    """Write the best recipe, the figures and `study.json`, and return what was found.

    most: trials that were asked for. command: what to run next, of the written recipe's name. Raises ZooError where no
    trial is complete.
    """
    with study.locked():
        rows, best = study.rows(), study.best()
        if best is None:
            reasons = list(dict.fromkeys(row["reason"] for row in rows if row["state"] == "failed"))
            shown = f"; the first failed: {reasons[0]}" if reasons else ""
            raise ZooError(
                f"none of the study's {len(rows)} trials is complete{shown}; once that is mended, ask for more "
                f"with --trials {max(most, len(rows)) + most}"
            )
        default = rows[0]
        written, file = _write_recipe(study, plan, best, default, root, name)
        found = Tuned(
            study=study.folder.name,
            dataset=plan.dataset.name,
            base=plan.recipe.name,
            recipe=written,
            file=file,
            folder=study.folder,
            metric=study.metric,
            sign=study.sign,
            space=study.space.spaces,
            best=best,
            default=default,
            trials=rows,
            comparison=_comparison(study, plan, best, default),
            importance=importance_of(study),
            notes=_notes(study, rows, best),
            next_command=command(written),
        )
        for key, figure in tuning.figures(found.document()).items():
            plots.save_figure(figure, study.folder / f"{key}.png")
        write_json(study.folder / "study.json", found.document())
        return found


# The recipe that is written -------------------------------------------------------------------------------------------


def check_target(study: Study, root: Home, name: str | None) -> str:
    """Return the tuned recipe's name; raises ZooError where the wanted one is a recipe that is not this study's."""
    base = study.space.recipe.name
    if name is not None:
        check_name(name, "recipe")
        if not _is_free(study, root, name):
            raise ZooError(
                f"there is a recipe {name!r} already, and this study did not write it; give another --name, or remove "
                "its file"
            )
        return name
    names = (f"{base}-tuned" if count == 1 else f"{base}-tuned-{count}" for count in itertools.count(1))
    return check_name(next(each for each in names if _is_free(study, root, each)), "recipe")


def _is_free(study: Study, root: Home, name: str) -> bool:
    file = root.recipes / f"{name}.toml"
    if file.is_file():
        return sha256_file(file) == (study.facts("written") or {}).get(name)
    return name not in list_recipes(root)


def _write_recipe(
    study: Study, plan: Plan, best: dict[str, Any], default: dict[str, Any], root: Home, wanted: str | None
) -> tuple[str, Path]:
    recipe = study.space.recipe if best["number"] == 0 else study.space.recipe_of(study.frozen()[best["number"]].params)
    counted = f"{study.ended()} trial{'s' if study.ended() != 1 else ''}"
    score = f"val {study.metric} {best['value']:.3f}"
    if best["number"] == 0:
        said = f"no better among {counted} on {plan.dataset.name}, {score}"
    else:
        before = f", {default['value']:.3f} untuned" if default["value"] is not None else ""
        said = f"trial {best['number']} of {counted} on {plan.dataset.name}, {score}{before}"
    summary = f"{plan.recipe.name} tuned: {said}"
    own = study.folder / "tuned.toml"
    write_toml(own, {"summary": summary, **{k: v for k, v in plain_table(recipe).items() if k != "summary"}})
    name = check_target(study, root, wanted)
    # What is to be written is noted first: a process that dies between the two leaves a file that is known as its own.
    study.set_facts("written", {**(study.facts("written") or {}), name: sha256_file(own)})
    file = root.recipes / f"{name}.toml"
    write_text(file, own.read_text(encoding="utf-8"))
    if load_recipe(name, root=root).digest != recipe.digest:
        raise ZooError(
            f"{str(file)!r} does not hold the recipe of trial {best['number']}; report this as a fault of the zoo"
        )
    return name, file


# What is said of it ---------------------------------------------------------------------------------------------------


def _comparison(study: Study, plan: Plan, best: dict[str, Any], default: dict[str, Any]) -> dict[str, Any] | None:
    """Return both scores on val and their paired difference, groups drawn together; None where the default failed."""
    if default["state"] != "complete":
        return None
    runs = {
        each: read_predictions(study.run(row["number"]).predictions_file("val"))
        for each, row in (("tuned", best), ("default", default))
    }
    negative = plan.dataset.negative_class
    place = plan.dataset.classes.index(negative) if negative in plan.dataset.classes else None
    scored = {each: [run] for each, run in runs.items()}
    intervals = metric_intervals(scored, [study.metric], negative=place)[study.metric]
    pair = paired_comparisons(scored, study.metric, negative=place)[0]
    one = runs["default"]
    return {
        "split": "val",
        "metric": study.metric,
        "images": len(one.y_true),
        "groups": int(one.group_codes.max()) + 1,
        **{each: best_or["value"] for each, best_or in (("tuned", best), ("default", default))},
        **{f"{each}_ci": [i.low, i.high] if i else None for each, i in intervals.items()},
        "difference": pair.difference,
        "ci": [pair.low, pair.high],
        "p": pair.p,
    }


def _notes(study: Study, rows: list[dict[str, Any]], best: dict[str, Any]) -> list[str]:
    notes = []
    complete = sum(row["state"] == "complete" for row in rows)
    if best["number"] == 0:
        notes.append("no trial was better than the recipe as it is, which is written as the tuned one")
    else:
        notes.append(
            f"val chose the best of {complete} complete trials, so its score and its lead over the default flatter it; "
            "only test compares them fairly"
        )
    outside = sorted(set(study.space.spaces) - set(study.space.own_params()))
    if outside:
        notes.append(f"the recipe's own value of {', '.join(outside)} is not in the space; trial 0 has it all the same")
    if complete < LEAST_FOR_IMPORTANCE:
        notes.append(f"importances need {LEAST_FOR_IMPORTANCE} complete trials; there are {complete}")
    elif complete < _ROUGH:
        notes.append(f"importances of {complete} complete trials are rough")
    edges = [key for key, value in best["params"].items() if best["number"] and _at_edge(study.space, key, value)]
    if edges:
        notes.append(f"the best lies at the edge of the space of {', '.join(edges)}: a wider one may hold better")
    running = [str(row["number"]) for row in rows if row["state"] == "running"]
    if running:
        notes.append(
            f"not ended: trial{'s' if len(running) > 1 else ''} {', '.join(running)}; the same command goes on"
        )
    return notes


def _at_edge(space: Space, key: str, value: Any) -> bool:
    """Return whether a value lies within a twentieth of its range from an end."""
    inner = space.spaces[key]
    if "choices" in inner:
        return False
    scale = math.log if inner.get("log") else float
    low, high, at = scale(inner["low"]), scale(inner["high"]), scale(value)
    return min(at - low, high - at) < 0.05 * (high - low)


def importance_of(study: Study) -> dict[str, float] | None:
    """Return which part of the variance of val each key explains alone, the largest first; None with too few trials.

    fANOVA (Hutter et al. 2014, proceedings.mlr.press/v32/hutter14.html) over complete trials, in the space as it was
    searched: logarithms where the range is one of logarithms.
    """
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.trial import create_trial

    distributions = {key: each for key, each in study.space.distributions().items() if not each.single()}
    logs = {key for key, each in distributions.items() if getattr(each, "log", False)}
    scaled = {
        key: FloatDistribution(math.log(each.low), math.log(each.high)) if key in logs else each
        for key, each in distributions.items()
    }
    whole = [
        trial
        for trial in study.frozen()
        if trial.state.name == "COMPLETE" and distributions.keys() <= trial.params.keys()
    ]
    values = {trial.value for trial in whole}
    if len(whole) < LEAST_FOR_IMPORTANCE or len(values) < 2 or not distributions:
        return None
    copy = optuna.create_study()
    for trial in whole:
        params = {key: math.log(trial.params[key]) if key in logs else trial.params[key] for key in distributions}
        copy.add_trial(create_trial(value=trial.value, params=params, distributions=scaled))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=study.seed)
            found = optuna.importance.get_param_importances(copy, evaluator=evaluator, normalize=False)
    except (RuntimeError, ValueError) as error:
        raise ZooError(f"the importances cannot be computed: {one_line(error)}") from error
    return {key: float(value) for key, value in sorted(found.items(), key=lambda each: (-each[1], each[0]))}
