"""Which file is taken for a model's weights, without any hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from zoo.errors import ZooError
from zoo.files import Home, sha256_file
from zoo.models.registry import ModelSpec, find_model
from zoo.models.weights import KNOWN_WEIGHTS, WeightsFile, known_tags, resolve_weights, weights_at_hand

CONTENT = save({"weight": torch.arange(4.0)})
VIT = "vit_tiny_patch16_224"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "weights"
    path.mkdir()
    monkeypatch.setenv("ZOO_WEIGHTS", str(path))
    return path


def put(folder: Path, *names: str, content: bytes = CONTENT) -> None:
    for name in names:
        (folder / name).write_bytes(content)


def resolve(spec: ModelSpec, root: Path, source: str = "pretrained") -> WeightsFile:
    found = resolve_weights(spec, source, Home(root), offline=True)
    assert found is not None
    return found


def test_scratch_needs_no_file(tmp_path: Path) -> None:
    assert resolve_weights(find_model("resnet18"), "scratch", Home(tmp_path)) is None


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["resnet18.a1_in1k.safetensors", "resnet18.a1_in1k.pth"], "resnet18.a1_in1k.safetensors"),
        (["resnet18.a1_in1k.pth", "resnet18.a1_in1k-v2.safetensors"], "resnet18.a1_in1k.pth"),
        (["resnet18.a1_in1k-v2.safetensors", "resnet18.a1_in1k-v1.pth"], "resnet18.a1_in1k-v2.safetensors"),
        (["resnet18.a1_in1k.v2.pth", "resnet18.a2_in1k.safetensors"], "resnet18.a1_in1k.v2.pth"),
    ],
)
def test_the_most_exact_name_wins_then_safetensors(files: list[str], taken: str, folder: Path, tmp_path: Path) -> None:
    put(folder, *files)
    found = resolve(find_model("resnet18.a1_in1k"), tmp_path)
    assert (found.path.name, found.location, found.origin) == (taken, taken, "ZOO_WEIGHTS")
    assert found.sha256 == sha256_file(folder / taken)
    assert weights_at_hand(find_model("resnet18.a1_in1k")) == "file"


def test_a_longer_tag_is_another_one(folder: Path, tmp_path: Path) -> None:
    assert {"augreg_in21k", "augreg_in21k_ft_in1k"} <= set(known_tags(VIT))
    put(folder, f"{VIT}.augreg_in21k_ft_in1k.safetensors")
    assert weights_at_hand(find_model(f"{VIT}.augreg_in21k")) == ""
    with pytest.raises(ZooError, match=rf"which holds other weights of {VIT}: {VIT}.augreg_in21k_ft_in1k.safe"):
        resolve(find_model(f"{VIT}.augreg_in21k"), tmp_path)
    assert resolve(find_model(VIT), tmp_path).path.name == f"{VIT}.augreg_in21k_ft_in1k.safetensors"


def test_two_equally_good_files_are_ambiguous_unless_they_are_the_same(folder: Path, tmp_path: Path) -> None:
    put(folder, "resnet18.a1_in1k-v1.pth", "resnet18.a1_in1k-v2.pth")
    assert resolve(find_model("resnet18"), tmp_path).path.name == "resnet18.a1_in1k-v1.pth"
    put(folder, "resnet18.a1_in1k-v2.pth", content=b"another")
    message = r"2 files that fit 'resnet18.a1_in1k' equally well: resnet18.a1_in1k-v1.pth, resnet18.a1_in1k-v2.pth"
    with pytest.raises(ZooError, match=message):
        resolve(find_model("resnet18"), tmp_path)


def test_an_architecture_without_timms_tags_takes_its_only_file(folder: Path, tmp_path: Path) -> None:
    put(folder, "mobilenetv2_035.mine.safetensors")
    plain = replace(find_model("mobilenetv2_035"), name="mobilenetv2_035", tag="")
    assert resolve(plain, tmp_path).path.name == "mobilenetv2_035.mine.safetensors"
    assert resolve(find_model("mobilenetv2_035"), tmp_path).path.name == "mobilenetv2_035.mine.safetensors"
    put(folder, "mobilenetv2_035.yours.pth", content=b"another")
    with pytest.raises(ZooError, match=r"equally well: mobilenetv2_035.mine.safetensors, mobilenetv2_035.yours.pth"):
        resolve(find_model("mobilenetv2_035"), tmp_path)


def test_an_architecture_with_tags_never_takes_another_tags_file(folder: Path, tmp_path: Path) -> None:
    put(folder, "resnet18.mine.safetensors")
    with pytest.raises(
        ZooError, match=r"cannot get .* 'resnet18.a1_in1k'.*holds other weights of resnet18: resnet18.mine"
    ):
        resolve(find_model("resnet18"), tmp_path)
    assert resolve(find_model("resnet18.mine"), tmp_path).origin == "ZOO_WEIGHTS"


@pytest.mark.parametrize("name", ["simple_cnn", "mobilenetv2_035"])
def test_a_model_that_no_hub_has_says_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=rf"'{name}': no hub has weights of that name.*{name}.TAG.safetensors"):
        resolve(find_model(name), tmp_path)


@pytest.mark.parametrize("name", sorted(KNOWN_WEIGHTS))
def test_known_weights_are_known_by_their_digest(name: str, folder: Path, tmp_path: Path) -> None:
    put(folder, f"{name}.safetensors")
    with pytest.raises(ZooError, match=f"sha256 must begin with {KNOWN_WEIGHTS[name].sha256[:16]}"):
        resolve(find_model(name), tmp_path)
    with pytest.raises(ZooError, match="is damaged or another file"):
        resolve(find_model(name), tmp_path, str(folder / f"{name}.safetensors"))


def test_a_name_that_promises_a_digest_is_held_to_it(folder: Path, tmp_path: Path) -> None:
    put(folder, "resnet18.a1_in1k-d63eafa0.pth")
    with pytest.raises(ZooError, match=r"'resnet18.a1_in1k-d63eafa0.pth' is damaged or another file"):
        resolve(find_model("resnet18"), tmp_path)


def test_a_path_in_the_recipe_comes_before_everything(folder: Path, tmp_path: Path) -> None:
    put(folder, "resnet18.a1_in1k.safetensors")
    put(tmp_path, "own.pt", content=b"mine")
    for source in ("own.pt", str(tmp_path / "own.pt")):
        found = resolve(find_model("resnet18"), tmp_path, source)
        assert (found.path, found.origin, found.location) == (tmp_path / "own.pt", "recipe path", "own.pt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pretraind", r"Got 'pretraind', and there is no such file; did you mean 'pretrained'\?"),
        ("none.pth", "Got 'none.pth', and there is no such file; check the path"),
        ("own.txt", r"must end in .safetensors, .pth, .pt. Got 'own.txt'; convert it"),
        (".", "Got '.', and there is no such file"),
    ],
)
def test_paths_that_cannot_be(source: str, message: str, tmp_path: Path) -> None:
    put(tmp_path, "own.txt")
    with pytest.raises(ZooError, match=message):
        resolve(find_model("resnet18"), tmp_path, source)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.models import hub

    path = tmp_path / "own.pth"
    path.symlink_to("/proc/self/mem")  # it opens, but its first byte cannot be read
    with pytest.raises(ZooError, match=r"cannot read '.*own.pth'"):
        hub.checked_sha256(path)


@pytest.mark.assets
@pytest.mark.parametrize("name", sorted(KNOWN_WEIGHTS))
def test_known_weights_at_hand(name: str, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_WEIGHTS", str(assets / "weights"))
    row = find_model(name)
    assert row.weights_at_hand == "file"
    found = resolve(row, tmp_path)
    assert found == WeightsFile(
        assets / "weights" / f"{name}.safetensors",
        KNOWN_WEIGHTS[name].sha256,
        "ZOO_WEIGHTS",
        f"{name}.safetensors",
    )


@pytest.mark.assets
@pytest.mark.parametrize("path", ["Peterwagiuh/resnet18-f37072fd.pth", "hrli1997/resnet18-5c106cde.pth"])
def test_files_that_lie_about_their_digest(path: str, assets: Path, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"'resnet18-\w+.pth' is damaged or another file: its sha256 must begin"):
        resolve(find_model("resnet18"), tmp_path, str(assets / "badweights" / path))
