from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from scenes import AUDIT_KEYS, draw_scene

from zoo.data.sources import import_dataset
from zoo.errors import ZooError
from zoo.reporting.audit import audit_dataset, audit_page, tax_rows, verdict, write_audit
from zoo.reporting.sheets import plot_leak_tax, show_dataset

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def hostile(root, tmp_path, write_scenes):
    folder = write_scenes(
        tmp_path / "h",
        {
            f"{split}/{label}": range(first, first + count)
            for split, count, at in (("train", 12, 0), ("val", 4, 100), ("test", 4, 200))
            for label, first in ((EVIL, 1000 + at), ("=HYPERLINK(1)", 2000 + at), ("{{7*7}}", 3000 + at))
        },
    )
    shutil.copy(next((folder / "train" / EVIL).iterdir()), folder / "test" / EVIL / "a`b|c.png")
    (folder / "train" / "{{7*7}}" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return import_dataset(folder, "hostile", root, bad_images="skip")


def test_the_document_has_what_scripts_rely_on(hostile):
    audit = audit_dataset(hostile)
    assert set(audit.document) >= AUDIT_KEYS | {"findings", "shortcuts"}
    assert audit.document["ok"] is audit.ok is False
    assert audit.document["exact_duplicate_pairs"] == audit.document["cross_split_leaks"] == 1
    assert audit.document["byte_identical_pairs"] == audit.document["components_torn_by_a_split"] == 1
    assert audit.document["unreadable"] == [{"path": "train/{{7*7}}/cut.png", "reason": "truncated"}]
    assert {"given", "random", "grouped"} <= set(audit.document["leak_tax"])
    assert "--repair" in verdict(audit)
    json.dumps(audit.document)


def test_the_page_is_whole_without_a_network_and_shows_hostile_names_as_text(hostile, tmp_path):
    page, document = write_audit(audit_dataset(hostile), tmp_path)
    text = page.read_text()
    assert EVIL not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text
    assert "{{7*7}}" in text
    assert "49" not in re.sub(r'src="[^"]*"', "", text).split("Files")[1].split("cut.png")[0][-40:]
    assert "default-src 'none'" in text
    assert not re.search(r"<script|https?://|@import", text)
    assert len(re.findall(r"data:image/jpeg;base64,", text)) == 2
    assert json.loads(document.read_text())["dataset"] == "hostile"


def test_an_honest_dataset_is_said_to_be_one(tiny):
    audit = audit_dataset("tiny", tiny)
    assert audit.ok
    assert "No leak was found" in verdict(audit)
    assert "No leak was found" in audit_page(audit)
    assert [row[0] for row in tax_rows(audit.document)][:2] == ["the split at hand", "a random split"]


def test_another_grouping_can_be_tried_without_changing_the_split(root, tmp_path):
    folder = tmp_path / "scans"
    for patient in range(16):
        for place in range(6):
            label = "ab"[patient % 2]
            (folder / label).mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(patient * 10 + place).integers(-30, 30, (64, 64, 3))
            pixels = (draw_scene(patient).astype(int) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{patient * 6 + place + 1}.png")
    dataset = import_dataset(folder, "scans", root)
    audit = audit_dataset("scans", root, group_blocks=6)
    assert audit.document["leak_tax"]["grouped_by"] == "blocks of 6 neighbouring file numbers"
    assert audit.document["leak_tax"]["grouped"]["groups"] == 16
    assert audit.document["leak_tax"]["random"]["top1"] > audit.document["leak_tax"]["grouped"]["top1"]
    assert audit.dataset.split_digest == dataset.split_digest
    assert plot_leak_tax(audit.document).axes[0].get_xlabel().startswith("top-1")
    with pytest.raises(ZooError, match="finds no group"):
        audit_dataset("scans", root, group_regex="x(y)")


def test_a_folder_is_audited_before_it_is_imported(tmp_path, write_scenes):
    folder = write_scenes(
        tmp_path / "p", {"train/a": range(9), "train/b": range(20, 29), "test/a": [3], "test/b": [50]}
    )
    audit = audit_dataset(folder)
    assert (audit.document["images"], audit.document["cross_split_leaks"]) == (20, 1)
    (folder / "loose.txt").write_text("x")
    assert [each.kind for each in audit_dataset(folder).findings] == ["no_image"]
    empty = tmp_path / "empty"
    (empty / "a").mkdir(parents=True)
    (empty / "a" / "x.png").write_bytes(b"")
    assert audit_dataset(empty).document["unreadable"] == [{"path": "a/x.png", "reason": "zero bytes"}]


def test_a_dataset_whose_images_are_gone_is_an_error(root, tmp_path, write_scenes):
    folder = write_scenes(tmp_path / "p", {"a": range(9), "b": range(20, 29)})
    dataset = import_dataset(folder, "p", root)
    shutil.rmtree(folder)
    shutil.rmtree(dataset.folder / ".cache")
    with pytest.raises(ZooError, match="no image of 'p' can be read"):
        audit_dataset("p", root)
    with pytest.raises(ZooError, match="no training image of 'p' can be read"):
        show_dataset(dataset)


@pytest.mark.slow
def test_sheets_of_every_class_and_split_and_of_the_policies(hostile, tmp_path):
    files = show_dataset(hostile, tmp_path / "show", per_class=4)
    assert [file.name for file in files] == ["index.html", "train.png", "val.png", "test.png", "augmentation.png"]
    with Image.open(files[1]) as opened:
        assert opened.width > 900
    page = files[0].read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"<script|https?://", page)
    again = show_dataset(hostile, tmp_path / "again", per_class=4)
    assert [file.read_bytes() for file in again[1:]] == [file.read_bytes() for file in files[1:]]
    with pytest.raises(ZooError, match="1 to 40 images"):
        show_dataset(hostile, tmp_path, per_class=0)


@pytest.mark.slow
def test_an_unreadable_image_leaves_its_place_empty(tiny):
    from zoo.data.manifest import load_dataset

    dataset = load_dataset("tiny", tiny)
    dataset.image_path(dataset.of_split("val")["path"][0]).write_bytes(b"")
    assert len(show_dataset(dataset, per_class=2)) == 5


@pytest.mark.slow
def test_the_lung_slices_show_their_tax(root, assets):
    import_dataset(assets / "data" / "iq_othnccd", "plain", root)
    document = audit_dataset("plain", root).document
    assert document["exact_duplicate_pairs"] == 42
    assert document["near_duplicate_pairs"] >= 130
    assert document["ok"] is False
    assert document["leak_tax"]["random"]["top1"] == pytest.approx(0.98, abs=0.01)
    assert document["leak_tax"]["grouped_by"] == "blocks of 20 neighbouring file numbers"
    assert document["leak_tax"]["grouped"]["top1"] == pytest.approx(0.73, abs=0.03)
    assert document["leak_tax"]["joined"]["top1"] < document["leak_tax"]["grouped"]["top1"]
    assert next(row for row in document["shortcuts"] if row["name"] == "file size")["suspicious"]


def test_classes_that_differ_by_split_are_matched_or_said(tmp_path, write_scenes):
    folder = write_scenes(
        tmp_path / "p",
        {"train/adeno_left": range(9), "train/normal": range(20, 29), "test/adeno": [40], "test/Normal": [50]},
    )
    audit = audit_dataset(folder)
    assert audit.dataset.classes == ["Normal", "adeno"]
    assert audit.document["renamed_classes"] == {"adeno_left": "adeno", "normal": "Normal"}
    (folder / "test" / "Normal").rename(folder / "test" / "healthy")
    audit = audit_dataset(folder)
    assert not audit.ok
    assert "the class folders of the splits differ" in verdict(audit)
