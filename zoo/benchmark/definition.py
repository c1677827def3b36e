"""What a benchmark is on disk: `benchmarks/<name>.toml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zoo.errors import ZooError, nearest, one_line
from zoo.files import Home, check_name, find_toml, home, list_toml, read_toml


class Benchmark(BaseModel):
    """`benchmarks/<name>.toml`: dataset, recipes, seeds, and keys set in every recipe alike."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(exclude=True)
    summary: str = ""
    dataset: Annotated[str, Field(min_length=1)]
    recipes: Annotated[list[str], Field(min_length=1)]
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
        return Benchmark.model_validate({**table, "name": check_name(path.stem, "benchmark")})
    except ValidationError as error:
        keys = list(Benchmark.model_fields)
        faults = []
        for each in error.errors():
            key = ".".join(str(part) for part in each["loc"])
            if each["type"] == "extra_forbidden":
                faults.append(f"unknown key {one_line(key)!r}{nearest(key, keys)}")
            else:
                said = each["msg"].replace("Input should", "must")
                faults.append(f"{key}: {said}. Got {one_line(repr(each['input']), 60)}")
        raise ZooError(f"benchmark {path.stem!r} has {len(faults)} faults: " + "; ".join(faults)) from error
