from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from scenes import draw_scene

from zoo.data.canonical import canonical_names, canonical_record, published_rows
from zoo.data.leaks import find_leaks
from zoo.data.manifest import list_datasets, load_dataset
from zoo.data.sources import import_dataset
from zoo.errors import ZooError
from zoo.files import builtin_folder

CANCERS = ("adenocarcinoma", "large.cell.carcinoma", "normal", "squamous.cell.carcinoma")


def test_both_are_known_and_say_where_they_come_from():
    assert set(canonical_names()) == {"iq_othnccd", "chest_ctscan"}
    for name in canonical_names():
        record = canonical_record(name)
        for key in ("summary", "licence", "source", "note", "faults", "classes", "original"):
            assert record[key], (name, key)
        assert record["medical"] is True


def test_the_published_manifest_is_whole_and_tears_no_group():
    rows = published_rows("iq_othnccd")
    assert rows is not None
    assert len(rows) == canonical_record("iq_othnccd")["counts"]["images"] == 1055
    of_group: dict[str, set[str]] = {}
    for _, _, _, group, split, _, _ in rows:
        of_group.setdefault(group, set()).add(split)
    assert all(len(splits) == 1 for splits in of_group.values())
    assert len({row[6] for row in rows}) == len(rows)
    assert {row[2] for row in rows} == {"benign", "malignant", "normal"}
    assert published_rows("chest_ctscan") is None


@pytest.mark.parametrize("name", ["iq_othnccd", "chest_ctscan"])
def test_without_the_download_it_is_said_what_to_do(root, tmp_path, name):
    with pytest.raises(ZooError, match=rf"zoo data import {name} --from FOLDER_OR_ZIP"):
        import_dataset(name, name, root)
    with pytest.raises(ZooError, match=r"--from must be a folder or a \.zip"):
        import_dataset(name, name, root, from_=tmp_path / "nothing")
    with pytest.raises(ZooError, match=rf"{name}.* is not here; .*zoo data import {name} --from"):
        load_dataset(name, root)
    assert not (root.data / name).exists()


def test_another_download_is_refused_by_its_content(root, tmp_path, write_scenes):
    folder = write_scenes(tmp_path / "x", {"Bengin cases": range(3), "Normal cases": range(9, 12)})
    with pytest.raises(ZooError, match=r"is not the iq_othnccd that is published here: 0 of its 1055 images"):
        import_dataset("iq_othnccd", "iq_othnccd", root, from_=folder)
    assert not (root.data / "iq_othnccd").exists()


def test_a_damaged_or_hostile_zip_is_refused(root, tmp_path):
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("../../evil.png", b"x")
        opened.writestr("/abs.png", b"x")
    with pytest.raises(ZooError, match="0 of its 1055 images are in it"):
        import_dataset("iq_othnccd", "iq_othnccd", root, from_=archive)
    with pytest.raises(ZooError, match="holds no image"):
        import_dataset("chest_ctscan", "chest_ctscan", root, from_=archive)
    assert not list(tmp_path.rglob("evil.png"))
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(ZooError, match=r"--from must be a folder or a \.zip"):
        import_dataset("iq_othnccd", "iq_othnccd", root, from_=archive)


def test_the_list_says_which_public_sets_are_still_to_be_imported(root):
    status = {row["name"]: row["status"] for row in list_datasets(root)}
    assert status["iq_othnccd"] == "to import with --from"


@pytest.mark.slow
def test_the_original_gives_the_published_bytes_from_a_folder_and_from_a_zip(root, tmp_path, assets):
    original = assets / "data" / "iq_othnccd"
    dataset = import_dataset("iq_othnccd", "iq_othnccd", root, from_=original)
    published = builtin_folder("data") / "iq_othnccd"
    for name in ("manifest.csv", "dataset.toml"):
        assert (dataset.folder / name).read_bytes() == (published / name).read_bytes()
    assert find_leaks(dataset).ok
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as opened:
        for number, file in enumerate(sorted(original.rglob("*.jpg"))):
            opened.write(file, f"renamed/{number}.jpg")  # known by content, not by name
    zipped = import_dataset("iq_othnccd", "zipped", root, from_=tmp_path / "archive.zip")
    assert zipped.split_digest == dataset.split_digest


def look_alike(folder: Path) -> Path:
    """Write what FACTS say of the Chest CT-Scan images: other class names in test, copies, a conflict, JPEGs "
    "named .png."""
    counts = canonical_record("chest_ctscan")["original"]["images"]
    number = 0
    for place, count in counts.items():
        (folder / "Data" / place).mkdir(parents=True)
        for each in range(count):
            number += 1
            image = Image.fromarray(draw_scene(10_000 + number, 24)).convert("RGBA" if number % 5 else "RGB")
            image.save(folder / "Data" / place / f"{each:06} ({each}).png")
    data = folder / "Data"
    for number in range(46):
        source = sorted((data / "train/normal").iterdir())[number]
        shutil.copy(source, sorted((data / "test/normal").iterdir())[number])
    conflict = sorted((data / "train" / "large.cell.carcinoma_left.hilum_T2_N2_M0_IIIa").iterdir())[0]
    shutil.copy(conflict, sorted((data / "train/normal").iterdir())[100])
    for file in sorted((data / "valid/normal").iterdir())[:4]:
        with Image.open(file) as opened:
            opened.convert("RGB").save(file, "JPEG")
    return folder


@pytest.mark.slow
def test_a_look_alike_of_the_chest_images_comes_out_clean(root, tmp_path):
    dataset = import_dataset("chest_ctscan", "chest_ctscan", root, from_=look_alike(tmp_path / "download"))
    assert tuple(dataset.classes) == CANCERS
    assert dataset.negative_class == "normal"
    assert len(dataset.of_split("test")) == 315
    dropped = dataset.facts["dropped"]
    assert sum(reason.startswith("the same picture stands in test") for reason in dropped.values()) == 46
    assert sum("is labelled" in reason for reason in dropped.values()) == 2
    assert all(path.startswith(("train/", "valid/")) for path in dropped)
    assert find_leaks(dataset).ok
    assert dataset.facts["renamed_classes"]["adenocarcinoma_left.lower.lobe_T2_N0_M0_Ib"] == "adenocarcinoma"
    assert "7 classes" in dataset.facts["faults"][0]
    (next((tmp_path / "download" / "Data" / "test" / "normal").iterdir())).unlink()
    with pytest.raises(ZooError, match=r"the folder 'test/normal' holds 53 images, and should hold 54"):
        import_dataset("chest_ctscan", "other", root, from_=tmp_path / "download")


@pytest.mark.slow
def test_a_published_split_is_kept(root, assets):
    from zoo.data.resplit import resplit_dataset

    dataset = import_dataset("iq_othnccd", "iq_othnccd", root, from_=assets / "data" / "iq_othnccd")
    assert resplit_dataset("iq_othnccd", root).split_digest == dataset.split_digest
    with pytest.raises(ZooError, match="were shipped with the data and are kept"):
        resplit_dataset("iq_othnccd", root, seed=1)


@pytest.mark.parametrize("options", [{"window": "lung"}, {"group_blocks": 20}, {"copy": True}, {"patients": 3}])
def test_a_public_set_takes_no_options_of_its_own(root, tmp_path, options):
    with pytest.raises(ZooError, match="is imported as it is published"):
        import_dataset("iq_othnccd", "iq_othnccd", root, from_=tmp_path, **options)
