"""Predicting new images with a bundle or a run: the same decoding and preprocessing as in training.

Nothing here imports torch before a run is opened: a bundle needs its runtime, numpy and Pillow alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from zoo.data.decode import MAX_PIXELS, BadImage, decode, resize
from zoo.data.transforms import center_crop, normalise
from zoo.data.views import mean_logits, views_of
from zoo.data.window import windowing_of
from zoo.deployment.answers import UNREADABLE, Answer, answers_of
from zoo.deployment.bundle import RECORD, SAMPLE, Bundle, Rules, find_bundle, list_bundles, open_bundle
from zoo.deployment.images import Source, find_images, read_image
from zoo.deployment.runtime import Session, cores
from zoo.errors import ZooError, nearest, one_line
from zoo.evaluation.overlay import heat_of, overlay
from zoo.files import Home, atomic_writer, check_writable, home, user_path
from zoo.runs import Preprocessing, Run, find_run, list_runs

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


class Network(Protocol):
    """uint8 images (B, S, S, 3) in, logits (B, C) out and, where it explains, class maps (B, C, h, w)."""

    @property
    def explains(self) -> bool:
        """Return whether calls give class maps."""
        ...

    @property
    def threads(self) -> int:
        """Return the cores of one call."""
        ...

    def __call__(self, batch: Pixels) -> tuple[Floats, Floats | None]:
        """Return float32 logits and class maps, None where it gives none."""
        ...

    def heat(self, batch: Pixels) -> Floats:
        """Return where evidence for each predicted class was found: (B, h, w) in [0, 1]."""
        ...


class BundleNetwork:
    """A bundle's network, computed by its runtime."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        record = bundle.record
        self.name, self.preprocessing, self.explains = bundle.name, record.preprocessing, record.activation_map
        self.session = Session(bundle.model_file, record.format, record.precision, threads)
        self.threads = self.session.threads

    def __call__(self, batch: Pixels) -> tuple[Floats, Floats | None]:
        """Return float32 logits (B, C) and class maps (B, C, h, w), None where the network has none."""
        return self.session(normalise(batch, self.preprocessing))

    def heat(self, batch: Pixels) -> Floats:
        """Return each predicted class's map (B, h, w), in [0, 1]; raises ZooError where the bundle has none."""
        logits, maps = self(batch)
        if maps is None:
            raise ZooError(
                f"bundle {one_line(self.name)!r} gives no class maps, as its network does not end in pooling and one "
                "linear layer; explain its run"
            )
        return heat_of(maps[np.arange(len(maps)), logits.argmax(axis=1)])


@dataclass(frozen=True)
class Prediction:
    """What a network says of one image (`Answer`), or the reason why there is no answer: then it is referred."""

    path: str
    label: str | None
    scores: dict[str, float]
    refer: bool
    error: str | None
    explanation: str | None = None
    prediction_set: tuple[str, ...] = ()
    refer_reason: str | None = None
    points: dict[str, bool] | None = None

    def row(self, explained: bool = False) -> dict[str, Any]:
        """Return the prediction as one line of JSON has it; `explanation` is in it where one was asked for."""
        found: dict[str, Any] = {
            "path": self.path,
            "label": self.label,
            "scores": self.scores,
            "prediction_set": list(self.prediction_set),
            "refer": self.refer,
            "refer_reason": self.refer_reason,
            "points": self.points,
            "error": self.error,
        }
        return {**found, "explanation": self.explanation} if explained else found


class Predictor:
    """A network together with the preprocessing, the class names and the rules that belong to it.

    tta: the views of an image that scores are the mean of (`zoo.data.views`), as the run was scored. bundle: None for
    a run. Its methods may be called from several threads.
    """

    def __init__(
        self,
        network: Network,
        preprocessing: Preprocessing,
        classes: Sequence[str],
        rules: Rules | None = None,
        tta: str = "none",
        negative_class: str | None = None,
        bundle: Bundle | None = None,
    ) -> None:
        self.network, self.preprocessing, self.classes = network, preprocessing, list(classes)
        self.rules, self.tta, self.negative_class, self.bundle = rules or Rules(), tta, negative_class, bundle
        self._windowing = windowing_of(preprocessing)

    @classmethod
    def load(
        cls,
        source: Bundle | Run | str | os.PathLike[str],
        root: Home | None = None,
        device: str = "auto",
        threads: int | None = None,
    ) -> Predictor:
        """Return the predictor of a bundle or a finished run, given itself, by name, or by its folder.

        device: of a run's network; a bundle's is the CPU. threads: cores of one call, all that this process may use
        where left out. A bundle's files are verified, and its sample must give the logits that stand beside it.

        Raises ZooError where there is neither, a bundle is refused or computes otherwise here, its runtime is not
        installed, or a run did not finish.
        """
        if threads is not None and threads < 1:
            raise ZooError(f"threads must be 1 or more. Got {threads}; leave it out for all {cores()}")
        found = source if isinstance(source, (Bundle, Run)) else _find(source, root or home())
        if isinstance(found, Run):
            from zoo.deployment.run_network import open_run, rules_of_run

            network, run = open_run(found, root, device, threads)
            assert run.preprocessing is not None
            rules = rules_of_run(found, run)
            return cls(network, run.preprocessing, run.classes, rules, run.tta, run.negative_class)
        if device not in ("auto", "cpu"):
            raise ZooError(f"a bundle is computed by the CPU. Got device {one_line(device, 60)!r}; leave it out")
        record = found.record
        computed = BundleNetwork(found, threads)
        predictor = cls(
            computed, record.preprocessing, record.classes, record.rules, record.tta, record.negative_class, found
        )
        predictor._check_sample(found, computed.session.runtime)
        return predictor

    @property
    def explains(self) -> bool:
        """Return whether `logits` gives class maps too; `explain` may work without them, by gradients of a run."""
        return self.network.explains

    def _check_sample(self, bundle: Bundle, runtime: str) -> None:
        """Raise ZooError unless the network says of the bundle's sample what it said when it was exported."""
        sample = bundle.record.sample
        expected = np.asarray(sample.logits)
        pixels = self.pixels((bundle.path / SAMPLE).read_bytes())
        try:
            logits = self.network(pixels[None])[0][0]
        except Exception as error:  # each runtime has kinds of its own
            raise ZooError(
                f"bundle {one_line(bundle.name)!r} is refused: its network cannot be computed by {runtime}: "
                f"{one_line(error, 160)}; export it again"
            ) from error
        if not logits.shape == expected.shape == (len(self.classes),):
            raise ZooError(
                f"bundle {one_line(bundle.name)!r} is refused: it names {len(self.classes)} classes and its network "
                f"gives {logits.size} logits; export it again"
            )
        apart, greatest = float(np.abs(logits - expected).max()), max(1.0, float(np.abs(expected).max()))
        if not apart <= sample.tolerance * greatest:  # not-a-number is wrong too
            raise ZooError(
                f"bundle {one_line(bundle.name)!r} is refused: of its own sample {runtime} computes logits that are "
                f"{apart:.3g} off here, more than {sample.tolerance * greatest:.3g}; export its run again on this "
                "machine, or install the runtime that it was made with"
            )

    def prepare(self, data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
        """Return an encoded image decoded and resized: uint8 (H, W, 3), its shorter side preprocessing.resize_size.

        Raises BadImage where it cannot be decoded or has more than `max_pixels`.
        """
        decoded = decode(data, self._windowing, max_pixels=max_pixels)
        return resize(decoded, self.preprocessing.resize_size, self.preprocessing.interpolation)

    def pixels(self, data: bytes) -> Pixels:
        """Return the network's view of an encoded image: uint8 (size, size, 3); raises BadImage as `prepare`."""
        return center_crop(self.prepare(data), self.preprocessing.image_size)

    def logits(self, images: Sequence[Pixels]) -> tuple[Floats, Floats | None]:
        """Return float32 logits (B, C) of prepared images over all their views, and the class maps (B, C, h, w).

        images: uint8 (H, W, 3) as `prepare` gives them, of any shapes. Maps are of the plain centre view; None where
        the network gives none.
        """
        views = zip(*(views_of(image, self.preprocessing, self.tta) for image in images), strict=True)
        found = [self.network(np.stack(view)) for view in views]
        return mean_logits(np.stack([logits for logits, _ in found])), found[0][1]

    def answers(self, logits: Floats) -> list[Answer]:
        """Return what the rules make of logits (B, C); raises ZooError where one is not finite."""
        return answers_of(logits, self.classes, self.rules, self.negative_class)

    def explain(self, batch: Pixels) -> Pixels:
        """Return where the network looked for the class it predicts: uint8 (B, size, 2 x size, 3).

        batch: uint8 (B, size, size, 3), as `pixels` gives them; they stand at the left of their maps. Of a bundle it is
        the class activation map (arXiv 1512.04150), of a run Grad-CAM (1610.02391). Raises ZooError where the network
        keeps no map of its image.
        """
        heat = self.network.heat(batch)
        looked = np.stack([overlay(image, each) for image, each in zip(batch, heat, strict=True)])
        return np.concatenate([batch, looked], axis=2)

    def predict(
        self,
        paths: Iterable[str | os.PathLike[str]],
        batch_size: int = 32,
        explain: str | os.PathLike[str] | None = None,
    ) -> list[Prediction]:
        """Return one prediction for each image that paths mean (`find_images`). Bad files are rows with a reason.

        explain: a folder for one PNG per image that shows where the network looked. Raises ZooError where a path is not
        there, a folder holds no image, the folder cannot be written, or the network keeps no map of its image.
        """
        return list(self.stream(find_images(paths), batch_size, explain))

    def stream(
        self, files: Iterable[Source], batch_size: int = 32, explain: str | os.PathLike[str] | None = None
    ) -> Iterator[Prediction]:
        """Yield the predictions of images in order, a batch at a time; explain as in `predict`."""
        folder = None
        if explain is not None:
            if not os.fspath(explain):
                raise ZooError("explain needs a folder for its pictures. Got an empty name")
            folder = user_path(explain)
            check_writable(folder)
        numbered = enumerate(files)
        pool = ThreadPoolExecutor(max(1, min(batch_size, cores())), "zoo-decode")
        try:
            while batch := list(islice(numbered, batch_size)):
                yield from self._batch(batch, folder, pool)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _prepared(self, source: Source) -> Pixels | str:
        try:
            return self.prepare(read_image(source))
        except BadImage as error:
            return str(error)

    def _batch(
        self, numbered: list[tuple[int, Source]], folder: Path | None, pool: ThreadPoolExecutor
    ) -> Iterator[Prediction]:
        prepared = list(pool.map(self._prepared, [source for _, source in numbered]))
        images = {place: each for place, each in enumerate(prepared) if not isinstance(each, str)}
        errors = {place: each for place, each in enumerate(prepared) if isinstance(each, str)}
        answers: dict[int, Answer] = {}
        if images:
            logits = self.logits(list(images.values()))[0]
            finite = np.asarray(np.isfinite(logits).all(axis=1))
            kept = [place for place, fine in zip(images, finite, strict=True) if fine]
            answers = dict(zip(kept, self.answers(logits[finite]), strict=True))
            errors |= {place: "the network gives no finite score" for place in images if place not in answers}
        shown = {}
        if folder is not None and answers:
            shown = self._write_explanations({place: images[place] for place in answers}, numbered, folder)
        for place, (_, source) in enumerate(numbered):
            if place in errors:
                reason = UNREADABLE if isinstance(prepared[place], str) else errors[place]
                yield Prediction(str(source), None, {}, True, errors[place], refer_reason=reason)
            else:
                yield _prediction(str(source), answers[place], shown.get(place))

    def _write_explanations(
        self, images: dict[int, Pixels], numbered: list[tuple[int, Source]], folder: Path
    ) -> dict[int, str]:
        """Write a picture for each image and return the files; a number before the name keeps two of one name apart."""
        size = self.preprocessing.image_size
        batch = np.stack([center_crop(image, size) for image in images.values()])
        found: dict[int, str] = {}
        for place, picture in zip(images, self.explain(batch), strict=True):
            number, source = numbered[place]
            stem = source.stem if isinstance(source, Path) else "image"
            name = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)[:60]
            target = folder / f"{number:05d}-{name}.png"
            with atomic_writer(target) as stream:
                Image.fromarray(picture).save(stream, "PNG")
            found[place] = str(target)
        return found


def _prediction(path: str, answer: Answer, explanation: str | None) -> Prediction:
    return Prediction(
        path=path,
        label=answer.label,
        scores=answer.scores,
        refer=answer.refer,
        error=None,
        explanation=explanation,
        prediction_set=tuple(answer.prediction_set),
        refer_reason=answer.refer_reason,
        points=answer.points,
    )


def _find(source: str | os.PathLike[str], root: Home) -> Bundle | Run:
    """Return the bundle, else the run, of a name below the home or of a folder; raises ZooError for neither."""
    text = os.fspath(source)
    try:
        folder = find_bundle(text, root)
    except ZooError:
        folder = None
    if folder is not None:
        return open_bundle(folder, root)
    try:
        return find_run(text, root)
    except ZooError:
        bundles, runs = list_bundles(root), [run.name for run in list_runs(root)]
        raise ZooError(
            f"there is no bundle or run {one_line(text)!r}{nearest(text, [*bundles, *runs])}; `zoo list bundles` shows "
            f"all {len(bundles)}, `zoo list runs` all {len(runs)}, and a folder is known by its {RECORD} or run.json"
        ) from None
