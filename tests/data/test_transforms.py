from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.data.transforms import (
    POLICIES,
    Augment,
    center_crop,
    make_augment,
    normalise,
    normalise_tensor,
    transform_names,
)
from zoo.errors import ZooError
from zoo.runs import Preprocessing

SIZE = 32
OWN = [{"name": "HorizontalFlip", "p": 0.5}, {"name": "Rotate", "limit": [-20, 20], "p": 0.5}]


def picture(height: int = 40, width: int = 52, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A smooth picture with noise, all three channels different."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(rows / 5), np.cos(columns / 7), np.sin((rows + columns) / 9)], axis=2)
    noise = np.random.default_rng(seed).normal(0, 4, (height, width, 3))
    return np.clip(128 + 80 * waves + noise, 0, 255).astype(np.uint8)


def grey(height: int = 40, width: int = 52) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.repeat(picture(height, width)[:, :, :1], 3, axis=2)


def preprocessing(**change: Any) -> Preprocessing:
    given = {"image_size": SIZE, "crop_pct": 0.875, "interpolation": "bicubic"}
    given |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return Preprocessing(**{**given, **change})


# Crop and scaling


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 32), (35, 36), (37, 64), (256, 33)])
def test_center_crop_is_torchvisions(height: int, width: int) -> None:
    import torch
    from torchvision.transforms.functional import center_crop as reference

    pixels = picture(height, width)
    expected = reference(torch.from_numpy(pixels).permute(2, 0, 1), [SIZE, SIZE]).permute(1, 2, 0).numpy()
    assert np.array_equal(center_crop(pixels, SIZE), expected)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(1, 20),
    st.tuples(*[st.floats(0, 1)] * 3),
    st.tuples(*[st.floats(0.01, 1)] * 3),
    st.integers(0, 1000),
)
def test_normalise_gives_the_same_bits_in_numpy_and_torch(
    count: int, height: int, width: int, mean: Any, std: Any, seed: int
) -> None:
    import torch

    batch = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    wanted = preprocessing(mean=mean, std=std)
    values = normalise(batch, wanted)
    tensor = normalise_tensor(torch.from_numpy(batch), wanted)
    assert values.shape == (count, 3, height, width)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    assert values.tobytes() == tensor.contiguous().numpy().tobytes()
    # a batch that came in another layout: planes first in memory, seen as (B, H, W, 3)
    planes = torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()).permute(0, 2, 3, 1)
    assert torch.equal(normalise_tensor(planes, wanted), tensor)
    assert np.array_equal(normalise(planes.numpy(), wanted), values)


def test_normalise_is_mean_and_std_on_the_unit_scale() -> None:
    import torch
    from torchvision.transforms.functional import normalize

    batch, wanted = picture(8, 9)[None], preprocessing()
    unit = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
    expected = normalize(unit, list(wanted.mean), list(wanted.std))
    tensor = normalise_tensor(torch.from_numpy(batch), wanted)
    torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)
    assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_normalise_leaves_its_input() -> None:
    import torch

    batch = picture(8, 9)[None]
    before = batch.copy()
    normalise(batch, preprocessing())
    normalise_tensor(torch.from_numpy(batch), preprocessing())
    assert np.array_equal(batch, before)


# Policies


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([*POLICIES, "own"]),
    st.integers(SIZE, 4 * SIZE),
    st.integers(SIZE, 4 * SIZE),
    st.integers(0, 2**31 - 1),
    st.integers(1, 10_000),
    st.integers(0, 1_000_000),
)
def test_every_policy_gives_the_exact_size_and_keeps_its_input(
    policy: str, height: int, width: int, seed: int, epoch: int, sample: int
) -> None:
    pixels = picture(height, width)
    before = pixels.copy()
    pixels.setflags(write=False)  # the pixel cache is a read-only memory map
    augment = make_augment(policy, OWN if policy == "own" else None, SIZE, seed)
    out = augment(pixels, epoch, sample)
    assert out.shape == (SIZE, SIZE, 3)
    assert out.dtype == np.uint8
    assert np.array_equal(pixels, before)


def test_policy_none_is_the_fixed_crop() -> None:
    pixels = picture(41, 52)
    augment = make_augment("none", None, SIZE, seed=3)
    assert np.array_equal(augment(pixels, 5, 7), center_crop(pixels, SIZE))


@pytest.mark.parametrize("policy", ["light", "strong", "ct"])
def test_policies_change_the_image_but_not_beyond_recognition(policy: str) -> None:
    pixels = picture(64, 64)
    augment = make_augment(policy, None, 56, seed=0)
    plain = center_crop(pixels, 56).astype(float)
    seen = [augment(pixels, 1, sample).astype(float) for sample in range(60)]
    assert sum(np.array_equal(each, plain) for each in seen) < 6
    brightness = [abs(each.mean() - plain.mean()) for each in seen]
    limit = {"light": 45, "strong": 75, "ct": 30}[policy]
    assert max(brightness) < limit
    assert min(each.std() for each in seen) > 0.4 * plain.std()  # never washed out


def test_policy_ct_keeps_grey_grey_and_the_top_up() -> None:
    slice_ = grey(64, 64)
    slice_[:32] = 20  # dark above, bright below
    slice_[32:] = 220
    augment = make_augment("ct", None, 56, seed=0)
    for sample in range(60):
        out = augment(slice_, 1, sample)
        assert np.array_equal(out[..., 0], out[..., 1])
        assert np.array_equal(out[..., 0], out[..., 2])
        assert out[40:50, 20:36].mean() > out[6:16, 20:36].mean() + 80


def test_policy_ct_fills_with_black() -> None:
    augment = make_augment("ct", None, 64, seed=0)
    corners = [augment(np.full((64, 64, 3), 200, np.uint8), 1, sample)[0, 0, 0] for sample in range(40)]
    assert min(corners) < 20
    assert max(corners) > 150


def test_policies_draw_their_parts_independently() -> None:
    """`set_random_seed` would give both transforms the same numbers: both act, or neither."""
    both = [{"name": "HorizontalFlip", "p": 0.5}, {"name": "VerticalFlip", "p": 0.5}]
    augment = make_augment("own", both, SIZE, seed=0)
    pixels = picture(SIZE, SIZE)
    turned = {
        "none": pixels,
        "left-right": pixels[:, ::-1],
        "up-down": pixels[::-1],
        "both": pixels[::-1, ::-1],
    }
    found = Counter(
        next(name for name, each in turned.items() if np.array_equal(each, augment(pixels, 1, sample)))
        for sample in range(200)
    )
    assert set(found) == set(turned)
    assert min(found.values()) > 25


# Seeding


def test_an_image_follows_from_seed_epoch_and_sample_alone() -> None:
    pixels = picture()
    augment = make_augment("strong", None, SIZE, seed=4)
    first = augment(pixels, 2, 9)
    augment(pixels, 1, 1)  # what was asked before must not matter
    assert np.array_equal(augment(pixels, 2, 9), first)
    assert np.array_equal(make_augment("strong", None, SIZE, seed=4)(pixels, 2, 9), first)
    others = [augment(pixels, 9, 2), augment(pixels, 2, 8), make_augment("strong", None, SIZE, 5)(pixels, 2, 9)]
    assert not any(np.array_equal(each, first) for each in others)


def test_an_augment_can_be_pickled_after_use() -> None:
    augment = make_augment("light", None, SIZE, seed=1)
    first = augment(picture(), 1, 2)
    again = pickle.loads(pickle.dumps(augment))
    assert isinstance(again, Augment)
    assert np.array_equal(again(picture(), 1, 2), first)


class _Pictures:
    """A dataset that is asked by (epoch, place), as the loader's is."""

    def __init__(self, augment: Any) -> None:
        self.augment = augment

    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        epoch, place = key
        image: np.ndarray[Any, np.dtype[np.uint8]] = self.augment(picture(seed=place), epoch, place)
        return image


def _stack(items: list[Any]) -> Any:
    import torch

    return torch.from_numpy(np.stack(items))


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_number_of_workers_changes_no_bit(start: str) -> None:
    import multiprocessing

    import torch
    from torch.utils.data import DataLoader

    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    augment = make_augment("strong", None, SIZE, seed=0)
    keys = [[(epoch, place) for place in range(first, first + 4)] for epoch in (1, 2) for first in (0, 4, 8)]

    def images(workers: int) -> torch.Tensor:
        options: dict[str, Any] = {"multiprocessing_context": start} if workers else {}
        loader: DataLoader[Any] = DataLoader(
            _Pictures(augment),  # type: ignore[arg-type]
            batch_sampler=keys,  # type: ignore[arg-type]
            num_workers=workers,
            collate_fn=_stack,
            **options,
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of any fork beside threads; torch's loader forks all the same.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            return torch.cat(list(loader))

    alone = images(0)
    assert torch.equal(images(2), alone)
    assert not torch.equal(alone[0], alone[12]), "the second epoch must see other images"


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_bits() -> None:
    program = (
        "import hashlib, numpy as np\n"
        "from zoo.data.transforms import make_augment\n"
        "pixels = (np.arange(40 * 52 * 3) % 251).astype(np.uint8).reshape(40, 52, 3)\n"
        "digest = hashlib.sha256()\n"
        "for policy in ('light', 'strong', 'ct'):\n"
        "    augment = make_augment(policy, None, 32, 7)\n"
        "    for sample in range(5): digest.update(augment(pixels, 3, sample).tobytes())\n"
        "print(digest.hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    scope: dict[str, Any] = {"print": lambda text: scope.update(found=text)}
    exec(program, scope)
    assert other.strip() == scope["found"]


# Own transforms


def test_own_transforms_are_applied_with_their_arguments() -> None:
    pixels = picture(SIZE, SIZE)
    flipped = make_augment("own", [{"name": "HorizontalFlip", "p": 1.0}], SIZE, seed=0)(pixels, 1, 1)
    assert np.array_equal(flipped, pixels[:, ::-1])
    same = make_augment("own", [{"name": "HorizontalFlip", "p": 0.0}], SIZE, seed=0)(pixels, 1, 1)
    assert np.array_equal(same, pixels)


def test_an_empty_own_list_is_the_fixed_crop() -> None:
    pixels = picture(41, 55)
    assert np.array_equal(make_augment("own", [], SIZE, 0)(pixels, 1, 1), center_crop(pixels, SIZE))


@pytest.mark.parametrize(
    "table",
    [
        {"name": "RandomCrop", "height": 8, "width": 20},
        {"name": "Resize", "height": 100, "width": 9},
        {"name": "RandomResizedCrop", "size": [5, 5]},
        {"name": "SmallestMaxSize", "max_size": 300},
        {"name": "Transpose", "p": 1.0},
    ],
    ids=lambda table: table["name"],
)
def test_after_an_own_list_the_size_is_exact(table: dict[str, Any]) -> None:
    augment = make_augment("own", [table], SIZE, seed=0)
    for height, width in ((SIZE, SIZE), (SIZE, 90), (77, 33)):
        assert augment(picture(height, width), 1, 1).shape == (SIZE, SIZE, 3)


def test_every_transform_of_albumentations_works_or_is_refused_politely() -> None:
    names = transform_names()
    assert len(names) > 90
    pixels, used = picture(), 0
    pixels.setflags(write=False)
    for name in names:
        try:
            augments = [make_augment("own", [{"name": name, "p": 1.0}], SIZE, seed=0) for _ in range(2)]
        except ZooError as error:
            assert str(error).startswith("augment.transforms[0]: ")
            assert name in str(error)
            assert "\n" not in str(error)
            continue
        first, second = (augment(pixels, 1, 1) for augment in augments)
        assert first.shape == (SIZE, SIZE, 3), name
        assert first.dtype == np.uint8, name
        assert np.array_equal(first, second), f"{name} draws numbers of its own"
        used += 1
    assert used > 70


REFUSED = [
    ({"name": "HorizontalFlop"}, "no image transform 'HorizontalFlop'; did you mean 'HorizontalFlip'?"),
    ({"name": "Compose"}, "no image transform 'Compose'; take one such as HorizontalFlip"),
    ({"name": "DualTransform"}, "no image transform 'DualTransform'"),
    ({"name": "Lambda"}, "no image transform 'Lambda'"),
    ({"name": "os.system"}, "no image transform 'os.system'"),
    ({"name": "CenterCrop3D", "size": [1, 2, 3]}, "no image transform 'CenterCrop3D'"),
    ({"p": 0.5}, "name is missing"),
    ({"name": "Rotate", "limits": 3}, "Rotate has no argument 'limits'; did you mean 'limit'?"),
    ({"name": "HorizontalFlip", "zzz": 1}, "HorizontalFlip has no argument 'zzz'; it takes p"),
    ({"name": "HorizontalFlip", "p": 1.5}, "p must be less than or equal to 1. Got 1.5"),
    ({"name": "HorizontalFlip", "p": "often"}, "p must be a valid number, unable to parse"),
    ({"name": "GaussNoise", "std_range": [0.5, 0.1]}, "std_range: First value should be less than"),
    ({"name": "RandomCrop", "height": 9}, "RandomCrop: width is missing"),
    ({"name": "RandomCrop", "height": 99, "width": 99}, "fails on an image of 32 x 32 pixels"),
    ({"name": "ToTensorV2"}, "ToTensorV2 must return uint8 pixels of three channels"),
    ({"name": "Normalize"}, "Normalize must return uint8 pixels of three channels"),
    ({"name": "ToFloat"}, "ToFloat must return uint8 pixels of three channels"),
    ({"name": "ToGray", "num_output_channels": 1}, "ToGray must return uint8 pixels of three channels"),
    ({"name": "MaskDropout"}, "MaskDropout fails on an image"),
]


@pytest.mark.parametrize(("table", "message"), REFUSED, ids=[str(table) for table, _ in REFUSED])
def test_wrong_own_transforms_are_refused_before_any_work(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError) as caught:
        make_augment("own", [{"name": "NoOp"}, table], SIZE, seed=0)
    assert str(caught.value).startswith("augment.transforms[1]: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_faults_of_an_own_list_are_said_at_once() -> None:
    with pytest.raises(ZooError) as caught:
        make_augment("own", [{"name": "Blurr"}, {"name": "NoOp"}, {"name": "Rotate", "q": 1}], SIZE, seed=0)
    assert "augment.transforms[0]" in str(caught.value)
    assert "augment.transforms[2]" in str(caught.value)


def test_an_unknown_policy_is_refused_with_the_nearest() -> None:
    with pytest.raises(ZooError, match=r"must be one of none, light, strong, ct\. Got 'lite'; did you mean 'light'"):
        make_augment("lite", None, SIZE, seed=0)


def test_an_own_transform_that_fails_later_is_named() -> None:
    # crops a fixed place that the smallest image has and a turned one does not
    augment = Augment("own", ({"name": "Crop", "x_max": 50, "y_max": 40},), SIZE, 0)
    assert augment(picture(40, 52), 1, 1).shape == (SIZE, SIZE, 3)
    with pytest.raises(ZooError, match=r"failed on an image of 33 x 60 pixels: .*; mend or remove"):
        augment(picture(60, 33), 1, 1)


def test_importing_the_file_loads_nothing_heavy() -> None:
    program = (
        "import sys, zoo.data.transforms\n"
        "heavy = {'torch', 'albumentations', 'cv2', 'timm', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
