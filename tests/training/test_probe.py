import shutil

import numpy as np
import pytest
from PIL import Image

from zoo.data.manifest import load_dataset
from zoo.data.resplit import resplit_dataset
from zoo.data.sources import import_dataset
from zoo.errors import ZooError
from zoo.files import home
from zoo.recipe import load_recipe
from zoo.runs import list_runs
from zoo.training.loop import train
from zoo.training.probe import explain_images, shortcut_probe


def test_pictures_are_of_the_images_that_were_asked_for(trained):
    run = next(iter(list_runs(trained)))
    ids = load_dataset("tiny", trained).of_split("test")["sample_id"].tolist()
    found = explain_images(run, [ids[2], "not there", ids[0]], "test", trained)
    assert list(found) == [ids[2], ids[0]]
    side = run.record.preprocessing.image_size
    assert all(picture.shape == (side, side, 3) and picture.dtype == np.uint8 for picture in found.values())
    assert explain_images(run, [], "test", trained) == {}


def test_a_probe_is_of_val_and_is_kept(trained):
    run = next(iter(list_runs(trained)))
    found = shortcut_probe(run, trained)
    assert found["split"] == "val" and found["n"] == len(load_dataset("tiny", trained).of_split("val"))
    assert found["whole"] == pytest.approx(run.metrics("val")["top1"])
    for key in ("whole", "centre_masked", "border_masked"):
        assert found[f"{key}_ci"][0] <= found[key] <= found[f"{key}_ci"][1]
    dataset = load_dataset("tiny", trained)
    shutil.rmtree(dataset.folder / ".cache")
    for path in dataset.of_split("val")["path"]:
        dataset.image_path(path).unlink()
    assert shortcut_probe(run, trained) == found  # from the run folder
    (run.path / "probe-val.json").unlink()
    with pytest.raises(ZooError):
        shortcut_probe(run, trained)


def test_another_split_is_refused(trained):
    run = next(iter(list_runs(trained)))
    resplit_dataset("tiny", trained, seed=5)
    with pytest.raises(ZooError, match="was trained on another split of 'tiny'; train it again"):
        explain_images(run, ["x"], "test", trained)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A run on images whose class is a mark in the corner, and one on images with the mark in the middle."""
    root = home(tmp_path_factory.mktemp("marked"))
    rng = np.random.default_rng(0)
    runs = {}
    for name, place in (("corner", 1), ("middle", 26)):
        folder = root.root / f"{name}-images"
        for number in range(120):
            image = rng.integers(60, 120, (64, 64, 3), dtype=np.uint8)
            image[place : place + 12, place : place + 12, 2 * (number % 2)] = 255
            (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / "ab"[number % 2] / f"{rng.integers(10**9)}.png")
        import_dataset(folder, name, root)
        recipe = load_recipe("simple_cnn", {"epochs": 6, "image_size": 64, "policy": "none", "workers": 0}, root)
        runs[name] = train(recipe, name, 0, root, accept_leaks=True)
    return root, runs


@pytest.mark.slow
def test_a_shortcut_in_the_corner_outlives_the_centre(marked):
    root, runs = marked
    corner, middle = (shortcut_probe(runs[name], root) for name in ("corner", "middle"))
    assert corner["whole"] > 0.9 and corner["centre_masked"] > 0.85 and corner["border_masked"] < 0.8
    assert middle["whole"] > 0.9 and middle["border_masked"] > 0.85 and middle["centre_masked"] < 0.8
