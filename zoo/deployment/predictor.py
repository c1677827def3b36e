"""Predicting new images with a bundle or a finished run: the same decoding and preprocessing as in training.

Neither torch nor timm is imported here, nor needed for a bundle.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from zoo.cores import cores
from zoo.data.apart import stop_all
from zoo.data.decode import MAX_PIXELS, BadImage, decode, resize
from zoo.data.transforms import center_crop, normalise
from zoo.data.views import views_of
from zoo.data.window import windowing_of
from zoo.deployment.answers import Answer, answers_of, check_sample, heat_of, mean_of_views
from zoo.deployment.bundle import SAMPLE, Bundle, Rules, find_bundle, list_bundles, open_bundle
from zoo.deployment.images import Encoded, Source, bytes_of, find_images, name_of
from zoo.deployment.runtime import Session
from zoo.errors import ZooError, nearest, one_line
from zoo.evaluation.heat import overlay
from zoo.files import Home, atomic_writer, check_writable, home, user_path
from zoo.runs import Preprocessing, Run, find_run, list_runs

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Images = Pixels | Sequence[Pixels]
Floats = np.ndarray[Any, np.dtype[np.float32]]

MAX_THREADS = 1024
_EXPLAINED = 16  # images at once: gradients need more memory than scores


def prepare(data: bytes, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return an encoded image resized, uint8 (H, W, 3); raises BadImage as `zoo.data.decode.decode` does.

    In memory one colour follows the other, as a network wants them: whoever asks the network need not turn them then.
    """
    decoded = decode(data, windowing_of(preprocessing), max_pixels=max_pixels)
    resized = resize(decoded, preprocessing.resize_size, preprocessing.interpolation)
    return np.ascontiguousarray(resized.transpose(2, 0, 1)).transpose(1, 2, 0)


class Network(Protocol):
    """What answers: B uint8 images (S, S, 3) in; logits (B, C) and class maps (B, C, h, w), or None, out."""

    def __call__(self, images: Images) -> tuple[Floats, Floats | None]:
        """Return logits and class maps of images."""
        ...

    def explain(self, batch: Pixels, targets: Sequence[int]) -> Pixels:
        """Return images with where the network looked for each one's class; raises ZooError where nobody can tell."""
        ...


@dataclass(frozen=True)
class Prediction:
    """What is said of one image, or the reason why nothing can be."""

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
            "operating_points": self.points,
            "error": self.error,
        }
        return {**found, "explanation": self.explanation} if explained else found


class BundleNetwork:
    """A bundle's network: exactly the input of training, and a runtime's answer."""

    def __init__(self, session: Session, preprocessing: Preprocessing) -> None:
        self.session, self.preprocessing = session, preprocessing
        self._own = threading.local()  # fresh memory for each call costs a small network a tenth of its time

    def __call__(self, images: Images) -> tuple[Floats, Floats | None]:
        """Return logits (B, C) and class maps (B, C, h, w), or None, of uint8 images (S, S, 3)."""
        height, width, colours = images[0].shape
        kept: Floats | None = getattr(self._own, "values", None)
        if kept is None or len(kept) < len(images) or kept.shape[1:] != (colours, height, width):
            kept = self._own.values = np.empty((len(images), colours, height, width), np.float32)
        try:
            return self.session(normalise(images, self.preprocessing, kept[: len(images)]))
        except Exception:
            self._own.values = None  # a smaller batch that is tried next needs the room
            raise

    def explain(self, batch: Pixels, targets: Sequence[int]) -> Pixels:
        """Return each image with the map of its class of targets; raises ZooError where the network gives no map."""
        _, maps = self(batch)
        if maps is None:
            raise ZooError("this bundle's network gives no map of its image; explain its run, which needs torch")
        heats = heat_of(maps, targets)
        return np.stack([overlay(image, heat) for image, heat in zip(batch, heats, strict=True)])


class Predictor:
    """A network together with the preprocessing, the class names and the rules that belong to it.

    rules: what turns logits into an answer, chosen on val. tta: the views of an image that scores are the mean of
    (`zoo.data.views`), as the run was scored. bundle: where it came from, None for a run. May be called from several
    threads at once.
    """

    def __init__(
        self,
        network: Network,
        preprocessing: Preprocessing,
        classes: Sequence[str],
        rules: Rules | None = None,
        *,
        tta: str = "none",
        negative_class: str | None = None,
        bundle: Bundle | None = None,
    ) -> None:
        self.network, self.preprocessing, self.classes = network, preprocessing, list(classes)
        self.rules, self.tta, self.negative_class, self.bundle = rules or Rules(), tta, negative_class, bundle

    @classmethod
    def load(
        cls,
        source: Bundle | Run | str | os.PathLike[str],
        root: Home | None = None,
        device: str = "auto",
        threads: int | None = None,
    ) -> Predictor:
        """Return the predictor of a bundle or a finished run, given itself, by name, or by its folder.

        device: of a run; bundles run on the CPU. threads: cores of one call, 1 to 1024, all that may be used where left
        out. A bundle is verified first, and its sample must get the answer that it got when it was exported. Raises
        ZooError where there is no such bundle or run, it did not finish or was changed, its runtime is not installed,
        or a bundle is asked for another device.
        """
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise ZooError(f"threads must be 1 to {MAX_THREADS}. Got {threads}; leave it out for all {cores()}")
        found = source if isinstance(source, Bundle | Run) else _find(os.fspath(source), root)
        if isinstance(found, Bundle):
            if device not in ("auto", "cpu"):
                raise ZooError(
                    f"bundles run on the CPU. Got device {one_line(device, 60)!r}; leave it out, or take the run"
                )
            return cls._of_bundle(found, threads)
        from zoo.deployment.run_network import open_run

        network, record, rules = open_run(found, root, device, threads)
        return cls(
            network,
            network.preprocessing,
            record.classes,
            rules,
            tta=record.tta,
            negative_class=record.negative_class,
        )

    @classmethod
    def _of_bundle(cls, bundle: Bundle, threads: int | None) -> Predictor:
        record = bundle.record
        session = Session(bundle.model_file, record.format, record.precision, threads)
        network = BundleNetwork(session, record.preprocessing)
        found = cls(
            network,
            record.preprocessing,
            record.classes,
            record.rules,
            tta=record.tta,
            negative_class=record.negative_class,
            bundle=bundle,
        )
        sample = found.pixels((bundle.path / SAMPLE).read_bytes())
        try:
            logits = network(sample[None])[0][0]
        except Exception as error:  # each runtime has kinds of its own
            raise ZooError(
                f"bundle {one_line(bundle.name)!r} is refused: {session.runtime} cannot compute its network: "
                f"{one_line(error, 160)}; export it again"
            ) from error
        if len(record.classes) != logits.size:
            raise ZooError(
                f"bundle {one_line(bundle.name)!r} is refused: it names {len(record.classes)} classes and its network "
                f"gives {logits.size} logits; export it again"
            )
        check_sample(logits, record.sample.logits, record.sample.tolerance, bundle.name)
        return found

    @property
    def explains(self) -> bool:
        """Return whether answers come with class maps."""
        return self.bundle is not None and self.bundle.record.activation_map

    def prepare(self, data: bytes, max_pixels: int = MAX_PIXELS) -> Pixels:
        """Return an encoded image resized, uint8 (H, W, 3), of which `logits` takes its views.

        Raises BadImage where it cannot be decoded, or has more than max_pixels.
        """
        return prepare(data, self.preprocessing, max_pixels)

    def pixels(self, data: bytes) -> Pixels:
        """Return the network's view of an encoded image: uint8 of shape (size, size, 3).

        Raises BadImage where it cannot be decoded.
        """
        return center_crop(self.prepare(data), self.preprocessing.image_size)

    def logits(self, images: Sequence[Pixels]) -> tuple[Floats, Floats | None]:
        """Return logits (B, C), and class maps (B, C, h, w) of the centre view or None, of prepared images."""
        if self.tta == "none":
            size = self.preprocessing.image_size
            return self.network([center_crop(each, size) for each in images])
        views = zip(*(views_of(each, self.preprocessing, self.tta) for each in images), strict=True)
        said = [self.network(view) for view in views]
        return mean_of_views(np.stack([logits for logits, _ in said])), said[0][1]

    def answers(self, logits: Floats) -> list[Answer]:
        """Return what is said of each row of logits (B, C); raises ZooError where one is not finite."""
        return answers_of(logits, self.classes, self.rules, self.negative_class)

    def explain(self, batch: Pixels, targets: Sequence[int]) -> Pixels:
        """Return where the network looked in the centre view for a class of each image: uint8 (B, size, 2 x size, 3).

        batch: uint8 (B, size, size, 3), as `pixels` gives them; they stand at the left of their maps. targets: B
        places in `classes`. Raises ZooError where the network keeps no map of its image.
        """
        return np.concatenate([batch, self.network.explain(batch, targets)], axis=2)

    def predict(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        batch_size: int = 32,
        explain: str | os.PathLike[str] | None = None,
    ) -> list[Prediction]:
        """Return one prediction for each image file; folders are searched. Bad files are rows with a reason.

        explain: a folder for one PNG per image that shows where the network looked for its label. Raises ZooError
        where a path is not there, a folder holds no image, the folder cannot be written, the network keeps no map of
        its image, or it fails on a single image.
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
            if os.path.lexists(folder) and not folder.is_dir():
                raise ZooError(f"explain needs a folder for its pictures. Got the file {one_line(folder)!r}")
            check_writable(folder)
        numbered, threads = enumerate(files), list[threading.Thread]()
        pool = ThreadPoolExecutor(
            min(batch_size, cores()), "zoo-decode", lambda: threads.append(threading.current_thread())
        )
        try:
            while batch := list(islice(numbered, batch_size)):
                yield from self._batch(batch, folder, pool)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all(threads)  # only where it was interrupted is one at work

    def _prepared(self, source: Source) -> Pixels | Prediction:
        """Return a source's image prepared, or the row that says why there is none; called in several threads."""
        try:
            return self.prepare(bytes_of(source))
        except OSError as error:
            return _failed(source, one_line(error.strerror or error))
        except MemoryError:
            return _failed(source, "too large for the memory of this machine")
        except (BadImage, ValueError) as error:
            return _failed(source, one_line(error, 300))

    def _batch(
        self, numbered: list[tuple[int, Source]], folder: Path | None, pool: ThreadPoolExecutor
    ) -> Iterator[Prediction]:
        images: dict[int, Pixels] = {}
        found: dict[int, Prediction] = {}
        each = pool.map(self._prepared, [source for _, source in numbered])
        for (number, _), prepared in zip(numbered, each, strict=True):
            if isinstance(prepared, Prediction):
                found[number] = prepared
            else:
                images[number] = prepared
        sources = dict(numbered)
        if images:
            logits = _in_parts(lambda part: self.logits(part)[0], list(images.values()))
            for number, row in zip(images, logits, strict=True):
                found[number] = self._prediction(sources[number], row)
        good = {number: found[number] for number in images if found[number].error is None}
        shown = self._write_explanations(good, images, folder) if folder is not None else {}
        for number in sources:
            yield replace(found[number], explanation=shown.get(number))

    def _prediction(self, source: Source, logits: Floats) -> Prediction:
        try:
            answer = self.answers(logits[None])[0]
        except ZooError as error:
            return _failed(source, str(error))
        return Prediction(
            name_of(source),
            answer.label,
            answer.scores,
            answer.refer,
            None,
            None,
            tuple(answer.prediction_set),
            answer.refer_reason,
            answer.points,
        )

    def _write_explanations(
        self, rows: dict[int, Prediction], images: dict[int, Pixels], folder: Path
    ) -> dict[int, str]:
        """Write a picture for each image and return the files; a number before the name keeps two of one name apart."""
        found: dict[int, str] = {}
        numbers, size = list(rows), self.preprocessing.image_size
        for start in range(0, len(numbers), _EXPLAINED):
            part = numbers[start : start + _EXPLAINED]
            targets = [self.classes.index(rows[each].label or "") for each in part]
            batch = np.stack([center_crop(images[each], size) for each in part])
            pictures = _in_parts(self.explain, batch, targets)
            for number, picture in zip(part, pictures, strict=True):
                name = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(rows[number].path).stem)[:60]
                target = folder / f"{number:05d}-{name}.png"
                with atomic_writer(target) as stream:
                    Image.fromarray(picture).save(stream, "PNG")
                found[number] = str(target)
        return found


def _in_parts(compute: Callable[..., Any], *rows: Any) -> Any:
    """Return what the network computes of rows, all as long; of fewer at once where memory does not suffice."""
    count = len(rows[0])
    try:
        return compute(*rows)
    except ZooError:
        raise
    except Exception as error:  # each runtime has kinds of its own, and may call want of memory a plain failure
        if count == 1:
            why = one_line(error, 160) or type(error).__name__
            raise ZooError(f"the network fails on one image: {why}; free memory, or export the bundle again") from error
    halves = slice(count // 2), slice(count // 2, None)
    return np.concatenate([_in_parts(compute, *(each[half] for each in rows)) for half in halves])


def _failed(source: Source, reason: str) -> Prediction:
    return Prediction(name_of(source), None, {}, True, reason, refer_reason="there is no answer")


def _find(name: str, root: Home | None) -> Bundle | Run:
    """Return the bundle or the run of a name or folder; raises ZooError with the nearest name where there is none."""
    root = root or home()
    for folder in (root.bundles / name, user_path(name)):
        if _holds(folder, "bundle.json"):
            return open_bundle(find_bundle(name, root), root)
        if _holds(folder, "run.json"):
            return find_run(name, root)
    if _holds(root.runs / name, "run.json"):
        return find_run(name, root)
    known = [*list_bundles(root), *(run.name for run in list_runs(root))]
    hint = nearest(name, known) or "; make one with `zoo train` and `zoo export`"
    raise ZooError(
        f"there is no bundle or run {one_line(name)!r}{hint} (`zoo list bundles` and `zoo list runs` show all "
        f"{len(known)})"
    )


def _holds(folder: Path, file: str) -> bool:
    try:
        return (folder / file).is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return False


__all__ = ["BundleNetwork", "Encoded", "Network", "Prediction", "Predictor", "find_images"]
