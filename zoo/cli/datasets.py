"""`zoo data`: import, audit, split and show."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.screen import HomeOption, JsonOption

app = typer.Typer(help="Import a dataset, audit it, split it without leaks, and look at it.", no_args_is_help=True)

GroupColumn = Annotated[str | None, typer.Option(help="CSV column that holds the group, such as the patient.")]
GroupRegex = Annotated[
    str | None, typer.Option(help="Regular expression on the path; its first parenthesis is the group.")
]
GroupBlocks = Annotated[
    int | None, typer.Option(help="Keep blocks of N neighbouring file numbers of a class together.")
]


NearDuplicates = Annotated[
    bool | None,
    typer.Option(
        "--group-near-duplicates/--no-group-near-duplicates", help="Keep near-duplicates together; the default."
    ),
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
    source: Annotated[
        str,
        typer.Argument(
            help="Folder, .csv, .npz, Hugging Face data on disk, torchvision:NAME, medmnist:NAME, a public data set "
            "(with --from), or built-in: lung-phantom, digits."
        ),
    ],
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the dataset; a built-in or public one's own by default.")
    ] = None,
    from_: Annotated[str | None, typer.Option("--from", help="Folder or .zip of a public data set's download.")] = None,
    copy: Annotated[
        bool | None,
        typer.Option(
            "--copy/--no-copy", help="Copy images below data/; else they stay, but DICOMs, which are made anonymous."
        ),
    ] = None,
    ratios: Annotated[str | None, typer.Option(help="Shares of train, val and test; else 0.7,0.15,0.15.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    bad_images: Annotated[str, typer.Option(metavar="fail|skip", help="What to do with unreadable images.")] = "fail",
    group_column: GroupColumn = None,
    group_regex: GroupRegex = None,
    group_blocks: GroupBlocks = None,
    near_duplicates: NearDuplicates = None,
    window: Annotated[
        str | None,
        typer.Option(help="For CT: lung, mediastinum, bone, CENTRE/WIDTH, or three with commas between them."),
    ] = None,
    rescale: Annotated[
        str | None, typer.Option(help="SLOPE,INTERCEPT of 16-bit PNG and TIFF, such as 1,-1024; DICOMs say it.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help="CSV with labels of files, folders or DICOM patients.")] = None,
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
    from zoo.data.canonical import canonical_names
    from zoo.data.find import builtin_names
    from zoo.data.sources import describe_import, import_dataset
    from zoo.errors import ZooError

    if name is None:
        if source not in builtin_names() and source not in canonical_names():
            raise ZooError("a dataset needs a name; give one with --name")
        name = source
    with bars(quiet=json) as shown:
        dataset = import_dataset(
            source,
            name,
            from_=from_,
            copy=copy,
            ratios=parse_ratios(ratios) if ratios else None,
            seed=seed,
            bad_images=bad_images,
            group_column=group_column,
            group_regex=group_regex,
            group_blocks=group_blocks,
            near_duplicates=near_duplicates,
            window=window,
            rescale=rescale,
            labels=labels,
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
    folds: Annotated[int | None, typer.Option(help="Write K datasets, NAME-fold0 and so on, instead.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the split.")] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Column to group by: group or label of the manifest, or one of --group-csv.")
    ] = None,
    group_csv: Annotated[str | None, typer.Option(help="CSV that has the column, and paths below the root.")] = None,
    path_column: Annotated[str, typer.Option(help="Column of that CSV that holds the path.")] = "path",
    group_regex: GroupRegex = None,
    group_blocks: GroupBlocks = None,
    group_patient: Annotated[bool, typer.Option("--group-patient", help="Group by DICOM's PatientID.")] = False,
    near_duplicates: NearDuplicates = None,
    drop_duplicates: Annotated[
        bool, typer.Option("--drop-duplicates", help="Keep one of each picture, and none whose copies differ in label.")
    ] = False,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Of shipped splits, drop from train (and val) what test has; never from test."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace even the split that the data came with.")] = False,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Split again; without options, as recorded, which gives the same bytes. Several groupings are joined."""
    from zoo.cli.screen import bars
    from zoo.data.manifest import load_dataset
    from zoo.data.resplit import resplit_dataset
    from zoo.data.sources import describe_import
    from zoo.errors import ZooError

    before = load_dataset(name)
    if folds is not None:
        others = (ratios, group_column, group_csv, group_regex, group_blocks, group_patient or None, near_duplicates)
        if any(each is not None for each in others) or drop_duplicates or repair or force:
            raise ZooError("--folds goes with --seed alone; group, repair or drop first, in a split of its own")
        _split_in_folds(name, folds, seed, json)
        return
    with bars(quiet=json) as shown:
        dataset = resplit_dataset(
            name,
            ratios=parse_ratios(ratios) if ratios else None,
            seed=seed,
            group_column=group_column,
            group_csv=group_csv,
            path_column=path_column,
            group_regex=group_regex,
            group_blocks=group_blocks,
            group_patient=group_patient or None,
            near_duplicates=near_duplicates,
            drop_duplicates=drop_duplicates,
            repair=repair,
            force=force,
            progress=shown.images("reading"),
        )
    stood = set(before.frame["path"])
    gone = {path: why for path, why in dataset.facts.get("dropped", {}).items() if path in stood}
    _print_split(dataset, json, describe_import(dataset), gone)


def _split_in_folds(name: str, folds: int, seed: int | None, json: bool) -> None:
    from zoo.cli.screen import bars, print_json
    from zoo.data.manifest import split_summary
    from zoo.data.resplit import fold_dataset

    with bars(quiet=json) as shown:
        made = fold_dataset(name, folds, seed=seed or 0, progress=shown.images("reading"))
    if json:
        print_json({"dataset": name, "folds": [split_summary(each) for each in made]})
        return
    for each in made:
        _print_split(each, False, [])


@app.command()
def audit(
    name: Annotated[str, typer.Argument(help="Name of the dataset, or path of a folder that is not imported yet.")],
    group_regex: GroupRegex = None,
    group_blocks: GroupBlocks = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the page; the dataset's own.")
    ] = None,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Judge every file, find copies and leaks, and say what they are worth; exit code 1 where splits leak."""
    from zoo.cli.screen import bars, console, print_json
    from zoo.errors import EXIT_MISTAKE
    from zoo.files import home as working_folder
    from zoo.files import user_path
    from zoo.reporting.audit import audit_dataset, write_audit

    folder = user_path(name)
    is_folder = (os.sep in name or name in (".", "..")) and os.path.isdir(folder)  # noqa: PTH112  takes long names
    if is_folder and output is None:
        output = working_folder().root / f"audit-{folder.resolve().name}"
    with bars(quiet=json) as shown:
        result = audit_dataset(
            folder.resolve() if is_folder else name,
            group_regex=group_regex,
            group_blocks=group_blocks,
            tell=shown.images,
        )
    if not json:
        _print_audit(result)
    page, _ = write_audit(result, output)
    if json:
        print_json({**result.document, "page": str(page)})
    else:
        console().print(f"page: {page}", markup=False, soft_wrap=True)
    if not result.ok:
        raise typer.Exit(EXIT_MISTAKE)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of the dataset.")],
    per_class: Annotated[int, typer.Option(help="Images of a class on each sheet.")] = 12,
    seed: Annotated[int, typer.Option(help="Seed of which images are shown.")] = 0,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder; else show/ in the dataset's own.")
    ] = None,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Make contact sheets of every class and split, and of what each augmentation policy does to the same image."""
    from zoo.cli.screen import console, print_json
    from zoo.data.manifest import load_dataset
    from zoo.reporting.sheets import show_dataset

    files = show_dataset(load_dataset(name), output, per_class=per_class, seed=seed)
    if json:
        print_json({"dataset": name, "files": [str(file) for file in files]})
        return
    for file in files:
        console().print(str(file), markup=False, soft_wrap=True)


def _print_audit(result: Any) -> None:
    from zoo.cli.screen import console, print_table
    from zoo.data.audit import KINDS
    from zoo.errors import one_line
    from zoo.reporting.audit import tax_rows, verdict

    document, out = result.document, console()
    kinds = [kind for kind in KINDS if document["finding_counts"][kind]]
    firsts = {kind: next(each for each in result.findings if each.kind == kind) for kind in kinds}
    rows = [
        [
            str(document["finding_counts"][kind]),
            KINDS[kind],
            one_line(": ".join(filter(None, (each.path, each.detail))), 90),
        ]
        for kind, each in firsts.items()
    ]
    counts = {
        "exact_duplicate_pairs": "pairs of the same picture",
        "near_duplicate_pairs": "pairs of nearly the same picture",
        "label_conflicts": "pairs of the same picture with different labels",
        "cross_split_leaks": "leaks across splits",
    }
    rows += [[str(document[key]), text, _first_pair(document, key)] for key, text in counts.items()]
    print_table(
        ["files", "what", "the first"],
        rows,
        f"{document['dataset']}: {document['images']} images, split {document['split_digest'][:8]}",
        ("files",),
        folded=("what", "the first"),
    )
    _print_shortcuts(document["shortcuts"])
    heads = ["leak tax: top1 under", "groups", "1-NN", "logistic regression"]
    print_table(heads, tax_rows(document), numbers=heads[1:], folded=heads[:1])
    if document["scan_order"] and document["scan_order"]["found"]:
        share, chance = (100 * document["scan_order"][key] for key in ("share", "by_chance"))
        out.print(
            f"File numbers follow the scans: for {share:.0f} % of the images the one most like it has a "
            f"neighbouring number "
            f"({chance:.0f} % by chance).",
            markup=False,
        )
    for old, new in document["renamed_classes"].items():
        out.print(f"class {one_line(old, 80)!r} of the source is called {one_line(new, 80)!r} here", markup=False)
    for each in document["faults"]:
        out.print(f"known fault: {each}", markup=False)
    out.print(verdict(result), markup=False)


def _print_shortcuts(shortcuts: list[dict[str, Any]]) -> None:
    from zoo.cli.screen import print_table

    facts = [
        [
            row["name"],
            f"{row['top1']:.3f}",
            f"{row['top1_ci'][0]:.3f}–{row['top1_ci'][1]:.3f}",
            f"{row['majority']:.3f}",
        ]
        for row in shortcuts
    ]
    if facts:
        heads = ["shortcut: label from", "top1", "95% CI", "majority"]
        print_table(heads, facts, numbers=heads[1:], folded=heads[:1])


def _first_pair(document: dict[str, Any], key: str) -> str:
    from zoo.errors import one_line

    examples = document["examples"]
    found = {
        "exact_duplicate_pairs": examples["exact"],
        "near_duplicate_pairs": examples["near"],
        "label_conflicts": examples.get("label_conflicts", []),
        "cross_split_leaks": [
            *(examples.get("exact_pairs") or examples.get("near_pairs") or examples.get("scan_order") or []),
        ],
    }[key]
    return one_line(" = ".join(found[0]), 90) if found else ""


def _print_split(dataset: Any, json: bool, lines: list[str], dropped: dict[str, str] | None = None) -> None:
    from zoo.cli.screen import console, print_json, print_table
    from zoo.data.manifest import split_summary
    from zoo.errors import one_line

    summary = split_summary(dataset)
    if json:
        facts = {"classes": dataset.classes, "folder": str(dataset.folder), "notes": lines, "dropped": dropped or {}}
        facts["stratification_error"] = dataset.facts.get("split", {}).get("stratification_error")
        print_json({**summary, **facts})
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
    for path, why in list((dropped or {}).items())[:20]:
        out.print(f"dropped {one_line(path, 120)}: {why}", markup=False, soft_wrap=True)
    if dropped:
        out.print(
            f"dropped in all: {len(dropped)} (listed in {dataset.folder / 'dataset.toml'})",
            markup=False,
            soft_wrap=True,
        )
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)
