"""`zoo pretrain`: a backbone's weights from formula images alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zoo.cli.screen import HomeOption, JsonOption
from zoo.cores import cores


def add_to(parent: typer.Typer) -> None:
    """Add the verb to the command line."""
    parent.command()(pretrain)


def pretrain(
    arch: Annotated[str, typer.Argument(help="Architecture of `zoo list models`, without a tag.")],
    source: Annotated[str, typer.Option(help="What is learnt from; formula: images that are generated.")] = "formula",
    families: Annotated[str | None, typer.Option(help="Kinds of formula images, with commas; else all.")] = None,
    images: Annotated[int, typer.Option(help="Images drawn of each class.")] = 250,
    epochs: Annotated[int, typer.Option(help="Passes over all images.")] = 12,
    image_sizes: Annotated[
        str, typer.Option(help="Pixels of the crops, with commas: each for an even share of the epochs.")
    ] = "48,48,64",
    batch_size: Annotated[int, typer.Option(help="Images of one step.")] = 128,
    lr: Annotated[float, typer.Option(help="Highest learning rate of the one cycle.")] = 3e-3,
    colour_weight: Annotated[float, typer.Option(help="Weight of the auxiliary loss on colours; 0: none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    precision: Annotated[str, typer.Option(help="auto, float32 or bf16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    tag: Annotated[str, typer.Option(help="The weights' name is ARCH.TAG.")] = "formula",
    licence: Annotated[str, typer.Option(help="What the card says of the weights' licence.")] = "not stated",
    json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Pretrain a backbone on generated images; what was interrupted goes on, what is finished is not trained again."""
    from zoo.cli.screen import bars, print_json
    from zoo.errors import ZooError, nearest, one_line
    from zoo.files import home as home_of
    from zoo.files import read_json
    from zoo.training.pretrain import Pretraining, pretrain

    if source != "formula":
        raise ZooError(f"--source knows formula alone. Got {one_line(source)!r}{nearest(source, ['formula'])}")
    settings = Pretraining(
        arch,
        families=tuple(name.strip() for name in (families or "").split(",") if name.strip()),
        images_per_class=images,
        epochs=epochs,
        image_sizes=_sizes(image_sizes),
        batch_size=batch_size,
        lr=lr,
        colour_weight=colour_weight,
        seed=seed,
        precision=precision,
    )
    with bars(quiet=json) as shown:
        folder = pretrain(settings, home_of(), tag, device, cores(), licence, shown.tick)
    card = read_json(folder / f"{arch}.{tag}.json")
    if json:
        print_json({**card, "folder": str(folder)})
    else:
        _print(card, folder)


def _sizes(text: str) -> tuple[int, ...]:
    from zoo.errors import ZooError, one_line

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ZooError(f"--image-sizes takes whole numbers with commas, 48,64. Got {one_line(text)!r}") from None


def _print(card: dict[str, Any], folder: Path) -> None:
    from zoo.cli.screen import console

    out = console()
    for line in (
        f"{card['name']}: {card['classes']} classes, {card['images_seen']:,} images seen, {card['hours']:.2f} h, "
        f"held-out top1 {card['held_out_top1']:.3f}, {card['bytes'] / 1e6:.2f} MB",
        f"weights and card: {folder}",
        f'to use them: ZOO_WEIGHTS={folder}, and [model] name = "{card["name"]}", weights = "pretrained"',
    ):
        out.print(line, markup=False, soft_wrap=True)
