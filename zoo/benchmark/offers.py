"""What runs offer to deploy: of each recipe the best seed, exported, with what the artefact says of val."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.data.cache import open_pixels
from zoo.data.manifest import Dataset
from zoo.deployment.bundle import Bundle, BundleRecord, list_bundles, open_bundle, read_record
from zoo.deployment.export import class_fault, export, exports_folder, healthy_fault, scores
from zoo.deployment.parity import artefact_predictions
from zoo.deployment.speed import subject_of
from zoo.errors import Interrupted, ZooError, one_line
from zoo.evaluation.calibration import apply_temperature, fit_temperature
from zoo.evaluation.ledger import record_look
from zoo.evaluation.metrics import compute_metrics, score
from zoo.evaluation.predictions import Predictions, read_predictions, write_predictions
from zoo.evaluation.resampling import METRICS
from zoo.files import Home, read_json, write_json
from zoo.runs import Run
from zoo.training.scoring import predictions_of

Progress = Callable[[str, int, int], None]
OF_SCORES = (
    "auroc",
    "auprc",
    "log_loss",
    "brier",
    "ece",
)  # a temperature changes them; auroc, auprc of three classes on


@dataclass(frozen=True, eq=False)
class Offer:
    """A bundle that could be deployed, or the reason why there is none.

    network: the same for float32 bundles of one run. predictions, val: the artefact's answers on val, hence with its
    logits divided by the bundle's temperature, and their metrics.
    """

    name: str
    run: Run
    bundle: Bundle | None = None
    network: str = ""
    predictions: Predictions | None = None
    val: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def set_apart(runs: Sequence[Run], dataset: Dataset) -> tuple[list[Run], list[Offer]]:
    """Return the runs whose outputs are the dataset's classes, in order, and an offer with its reason for each other.

    Of the others the logits stand in another order than the labels. Raises ZooError where no run is left.
    """
    alike, apart = [], []
    for run in runs:
        fault = class_fault(run, dataset)
        if fault is None:
            alike.append(run)
        else:
            apart.append(Offer(run.name, run, reason=fault, facts=_facts_of_run(run)))
    if apart and not alike:
        raise ZooError(f"there is no run to pick from, of {len(apart)}: {apart[0].reason}")
    return alike, apart


def best_seeds(runs: Sequence[Run], metric: str, dataset: Dataset) -> tuple[list[Run], list[Offer], list[str]]:
    """Return for each recipe the run that is best on val among its seeds, and notes that say so.

    A run whose val metrics cannot be read offers nothing, with its reason.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    broken, said = [], {}
    for run in runs:
        record = run.record
        try:
            said[run.name] = _val_metrics(run, dataset, metric)
        except ZooError as error:
            broken.append(Offer(run.name, run, reason=one_line(error), facts=_facts_of_run(run)))
            continue
        groups.setdefault((record.recipe, record.recipe_digest), []).append(run)
    chosen, notes = [], []
    for (recipe, _), group in sorted(groups.items()):
        best = min(group, key=lambda run: (-score(metric, said[run.name]), run.record.seed, run.name))
        chosen.append(best)
        if len(group) > 1:
            notes.append(f"of {recipe}, seed {best.record.seed} stands for {len(group)} seeds: the best of them on val")
    return chosen, broken, notes


def _val_metrics(run: Run, dataset: Dataset, metric: str) -> dict[str, Any]:
    """Return a run's metrics on val, anew where another class is healthy now than when it was trained.

    Where scores are what is ranked, they are those that its bundle would give, at a temperature fitted on val.
    """
    if run.record.negative_class == dataset.negative_class and metric not in OF_SCORES:
        return run.metrics("val")
    said = predictions_of(run, "val")
    if metric in OF_SCORES:
        said = apply_temperature(said, fit_temperature(said))
    return compute_metrics(said, run.record.classes, dataset.negative_class)


def without_run(failed: Sequence[Run], known: set[str]) -> list[Offer]:
    """Return an offer with its reason for each recipe that has failed runs and no other."""
    found = {}
    for run in failed:
        record = run.record
        if record.recipe not in known:
            reason = f"the run failed: {one_line(record.reason or 'no reason is known')}"
            found[record.recipe] = Offer(run.name, run, reason=reason, facts=_facts_of_run(run))
    return list(found.values())


def gather(
    chosen: Sequence[Run], runs: Sequence[Run], dataset: Dataset, root: Home, progress: Progress
) -> tuple[list[Offer], list[str]]:
    """Return what the chosen runs offer: their bundles, and one in ONNX float32 made where there is none; and notes.

    A bundle under the usual name that is of other weights, or of another class of the healthy, is made anew. What
    cannot be exported, opened or scored is an offer with a reason.
    """
    found, passed_over = _bundles_of(chosen, runs, root)
    offers, notes = [], []
    for place, run in enumerate(chosen):
        progress("exporting", place, len(chosen))
        plain, names = f"{run.name}--onnx-float32", set(found[run.name])
        stale = _stale(read_record(root.bundles / plain), run, dataset) if plain in names else None
        if stale or plain not in names:
            reason = _export(run, root)
            if reason is None:
                names.add(plain)
                notes += [f"{one_line(plain)} was exported anew: {stale}"] if stale else []
            else:
                names.discard(plain)
                offers.append(Offer(plain, run, reason=f"it could not be exported: {reason}", facts=_facts_of_run(run)))
        offers += [_offer(name, run, dataset, root) for name in sorted(names)]
    progress("exporting", len(chosen), len(chosen))
    left = f"{passed_over} bundle{'s' if passed_over != 1 else ''} of other seeds passed over"
    return offers, [*notes, *([left] if passed_over else [])]


def _bundles_of(chosen: Sequence[Run], runs: Sequence[Run], root: Home) -> tuple[dict[str, list[str]], int]:
    """Return each chosen run's bundles, and how many there are of the other runs."""
    found: dict[str, list[str]] = {run.name: [] for run in chosen}
    others, passed_over = {run.name for run in runs} - set(found), 0
    for name in list_bundles(root):
        try:
            own = read_record(root.bundles / name).run
        except (ZooError, OSError):
            continue  # `zoo list bundles` names it
        if own in found:
            found[own].append(name)
        passed_over += own in others
    return found, passed_over


def _stale(record: BundleRecord, run: Run, dataset: Dataset) -> str | None:
    """Return why a bundle does not hold any more, or None: its rules would be about another class than its scores."""
    if record.weights_sha256 != run.record.weights_sha256:
        return "it is of other weights than the run has now"
    return healthy_fault(run.record.classes, record.negative_class, dataset.negative_class)


def _export(run: Run, root: Home) -> str | None:
    """Export a run as ONNX in float32; return why it cannot be, or None."""
    try:
        export(run, root)
    except Interrupted:
        raise
    except ZooError as error:
        return one_line(error)
    return None


def _facts_of_run(run: Run) -> dict[str, Any]:
    record = run.record
    return {"recipe": record.recipe, "seed": record.seed, "model": record.model, "params": record.params}


def _offer(name: str, run: Run, dataset: Dataset, root: Home) -> Offer:
    facts = _facts_of_run(run)
    try:
        bundle = open_bundle(name, root)
        record = bundle.record
        facts |= {"format": record.format, "precision": record.precision}
        if stale := _stale(record, run, dataset):
            raise ZooError(f"{stale}; export it again")
        predictions = apply_temperature(_val_predictions(bundle, run, dataset), record.rules.temperature)
        val = compute_metrics(predictions, run.record.classes, dataset.negative_class)
    except Interrupted:
        raise
    except ZooError as error:
        return Offer(name, run, reason=one_line(error), facts=facts)
    network = f"{record.run} {record.tta} {record.precision if record.precision != 'float32' else ''}"
    if record.precision != "float32":
        network += name  # each is a network of its own
    facts["val"] = {metric: val.get(metric) for metric in METRICS}
    return Offer(name, run, bundle, network, predictions, val, None, facts)


def _val_predictions(bundle: Bundle, run: Run, dataset: Dataset) -> Predictions:
    """Return what the artefact says of val: as kept when it was exported, if it was this one, else asked again."""
    folder = exports_folder(run, bundle.record.format, bundle.record.precision)
    try:
        if read_json(folder / "parity.json").get("digest") == subject_of(bundle).digest:
            return read_predictions(folder / "predictions-val.npz")
    except ZooError:
        pass  # no proof of this bundle is here
    return _ask(bundle, run, dataset, "val")


def _ask(
    bundle: Bundle,
    run: Run,
    dataset: Dataset,
    split: str,
    progress: Callable[[int, int], None] | None = None,
    before: Callable[[], None] = lambda: None,
) -> Predictions:
    """Return what the artefact says of a split; `before` is called once its images can be read."""
    record = run.record
    assert record.preprocessing is not None
    pixels = open_pixels(dataset, split, record.preprocessing, record.bad_images)
    before()
    return artefact_predictions(bundle, record.classes, pixels, progress)


def score_test(
    offer: Offer, dataset: Dataset, root: Home, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Return the artefact's scores on test, each with `<metric>_ci`; `images`, `groups` and `first_look` beside them.

    They are of its answers, hence of the logits divided by the bundle's temperature; what is kept are the logits. A run
    that was scored on test in float32 said what its float32 artefact says, label for label on val: its predictions are
    taken, and test is not looked at again. Else test is scored once for each artefact, and the ledger is told before;
    what was found is kept beside the run.
    """
    bundle, run = offer.bundle, offer.run
    assert bundle is not None
    folder = exports_folder(run, bundle.record.format, bundle.record.precision)
    file, proof = folder / "predictions-test.npz", folder / "test.json"
    digest = subject_of(bundle).digest
    predictions = _kept_test(file, proof, digest) or _of_the_run(offer)
    first = predictions is None
    if predictions is None:
        predictions = _ask(bundle, run, dataset, "test", progress, lambda: record_look(root, run.record))
        write_predictions(file, predictions)
        write_json(proof, {"bundle": bundle.name, "digest": digest})
    groups = int(predictions.group_codes.max()) + 1 if len(predictions.y_true) else 0
    counts = {"images": len(predictions.y_true), "groups": groups, "first_look": first}
    record = run.record.model_copy(update={"negative_class": dataset.negative_class})
    answers = apply_temperature(predictions, bundle.record.rules.temperature)
    return {**counts, **scores(answers, record)}


def _of_the_run(offer: Offer) -> Predictions | None:
    """Return the test predictions that a float32 run left, where the artefact is float32 too."""
    record, run = offer.run.record, offer.run
    assert offer.bundle is not None
    alike = offer.bundle.record.precision == "float32" == record.precision.get("dtype", "float32")
    return read_predictions(run.predictions_file("test")) if alike and run.scored("test") else None


def _kept_test(file: Any, proof: Any, digest: str) -> Predictions | None:
    try:
        return read_predictions(file) if read_json(proof).get("digest") == digest else None
    except ZooError:
        return None
