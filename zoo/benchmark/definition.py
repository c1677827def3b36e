"""What a benchmark is on disk: `benchmarks/<name>.toml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zoo.errors import ZooError, nearest, one_line
from zoo.files import Home, check_name, find_toml, home, list_toml, read_toml


class Benchmark(BaseModel):
    """`benchmarks/<name>.toml`: dataset, recipes, seeds, and keys set in every recipe alike.

    datasets: several, in place of dataset; each gets a table of its own. optional_datasets, optional_recipes: left out,
    and said to be, where the images or the weights are not on this machine. contrasts: pairs of recipes whose
    difference was asked for in advance, shown together with Holm's correction over them alone.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(exclude=True)
    summary: str = ""
    dataset: str = ""
    datasets: list[Annotated[str, Field(min_length=1)]] = []
    optional_datasets: list[Annotated[str, Field(min_length=1)]] = []
    recipes: Annotated[list[str], Field(min_length=1)]
    optional_recipes: list[str] = []
    contrasts: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = [0, 1, 2]
    overrides: dict[str, Any] = {}


def list_benchmarks(root: Home | None = None) -> dict[str, Path]:
    """Return name to file of every benchmark, the user's own before built-in ones of the same name."""
    return list_toml("benchmarks", (root or home()).benchmarks)


def load_benchmark(name: str, root: Home | None = None) -> Benchmark:
    """Return the benchmark of a name or of a .toml file; raises ZooError that names every fault at once."""
    path = find_toml(name, "benchmarks", (root or home()).benchmarks)
    table = read_toml(path)
    table.pop("schema_version", None)
    if isinstance(table.get("seeds"), int) and not isinstance(table["seeds"], bool):
        table["seeds"] = list(range(table["seeds"]))
    try:
        found = Benchmark.model_validate({**table, "name": check_name(path.stem, "benchmark")})
        faults = _unfit(found)
    except ValidationError as error:
        faults = _faults(error)
        if not {"dataset", "datasets"} & set(table):
            faults.insert(0, "dataset: Field required")
    if faults:
        raise ZooError(f"benchmark {path.stem!r} has {len(faults)} faults: " + "; ".join(faults))
    return found


def results_folder(wanted: Benchmark, root: Home) -> Path:
    """Return where a benchmark's files on its dataset go: below its name, and theirs where it has several."""
    folder = root.benchmarks / wanted.name
    return folder / wanted.dataset if wanted.datasets else folder


def _faults(error: ValidationError) -> list[str]:
    keys = list(Benchmark.model_fields)
    faults = []
    for each in error.errors():
        key = ".".join(str(part) for part in each["loc"])
        if each["type"] == "extra_forbidden":
            faults.append(f"unknown key {one_line(key)!r}{nearest(key, keys)}")
        else:
            said = each["msg"].replace("Input should", "must")
            faults.append(f"{key}: {said}. Got {one_line(repr(each['input']), 60)}")
    return faults


def _unfit(found: Benchmark) -> list[str]:
    """Return what no single key shows to be wrong."""
    faults = []
    if bool(found.dataset) == bool(found.datasets):
        faults.append("it must have either dataset = NAME or datasets = [NAMES]")
    if found.optional_datasets and not found.datasets:
        faults.append("optional_datasets go with datasets = [NAMES]")
    names = [*found.datasets, *found.optional_datasets]
    faults += [f"dataset {one_line(name)!r} stands twice" for name in sorted({n for n in names if names.count(n) > 1})]
    known = [*found.recipes, *found.optional_recipes]
    for name in dict.fromkeys(name for pair in found.contrasts for name in pair):
        if name not in known:
            faults.append(f"contrasts: {one_line(name)!r} is none of its recipes{nearest(name, known)}")
    return faults
