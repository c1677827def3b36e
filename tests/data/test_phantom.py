"""The lung phantom: the same bytes from a seed, patients that hang together, and no cheap way to the label."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data.phantom import LABELS, generate_phantom
from zoo.errors import ZooError

DIGEST = """
import hashlib
from zoo.data.phantom import generate_phantom
print(hashlib.sha256(b"".join(s.pixels.tobytes() for s in generate_phantom(4, 2, 48, seed=3))).hexdigest())
"""


@pytest.fixture(scope="module")
def scans():
    return list(generate_phantom(90, 3, 64, seed=1))


def test_the_same_bytes_in_a_fresh_process():
    here = hashlib.sha256(b"".join(each.pixels.tobytes() for each in generate_phantom(4, 2, 48, seed=3))).hexdigest()
    done = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here
    other = b"".join(each.pixels.tobytes() for each in generate_phantom(4, 2, 48, seed=4))
    assert hashlib.sha256(other).hexdigest() != here


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(32, 70), st.integers(0, 99))
def test_any_count_and_size_and_fewer_patients_are_a_prefix(patients, slices, size, seed):
    few = list(generate_phantom(patients, slices, size, seed))
    more = list(generate_phantom(patients + 1, slices, size, seed))
    assert len(few) == patients * slices
    for one, two in zip(few, more, strict=False):
        assert (one.patient, one.slice_index, one.label) == (two.patient, two.slice_index, two.label)
        assert one.pixels.dtype == np.uint8
        assert one.pixels.shape == (size, size)
        assert np.array_equal(one.pixels, two.pixels)


def test_patients_have_one_class_and_the_classes_are_balanced(scans):
    label_of = {each.patient: each.label for each in scans}
    assert all(label_of[each.patient] == each.label for each in scans)
    assert [list(label_of.values()).count(label) for label in LABELS] == [30, 30, 30]


def test_slices_of_a_patient_are_more_alike_than_those_of_two(scans):
    flat = {(each.patient, each.slice_index): each.pixels.astype(float).ravel() for each in scans}
    patients = sorted({patient for patient, _ in flat})
    own = [np.corrcoef(flat[p, 0], flat[p, 1])[0, 1] for p in patients]
    other = [np.corrcoef(flat[p, 0], flat[q, 1])[0, 1] for p, q in itertools.pairwise(patients)]
    assert np.mean(own) > np.mean(other) + 0.05


def test_brightness_and_size_on_disk_do_not_give_the_label_away(scans):
    import zlib

    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    facts = [[each.pixels.mean(), each.pixels.std(), len(zlib.compress(each.pixels.tobytes()))] for each in scans]
    labels = [each.label for each in scans]
    groups = [each.patient for each in scans]
    model = make_pipeline(StandardScaler(), LogisticRegression())
    scores = cross_val_score(model, facts, labels, groups=groups, cv=GroupKFold(5))
    assert scores.mean() < 0.5  # chance is .333


@pytest.mark.parametrize(
    "options",
    [{"patients": 0}, {"slices_per_patient": 0}, {"image_size_px": 31}, {"image_size_px": 1025}, {"seed": -1}],
)
def test_options_out_of_range_are_refused(options):
    name = next(iter(options))
    with pytest.raises(ZooError, match=f"lung-phantom: {name} must be a whole number from"):
        next(generate_phantom(**options))


def test_import_says_that_it_is_synthetic_and_refuses_unknown_options(root):
    from zoo.data.sources import import_dataset

    dataset = import_dataset("lung-phantom", "phantom", root, patients=18, slices_per_patient=2, image_size_px=32)
    assert "Synthetic" in dataset.facts["note"]
    assert dataset.facts["medical"] is True
    assert dataset.negative_class == "normal"
    assert dataset.frame["group"].nunique() == 18
    with pytest.raises(ZooError, match="has no option"):
        import_dataset("lung-phantom", "other", root, patient=3)
    with pytest.raises(ZooError, match="patients must be a whole number from 1 to"):
        import_dataset("lung-phantom", "other", root, patients=0)


def test_digits_are_scikit_learns(root):
    from sklearn.datasets import load_digits

    from zoo.data.builtin import generate_digits
    from zoo.data.manifest import load_dataset

    images = list(generate_digits())
    assert [label for _, label, _ in images] == [str(each) for each in load_digits().target]
    assert all(pixels.shape == (32, 32) and pixels.dtype == np.uint8 for _, _, pixels in images)
    dataset = load_dataset("digits", root)
    assert len(dataset.frame) == 1797
    assert dataset.classes == [str(each) for each in range(10)]
