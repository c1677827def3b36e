"""`zoo export`: a finished run as a bundle, once it is proven to be the network that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.screen import HomeOption, JsonOption

if TYPE_CHECKING:
    from zoo.deployment.bundle import Bundle


def add_to(parent: typer.Typer) -> None:
    """Add the verb to the command line."""
    parent.command()(export)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of `zoo list runs`, or a run's folder.")],
    format: Annotated[str, typer.Option(help="onnx, or openvino (extra of that name).")] = "onnx",  # noqa: A002
    int8: Annotated[bool, typer.Option("--int8", help="Quantise to 8 bits, calibrated on val images.")] = False,
    precision: Annotated[str | None, typer.Option(help="float32, fp16, bf16 or int8.")] = None,
    margin: Annotated[float, typer.Option(help="What the metric may lose, at its interval's worse end.")] = 0.01,
    metric: Annotated[str, typer.Option(help="The metric that the margin is of.")] = "top1",
    name: Annotated[str | None, typer.Option(help="Of the bundle; else <run>--<format>-<precision>.")] = None,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Export a run as a bundle: network, preprocessing, rules, card, proof.

    Network and artefact are asked about every val image. float32 must agree on all labels, other formats may lose at
    most --margin of --metric; else nothing is written, and the exit code is 1.
    """
    from zoo.cli.screen import bars, console, print_json
    from zoo.deployment.export import export as make
    from zoo.errors import ZooError

    if int8 and precision not in (None, "int8"):
        raise ZooError(f"--int8 and --precision {precision} exclude each other; take one")
    wanted: Any = {"format": format, "precision": "int8" if int8 else precision or "float32"}
    said: list[str] = []
    with bars(quiet=json) as shown:
        steps: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            steps.setdefault(what, shown.images(what))(done, total)

        bundle = make(run, margin=margin, metric=metric, name=name, progress=progress, on_note=said.append, **wanted)
    if json:
        print_json(_facts(bundle))
        return
    out = console()
    for note in said:
        out.print(note, markup=False, soft_wrap=True)
    for line in _summary(bundle):
        out.print(line, markup=False, soft_wrap=True)


def _facts(bundle: Bundle) -> dict[str, Any]:
    record = bundle.record
    kept = {key: getattr(record, key) for key in ("run", "format", "precision", "activation_map", "exporter", "parity")}
    return {
        "bundle": bundle.name,
        "path": str(bundle.path),
        **kept,
        "size_mib": bundle.size_bytes / 2**20,
        "rules": record.rules.model_dump(mode="json"),
        "files": record.files,
    }


def _summary(bundle: Bundle) -> list[str]:
    """Return what the gate found, in lines for people."""
    record, gate = bundle.record, bundle.record.parity
    flips, ends = gate["flips"], gate["change_ci"]
    flipped = f"{flips['harmful']} harmful, {flips['beneficial']} beneficial, {flips['neutral']} neutral"
    change = "not defined" if gate["change"] is None else f"{gate['change']:+.4f}"
    between = f" [{ends[0]:+.4f}, {ends[1]:+.4f}]" if ends else ""
    lines = [
        f"{bundle.name}",
        f"  gate passed on {gate['images']} val images in {gate['groups']} groups",
        f"  same label     {gate['top1_agreement']:.2%}   flips: {flipped}",
        f"  logits         differ by at most {gate['max_abs_difference']:.2g}, "
        f"{gate['max_relative_difference']:.2g} of the greatest",
        f"  {gate['metric']:<14} {change}{between}   margin {gate['margin']:g}",
    ]
    if gate.get("unseen_flips") is not None and record.precision != "float32":
        lines.append(f"  not seen       up to {gate['unseen_flips']:.1%} of new groups may hold a flip (95 %)")
    lines += [
        f"  file           {bundle.size_bytes / 2**20:.2f} MiB, {record.exporter.get('name', '')}; "
        f"activation map: {'yes' if record.activation_map else 'no'}",
        f"  written to     {_short(bundle.path)}",
        f"next: zoo serve {bundle.name}",
    ]
    return lines


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
