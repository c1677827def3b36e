"""Formula images: the same pixels from a seed, classes that can be told apart, bad arguments refused."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from zoo.data.formula import FAMILIES, formula_classes, formula_image, formula_pool
from zoo.data.formula_fields import Rng, fbm, filtered_noise, frequencies, palette, stretch
from zoo.errors import ZooError

SCRIPT = """
import hashlib
from zoo.data.formula import FAMILIES, formula_classes, formula_image
digest = hashlib.sha256()
for name in FAMILIES:
    digest.update(formula_image(formula_classes([name], seed=5)[-1], 3, 40, seed=5).tobytes())
print(digest.hexdigest())
"""


def test_there_are_eight_families_and_some_hundred_classes():
    classes = formula_classes()
    assert list(FAMILIES) == ["leaves", "contours", "fractals", "textures", "programs", "glyphs", "spots", "bodies"]
    assert [each.label for each in classes] == list(range(len(classes)))
    assert len(classes) == 696
    assert all(family.summary and family.source for family in FAMILIES.values())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_class_of_a_family_draws_images_that_are_not_flat_and_differ(name):
    classes = formula_classes([name])
    assert len(classes) >= 50
    for each in classes[:: max(1, len(classes) // 12)]:
        one, two = (formula_image(each, instance, 32) for instance in (0, 1))
        assert one.shape == (32, 32, 3)
        assert one.dtype == np.uint8
        assert (one != two).any()
    drawn = np.stack([formula_image(each, 2, 32) for each in classes[::5]])
    assert np.median(drawn.std(axis=(1, 2, 3))) > 10


def test_the_same_seed_gives_the_same_pixels_in_another_process_and_another_seed_others():
    digest = hashlib.sha256()
    for name in FAMILIES:
        digest.update(formula_image(formula_classes([name], seed=5)[-1], 3, 40, seed=5).tobytes())
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    assert said.strip() == digest.hexdigest()
    glyph = formula_classes(["glyphs"], seed=5)[4]
    assert (formula_image(glyph, 0, 32, seed=5) != formula_image(glyph, 0, 32, seed=6)).any()


def test_an_image_does_not_depend_on_the_families_that_were_chosen_beside_its_own():
    alone = formula_classes(["spots"])[7]
    among = next(each for each in formula_classes() if each.family == "spots" and each.place == 7)
    assert alone.label != among.label
    assert (formula_image(alone, 1, 32) == formula_image(among, 1, 32)).all()


def test_a_pool_holds_the_same_images_for_any_number_of_processes_and_is_drawn_once(tmp_path):
    seen = []
    one = formula_pool(tmp_path / "one", ["leaves"], 3, 32, progress=lambda done, of: seen.append((done, of)))
    two = formula_pool(tmp_path / "two", ["leaves"], 3, 32, processes=2)
    classes = formula_classes(["leaves"])
    assert one.shape == (54 * 3, 32, 32, 3)
    assert (one == two).all()
    assert (one[3 * 20 + 1] == formula_image(classes[20], 1, 32)).all()
    assert seen[-1] == (54, 54)
    seen.clear()
    formula_pool(tmp_path / "one", ["leaves"], 3, 32, progress=lambda done, of: seen.append((done, of)))
    assert seen == []
    assert len(list((tmp_path / "one").iterdir())) == 1
    formula_pool(tmp_path / "one", ["leaves"], 2, 32)
    assert len(list((tmp_path / "one").iterdir())) == 2


def test_an_interrupted_pool_leaves_nothing(tmp_path):
    def stop(done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        formula_pool(tmp_path, ["leaves"], 2, 32, progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_pool_that_was_cut_off_or_is_another_is_drawn_again(tmp_path):
    whole = np.array(formula_pool(tmp_path, ["leaves"], 1, 32))
    (file,) = tmp_path.iterdir()
    for damage in (lambda: file.write_bytes(file.read_bytes()[:1000]), lambda: np.save(file, np.zeros((3, 3)))):
        damage()
        assert (formula_pool(tmp_path, ["leaves"], 1, 32) == whole).all()


def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(full_disk):
    with pytest.raises(ZooError, match=r"cannot write|disk|space"):
        formula_pool(full_disk, ["leaves"], 30, 32)
    assert not list(full_disk.iterdir())


def _facts(image: np.ndarray) -> np.ndarray:
    """Return how strongly the greys vary at each scale, and how they are spread."""
    grey = image.astype(float).mean(2)
    power = np.abs(np.fft.rfft2(grey - grey.mean())) ** 2
    radius = frequencies(grey.shape[0])[0]
    bands = [np.log1p(power[(radius >= low) & (radius < 2 * low)].mean()) for low in (1, 2, 4, 8)]
    return np.array([*bands, grey.std(), *np.percentile(grey, (5, 50, 95))])


def test_families_are_told_apart_by_simple_facts_far_above_chance():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classes = formula_classes()[::6]
    names = [each.family for each in classes]
    train, test = (np.stack([_facts(formula_image(each, instance, 32)) for each in classes]) for instance in (0, 1))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(train, names)
    majority = max(names.count(name) for name in names) / len(names)
    assert model.score(test, names) > 1.7 * majority


def test_noise_has_the_slope_that_is_asked_for():
    rng: Rng = np.random.default_rng(0)
    field = fbm(rng, 128, 1.5)
    assert field.std() == pytest.approx(1, abs=1e-3)
    radius = frequencies(128)[0]
    power = np.abs(np.fft.rfft2(field)) ** 2
    low, high = (power[(radius >= r) & (radius < 2 * r)].mean() for r in (4, 16))
    # The amplitude falls with the power of -1.5: four times the frequency, 64 times less power.
    assert np.log2(low / high) == pytest.approx(6, abs=0.8)
    assert abs(filtered_noise(rng, np.ones((32, 17), np.float32)).mean()) < 0.2


def test_colours_and_stretched_fields_stay_in_range():
    rng = np.random.default_rng(1)
    for _ in range(50):
        colours = palette(rng, 5)
        assert colours.shape == (5, 3)
        assert colours.min() >= 0
        assert colours.max() <= 1
    flat = stretch(np.full((8, 8), 3.0, np.float32))
    assert np.isfinite(flat).all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: formula_classes(["spot"]), "unknown family 'spot' of formula images; did you mean 'spots'"),
        (lambda: formula_classes([], seed=-1), "seed must be a whole number from 0"),
        (lambda: formula_image(formula_classes(["spots"])[0], -1), "instance must be a whole number from 0"),
        (
            lambda: formula_image(formula_classes(["spots"])[0], 0, 8),
            "image_size_px must be a whole number from 16 to 512",
        ),
        (lambda: formula_pool(None, ["spots"], 0), "images_per_class must be a whole number from 1"),
    ],
)
def test_bad_arguments_are_refused(call, said):
    with pytest.raises(ZooError, match=said):
        call()
