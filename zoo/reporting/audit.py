"""The audit of a dataset: files, copies, leaks, shortcuts and the leak tax, as a document, a page and a figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.audit import KINDS, Finding, judge_files, open_folder
from zoo.data.decode import BadImage, decode
from zoo.data.duplicates import Ints, components, exact_pairs
from zoo.data.facts import Facts, dataset_facts, file_facts
from zoo.data.leaks import (
    SCAN_BLOCK,
    Leaks,
    Pairs,
    ScanOrder,
    declared_groups,
    duplicate_pairs,
    leaks_of,
    scan_order,
)
from zoo.data.manifest import Dataset, load_dataset, split_summary
from zoo.data.rows import join_groups
from zoo.data.split import groups_by_blocks, groups_by_regex
from zoo.data.window import windowing_of_facts
from zoo.errors import ZooError
from zoo.evaluation.leak_tax import leak_tax, shortcuts
from zoo.files import Home, write_json, write_text
from zoo.reporting.html import picture, render

_SHOWN_PAIRS = 24
_SHOWN_FINDINGS = 200
Tell = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True)
class Audit:
    """A dataset's audit; `document` is what `--json` prints and `audit.json` holds."""

    dataset: Dataset
    document: dict[str, Any]
    findings: list[Finding]
    leaks: Leaks
    pairs: Pairs

    @property
    def ok(self) -> bool:
        """Return whether nothing leaks, no picture has two labels, and the splits have the same classes."""
        return bool(self.document["ok"])


def audit_dataset(
    data: Dataset | str | Path,
    root: Home | None = None,
    *,
    group_regex: str | None = None,
    group_blocks: int | None = None,
    tell: Tell | None = None,
) -> Audit:
    """Look at every file of a dataset once and return what is to be known before training on it.

    data: a dataset or its name; a Path is a folder that is not imported yet, whose files are all judged.
    group_regex, group_blocks: another way of grouping to try in the leak tax, without changing the split. tell:
    given a step's name, returns the callback for its progress. Raises ZooError where the dataset is not there.
    """
    begin = tell or (lambda _: lambda done, total: None)
    if isinstance(data, Path):
        dataset, facts = open_folder(data, begin("reading"))
    else:
        dataset = load_dataset(data, root) if isinstance(data, str) else data
        facts = dataset_facts(dataset, begin("reading"))
    if not facts.good.any() and not isinstance(data, Path):
        raise ZooError(f"no image of {dataset.name!r} can be read (below {str(dataset.root)!r}); import the data again")
    findings = judge_files(dataset, facts, begin("other files"))
    pairs, order = duplicate_pairs(dataset, facts), scan_order(dataset, facts)
    leaks = leaks_of(dataset, pairs, order)
    groups, way = _groups_to_try(dataset, pairs, order, group_regex, group_blocks)
    good = np.flatnonzero(facts.good)
    place = {label: number for number, label in enumerate(dataset.classes)}
    y_true = np.array([place[label] for label in dataset.frame["label"]], np.int64)[good]
    splits = dataset.frame["split"].to_numpy(dtype=str)[good]
    if len(good) < 2 or len(set(y_true.tolist())) < 2:
        document = _document(dataset, facts, findings, pairs, leaks, order)
        document |= {"leak_tax": {"images": len(good), "grouped_by": way}, "shortcuts": [], "ok": _ok(dataset, leaks)}
        return Audit(dataset, document, findings, leaks, pairs)
    tax = leak_tax(facts.small[good], y_true, splits, {name: each[good] for name, each in groups.items()})
    columns = {name: values[good] for name, values in file_facts(facts).items()}
    rows = shortcuts(columns, y_true, dataset.frame["group"].to_numpy(dtype=str)[good])
    document = _document(dataset, facts, findings, pairs, leaks, order)
    document |= {"leak_tax": {**tax, "grouped_by": way}, "shortcuts": rows, "ok": _ok(dataset, leaks)}
    return Audit(dataset, document, findings, leaks, pairs)


def _ok(dataset: Dataset, leaks: Leaks) -> bool:
    return leaks.ok and "class_mismatch" not in dataset.facts


def _groups_to_try(
    dataset: Dataset, pairs: Pairs, order: ScanOrder | None, group_regex: str | None, group_blocks: int | None
) -> tuple[dict[str, np.ndarray[Any, Any]], str]:
    """Return the groups as declared (`grouped`), and joined with near-duplicates (`joined`), and how they were made."""
    frame = dataset.frame
    paths, labels = frame["path"].tolist(), frame["label"].tolist()
    recorded = dataset.facts.get("split", {})
    regex, blocks = group_regex, group_blocks
    if regex is None and blocks is None and not set(recorded) & {"group_column", "group_patient"}:
        regex, blocks = recorded.get("group_regex"), recorded.get("group_blocks")
    scanned = blocks is None and regex is None and not declared_groups(dataset.facts)
    if scanned and order is not None and order.found:
        blocks = SCAN_BLOCK
    ways = [groups_by_regex(paths, regex)] if regex is not None else []
    try:
        ways += [groups_by_blocks(paths, labels, blocks)] if blocks is not None else []
    except ZooError:
        if not scanned:
            raise
        blocks = None  # a few names have no number
    way = " and ".join(
        [f"the regex {regex!r}"] * (regex is not None)
        + [f"blocks of {blocks} neighbouring file numbers"] * (blocks is not None)
    )
    own = frame["group"].tolist()
    grouped = join_groups(ways, paths) if ways else own
    near = components(len(paths), pairs.near, pairs.exact)
    joined = join_groups([grouped, [str(each) for each in near]], paths)
    groups = {"grouped": np.array(grouped)}
    if len(set(joined)) != len(set(grouped)):
        groups["joined"] = np.array(joined)
    return groups, way or "the groups of the manifest"


def _document(
    dataset: Dataset, facts: Facts, findings: list[Finding], pairs: Pairs, leaks: Leaks, order: ScanOrder | None
) -> dict[str, Any]:
    counts = Counter(each.kind for each in findings)
    record = dataset.facts
    labels = dataset.frame["label"].to_numpy(dtype=str)
    return {
        "dataset": dataset.name,
        "split_digest": dataset.split_digest,
        "images": len(dataset.frame),
        "files_looked_at": len(dataset.frame) + sum(each.kind == "not_in_manifest" for each in findings),
        "classes": dataset.classes,
        "splits": split_summary(dataset)["splits"],
        "unreadable": [{"path": each.path, "reason": each.detail} for each in findings if each.kind == "unreadable"],
        "findings": [{"path": each.path, "kind": each.kind, "detail": each.detail} for each in findings],
        "finding_counts": {kind: counts[kind] for kind in KINDS},
        "formats": dict(Counter(facts.formats[facts.good].tolist())),
        "modes": dict(Counter(facts.modes[facts.good].tolist())),
        "exact_duplicate_pairs": len(pairs.exact),
        "byte_identical_pairs": len(exact_pairs(_file_digests(dataset, facts))),
        "near_duplicate_pairs": len(pairs.near),
        "components_torn_by_a_split": _torn(dataset, pairs),
        "near_duplicates_of_other_label": int((labels[pairs.near[:, 0]] != labels[pairs.near[:, 1]]).sum()),
        "label_conflicts": leaks.label_conflicts,
        "cross_split_leaks": leaks.count,
        "leaks": {key: getattr(leaks, key) for key in ("exact_pairs", "near_pairs", "groups", "scan_order")},
        "examples": {**leaks.examples, "near": _paths(dataset, pairs.near), "exact": _paths(dataset, pairs.exact)},
        "scan_order": None
        if order is None
        else {"share": order.share, "by_chance": order.by_chance, "asked": order.asked, "found": order.found},
        "renamed_classes": record.get("renamed_classes", {}),
        "class_mismatch": record.get("class_mismatch"),
        "dropped": len(record.get("dropped", {})),
        "faults": record.get("faults", []),
        "stratification_error": record.get("split", {}).get("stratification_error"),
        "remedy": leaks.remedy,
    }


def _file_digests(dataset: Dataset, facts: Facts) -> list[str]:
    """Return the SHA-256 of each file; one that cannot be used is like no other."""
    digests = zip(dataset.frame["sha256"], facts.good.tolist(), strict=True)
    return [digest if good else f"none {place}" for place, (digest, good) in enumerate(digests)]


def _torn(dataset: Dataset, pairs: Pairs) -> int:
    """Return how many components of copies and near-copies stand in more than one split."""
    whole = components(len(dataset.frame), pairs.near, pairs.exact)
    return int((dataset.frame["split"].groupby(whole).nunique() > 1).sum())


def _paths(dataset: Dataset, pairs: Ints, count: int = 500) -> list[list[str]]:
    paths = dataset.frame["path"].tolist()
    return [[paths[one], paths[other]] for one, other in pairs[:count].tolist()]


def verdict(audit: Audit) -> str:
    """Return the outcome in one or two sentences."""
    name = audit.dataset.name
    if audit.ok:
        return f"No leak was found between the splits of {name}."
    if audit.leaks.ok:
        return f"{name} cannot be imported as it is: {audit.document['class_mismatch']}. Rename them to match."
    text = "; ".join(audit.leaks.sentences())
    return f"{name} leaks: {text}. Training on it is refused: {audit.leaks.remedy}."


def tax_rows(document: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the leak tax as people read it: way of splitting, groups, 1-NN and logistic regression with intervals."""
    tax = document["leak_tax"]
    names = {
        "given": "the split at hand",
        "random": "a random split",
        "grouped": f"split by {tax['grouped_by']}",
        "joined": "these joined with near-duplicates",
    }
    rows = []
    for key, name in names.items():
        each = tax.get(key)
        if each is None:
            continue
        nearest, logistic = _score(each["nearest_neighbour"]), _score(each["logistic_regression"])
        rows.append((name, str(each["groups"]) if key != "random" else "–", nearest, logistic))
    return rows


def _score(score: dict[str, Any]) -> str:
    low, high = score["top1_ci"]
    return f"{score['top1']:.3f} [{low:.3f}, {high:.3f}]"


def write_audit(audit: Audit, folder: Path | None = None) -> tuple[Path, Path]:
    """Write `audit.html` and `audit.json` to a folder, the dataset's own where none is given, and return both."""
    folder = folder or audit.dataset.folder
    page, document = folder / "audit.html", folder / "audit.json"
    write_text(page, audit_page(audit))
    write_json(document, audit.document)
    return page, document


def audit_page(audit: Audit) -> str:
    """Return the audit as a self-contained HTML page with the offending images side by side."""
    document, leaks = audit.document, audit.leaks
    shown = {
        "The same picture in different splits": leaks.examples.get("exact_pairs", []),
        "Nearly the same picture in different splits": leaks.examples.get("near_pairs", []),
        "Neighbouring file numbers in different splits": leaks.examples.get("scan_order", []),
        "The same picture with different labels": leaks.examples.get("label_conflicts", []),
        "The same picture twice": document["examples"]["exact"],
        "Nearly the same picture twice": document["examples"]["near"],
    }
    sections, seen = [], set[tuple[str, str]]()
    for title, pairs in shown.items():
        fresh = [(one, other) for one, other in pairs if (one, other) not in seen]
        seen |= set(fresh)
        if fresh:
            drawn = [[_shown(audit.dataset, path) for path in pair] for pair in fresh[:_SHOWN_PAIRS]]
            sections.append({"title": title, "count": len(fresh), "pairs": drawn})
    kinds = [
        {
            "text": KINDS[kind],
            "count": document["finding_counts"][kind],
            "first": [each for each in audit.findings if each.kind == kind][:_SHOWN_FINDINGS],
        }
        for kind in KINDS
        if document["finding_counts"][kind]
    ]
    return render(
        "audit.html",
        audit=audit,
        doc=document,
        verdict=verdict(audit),
        sections=sections,
        kinds=kinds,
        tax=tax_rows(document),
        shown=_SHOWN_PAIRS,
    )


def _shown(dataset: Dataset, path: str) -> dict[str, str]:
    row = dataset.frame[dataset.frame["path"] == path].iloc[0]
    try:
        data = decode(dataset.image_path(path).read_bytes(), windowing_of_facts(dataset.facts))
        image = picture(data)
    except (OSError, BadImage):
        image = ""
    return {"path": path, "label": row["label"], "split": row["split"], "image": image}
