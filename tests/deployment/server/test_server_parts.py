from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_server import form
from test_server_http import dicom, huge_png

from zoo.deployment.predictor import prepare
from zoo.deployment.server.decoders import Decoder, Heavy
from zoo.deployment.server.gate import Hosts
from zoo.deployment.server.limits import Body, Held, Limits, Refused, busy, check_image, content_type_of
from zoo.deployment.server.queue import _Pace
from zoo.deployment.server.uploads import images_of
from zoo.errors import ZooError
from zoo.runs import Preprocessing

PLAIN = Preprocessing(image_size=32, crop_pct=0.875, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def decoder():
    found = Decoder(max_pixels=9_000_000, seconds=30)
    yield found
    found.stop()


# Decoders ---------------------------------------------------------------------------------------------------------


def test_a_decoder_gives_the_predictors_own_pixels(decoder, picture):
    for data in (picture(), picture("JPEG", size=(300, 90)), picture("TIFF", mode="L"), dicom()):
        for chosen in (PLAIN, PLAIN.model_copy(update={"interpolation": "bilinear", "window": "lung"})):
            assert np.array_equal(decoder.prepare(data, chosen)[0], prepare(data, chosen))


def test_a_decoder_refuses_and_goes_on(decoder, picture):
    for data, status in (
        (b"hello", 415),
        (picture()[:99], 422),
        (huge_png(3100), 413),
        (b"", 422),
        (dicom(Rows=0), 422),
    ):
        with pytest.raises(Refused) as refused:
            decoder.prepare(data, PLAIN)
        assert refused.value.status == status
    assert decoder.prepare(picture(), PLAIN)[0].shape == (36, 39, 3)


def test_a_big_image_waits_for_a_decoder_of_its_own(decoder):
    data = huge_png(2900)
    with pytest.raises(Heavy):
        decoder.prepare(data, PLAIN)
    assert decoder.prepare(data, PLAIN, heavy=True)[0].shape == (36, 36, 3)


def test_a_big_dicom_is_a_big_image(decoder):
    data = dicom(Rows=2900, Columns=2900, PixelData=bytes(2 * 2900 * 2900))
    with pytest.raises(Heavy):
        decoder.prepare(data, PLAIN)
    assert decoder.prepare(data, PLAIN, heavy=True)[0].shape == (36, 36, 3)


def test_a_decoder_tells_the_sides_before_it_cut_an_image_to_four_to_one(decoder, picture):
    for data in (picture(size=(440, 40)), picture("TIFF", size=(440, 40))):
        pixels, sides = decoder.prepare(data, PLAIN)
        assert (pixels.shape, sides) == ((36, 144, 3), (40, 440))
    pixels, sides = decoder.prepare(dicom(Rows=11, Columns=160), PLAIN)
    assert (pixels.shape, sides) == ((36, 144, 3), (11, 160))


def test_killed_from_another_thread_a_decoder_closes_its_own_pipes_and_starts_no_more(picture):
    decoder = Decoder(max_pixels=1_000_000, seconds=600)
    decoder.prepare(picture(), PLAIN)
    process = decoder.child._process
    os.kill(process.pid, signal.SIGSTOP)
    refused = []

    def ask():
        with pytest.raises(Refused) as found:
            decoder.prepare(picture(), PLAIN)
        refused.append(found.value.reason)

    asking = threading.Thread(target=ask)
    asking.start()
    decoder.kill()
    assert decoder.child._process is None or not decoder.child._process.stdin.closed or not asking.is_alive()
    asking.join(60)
    assert refused == ["unreadable: its decoder gave up"] and process.stdout.closed
    ask()
    assert decoder.child._process is None
    decoder.kill()
    assert decoder.child._process is None


def test_killing_a_child_leaves_its_pipes_to_the_thread_that_uses_it(picture):
    decoder = Decoder(max_pixels=1_000_000, seconds=60)
    decoder.prepare(picture(), PLAIN)
    decoder.kill()
    assert not decoder.child._process.stdin.closed and not decoder.child._process.stdout.closed
    process = decoder.child._process
    decoder.stop()
    assert process.stdin.closed and process.stdout.closed and decoder.child._process is None


def test_a_decoder_is_bounded(decoder, picture):
    decoder.prepare(picture(), PLAIN)
    lines = Path(f"/proc/{decoder.child._process.pid}/limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[0] for line in lines[1:]}
    assert limits["Max core file size"] == "0" and limits["Max file size"] == "0"
    assert int(limits["Max address space"]) < 4 << 30


@pytest.mark.slow
def test_a_decoder_that_dies_or_hangs_is_replaced(picture):
    decoder = Decoder(max_pixels=1_000_000, seconds=60)
    try:
        decoder.prepare(picture(), PLAIN)
        process = decoder.child._process.pid
        os.kill(process, signal.SIGSTOP)
        decoder.seconds = 1
        with pytest.raises(Refused, match="it takes too long to decode"):
            decoder.prepare(picture(), PLAIN)
        assert decoder.child._process is None
        decoder.seconds = 60
        assert decoder.prepare(picture(), PLAIN)[0].shape == (36, 39, 3)
        os.kill(decoder.child._process.pid, signal.SIGSTOP)
        killer = threading.Timer(0.5, os.kill, (decoder.child._process.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(Refused, match="unreadable: its decoder gave up"):
            decoder.prepare(picture(), PLAIN)
        killer.join()
        assert decoder.prepare(picture(), PLAIN)[0].shape == (36, 39, 3)
    finally:
        decoder.stop()


def test_signals_to_the_group_do_not_end_a_decoder(decoder, picture):
    decoder.prepare(picture(), PLAIN)
    process = decoder.child._process.pid
    for each in (signal.SIGINT, signal.SIGTERM):
        os.kill(process, each)
    decoder.prepare(picture(), PLAIN)
    assert decoder.child._process.pid == process


@pytest.mark.slow
def test_decoders_end_with_their_server(start, bundle_folder, picture):
    import psutil

    server = start(str(bundle_folder))
    server.predict(picture())
    started = psutil.Process(server.process.pid).children(recursive=True)
    assert started
    server.process.kill()
    server.process.wait()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert not alive


# Forms ------------------------------------------------------------------------------------------------------------

BOUNDARIES = st.text("abcXYZ0123456789-_", min_size=1, max_size=60)
PARTS = st.lists(st.tuples(st.sampled_from(("files", "file", "other")), st.binary(max_size=300)), max_size=6)


@given(PARTS, BOUNDARIES)
def test_every_file_of_a_form_comes_out_as_it_went_in(parts, boundary):
    parts = [(field, data) for field, data in parts if f"--{boundary}".encode() not in data]
    body, media_type = form([(field, "x.png", data) for field, data in parts], boundary)
    wanted = [data for field, data in parts if field != "other"]
    if wanted:
        assert images_of(bytearray(body), media_type, 8) == wanted
    else:
        with pytest.raises(Refused, match="the form holds no file"):
            images_of(bytearray(body), media_type, 8)


@given(st.binary(max_size=400), st.integers(0, 3))
def test_no_form_breaks_the_reader(noise, place):
    body, media_type = form([("files", "a", b"12345"), ("files", "b", b"67")])
    at = place * len(body) // 4
    try:
        found = images_of(bytearray(body[:at] + noise + body[at:]), media_type, 4)
    except Refused as refused:
        assert refused.status in (400, 413)
    else:
        assert found


def test_a_form_of_too_many_parts_is_refused():
    body, media_type = form([("other", "a", b"")] * 2000)
    with pytest.raises(Refused) as refused:
        images_of(bytearray(body), media_type, 4)
    assert refused.value.status == 413


def test_false_delimiters_and_long_padding_are_refused_before_they_are_parsed():
    many = b"\r\n--xxBOUNDARYxx?" * 1000
    body, media_type = form([("files", "a", many)])
    with pytest.raises(Refused) as refused:
        images_of(bytearray(body), media_type, 4)
    assert refused.value.status == 413
    few = many[: 17 * 11]
    body, _ = form([("files", "a", few)])
    assert images_of(bytearray(body), media_type, 4) == [few]
    for spaces, status in ((60, None), (65, 400), (1 << 20, 400)):
        body, _ = form([("files", "a", b"1"), ("files", "b", b"2")])
        padded = body.replace(
            b"1\r\n--xxBOUNDARYxx", b"1\r\n--xxBOUNDARYxx" + b" \t" * (spaces // 2) + b" " * (spaces % 2)
        )
        if status is None:
            assert images_of(bytearray(padded), media_type, 4) == [b"1", b"2"]
            continue
        with pytest.raises(Refused) as refused:
            images_of(bytearray(padded), media_type, 4)
        assert refused.value.status == status


# Limits -----------------------------------------------------------------------------------------------------------


async def _pieces(*pieces):
    for each in pieces:
        yield each


def _read(limits, held, pieces, length=None, encoding=None):
    async def run():
        with Body(limits, held) as body:
            await body.read(_pieces(*pieces), length, encoding)
            return bytes(body.data), held.bytes

    return asyncio.run(run())


def test_bytes_of_all_bodies_are_counted_and_given_back():
    held = Held(10)
    assert _read(Limits(body_bytes=8), held, [b"123", b"45678"]) == (b"12345678", 8)
    assert held.bytes == 0
    held.take(6)
    with pytest.raises(Refused) as refused:
        _read(Limits(body_bytes=8), held, [b"123", b"45"])
    assert refused.value.status == 503 and refused.value.headers["Retry-After"] == "2"
    assert held.bytes == 6


async def _coming(limits, held, *pieces):
    """Begin to read a body whose end does not come, with pauses of so many seconds; return it and the task."""
    body, all_came = Body(limits, held), asyncio.Event()

    async def chunks():
        for each in pieces:
            if isinstance(each, bytes):
                yield each
            else:
                await asyncio.sleep(each)
        all_came.set()
        await asyncio.Event().wait()

    async def read():
        with body:
            await body.read(chunks(), None, None)

    task = asyncio.create_task(read())
    await asyncio.wait((task, asyncio.create_task(all_came.wait())), return_when="FIRST_COMPLETED")
    return body, task


async def _statuses(*tasks):
    """Return what each was refused with, None where it still reads; none goes on reading."""
    for _ in range(20):
        await asyncio.sleep(0)
    for each in tasks:
        each.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    return [each.status if isinstance(each, Refused) else None for each in found]


def test_who_finds_no_room_takes_that_of_the_body_that_stalled_for_longest():
    async def run():
        held, limits = Held(10), Limits(body_bytes=8, bytes_per_s=1000, stalled_s=0)
        (_, first), (_, second) = [await _coming(limits, held, b"1234") for _ in range(2)]
        last, third = await _coming(limits, held, b"123")
        assert (held.bytes, bytes(last.data)) == (7, b"123")
        assert await _statuses(first, second, third) == [408, None, None]
        assert (held.bytes, held.coming) == (0, set())

    asyncio.run(run())


def test_what_came_fast_before_is_no_credit_and_a_byte_now_and_then_no_progress():
    async def run():
        held, limits = Held(100), Limits(body_bytes=99, bytes_per_s=10, stalled_s=0.1)
        steady, first = await _coming(limits, held, b"x" * 20)
        _, dribbling = await _coming(limits, held, b"x" * 60, 0.5, b"x")
        steady._add(b"x" * 10)
        _, newcomer = await _coming(limits, held, b"x" * 20)
        assert held.bytes == 30 + 20
        assert await _statuses(first, dribbling, newcomer) == [None, 408, None]

    asyncio.run(run())


@pytest.mark.parametrize(("stalled_s", "status"), [(0, 408), (1e9, 503)])
def test_without_room_the_body_that_stalled_itself_is_told_so_and_one_that_did_not_to_come_again(stalled_s, status):
    async def run():
        held, limits = Held(10), Limits(body_bytes=9, bytes_per_s=1 << 30, stalled_s=stalled_s)
        held.take(6)
        _, task = await _coming(limits, held, b"123", 0.01, b"45")
        assert await _statuses(task) == [status]
        assert held.bytes == 6

    asyncio.run(run())


@pytest.mark.parametrize(
    ("pieces", "length", "encoding", "status"),
    [
        ([b"123456789"], None, None, 413),
        ([b"12345", b"6789"], "5", None, 413),
        ([], "9", None, 413),
        ([], "٣", None, 413),
        ([], "9" * 50, None, 413),
        ([b"1"], "1", "br", 415),
        ([], "0", None, 400),
    ],
)
def test_a_body_that_is_not_taken(pieces, length, encoding, status):
    held = Held(100)
    with pytest.raises(Refused) as refused:
        _read(Limits(body_bytes=8), held, pieces, length, encoding)
    assert refused.value.status == status
    assert held.bytes == 0


def test_a_size_is_read_without_decoding(picture):
    started = time.perf_counter()
    with pytest.raises(Refused, match="too large: 32000 x 32000 pixels, more than 50000000"):
        check_image(huge_png(32000)[:4000], 50_000_000)
    assert check_image(picture(), 2000) == (40, 44)
    assert check_image(dicom(), 2000) == (40, 44)
    with pytest.raises(Refused, match="too large: 44 x 40 pixels, more than 1759"):
        check_image(dicom(), 1759)
    assert check_image(dicom()[:200], 1) == (0, 0)
    assert time.perf_counter() - started < 30


def test_limits_fit_each_other():
    limits = Limits(queue_images=4, body_bytes=1 << 30).fitting()
    assert limits.images == 4 and limits.held_bytes == 2 << 30


@given(st.floats(-10, 1e6))
def test_retry_after_is_a_minute_at_the_most(seconds):
    # Whoever comes back in time finds the connection still open.
    assert 1 <= int(busy(seconds).headers["Retry-After"]) <= 60 < Limits().idle_s


def test_media_types_are_read_without_parameters():
    assert content_type_of(" IMAGE/JPEG ;q=1") == "image/jpeg"
    assert content_type_of(None) == ""


@pytest.mark.parametrize("host", ["", ":80", "localhost:", "localhost:80:80", "a b", "[::1", "::1", "localhost/x", "é"])
def test_what_is_no_host_is_not_admitted(host):
    assert not Hosts.of(False, ["a"]).admit(host)


def test_a_named_host_is_admitted_whatever_its_case():
    assert Hosts.of(True, ["Zoo.Example."]).admit("zoo.example:9")
    assert not Hosts.of(True).admit("10.0.0.1")
    assert Hosts.of(False).admit("10.0.0.1:9") and Hosts.of(False).admit("[fe80::1]")


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("zoo.example:8443", "zoo.example"),
        (" Zoo.Example ", "zoo.example:8443"),
        ("192.0.2.7:80", "192.0.2.7"),
        ("2001:DB8::7", "[2001:db8::7]:80"),
        ("[2001:db8:0::7]:80", "[2001:db8::7]"),
    ],
)
def test_a_named_host_counts_whatever_its_port(given, host):
    assert Hosts.of(True, [given]).admit(host)
    assert not Hosts.of(True, [given]).admit("other.example")


@pytest.mark.parametrize(
    "given", ["*", "*.example", "", ".", ":80", "https://zoo.example", "zoo.example/", "a b", "a,b"]
)
def test_a_named_host_that_no_request_could_have_is_refused(given):
    with pytest.raises(ZooError, match=r"^--allowed-host must be one name or address, as zoo.example") as said:
        Hosts.of(True, [given])
    assert "\n" not in str(said.value)


def test_the_more_are_sent_away_the_later_they_are_told_to_come():
    few, many = _Pace(), _Pace()
    few_s = [few.come_again_s(64) for _ in range(3)]
    many_s = [many.come_again_s(64) for _ in range(500)]
    assert max(few_s) < np.median(many_s)
    assert len({round(each, 3) for each in many_s}) > 400  # and not all at the same time
    assert max(many_s) < 1.5 * (32 + 500) * many.image_s
