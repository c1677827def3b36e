from __future__ import annotations

import argparse
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from zoo.errors import ZooError
from zoo.files import Home
from zoo.models.loading import LoadReport, load_weights, read_weights
from zoo.models.registry import create_model, find_model, register_model
from zoo.models.weights import KNOWN_WEIGHTS, WeightsFile, resolve_weights


def file_of(path: Path) -> WeightsFile:
    return WeightsFile(path, "0" * 64, "recipe path", path.name)


def save_to(path: Path, state: dict[str, Any]) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def load(path: Path, classes: int = 3, name: str = "resnet10t", size: int = 32) -> tuple[nn.Module, LoadReport]:
    spec = find_model(name)
    model = create_model(spec, classes, image_size=size)
    return model, load_weights(model, file_of(path), spec)


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return create_model(find_model("resnet10t"), 5, image_size=32).state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_whole_file_is_loaded_and_the_head_kept(suffix: str, source: Any, tmp_path: Path) -> None:
    model, report = load(save_to(tmp_path / f"a{suffix}", source), classes=5)
    assert report == LoadReport("kept", len(source))
    assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())


def test_a_head_of_another_shape_is_replaced_and_said(source: Any, tmp_path: Path) -> None:
    model, report = load(save_to(tmp_path / "a.safetensors", source), classes=3)
    assert (report.head, report.fresh, report.loaded) == (
        "replaced",
        ("fc.bias", "fc.weight"),
        len(source) - 2,
    )
    assert "the classifier of 'a.safetensors' has another number of classes" in report.note
    assert model.state_dict()["fc.weight"].shape == (3, 512)
    assert torch.equal(model.state_dict()["layer1.0.bn1.weight"], source["layer1.0.bn1.weight"])


def test_half_a_head_is_no_head(source: Any, tmp_path: Path) -> None:
    state = {key: value for key, value in source.items() if key != "fc.weight"}
    model, report = load(save_to(tmp_path / "a.pth", state), classes=5)
    assert (report.head, report.fresh) == ("replaced", ("fc.bias", "fc.weight"))
    assert not torch.equal(model.state_dict()["fc.weight"], source["fc.weight"])


def test_an_absent_head_is_fresh_and_said(source: Any, tmp_path: Path) -> None:
    state = {key: value for key, value in source.items() if not key.startswith("fc.")}
    _, report = load(save_to(tmp_path / "a.pth", state))
    assert (report.head, report.fresh) == ("absent", ("fc.bias", "fc.weight"))
    assert "is absent; resnet10t" in report.note


def test_an_absent_head_may_take_its_norm_along(tmp_path: Path) -> None:
    spec = find_model("convnext_atto")
    state = create_model(spec, 2, image_size=64).state_dict()
    body = {key: value for key, value in state.items() if not key.startswith("head.")}
    _, report = load(save_to(tmp_path / "a.pth", body), name="convnext_atto", size=64)
    assert report.head == "absent"
    assert report.fresh == ("head.fc.bias", "head.fc.weight", "head.norm.bias", "head.norm.weight")
    with_head = {key: value for key, value in state.items() if not key.startswith("head.norm")}
    with pytest.raises(ZooError, match=r"2 keys missing: head.norm.weight, head.norm.bias"):
        load(save_to(tmp_path / "b.pth", with_head), name="convnext_atto", size=64)


def test_all_heads_of_a_distilled_network_are_replaced(tmp_path: Path) -> None:
    name = "deit_tiny_distilled_patch16_224"
    state = create_model(find_model(name), 7, image_size=32).state_dict()
    _, report = load(save_to(tmp_path / "a.pth", state), name=name)
    assert report.fresh == ("head.bias", "head.weight", "head_dist.bias", "head_dist.weight")


@pytest.mark.parametrize("nest", ["state_dict", "model", "model_ema", "state_dict_ema", "module."])
def test_wrappers_are_taken_off(nest: str, source: Any, tmp_path: Path) -> None:
    state: dict[str, Any] = {nest: source, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    if nest == "module.":
        state = {f"module.{key}": value for key, value in source.items()}
    _, report = load(save_to(tmp_path / "a.pth", state), classes=5)
    assert report == LoadReport("kept", len(source))


def test_half_precision_becomes_float32_and_counters_may_lack(source: Any, tmp_path: Path) -> None:
    state = {key: value.half() for key, value in source.items() if not key.endswith("num_batches_tracked")}
    model, report = load(save_to(tmp_path / "a.safetensors", state), classes=5)
    assert report.head == "kept"
    weight = model.state_dict()["conv1.0.weight"]
    assert weight.dtype == torch.float32
    assert torch.allclose(weight, source["conv1.0.weight"], atol=1e-3)


def test_other_differences_are_refused_with_their_keys(source: Any, tmp_path: Path) -> None:
    state = {f"x{number}": torch.zeros(1) for number in range(7)}
    state |= {key: value for key, value in source.items() if not key.startswith("layer4")}
    state["bn1.weight"] = torch.zeros(5)
    state["bn1.bias"] = torch.zeros(24, dtype=torch.int64)
    with pytest.raises(ZooError) as caught:
        load(save_to(tmp_path / "a.pth", state), classes=5)
    said = str(caught.value)
    assert said.startswith("weights 'a.pth' do not fit model 'resnet10t")
    assert "15 keys missing: layer4.0.conv1.weight, layer4.0.bn1.weight" in said and "and 10 more" in said
    assert "7 keys unexpected: x0, x1, x2, x3, x4 and 2 more" in said
    assert "2 keys of another shape or type: bn1.weight (float32 5, not float32 64), bn1.bias (int64 24" in said
    assert "\n" not in said


def test_a_refused_file_leaves_the_model_as_it_was(source: Any, tmp_path: Path) -> None:
    spec = find_model("resnet10t")
    model = create_model(spec, 5, image_size=32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bad = {**source, "layer1.0.bn1.bias": torch.full_like(source["layer1.0.bn1.bias"], torch.nan)}
    with pytest.raises(ZooError, match=r"hold values that are not finite in 'layer1.0.bn1.bias'"):
        load_weights(model, file_of(save_to(tmp_path / "a.pth", bad)), spec)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_values_that_are_not_finite_in_a_replaced_head_do_not_matter(source: Any, tmp_path: Path) -> None:
    state = {**source, "fc.bias": torch.full_like(source["fc.bias"], torch.inf)}
    assert load(save_to(tmp_path / "a.pth", state), classes=3)[1].head == "replaced"


def test_positions_are_resized_to_another_image_size(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    state = create_model(find_model(name), 3, image_size=64).state_dict()
    model, report = load(save_to(tmp_path / "a.safetensors", state), name=name, size=96)
    assert report.converted and report.head == "kept"
    assert state["pos_embed"].shape == (1, 17, 192)
    assert model.state_dict()["pos_embed"].shape == (1, 37, 192)
    assert torch.equal(model.state_dict()["pos_embed"][:, 0], state["pos_embed"][:, 0])
    overlay = {"file": str(tmp_path / "a.safetensors"), "num_classes": 3}
    theirs = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, img_size=96
    ).state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in model.state_dict().items())
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


def test_torchvisions_names_are_turned_into_timms(tmp_path: Path) -> None:
    state = create_model(find_model("densenet121"), 3, image_size=32).state_dict()
    old = {re.sub(r"(denselayer\d+\.)(norm|conv)(\d)", r"\1\2.\3", key): value for key, value in state.items()}
    assert set(old) != set(state)
    model, report = load(save_to(tmp_path / "a.safetensors", old), name="densenet121")
    assert report.converted and report.head == "kept"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_own_models_and_simple_cnn_are_loaded(tmp_path: Path) -> None:
    state = create_model(find_model("simple_cnn"), 4, image_size=16).state_dict()
    assert load(save_to(tmp_path / "a.safetensors", state), name="simple_cnn")[1].head == "replaced"
    register_model("line", image_size=16)(lambda n: nn.Sequential(nn.Flatten(), nn.Linear(768, n)))
    state = create_model(find_model("line"), 4).state_dict()
    assert load(save_to(tmp_path / "b.safetensors", state), 4, "line", 16)[1].head == "kept"
    assert load(save_to(tmp_path / "b.safetensors", state), 3, "line", 16)[1].head == "replaced"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/zoo-was-here",)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Bomb()}, tmp_path / "a.pth")
    with pytest.raises(
        ZooError, match=r"'a.pth' are damaged or hold more than tensors \((posix|nt).system\)"
    ) as caught:
        read_weights(tmp_path / "a.pth", 1000)
    assert "weights_only" not in str(caught.value)
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ZooError, match=r"'b.pth' are damaged or hold more than tensors"):
        read_weights(tmp_path / "b.pth", 1000)
    assert not Path("/tmp/zoo-was-here").exists()


def test_a_file_that_unfolds_too_far_is_refused_unread(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(40 << 20)}, tmp_path / "big.pth")
    with (
        zipfile.ZipFile(tmp_path / "big.pth") as big,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in big.infolist():
            bomb.writestr(member.filename, big.read(member))
    (tmp_path / "big.pth").unlink()
    assert (tmp_path / "bomb.pth").stat().st_size < 1 << 20
    with pytest.raises(ZooError, match=r"'bomb.pth' unfold to 160 MiB where at most 64 MiB fit this model"):
        read_weights(tmp_path / "bomb.pth", 1000)


def test_a_plain_file_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as stream:
        stream.truncate(70 << 20)
    with pytest.raises(ZooError, match=r"'a.safetensors' unfold to 70 MiB where at most 64 MiB"):
        read_weights(tmp_path / "a.safetensors", 1000)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(suffix: str, legacy: bool, source: Any, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".pth":
        torch.save(source, path, _use_new_zipfile_serialization=not legacy)
    else:
        save_to(path, source)
    for part in (0.999, 0.5, 0.001):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
        with pytest.raises(ZooError, match=r"weights 'cut") as caught:
            read_weights(cut, 100 << 20)
        assert "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "must hold tensors by name. Got a list; save a state_dict"),
        ({}, "must hold tensors by name"),
        ({"weight": torch.zeros(1), "epoch": 3}, "hold more than plain tensors: 1 keys odd: epoch"),
        ({"weight": torch.ones(2).to_sparse()}, "hold more than plain tensors: 1 keys odd: weight"),
        ({"weight": torch.empty(2, device="meta")}, "hold more than plain tensors: 1 keys odd: weight"),
    ],
)
def test_files_that_hold_something_else(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ZooError, match=message):
        read_weights(tmp_path / "a.pth", 1000)


def test_a_file_of_random_bytes_is_refused(tmp_path: Path) -> None:
    for suffix in (".pth", ".pt", ".safetensors"):
        path = tmp_path / f"a{suffix}"
        for size in (0, 1, 7, 8, 100, 5000):
            path.write_bytes(bytes((7 * number + 128) % 256 for number in range(size)))
            with pytest.raises(ZooError, match="weights 'a"):
                read_weights(path, 1000)


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("mobilenetv2_100.tf2_in1k_ptq", "replaced"),
        ("tf_mobilenetv3_small_100.keras_in1k_int8", "replaced"),
        ("mobilenetv2_035.keras_in1k_notop", "absent"),
        ("mobilenetv2_100.onnxzoo_in1k_notop", "absent"),
    ],
)
def test_real_weights_load(name: str, head: str, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in KNOWN_WEIGHTS
    monkeypatch.setenv("ZOO_WEIGHTS", str(assets / "weights"))
    spec = find_model(name)
    file = resolve_weights(spec, "pretrained", Home(tmp_path), offline=True)
    assert file is not None
    model = create_model(spec, 3)
    report = load_weights(model, file, spec)
    assert (report.head, report.fresh) == (head, ("classifier.bias", "classifier.weight"))
    assert report.loaded == len(model.state_dict()) - 2
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(torch.zeros(1, 3, 224, 224))).all()


@pytest.mark.assets
def test_a_real_head_is_kept_for_1000_classes(assets: Path) -> None:
    path = assets / "weights" / "mobilenetv2_100.tf2_in1k_ptq.safetensors"
    assert load(path, 1000, "mobilenetv2_100.tf2_in1k_ptq", 224)[1].head == "kept"


@pytest.mark.assets
@pytest.mark.parametrize("path", ["Peterwagiuh/resnet18-f37072fd.pth", "hrli1997/resnet18-5c106cde.pth"])
def test_real_truncated_files_are_refused_whatever_their_name(path: str, assets: Path, tmp_path: Path) -> None:
    shutil.copy(assets / "badweights" / path, tmp_path / "honest.pth")
    with pytest.raises(ZooError, match=r"weights 'honest.pth' (cannot be read|are damaged)") as caught:
        load(tmp_path / "honest.pth", name="resnet18")
    assert "weights_only" not in str(caught.value)


@pytest.mark.assets
@pytest.mark.parametrize("name", sorted(KNOWN_WEIGHTS))
def test_real_weights_load_as_timm_loads_them(name: str, assets: Path) -> None:
    path = assets / "weights" / f"{name}.safetensors"
    model, _ = load(path, 3, name, 224)
    overlay = {"file": str(path)}
    theirs = timm.create_model(name.partition(".")[0], pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    body = {key: value for key, value in theirs.state_dict().items() if not key.startswith("classifier.")}
    assert len(body) > 200
    assert all(torch.equal(model.state_dict()[key], value) for key, value in body.items())
