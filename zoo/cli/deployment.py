"""`zoo export`: from a trained run to a bundle that was proven equal to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from zoo.cli.screen import HomeOption, JsonOption

if TYPE_CHECKING:
    from zoo.deployment.bundle import Bundle

Precision = Literal["float32", "fp16", "bf16", "int8"]


def add_to(parent: typer.Typer) -> None:
    """Add the verb to the command line."""
    parent.command()(export)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Name of `zoo list runs`, or a run's folder.")],
    format_: Annotated[str, typer.Option("--format", metavar="onnx|openvino", help="The runtime's format.")] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantise after training, calibrated on val; as --precision int8.")
    ] = False,
    precision: Annotated[
        str | None, typer.Option(metavar="float32|fp16|bf16|int8", help="Number format; float32 where left out.")
    ] = None,
    margin: Annotated[
        float, typer.Option(help="How much a number format other than float32 may cost, a part of the metric.")
    ] = 0.01,
    metric: Annotated[str, typer.Option(help="The metric that the margin is of.")] = "top1",
    name: Annotated[str | None, typer.Option(help="Name of the bundle; else RUN--FORMAT-PRECISION.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the place of another run's bundle of that name.")
    ] = False,
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Export a run as a bundle, once it gives the same answers as the network on every val image."""
    from zoo.cli.screen import bars, print_json
    from zoo.deployment.export import Format
    from zoo.deployment.export import export as export_run
    from zoo.errors import ZooError

    if int8 and precision not in (None, "int8"):
        raise ZooError(f"--int8 is --precision int8. Got --precision {precision} too; give one of them")
    wanted = cast(Precision, "int8" if int8 else precision or "float32")
    notes: list[str] = []
    with bars(quiet=json) as shown:
        bundle = export_run(
            run,
            format=cast(Format, format_),
            precision=wanted,
            margin=margin,
            metric=metric,
            name=name,
            replace=replace,
            progress=lambda what, done, total: shown.images(what, "" if what == "exporting" else "images")(done, total),
            on_note=notes.append,
        )
    if json:
        print_json(_document(bundle, notes))
    else:
        _print(bundle, notes)


def _document(bundle: Bundle, notes: list[str]) -> dict[str, Any]:
    record = bundle.record
    return {
        "bundle": bundle.name,
        "path": str(bundle.path),
        "run": record.run,
        "format": record.format,
        "precision": record.precision,
        "size_bytes": bundle.size_bytes,
        "activation_map": record.activation_map,
        "exporter": record.exporter,
        "parity": record.parity,
        "rules": record.rules.model_dump(mode="json"),
        "val": record.val,
        "notes": notes,
    }


def _print(bundle: Bundle, notes: list[str]) -> None:
    from zoo.cli.screen import console, print_table

    record, found, out = bundle.record, bundle.record.parity, console()
    flips, metric = found["flips"], found["metric"]
    agreeing = round(found["top1_agreement"] * found["images"])
    ties = f" ({found['ties']} of them ties)" if found["ties"] else ""
    rows = [
        ["same label", f"{agreeing} of {found['images']} val images{ties}"],
        ["flips", ", ".join(f"{count} {kind}" for kind, count in flips.items())],
        ["greatest difference", f"{found['max_relative_difference']:.1e} of the greatest logit"],
        [f"{metric} of the network", _number(found["reference"])],
        [f"{metric} of the bundle", _number(found["artefact"])],
        ["change", _change(found)],
        ["size", f"{bundle.size_bytes / 1e6:.2f} MB"],
        ["made by", _maker(record.exporter)],
        ["activation map", "yes" if record.activation_map else "no: the network does not pool and then is linear"],
    ]
    if found.get("unseen_flips") is not None and record.precision != "float32":
        rows.insert(2, ["flips not seen", f"up to {found['unseen_flips']:.1%} of new groups may hold one (95 %)"])
    recorded = found.get("recorded")
    if recorded:
        told = f"{recorded['agreement']:.2%} the same labels as when it was trained, in {recorded['precision']}"
        rows.insert(3, ["against the run's record", told])
    print_table(["check", "found"], rows, bundle.name, folded=("found",))
    out.print(f"passed: {bundle.path}", markup=False, soft_wrap=True)
    for note in notes:
        out.print(f"note: {note}", markup=False, soft_wrap=True)


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def _change(found: dict[str, Any]) -> str:
    if found["change"] is None or found["change_ci"] is None:
        return "not defined"
    low, high = found["change_ci"]
    return f"{found['change']:+.4f}, 95% CI [{low:+.4f}, {high:+.4f}]"


def _maker(exporter: dict[str, Any]) -> str:
    from zoo.errors import one_line

    parts = [f"{exporter['name']}, opset {exporter['opset']}"]
    parts += [f"int8 by {exporter['quantiser']}"] if "quantiser" in exporter else []
    parts += [f"fallback: {one_line(exporter['fallback'], 80)}"] if "fallback" in exporter else []
    return "; ".join(parts)
