"""Comparison tables for people and for other programs: Markdown, CSV, JSON, LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from zoo.errors import ZooError, nearest, one_line
from zoo.evaluation.statistics import MARGIN
from zoo.files import SCHEMA_VERSION, to_json
from zoo.reporting.comparison import Comparison

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def fact_text(fact: Any) -> str:
    """Return what runs were computed with in words, all of it where they differ.

    >>> fact_text(["bf16", "float32"]), fact_text("cpu"), fact_text(2)
    ('bf16 and float32', 'cpu', '2')
    """
    return " and ".join(map(str, fact)) if isinstance(fact, list) else str(fact)


_HEADS = {
    "top1": "top1",
    "balanced_accuracy": "balanced acc.",
    "macro_f1": "macro F1",
    "macro_precision": "macro precision",
    "macro_recall": "macro recall",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "log_loss": "log loss",
    "brier": "Brier",
    "ece": "ECE",
}
_ALSO = ("balanced_accuracy", "macro_f1", "auroc", "ece")


def cells(row: dict[str, Any], metric: str = "top1") -> dict[str, str]:
    """Return a row's cells as people read them, the metric first; missing values are a dash."""

    def score(key: str) -> str:
        mean, sd = row.get(key), row.get(f"{key}_sd")
        return "–" if mean is None else f"{mean:.3f}" + (f" ±{sd:.3f}" if sd is not None else "")

    return {
        "recipe": row["recipe"],
        "model": row["model"],
        "weights": row["weights"],
        "params": f"{row['params'] / 1e6:.2f}M" if row["params"] else "–",
        "seeds": str(row["seeds"]),
        "epochs": f"{row['epochs']:.0f}" if row["epochs"] is not None else "–",
        f"val {_HEADS[metric]}": score(f"val_{metric}"),
        f"test {_HEADS[metric]}": score(f"test_{metric}") + (" †" if row.get("beats_floors") is False else ""),
        "95% CI": _range(row.get(f"test_{metric}_ci")),
        "ties": row["letters"] or "–",
        **{_HEADS[each]: score(f"test_{each}") for each in _ALSO if each != metric},
        "ECE at T": f"{row['test_ece_calibrated']:.3f}" if row.get("test_ece_calibrated") is not None else "–",
        "train s": f"{row['train_s']:.1f}" if row["train_s"] is not None else "–",
        "images/s": f"{row['images_per_s']:.0f}" if row["images_per_s"] is not None else "–",
        "status": row["status"] if not row["reason"] else f"{row['status']}: {one_line(row['reason'], 160)}",
    }


def _range(interval: list[float] | None) -> str:
    return f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else "–"


def floor_cells(floor: dict[str, Any], metric: str = "top1") -> dict[str, str]:
    """Return a floor's cells as people read them, under the heads of `cells`."""
    found = {"recipe": f"floor: {floor['name']}"}
    if floor.get(f"test_{metric}") is not None:
        found |= {
            f"test {_HEADS[metric]}": f"{floor[f'test_{metric}']:.3f}",
            "95% CI": _range(floor.get(f"test_{metric}_ci")),
        }
    shown = {_HEADS[each]: floor.get(f"test_{each}") for each in _ALSO if each != metric}
    return found | {head: f"{value:.3f}" for head, value in shown.items() if value is not None}


def title(comparison: Comparison) -> str:
    """Return a table's title in one line."""
    scored = next((row for row in comparison.rows if row["test_images"]), None)
    test = ""
    if scored:
        test = f", {scored['test_images']} test images"
        if scored["test_groups"] != scored["test_images"]:
            test += f" of {scored['test_groups']} groups"
    leaks = " — LEAKS ACCEPTED" if comparison.leaks_accepted else ""
    return f"{comparison.dataset}, split {comparison.split_digest[:8]}{test}{leaks}"


def legend(comparison: Comparison) -> str:
    """Return what the table's signs mean, in a few sentences."""
    best = (
        f" The best mean has {comparison.relative_to}; who shares no letter with it is worse."
        if comparison.relative_to
        else ""
    )
    return (
        "Mean ±sd over seeds. 95% CI: bootstrap of test images by group, and of seeds. Ties: recipes that share a "
        f"letter are not told apart at 5 % (paired bootstrap of {comparison.metric}, Holm).{best} †: the interval does "
        "not lie beyond every floor. ECE at T: after temperature scaling fitted on val."
    )


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as a Markdown page: floors, rows, pairs where any were told apart, notes, environment."""
    lines = [f"# {markdown_text(title(comparison))}", ""]
    rows = [cells(row, comparison.metric) for row in comparison.rows]
    heads = list(rows[0])
    floors = [markdown_row(_emphasised(floor, comparison.metric), heads) for floor in comparison.floors]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *floors]
    lines += [markdown_row(row, heads) for row in rows]
    lines += ["", markdown_text(legend(comparison)), ""] + [
        f"- Note: {markdown_text(note)}" for note in comparison.notes
    ]
    facts = comparison.environment
    versions = ", ".join(f"{name} {fact_text(number)}" for name, number in facts["versions"].items())
    device, precision = (markdown_text(fact_text(facts[key])) for key in ("device", "precision"))
    lines += [f"- Computed on {device}; precision {precision}; {versions}", ""]
    if comparison.pairs:
        pairs = [pair_cells(pair) for pair in comparison.pairs]
        heads = list(pairs[0])
        lines += [f"## Pairs: difference of test {comparison.metric}", ""]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        lines += [markdown_row(pair, heads) for pair in pairs]
        lines += ["", markdown_text(pairs_legend(comparison)), ""]
    return "\n".join(lines)


def pair_cells(pair: dict[str, Any]) -> dict[str, str]:
    """Return a pair's cells as people read them."""
    known = pair["difference"] is not None and math.isfinite(pair["difference"])
    exact = pair["mcnemar_p"] or pair["delong_p"]
    return {
        "one": pair["one"],
        "two": pair["two"],
        "one − two": f"{pair['difference']:+.3f}" if known else "–",
        "95% CI": f"{pair['low']:+.3f} to {pair['high']:+.3f}" if known else "–",
        "p": p_value_text(pair["p"]),
        "p (Holm)": p_value_text(pair["p_holm"]),
        "verdict": _verdict(pair),
        "McNemar" if pair["metric"] == "top1" else "DeLong": ", ".join(map(p_value_text, exact)) or "–",
    }


def _verdict(pair: dict[str, Any]) -> str:
    if pair["different"]:
        return "different, but less than the margin" if pair["equivalent"] else "different"
    return "equivalent" if pair["equivalent"] else "not told apart"


def p_value_text(value: float) -> str:
    """Return a p-value as tables have it.

    >>> p_value_text(0.0002), p_value_text(0.034), p_value_text(1.0)
    ('<.001', '.034', '1')
    """
    return "<.001" if value < 0.001 else f"{value:.3f}".lstrip("0") if value < 1 else "1"


def pairs_legend(comparison: Comparison) -> str:
    """Return what the columns of the pairs mean."""
    margin = comparison.pairs[0]["margin"] if comparison.pairs else MARGIN
    return (
        "p: paired bootstrap by group and seed; p (Holm): adjusted over all pairs. Equivalent: the difference is "
        f"smaller than {margin:g} (two one-sided tests at 5 %, Holm). McNemar's exact mid-p (without groups) and "
        "DeLong's p: seed by seed, not adjusted. Not told apart is no proof of being equal."
    )


HEADLINE = ("recipe", "weights", "params", "val top1", "test top1", "95% CI", "ties", "train s")


def headline_markdown(document: dict[str, Any]) -> str:
    """Return the few columns that a README shows, out of a `table.json`."""
    lines = ["| " + " | ".join(HEADLINE) + " |", "|" + "---|" * len(HEADLINE)]
    lines += [markdown_row(_emphasised(floor, "top1"), HEADLINE) for floor in document["floors"]]
    lines += [markdown_row(cells(row), HEADLINE) for row in document["rows"]]
    return "\n".join(lines)


def _emphasised(floor: dict[str, Any], metric: str) -> dict[str, str]:
    shown = floor_cells(floor, metric)
    return shown | {"recipe": f"*{shown['recipe']}*"}


def markdown_row(row: dict[str, str], heads: Iterable[str]) -> str:
    """Return one row of a Markdown table; what a row lacks is an empty cell."""
    return "| " + " | ".join(markdown_text(row.get(head, "")) for head in heads) + " |"


def markdown_text(text: object) -> str:
    r"""Return text that stays within one Markdown table cell and means nothing to HTML.

    >>> markdown_text("a|b <img>")
    'a\\|b &lt;img&gt;'
    """
    return (
        one_line(text, 1000)
        .replace("\\", "\\\\")
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace("|", "\\|")
    )


def to_csv(comparison: Comparison) -> str:
    """Return the rows as CSV with every number in full; cells that a spreadsheet would compute are defused.

    An interval is two columns, `<name>_low` and `<name>_high`.
    """
    keys = [key for key in comparison.rows[0] if key not in ("runs", "seed_list", "test_top1_seeds")]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([name for key in keys for name in _csv_names(key)])
    for row in comparison.rows:
        cells_of = [
            each for key in keys for each in ((row[key] or [None, None]) if key.endswith("_ci") else [row[key]])
        ]
        writer.writerow([csv_cell(each) for each in cells_of])
    return stream.getvalue()


def _csv_names(key: str) -> list[str]:
    return [f"{key}_low", f"{key}_high"] if key.endswith("_ci") else [key]


def csv_cell(value: Any) -> Any:
    """Return a value as CSV has it: six decimals, nothing for None, and no text that a spreadsheet would compute."""
    if isinstance(value, float):
        return f"{value:.6f}"
    if isinstance(value, str) and (value.startswith(_FORMULA) or value.lstrip().startswith(_FORMULA[:4])):
        return f"'{value}"
    return "" if value is None else value


# LaTeX ------------------------------------------------------------------------------------------------------------

_TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "†": r"$^{\dagger}$",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
    "<": r"$<$",
    ">": r"$>$",
}
_TEX_LEFT = ("recipe", "weights", "model", "ties", "status")


def to_latex(comparison: Comparison) -> str:
    """Return the comparison as a LaTeX table that needs the package booktabs; everything from outside is escaped."""
    rows = [cells(row, comparison.metric) for row in comparison.rows]
    heads = [head for head in rows[0] if head not in ("model", "epochs", "images/s", "status")]
    form = "".join("l" if head in _TEX_LEFT else "r" for head in heads)
    lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", r"\small"]
    lines += [rf"\begin{{tabular}}{{{form}}}", r"\toprule", _tex_row(heads), r"\midrule"]
    for floor in comparison.floors:
        shown = floor_cells(floor, comparison.metric)
        lines.append(_tex_row([shown.get(head, "") for head in heads]))
    lines += [r"\midrule"] if comparison.floors else []
    lines += [_tex_row([row[head] for head in heads]) for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\caption{{{tex(title(comparison))}. {tex(legend(comparison))}}}", r"\end{table}", ""]
    return "\n".join(lines)


def _tex_row(row: list[str]) -> str:
    return " & ".join(map(tex, row)) + r" \\"


def tex(text: str) -> str:
    r"""Return text that LaTeX sets as it is.

    >>> print(tex("50 % of a_b"))
    50 \% of a\_b
    """
    return "".join(_TEX.get(letter, letter) for letter in one_line(text, 1000))


FORMATS: dict[str, Callable[[Comparison], str]] = {
    "markdown": to_markdown,
    "csv": to_csv,
    "json": lambda comparison: to_json({"schema_version": SCHEMA_VERSION, **comparison.document()}, indent=2) + "\n",
    "latex": to_latex,
}
ENDINGS = {".md": "markdown", ".csv": "csv", ".json": "json", ".tex": "latex"}


def format_of(wanted: str | Path) -> str:
    """Return the format of a name, or of a file by its ending; raises ZooError for one that there is not."""
    name = ENDINGS.get(wanted.suffix.lower(), "") if isinstance(wanted, Path) else wanted
    if name in FORMATS:
        return name
    if isinstance(wanted, Path):
        raise ZooError(f"a comparison is written to a file that ends in {', '.join(ENDINGS)}. Got {one_line(wanted)!r}")
    raise ZooError(f"a format must be one of {', '.join(FORMATS)}. Got {one_line(wanted)!r}{nearest(wanted, FORMATS)}")
