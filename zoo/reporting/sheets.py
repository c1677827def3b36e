"""Looking before training: contact sheets per class and split, what augmentation does, and the leak tax as a figure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from zoo.data.decode import BadImage, decode, resize
from zoo.data.manifest import Dataset
from zoo.data.split import check_seed
from zoo.data.transforms import POLICIES, center_crop, make_augment
from zoo.data.window import windowing_of_facts
from zoo.errors import ZooError, one_line
from zoo.files import write_text
from zoo.reporting.html import figure as embedded
from zoo.reporting.html import render
from zoo.reporting.plots import BLUE, FAINT, GREY, ORANGE, WIDTH, save_figure
from zoo.runs import SPLITS

PER_CLASS = 12
_DRAWS = 6  # of one policy on one image
_SIDE = 160  # pixels
_MAX_ROWS = 20  # classes on one sheet
Image = np.ndarray[Any, np.dtype[np.uint8]]


def show_dataset(
    dataset: Dataset, folder: Path | None = None, *, per_class: int = PER_CLASS, seed: int = 0
) -> list[Path]:
    """Write contact sheets of a dataset and return the files: `index.html`, then the PNGs that it shows.

    One sheet per split with a row for each class (at most 20 on a sheet), and one of what each augmentation policy
    does to the same images. Which images are drawn is seeded. folder: left out, `show/` in the dataset's own.
    Raises ZooError where no image can be read.
    """
    if not 1 <= per_class <= 40:
        raise ZooError(f"a sheet shows 1 to 40 images of a class. Got {per_class}")
    check_seed(seed)
    folder = folder or dataset.folder / "show"
    sheets, files = [], []
    for name, sheet in _sheets(dataset, per_class, seed):
        files.append(folder / f"{name}.png")
        save_figure(sheet, files[-1])
        sheets.append({"name": name, "image": embedded(sheet)})
    write_text(folder / "index.html", render("show.html", dataset=dataset, sheets=sheets))
    return [folder / "index.html", *files]


def _sheets(dataset: Dataset, per_class: int, seed: int) -> Iterator[tuple[str, Figure]]:
    """Yield name and figure of each sheet, one at a time: hundreds of classes make many."""
    for split in SPLITS:
        for first in range(0, len(dataset.classes), _MAX_ROWS):
            classes = dataset.classes[first : first + _MAX_ROWS]
            number = f"-{first // _MAX_ROWS + 1}" if len(dataset.classes) > _MAX_ROWS else ""
            rows = {name: _drawn(dataset, split, name, per_class, seed) for name in classes}
            title = f"{dataset.name}, {split}, split {dataset.split_digest[:8]}"
            yield f"{split}{number}", plot_contact_sheet(rows, per_class, title)
    yield "augmentation", plot_policies(_one_of_each(dataset, seed), seed)


def _drawn(dataset: Dataset, split: str, label: str, count: int, seed: int) -> list[tuple[str, Image | None]]:
    """Return names and pixels of a class's images, drawn by seed; None for one that cannot be read."""
    rows = dataset.of_split(split)
    paths = rows["path"][rows["label"] == label].tolist()
    order = np.random.default_rng(seed).permutation(len(paths))[:count]
    return [(paths[place], _pixels(dataset, paths[place])) for place in sorted(order.tolist())]


def _pixels(dataset: Dataset, path: str) -> Image | None:
    try:
        data = dataset.image_path(path).read_bytes()
        return center_crop(resize(decode(data, windowing_of_facts(dataset.facts)), _SIDE, "bilinear"), _SIDE)
    except (OSError, BadImage):
        return None


def _one_of_each(dataset: Dataset, seed: int) -> dict[str, Image]:
    """Return a training image of each of the first two classes that can be read."""
    found: dict[str, Image] = {}
    for label in dataset.classes[:2]:
        readable = [pixels for _, pixels in _drawn(dataset, "train", label, 5, seed) if pixels is not None]
        if readable:
            found[label] = readable[0]
    if not found:
        raise ZooError(
            f"no training image of {dataset.name!r} can be read (below {str(dataset.root)!r}); import it again"
        )
    return found


def plot_contact_sheet(
    rows: dict[str, list[tuple[str, Image | None]]], across: int = PER_CLASS, title: str = ""
) -> Figure:
    """Return a sheet of images, a row (or, beyond 6 images, two) for each class; an unreadable one is crossed out."""
    columns = min(across, 6) if across > 6 else across
    lines = [
        (label if start == 0 else "", images[start : start + columns])
        for label, images in rows.items()
        for start in range(0, max(1, len(images)), columns)
    ]
    cell = WIDTH / (columns + 1)
    figure = Figure(figsize=(WIDTH, 0.5 + cell * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for (label, images), row in zip(lines, axes, strict=True):
        for place, each in enumerate(row):
            _cell(each, images[place][1] if place < len(images) else None, place < len(images))
        row[0].set_ylabel(_short(label), fontsize=7, rotation=0, ha="right", va="center", parse_math=False)
    figure.suptitle(one_line(title, 120), fontsize=9, parse_math=False)
    return figure


def plot_policies(images: dict[str, Image], seed: int = 0) -> Figure:
    """Return what each augmentation policy makes of the same images: the original, then six draws."""
    lines = [(label, policy) for label in images for policy in POLICIES]
    cell = WIDTH / (_DRAWS + 2)
    figure = Figure(figsize=(WIDTH, 0.5 + cell * len(lines)), layout="constrained")
    axes = figure.subplots(len(lines), _DRAWS + 1, squeeze=False)
    for place, ((label, policy), row) in enumerate(zip(lines, axes, strict=True)):
        # The cropping policies need some room around what they keep, as training gives them.
        size = int(_SIDE * 0.875)
        augment = make_augment(policy, None, size, seed)
        _cell(row[0], images[label], True)
        for draw in range(_DRAWS):
            _cell(row[draw + 1], augment(images[label], draw, place), True)
        row[0].set_ylabel(
            f"{_short(label)}\n{policy}", fontsize=7, rotation=0, ha="right", va="center", parse_math=False
        )
    axes[0][0].set_title("original", fontsize=7)
    axes[0][1].set_title("six draws", fontsize=7, loc="left")
    figure.suptitle("what each augmentation policy does to the same image", fontsize=9)
    return figure


def _cell(axes: Any, pixels: Image | None, wanted: bool) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if pixels is not None:
        axes.imshow(pixels, interpolation="antialiased")
    elif wanted:
        axes.text(0.5, 0.5, "unreadable", ha="center", va="center", fontsize=6, transform=axes.transAxes)
    axes.set_box_aspect(1)


def _short(label: str) -> str:
    return _lines(one_line(label, 60), 15)


def plot_leak_tax(document: dict[str, Any]) -> Figure:
    """Return the leak tax of an audit's document: what trivial baselines score by the way of splitting."""
    from zoo.reporting.audit import tax_rows

    tax, rows = document["leak_tax"], tax_rows(document)
    keys = [key for key in ("given", "random", "grouped", "joined") if tax.get(key)]
    figure = Figure(figsize=(WIDTH, 1.1 + 0.62 * len(keys)), layout="constrained")
    axes = figure.subplots()
    names = ("nearest_neighbour", "logistic_regression")
    for place, key in enumerate(keys):
        for shift, (name, colour) in enumerate(zip(names, (ORANGE, BLUE), strict=True)):
            score = tax[key][name]
            height = place + (shift - 0.5) * 0.3
            low, high = score["top1_ci"]
            axes.plot([low, high], [height, height], color=colour, linewidth=1.6, solid_capstyle="butt")
            axes.plot([score["top1"]], [height], "o", color=colour, markersize=5)
            axes.annotate(
                f"{score['top1']:.3f}", (high, height), (5, 0), textcoords="offset points", va="center", fontsize=7
            )
    axes.set_yticks(
        range(len(keys)),
        [_lines(row[0] + (f" ({row[1]} groups)" if row[1] != "–" else "")) for row in rows],
        fontsize=7.5,
    )
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.set_xlim(max(0.0, axes.get_xlim()[0]), 1.06)
    axes.set_xlabel("top-1 on 32 x 32 grey pixels, with 95 % interval", fontsize=7.5)
    axes.tick_params(axis="x", labelsize=7.5, colors=GREY)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(
        handles=[axes.plot([], [], "o-", color=colour)[0] for colour in (ORANGE, BLUE)],
        labels=["one nearest neighbour", "logistic regression"],
        loc="upper left",
        fontsize=7.5,
        frameon=False,
    )
    figure.suptitle(f"{document['dataset']}: the same pixels, split in other ways", fontsize=9, parse_math=False)
    return figure


def _lines(text: str, width: int = 34) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
