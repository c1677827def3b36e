"""From a finished run to a bundle: the network in a runtime's format, with what is needed to use and to trust it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from zoo.data.cache import Pixels, open_pixels
from zoo.data.manifest import Dataset, load_dataset
from zoo.data.transforms import center_crop, normalise
from zoo.deployment.bundle import (
    CARD,
    FORMATS,
    MODEL_FILES,
    PRECISIONS,
    SAMPLE,
    Bundle,
    BundleRecord,
    Sample,
    open_bundle,
    read_record,
    seal,
)
from zoo.deployment.card import card_text
from zoo.deployment.facts import gather_facts, weights_told
from zoo.deployment.graph import write_onnx, write_openvino
from zoo.deployment.parity import (
    MARGIN,
    against_recorded,
    artefact_predictions,
    check_gate,
    judge,
    reference_predictions,
)
from zoo.deployment.placing import making, put_in_place, same_bundle, staged
from zoo.deployment.predictor import prepare
from zoo.deployment.quantise import Calibration, half_onnx, int8_onnx, int8_openvino
from zoo.deployment.rules import fit_rules
from zoo.deployment.runtime import Session
from zoo.deployment.speed import subject_of
from zoo.errors import ZooError, nearest, one_line
from zoo.evaluation.metrics import compute_metrics, negative_index
from zoo.evaluation.predictions import Predictions, write_predictions
from zoo.evaluation.statistics import affordable_metrics, metric_intervals
from zoo.files import Home, check_name, home, write_json
from zoo.runs import Preprocessing, Run, RunRecord, find_run
from zoo.training.interruption import Interruption
from zoo.training.precision import set_threads
from zoo.training.scoring import finished_record, load_model, predictions_of

Format = Literal["onnx", "openvino"]
Precision = Literal["float32", "fp16", "bf16", "int8"]
Progress = Callable[[str, int, int], None]
Note = Callable[[str], None]


class HasRun(Protocol):
    """What stands for a run, such as the choice of `zoo.pick`."""

    @property
    def run(self) -> Run:
        """Return the run."""


_TOLERANCE = {"float32": 1e-3, "fp16": 2e-2, "bf16": 5e-2, "int8": 2e-1}


@dataclass(frozen=True, eq=False)
class _Job:
    """One export: of which run, to what, and how it is judged."""

    run: Run
    record: RunRecord
    root: Home
    dataset: Dataset
    format: Format
    precision: Precision
    name: str
    metric: str
    margin: float
    progress: Progress

    @property
    def preprocessing(self) -> Preprocessing:
        assert self.record.preprocessing is not None
        return self.record.preprocessing

    @property
    def target(self) -> Path:
        return self.root.bundles / self.name

    @property
    def exports(self) -> Path:
        """Return the folder of what the making of the bundle left, beside the run: it names samples."""
        return exports_folder(self.run, self.format, self.precision)

    def step(self, what: str) -> Callable[[int, int], None]:
        """Return a callback that shows one step of the work."""
        return lambda done, total: self.progress(what, done, total)


def exports_folder(run: Run, form: str, precision: str) -> Path:
    """Return where a run keeps the artefact's `predictions-val.npz` and `parity.json`."""
    return run.path / "exports" / f"{form}-{precision}"


def export(
    run: Run | str | HasRun,
    root: Home | None = None,
    *,
    format: Format | None = None,  # noqa: A002
    precision: Precision | None = None,
    margin: float | None = None,
    metric: str | None = None,
    name: str | None = None,
    replace: bool = False,
    progress: Progress | None = None,
    on_note: Note | None = None,
) -> Bundle:
    """Return the bundle of a finished run, written below `models/bundles/` once it has passed the parity gate.

    The gate asks network and bundle about every val image (`zoo.deployment.parity.judge`): float32 must give the same
    labels, other precisions may change `metric` by `margin` at the worse end of its paired interval. Test is never
    scored. The same run gives the same bytes; a bundle that is there already stays where they are the same, and is
    replaced whole where not; one of another run, format or precision only with `replace`. margin: 0.01, one point, and
    metric: top1, where left out; of a choice of `zoo.pick` whose format and precision are left out, those that its
    bundle was judged by. name: of the bundle, else `<run>--<format>-<precision>`. progress: called with a step's name,
    and what is done and in all. on_note: called with what is worth saying. The class of the healthy is the one that
    the dataset names now, whatever it was when the run was trained.

    Raises ZooError where the run did not finish, its dataset is gone or was split anew, an image is gone or changed,
    the network cannot be exported, the gate fails, a package is missing, or the disk is full; nothing half-written
    stays, and an older bundle of that name stays as it was.
    """
    root, say = root or home(), on_note or (lambda _: None)
    own = _bundle_of(run) if format is None and precision is None else None
    format, precision = _kind_of(own, format, precision)  # noqa: A001
    metric, margin = _gate_of(own, metric, margin)
    run = find_run(run, root) if isinstance(run, str) else run if isinstance(run, Run) else _run_of(run)
    record = finished_record(run)
    usual = own.name if own else f"{run.name}--{format}-{precision}"
    bundle_name = check_name(name, "bundle") if name is not None else usual
    dataset = _dataset(run, record, root)
    record = _healthy_as_now(record, dataset, say)
    shown = progress or (lambda *_: None)
    job = _Job(run, record, root, dataset, format, precision, bundle_name, metric, margin, shown)
    if not replace:
        _check_target(job)
    set_threads()
    with Interruption() as interruption, making(root, job.name), staged(root, job.name) as folder:
        if not replace:
            _check_target(job)  # again: another may have come first
        verdict, predictions = _make(job, folder, say)
        bundle = open_bundle(folder)
        if same_bundle(job.target, folder):
            say(f"bundle {job.name!r} is there already, with the same content")
            _write_proof(job, bundle, verdict, predictions)
            return open_bundle(job.target)
        with interruption.step():
            _write_proof(job, bundle, verdict, predictions)
            put_in_place(folder, job.target)
        interruption.check()
    return open_bundle(job.target)


def _kind_of(own: Bundle | None, form: Format | None, precision: Precision | None) -> tuple[Format, Precision]:
    """Return format and precision: what was asked, else those of the bundle that was chosen, else ONNX in float32."""
    form = form or (own.record.format if own else "onnx")
    precision = precision or (own.record.precision if own else "float32")
    _check_kind(form, precision)
    return form, precision


def _gate_of(own: Bundle | None, metric: str | None, margin: float | None) -> tuple[str, float]:
    """Return metric and margin of the gate: what was asked, else those that the chosen bundle was judged by."""
    judged = own.record.parity if own else {}
    margin = float(judged.get("margin", MARGIN)) if margin is None else margin
    metric = metric or str(judged.get("metric", "top1"))
    check_gate(metric, margin)
    return metric, margin


def _run_of(source: Any) -> Run:
    found = getattr(source, "run", None)
    if not isinstance(found, Run):
        raise ZooError(f"export takes a run, its name, or a choice of pick. Got {type(source).__name__}")
    return found


def _bundle_of(source: Any) -> Bundle | None:
    """Return the bundle that a choice of `zoo.pick` is of."""
    found = getattr(source, "bundle", None)
    return found if isinstance(found, Bundle) else None


def _check_kind(form: str, precision: str) -> None:
    for what, value, allowed in (("format", form, FORMATS), ("precision", precision, PRECISIONS)):
        if value not in allowed:
            raise ZooError(
                f"{what} must be one of {', '.join(allowed)}. Got {one_line(value)!r}{nearest(str(value), allowed)}"
            )
    if (form, precision) == ("onnx", "bf16"):
        raise ZooError(
            "ONNX Runtime computes no bf16 on a CPU. Got format onnx with precision bf16; take format openvino, or fp16"
        )


def _check_target(job: _Job) -> None:
    """Refuse to put a bundle in the place of another run's, or of another kind of this run's."""
    try:
        there = read_record(job.target)
    except (ZooError, OSError):
        return  # nothing, or nothing whole
    own, other = (job.run.name, job.format, job.precision), (there.run, there.format, there.precision)
    if own != other:
        raise ZooError(
            f"bundle {job.name!r} is there already, of run {one_line(there.run)!r} as {there.format} in "
            f"{there.precision}; take another --name, or --replace it"
        )


def class_fault(run: Run, dataset: Dataset) -> str | None:
    """Return why a run's outputs are not the dataset's classes, in order, and what mends it; None where they are."""
    classes = run.record.classes
    if dataset.classes == classes:
        return None
    return (
        f"the classes of {dataset.name!r} stand in another order, or are others, than when run {run.name!r} was "
        f"trained: {one_line(', '.join(dataset.classes), 100)}, then {one_line(', '.join(classes), 100)}; "
        "set the old ones in dataset.toml, or delete the run's folder and train it again"
    )


def healthy_fault(classes: list[str], then: str | None, now: str | None) -> str | None:
    """Return in words that another class is the healthy one than was then; None where it is the same."""
    unnamed = negative_index(classes, None)
    usual = None if unnamed is None else classes[unnamed]
    one, two = (usual if each is None else each for each in (then, now))
    said, is_now = ("none" if each is None else repr(one_line(each, 60)) for each in (one, two))
    return None if one == two else f"the class of the healthy was {said}, and is now {is_now} in dataset.toml"


def _healthy_as_now(record: RunRecord, dataset: Dataset, say: Note) -> RunRecord:
    """Return the record with the class of the healthy that users act on; training did not depend on it."""
    changed = healthy_fault(record.classes, record.negative_class, dataset.negative_class)
    if changed is not None:
        say(f"when the run was trained, {changed}: rules and scores go by the present one")
    return record.model_copy(update={"negative_class": dataset.negative_class})


def _dataset(run: Run, record: RunRecord, root: Home) -> Dataset:
    """Return the dataset of a run; raises ZooError unless it is the one that the run was trained on."""
    dataset = load_dataset(record.dataset, root, make_builtin=False)
    if dataset.split_digest != record.split_digest:
        raise ZooError(
            f"run {run.name!r} was trained on another split of {dataset.name!r} ({record.split_digest[:8]}, now "
            f"{dataset.split_digest[:8]}), so that its val images cannot judge the export; train it again"
        )
    if fault := class_fault(run, dataset):
        raise ZooError(fault)
    return dataset


# The work ---------------------------------------------------------------------------------------------------------


def _make(job: _Job, folder: Path, say: Note) -> tuple[dict[str, Any], Predictions]:
    """Put a bundle together in a folder and judge it; return the verdict and the artefact's predictions on val."""
    pixels = open_pixels(job.dataset, "val", job.preprocessing, job.record.bad_images, job.step("decoding"))
    model = load_model(job.run, job.root, "cpu")
    exporter, mapped = _write_model(job, model, folder, pixels)
    (folder / SAMPLE).write_bytes(sample_png())
    (folder / CARD).write_text(f"# {job.name}\n", encoding="utf-8")
    record = seal(folder, _record(job, folder, exporter, mapped))
    staged = open_bundle(folder)
    artefact = artefact_predictions(staged, job.record.classes, pixels, job.step("asking the artefact"))
    reference = reference_predictions(model, job.record, pixels, job.step("asking the network"))
    verdict = judge(
        reference,
        artefact,
        job.precision,
        metric=job.metric,
        margin=job.margin,
        classes=job.record.classes,
        negative_class=job.record.negative_class,
    )
    verdict["recorded"] = against_recorded(job.run, reference, job.record.precision)
    if not verdict["passed"]:
        raise ZooError(
            f"{job.name!r} is not written, for it is not the network that was trained: {verdict['reason']}; "
            + _remedy(job.precision)
        )
    _describe(job, folder, record.model_copy(update={"parity": verdict}), artefact)
    return verdict, artefact


def _describe(job: _Job, folder: Path, record: BundleRecord, artefact: Predictions) -> None:
    """Add rules, scores and the card, all of val and of what was scored on test before; then seal the folder."""
    test = predictions_of(job.run, "test") if job.run.scored("test") else None
    record = record.model_copy(
        update={
            "rules": fit_rules(artefact, job.record.classes, job.record.negative_class),
            "val": scores(artefact, job.record),
            "test": scores(test, job.record) if test is not None else None,
        }
    )
    facts = gather_facts(record, job.record, job.dataset, artefact, test, job.root)
    (folder / CARD).write_text(card_text(record, facts), encoding="utf-8")
    seal(folder, record)


def _remedy(precision: str) -> str:
    if precision == "float32":
        return "this should never be: export again, and report it where it stays"
    return "take float32, allow more with --margin, or give val more images"


def _write_model(job: _Job, model: Any, folder: Path, pixels: Pixels) -> tuple[dict[str, Any], bool]:
    onnx_file = folder / MODEL_FILES["onnx"][0]
    job.progress("exporting", 0, 1)
    facts, mapped = write_onnx(model, job.preprocessing.image_size, onnx_file)
    facts |= _as_asked(job, onnx_file, folder, pixels)
    job.progress("exporting", 1, 1)
    return facts, mapped


def _as_asked(job: _Job, onnx_file: Path, folder: Path, pixels: Pixels) -> dict[str, Any]:
    """Make a float32 ONNX file what was asked for, and return how."""
    onnx, eight_bits = job.format == "onnx", job.precision == "int8"
    if onnx and job.precision == "float32":
        return {}
    if onnx and job.precision == "fp16":
        return half_onnx(onnx_file)
    calibration = Calibration(pixels, job.preprocessing)
    if onnx:
        return int8_onnx(onnx_file, calibration)
    if eight_bits:
        facts = int8_openvino(onnx_file, folder, calibration)
    else:  # bf16 is what the runtime is asked to compute in; the file keeps float32
        facts = write_openvino(onnx_file, folder, half=job.precision == "fp16")
    onnx_file.unlink()
    return facts


def _record(job: _Job, folder: Path, exporter: dict[str, Any], mapped: bool) -> BundleRecord:
    kept = {key: getattr(job.record, key) for key in ("dataset", "recipe", "seed", "model", "params")}
    session = Session(folder / MODEL_FILES[job.format][0], job.format, job.precision)
    pixels = _pixels(sample_png(), job.preprocessing)
    logits = session(normalise(pixels[None], job.preprocessing))[0][0]
    return BundleRecord(
        name=job.name,
        run=job.run.name,
        **kept,
        weights=weights_told(job.record),
        classes=job.record.classes,
        negative_class=job.record.negative_class,
        medical=job.dataset.facts.get("medical") is True,
        preprocessing=job.preprocessing,
        tta=job.record.tta,
        format=job.format,
        precision=job.precision,
        activation_map=mapped,
        exporter=exporter,
        split_digest=job.record.split_digest,
        weights_sha256=job.record.weights_sha256,
        sample=Sample(logits=logits.tolist(), tolerance=_TOLERANCE[job.precision]),
        files={},
    )


def _pixels(data: bytes, preprocessing: Preprocessing) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return center_crop(prepare(data, preprocessing), preprocessing.image_size)


def scores(predictions: Predictions, record: RunRecord) -> dict[str, Any]:
    """Return the metrics of predictions, each with `<metric>_ci` [low, high] over groups, None where undefined."""
    metrics = compute_metrics(predictions, record.classes, record.negative_class)
    names = affordable_metrics(len(predictions.y_true), len(record.classes), 1)
    negative = negative_index(record.classes, record.negative_class)
    found = metric_intervals({"": [predictions]}, names, negative=negative)
    ends = {name: found[name][""] for name in names}
    cis = {f"{name}_ci": [each.low, each.high] if each is not None else None for name, each in ends.items()}
    return {**metrics, **cis}


def sample_png() -> bytes:
    """Return the bundle's sample: a drawn picture, for no patient's image should travel with a model."""
    y, x = np.mgrid[0:288, 0:352].astype(np.float64)
    waves = [np.sin(x / a + y / b) for a, b in ((23, 61), (47, -29), (-17, 83))]
    noise = np.random.default_rng(0).normal(0, 12, (288, 352, 3))
    pixels = np.clip(np.stack(waves, axis=2) * 90 + 128 + noise, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _write_proof(job: _Job, bundle: Bundle, verdict: dict[str, Any], predictions: Predictions) -> None:
    """Keep beside the run what names samples: the artefact's logits on val, and the verdict on files of a digest."""
    write_predictions(job.exports / "predictions-val.npz", predictions)
    digest = subject_of(bundle).digest
    write_json(job.exports / "parity.json", {"bundle": job.name, "digest": digest, **verdict})
