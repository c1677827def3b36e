from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scenes import draw_scene as scene

from zoo.data.duplicates import HASH_RADIUS, candidate_pairs, components, exact_pairs, near_pairs
from zoo.data.facts import look_at
from zoo.data.window import PLAIN


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def pairs_of(files: list[bytes], labels: list[str] | None = None) -> list[list[int]]:
    facts = [look_at(each, PLAIN) for each in files]
    hashes = np.array([each.phash for each in facts], np.uint64)
    small = np.stack([each.small for each in facts])
    return near_pairs(hashes, small, labels or ["x"] * len(files), [each.pixel_sha256 for each in facts]).tolist()


def test_reencoded_resized_and_brighter_copies_are_found_and_strangers_are_not():
    files = [encoded(scene(seed)) for seed in range(40)]
    one = scene(3)
    files.append(encoded(one, "JPEG", quality=60))
    files.append(encoded(np.asarray(Image.fromarray(one).resize((60, 60)))))
    files.append(encoded((one * 0.8 + 20).astype(np.uint8), "WEBP", quality=90))
    assert pairs_of(files) == [[3, 40], [3, 41], [3, 42], [40, 41], [40, 42], [41, 42]]


def test_exact_copies_are_no_near_copies():
    files = [encoded(scene(seed)) for seed in range(9)]
    assert pairs_of([*files, files[0]]) == []
    assert exact_pairs(["a", "b", "a", "a"]).tolist() == [[0, 2], [0, 3], [2, 3]]


def test_where_all_pictures_of_a_class_are_alike_likeness_proves_nothing():
    draw = np.random.default_rng(0)
    pattern = scene(1).astype(int)
    alike = [encoded((pattern + draw.integers(-9, 9, pattern.shape)).clip(0, 255).astype(np.uint8)) for _ in range(20)]
    assert pairs_of(alike) == []
    strangers = [encoded(scene(seed)) for seed in range(100, 120)]
    assert [20, 40] in pairs_of([*alike, *strangers, encoded(scene(100), "JPEG")], ["a"] * 20 + ["b"] * 21)


def test_pictures_without_contrast_are_never_near_copies():
    assert pairs_of([encoded(np.full((40, 40, 3), grey, np.uint8)) for grey in range(0, 250, 10)]) == []


def brute(hashes: np.ndarray) -> list[list[int]]:
    close = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= HASH_RADIUS
    return np.argwhere(np.triu(close, 1)).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(0, 12))
def test_all_pairs_within_the_radius_are_found(seed, count, flips):
    draw = np.random.default_rng(seed)
    centres = draw.integers(0, 2**63, 8, dtype=np.uint64)
    hashes = centres[draw.integers(0, 8, count)]
    for _ in range(flips):
        hashes = hashes ^ (np.uint64(1) << draw.integers(0, 64, count).astype(np.uint64))
    assert sorted(candidate_pairs(hashes).tolist()) == brute(hashes)


def test_many_equal_hashes_cost_no_quadratic_memory():
    hashes = np.full(5000, 7, np.uint64)
    pairs = candidate_pairs(hashes, np.random.default_rng(0).integers(0, 255, (5000, 32, 32), dtype=np.uint8))
    assert len(pairs) == sum(5000 - step for step in range(1, 51))
    assert len(set(components(5000, pairs).tolist())) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_few_images_have_no_pairs(count):
    assert (
        len(near_pairs(np.zeros(count, np.uint64), np.zeros((count, 32, 32), np.uint8), ["x"] * count, ["k"] * count))
        == 0
    )
    assert len(candidate_pairs(np.zeros(count, np.uint64))) == 0
    assert len(exact_pairs(["k"] * count)) == 0
    assert components(count).tolist() == list(range(count))


@pytest.mark.slow
def test_the_pairs_of_the_lung_slices(assets):
    files = sorted((assets / "data" / "iq_othnccd").rglob("*.jpg"))
    facts = [look_at(file.read_bytes(), PLAIN) for file in files]
    keys = [each.pixel_sha256 for each in facts]
    assert len(exact_pairs(keys)) == 42
    near = near_pairs(
        np.array([each.phash for each in facts], np.uint64),
        np.stack([each.small for each in facts]),
        [file.parent.name for file in files],
        keys,
    )
    assert 130 <= len(near) <= 300
