"""The life of a process that is measured: it opens one network, is asked to answer, and tells what that took.

It holds what a deployed process would hold and nothing else: for a bundle neither torch nor timm. What it is told and
tells are lines of JSON over a pipe of its own; it ends when its parent does.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import ZooError, one_line

Answer = Callable[[np.ndarray[Any, np.dtype[np.uint8]]], Any]


def serve(descriptor: int) -> None:
    """Open what the first order names, then answer orders until the other side closes; a process's whole life.

    First order: `kind` (bundle, run), `path`, `home`, `threads`. Others: `batch` and `calls`; the reply has `seconds`,
    one number for each call, and `peak_mib`; or `decode`: how often the sample is decoded. A reply with `error` is the
    last one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends this one
    connection = Connection(descriptor)
    try:
        order = json.loads(connection.recv_bytes())
        answer, pixels, decode, facts = _opened(order)
        _tell(connection, {**facts, "opened_mib": peak_mib()})
        while True:
            order = json.loads(connection.recv_bytes())
            if "decode" in order:
                seconds = [_timed(decode) for _ in range(order["decode"])]
            else:
                seconds = _timed_calls(answer, pixels, order["batch"], order["calls"])
            _tell(connection, {"seconds": seconds, "peak_mib": peak_mib()})
    except (EOFError, ConnectionError):
        return  # the parent is done, or gone
    except (ZooError, MemoryError, RuntimeError, OSError) as error:
        _tell(connection, {"error": one_line(error) or type(error).__name__})


def _tell(connection: Connection, value: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(value).encode())


def _timed_calls(answer: Answer, pixels: np.ndarray[Any, Any], batch: int, calls: int) -> list[float]:
    """Return the seconds of each call; one before them, which is not counted, brings caches and threads back."""
    images = np.ascontiguousarray(np.broadcast_to(pixels, (batch, *pixels.shape)))
    answer(images)
    return [_timed(lambda: answer(images)) for _ in range(calls)]


def _timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _opened(order: dict[str, Any]) -> tuple[Answer, np.ndarray[Any, Any], Callable[[], Any], dict[str, Any]]:
    """Return how images (B, S, S, 3) uint8 are answered, one such image, how a file becomes one, and what is known."""
    from zoo.data.transforms import center_crop
    from zoo.data.views import VIEWS
    from zoo.deployment.predictor import prepare

    open_it = _open_bundle if order["kind"] == "bundle" else _open_run
    empty_mib, begin = peak_mib(), time.perf_counter()
    answer, preprocessing, tta, sample, facts = open_it(Path(order["path"]), Path(order["home"]), order["threads"])
    facts |= {"open_s": time.perf_counter() - begin, "views": (views := len(VIEWS[tta])), "empty_mib": empty_mib}

    def read() -> np.ndarray[Any, np.dtype[np.uint8]]:
        return center_crop(prepare(sample, preprocessing), preprocessing.image_size)

    if views == 1:
        return answer, read(), read, facts
    return lambda images: [answer(images) for _ in range(views)], read(), read, facts  # as `Predictor.logits` asks


def _open_bundle(path: Path, _home: Path, threads: int) -> tuple[Answer, Any, str, bytes, dict[str, Any]]:
    from zoo.data.transforms import normalise
    from zoo.deployment.bundle import SAMPLE, open_bundle
    from zoo.deployment.runtime import Session

    bundle = open_bundle(path)
    record = bundle.record
    session = Session(bundle.model_file, record.format, record.precision, threads)
    facts = {"runtime": session.runtime, "torch_loaded": "torch" in sys.modules}
    sample = (bundle.path / SAMPLE).read_bytes()

    def answer(images: np.ndarray[Any, Any]) -> Any:
        return session(normalise(images, record.preprocessing))

    return answer, record.preprocessing, record.tta, sample, facts


def _open_run(path: Path, root: Path, threads: int) -> tuple[Answer, Any, str, bytes, dict[str, Any]]:
    """Eager torch in float32, channels-last: what a run is without any export."""
    import torch

    from zoo.data.transforms import normalise_tensor
    from zoo.deployment.export import sample_png
    from zoo.files import home
    from zoo.models.spec import load_plugins
    from zoo.runs import Run
    from zoo.training.scoring import finished_record, load_model

    torch.set_num_threads(threads)
    load_plugins()  # a network of the user's own
    record = finished_record(Run(path))
    preprocessing = record.preprocessing
    assert preprocessing is not None
    model = load_model(Run(path), home(root))

    def answer(images: np.ndarray[Any, Any]) -> Any:
        with torch.inference_mode():
            return model(normalise_tensor(torch.from_numpy(images), preprocessing)).numpy()

    facts = {"runtime": f"torch {torch.__version__}", "torch_loaded": True}
    return answer, preprocessing, record.tta, sample_png(), facts


def peak_mib() -> float:
    """Return the most memory that this process has held so far, resident, in MiB.

    By Linux's `VmHWM`: `ru_maxrss` also counts what the parent held at the moment of the fork.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1 << 20 if sys.platform == "darwin" else 1 << 10)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
