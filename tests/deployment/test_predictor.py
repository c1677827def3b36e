from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from zoo.data.cache import open_pixels
from zoo.data.decode import BadImage
from zoo.data.manifest import load_dataset
from zoo.data.transforms import center_crop
from zoo.deployment.predictor import Predictor, find_images
from zoo.deployment.rules import fit_rules
from zoo.errors import ZooError
from zoo.evaluation.calibration import apply_temperature
from zoo.files import read_toml, write_toml
from zoo.runs import list_runs
from zoo.training.scoring import predictions_of


@pytest.fixture
def run(trained):
    return next(run for run in list_runs(trained) if "--tiny--s0" in run.name)


def test_it_sees_what_the_training_saw_and_scores_the_same(trained, run):
    dataset = load_dataset("tiny", trained)
    pixels = open_pixels(dataset, "test", run.record.preprocessing)
    files = [dataset.image_path(path) for path in pixels.paths]
    predictor = Predictor.load(run.name, trained, device="cpu")
    for place, file in enumerate(files):
        np.testing.assert_array_equal(predictor.pixels(file.read_bytes()), center_crop(pixels[place], 32))
    rules = fit_rules(predictions_of(run, "val"), dataset.classes, run.record.negative_class)
    stored = apply_temperature(predictions_of(run, "test"), rules.temperature)
    assert predictor.rules == rules
    for batch_size in (1, 4, 32):
        found = list(predictor.stream(files, batch_size))
        assert [each.path for each in found] == [str(file) for file in files]
        scores = np.array([list(each.scores.values()) for each in found])
        np.testing.assert_allclose(scores, stored.y_score, rtol=1e-4, atol=1e-6)
        assert [each.label for each in found] == [dataset.classes[place] for place in stored.y_pred]
        assert all(list(each.scores) == dataset.classes for each in found)
        assert not any(each.error for each in found)
        assert all(each.refer and "every image is referred" in each.refer_reason for each in found)  # 9 of val


def test_a_run_is_given_by_itself_its_name_or_its_folder(trained, run):
    file = next((load_dataset("tiny", trained).root).rglob("*.png"))
    rows = [Predictor.load(source, trained).predict([file])[0].row() for source in (run, run.name, run.path)]
    assert rows[0] == rows[1] == rows[2]
    keys = {"path", "label", "scores", "prediction_set", "refer", "refer_reason", "error", "operating_points"}
    assert set(rows[0]) == keys


def test_a_run_has_the_rules_of_the_class_that_the_dataset_calls_healthy_now(trained, run):
    file, val, classes = trained.data / "tiny" / "dataset.toml", predictions_of(run, "val"), run.record.classes
    told = read_toml(file)
    for changes, negative in (
        ({"negative_class": "benign"}, "benign"),
        ({"negative_class": "benign", "classes": classes[::-1]}, "normal"),  # another dataset by now
    ):
        write_toml(file, told | changes)
        predictor = Predictor.load(run, trained, device="cpu")
        assert predictor.negative_class == negative and predictor.rules == fit_rules(val, classes, negative)
    file.unlink()
    assert Predictor.load(run, trained, device="cpu").negative_class == "normal" == run.record.negative_class
    assert fit_rules(val, classes, "benign") != fit_rules(val, classes, "normal")


def test_a_bad_file_is_a_row_with_a_reason(trained, run, tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    good = next(load_dataset("tiny", trained).root.rglob("*.png")).read_bytes()
    (folder / "a.png").write_bytes(good)
    (folder / "b.png").write_bytes(good[:200])
    (folder / "c.png").write_bytes(b"")
    (folder / "d.JPG").write_bytes(b"no image")
    (folder / "e.png").symlink_to(folder / "gone")
    (folder / "f.PNG").write_bytes(good)
    (folder / ".hidden.png").write_bytes(good)
    (folder / "notes.txt").write_text("no image")
    predictor = Predictor.load(run)
    found = predictor.predict([folder])
    assert [each.path[-5:] for each in found] == ["a.png", "b.png", "c.png", "d.JPG", "e.png", "f.PNG"]
    assert [each.error is None for each in found] == [True, False, False, False, False, True]
    assert all(each.error and each.label is None and each.scores == {} for each in found[1:5])
    assert found[0].scores == pytest.approx(found[5].scores)
    named = predictor.predict([folder / "e.png", folder / "notes.txt"])
    assert named[0].error == "No such file or directory" and named[1].error
    with pytest.raises(BadImage):
        predictor.pixels(b"")


def test_images_are_found_in_order_and_what_is_not_there_is_said(tmp_path):
    for name in ("b/2.png", "b/1.jpeg", "a.tif", "c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    given = [tmp_path / "c.webp", tmp_path / "b"]
    assert [file.name for file in find_images(given)] == ["c.webp", "1.jpeg", "2.png"]
    assert len(find_images([tmp_path])) == 4
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZooError, match=r"folder '.*empty' holds no image \(.bmp, "):
        find_images([tmp_path / "empty"])
    for missing in (tmp_path / "gone", "a" * 5000):
        with pytest.raises(ZooError, match=r"there is no file or folder .*check the path"):
            find_images([missing])
    with pytest.raises(ZooError, match="no image was named"):
        find_images([])


def test_what_cannot_predict_is_said(trained, run):
    with pytest.raises(ZooError, match="there is no bundle or run 'tiny--tinny--s0'; did you mean"):
        Predictor.load("tiny--tinny--s0", trained)
    with pytest.raises(ZooError, match="device 'gpu' is not on this machine"):
        Predictor.load(run, device="gpu")
    run.write_record(run.record.model_copy(update={"status": "failed", "reason": "no luck"}))
    with pytest.raises(ZooError, match="did not finish: no luck"):
        Predictor.load(run)


HOSTILE_STEMS = ["plain", "a b", "..hidden", "$(x)", "肺", "n" * 200, "x;rm -rf"]


def test_where_it_looked_is_written_beside_no_one_else_s_picture(trained, run, tmp_path):
    good = next(load_dataset("tiny", trained).root.rglob("*.png")).read_bytes()
    files = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for stem in HOSTILE_STEMS:
            files.append(tmp_path / folder / f"{stem}.png")
            files[-1].write_bytes(good)
    files.insert(3, tmp_path / "bad.png")
    files[3].write_bytes(b"no picture")
    found = Predictor.load(run, trained, device="cpu").predict(files, batch_size=4, explain=tmp_path / "maps")
    assert found[3].explanation is None and found[3].row(explained=True)["explanation"] is None
    written = [each.explanation for each in found if each.explanation]
    assert len(set(written)) == len(written) == 2 * len(HOSTILE_STEMS)
    assert sorted(written) == sorted(str(each) for each in (tmp_path / "maps").iterdir())
    side = run.record.preprocessing.image_size
    pictures = [np.asarray(Image.open(each)) for each in written]
    assert all(picture.shape == (side, 2 * side, 3) for picture in pictures)
    seen = Predictor.load(run, trained, device="cpu").pixels(good)
    assert all(np.array_equal(picture[:, :side], seen) for picture in pictures)
    assert (pictures[0][:, side:] != seen).any()
    assert "explanation" not in found[0].row()


def test_a_folder_that_cannot_take_pictures_is_said_before_any_work(trained, run, tmp_path, full_disk):
    file = next(load_dataset("tiny", trained).root.rglob("*.png"))
    predictor = Predictor.load(run, trained)
    (tmp_path / "file").write_text("")
    for folder, said in ((tmp_path / "file", "explain needs a folder .* Got the file"), (full_disk, "No space left")):
        with pytest.raises(ZooError, match=said):
            predictor.predict([file], explain=folder)
