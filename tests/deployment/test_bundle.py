from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.deployment.bundle import (
    CARD,
    MAX_RECORD_BYTES,
    RECORD,
    SAMPLE,
    SUMS,
    BundleRecord,
    Sample,
    find_bundle,
    list_bundles,
    open_bundle,
    seal,
    sums_text,
)
from zoo.errors import ZooError
from zoo.files import home, sha256_file
from zoo.runs import Preprocessing

PREPROCESSING = Preprocessing(
    image_size=32, crop_pct=0.9, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


def make(folder: Path, name: str = "a", form: str = "onnx") -> Path:
    """Write a bundle whose network is a few bytes: whether it is whole is asked before anybody opens it."""
    folder.mkdir(parents=True)
    for number, file in enumerate(("model.onnx",) if form == "onnx" else ("model.xml", "model.bin")):
        (folder / file).write_bytes(bytes(range(number, 40)))
    (folder / CARD).write_text("# a card\n")
    (folder / SAMPLE).write_bytes(b"no picture")
    record = BundleRecord(
        name=name,
        run="r",
        dataset="d",
        recipe="c",
        seed=0,
        model="m",
        classes=["x", "y"],
        preprocessing=PREPROCESSING,
        format=form,
        precision="float32",
        split_digest="0" * 64,
        sample=Sample(logits=[0.0, 1.0], tolerance=1e-3),
        files={},
    )
    seal(folder, record)
    return folder


def resum(folder: Path) -> None:
    """Write the sums of what lies in a folder now, as somebody would who means harm."""
    names = [path.name for path in folder.iterdir() if path.name != SUMS]
    (folder / SUMS).write_text(sums_text({name: sha256_file(folder / name) for name in names}))


@pytest.fixture
def bundle(root):
    return make(root.bundles / "a")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {form: make(tmp_path_factory.mktemp("whole") / form, form=form) for form in ("onnx", "openvino")}


def test_a_whole_bundle_opens_by_name_and_by_folder(root, bundle):
    assert open_bundle("a", root).path == bundle
    assert open_bundle(bundle, root).record == open_bundle("a", root).record
    assert open_bundle("a", root).model_file == bundle / "model.onnx"
    assert open_bundle("a", root).size_bytes == 40 and open_bundle("a", root).card == "# a card\n"
    assert list_bundles(root) == ["a"]


@pytest.mark.parametrize("form", ["onnx", "openvino"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_changed_in_any_file_is_refused(whole, tmp_path, form, data):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole[form], folder)
    open_bundle(folder)
    file = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    with pytest.raises(ZooError, match="is refused: "):
        open_bundle(folder)


@pytest.mark.parametrize("file", [RECORD, CARD, SAMPLE, SUMS, "model.onnx"])
@pytest.mark.parametrize("change", ["gone", "empty", "longer"])
def test_a_file_gone_emptied_or_grown_is_refused(bundle, file, change):
    if change == "gone":
        (bundle / file).unlink()
    else:
        (bundle / file).write_bytes((bundle / file).read_bytes() + b"\n" if change == "longer" else b"")
    with pytest.raises(ZooError, match="there is no bundle" if (file, change) == (RECORD, "gone") else "is refused"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["x.pkl", "model.pt2", "model.pt", "notes.txt", ".hidden", "model.onnx.data", "a\nb"])
def test_a_foreign_file_is_refused_even_where_the_sums_name_it(bundle, tmp_path, name):
    witness = tmp_path / "witness"

    class Harm:
        def __reduce__(self):
            return Path.write_text, (witness, "ran")

    (bundle / name).write_bytes(pickle.dumps(Harm()))
    for _ in range(2):
        with pytest.raises(ZooError, match="does not belong to a bundle and is never opened") as refused:
            open_bundle(bundle)
        assert "\n" not in str(refused.value)
        resum(bundle)
    assert not witness.exists()


@pytest.mark.parametrize("file", ["model.onnx", SUMS, CARD])
def test_a_link_is_refused_though_its_target_is_right(bundle, tmp_path, file):
    (bundle / file).rename(tmp_path / "elsewhere")
    (bundle / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ZooError, match="is a link"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["more", "model.onnx"])
@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_a_folder_or_a_pipe_is_refused_without_waiting(bundle, name, kind):
    (bundle / name).unlink(missing_ok=True)
    (bundle / name).mkdir() if kind == "folder" else os.mkfifo(bundle / name)
    with pytest.raises(ZooError, match="is no regular file"):
        open_bundle(bundle)


def edit(bundle: Path, **changes: object) -> None:
    raw = json.loads((bundle / RECORD).read_text()) | changes
    (bundle / RECORD).write_text(json.dumps(raw))
    resum(bundle)


def test_a_newer_record_is_refused_politely(bundle):
    edit(bundle, schema_version=2)
    with pytest.raises(ZooError, match="newer"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": "pickle"}, "damaged at 'format'"),
        ({"precision": "int4"}, "damaged at 'precision'"),
        ({"classes": "x"}, "damaged at 'classes'"),
        ({"format": "openvino"}, "it must hold"),
        ({"files": {"model.onnx": "0" * 64}}, "it must hold"),
        ({"files": dict.fromkeys(("model.onnx", CARD, SAMPLE), "0" * 64)}, "name different digests"),
        ({"files": {"../../etc/passwd": "0" * 64}}, "it must hold"),
        ({"name": "x", "files": {}}, "it must hold"),
        *(({"name": name}, "name that no folder may have") for name in ("../x", "", ".x", "/x", "a/b", "a\\b", "a\nb")),
    ],
)
def test_a_record_that_is_wrong_is_refused_though_the_sums_are_right(bundle, changes, why):
    edit(bundle, **changes)
    with pytest.raises(ZooError, match=why):
        open_bundle(bundle)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b"null"])
def test_a_record_that_is_no_record_is_refused(bundle, content):
    (bundle / RECORD).write_bytes(content)
    resum(bundle)
    with pytest.raises(ZooError) as refused:
        open_bundle(bundle)
    assert "\n" not in str(refused.value)


def test_a_huge_record_is_refused_unread(bundle):
    with (bundle / RECORD).open("r+b") as stream:
        stream.truncate(MAX_RECORD_BYTES + 1)
    resum(bundle)
    with pytest.raises(ZooError, match=r"bundle\.json is larger than 16 MiB"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "b", "x" * 5000, "a\0", "../a/../b", "\x1b[31m", "a/model.onnx", "\udcff"]
)
def test_a_name_that_is_none_is_an_error_of_one_line(root, bundle, name):
    with pytest.raises(ZooError, match="there is no bundle") as refused:
        find_bundle(name, root)
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)


def test_the_nearest_name_is_told_and_staging_is_no_bundle(root):
    make(root.bundles / "resnet18--onnx-float32")
    make(root.bundles / ".new-123")
    assert list_bundles(root) == ["resnet18--onnx-float32"]
    with pytest.raises(ZooError, match="resnet18--onnx-float32"):
        open_bundle("resnet18--onnx-float", root)


def test_an_empty_home_has_no_bundles(tmp_path):
    assert list_bundles(home(tmp_path)) == []


@pytest.mark.parametrize(
    ("path", "mode", "said"),
    [
        (".", 0o711, "'given'"),
        ("model.onnx", 0o600, "'model.onnx'"),
        (RECORD, 0o600, "'bundle.json'"),
        (CARD, 0o600, "'card.md'"),
    ],
)
def test_a_bundle_that_may_not_be_read_is_refused_in_one_line(tmp_path, as_nobody, path, mode, said):
    folder = make(tmp_path / "given")
    tmp_path.chmod(0o755)
    (folder / path).chmod(mode)
    imports = (
        "from pathlib import Path; from zoo.errors import ZooError; from zoo.files import Home\n"
        "from zoo.deployment.bundle import Bundle, open_bundle, read_record\n"
        "record = read_record(Path('given'))"
    )
    code = (
        "for call in (lambda: open_bundle('given', Home(Path('.'))), lambda: Bundle(Path('given'), record).card):\n"
        "    try: call()\n"
        "    except ZooError as error: print(error)"
    )
    told = as_nobody(imports, code, tmp_path).splitlines()
    assert len(told) == 1 + (path == CARD)
    assert all(f"refused: {said} cannot be read: Permission denied; export it again" in each for each in told)


def test_a_folder_among_the_bundles_that_may_not_be_read_hides_no_other(tmp_path, as_nobody):
    make(tmp_path / "models" / "bundles" / "a")
    make(tmp_path / "models" / "bundles" / "b").chmod(0o700)
    tmp_path.chmod(0o755)
    imports = "from zoo.deployment.bundle import list_bundles; from zoo.files import Home; from pathlib import Path"
    assert as_nobody(imports, "print(list_bundles(Home(Path('.'))))", tmp_path) == "['a']\n"
    (tmp_path / "models" / "bundles").chmod(0o700)
    code = "try: list_bundles(Home(Path('.')))\nexcept Exception as error: print(error)"
    assert as_nobody(imports, code, tmp_path).startswith("cannot read the folder 'models/bundles': Permission denied;")
