"""A report's parts on scores as chances: calibration, prediction sets, when to refer, operating points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.errors import one_line
from zoo.evaluation.calibration import TEMPERATURES
from zoo.reporting import curves
from zoo.reporting.blocks import Scored, chart, grid, part, sentence, with_interval


def calibration_part(scored: Scored) -> dict[str, Any] | None:
    """Return calibration before and after a temperature from val, with reliability diagrams; None without val."""
    if not scored.calibration:
        return None
    heads = ["recipe", "T", "ECE before", "ECE after", "adaptive ECE after", "log loss", "after", "Brier"]
    heads += ["= miscalibration", "− discrimination", "+ uncertainty"]
    rows = []
    for name, report in scored.calibration.items():
        before, after = report["before"], report["after"]
        parts = after["brier_decomposition"]
        rows.append(
            [
                name,
                _temperature(report["temperature"]),
                _error(before, "ece"),
                _error(after, "ece"),
                _error(after, "adaptive_ece"),
                f"{before['log_loss']:.3f}",
                f"{after['log_loss']:.3f}",
                *(f"{parts[key]:.3f}" for key in ("brier", "miscalibration", "discrimination", "uncertainty")),
            ]
        )
    drawn = curves.plot_reliability(scored.calibration)
    said = (
        "Of each recipe's first seed. The temperature T is fitted on val only; before and after are on test. Brier's "
        "parts are those after it (CORP: isotonic regression)."
    )
    return part("Calibration", sentence(said), grid(heads, rows), chart(drawn, "reliability diagrams"))


def _temperature(value: float) -> str:
    """Return a temperature, and whether the fit ran into its limit."""
    return f"{value:.2f}" + (" (limit)" if value in TEMPERATURES else "")


def _error(quality: Mapping[str, Any], key: str) -> str:
    low, high = quality[f"{key}_ci"]
    return f"{quality[key]:.3f} [{low:.3f}, {high:.3f}]"


def decision_part(scored: Scored) -> dict[str, Any] | None:
    """Prediction sets, when to refer to a human, and operating points: all chosen on val, told on test."""
    if not scored.calibration:
        return None
    sets, refer = [], []
    for name, report in scored.calibration.items():
        for method in ("lac", "aps"):
            found = report["conformal"][method]
            low, high = found["coverage_ci"]
            size = f"{found['mean_set_size']:.2f}"
            share = f"{found['coverage']:.3f} [{low:.3f}, {high:.3f}]"
            classes = _class_coverage(found["per_class"])
            sets.append([name, method.upper(), share, size, str(found["empty_sets"]), *classes.values()])
        refer.append([name, *_refer_cells(report["refer"])])
    heads = ["recipe", "sets", "coverage", "mean size", "empty", *(f"of {one_line(each, 24)}" for each in classes)]
    asked = next(iter(scored.calibration.values()))
    said = (
        f"Split-conformal sets that should hold the true class in {_percent(asked['conformal']['coverage_asked'])} of "
        "cases like those of val; by group and by class it is no promise. Referral: the lowest confidence on val at "
        f"which at most {_percent(asked['refer']['max_error'])} of what is answered is wrong; all below is for a human."
    )
    drawn = curves.plot_risk_coverage(scored.scaled, {name: each["refer"] for name, each in scored.calibration.items()})
    refer_heads = ["recipe", "answers from", "answered on val", "answered on test", "error among these"]
    return part(
        "Sets and referral",
        sentence(said),
        grid(heads, sets, words=2),
        grid(refer_heads, refer),
        chart(drawn, "error among the answered by share answered"),
        *_operating(scored),
    )


def _class_coverage(per_class: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the coverage of each class, or, of more than six, of the one with the lowest."""
    known = {name: each["coverage"] for name, each in per_class.items() if each["coverage"] is not None}
    if len(per_class) > 6:
        return {"the worst class": f"{min(known.values()):.3f}"}
    return {name: f"{known[name]:.3f}" if name in known else "–" for name in per_class}


def _refer_cells(report: Mapping[str, Any]) -> list[str]:
    if report["threshold"] is None:
        return ["refers all", "0 %", "0 %", "–"]
    error = "–"
    if report["test_error"] is not None:
        low, high = report["test_error_ci"]
        error = f"{report['test_error']:.3f} [{low:.3f}, {high:.3f}]"
    return [f"{report['threshold']:.3f}", _percent(report["val_coverage"]), _percent(report["test_coverage"]), error]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _operating(scored: Scored) -> list[dict[str, Any]]:
    rows = []
    for name, report in scored.calibration.items():
        for key, point in (report["operating_points"] or {}).items():
            asked = key.split("_at_")[1]
            row = [name, f"{asked} ≥ {point['asked']:.2f} on val", f"{point['threshold']:.3f}"]
            rows.append([*row, *(with_interval(point, f"test_{side}") for side in ("sensitivity", "specificity"))])
    if not rows:
        return []
    heads = ["recipe", "asked", "threshold", "sensitivity on test", "specificity on test"]
    return [sentence("Operating points, their threshold chosen on val:"), grid(heads, rows, words=2)]
