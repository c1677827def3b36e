"""A predictor of a bundle: the input of training to the bit, the answers of its run, and what is refused."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data.cache import open_pixels
from zoo.data.manifest import load_dataset
from zoo.data.sources import import_dataset
from zoo.data.transforms import center_crop, normalise_tensor
from zoo.data.views import VIEWS
from zoo.data.window import parse_window
from zoo.deployment.bundle import list_bundles, open_bundle
from zoo.deployment.predictor import BundleNetwork, Predictor
from zoo.errors import ZooError
from zoo.runs import Preprocessing, find_run
from zoo.training.views import logits_of_views


@pytest.fixture
def bundle(bundled):
    (name,) = list_bundles(bundled)
    return open_bundle(name, bundled)


def changed(bundle, **changes):
    return replace(bundle, record=bundle.record.model_copy(update=changes))


def image_files(home):
    """Return the files of test: of val, one image lies exactly on each threshold that was chosen there."""
    dataset = load_dataset("tiny", home)
    return sorted(dataset.image_path(path) for path in dataset.of_split("test")["path"])


class Recording:
    """A session that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def __call__(self, images: np.ndarray):
        self.seen.append(images)
        return np.zeros((len(images), 2), np.float32), None


def write_odd_images(folder):
    """Write images of many kinds in two classes: what people have on disk."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    draw = np.random.default_rng(0)
    for label, seed in (("a", 0), ("b", 100)):
        (folder / label).mkdir(parents=True)
        for number in range(3):
            grey = draw.integers(0, 2500, (50 + number, 61 + seed % 7), dtype=np.uint16)
            colour = draw.integers(0, 256, (47 + number, 66, 3), dtype=np.uint8)
            alpha = np.dstack([colour, draw.integers(0, 256, colour.shape[:2], dtype=np.uint8)])
            place = folder / label / f"{number}"
            Image.fromarray(colour).save(f"{place}.png")
            Image.fromarray(colour).save(f"{place}.jpg", quality=80)
            turned = Image.Exif()
            turned[0x0112] = (3, 6, 8)[number]
            Image.fromarray(colour[::-1].copy()).save(f"{place}-turned.jpg", exif=turned)
            Image.fromarray(alpha).save(f"{place}-alpha.png")
            Image.fromarray(colour).quantize(32).save(f"{place}.gif")
            Image.fromarray(grey).save(f"{place}-16.png")
            Image.fromarray(grey).save(f"{place}-16.tif")
            meta = FileMetaDataset()
            meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
            meta.MediaStorageSOPInstanceUID = generate_uid()
            made = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
            made.SOPClassUID, made.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
            made.PatientID, made.StudyInstanceUID, made.Modality = f"P{label}{number}", generate_uid(), "CT"
            made.Rows, made.Columns = grey.shape
            made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 0
            made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
            made.RescaleSlope, made.RescaleIntercept, made.PixelData = 1, -1024, grey.tobytes()
            pydicom.dcmwrite(f"{place}.dcm", made, enforce_file_format=True)
    return folder


@pytest.mark.parametrize(
    ("size", "crop_pct", "interpolation", "window"),
    [
        (32, 0.875, "bicubic", None),
        (40, 1.0, "bilinear", "lung"),
        (24, 0.9, "lanczos", "lung,mediastinum,bone"),
        (37, 0.95, "nearest", "-600/1500"),
    ],
)
def test_the_network_sees_the_tensors_of_training_bit_for_bit(root, tmp_path, size, crop_pct, interpolation, window):
    source = write_odd_images(tmp_path / "source")
    dataset = import_dataset(source, "odd", root, window=window or "lung", rescale="1,-1024", copy=True)
    facts = Preprocessing(
        image_size=size,
        crop_pct=crop_pct,
        interpolation=interpolation,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        window=window,
        rescale_intercept=-1024.0 if window else 0.0,
    )
    assert window is None or parse_window(window)
    session, seen = Recording(), set()
    predictor = Predictor(BundleNetwork(session, facts), facts, dataset.classes)
    for split in ("train", "val", "test"):
        pixels = open_pixels(dataset, split, facts)
        for place in range(len(pixels)):
            batch = torch.from_numpy(center_crop(pixels[place], size)[None].copy())
            trained = normalise_tensor(batch, facts).numpy()
            path = dataset.image_path(pixels.paths[place])
            predictor.logits([predictor.prepare(path.read_bytes())])
            given = session.seen.pop()
            assert given.shape == trained.shape == (1, 3, size, size) and given.dtype == np.float32
            assert given.flags.c_contiguous and given.tobytes() == np.ascontiguousarray(trained).tobytes(), path
            seen.add(path.suffix)
    assert seen == {".png", ".jpg", ".gif", ".tif", ".dcm"}


def test_a_bundle_says_what_its_run_says(bundled, bundle):
    files = image_files(bundled)
    of_run = Predictor.load(find_run(bundle.record.run, bundled), bundled, device="cpu").predict(files)
    for source in (bundle, bundle.name, bundle.path):
        of_bundle = Predictor.load(source, bundled).predict(files, batch_size=7)
        assert [each.path for each in of_bundle] == [str(each) for each in files]
        for one, other in zip(of_bundle, of_run, strict=True):
            assert (one.label, one.refer, one.prediction_set) == (other.label, other.refer, other.prediction_set)
            assert one.scores == pytest.approx(other.scores, abs=1e-4)
            assert one.points == other.points and one.error is None


@pytest.mark.parametrize("tta", list(VIEWS)[1:])
def test_views_of_a_bundle_are_combined_as_the_training_combines_them(bundled, bundle, tta):
    predictor = Predictor.load(changed(bundle, tta=tta), bundled)
    plain = Predictor.load(bundle, bundled)
    images = [plain.prepare(file.read_bytes()) for file in image_files(bundled)[:5]]
    found, maps = predictor.logits(images)
    expected = logits_of_views(
        images, plain.preprocessing, tta, lambda batch: torch.from_numpy(plain.network(batch)[0])
    )
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6, atol=1e-6)
    assert np.abs(found - plain.logits(images)[0]).max() > 1e-4
    np.testing.assert_allclose(maps, plain.logits(images)[1], rtol=1e-5, atol=1e-6)  # of the plain view
    of_run = Predictor.load(find_run(bundle.record.run, bundled), bundled, device="cpu")
    of_run.tta = tta
    np.testing.assert_allclose(found, of_run.logits(images)[0], rtol=1e-3, atol=1e-4)


def test_many_threads_get_what_one_gets(bundled, bundle):
    predictor = Predictor.load(bundle, bundled, threads=1)
    images = [predictor.prepare(file.read_bytes()) for file in image_files(bundled)]
    alone = [predictor.logits([each])[0] for each in images]
    found: dict[int, list[np.ndarray]] = {}

    def ask(number: int) -> None:
        found[number] = [predictor.logits([each])[0] for each in images]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 4
    for said in found.values():
        np.testing.assert_allclose(np.concatenate(said), np.concatenate(alone), rtol=1e-5, atol=1e-6)


def test_threads_are_as_asked(bundled, bundle):
    assert Predictor.load(bundle, bundled, threads=1).network.session.threads == 1
    for threads in (0, -1, 1025, 99999999999):
        with pytest.raises(ZooError, match=rf"threads must be 1 to 1024. Got {threads}; leave it out for all"):
            Predictor.load(bundle, bundled, threads=threads)
    with pytest.raises(ZooError, match=r"bundles run on the CPU. Got device 'cuda'; leave it out"):
        Predictor.load(bundle, bundled, device="cuda")


@pytest.mark.parametrize(
    "planted",
    [
        {"mean": (0.9, 0.1, 0.5)},
        {"std": (0.5, 0.5, 0.5)},
        {"crop_pct": 0.5},
    ],
)
def test_a_wrong_preprocessing_is_found_when_a_bundle_is_loaded(bundled, bundle, planted):
    facts = bundle.record.preprocessing
    assert any(getattr(facts, key) != value for key, value in planted.items())
    with pytest.raises(ZooError, match=r"says something else of its sample here.*logits differ by"):
        Predictor.load(changed(bundle, preprocessing=facts.model_copy(update=planted)), bundled)


def test_a_network_that_does_not_fit_its_record_is_refused_in_one_line(bundled, bundle):
    facts = bundle.record.preprocessing
    wrong = {
        "cannot compute its network": {"preprocessing": facts.model_copy(update={"image_size": 33})},
        "names 4 classes and its network gives 3 logits": {"classes": [*bundle.record.classes, "more"]},
        "2 logits of its sample stand": {"sample": bundle.record.sample.model_copy(update={"logits": [0.0, 1.0]})},
    }
    for said, changes in wrong.items():
        with pytest.raises(ZooError, match=said) as caught:
            Predictor.load(changed(bundle, **changes), bundled)
        assert "\n" not in str(caught.value) and bundle.name in str(caught.value)


def test_where_a_bundle_looked_is_drawn_of_its_own_maps(bundled, bundle, tmp_path):
    files = image_files(bundled)[:3]
    predictor = Predictor.load(bundle, bundled)
    assert predictor.explains is bundle.record.activation_map is True
    found = predictor.predict(files, explain=tmp_path / "maps")
    side = predictor.preprocessing.image_size
    for each, file in zip(found, files, strict=True):
        picture = np.asarray(Image.open(each.explanation))
        assert picture.shape == (side, 2 * side, 3)
        assert np.array_equal(picture[:, :side], predictor.pixels(file.read_bytes()))
        assert (picture[:, :side] != picture[:, side:]).any()


@pytest.mark.slow
def test_openvino_says_the_same(bundled, bundle):
    pytest.importorskip("openvino")
    from zoo.deployment.export import export

    other = export(bundle.record.run, bundled, format="openvino")
    images = image_files(bundled)[:4]
    one, two = (Predictor.load(each, bundled, threads=1).predict(images) for each in (bundle, other))
    for left, right in zip(one, two, strict=True):
        assert left.scores == pytest.approx(right.scores, abs=1e-4) and left.label == right.label


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("bad allocation")])
def test_a_batch_too_large_for_the_memory_is_computed_in_parts(bundled, bundle, tmp_path, monkeypatch, error):
    predictor, files, sizes = Predictor.load(bundle, bundled), image_files(bundled)[:7], []
    expected, session = predictor.predict(files), predictor.network.session

    def small(images: np.ndarray):
        sizes.append(len(images))
        if len(images) > most:
            raise error
        return session(images)

    monkeypatch.setattr(predictor.network, "session", small)
    most = 2
    for found, wanted in zip(predictor.predict(files), expected, strict=True):
        assert (found.path, found.label, found.error) == (wanted.path, wanted.label, None)
        assert found.scores == pytest.approx(wanted.scores, abs=1e-5)
    assert sizes == [7, 3, 1, 2, 4, 2, 2]
    maps = predictor.predict(files, explain=tmp_path / "few")
    most = 7
    for few, many in zip(maps, predictor.predict(files, explain=tmp_path / "many"), strict=True):
        pictures = [np.asarray(Image.open(each.explanation), int) for each in (few, many)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1
    most = 0
    with pytest.raises(ZooError, match=r"^the network fails on one image: (MemoryError|bad allocation); free") as said:
        predictor.predict(files)
    assert "\n" not in str(said.value)


def test_the_class_of_the_label_is_explained_though_the_centre_says_another(bundled, bundle, tmp_path, monkeypatch):
    files = image_files(bundled)[:3]
    run = find_run(bundle.record.run, bundled)
    for predictor in (Predictor.load(bundle, bundled), Predictor.load(run, bundled, device="cpu")):
        centre = [predictor.pixels(file.read_bytes()) for file in files]
        highest = predictor.network(centre)[0].argmax(1)
        other = [(int(each) + 1) % 3 for each in highest]
        views = np.eye(3, dtype=np.float32)[other]  # as the mean of several views may say
        with monkeypatch.context() as changes:
            changes.setattr(predictor, "logits", lambda _images, said=views: (said, None))
            found = predictor.predict(files, explain=tmp_path / "maps")
        assert [each.label for each in found] == [predictor.classes[place] for place in other]
        shown = np.stack([np.asarray(Image.open(each.explanation)) for each in found])
        assert np.array_equal(shown, predictor.explain(np.stack(centre), other))
        assert not np.array_equal(shown, predictor.explain(np.stack(centre), highest.tolist()))
