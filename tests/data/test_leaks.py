from __future__ import annotations

import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
from PIL import Image
from scenes import READY_SPLIT, draw_scene

from zoo.data import duplicates, pictures
from zoo.data import facts as facts_module
from zoo.data.facts import dataset_facts, facts_file
from zoo.data.leaks import duplicate_pairs, find_leaks, leaks_of, refuse_leaks, scan_order
from zoo.data.manifest import load_dataset
from zoo.data.resplit import resplit_dataset
from zoo.data.sources import describe_import, import_dataset
from zoo.errors import ZooError


@pytest.fixture
def source(tmp_path, write_scenes):
    return write_scenes(tmp_path / "source", READY_SPLIT)


def test_an_honest_split_has_no_leaks(root, source):
    dataset = import_dataset(source, "mine", root)
    leaks = find_leaks(dataset)
    assert (leaks.ok, leaks.count, leaks.remedy, leaks.sentences()) == (True, 0, "", [])
    assert refuse_leaks(dataset, accept=False) is False
    assert not any("LEAKS" in line for line in describe_import(dataset))


def test_planted_copies_are_found_and_refused(root, source):
    shutil.copy(source / "train/a/00003.png", source / "test/a/copy.png")
    Image.open(source / "train/b/00025.png").save(source / "test/b/again.jpg", quality=70)
    Image.open(source / "train/b/00026.png").resize((48, 48)).save(source / "val/b/smaller.png")
    dataset = import_dataset(source, "mine", root)
    leaks = find_leaks(dataset)
    assert (leaks.exact_pairs, leaks.near_pairs, leaks.ok) == (1, 2, False)
    assert leaks.examples["exact_pairs"] == [["test/a/copy.png", "train/a/00003.png"]]
    assert "zoo data split mine --repair" in leaks.remedy
    with pytest.raises(ZooError, match=r"dataset 'mine' leaks: 1 pairs .*--repair.*--accept-leaks"):
        refuse_leaks(dataset, accept=False)
    assert refuse_leaks(dataset, accept=True) is True
    assert any(line.startswith("LEAKS: ") for line in describe_import(dataset))


@pytest.mark.slow
def test_train_and_bench_refuse_a_leaking_test_split_and_go_on_where_it_is_accepted(tiny, source, make_recipe):
    from zoo.benchmark.comparisons import comparison_of
    from zoo.benchmark.suite import bench
    from zoo.reporting.tables import title
    from zoo.training.loop import train

    shutil.copy(source / "train/a/00003.png", source / "test/a/copy.png")
    import_dataset(source, "leaking", tiny)
    with pytest.raises(ZooError, match="dataset 'leaking' leaks"):
        train("tiny-lp", "leaking", 0, tiny)
    with pytest.raises(ZooError, match="dataset 'leaking' leaks"):
        bench(data="leaking", recipes=["tiny-lp"], seeds=1, root=tiny)
    assert not list(tiny.runs.glob("leaking*"))
    run = train("tiny-lp", "leaking", 0, tiny, accept_leaks=True)
    assert run.record.leaks_accepted
    result = bench(data="leaking", recipes=["tiny-lp"], seeds=1, root=tiny, accept_leaks=True)
    assert result.comparison.leaks_accepted
    assert result.comparison.document()["leaks_accepted"] is True
    assert "LEAKS ACCEPTED" in (result.folder / "table.md").read_text().splitlines()[0]
    assert title(comparison_of(data="leaking", root=tiny)).endswith("LEAKS ACCEPTED")


def test_a_run_on_an_honest_split_says_nothing_of_leaks(trained):
    from zoo.benchmark.comparisons import comparison_of

    comparison = comparison_of(data="tiny", root=trained)
    assert comparison.leaks_accepted is False


def test_a_group_in_two_splits_is_a_leak(root, source):
    dataset = import_dataset(source, "mine", root)
    frame = dataset.frame
    lines = ["path,label,split,group"]
    for row in frame.itertuples():
        lines.append(f"{row.path},{row.label},{row.split},{'torn' if row.Index in (0, 30) else row.sample_id}")
    (source / "mine.csv").write_text("\n".join(lines))
    torn = find_leaks(import_dataset(source / "mine.csv", "torn", root))
    assert (torn.groups, torn.examples["groups"]) == (1, ["torn"])


def test_copies_with_two_labels_are_refused_wherever_they_stand(root, source):
    shutil.copy(source / "train/a/00003.png", source / "train/b/other-label.png")
    leaks = find_leaks(import_dataset(source, "mine", root))
    assert (leaks.label_conflicts, leaks.count, leaks.ok) == (1, 0, False)
    assert "--drop-duplicates" in leaks.remedy
    mended = resplit_dataset("mine", root, drop_duplicates=True)
    assert find_leaks(mended).ok
    assert set(mended.facts["dropped"]) == {"train/a/00003.png", "train/b/other-label.png"}


def test_the_answer_is_remembered_by_the_splits_digest_and_needs_no_image(root, source):
    dataset = import_dataset(source, "mine", root)
    assert facts_file(dataset).is_file()  # from the import itself
    assert find_leaks(dataset).ok
    shutil.rmtree(source)
    assert find_leaks(load_dataset("mine", root)).ok


def test_what_is_remembered_of_a_file_counts_until_it_changes(root, source):
    dataset = import_dataset(source, "mine", root)
    place = dataset.frame["path"].tolist().index("test/a/00052.png")
    file = source / "test/a/00052.png"
    old = file.read_bytes()
    file.unlink()
    assert dataset_facts(dataset).reasons[place] == "gone"
    file.write_bytes(b"broken")
    assert dataset_facts(dataset).reasons[place].startswith("no image")
    shutil.copy(source / "train/a/00003.png", file)
    assert dataset_facts(dataset).changed[place]
    file.write_bytes(old)
    assert dataset_facts(dataset).good.all()
    assert not dataset_facts(dataset).changed.any()


def write_scans(folder, patients: int = 12, slices: int = 12):
    """Write slices numbered in scan order: those of one patient glide from one picture to another."""
    number = 0
    for patient in range(patients):
        label = "ab"[patient % 2]
        (folder / label).mkdir(parents=True, exist_ok=True)
        first, last = draw_scene(1000 + patient).astype(float), draw_scene(2000 + patient).astype(float)
        for place in range(slices):
            number += 1
            part = place / slices
            pixels = (first * (1 - part) + last * part).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"slice ({number}).png")
    return folder


def test_numbers_in_scan_order_are_found_and_refused_until_they_are_grouped(root, tmp_path):
    dataset = import_dataset(write_scans(tmp_path / "scans"), "scans", root)
    order = scan_order(dataset, dataset_facts(dataset))
    assert order is not None
    assert order.found
    assert order.share > 0.9
    leaks = find_leaks(dataset)
    assert leaks.scan_order > 10
    assert "--group-blocks 20" in leaks.remedy
    grouped = resplit_dataset("scans", root, group_blocks=12)
    assert find_leaks(grouped).ok
    assert grouped.split_digest != dataset.split_digest


def test_numbers_without_order_are_no_leak(root, tmp_path, write_scenes):
    folder = write_scenes(tmp_path / "photos", {"a": range(300, 360), "b": range(400, 460)})
    dataset = import_dataset(folder, "photos", root)
    order = scan_order(dataset, dataset_facts(dataset))
    assert order is not None
    assert not order.found


def test_near_duplicates_are_kept_together_by_default(root, tmp_path, write_scenes):
    folder = write_scenes(tmp_path / "photos", {"a": range(300, 340), "b": range(400, 440)})
    for number in range(300, 340, 2):
        Image.open(folder / "a" / f"{number:05}.png").save(folder / "a" / f"copy-{number:05}.jpg", quality=80)
    dataset = import_dataset(folder, "photos", root)
    assert dataset.facts["split"]["near_duplicates"] is True
    assert find_leaks(dataset).ok
    torn = import_dataset(folder, "torn", root, near_duplicates=False)
    assert find_leaks(torn).near_pairs > 3
    assert "--group-near-duplicates" in find_leaks(torn).remedy
    assert find_leaks(resplit_dataset("torn", root, near_duplicates=True)).ok


@pytest.mark.slow
def test_advice_for_shipped_splits_in_scan_order_helps(root, tmp_path):
    folder = write_scans(tmp_path / "scans", 40, 12)
    lines = ["path,label,split"]
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        split = ("train", "train", "val", "test")[number % 4]
        lines.append(f"{path.relative_to(folder)},{path.parent.name},{split}")
    (folder / "all.csv").write_text("\n".join(lines))
    dataset = import_dataset(folder / "all.csv", "scans", root)
    leaks = find_leaks(dataset)
    assert leaks.scan_order > 50
    assert "--force" in leaks.remedy or leaks.near_pairs
    assert find_leaks(resplit_dataset("scans", root, force=True, group_blocks=20)).ok


@pytest.mark.slow
@pytest.mark.parametrize("on_disk", [False, True])
def test_leaks_are_the_same_where_the_pictures_of_a_large_dataset_stay_on_disk(root, source, monkeypatch, on_disk):
    for name in ("again", "once-more"):
        Image.open(source / "train/b/00025.png").save(source / f"test/b/{name}.jpg", quality=70)
    shutil.copy(source / "train/a/00003.png", source / "test/a/copy.png")
    dataset = import_dataset(source, "mine", root)
    expected, first = find_leaks(dataset), dataset_facts(dataset)
    order = scan_order(dataset, first)
    for file in (dataset.folder / ".cache").iterdir():
        file.unlink()
    if on_disk:
        monkeypatch.setattr(facts_module, "_IN_MEMORY", 3)
    monkeypatch.setattr(pictures, "_TOUCHED", 7)
    for module in (facts_module, pictures, duplicates):
        monkeypatch.setattr(module, "BLOCK", 5)

    def check():
        facts = dataset_facts(dataset)
        assert isinstance(facts.small, pictures.Pictures) == on_disk
        for each in fields(facts):
            np.testing.assert_array_equal(getattr(facts, each.name)[:], getattr(first, each.name)[:])
        found = scan_order(dataset, facts)
        assert (found.share, found.by_chance, found.asked) == (order.share, order.by_chance, order.asked)
        return leaks_of(dataset, duplicate_pairs(dataset, facts), found)

    assert check() == check() == expected  # looked at, then remembered
    place = 11
    file = dataset.image_path(dataset.frame["path"][place])
    data = file.read_bytes()
    file.write_bytes(b"no image at all")
    assert [place] == np.flatnonzero(~dataset_facts(dataset).good).tolist()
    assert dataset_facts(dataset).reasons[place].startswith("no image")
    lacking = leaks_of(dataset, duplicate_pairs(dataset, dataset_facts(dataset)), None)
    assert lacking.near_pairs <= expected.near_pairs
    file.write_bytes(data)
    first = replace(first, stats=dataset_facts(dataset).stats)
    assert check() == expected
    stored = facts_file(dataset)
    whole = stored.read_bytes()
    for at in range(0, len(whole), 997):
        stored.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        assert check() == expected


def test_exact_pairs_of_many_equal_keys_are_each_with_the_first():
    assert duplicates.exact_pairs([]).tolist() == []
    assert duplicates.exact_pairs(["b", "a", "b", "b", "a"]).tolist() == [[0, 2], [0, 3], [1, 4], [2, 3]]
    many = duplicates.exact_pairs(["x", *["y"] * 51, "x"])
    assert many.tolist() == [[0, 52], *([1, other] for other in range(2, 52))]
