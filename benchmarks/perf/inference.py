"""Inference of our predictor beside raw ONNX Runtime and eager torch, on the same images, in turns.

Prints a table and, as its last line, one JSON object. Networks are trained for a moment on generated photographs and
exported; a variant counts only where its export passed the parity gate. Then, for each batch size, one process asks in
turns; a call's median in each turn, and the median over turns of both are what is compared, so that a drift of the
machine hits all alike:

- `ours`: `Predictor.logits` of the ONNX float32 bundle on prepared uint8 images: crop, stack, normalising, network.
- `raw`: `InferenceSession.run` of the same file, as many threads, on a float32 tensor that lies ready; nothing else.
- `copied`: `raw`, after such a tensor was copied into its input: the least that new images cost anybody.
- `by hand`: `raw`, after the same uint8 images were cropped, stacked, normalised and turned in a line of numpy.
- `eager`: torch in float32 without gradients on such a tensor, the faster of NCHW and channels-last.
- every other variant: `Predictor.logits` of that bundle.

`ratio` is raw over ours in time, `copied_ratio` and `by_hand_ratio` the same of these two, `session_ratio` raw over our
`Session` alone, without preprocessing; `eager_ratio` is eager over the fastest variant that passed. Batch 1 is a row,
and the batch of most images/s of ours, chosen before from `--batches`, another. `by_others` is the share of the machine
that other processes took: where it is more than a twentieth, `disturbed` says so; measure again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# Beside this file lies one with the name of a module of Python's own, which nobody must find there instead.
HERE = Path(__file__).resolve().parent
sys.path = [each for each in sys.path if Path(each).resolve() != HERE]

MODELS = ("mobilenetv3_small_100", "resnet18", "efficientnet_b0")
VARIANTS = ("onnx-float32", "onnx-int8", "openvino-float32", "openvino-bf16", "openvino-int8")
DISTURBED = 0.05  # of the machine
WARM_UP = 3
Call = Callable[[], Any]


def write_photos(folder: Path, count: int) -> Path:
    """Write JPEGs, 320 x 288, of two classes that differ in a colour."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for number in range(count):
        label = folder / "ab"[number % 2]
        label.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 190, (24, 27, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((320, 288), Image.Resampling.BICUBIC)).copy()
        pixels[..., number % 2] += 60
        Image.fromarray(pixels).save(label / f"{number:05}.jpg", quality=90)
    return folder


def trained_run(model: str, root: Any, chosen: argparse.Namespace) -> Any:
    """Return a run of one network, trained from random weights until the two classes are told apart."""
    from zoo.recipe import parse_recipe
    from zoo.training.loop import train

    table = {
        "model": {"name": model, "weights": "scratch", "image_size": chosen.size},
        "finetune": {"strategy": "full", "epochs": chosen.epochs, "batch_size": 16},
        "augment": {"policy": "none"},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "precision": "float32",
    }
    return train(parse_recipe(table, model), "photos", 0, root, accept_leaks=True)


def exported(run: Any, root: Any, variants: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the bundle of each variant that passed its gate, and why the others are not there."""
    from zoo.deployment.export import export
    from zoo.errors import ZooError

    bundles, refused = {}, {}
    for variant in variants:
        form, precision = variant.split("-")
        try:
            bundles[variant] = export(run, root, format=form, precision=precision)  # type: ignore[arg-type]
        except ZooError as error:
            refused[variant] = str(error)
    return bundles, refused


def raw_session(file: Path, threads: int) -> Any:
    """Return ONNX Runtime's own session, as its manual opens one, with stated threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def eager_calls(run: Any, root: Any, tensor: np.ndarray) -> dict[str, Call]:
    """Return a call of the network in eager torch for each memory format."""
    import torch

    from zoo.training.scoring import load_model

    calls = {}
    for name, layout in (("NCHW", torch.contiguous_format), ("channels-last", torch.channels_last)):
        network = load_model(run, root).to(memory_format=layout)
        images = torch.from_numpy(tensor).contiguous(memory_format=layout)

        def call(network: Any = network, images: Any = images) -> Any:
            with torch.inference_mode():
                return network(images)

        calls[f"eager {name}"] = call
    return calls


def contestants(run: Any, root: Any, bundles: dict[str, Any], batch: int, threads: int) -> dict[str, Call]:
    """Return what takes turns at one batch size; all get the same images, and must say the same of them."""
    from zoo.data.transforms import center_crop, normalise
    from zoo.deployment.predictor import Predictor

    predictors = {name: Predictor.load(bundle, root, threads=threads) for name, bundle in bundles.items()}
    ours = predictors["onnx-float32"]
    files = sorted((root.root / "photos").rglob("*.jpg"))[:batch]
    images = [ours.prepare(file.read_bytes()) for file in files]
    size = ours.preprocessing.image_size
    tensor = normalise(np.stack([center_crop(each, size) for each in images]), ours.preprocessing)
    raw = raw_session(bundles["onnx-float32"].model_file, threads)
    session: Any = ours.network.session  # type: ignore[attr-defined]
    copied = np.empty_like(tensor)
    mean, std = (np.array(each, np.float32) * 255 for each in (ours.preprocessing.mean, ours.preprocessing.std))

    def copy_and_run() -> Any:
        np.copyto(copied, tensor)
        return raw.run(None, {"images": copied})

    def by_hand() -> Any:
        values = (np.stack([center_crop(each, size) for each in images]).astype(np.float32) - mean) / std
        return raw.run(None, {"images": np.ascontiguousarray(values.transpose(0, 3, 1, 2))})

    calls: dict[str, Call] = {
        "raw": lambda: raw.run(None, {"images": tensor}),
        "copied": copy_and_run,
        "by hand": by_hand,
        "session": lambda: session(tensor),
    }
    calls |= {name: lambda each=each: each.logits(images) for name, each in predictors.items()}  # type: ignore[misc]
    calls |= eager_calls(run, root, tensor)
    said = calls["raw"]()[0]
    for name in ("onnx-float32", "session"):
        np.testing.assert_array_equal(calls[name]()[0], said)
    np.testing.assert_allclose(calls["eager NCHW"]().numpy(), said, rtol=1e-3, atol=1e-3)
    return calls


def in_turns(calls: dict[str, Call], rounds: int, turn_s: float) -> dict[str, np.ndarray]:
    """Return each one's median milliseconds of a call in every round, (rounds,); a turn lasts so many seconds."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls) if number % 2 else list(calls)[::-1]:
            for _ in range(WARM_UP):
                calls[name]()  # the threads of the one before fall asleep, and its own wake up
            ends = time.perf_counter() + turn_s
            taken: list[float] = []
            while len(taken) < 3 or time.perf_counter() < ends:
                started = time.perf_counter()
                calls[name]()
                taken.append(time.perf_counter() - started)
            found[name].append(1e3 * float(np.median(taken)))
    return {name: np.array(each) for name, each in found.items()}


def over(ms: dict[str, np.ndarray], one: str, two: str) -> float:
    """Return how many times as long `one` takes as `two`: the median over rounds, in each of which both had a turn."""
    return round(float(np.median(ms[one] / ms[two])), 3)


def busy_s() -> float:
    """Return the seconds that all cores have worked for anybody; 0 where the system does not say it."""
    try:
        words = [int(each) for each in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except OSError:
        return 0.0
    return (sum(words[:3]) + sum(words[5:8])) / os.sysconf("SC_CLK_TCK")


def measure(run: Any, root: Any, bundles: dict[str, Any], batch: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one network at one batch size."""
    calls = contestants(run, root, bundles, batch, chosen.threads)
    before = time.perf_counter(), time.process_time(), busy_s()
    by_round = in_turns(calls, chosen.rounds, chosen.turn_s)
    wall, own, busy = time.perf_counter() - before[0], time.process_time() - before[1], busy_s() - before[2]
    by_others = max(0.0, (busy - own) / wall / (os.cpu_count() or 1))
    ms = {name: float(np.median(each)) for name, each in by_round.items()}
    eager = min((name for name in ms if name.startswith("eager")), key=lambda name: ms[name])
    best = min(bundles, key=lambda name: ms[name])
    ours = ms["onnx-float32"]
    return {
        "model": run.record.model,
        "batch": batch,
        "ours_ms": round(ours, 3),
        "ours_images_per_s": round(1e3 * batch / ours, 1),
        "raw_ms": round(ms["raw"], 3),
        "session_ms": round(ms["session"], 3),
        "ratio": over(by_round, "raw", "onnx-float32"),
        "copied_ratio": over(by_round, "copied", "onnx-float32"),
        "by_hand_ratio": over(by_round, "by hand", "onnx-float32"),
        "session_ratio": over(by_round, "raw", "session"),
        "eager": eager.removeprefix("eager "),
        "eager_ms": round(ms[eager], 3),
        "best_variant": best,
        "best_ms": round(ms[best], 3),
        "eager_ratio": over(by_round, eager, best),
        "variants_ms": {name: round(ms[name], 3) for name in bundles},
        "by_others": round(by_others, 3),
        "disturbed": by_others > DISTURBED,
    }


def best_batch(bundle: Any, root: Any, chosen: argparse.Namespace) -> int:
    """Return the batch size above 1 at which our predictor of the float32 bundle gives most images per second."""
    from zoo.deployment.predictor import Predictor

    predictor = Predictor.load(bundle, root, threads=chosen.threads)
    files = sorted((root.root / "photos").rglob("*.jpg"))
    images = [predictor.prepare(file.read_bytes()) for file in files[: max(chosen.batches)]]
    calls: dict[str, Call] = {
        str(batch): lambda batch=batch: predictor.logits(images[:batch])  # type: ignore[misc]
        for batch in chosen.batches
    }
    ms = in_turns(calls, 2, chosen.turn_s)
    return max(chosen.batches, key=lambda batch: batch / float(np.median(ms[str(batch)])))


# The command ------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    """Return what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="timm's architectures, with commas between them")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="FORMAT-PRECISION; onnx-float32 is always there")
    parser.add_argument("--batches", default="4,8,16,32", help="of which the best is measured beside batch 1")
    parser.add_argument("--size", type=int, default=224, help="pixels of each side")
    parser.add_argument("--threads", type=int, default=None, help="cores of one call; left out: all")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each")
    parser.add_argument("--turn-s", type=float, default=0.2, help="seconds of a turn")
    parser.add_argument("--images", type=int, default=160, help="photographs; a fifth of them are val")
    parser.add_argument("--epochs", type=int, default=2, help="of the training before the export")
    chosen = parser.parse_args()
    chosen.batches = [int(each) for each in chosen.batches.split(",")]
    wanted = [each for each in chosen.variants.split(",") if each and each != "onnx-float32"]
    unknown = set(wanted) - set(VARIANTS)
    if unknown:
        parser.error(f"--variants must be of {', '.join(VARIANTS)}. Got {', '.join(sorted(unknown))}")
    if min(chosen.batches) < 1 or max(chosen.batches) > chosen.images:
        parser.error(f"--batches must lie within 1 and --images, {chosen.images}. Got {max(chosen.batches)}")
    chosen.variants = ["onnx-float32", *wanted]
    return chosen


def run_all(chosen: argparse.Namespace, root: Any) -> list[dict[str, Any]]:
    """Make the data, measure each network and print its rows; return all rows."""
    import torch

    from zoo.cores import cores
    from zoo.data.sources import import_dataset

    chosen.threads = chosen.threads or cores()
    import_dataset(
        write_photos(root.root / "photos", chosen.images), "photos", root, ratios=(0.7, 0.2, 0.1), near_duplicates=False
    )
    rows = []
    for model in chosen.models.split(","):
        run = trained_run(model, root, chosen)
        torch.set_num_threads(chosen.threads)
        bundles, refused = exported(run, root, chosen.variants)
        if "onnx-float32" not in bundles:
            sys.exit(f"error: {refused['onnx-float32']}")
        for batch in (1, best_batch(bundles["onnx-float32"], root, chosen)):
            rows.append({**measure(run, root, bundles, batch, chosen), "refused": refused})
            print_row(rows[-1])
        for name, why in refused.items():
            print(f"  not measured: {name}: {why}", flush=True)
    return rows


def print_row(row: dict[str, Any]) -> None:
    """Print one line of the table."""
    print(
        f"{row['model']:24} {row['batch']:5} {row['ours_ms']:9.2f} {row['raw_ms']:9.2f} {row['ratio']:7.3f} "
        f"{row['copied_ratio']:7.3f} {row['by_hand_ratio']:8.3f} {row['session_ratio']:8.3f} "
        f"{row['eager_ms']:9.2f} {row['eager']:14} {row['best_variant']:17} "
        f"{row['best_ms']:8.2f} {row['eager_ratio']:8.2f}{'  disturbed' if row['disturbed'] else ''}",
        flush=True,
    )


def main() -> None:
    """Measure, print a table, and end with one JSON line."""
    chosen = parse()
    print(
        f"{'network':24} {'batch':>5} {'ours ms':>9} {'raw ms':>9} {'ratio':>7} {'copied':>7} {'by hand':>8} "
        f"{'session':>8} {'eager ms':>9} {'eager format':14} {'best variant':17} {'best ms':>8} {'x eager':>8}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(ZOO_HOME=folder, HF_HUB_OFFLINE="1")
        from zoo.files import home
        from zoo.training.environment import processor, versions

        rows = run_all(chosen, home(folder))
    found = versions() | {name: version(name) for name in ("onnx", "onnxruntime")}
    if any(name.startswith("openvino") for name in chosen.variants):
        found["openvino"] = version("openvino")
    environment = {
        "device": processor(),
        "cores": os.cpu_count(),
        "threads": chosen.threads,
        "size": chosen.size,
        "load_before": os.getloadavg()[0],
        "versions": found,
    }
    print(json.dumps({"rows": rows, "environment": environment}))


if __name__ == "__main__":
    main()
