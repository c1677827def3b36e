"""The work behind the server: who keeps what, where it runs, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading

import httpx
import numpy as np
import psutil
import pytest
from live_server import form

from zoo.deployment.predictor import Predictor
from zoo.deployment.server import app as server_app
from zoo.deployment.server.app import State, _box, create_app
from zoo.deployment.server.limits import ClientGone, Limits, Refused
from zoo.deployment.server.metrics import Metrics
from zoo.deployment.server.queue import MOST_DECODERS, WorkQueue
from zoo.deployment.server.served import facts_of


@pytest.fixture
def predictor(bundle_folder):
    return Predictor.load(bundle_folder)


@pytest.mark.parametrize("why", ["the client left", "the deadline passed"])
def test_images_that_nobody_waits_for_are_let_go(predictor, picture, why):
    data = [picture(seed=seed) for seed in range(3)]
    before = [sys.getrefcount(each) for each in data]
    deadline = 60 if why == "the client left" else 0.01
    queue = WorkQueue({"m": predictor}, Limits(deadline_s=deadline), Metrics(), 1)
    busy, free = threading.Event(), threading.Event()

    async def ask():
        queue.start()
        queue._decoders.submit(lambda: busy.set() or free.wait())  # the only decoder is busy
        assert busy.wait(60)
        gone = asyncio.get_running_loop().create_future()
        if why == "the client left":
            gone.set_result(None)
        with contextlib.suppress(ClientGone, Refused):
            await queue.predict("m", list(data), gone)
            raise AssertionError("it was answered")

    try:
        asyncio.run(ask())
        assert queue._decoders._work_queue.qsize() == 3  # they wait still, with nothing in them
        assert [sys.getrefcount(each) for each in data] == before
    finally:
        free.set()
        queue.stop()


@pytest.mark.slow
def test_the_end_of_the_queue_leaves_no_process_thread_or_pipe(predictor, picture):
    queue = WorkQueue({"m": predictor}, Limits(decode_s=600), Metrics(), 2)

    async def ask():
        queue.start()
        never = asyncio.get_running_loop().create_future()
        await queue.predict("m", [picture()] * 4, never)
        processes = [each.child._process for each in queue._started]
        for each in processes:
            os.kill(each.pid, signal.SIGSTOP)
        asking = asyncio.ensure_future(queue.predict("m", [picture()] * 2, never))
        await asyncio.sleep(0)
        queue.stop()
        asking.cancel()
        return processes

    processes = asyncio.run(ask())
    assert processes
    assert not [each for each in processes if each.poll() is None or not each.stdin.closed or not each.stdout.closed]
    assert not [each.name for each in threading.enumerate() if each.name.startswith("decode")]
    queue.stop()


def test_no_more_decoders_than_one_network_can_use(predictor):
    queues = [WorkQueue({"m": predictor}, Limits(), Metrics(), count) for count in (0, 3, 64)]
    assert [each._pool_size for each in queues] == [1, 3, MOST_DECODERS] == [1, 3, 8]


@pytest.mark.slow
def test_forms_are_read_one_after_the_other_and_not_in_the_event_loop(predictor, picture, monkeypatch):
    inside, most, threads = 0, 0, set()
    both, read = threading.Event(), server_app.images_of

    def watched(*told):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threads.add(threading.current_thread())
        both.wait(60)  # until the event loop has answered somebody else
        found = read(*told)
        inside -= 1
        return found

    monkeypatch.setattr(server_app, "images_of", watched)
    state = State()
    app = create_app({"m": predictor}, {"m": facts_of("m", predictor.bundle)}, decoders=1, state=state)

    async def ask():
        async with app.router.lifespan_context(app):
            while not state.ready:
                await asyncio.sleep(0.01)
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")
            async with client:
                body, media_type = form([("files", "a", picture())])
                sent = {"content": body, "headers": {"Content-Type": media_type}}
                asking = [asyncio.ensure_future(client.post("/predict", **sent)) for _ in range(3)]
                while not inside:
                    await asyncio.sleep(0.01)
                assert (await client.get("/health")).status_code == 200
                both.set()
                return [each.status_code for each in await asyncio.gather(*asking)]

    assert asyncio.run(ask()) == [200] * 3
    assert most == 1 and threading.main_thread() not in threads


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_a_decoder(odd, picture):
    server = odd(limits={"decode_s": 3600, "deadline_s": 3600, "grace_s": 3600})
    assert server.predict(picture())[0] == 200
    children = psutil.Process(server.process.pid).children(recursive=True)
    for each in children:
        each.suspend()
    sock = server.connect()
    data = picture()
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: "
    sock.sendall(f"{head}{len(data)}\r\n\r\n".encode() + data)
    while "zoo_queue_images 1.0" not in server.ask("GET", "/metrics")[2]:
        pass
    server.process.send_signal(signal.SIGTERM)
    while server.ask("GET", "/ready")[0] != 503:
        pass
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(120)
    sock.close()
    assert "Traceback" not in server.log and "broken" not in server.log
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


@pytest.mark.parametrize("sides", [(40, 44), (100, 400), (100, 1000), (90, 2000)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_box_is_where_the_network_saw_the_image(predictor, picture, sides, turned):
    """A ramp along the long side: what the network sees tells where it came from."""
    from io import BytesIO

    from PIL import Image

    short, long = sides
    ramp = np.repeat(np.linspace(0, 255, long)[None], short, axis=0)
    pixels = np.repeat(ramp.round().astype(np.uint8)[:, :, None], 3, axis=2)
    out = BytesIO()
    Image.fromarray(pixels.transpose(1, 0, 2) if turned else pixels).save(out, "PNG")
    prepared = predictor.prepare(out.getvalue())
    side = predictor.preprocessing.image_size
    left, top, right, bottom = _box(prepared.shape[:2], sides, side)
    start, end = (top, bottom) if turned else (left, right)
    seen = predictor.pixels(out.getvalue())[:, :, 0].astype(float)
    line = seen[:, side // 2] if turned else seen[side // 2]
    step = (line[-1] - line[0]) / (side - 1)
    assert 255 * (start * long - 0.5) / (long - 1) == pytest.approx(line[0] - step / 2, abs=2)
    assert 255 * (end * long - 0.5) / (long - 1) == pytest.approx(line[-1] + step / 2, abs=2)


@pytest.mark.slow
def test_the_answer_for_a_long_image_has_the_box_of_what_was_sent(live, picture):
    row = live.predict(picture(size=(880, 40)), query="?explain=true")[2]["predictions"][0]
    left, top, right, bottom = row["activation_box"]
    wide = live.predict(picture(size=(160, 40)), query="?explain=true")[2]["predictions"][0]["activation_box"]
    assert (top, bottom) == (wide[1], wide[3])
    assert left + right == pytest.approx(1, abs=0.02)
    assert right - left == pytest.approx((wide[2] - wide[0]) * 160 / 880, abs=1e-5)
