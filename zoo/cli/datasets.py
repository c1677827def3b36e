"""`zoo data`: import and split."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from zoo.cli.screen import HomeOption, JsonOption

app = typer.Typer(help="Import a dataset, and split it without leaks.", no_args_is_help=True)

GroupColumn = Annotated[str | None, typer.Option(help="CSV column that holds the group, such as the patient.")]
GroupRegex = Annotated[
    str | None, typer.Option(help="Regular expression on the path; its first parenthesis is the group.")
]
GroupBlocks = Annotated[
    int | None, typer.Option(help="Keep blocks of N neighbouring file numbers of a class together.")
]


def add_to(parent: typer.Typer) -> None:
    """Add `data` to the command line."""
    parent.add_typer(app, name="data")


def parse_ratios(text: str) -> tuple[float, ...]:
    """Return the shares of train, val and test of `0.7,0.15,0.15`; raises ZooError for anything else."""
    from zoo.errors import ZooError, one_line

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ZooError(f"--ratios takes three shares such as 0.7,0.15,0.15. Got {one_line(text)!r}") from None


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="Folder, .csv, .npz, or built-in: lung-phantom, digits.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the dataset; a built-in one's own by default.")
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the images below data/; else they stay.")] = False,
    ratios: Annotated[str, typer.Option(help="Shares of train, val and test.")] = "0.7,0.15,0.15",
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    bad_images: Annotated[str, typer.Option(metavar="fail|skip", help="What to do with unreadable images.")] = "fail",
    group_column: GroupColumn = None,
    group_regex: GroupRegex = None,
    group_blocks: GroupBlocks = None,
    negative_class: Annotated[str | None, typer.Option(help="Class without disease, e.g. normal.")] = None,
    label_column: Annotated[str, typer.Option(help="CSV column that holds the label.")] = "label",
    path_column: Annotated[str, typer.Option(help="CSV column that holds the path.")] = "path",
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Of built-in data, e.g. patients=200.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset of this name.")] = False,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Read images and labels, split them, and write dataset.toml and manifest.csv."""
    from zoo.cli.screen import assignments, bars
    from zoo.data.sources import builtin_names, describe_import, import_dataset
    from zoo.errors import ZooError

    if name is None:
        if source not in builtin_names():
            raise ZooError("a dataset needs a name; give one with --name")
        name = source
    with bars(quiet=json) as shown:
        dataset = import_dataset(
            source,
            name,
            copy=copy,
            ratios=parse_ratios(ratios),
            seed=seed,
            bad_images=bad_images,
            group_column=group_column,
            group_regex=group_regex,
            group_blocks=group_blocks,
            negative_class=negative_class,
            label_column=label_column,
            path_column=path_column,
            progress=shown.images("reading"),
            overwrite=overwrite,
            **assignments(option),
        )
    _print_split(dataset, json, describe_import(dataset))


@app.command()
def split(
    name: Annotated[str, typer.Argument(help="Name of the dataset.")],
    ratios: Annotated[str | None, typer.Option(help="Shares of train, val and test, e.g. 0.7,0.15,0.15.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the split.")] = None,
    group_regex: GroupRegex = None,
    group_blocks: GroupBlocks = None,
    force: Annotated[bool, typer.Option("--force", help="Replace even the split that the data came with.")] = False,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Split again; without options, by the recorded settings, which gives the same bytes."""
    from zoo.data.manifest import load_dataset
    from zoo.data.resplit import resplit_dataset
    from zoo.data.sources import describe_import

    load_dataset(name)
    dataset = resplit_dataset(
        name,
        ratios=parse_ratios(ratios) if ratios else None,
        seed=seed,
        group_regex=group_regex,
        group_blocks=group_blocks,
        force=force,
    )
    _print_split(dataset, json, describe_import(dataset))


def _print_split(dataset: Any, json: bool, lines: list[str]) -> None:
    from zoo.cli.screen import console, print_json, print_table
    from zoo.data.manifest import split_summary
    from zoo.errors import one_line

    summary = split_summary(dataset)
    if json:
        print_json({**summary, "classes": dataset.classes, "folder": str(dataset.folder), "notes": lines})
        return
    heads = ["class", *summary["splits"]]
    rows = [
        [one_line(name, 60), *(str(facts["classes"].get(name, 0)) for facts in summary["splits"].values())]
        for name in dataset.classes
    ]
    for what in ("images", "groups"):
        rows.append([f"all {what}", *(str(facts[what]) for facts in summary["splits"].values())])
    print_table(heads, rows, f"{dataset.name}, split {dataset.split_digest[:8]}", heads[1:], folded=("class",))
    out = console()
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
