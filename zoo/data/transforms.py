"""From cached pixels to a network's input: augmentation for training, the fixed crop, and scaling."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.errors import ZooError, nearest, one_line
from zoo.runs import Preprocessing

if TYPE_CHECKING:
    import torch

Image = np.ndarray[Any, np.dtype[np.uint8]]

# Part of a run's identity: to be raised when a policy changes; those that never did have 1.
POLICY_VERSIONS = {"light": 2}
POLICIES = ("none", "light", "strong", "ct")
OWN = "own"
# Classes that others derive from, and one that takes functions. Whatever else returns no uint8 RGB image, or
# asks for a mask, boxes or other images, is found out by trying it.
_NOT_FOR_USE = {"BasicTransform", "DualTransform", "ImageOnlyTransform", "Transform3D", "Lambda"}


def center_crop(pixels: Image, size: int) -> Image:
    """Return the central size x size pixels of an image (H, W, 3) with H, W >= size, as a view.

    The place is rounded as torchvision's CenterCrop rounds it.

    >>> center_crop(np.arange(75, dtype=np.uint8).reshape(5, 5, 3), 3)[0, 0]
    array([18, 19, 20], dtype=uint8)
    """
    height, width = pixels.shape[:2]
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    return pixels[top : top + size, left : left + size]


def normalise(
    images: Image | Sequence[Image],
    preprocessing: Preprocessing,
    out: np.ndarray[Any, np.dtype[np.float32]] | None = None,
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return uint8 images (B, H, W, 3) as the network's float32 input (B, 3, H, W), contiguous; in `out` if given.

    (x - 255 mean) / (255 std), each step in float32: bit for bit what `normalise_tensor` gives.
    """
    offset, scale = _offset_and_scale(preprocessing.mean, preprocessing.std)
    height, width, colours = images[0].shape
    values = np.empty((len(images), colours, height, width), np.float32) if out is None else out
    for image, wanted in zip(images, values, strict=True):  # a colour at a time: it stays in the processor's cache
        for plane, value, less, by in zip(image.transpose(2, 0, 1), wanted, offset, scale, strict=True):
            np.copyto(value, plane if plane.strides[-1] == 1 else np.ascontiguousarray(plane))
            np.subtract(value, less, out=value)
            np.divide(value, by, out=value)
    return values


def normalise_tensor(batch: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Return uint8 images (B, H, W, 3) as the network's float32 input (B, 3, H, W) on the batch's device.

    Its memory is channels-last; the values are bit for bit those of `normalise`.
    """
    import torch

    count, height, width, channels = batch.shape
    offset, scale = _rows(preprocessing.mean, preprocessing.std, width, str(batch.device))
    values = batch.reshape(count, height, width * channels).to(torch.float32)
    values = values.sub_(offset).div_(scale)
    return values.reshape(count, height, width, channels).permute(0, 3, 1, 2)


Triple = tuple[float, float, float]


@lru_cache(maxsize=32)
def _rows(mean: Triple, std: Triple, width: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is taken from a row of pixels, and what it is divided by, on a device.

    Whole rows at a time: broadcasting over the three channels alone is ten times slower on a CPU. Kept: to copy them
    anew for each batch would make every step wait for a GPU to end the one before.
    """
    import torch

    with torch.inference_mode(False):  # training may ask after scoring has
        offset, scale = (torch.from_numpy(np.tile(part, width)).to(device) for part in _offset_and_scale(mean, std))
    return offset, scale


@lru_cache(maxsize=32)
def _offset_and_scale(mean: Triple, std: Triple) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    wide = (np.asarray(each, np.float64) for each in (mean, std))
    offset, scale = ((each * 255).astype(np.float32) for each in wide)
    return offset, scale


@dataclass(frozen=True)
class Augment:
    """A policy or an own list of transforms, the same for the same (seed, epoch, sample) in any process.

    Called with uint8 pixels (H, W, 3), H and W >= image_size, it returns uint8 (image_size, image_size, 3);
    its input stays as it was.
    """

    policy: str
    transforms: tuple[dict[str, Any], ...]
    image_size: int
    seed: int

    def __call__(self, pixels: Image, epoch: int, sample_index: int) -> Image:
        """Return a sample's image as an epoch sees it; raises ZooError where an own transform fails."""
        if self.policy == "none":
            return center_crop(pixels, self.image_size)
        words = np.random.SeedSequence([self.seed, epoch, sample_index]).generate_state(2, np.uint64)
        # Not `set_random_seed`, which gives every transform the same random numbers: of two with p = 0.5 both
        # act or neither. One state shared by all makes them independent, and is set three times faster.
        self._compose.set_random_state(np.random.default_rng(words[0]), random.Random(int(words[1])))
        image = np.array(pixels)  # a copy, and no memory map: some transforms write to their input
        if self.policy != OWN:
            return center_crop(self._compose(image=image)["image"], self.image_size)
        try:
            return _exact(self._compose(image=image)["image"], self.image_size)
        except Exception as error:
            height, width = pixels.shape[:2]
            raise ZooError(
                f"augment.transforms failed on an image of {width} x {height} pixels: {one_line(error)}; "
                "mend or remove the transform"
            ) from error

    @cached_property
    def _compose(self) -> Any:
        albumentations = _albumentations()
        if self.policy == OWN:
            steps = _build_all(self.transforms)
        else:
            steps = _POLICY_STEPS[self.policy](albumentations, self.image_size)
        return albumentations.Compose(steps, is_check_shapes=False)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_compose"}


def make_augment(
    policy: str, transforms: Sequence[dict[str, Any]] | None, image_size: int, seed: int
) -> Callable[[Image, int, int], Image]:
    """Return `(pixels, epoch, sample_index) -> pixels` for a policy, or for own transforms where given.

    policy: one of POLICIES. transforms: tables of a `name`, as albumentations spells it, and its arguments.
    image_size: pixels of each side of what comes out. The function can be pickled and shared by processes.
    Raises ZooError for an unknown policy, transform or argument, a value that albumentations refuses, and a
    transform that needs more than an image or returns anything but one of type uint8 with three channels.
    """
    if transforms is None and policy not in POLICIES:
        allowed = ", ".join(POLICIES)
        hint = nearest(policy, POLICIES)
        raise ZooError(f"augment.policy must be one of {allowed}. Got {one_line(policy)!r}{hint}")
    augment = Augment(OWN if transforms is not None else policy, tuple(transforms or ()), image_size, seed)
    if augment.policy == OWN:
        _try_out(augment)
    return augment


# Policies --------------------------------------------------------------------------------------------------


def _light(a: Any, size: int) -> list[Any]:
    """For fine-tuning: GoogLeNet's crop (arXiv 1409.4842), but at least 70 % and hardly stretched; mirrored.

    Brightness moves by a part of the image's own mean, so that a dark background stays dark. Cached pixels are hardly
    larger than the crop, so that linear interpolation does not alias, and costs a third of averaging over areas.
    """
    return [
        a.RandomResizedCrop((size, size), scale=(0.7, 1.0), ratio=(0.85, 1.18)),
        a.HorizontalFlip(p=0.5),
        a.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.15, brightness_by_max=False, p=0.5),
    ]


def _strong(a: Any, size: int) -> list[Any]:
    """For long training: wider crops, colour, shape, blur or noise, holes (cutout, arXiv 1708.04552)."""
    return [
        a.RandomResizedCrop((size, size), scale=(0.4, 1.0), area_for_downscale="image"),
        a.HorizontalFlip(p=0.5),
        a.Affine(rotate=(-15, 15), shear=(-8, 8), border_mode=_REFLECT_101, p=0.5),
        a.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.03, p=0.8),
        a.OneOf(
            [
                a.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 1.2), p=1.0),
                a.GaussNoise(std_range=(0.02, 0.06), p=1.0),
            ],
            p=0.3,
        ),
        a.CoarseDropout(
            num_holes_range=(1, 3),
            hole_height_range=(0.1, 0.25),
            hole_width_range=(0.1, 0.25),
            fill=127,
            p=0.4,
        ),
    ]


def _ct(a: Any, size: int) -> list[Any]:
    """For axial CT slices: what differs between two scans of one patient, and a mirrored body.

    Small turns, shifts and zooms (another position on the table), gamma and contrast (another window), noise
    (dose) and blur (kernel), alike in all channels, for the slices are grey. Never upside down: patients lie
    on their backs, and dependent density is a sign. Mirrored left to right: the heart then lies on the wrong
    side, but whether a nodule is malignant does not hang on it (the risk model of McWilliams et al. 2013,
    10.1056/NEJMoa1214726, counts the upper lobe, not the side); nnU-Net (10.1038/s41592-020-01008-z) and
    CheXNet (arXiv 1711.05225) mirror too. Where a label names a side, or situs, take a list of your own.
    """
    return [
        a.Affine(
            scale=(0.9, 1.1),
            translate_percent=(-0.05, 0.05),
            rotate=(-10, 10),
            keep_ratio=True,
            fill=0,
            p=0.8,
        ),
        a.CenterCrop(size, size),
        a.HorizontalFlip(p=0.5),
        a.RandomGamma(gamma_limit=(85, 118), p=0.5),
        a.RandomBrightnessContrast(brightness_limit=0.1, contrast_limit=0.1, brightness_by_max=False, p=0.5),
        a.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 0.8), p=0.15),
        a.GaussNoise(std_range=(0.005, 0.02), per_channel=False, p=0.2),
    ]


_REFLECT_101 = 4  # cv2.BORDER_REFLECT_101, without importing cv2 here
_POLICY_STEPS: dict[str, Callable[[Any, int], list[Any]]] = {"light": _light, "strong": _strong, "ct": _ct}


# Own transforms --------------------------------------------------------------------------------------------


@cache
def _albumentations() -> Any:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else its import asks the network for a newer version
    import albumentations
    import cv2

    cv2.setNumThreads(0)  # the loader's workers are the threads
    return albumentations


@cache
def transform_names() -> tuple[str, ...]:
    """Return the names of albumentations' transforms of an image, sorted."""
    a = _albumentations()
    return tuple(
        name
        for name in sorted(dir(a))
        if isinstance(getattr(a, name), type)
        and issubclass(getattr(a, name), a.BasicTransform)
        and not issubclass(getattr(a, name), a.Transform3D)
        and name not in _NOT_FOR_USE
    )


def _build_all(tables: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the transforms of own tables; raises ZooError that names every fault at once."""
    steps, faults = [], []
    for place, table in enumerate(tables):
        try:
            steps.append(_build(table))
        except ZooError as error:
            faults.append(f"augment.transforms[{place}]: {error}")
    if faults:
        raise ZooError("; ".join(faults))
    return steps


def _build(table: dict[str, Any]) -> Any:
    """Return the transform of a table; albumentations itself only warns of unknown arguments."""
    arguments = dict(table)
    name = arguments.pop("name", None)
    known = transform_names()
    if not isinstance(name, str):
        raise ZooError("name is missing; give a transform's, as albumentations spells it")
    if name not in known:
        hint = nearest(name, known) or "; take one such as HorizontalFlip, RandomCrop or Rotate"
        raise ZooError(f"albumentations has no image transform {one_line(name)!r}{hint}")
    kind = getattr(_albumentations(), name)
    allowed = [each for each in signature(kind.__init__).parameters if each not in ("self", "kwargs")]
    unknown = [key for key in arguments if key not in allowed]
    if unknown:
        hint = nearest(unknown[0], allowed) or f"; it takes {', '.join(allowed)}"
        raise ZooError(f"{name} has no argument {one_line(unknown[0])!r}{hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            return kind(**arguments)
    except Exception as error:
        raise ZooError(f"{name}: {_refusal(error)}") from error


def _refusal(error: Exception) -> str:
    """Return why albumentations refused arguments: pydantic's faults by argument, else its own words."""
    from pydantic import ValidationError

    if not isinstance(error.__cause__, ValidationError):
        return one_line(error)
    faults = {}
    for each in error.__cause__.errors():
        key = str(each["loc"][0]) if each["loc"] else ""
        if each["type"] == "missing":
            faults[key] = f"{key} is missing"
        elif each["type"] == "value_error":
            faults[key] = f"{key}: {each['ctx']['error']}".removeprefix(": ")
        else:
            message = each["msg"].replace("Input should be", "must be")
            faults[key] = f"{key} {message}. Got {one_line(repr(each['input']), 60)}"
    return "; ".join(faults.values())


def _try_out(augment: Augment) -> None:
    """Raise ZooError unless each own transform maps a uint8 RGB image to one, on the smallest possible."""
    size = augment.image_size
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
    augment._compose.set_random_state(generator, random.Random(0))
    for place, transform in enumerate(augment._compose.transforms):
        where = f"augment.transforms[{place}]: {type(transform).__name__}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                image = transform(image=image, force_apply=True)["image"]
        except Exception as error:
            raise ZooError(
                f"{where} fails on an image of {size} x {size} pixels: {one_line(error)}; mend or remove it"
            ) from error
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
            raise ZooError(
                f"{where} must return uint8 pixels of three channels; numbers are scaled and turned into a "
                "tensor after the augmentation, so remove it"
            )


def _exact(pixels: Image, size: int) -> Image:
    """Return the central size x size pixels, enlarging first what an own crop has made smaller."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short < size:
        import cv2

        enlarged = (max(size, round(width * size / short)), max(size, round(height * size / short)))
        pixels = cv2.resize(np.ascontiguousarray(pixels), enlarged, interpolation=cv2.INTER_LINEAR)
    return center_crop(pixels, size)
