"""The hub's path against a fake hub on loopback, through `resolve_weights`."""

from __future__ import annotations

import hashlib
import io
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from zoo.errors import ZooError
from zoo.files import Home
from zoo.models import hub as hub_module
from zoo.models.registry import ModelSpec, create_model, find_model, list_models
from zoo.models.weights import WeightsFile, load_weights, resolve_weights

CONTENT = save({"weight": torch.arange(4000.0)})
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "timm/resnet18.a1_in1k"


def resolve(root: Path, spec: ModelSpec | None = None, offline: bool = False) -> WeightsFile:
    found = resolve_weights(spec or find_model("resnet18"), "pretrained", Home(root), offline)
    assert found is not None
    return found


def cached_blobs(root: Path) -> list[str]:
    return [path.name for path in (root / "hf").rglob("*") if path.is_file() and path.stat().st_size > 1000]


def test_a_download_is_verified_recorded_and_found_again_without_the_hub(hub: Any, tmp_path: Path) -> None:
    hub.add(REPO, "model.safetensors", CONTENT)
    assert list_models("resnet18.a1_in1k")[0].weights_at_hand == ""
    first = resolve(tmp_path)
    assert (first.origin, first.sha256) == ("hub", SHA256)
    assert first.location == f"{REPO}@{COMMIT}/model.safetensors"
    assert str(tmp_path) not in first.location
    assert first.path.read_bytes() == CONTENT
    assert list_models("resnet18.a1_in1k")[0].weights_at_hand == "hub cache"
    asked = len(hub.requests)
    hub.stop()
    again = resolve(tmp_path)
    assert again == replace(first, origin="hub cache")
    assert resolve(tmp_path, offline=True) == again
    assert len(hub.requests) == asked


def test_a_hub_file_becomes_a_networks_weights(hub: Any, tmp_path: Path) -> None:
    spec = find_model("resnet10t")
    source = create_model(spec, 1000, image_size=32)
    hub.add(spec.hub_id, "model.safetensors", save(source.state_dict()))
    target = create_model(spec, 3, image_size=32)
    report = load_weights(target, resolve(tmp_path, spec), spec)
    assert report.head == "replaced"
    assert torch.equal(target.state_dict()["layer1.0.conv1.weight"], source.state_dict()["layer1.0.conv1.weight"])


def test_the_older_file_name_is_tried_second(hub: Any, tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"weight": torch.arange(4000.0)}, stream)
    hub.add(REPO, "pytorch_model.bin", stream.getvalue())
    assert resolve(tmp_path).location == f"{REPO}@{COMMIT}/pytorch_model.bin"
    hub.stop()
    assert resolve(tmp_path).origin == "hub cache"


def four_remedies(error: ZooError) -> bool:
    said = str(error)
    wanted = (
        '[model] weights = "FILE"',
        "ZOO_WEIGHTS",
        f"hf download {REPO}",
        "--offline",
        'weights = "scratch"',
    )
    return "\n" not in said and all(each in said for each in wanted)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library sleeps a second before each of five tries."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_pauses")
def test_a_broken_download_is_an_error_and_leaves_nothing(hub: Any, tmp_path: Path) -> None:
    hub.add(REPO, "model.safetensors", CONTENT)
    hub.fault = "broken"
    with pytest.raises(ZooError, match=r"fetching timm/resnet18.a1_in1k/model.safetensors failed") as caught:
        resolve(tmp_path)
    assert four_remedies(caught.value)
    hub.fault = ""
    assert resolve(tmp_path).sha256 == SHA256


@pytest.mark.usefixtures("no_pauses")
def test_a_large_download_that_always_breaks_off_ends(hub: Any, tmp_path: Path) -> None:
    hub.add(REPO, "model.safetensors", bytes(24 << 20))
    hub.fault = "broken"
    with pytest.raises(ZooError, match=r"failed .*broke off again and again"):
        resolve(tmp_path)
    assert len(hub.requests) < 10


def test_a_wrong_hash_is_refused_and_removed(hub: Any, tmp_path: Path) -> None:
    hub.add(REPO, "model.safetensors", CONTENT)
    hub.fault = "wrong"
    with pytest.raises(ZooError, match=r"model.safetensors is damaged: its sha256 is not the hub's. It was removed"):
        resolve(tmp_path)
    assert cached_blobs(tmp_path) == []
    hub.fault = ""
    assert resolve(tmp_path).sha256 == SHA256


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_cached_file_that_was_damaged_is_refused_and_removed(damage: str, hub: Any, tmp_path: Path) -> None:
    hub.add(REPO, "model.safetensors", CONTENT)
    path = resolve(tmp_path).path.resolve()
    path.write_bytes(CONTENT[:-1] + b"?" if damage == "flipped" else CONTENT[:-100])
    with pytest.raises(ZooError, match="is damaged: its sha256 is not the hub's"):
        resolve(tmp_path, offline=True)
    assert cached_blobs(tmp_path) == []
    assert resolve(tmp_path).origin == "hub"


def test_a_name_that_the_hub_does_not_have(hub: Any, tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"fetching timm/resnet18.a1_in1k/model.safetensors failed \(HTTP status 404\)"):
        resolve(tmp_path)
    hub.add(REPO, "README.md", b"text")
    with pytest.raises(ZooError, match=r"has neither model.safetensors nor pytorch_model.bin") as caught:
        resolve(tmp_path)
    assert four_remedies(caught.value)


@pytest.mark.parametrize("fault", ["busy", "down"])
def test_a_hub_that_fails_is_given_up_at_once(fault: str, hub: Any, tmp_path: Path) -> None:
    hub.fault = fault
    if fault == "down":
        hub.stop()
    started = time.monotonic()
    reason = "HTTP status 503" if fault == "busy" else r"127.0.0.1:\d+ does not answer \(.*refused"
    with pytest.raises(ZooError, match=reason) as caught:
        resolve(tmp_path)
    assert time.monotonic() - started < 4
    assert four_remedies(caught.value)


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_offline_opens_no_connection(by: str, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, "model.safetensors", CONTENT)
    if by == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(ZooError, match="--offline or HF_HUB_OFFLINE forbids the network") as caught:
        resolve(tmp_path, offline=by == "flag")
    assert four_remedies(caught.value)
    assert hub.connections == 0


def test_a_proxy_of_the_environment_is_probed_instead(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("https_proxy", "http://user:secret@127.0.0.1:9")
    with pytest.raises(ZooError, match=r"127.0.0.1:9 does not answer") as caught:
        resolve(tmp_path)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("no_proxy", "hub.invalid")
    with pytest.raises(ZooError, match=r"hub.invalid:443 does not answer"):
        resolve(tmp_path)


def test_an_endpoint_without_a_valid_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:http")
    with pytest.raises(ZooError, match=r"'http://127.0.0.1:http' has no valid port"):
        resolve(tmp_path)


def test_a_name_look_up_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "PROBE_S", 0.1)
    release = threading.Event()

    def hang(*args: object, **kwargs: object) -> None:
        release.wait(10)
        raise OSError("too late")

    monkeypatch.setattr(socket, "create_connection", hang)
    started = time.monotonic()
    with pytest.raises(ZooError, match=r"127.0.0.1:9 does not answer\. Five ways out"):
        resolve(tmp_path)
    release.set()
    assert time.monotonic() - started < 2


@pytest.mark.slow
def test_the_endpoint_is_read_at_the_start_of_a_process(hub: Any, tmp_path: Path) -> None:
    hub.add(REPO, "model.safetensors", CONTENT)
    code = (
        "from zoo.files import home; from zoo.models.registry import find_model\n"
        "from zoo.models.weights import resolve_weights\n"
        "print(resolve_weights(find_model('resnet18'), 'pretrained', home()).sha256)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == SHA256
    assert done.stderr == ""


def url_spec(hub: Any, content: bytes = CONTENT, name: str = "") -> ModelSpec:
    name = name or f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    hub.files[f"/{name}"] = content
    return replace(find_model("legacy_seresnet18.in1k"), url=f"{hub.url}/{name}")


def test_weights_of_a_plain_url(hub: Any, tmp_path: Path) -> None:
    spec = url_spec(hub)
    first = resolve(tmp_path, spec)
    assert (first.origin, first.sha256, first.location) == ("hub", SHA256, f"net-{SHA256[:8]}.pth")
    hub.stop()
    assert resolve(tmp_path, spec) == replace(first, origin="hub cache")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("broken", "broke off after|fetching net-"),
        ("wrong", f"damaged or another file: its sha256 must begin with {SHA256[:8]}"),
        ("busy", "fetching net-.* failed .*503"),
    ],
)
def test_a_plain_url_that_fails_leaves_nothing(fault: str, message: str, hub: Any, tmp_path: Path) -> None:
    spec = url_spec(hub)
    hub.fault = fault
    with pytest.raises(ZooError, match=message):
        resolve(tmp_path, spec)
    assert [path for path in (tmp_path / "torch").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("name", "checked"),
    [
        ("resnet18-5c106cde.pth", True),
        ("resnet18-5c106cdef.safetensors", True),
        ("net-deadbeef.pth.tar", True),
        ("resnet18-20240131.pth", False),
        ("resnet18-5c10.pth", False),
        ("resnet18.a1_in1k.pth", False),
    ],
)
def test_names_promise_a_digest(name: str, checked: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(CONTENT)
    if checked:
        with pytest.raises(ZooError, match="is damaged or another file: its sha256 must begin with"):
            hub_module.checked_sha256(path)
    else:
        assert hub_module.checked_sha256(path) == SHA256
