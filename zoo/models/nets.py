"""The from-scratch CNN; and of every network: can it be built, how large is it, which layer classifies."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ZooError, one_line

Options = tuple[tuple[str, Any], ...]
# What a recipe says elsewhere, or must not say at all: these would load files or change the input.
_RESERVED = {
    "num_classes": "it follows from the dataset",
    "img_size": "use model.image_size",
    "drop_rate": "use model.drop_rate",
    "drop_path_rate": "use model.drop_path_rate",
    "in_chans": "images have 3 channels",
    "pretrained": "use model.weights",
    "pretrained_cfg": "use model.weights",
    "pretrained_cfg_overlay": "use model.weights",
    "checkpoint_path": "use model.weights",
    "cache_dir": "use HF_HOME",
    "features_only": "a classifier is needed",
}


def conv_norm(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution without bias and its batch norm; the size is kept, or divided by the stride."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))


class ResidualBlock(nn.Module):
    """Two 3x3 conv-norm-act and a shortcut, averaged where it is strided (ResNet-D, arXiv 1812.01187)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv_norm(channels_in, channels_out, stride=stride)
        self.conv2 = conv_norm(channels_out, channels_out)
        self.act = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            pool = nn.AvgPool2d(stride, ceil_mode=True) if stride != 1 else nn.Identity()
            self.shortcut = nn.Sequential(pool, conv_norm(channels_in, channels_out, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels_in, H, W) to (N, channels_out, ceil(H / stride), ceil(W / stride))."""
        residual: Tensor = self.conv2(self.act(self.conv1(x)))
        out: Tensor = self.act(residual + self.shortcut(x))
        return out


class SimpleCNN(nn.Module):
    """A small residual CNN for training from scratch: 0.4 million parameters at the default width.

    Input (N, 3, H, W) with H, W >= 16; output logits (N, num_classes). The stem and three stages halve the
    size to 1/16, early, so that it is quick on a CPU. drop_rate: dropout before the classifier. width:
    channels of the first stage, the others have twice and four times as many.

    >>> SimpleCNN(num_classes=3)(torch.zeros(2, 3, 16, 16)).shape
    torch.Size([2, 3])
    """

    def __init__(self, num_classes: int, drop_rate: float = 0.0, width: int = 32) -> None:
        super().__init__()
        if not 8 <= width <= 256:
            raise ZooError(f"model.options.width must be 8 to 256. Got {width}")
        self.num_classes = num_classes
        self.num_features = 4 * width
        self.stem = nn.Sequential(conv_norm(3, width, stride=2), nn.ReLU(inplace=True))
        widths = (width, 2 * width, 4 * width)
        self.stages = nn.Sequential()
        for number, (before, after) in enumerate(zip((width, *widths), widths, strict=False)):
            blocks = [ResidualBlock(before, after, stride=2)]
            if number < len(widths) - 1:
                blocks.append(ResidualBlock(after, after))
            self.stages.append(nn.Sequential(*blocks))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(self.num_features, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, ResidualBlock):
                # Each block starts as its shortcut, which steadies early training (1706.02677, section 5.1).
                nn.init.zeros_(module.conv2[1].weight)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to feature maps (N, num_features, ceil(H / 16), ceil(W / 16))."""
        out: Tensor = self.stages(self.stem(x))
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map feature maps to logits (N, num_classes), or to pooled features (N, num_features)."""
        features: Tensor = self.drop(self.pool(x))
        return features if pre_logits else self.fc(features)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """Return the last layer, as timm's networks do."""
        return self.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's grouping of parameters for layer-wise decay: stem, stages (or their blocks), head."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}


def build_timm(
    name: str,
    num_classes: int,
    *,
    image_size: int | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    options: Options = (),
) -> nn.Module:
    """Return timm's network of that `arch` or `arch.tag` with random weights, on torch's default device.

    image_size: pixels, given only where the architecture fixes its input size and another is wanted.
    Raises ZooError where the architecture knows no such option or refuses the size.
    """
    import timm

    kwargs: dict[str, Any] = dict(options)
    # Zero is left out: many architectures have no such argument, and zero is nearly always their default.
    given = {"img_size": image_size, "drop_rate": drop_rate or None, "drop_path_rate": drop_path_rate or None}
    kwargs |= {key: value for key, value in given.items() if value is not None}
    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **kwargs)  # type: ignore[no-any-return]
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise _refusal(name, image_size, options, error) from error


def _refusal(name: str, image_size: int | None, options: Options, error: Exception) -> ZooError:
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    key = unknown.group(1) if unknown else ""
    if key == "img_size":
        return ZooError(f"model {name!r} is made for one image size only; leave model.image_size out")
    if key in ("drop_rate", "drop_path_rate"):
        return ZooError(f"model {name!r} has no {key}; leave model.{key} out")
    if key:
        return ZooError(f"model.options: {name!r} has no option {one_line(key)!r}; leave it out")
    asked = [f"image_size {image_size}"] if image_size else []
    asked += [f"options {one_line(dict(options), 80)}"] if options else []
    key = asked[-1].split(maxsplit=1)[0] if asked else ""
    fix = f"change model.{key}, or leave it out" if key else "choose another model"
    wanted = f" with {' and '.join(asked)}" if asked else ""
    return ZooError(f"timm cannot build {name!r}{wanted}: {one_line(error, 160)}; {fix}")


def check_options(options: dict[str, Any]) -> Options:
    """Return the options as a sorted tuple; raises ZooError for one that a recipe says elsewhere."""
    for key in options:
        if key in _RESERVED:
            raise ZooError(f"model.options must not hold {key!r}: {_RESERVED[key]}")
    return tuple(sorted((key, tuple(x) if isinstance(x, list) else x) for key, x in options.items()))


@lru_cache(maxsize=256)
def check_timm(name: str, num_classes: int, pixels: int, **build: Any) -> None:
    """Raise ZooError unless timm's network maps images of that many pixels a side to logits of num_classes.

    build: what `build_timm` takes. Runs on torch's meta device: no memory, no arithmetic, the same refusals.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        check_forward(build_timm(name, num_classes, **build), name, num_classes, pixels)


def check_forward(model: nn.Module, name: str, num_classes: int, image_size: int) -> None:
    """Raise ZooError unless the model maps two images of image_size pixels to (2, num_classes) logits."""
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, 3, image_size, image_size, device=where))
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise ZooError(
            f"model {name!r} refuses images of {image_size} x {image_size} pixels: {one_line(error, 160)}; "
            "choose another model.image_size, or leave it out"
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ZooError(
            f"model {name!r} is no classifier: for 2 images it must give logits of shape (2, {num_classes}). "
            f"Got {got}; choose another model"
        )


@lru_cache(maxsize=4096)
def count_params(arch: str) -> int:
    """Return the number of parameters of simple_cnn's or timm's architecture with 1000 classes."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = SimpleCNN(1000) if arch == "simple_cnn" else build_timm(arch, 1000)
    return sum(each.numel() for each in model.parameters())


def count_own_params(build: Callable[..., Any]) -> int | None:
    """Return the number of parameters of a user's network for 1000 classes; None where it cannot be told."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return sum(int(each.numel()) for each in build(1000).parameters())
    except Exception:
        # A listing must not fail because foreign code cannot run without memory behind its tensors.
        return None


def classifiers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return dotted name and module of every final classifier; several for distilled and branched networks.

    It is what the model's `get_classifier()` gives, else the last nn.Linear, of num_classes outputs where the
    model says its num_classes. Raises ZooError where there is none.
    """
    names = {id(module): name for name, module in model.named_modules()}
    getter = getattr(model, "get_classifier", None)
    given = getter() if callable(getter) else None
    asked = list(given) if isinstance(given, (tuple, list, nn.ModuleList)) else [given]
    found = [(names[id(each)], each) for each in asked if isinstance(each, nn.Module) and id(each) in names]
    found = [(name, each) for name, each in found if not isinstance(each, nn.Identity)]
    if not found:
        classes = getattr(model, "num_classes", None)
        for name, each in model.named_modules():
            if isinstance(each, nn.Linear) and each.out_features == (classes or each.out_features):
                found = [(name, each)]
    if not found:
        raise ZooError(
            f"{type(model).__name__} has no classifier that can be found; give it a method get_classifier() "
            "that returns its last layer, or choose another model"
        )
    return found


def classifier_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Return dotted name and module of the one final classifier.

    Raises ZooError where there is none, or several (distilled networks): strategy full trains those.

    >>> classifier_of(SimpleCNN(3))
    ('fc', Linear(in_features=128, out_features=3, bias=True))
    """
    found = classifiers_of(model)
    if len(found) > 1:
        raise ZooError(
            f"{type(model).__name__} has {len(found)} classifiers ({', '.join(name for name, _ in found)}) "
            "where one is needed; use finetune.strategy = 'full', or choose another model"
        )
    return found[0]
