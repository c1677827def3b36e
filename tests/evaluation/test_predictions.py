import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zoo.errors import ZooError
from zoo.evaluation.predictions import Predictions, read_predictions, write_predictions


def some(n=6, c=3, groups=None, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.array([f"id-{i}" for i in range(n)])
    return Predictions(ids, ids if groups is None else np.array(groups), rng.integers(0, c, n), rng.normal(size=(n, c)))


def equal(one, two):
    return all(
        np.array_equal(getattr(one, key), getattr(two, key), equal_nan=key == "logits")
        for key in ("sample_ids", "groups", "y_true", "logits")
    )


def test_what_is_written_is_read_again(tmp_path: Path):
    given_in = some()
    write_predictions(tmp_path / "a.npz", given_in)
    found = read_predictions(tmp_path / "a.npz")
    assert equal(found, given_in)
    assert found.logits.dtype == np.float32
    assert found.y_true.dtype == np.int64
    assert list(tmp_path.iterdir()) == [tmp_path / "a.npz"]


def test_the_same_content_gives_the_same_bytes_however_it_is_stored(tmp_path: Path):
    one = some()
    # A wider text type, another byte order, Fortran order and a view must not show on disk.
    two = Predictions(
        one.sample_ids.astype("<U99"),
        one.groups.astype(object),
        np.repeat(one.y_true, 2).astype(">i4")[::2],
        np.asfortranarray(one.logits.astype(">f8")),
    )
    write_predictions(tmp_path / "one.npz", one)
    write_predictions(tmp_path / "two.npz", two)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.npz") as archive:
        assert {each.date_time[0] for each in archive.infolist()} == {1980}


def test_no_samples_can_be_stored(tmp_path: Path):
    none = Predictions(np.array([], str), np.array([], str), np.array([], int), np.empty((0, 3)))
    write_predictions(tmp_path / "a.npz", none)
    assert read_predictions(tmp_path / "a.npz").logits.shape == (0, 3)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ZooError, match=r"there is no predictions file '.*none\.npz'; score the run again"):
        read_predictions(tmp_path / "none.npz")


def test_a_folder_in_its_place_is_said(tmp_path: Path):
    with pytest.raises(ZooError, match="cannot read"):
        read_predictions(tmp_path)


def test_a_full_or_missing_disk_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match="cannot write"):
        write_predictions(tmp_path / "file" / "a.npz", some())


@pytest.mark.slow
def test_a_changed_or_cut_file_is_never_read_as_other_numbers(tmp_path: Path):
    given_in = some(n=3)
    path = tmp_path / "a.npz"
    write_predictions(path, given_in)
    good = path.read_bytes()
    refused = 0
    for place in range(len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x15]) + good[place + 1 :])
        try:
            assert equal(read_predictions(path), given_in), place
        except ZooError as error:
            refused += 1
            assert "is damaged" in str(error)
            assert "\n" not in str(error)
    assert refused > 0.7 * len(good)  # the rest is padding and dates
    for length in range(0, len(good), 7):
        path.write_bytes(good[:length])
        with pytest.raises(ZooError, match="is damaged"):
            read_predictions(path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_pickles_are_not_opened(tmp_path: Path):
    good = some(n=2)
    np.savez(
        tmp_path / "a.npz",
        sample_ids=np.array([Bomb(), Bomb()], dtype=object),
        groups=good.groups,
        y_true=good.y_true,
        logits=good.logits,
    )
    with pytest.raises(ZooError, match="is damaged"):
        read_predictions(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"logits": None}, "it must hold sample_ids, groups, y_true, logits"),
        ({"more": np.zeros(3)}, "it must hold sample_ids"),
        ({"y_true": np.zeros(3)}, "its arrays must be of text, text, int64 and float32"),
        ({"groups": np.zeros(3)}, "its arrays must be of text"),
        ({"y_true": np.zeros(2, int)}, r"must be \(N,\), \(N,\), \(N,\) and \(N, C\)"),
        ({"logits": np.zeros(3, "f4")}, r"must be \(N,\)"),
        ({"y_true": np.array([0, 1, 3])}, r"y_true must lie in \[0, 3\)"),
        ({"y_true": np.array([0, 1, -1])}, "Got -1 to 1"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, change, reason):
    good = some(n=3)
    arrays = {key: getattr(good, key) for key in ("sample_ids", "groups", "y_true", "logits")} | change
    np.savez(tmp_path / "a.npz", **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(ZooError, match=reason):
        read_predictions(tmp_path / "a.npz")


@given(hnp.arrays(np.float32, (5, 4), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
@settings(deadline=None)  # the first call imports scipy
def test_scores_are_probabilities_whatever_the_logits(logits):
    made = Predictions(np.arange(5).astype(str), np.arange(5).astype(str), np.zeros(5, int), logits)
    assert made.y_score.dtype == np.float64
    assert np.allclose(made.y_score.sum(axis=1), 1)
    assert ((made.y_score >= 0) & (made.y_score <= 1)).all()
    # The class that is predicted has the highest score.
    assert np.array_equal(made.y_score[np.arange(5), made.y_pred], made.y_score.max(axis=1))


def test_softmax_of_known_logits():
    made = Predictions(np.array(["a"]), np.array(["a"]), np.array([0]), np.log([[1.0, 2.0, 5.0]]))
    assert made.y_score == pytest.approx(np.array([[0.125, 0.25, 0.625]]), rel=1e-6)
    assert made.y_pred.tolist() == [2]


def test_samples_without_a_group_are_groups_of_their_own():
    codes = some(n=5, groups=["p", "", "p", "", "q"]).group_codes
    assert codes[0] == codes[2]
    assert sorted(set(codes.tolist())) == [0, 1, 2, 3]
