"""A network that names weights elsewhere is refused wherever in the graph it does, before a runtime reads it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.deployment.onnx_file import check_onnx
from zoo.deployment.runtime import Session
from zoo.errors import ZooError


def small_graph() -> bytes:
    """A network of one layer as ONNX: the mean of three channels times a weight."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.eye(3, dtype=np.float32), "weight")
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


def test_a_whole_network_opens(tmp_path):
    (tmp_path / "a.onnx").write_bytes(small_graph())
    logits, maps = Session(tmp_path / "a.onnx", "onnx", threads=1)(np.ones((2, 3, 8, 8), np.float32))
    np.testing.assert_array_equal(logits, np.ones((2, 3)))
    assert maps is None


@pytest.mark.parametrize("place", ["initializer", "constant", "subgraph", "sparse", "function"])
def test_weights_in_another_file_are_refused_wherever_they_are_named(tmp_path, place):
    (tmp_path / "secret").write_bytes(np.eye(3, dtype=np.float32).tobytes())
    for path in ("../secret", "secret", str(tmp_path / "secret")):
        with pytest.raises(ZooError, match="names weights in another file, which is never opened"):
            check_onnx(outside_graph(place, path))
        file = tmp_path / "b" / "a.onnx"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(outside_graph(place, path))
        with pytest.raises(ZooError, match="is refused: the ONNX file names weights in another file"):
            Session(file, "onnx", threads=1)


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x3a\xff\xff\xff\xff\x7f", b"\xff" * 12, b"\x3a\x7f", b"\x3b"])
def test_what_is_no_network_is_refused_in_one_line(tmp_path, data):
    (tmp_path / "a.onnx").write_bytes(data)
    with pytest.raises(ZooError, match=r"refused|cannot open") as caught:
        Session(tmp_path / "a.onnx", "onnx", threads=1)
    assert "\n" not in str(caught.value)


def test_a_graph_that_is_nested_without_end_is_refused():
    data = b""
    for _ in range(200):  # a graph in an attribute of a node of a graph, and so on
        node = b"\x2a" + _length(b"\x32" + _length(data))
        data = b"\x0a" + _length(node)
    with pytest.raises(ZooError, match="damaged"):
        check_onnx(b"\x3a" + _length(data))


def _length(data: bytes) -> bytes:
    size, found = len(data), b""
    while size > 127:
        found += bytes([size & 127 | 128])
        size >>= 7
    return found + bytes([size]) + data


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
