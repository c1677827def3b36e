"""A bundle is refused as soon as one byte of it is not what was written, or anything else lies in it."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zoo.deployment.bundle import (
    CARD,
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
from zoo.deployment.onnx_file import check_onnx
from zoo.errors import ZooError
from zoo.files import sha256_file
from zoo.runs import Preprocessing

FILES = ("bundle.json", "card.md", "model.onnx", "sample.png", "SHA256SUMS")


def small_graph() -> bytes:
    """A network of one layer as ONNX: the mean of three channels times a weight."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(__import__("numpy").eye(3, dtype="float32"), "weight")
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [weight],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def write(folder, model: bytes | None = None):
    """A whole bundle of a network of one layer; no run is needed for it."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(small_graph() if model is None else model)
    (folder / CARD).write_text("# card\n")
    (folder / SAMPLE).write_bytes(b"a sample")
    record = BundleRecord(
        name=folder.name,
        run="tiny--a--s0--01234567",
        dataset="tiny",
        recipe="a",
        seed=0,
        model="simple_cnn",
        classes=["a", "b", "c"],
        preprocessing=Preprocessing(
            image_size=8, crop_pct=1.0, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1)
        ),
        format="onnx",
        precision="float32",
        split_digest="0" * 64,
        sample=Sample(logits=[0.0, 0.0, 0.0], tolerance=1e-3),
        files={},
    )
    seal(folder, record)
    return folder


def reseal(folder, **changes):
    """Change the record and make the digests right again, as somebody who means harm would."""
    table = json.loads((folder / RECORD).read_text())
    table |= changes
    for name in ("model.onnx", CARD, SAMPLE):
        table["files"][name] = sha256_file(folder / name)
    (folder / RECORD).write_text(json.dumps(table))
    (folder / SUMS).write_text(sums_text({name: sha256_file(folder / name) for name in FILES if name != SUMS}))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bundles") / "good")


@pytest.fixture
def bundle(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "home" / "models" / "bundles" / "good")


def test_a_whole_bundle_opens_and_sha256sum_agrees(bundle):
    import subprocess

    found = open_bundle(bundle)
    assert found.record.classes == ["a", "b", "c"] and found.size_bytes == (bundle / "model.onnx").stat().st_size
    assert sorted(path.name for path in bundle.iterdir()) == sorted(FILES)
    assert subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=bundle, check=False).returncode == 0


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_of_any_file_is_refused(bundle, data):
    file = bundle / data.draw(st.sampled_from(FILES))
    before = file.read_bytes()
    place = data.draw(st.integers(0, len(before) - 1))
    flipped = before[place] ^ data.draw(st.integers(1, 255))
    file.write_bytes(before[:place] + bytes([flipped]) + before[place + 1 :])
    try:
        with pytest.raises(ZooError, match="is refused: "):
            open_bundle(bundle)
    finally:
        file.write_bytes(before)
    assert open_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut", "longer", "empty", "gone"])
def test_a_file_that_is_cut_longer_empty_or_gone_is_refused(bundle, name, how):
    file = bundle / name
    data = file.read_bytes()
    file.unlink()
    if how != "gone":
        file.write_bytes({"cut": data[:-1], "longer": data + b"\n", "empty": b""}[how])
    with pytest.raises(ZooError, match=r"is refused: |there is no bundle"):
        open_bundle(bundle)


class _Runs:
    def __reduce__(self):
        return (os.system, ("touch ran",))


@pytest.mark.parametrize(
    "name", ["model.pkl", "model.pt2", "model.pt", "model.onnx.data", ".hidden", "a\nb", "x" * 200]
)
def test_a_foreign_file_is_refused_and_never_opened(bundle, name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (bundle / name).write_bytes(pickle.dumps(_Runs()))
    reseal(bundle)
    with (bundle / SUMS).open("a") as stream:  # even where the sums name it
        stream.write(f"{sha256_file(bundle / name)}  {name}\n")
    with pytest.raises(ZooError, match=r"does not belong to a bundle and is never opened") as caught:
        open_bundle(bundle)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_the_place_of_a_file_is_refused(bundle, tmp_path, name):
    outside = tmp_path / "outside"
    (bundle / name).rename(outside)
    (bundle / name).symlink_to(outside)
    with pytest.raises(ZooError, match="is a link"):
        open_bundle(bundle)


def test_folders_links_to_folders_and_pipes_inside_are_refused(bundle, tmp_path):
    makers = {
        "folder": lambda path: path.mkdir(),
        "link to a folder": lambda path: path.symlink_to(tmp_path, target_is_directory=True),
        "broken link": lambda path: path.symlink_to(tmp_path / "gone"),
        "pipe": os.mkfifo,  # opened, it would wait for ever
    }
    for make in makers.values():
        make(bundle / "more")
        with pytest.raises(ZooError, match=r"is a link|is no regular file"):
            open_bundle(bundle)
        shutil.rmtree(bundle / "more") if make is makers["folder"] else (bundle / "more").unlink()
    (bundle / "model.onnx").unlink()
    os.mkfifo(bundle / "model.onnx")
    with pytest.raises(ZooError, match="is no regular file"):
        open_bundle(bundle)


def test_a_huge_record_is_refused_before_it_is_read(bundle, monkeypatch):
    monkeypatch.setattr("zoo.deployment.bundle.MAX_RECORD_BYTES", 100)
    with pytest.raises(ZooError, match="larger than"):
        open_bundle(bundle)


def test_a_newer_schema_is_refused_politely(bundle):
    reseal(bundle, schema_version=2)
    with pytest.raises(ZooError, match=r"schema_version 2; this zoo reads up to 1: update the zoo"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "pickle"}, "damaged at 'format'"),
        ({"classes": "abc"}, "damaged at 'classes'"),
        ({"preprocessing": {"image_size": 8}}, r"damaged at 'preprocessing\.crop_pct'"),
        ({"sample": {"logits": ["x"], "tolerance": 1}}, r"damaged at 'sample\.logits\.0'"),
        ({"format": "openvino"}, "it must hold"),
    ],
)
def test_a_damaged_record_says_where(bundle, changes, said):
    reseal(bundle, **changes)
    with pytest.raises(ZooError, match=said):
        open_bundle(bundle)


def test_digests_of_record_and_sums_must_be_the_same(bundle):
    table = json.loads((bundle / RECORD).read_text())
    table["files"][CARD] = "0" * 64
    (bundle / RECORD).write_text(json.dumps(table))
    (bundle / SUMS).write_text(sums_text({name: sha256_file(bundle / name) for name in FILES if name != SUMS}))
    with pytest.raises(ZooError, match="name different digests"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b", "x" * 5000, "../../etc", "\x1b[31mred", "gooood"])
def test_a_name_of_nothing_is_a_mistake_in_one_line(root, whole, name):
    shutil.copytree(whole, root.bundles / "good")
    with pytest.raises(ZooError, match="there is no bundle") as caught:
        find_bundle(name, root)
    said = str(caught.value)
    assert len(said) < 600 and said.isprintable()
    assert list_bundles(root) == ["good"]
    assert name != "gooood" or "did you mean 'good'" in said


# Weights that lie elsewhere ---------------------------------------------------------------------------------------


def outside_graph(place: str = "initializer", path: str = "../../secret") -> bytes:
    """The small network, but with weights that are said to lie in another file."""
    import onnx
    from onnx import TensorProto, helper

    proto = onnx.load_from_string(small_graph())
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[3, 3], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": path, "offset": "0", "length": "36"}.items():
        tensor.external_data.add(key=key, value=value)
    if place == "initializer":
        del proto.graph.initializer[:]
        proto.graph.initializer.append(tensor)
    elif place == "constant":
        proto.graph.node.append(helper.make_node("Constant", [], ["more"], value=tensor))
    elif place == "subgraph":
        inside = helper.make_graph([], "inside", [], [], [tensor])
        proto.graph.node.append(helper.make_node("If", ["flat"], ["more"], then_branch=inside, else_branch=inside))
    elif place == "sparse":
        sparse = onnx.SparseTensorProto(values=tensor, dims=[3, 3])
        proto.graph.sparse_initializer.append(sparse)
    else:
        constant = helper.make_node("Constant", [], ["more"], value=tensor)
        proto.functions.append(helper.make_function("own", "f", [], ["more"], [constant], []))
    return proto.SerializeToString()


@pytest.mark.parametrize("place", ["initializer", "constant", "subgraph", "sparse", "function"])
def test_weights_in_another_file_are_refused_wherever_they_are_named(tmp_path, place):
    check_onnx(small_graph())
    with pytest.raises(ZooError, match="names weights in another file, which is never opened"):
        check_onnx(outside_graph(place))
    folder = write(tmp_path / "a", outside_graph(place))
    with pytest.raises(ZooError, match="names weights in another file"):
        open_bundle(folder)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_graph_is_refused_or_harmless_but_never_a_traceback(data):
    whole = bytearray(small_graph())
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        check_onnx(bytes(whole[: data.draw(st.integers(0, len(whole)))]))
    except ZooError as error:
        assert "ONNX file" in str(error)
