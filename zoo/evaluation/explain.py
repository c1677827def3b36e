"""Where a network looked: gradient-weighted activation maps, their picture, and images with a part painted over."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from zoo.errors import ZooError, one_line

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def activation_maps(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return for each image where evidence for a class was found: (B, h, w) float32 in [0, 1] on the CPU.

    images: (B, 3, S, S) normalised, on the model's device. targets: (B,) class indices. Grad-CAM (Selvaraju et al.
    2017, arXiv 1610.02391): on the last feature map; in networks of tokens on the final ones where the head pools
    them, else on what the first norm of the last block gives, for what patches are after that reaches no class token.
    (Not on that block's input: a norm takes its scale away, so gradient times token there sums to nothing but
    rounding.) Each map is scaled to a highest value of 1; one without evidence is all 0. The model is left as it was.
    Raises ZooError where it has no map of its image.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            # Copies: what was made in inference mode can take no part in a gradient.
            values, logits = _caught(model, images.detach().clone())
            picked = logits.gather(1, targets.detach().clone().to(logits.device).view(-1, 1)).sum()
            (gradient,) = torch.autograd.grad(picked, values)
            maps = _weighted(model, values.detach(), gradient)
    except RuntimeError as error:
        raise ZooError(f"{type(model).__name__} cannot be explained: {one_line(error, 160)}") from error
    finally:
        for module, mode in modes.items():  # each its own: a part may be frozen
            module.training = mode
    highest = maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(highest > 0, maps / highest.clamp_min(1e-30), torch.zeros_like(maps)).float().cpu()


def _caught(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values that are explained, as the start of a graph of their own, and the logits computed of them."""
    network: Any = model
    if hasattr(network, "forward_features") and hasattr(network, "forward_head"):  # timm's documented halves
        with torch.no_grad():
            values = network.forward_features(images)
        if not isinstance(values, torch.Tensor) or values.ndim not in (3, 4):
            return _at_last_map(model, images)
        values = values.clone().requires_grad_()
        logits = network.forward_head(values.clone())  # some heads write to their input
        return (
            (values, logits) if values.ndim == 4 or _patches_count(model, values, logits) else _at_norm(model, images)
        )
    return _at_last_map(model, images)


def _patches_count(model: nn.Module, values: torch.Tensor, logits: torch.Tensor) -> bool:
    """Return whether the head reads patch tokens, and not the class token alone."""
    (gradient,) = torch.autograd.grad(logits.sum(), values, retain_graph=True)
    return bool(gradient[:, _prefix_tokens(model) :].any())


def _prefix_tokens(model: nn.Module) -> int:
    return int(getattr(model, "num_prefix_tokens", 0) or 0)


def _at_norm(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Catch what the first norm of the last block gives, by timm's `feature_info`."""
    info = getattr(model, "feature_info", None)
    try:
        block = model.get_submodule(str(info[-1]["module"]) if info else "")
    except (AttributeError, KeyError, IndexError, TypeError):
        raise _no_map(model) from None
    norm = next((module for module in block.modules() if "Norm" in type(module).__name__), None)
    if block is model or norm is None:
        raise _no_map(model)
    caught: list[torch.Tensor] = []

    def catch(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        caught[:] = [output.detach().clone().requires_grad_()]
        return caught[0].clone()

    return _run(model, images, caught, lambda: norm.register_forward_hook(catch))


def _at_last_map(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Catch the output of the last module that gives a map with more than one place."""
    last: list[nn.Module] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) > 1:
            last[:] = [module]

    hooks = [module.register_forward_hook(note) for module in model.modules() if module is not model]
    try:
        with torch.no_grad():
            model(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not last:
        raise _no_map(model)
    caught: list[torch.Tensor] = []

    def catch(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        caught[:] = [output.detach().clone().requires_grad_()]  # of a module that runs twice, the last time
        return caught[0].clone()  # what follows may write to its input

    return _run(model, images, caught, lambda: last[0].register_forward_hook(catch))


def _run(
    model: nn.Module, images: torch.Tensor, caught: list[torch.Tensor], hooked: Callable[[], Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    hook = hooked()
    try:
        logits = model(images)
    finally:
        hook.remove()
    if not caught or not logits.requires_grad:
        raise _no_map(model)
    return caught[-1], logits


def _weighted(model: nn.Module, values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return maps (B, h, w), 0 where evidence speaks against the class."""
    if values.ndim == 3:
        skipped = _prefix_tokens(model)
        height, width = _token_grid(model, values.shape[1] - skipped)
        values, gradient = (
            each[:, skipped:].transpose(1, 2).reshape(len(each), -1, height, width) for each in (values, gradient)
        )
    elif values.ndim != 4:
        raise _no_map(model)
    elif getattr(model, "output_fmt", "NCHW") == "NHWC":
        values, gradient = values.permute(0, 3, 1, 2), gradient.permute(0, 3, 1, 2)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return (weights * values).sum(dim=1).relu()


def _token_grid(model: nn.Module, count: int) -> tuple[int, int]:
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is not None and math.prod(grid) == count:
        return int(grid[0]), int(grid[1])
    side = math.isqrt(count)
    if side * side != count or side < 2:
        raise _no_map(model)
    return side, side


def _no_map(model: nn.Module) -> ZooError:
    return ZooError(
        f"{type(model).__name__} keeps no map of its image that a class could be traced back to; explain a network "
        "with convolutions or with patch tokens"
    )


def paint_over(pixels: Pixels, part: Literal["centre", "border"]) -> Pixels:
    """Return an image (S, S, 3) with a half of its area, the central square or all around it, in its mean colour.

    >>> whole = np.arange(300, dtype=np.uint16).reshape(10, 10, 3).astype(np.uint8)
    >>> [int((paint_over(whole, part) != whole).any(axis=2).sum()) for part in ("centre", "border")]
    [49, 51]
    """
    side = pixels.shape[0]
    width = max(1, round(side * math.sqrt(0.5)))
    middle = slice((side - width) // 2, (side - width) // 2 + width)
    mean = pixels.reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
    painted = pixels.copy()
    if part == "centre":
        painted[middle, middle] = mean
    else:
        painted[:] = mean
        painted[middle, middle] = pixels[middle, middle]
    return painted
