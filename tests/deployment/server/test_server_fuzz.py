from __future__ import annotations

import os
import random
import warnings
from pathlib import Path

import pytest
from live_server import Live, serve_command
from test_server_http import dicom, huge_png

FILES = 1000


def seeds(picture) -> list[bytes]:
    """Whole and broken images: drawn ones, and those of the assets where they are."""
    drawn = [picture(kind, seed) for seed, kind in enumerate(("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM"))]
    drawn += [picture("PNG", 8, mode=mode) for mode in ("L", "1", "P")] + [picture("JPEG", 9, mode="CMYK")]
    drawn += [picture("TIFF", 10, compression=kind) for kind in ("tiff_lzw", "tiff_deflate", "packbits")]
    drawn += [picture("JPEG", 11, progressive=True), picture("WEBP", 12, lossless=True), huge_png(9000)]
    drawn += [dicom(), dicom(NumberOfFrames=3), dicom(Rows=0), b"", bytes(132) + b"DICM"]
    folder = os.environ.get("ZOO_ASSETS")
    if folder:
        files = [file for name in ("badimages", "dicom") for file in sorted(Path(folder, name).rglob("*"))]
        drawn += [file.read_bytes() for file in files if file.is_file() and file.stat().st_size < 2 << 20]
    return drawn


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The same bytes, or with some flipped, cut, doubled, or replaced by what parsers stumble over."""
    found = bytearray(data)
    for _ in range(draw.choice((0, 1, 1, 2, 4, 16))):
        if not found:
            break
        place = draw.randrange(min(len(found), draw.choice((64, 512, 1 << 30))))
        match draw.randrange(5):
            case 0:
                found[place] ^= 1 << draw.randrange(8)
            case 1:
                found[place : place + 4] = draw.choice(
                    (b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff", b"\0\0\0\x80")
                )
            case 2:
                del found[place : place + draw.randrange(1, 64)]
            case 3:
                found[place:place] = found[place : place + draw.randrange(1, 256)]
            case 4:
                del found[place:]
    return bytes(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_mutated_files_break_nothing_and_are_forgotten(tmp_path, bundle_folder, picture):
    chosen, draw = seeds(picture), random.Random(7)
    files = [mutated(draw.choice(chosen), draw) for _ in range(FILES)]
    server = Live(serve_command(str(bundle_folder)), tmp_path).until_ready()
    kinds = ("application/octet-stream", "application/dicom", "image/png")
    statuses = []

    def send(data: bytes) -> None:
        if draw.random() < 0.3:
            statuses.append(server.predict_form([data, data])[0])
        else:
            statuses.append(server.predict(data, draw.choice(kinds), "?explain=true")[0])

    for data in files[:300]:  # until the allocator has seen the biggest of everything
        send(data)
    before = server.rss_mib()
    for data in files:
        send(data)
    growth = server.rss_mib() - before
    assert server.predict(picture())[0] == 200
    assert server.stop() == 0
    assert set(statuses) <= {200, 400, 413, 415, 422}, sorted(set(statuses))
    assert {200, 415, 422} <= set(statuses)  # or nothing was tried
    assert growth < 50
    assert "broken" not in server.log and "SECRET" not in server.log
    assert len(server.log.splitlines()) < FILES + 300 + 200  # a line a request, and no decoder's words


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_the_server_keeps_to_its_schema(live):
    import hypothesis

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schemathesis = pytest.importorskip("schemathesis")
        schema = schemathesis.openapi.from_dict(live.ask("GET", "/openapi.json")[2])
        schema.config.update(base_url=live.url)
    asked = set()
    for operation in (found.ok() for found in schema.get_all_operations()):

        @hypothesis.settings(
            max_examples=60,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def check(case):
            # Whether bytes are an image no schema can say: what fits to it may still be refused.
            case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])
            asked.add(case.operation.label)

        check()
    assert asked == {f"GET /{each}" for each in ("health", "ready", "metrics", "models", "model")} | {"POST /predict"}
