from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.data import apart
from zoo.data.apart import ChildFault, ask
from zoo.data.decode import BadImage, decode
from zoo.data.sources import import_dataset
from zoo.deployment.predictor import Predictor
from zoo.errors import ZooError
from zoo.runs import list_runs

pytest.importorskip("gdcm")
pytest.importorskip("pydicom")
MOST = 1 << 28


def jpeg_dicom(damaged: bool = False) -> bytes:
    """A DICOM with a JPEG in it; a damaged one lacks the head of a Huffman table, of which GDCM ends the process."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage

    drawn, stream, written = np.random.default_rng(0), io.BytesIO(), io.BytesIO()
    Image.fromarray(drawn.integers(0, 255, (24, 24), dtype=np.uint8)).save(stream, "JPEG")
    data = stream.getvalue()
    if damaged:
        at = data.index(b"\xff\xc4")
        data = data[:at] + data[at + 13 :]
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPInstanceUID = JPEGBaseline8Bit, "2.25.1"
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    made = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    made.SOPClassUID, made.SOPInstanceUID, made.Modality = SecondaryCaptureImageStorage, "2.25.1", "OT"
    made.Rows = made.Columns = 24
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 8, 8, 7
    made.PixelData = encapsulate([data])
    made["PixelData"].is_undefined_length = True
    made.save_as(written, enforce_file_format=True)
    return written.getvalue()


def asked(data: bytes) -> np.ndarray:
    return ask("zoo.data.dicom", data, MOST)


@pytest.fixture(autouse=True)
def none_left():
    yield
    apart._stop_idle()
    apart._idle.clear()


def test_gdcm_itself_ends_the_process_of_the_damaged_one(tmp_path):
    file = tmp_path / "damaged.dcm"
    file.write_bytes(jpeg_dicom(damaged=True))
    code = "import sys, pydicom; from pydicom.pixels import pixel_array; pixel_array(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, check=False)
    assert done.returncode < 0, done.stderr  # a signal; where this fails, the children may not be needed any more


@pytest.mark.slow
def test_a_dicom_that_ends_its_decoder_is_a_bad_image_and_the_next_one_is_read():
    whole = decode(jpeg_dicom())
    for _ in range(2):
        with pytest.raises(BadImage, match=r"JPEG Baseline.*its decoder gave up"):
            decode(jpeg_dicom(damaged=True))
        assert np.array_equal(decode(jpeg_dicom()), whole)


@pytest.mark.slow
def test_a_child_gives_the_decoders_own_pixels_whatever_their_type(assets):
    from pydicom.pixels import pixel_array

    asked(jpeg_dicom())
    (idle,) = apart._idle.values()
    child, compared = idle[0]._process.pid, 0
    for file in sorted((assets / "dicom" / "pydicom").glob("*")):
        try:
            expected = pixel_array(file)
        except Exception:  # no image: the child says that, or, as it reads more, has pixels
            with suppress(ChildFault):
                asked(file.read_bytes())
            continue
        if expected.ndim <= 3 and file.stat().st_size < 1 << 20:
            found = asked(file.read_bytes())
            assert found.dtype == expected.dtype and np.array_equal(found, expected), file.name
            compared += 1
    assert compared > 20
    assert idle[0]._process.pid == child  # none of them ended it


@pytest.mark.slow
def test_an_import_names_such_a_file_and_takes_the_others(root, tmp_path):
    for place in range(12):
        label = tmp_path / "scans" / "ab"[place % 2]
        label.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 15 * place, np.uint8)).save(label / f"{place}.png")
    (label / "damaged.dcm").write_bytes(jpeg_dicom(damaged=True))
    with pytest.raises(ZooError, match=r"1 of 13 images cannot be used.*'b/damaged.dcm'.*its decoder gave up"):
        import_dataset(tmp_path / "scans", "scans", root, near_duplicates=False)
    dataset = import_dataset(tmp_path / "scans", "scans", root, near_duplicates=False, bad_images="skip")
    assert sum(len(dataset.of_split(split)) for split in ("train", "val", "test")) == 12


@pytest.mark.slow
def test_a_prediction_of_such_a_file_is_a_row_with_a_reason(trained, tmp_path):
    files = [tmp_path / "damaged.dcm", tmp_path / "whole.dcm"]
    for file, damaged in zip(files, (True, False), strict=True):
        file.write_bytes(jpeg_dicom(damaged))
    bad, good = Predictor.load(list_runs(trained)[0], trained).predict(files)
    assert "its decoder gave up" in bad.error and bad.label is None
    assert good.error is None and good.label


def test_an_error_is_named_by_its_kind_alone():
    with pytest.raises(ChildFault, match=r"^[A-Za-z]+Error$"):
        asked(b"nothing of the kind")
    assert asked(jpeg_dicom()).shape == (24, 24)


@pytest.mark.slow
def test_one_child_serves_one_thread_after_the_other_and_several_at_once():
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(asked, [jpeg_dicom()] * 20))
    assert all(np.array_equal(each, found[0]) for each in found)
    (idle,) = apart._idle.values()
    assert 1 <= len(idle) <= 4


@pytest.mark.slow
def test_a_child_that_was_killed_or_hangs_is_replaced(monkeypatch):
    asked(jpeg_dicom())
    (idle,) = apart._idle.values()
    os.kill(idle[0]._process.pid, signal.SIGKILL)
    idle[0]._process.wait()
    assert asked(jpeg_dicom()).shape == (24, 24)
    os.kill(idle[0]._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(apart, "_SECONDS", 0.5)
    with pytest.raises(ChildFault, match="it takes too long to decode"):
        asked(jpeg_dicom())
    monkeypatch.undo()
    assert asked(jpeg_dicom()).shape == (24, 24)


@pytest.mark.slow
def test_an_interrupted_question_leaves_no_answer_for_the_next():
    asked(jpeg_dicom())
    (idle,) = apart._idle.values()
    child = idle[0]._process.pid
    os.kill(child, signal.SIGSTOP)  # so that the interrupt comes while it is waited for
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        asked(jpeg_dicom())
    timer.join()
    assert not idle and not Path(f"/proc/{child}").exists()
    assert asked(jpeg_dicom()).shape == (24, 24)


@pytest.mark.slow
def test_children_end_with_their_process():
    code = (
        "import sys; from zoo.data.apart import ask, _idle; data = sys.stdin.buffer.read()\n"
        f"ask('zoo.data.dicom', data, {MOST}); (idle,) = _idle.values(); print(idle[0]._process.pid, flush=True)\n"
        "import os; os._exit(0) if sys.argv[1] == 'at once' else None"
    )
    for how in ("at once", "in order"):
        done = subprocess.run([sys.executable, "-c", code, how], input=jpeg_dicom(), capture_output=True, check=True)
        assert done.stderr == b""
        import psutil

        child = int(done.stdout)
        if psutil.pid_exists(child):
            psutil.wait_procs([psutil.Process(child)], timeout=20)
        assert not psutil.pid_exists(child)


@pytest.mark.slow
def test_a_child_that_takes_nothing_is_not_waited_for(monkeypatch):
    asked(jpeg_dicom())
    (idle,) = apart._idle.values()
    child = idle[0]._process
    os.kill(child.pid, signal.SIGSTOP)
    monkeypatch.setattr(apart, "_SECONDS", 0.5)
    said: list[BaseException] = []

    def ask_much() -> None:
        try:
            asked(bytes(8 << 20))  # more than a pipe holds
        except BaseException as error:
            said.append(error)

    asking = threading.Thread(target=ask_much)
    asking.start()
    asking.join(30)
    ended = not asking.is_alive()
    child.kill()
    asking.join()
    assert ended and str(said[0]) == "it takes too long to decode" and isinstance(said[0], ChildFault)


def test_much_is_sent_and_comes_back(tmp_path, monkeypatch):
    (tmp_path / "echoing.py").write_text(
        "import numpy\nfrom zoo.data.apart import answer_with\n"
        "def work(most):\n    answer_with(lambda data: numpy.frombuffer(data, numpy.uint8), most)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = np.random.default_rng(0).integers(0, 256, 9_000_001, dtype=np.uint8)
    for _ in range(2):
        assert np.array_equal(ask("echoing", data.tobytes(), MOST), data)


@pytest.mark.slow
def test_a_child_whose_parent_is_not_there_to_end_it_ends_by_itself(tmp_path):
    (tmp_path / "looping.py").write_text(
        "from zoo.data import apart\n"
        "def loop(data):\n    print = open('/proc/self/stat').read\n    while True: print()\n"
        "def work(most):\n    apart._SECONDS = -3\n    apart.answer_with(loop, most)\n"
    )
    code = (
        "import os, signal, threading, time; from zoo.data.apart import _busy, ask\n"
        "def die():\n    while not (child := next(iter(_busy.values()), None)): time.sleep(0.01)\n"
        "    print(child._process.pid, flush=True); time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"threading.Thread(target=die).start(); ask('looping', b'x', {MOST})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL
    import psutil

    child = int(done.stdout)
    if psutil.pid_exists(child):
        _, left = psutil.wait_procs([psutil.Process(child)], timeout=20)
        for each in left:
            each.kill()
        assert not left


@pytest.mark.slow
def test_an_interrupted_prediction_waits_for_no_child_that_is_stuck(tmp_path):
    (tmp_path / "scan.dcm").write_bytes(jpeg_dicom())
    code = """if True:
        import os, signal, sys, threading, time
        import numpy as np
        from zoo.data import apart
        from zoo.deployment.predictor import Predictor
        from zoo.runs import Preprocessing

        def interrupt():
            while not apart._busy: time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        whole = dict(crop_pct=1, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
        network = lambda images: (np.zeros((len(images), 2), np.float32), None)
        predictor = Predictor(network, Preprocessing(image_size=16, **whole), ["a", "b"])
        files = [sys.argv[1]] * 9
        assert [each.error for each in predictor.predict(files)] == [None] * 9
        for children in apart._idle.values():
            for child in children: os.kill(child._process.pid, signal.SIGSTOP)
        apart._SECONDS = 10_000
        threading.Thread(target=interrupt).start()
        try: predictor.predict(files)
        except KeyboardInterrupt: print("interrupted")
        assert not apart._busy
    """
    command = [sys.executable, "-c", code, str(tmp_path / "scan.dcm")]
    done = subprocess.run(command, capture_output=True, check=False, timeout=100)  # far less than 10000 seconds
    assert (done.returncode, done.stdout, done.stderr) == (0, b"interrupted\n", b"")
