from __future__ import annotations

import csv
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from zoo.errors import ZooError
from zoo.models import spec as spec_module
from zoo.models.carried import carried_weights
from zoo.models.registry import (
    classifier_of,
    count_params,
    create_model,
    find_model,
    list_models,
    load_plugins,
    preprocessing_for,
    register_model,
    write_params_table,
)
from zoo.models.weights import KNOWN_WEIGHTS
from zoo.runs import Preprocessing

SAMPLE = (
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "mobilenetv3_small_100",
    "mobilenetv2_035",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "regnety_002",
    "densenet121",
    "deit_tiny_distilled_patch16_224",
    "maxvit_nano_rw_256",
)


def test_every_row_keeps_the_contract() -> None:
    rows = list_models()
    assert len(rows) > 1500
    assert len({row.name for row in rows}) == len(rows)
    assert {row.arch for row in rows} >= set(timm.list_models())
    assert {row.name for row in rows} >= {*timm.list_pretrained(), *KNOWN_WEIGHTS, *carried_weights(), "simple_cnn"}
    for row in rows:
        assert row.name == (f"{row.arch}.{row.tag}" if row.tag else row.arch)
        assert row.params is not None and row.params > 1000, row.name
        assert row.licence and row.summary, row.name
        made = row.preprocessing
        assert 16 <= made.image_size <= 2048 and 0 < made.crop_pct <= 1, row.name
        assert min(made.std) > 0 and all(math.isfinite(each) for each in made.mean), row.name
        assert row.weights_at_hand == ("carried" if row.name in carried_weights() else ""), row.name


def test_every_row_is_found_by_its_name() -> None:
    for row in list_models()[::97]:
        assert find_model(row.name) == row


def test_listing_is_quick() -> None:
    list_models()
    started = time.process_time()
    list_models()
    assert time.process_time() - started < 1.5


def test_params_table_covers_timm_and_is_right() -> None:
    with (Path(spec_module.__file__).with_name("params.csv")).open(newline="") as stream:
        table = {row["arch"]: int(row["params"]) for row in csv.DictReader(stream)}
    assert set(table) >= {"simple_cnn", *SAMPLE}
    for arch in ("simple_cnn", *SAMPLE):
        assert table[arch] == count_params(arch) == find_model(arch).params, arch


def test_params_of_a_real_network() -> None:
    model = timm.create_model("mobilenetv2_035", num_classes=1000)
    assert sum(each.numel() for each in model.parameters()) == find_model("mobilenetv2_035").params


def test_params_table_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "list_models", lambda: ["resnet18"])
    write_params_table(tmp_path / "params.csv")
    assert (tmp_path / "params.csv").read_text() == f"arch,params\nsimple_cnn,{count_params('simple_cnn')}\n" + (
        "resnet18,11689512\n"
    )


def test_an_architecture_that_the_table_lacks_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_module, "_params_by_arch", dict)
    assert find_model("mobilenetv2_035").params == 1_677_128


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("simple_cnn", ["simple_cnn"]),
        ("SIMPLE", ["simple_cnn"]),
        ("resnet18.a?_in1k", ["resnet18.a1_in1k", "resnet18.a2_in1k", "resnet18.a3_in1k"]),
        ("mobilenetv2_035*", ["mobilenetv2_035", "mobilenetv2_035.keras_in1k_notop"]),
        ("no such model", []),
    ],
)
def test_patterns_are_globs_or_parts(pattern: str, names: list[str]) -> None:
    assert [row.name for row in list_models(pattern)] == names


def test_a_bare_name_means_timms_default_weights() -> None:
    row = find_model("resnet50")
    assert row.name == f"resnet50.{timm.models.get_pretrained_cfg('resnet50').tag}"
    assert row.hub_id == f"timm/{row.name}"
    assert find_model("mobilenetv2_035").name == "mobilenetv2_035"


def test_a_bare_name_without_timms_weights_means_the_only_file_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path))
    (tmp_path / "mobilenetv2_035.keras_in1k_notop.safetensors").write_bytes(b"")
    row = find_model("mobilenetv2_035")
    assert row.name == "mobilenetv2_035.keras_in1k_notop"
    assert row.preprocessing.mean == (0.5, 0.5, 0.5)
    assert row.options == (("pad_type", "same"),)
    assert row.weights_at_hand == "file"
    (tmp_path / "mobilenetv2_035.other.pth").write_bytes(b"")
    assert find_model("mobilenetv2_035").name == "mobilenetv2_035"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnt18", r"unknown model 'resnt18'; did you mean 'resnet18'\? `zoo list models PATTERN` searches"),
        ("qqqqqq\x1b[31m", r"unknown model 'qqqqqq\\\\x1b\[31m'; `zoo list models PATTERN`"),
        (
            "resnet18.a1_in2k",
            r"no weights of the tag 'a1_in2k'; did you mean 'a1_in1k'\? \(known: a1_in1k, a2_",
        ),
        (
            "simple_cnn.tag",
            r"'simple_cnn' has no weights of the tag 'tag' \(none is known; a file simple_cnn.TAG",
        ),
        ("tv_resnet50", r"is now called 'resnet50.tv_in1k'; use that name"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ZooError, match=message) as caught:
        find_model(name)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_files_of_zoo_weights_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path))
    metadata = {"mean": "0.5, 0.25, 0.5", "std": "[1,1,1]", "crop_pct": "0.9", "licence": "MIT"}
    save_file({"x": torch.zeros(1)}, tmp_path / "resnet18.mine.safetensors", metadata)
    (tmp_path / "resnet18.tv_in1k-v2.pth").write_bytes(b"x")
    (tmp_path / "resnet18.od\x1bd.pth").write_bytes(b"x")
    (tmp_path / "nonet.a.pth").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    rows = {row.name: row for row in list_models() if row.weights_at_hand == "file"}
    assert sorted(rows) == ["resnet18.mine", "resnet18.tv_in1k", "resnet18.tv_in1k-v2"]
    mine = find_model("resnet18.mine")
    assert mine == rows["resnet18.mine"]
    assert (mine.origin, mine.licence, mine.params) == ("file", "MIT", 11689512)
    assert mine.preprocessing == Preprocessing(
        image_size=224, crop_pct=0.9, interpolation="bicubic", mean=(0.5, 0.25, 0.5), std=(1, 1, 1)
    )
    assert rows["resnet18.tv_in1k-v2"].preprocessing == rows["resnet18.tv_in1k"].preprocessing
    assert rows["resnet18.tv_in1k-v2"].licence == "not stated"
    with pytest.raises(ZooError, match=r"known: .*mine"):
        find_model("resnet18.other")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"mean": "a,b,c"}, "metadata must hold mean and std as three numbers"),
        ({"mean": "0.5"}, "metadata must hold mean and std as three numbers"),
        ({"interpolation": "magic"}, "metadata must hold mean and std as three numbers"),
        ({"std": "0,1,1"}, "must have finite mean and std, std above 0"),
        ({"crop_pct": "1.5"}, "must have crop_pct above 0, at most 1. Got 1.5"),
        (None, "is no whole safetensors file"),
    ],
)
def test_a_file_that_states_nonsense_is_listed_but_not_found(
    metadata: dict[str, str] | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path))
    path = tmp_path / "resnet18.mine.safetensors"
    if metadata is None:
        path.write_bytes(b"short")
    else:
        save_file({"x": torch.zeros(1)}, path, metadata)
    (row,) = list_models("resnet18.mine")
    assert row.summary.startswith("unusable: ")
    assert find_model("resnet18.tv_in1k").origin == "timm"
    with pytest.raises(ZooError, match=message):
        find_model("resnet18.mine")


def test_zoo_weights_must_be_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_WEIGHTS", "/no/such/folder")
    with pytest.raises(ZooError, match=r"ZOO_WEIGHTS must name a folder of weight files. Got '/no/such/folder'"):
        list_models("simple_cnn")


def test_register_model() -> None:
    @register_model("tiny_mlp", summary="one layer", licence="MIT", image_size=16)
    def tiny_mlp(num_classes: int, bias: bool = True) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes, bias=bias))

    row = find_model("tiny_mlp")
    assert row in list_models()
    assert (row.origin, row.params, row.licence, row.summary) == ("own", 769_000, "MIT", "one layer")
    model = create_model(row, 3, options={"bias": False})
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    assert classifier_of(model)[0] == "1"
    with pytest.raises(ZooError, match="'tiny_mlp' has no option 'bais'; did you mean 'bias'"):
        create_model(row, 3, options={"bais": False})
    with pytest.raises(ZooError, match=r"'tiny_mlp' has no drop_rate; leave model.drop_rate out"):
        create_model(row, 3, drop_rate=0.1)
    with pytest.raises(ZooError, match="'tiny_mlp' refuses images of 32 x 32 pixels"):
        create_model(row, 3, image_size=32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "'resnet18' is that of a built-in model; choose another"),
        ("simple_cnn", "'simple_cnn' is that of a built-in model"),
        ("twice", "'twice' is registered already"),
        ("my.net", r"must have no '\.'"),
        ("my net", "model name must be 1 to 80 letters"),
    ],
)
def test_names_that_cannot_be_registered(name: str, message: str) -> None:
    register_model("twice")(lambda num_classes: nn.Linear(1, num_classes))
    with pytest.raises(ZooError, match=message):
        register_model(name)(lambda num_classes: nn.Linear(1, num_classes))


def test_own_models_that_fail() -> None:
    def raises(num_classes: int) -> Any:
        raise ValueError("no luck")

    register_model("raises")(raises)
    register_model("text")(lambda num_classes: "a text")
    register_model("wide")(lambda num_classes: nn.Flatten())
    with pytest.raises(ZooError, match="'raises' cannot be built: ValueError: no luck; mend"):
        create_model(find_model("raises"), 2)
    with pytest.raises(ZooError, match=r"'text' must be a torch nn.Module. Got a str"):
        create_model(find_model("text"), 2)
    with pytest.raises(ZooError, match="'wide' is no classifier"):
        create_model(find_model("wide"), 2)
    assert find_model("raises").params is None


def test_plugins_are_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "one.py", tmp_path / "two.py"
    code = "from torch import nn\nfrom zoo.models.registry import register_model\n"
    first.write_text(f"{code}register_model('plug_one')(lambda num_classes: nn.Linear(1, num_classes))\n")
    second.write_text(f"{code}register_model('plug_two')(lambda num_classes: nn.Linear(2, num_classes))\n")
    monkeypatch.setenv("ZOO_PLUGINS", os.pathsep.join([str(first), str(second), ""]))
    load_plugins()
    load_plugins()
    assert find_model("plug_one").params == 2000 and find_model("plug_two").params == 3000
    assert [row.name for row in list_models("plug_*")] == ["plug_one", "plug_two"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "which is no file; fix or unset it"),
        (
            "import no_such_module",
            "fails: ModuleNotFoundError: No module named 'no_such_module'; mend the file",
        ),
        ("def (", "fails: SyntaxError"),
        (
            "from zoo.models.registry import register_model\nregister_model('half')(lambda n: None)\n"
            "register_model('resnet18')",
            "fails: the model name 'resnet18' is that of a built-in model",
        ),
    ],
)
def test_a_broken_plugin_is_named(
    code: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "broken.py"
    if code is not None:
        path.write_text(code)
    monkeypatch.setenv("ZOO_PLUGINS", str(path))
    for _ in range(2):
        with pytest.raises(ZooError, match=message) as caught:
            list_models()
        assert "broken.py" in str(caught.value)
    monkeypatch.delenv("ZOO_PLUGINS")
    assert list_models("half") == []


def test_preprocessing_with_a_recipes_values() -> None:
    row = find_model("resnet18.a1_in1k")
    assert preprocessing_for(row) == row.preprocessing
    made = preprocessing_for(row, 96, (0.1, 0.2, 0.3), (1, 1, 1), "bilinear", 1.0)
    assert made == Preprocessing(
        image_size=96, crop_pct=1.0, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(1, 1, 1)
    )
    assert preprocessing_for(row, interpolation="random").interpolation == "bicubic"
    assert preprocessing_for(find_model("vit_tiny_patch16_224"), 96).image_size == 96


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("resnet18", {"image_size": 8}, "image_size must be at least 16 pixels. Got 8"),
        ("vit_tiny_patch16_224", {"image_size": 100}, "must be a multiple of 16 .* Got 100; take 96 or 112"),
        ("resnet18", {"std": (0, 1, 1)}, "finite mean and std, std above 0"),
        ("resnet18", {"mean": (math.nan, 1, 1)}, "finite mean and std"),
        ("resnet18", {"crop_pct": 0.0}, "crop_pct above 0, at most 1. Got 0"),
    ],
)
def test_preprocessing_that_cannot_be(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        preprocessing_for(find_model(name), **change)


@pytest.mark.parametrize(
    ("name", "kwargs", "classifier"),
    [
        ("simple_cnn", {"image_size": 32, "drop_rate": 0.2, "options": {"width": 16}}, "fc"),
        ("resnet10t", {"image_size": 64, "drop_rate": 0.1, "drop_path_rate": 0.1}, "fc"),
        ("mobilenetv2_035.keras_in1k_notop", {"image_size": 64}, "classifier"),
        ("vit_tiny_patch16_224", {"image_size": 64}, "head"),
        ("convnext_atto", {"image_size": 64}, "head.fc"),
        ("repvit_m0_9", {"image_size": 64}, "head"),
    ],
)
def test_networks_are_built_and_train(name: str, kwargs: dict[str, Any], classifier: str) -> None:
    model = create_model(find_model(name), 3, **kwargs)
    assert model.training
    logits = model(torch.randn(2, 3, kwargs["image_size"], kwargs["image_size"]))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    found, module = classifier_of(model)
    assert found == classifier
    assert all(each.grad is not None for each in module.parameters())


def test_known_rows_are_built_with_their_options() -> None:
    plain = create_model(find_model("mobilenetv2_035"), 3, image_size=32)
    keras = create_model(find_model("mobilenetv2_035.keras_in1k_notop"), 3, image_size=32)
    chosen = create_model(find_model("mobilenetv2_035.keras_in1k_notop"), 3, image_size=32, options={"pad_type": ""})
    kinds = [type(model.get_submodule("conv_stem")).__name__ for model in (plain, keras, chosen)]
    assert kinds == ["Conv2d", "Conv2dSame", "Conv2d"]


def test_distilled_networks_are_built_but_have_no_single_classifier() -> None:
    model = create_model(find_model("deit_tiny_distilled_patch16_224"), 3, image_size=32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(ZooError, match=r"2 classifiers \(head, head_dist\)"):
        classifier_of(model)


def test_the_same_seed_draws_the_same_weights() -> None:
    row = find_model("resnet10t")
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(create_model(row, 2, image_size=32).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("resnet18", {"options": {"foo": 1}}, "'resnet18.a1_in1k' has no option 'foo'; leave it out"),
        (
            "resnet18",
            {"options": {"checkpoint_path": "x"}},
            "must not hold 'checkpoint_path': use model.weights",
        ),
        ("resnet18", {"options": {"act_layer": "magic"}}, "timm cannot build .* with options"),
        (
            "vgg11",
            {"drop_path_rate": 0.1},
            "'vgg11.tv_in1k' has no drop_path_rate; leave model.drop_path_rate out",
        ),
        ("simple_cnn", {"drop_path_rate": 0.1}, "'simple_cnn' has no drop_path_rate"),
        ("simple_cnn", {"options": {"widht": 1}}, "no option 'widht'; did you mean 'width'"),
        ("simple_cnn", {"image_size": 8}, "at least 16 pixels"),
        ("vgg11", {"image_size": 16}, "refuses images of 16 x 16 pixels"),
        ("vit_tiny_patch16_224", {"image_size": 100}, "multiple of 16"),
        ("maxvit_nano_rw_256", {"image_size": 200}, "200 x 200 pixels.*leave it out"),
        ("crossvit_9_240", {"image_size": 100}, "refuses images of 100 x 100"),
        ("mobilenetv5_300m_enc", {}, r"no classifier.*Got shape \(2, 2048, 16, 16\)"),
    ],
)
def test_what_an_architecture_refuses(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message) as caught:
        create_model(find_model(name), 3, **kwargs)
    assert "\n" not in str(caught.value)
