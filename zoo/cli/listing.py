"""`zoo list`, `zoo show` and `zoo doctor`: what there is, and whether this machine is fit."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from zoo.cli.screen import HomeOption, JsonOption

_HIDDEN = ("path", "hub_id", "origin", "split_digest", "mean", "std", "sha256", "size_bytes", "datasets", "run")
# Columns of runs and bundles that go first where the screen is narrow.
_LEAST = ("train s", "precision", "format", "model", "size MB", "val top1", "reason", "test top1", "status")
_RUN_HEADS = ("name", "status", "val_top1", "test_top1", "train_s", "reason")
KINDS = ("models", "recipes", "datasets", "benchmarks", "runs", "bundles")


def add_to(parent: typer.Typer) -> None:
    """Add the verbs to the command line."""
    parent.command("list")(list_)
    parent.command()(show)
    parent.command()(doctor)


def list_(
    kind: Annotated[str, typer.Argument(metavar="|".join(KINDS), help="What to list.")],
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern such as 'resnet*'.")] = "",
    at_hand: Annotated[bool, typer.Option("--at-hand", help="Models whose weights are on this machine.")] = False,
    carried: Annotated[bool, typer.Option("--carried", help="Models whose weights this package carries.")] = False,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """List models, recipes, datasets, benchmarks, runs or bundles."""
    from zoo.cli.screen import console, print_json, print_table
    from zoo.errors import ZooError, nearest, one_line

    makers = {
        "models": lambda: _carried(pattern) if carried and not json else _models(pattern, at_hand, carried),
        "recipes": _recipes,
        "datasets": _datasets,
        "benchmarks": _benchmarks,
        "runs": _runs,
        "bundles": _bundles,
    }
    if kind not in makers:
        raise ZooError(f"zoo list takes one of {', '.join(KINDS)}. Got {one_line(kind)!r}{nearest(kind, KINDS)}")
    if (carried or at_hand) and kind != "models":
        raise ZooError(f"--carried and --at-hand go with `zoo list models` alone. Got {kind}; leave them out")
    rows = [row for row in makers[kind]() if kind == "models" or _matches(row["name"], pattern)]
    if json:
        print_json(rows)
        return
    if not rows:
        typer.echo(f"no {kind} here{f' match {pattern!r}' if pattern else ''}")
        return
    shown = [key for key in rows[0] if key not in _HIDDEN]
    if console().width < 110 and kind == "recipes":
        shown.remove("model")
    if kind == "models" and (not carried or console().width < 100):
        shown.remove("summary")
    cells = [[_cell(row.get(key)) for key in shown] for row in rows]
    numbers = (
        "size MB",
        "params",
        "image size",
        "images",
        "classes",
        "seeds",
        "val top1",
        "test top1",
        "train s",
        "MB",
    )
    heads = [key.replace("_", " ") for key in shown]
    least = _LEAST if any(row.get("reason") for row in rows) else ("reason", *_LEAST)
    print_table(heads, cells, numbers=numbers, folded=("name",), cut=("summary", "reason"), least=least)


def _matches(name: str, pattern: str) -> bool:
    from fnmatch import fnmatch

    return fnmatch(name, pattern) if any(c in pattern for c in "*?[") else pattern in name


def _cell(value: Any) -> str:
    from zoo.errors import one_line

    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int) and value > 99_999:
        return f"{value / 1e6:.2f}M"
    return one_line(", ".join(map(str, value)) if isinstance(value, list) else value, 120)


def _carried(pattern: str) -> list[dict[str, Any]]:
    """Return what the table of carried weights shows; without their SHA-256, for which no screen is wide enough."""
    return [
        {
            "name": row["name"],
            "params": row["params"],
            "MB": f"{row['size_bytes'] / 1e6:.2f}",
            "image_size": row["image_size"],
            "mean/std": f"{row['mean'][0]:g}/{row['std'][0]:g}",
            "licence": row["licence"],
            "summary": row["summary"],
        }
        for row in _models(pattern, False, True)
    ]


def _models(pattern: str, at_hand: bool, carried: bool) -> list[dict[str, Any]]:
    from zoo.models.registry import list_models

    return [
        {
            "name": spec.name,
            "params": spec.params,
            "image_size": spec.preprocessing.image_size,
            "licence": spec.licence,
            "weights_at_hand": spec.weights_at_hand,
            "hub_id": spec.hub_id,
            "origin": spec.origin,
            "summary": spec.summary,
            "mean": list(spec.preprocessing.mean),
            "std": list(spec.preprocessing.std),
            "sha256": spec.sha256,
            "size_bytes": spec.size_bytes,
        }
        for spec in list_models(pattern or "*")
        if (spec.weights_at_hand or not at_hand) and (spec.origin == "carried" or not carried)
    ]


def _recipes() -> list[dict[str, Any]]:
    from zoo.errors import ZooError
    from zoo.recipe import list_recipes, load_recipe

    rows = []
    for name, path in list_recipes().items():
        row: dict[str, Any] = {"name": name, "model": None, "strategy": None, "summary": "", "path": str(path)}
        try:
            recipe = load_recipe(str(path))
            row |= {"model": recipe.model.name, "strategy": recipe.finetune.strategy, "summary": recipe.summary}
        except ZooError as error:
            row["summary"] = f"damaged: {error}"
        rows.append(row)
    return rows


def _datasets() -> list[dict[str, Any]]:
    from zoo.data.manifest import list_datasets

    return list_datasets()


def _benchmarks() -> list[dict[str, Any]]:
    from zoo.benchmark.definition import list_benchmarks, load_benchmark
    from zoo.errors import ZooError

    rows = []
    for name, path in list_benchmarks().items():
        row: dict[str, Any] = {"name": name, "dataset": None, "recipes": None, "seeds": None, "summary": ""}
        try:
            found = load_benchmark(str(path))
            names = [found.dataset] if found.dataset else found.datasets + found.optional_datasets
            row |= {
                "dataset": names[0] if len(names) == 1 else f"{len(names)} datasets",
                "datasets": names,
                "recipes": len(found.recipes + found.optional_recipes),
                "seeds": len(found.seeds),
            }
            row["summary"] = found.summary
        except ZooError as error:
            row["summary"] = f"damaged: {error}"
        rows.append({**row, "path": str(path)})
    return rows


def _runs() -> list[dict[str, Any]]:
    from zoo.errors import ZooError
    from zoo.runs import begun_runs, list_runs

    rows = []
    for run in list_runs():
        row: dict[str, Any] = {**dict.fromkeys(_RUN_HEADS), "name": run.name, "status": "damaged"}
        try:
            record = run.record
            row |= {"status": record.status, "train_s": record.train_s, "reason": record.reason}
            for split in ("val", "test"):
                if run.metrics_file(split).is_file():
                    row[f"{split}_top1"] = run.metrics(split).get("top1")
        except ZooError as error:
            row["reason"] = str(error)
        rows.append(row)
    rows += [{**dict.fromkeys(_RUN_HEADS), "name": name, "status": "not ended"} for name in begun_runs()]
    return sorted(rows, key=lambda row: str(row["name"]))


def _bundles() -> list[dict[str, Any]]:
    """Return what each bundle says of itself; `zoo show` and every use verify its bytes, a listing does not."""
    from zoo.deployment.bundle import MODEL_FILES, list_bundles, read_record
    from zoo.errors import ZooError
    from zoo.files import home

    rows = []
    for name in list_bundles():
        row: dict[str, Any] = {"name": name, "status": "damaged", "model": None, "format": None, "precision": None}
        row |= {"size_MB": None, "val_top1": None, "reason": None, "run": None}
        try:
            record = read_record(home().bundles / name)
            files = [home().bundles / name / each for each in MODEL_FILES[record.format]]
            row |= {"model": record.model, "format": record.format, "precision": record.precision}
            row |= {"size_MB": round(sum(file.stat().st_size for file in files) / 1e6, 3), "status": "gate not run"}
            row |= {"val_top1": record.val.get("top1"), "run": record.run}
            if "passed" in record.parity:
                row["status"] = "gate passed" if record.parity["passed"] else "gate failed"
        except (ZooError, OSError) as error:
            row["reason"] = str(error)
        rows.append(row)
    return rows


def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME_OR_PATH", help="Recipe, model, dataset, benchmark, run or bundle.")
    ],
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show everything about one recipe, benchmark, dataset, run, bundle or model; of a bundle its model card."""
    from zoo.cli.screen import console, print_json
    from zoo.files import to_json

    found = _find(name)
    if json:
        print_json(found)
        return
    out = console()
    if found["kind"] == "bundle":
        from rich.markdown import Markdown

        if out.is_terminal:
            out.print(Markdown(found["card"], hyperlinks=False))
        else:
            typer.echo(found["card"])
        return
    for key, value in found.items():
        text = to_json(value, indent=2) if isinstance(value, (dict, list)) else _cell(value)
        out.print(f"{key}: {text}", markup=False, soft_wrap=True)


def _find(name: str) -> dict[str, Any]:
    """Return what a name stands for; a recipe comes before a model of the same name."""
    from zoo.benchmark.definition import list_benchmarks, load_benchmark
    from zoo.data.canonical import canonical_names, canonical_record
    from zoo.data.manifest import list_datasets, load_dataset, split_summary
    from zoo.deployment.bundle import find_bundle, list_bundles, open_bundle
    from zoo.errors import ZooError, nearest, one_line
    from zoo.files import home
    from zoo.recipe import list_recipes, load_recipe
    from zoo.runs import find_run, list_runs

    recipes, benches = list_recipes(), list_benchmarks()
    datasets = {row["name"]: row["status"] for row in list_datasets()}
    if name in recipes or (name.endswith(".toml") and name not in benches):
        recipe = load_recipe(name)
        return {"kind": "recipe", "name": recipe.name, **recipe.table(), "digest": recipe.digest}
    if name in benches:
        found = load_benchmark(name)
        return {"kind": "benchmark", "name": found.name, **found.model_dump(mode="json")}
    if name in datasets:
        if name in canonical_names() and datasets[name] != "ready":
            return {"kind": "dataset", "status": datasets[name], **canonical_record(name)}
        if not (home().data / name / "dataset.toml").is_file():
            return {"kind": "dataset", "name": name, "status": "built-in, made on first use"}
        dataset = load_dataset(name)
        facts = {"classes": dataset.classes, "negative_class": dataset.negative_class, "facts": dataset.facts}
        return {"kind": "dataset", "name": name, **split_summary(dataset), **facts}
    runs = [run.name for run in list_runs()]
    try:
        run = find_run(name)
    except ZooError:
        run = None
    if run is not None:
        metrics = {split: run.metrics(split) for split in ("val", "test") if run.metrics_file(split).is_file()}
        return {"kind": "run", "name": run.name, **run.record.model_dump(mode="json"), "metrics": metrics}
    try:
        folder = find_bundle(name)
    except ZooError:
        folder = None
    if folder is not None:
        bundle = open_bundle(folder)
        size = {"kind": "bundle", "path": str(bundle.path), "size_bytes": bundle.size_bytes}
        return {**size, **bundle.record.model_dump(mode="json"), "card": bundle.card}
    from zoo.models.registry import find_model  # needs torch, which a machine that has bundles alone lacks

    try:
        spec = find_model(name)
    except ZooError:
        hint = nearest(name, [*recipes, *benches, *datasets, *runs, *list_bundles()])
        raise ZooError(f"nothing here is called {one_line(name)!r}{hint}; see `zoo list {'|'.join(KINDS)}`") from None
    from dataclasses import asdict

    facts = asdict(spec) | {"preprocessing": spec.preprocessing.model_dump()}
    if spec.origin == "carried":
        from zoo.models.carried import carried_weights

        facts["card"] = carried_weights()[spec.name].facts
    return {"kind": "model", **facts}


def doctor(json: JsonOption = False, home: HomeOption = None) -> None:
    """Check this machine: versions, devices, folders, weights and the hub."""
    from zoo.cli.checkup import checks
    from zoo.cli.screen import print_json, print_table

    found = checks()
    ok = all(check["ok"] for check in found)
    if json:
        print_json({"ok": ok, "checks": found})
    else:
        rows = [["ok" if check["ok"] else "FAULT", check["name"], check["detail"]] for check in found]
        print_table(["", "check", "what was found"], rows, folded=("what was found",))
        for check in found:
            if check["fix"]:
                typer.echo(f"fix {check['name']}: {check['fix']}")
    if not ok:
        raise typer.Exit(1)
