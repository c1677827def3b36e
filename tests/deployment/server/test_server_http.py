from __future__ import annotations

import http.client
import io
import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from live_server import form
from PIL import Image

from zoo.deployment.bundle import open_bundle
from zoo.deployment.predictor import Predictor
from zoo.deployment.server.served import facts_of

TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "TIFF": "image/tiff", "BMP": "image/bmp"}


def dicom(**more):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, "1.2.3"
    meta.TransferSyntaxUID = more.pop("syntax", ExplicitVRLittleEndian)
    found = FileDataset("x", {}, file_meta=meta, preamble=bytes(128))
    found.SOPClassUID, found.SOPInstanceUID = CTImageStorage, "1.2.3"
    found.PatientName, found.PatientID, found.Modality = "SECRET^NAME", "SECRET-ID", "CT"
    found.Rows, found.Columns, found.SamplesPerPixel = 40, 44, 1
    found.BitsAllocated, found.BitsStored, found.HighBit, found.PixelRepresentation = 16, 12, 11, 0
    found.PhotometricInterpretation, found.RescaleSlope, found.RescaleIntercept = "MONOCHROME2", 1, -1024
    found.PixelData = np.random.default_rng(0).integers(0, 4096, (40, 44)).astype(np.uint16).tobytes()
    for name, value in more.items():
        setattr(found, name, value)
    out = io.BytesIO()
    pydicom.dcmwrite(out, found)
    return out.getvalue()


def huge_png(side: int) -> bytes:
    """A PNG of side x side black pixels, 1 bit each, in a few kB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*TYPES, "DICOM"])
@pytest.mark.parametrize("declared", [True, False])
def test_a_raw_body_is_answered_as_the_predictor_answers(live, bundle_folder, picture, kind, declared):
    data = dicom() if kind == "DICOM" else picture(kind)
    media_type = {**TYPES, "DICOM": "application/dicom"}[kind] if declared else "application/octet-stream"
    status, headers, found = live.predict(data, media_type)
    assert (status, headers["content-type"]) == (200, "application/json")
    predictor = Predictor.load(bundle_folder)
    said = predictor.answers(predictor.logits([predictor.prepare(data)])[0])[0]
    (row,) = found["predictions"]
    assert row["label"] == said.label
    assert row["scores"] == pytest.approx(dict(said.scores), abs=1e-6)
    assert (row["prediction_set"], row["refer"]) == (list(said.prediction_set), said.refer)
    assert (row["index"], row["error"], row["activation_map"]) == (0, None, None)
    assert found["model"] == bundle_folder.name
    assert found["not_a_medical_device"] is False


def test_a_form_with_many_images_is_answered_in_order(live, picture):
    images = [picture(seed=seed) for seed in range(9)]
    status, _, found = live.predict_form(images)
    assert status == 200
    assert [row["index"] for row in found["predictions"]] == list(range(9))
    alone = [live.predict(each)[2]["predictions"][0]["scores"] for each in images]
    for row, scores in zip(found["predictions"], alone, strict=True):
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
    assert live.predict_form(images[:1], field="file")[0] == 200


def test_a_bad_image_among_good_ones_is_a_row_with_a_reason(live, picture):
    status, _, found = live.predict_form([picture(), b"no image at all", picture()[:200]])
    assert status == 200
    good, foreign, cut = found["predictions"]
    assert good["error"] is None and good["label"] is not None
    assert foreign["error"].startswith("no image")
    assert (cut["error"], cut["label"], cut["scores"], cut["refer"]) == ("truncated", None, {}, True)


def test_an_activation_map_comes_where_it_is_asked_for(live, picture):
    row = live.predict(picture(size=(88, 40)), query="?explain=true")[2]["predictions"][0]
    values = np.array(row["activation_map"])
    assert values.ndim == 2 and values.min() >= 0 and values.max() in (0, 1)
    left, top, right, bottom = row["activation_box"]
    assert (top, bottom) == (0, 1) and 0 < left < right < 1
    assert live.predict(picture())[2]["predictions"][0]["activation_map"] is None


REFUSED = {
    "empty": (b"", "image/png", 400),
    "text": (b"hello", "text/plain", 415),
    "no type": (b"hello", "", 415),
    "unknown bytes": (b"hello, I am a text", "image/png", 415),
    "a form without boundary": (b"--x--", "multipart/form-data", 400),
    "a form that is none": (b"hello", "multipart/form-data; boundary=x", 400),
    "a form without files": (form([("other", "a", b"x")])[0], form([])[1], 400),
    "a form cut short": (form([("files", "a", b"x")])[0][:-20], form([])[1], 400),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_holds_no_image_is_refused(live, name):
    body, media_type, wanted = REFUSED[name]
    status, headers, found = live.predict(body, media_type)
    assert status == wanted
    assert set(found) == {"error"} and "\n" not in found["error"]
    assert headers["cache-control"] == "no-store"


def test_formats_that_are_not_taken_or_hold_several_pictures_are_refused(live, picture):
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 255)]
    animated = {}
    for kind in ("PNG", "WEBP", "TIFF"):
        out = io.BytesIO()
        frames[0].save(out, kind, save_all=True, append_images=frames[1:])
        animated[kind] = out.getvalue()
    for data in animated.values():
        status, _, found = live.predict(data)
        assert (status, found["error"]) == (
            422,
            "several pictures in one file; send each that counts as a file of its own",
        )
    assert live.predict(picture("GIF", mode="P"))[0] == 415
    assert live.predict(picture("PPM"))[0] == 415
    assert live.predict(picture()[:300])[0] == 422


def test_dicoms_that_cost_too_much_or_hold_no_single_image_are_refused(live):
    pytest.importorskip("pydicom")
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    status, _, found = live.predict(dicom(syntax=DeflatedExplicitVRLittleEndian), "application/dicom")
    assert (status, found["error"]) == (422, "deflated DICOM is not read; save it without deflation")
    assert live.predict(dicom(NumberOfFrames=2), "application/dicom")[0] == 422
    status, _, found = live.predict(dicom(Rows=60000, Columns=60000), "application/dicom")
    assert status == 413 and "SECRET" not in json.dumps(found)


def test_bodies_are_bounded_before_and_while_they_come(live):
    connection = http.client.HTTPConnection(live.host, live.port, timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Type", "image/png")
    connection.putheader("Content-Length", str(33 << 20))
    connection.endheaders()  # not one byte of the body is sent
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]) == (413, "the body may have 33554432 bytes at the most")
    connection.close()

    def chunks():
        for _ in range(33):
            yield bytes(1 << 20)

    status, _, found = live.ask("POST", "/predict", chunks(), {"Content-Type": "image/png"})
    assert (status, found["error"]) == (413, "the body may have 33554432 bytes at the most")


def test_too_many_images_and_packed_bodies_are_refused(live, picture):
    assert live.predict_form([picture()] * 32)[0] == 200
    status, _, found = live.predict_form([picture()] * 33)
    assert (status, found["error"]) == (413, "a request may hold 32 images at the most")
    status, _, found = live.predict(zlib.compress(picture()), "image/png", Content_Encoding="gzip")
    assert (status, found["error"]) == (415, "compressed bodies are not taken; send the file as it is")


def test_models_are_described_and_asked_by_name(live, bundle_folder, picture):
    name = bundle_folder.name
    assert live.ask("GET", "/models")[2] == {"models": [name]}
    facts = live.ask("GET", f"/model?model={name}")[2]
    assert (facts["name"], facts["classes"]) == (name, ["benign", "malignant", "normal"])
    assert facts == live.ask("GET", "/model")[2]
    assert (facts["val_of"], facts["test_of"]) == ("the artefact itself", "the run that it was made from")
    assert f"Validation: of {facts['val_of']}. Test: of {facts['test_of']}." in facts["card"]
    assert live.predict(picture(), query=f"?model={name}")[0] == 200
    for path in ("/model?model=nobody", "/model?model=" + "x" * 300):
        status, _, found = live.ask("GET", path)
        assert (status, found["error"]) == (404, "no such model; GET /models names them")
    assert live.predict(picture(), query="?model=nobody")[0] == 404


def test_where_there_is_no_test_score_it_is_nobodys(bundle_folder):
    bundle = open_bundle(bundle_folder)
    unscored = replace(bundle, record=bundle.record.model_copy(update={"test": None}))
    assert facts_of("m", bundle)["test_of"] and facts_of("m", unscored)["test_of"] is None


@pytest.mark.slow
def test_several_bundles_are_served_by_name(start, bundle_folder, picture):
    server = start("--name", f"a={bundle_folder}", "--name", f"b={bundle_folder}", str(bundle_folder))
    names = server.ask("GET", "/models")[2]["models"]
    assert names == server.told["models"]
    assert sorted(names) == sorted(["a", "b", bundle_folder.name])
    for name in names:
        assert server.predict(picture(), query=f"?model={name}")[2]["model"] == name
        assert server.ask("GET", f"/model?model={name}")[2]["name"] == name
    assert server.predict(picture())[2]["model"] == names[0]


def test_a_wrong_query_is_refused_without_being_repeated(live, picture):
    status, _, found = live.predict(picture(), query="?explain=SECRET-VALUE")
    assert (status, found["error"]) == (422, "the query is wrong: explain")
    status, headers, _ = live.ask("GET", "/predict")
    assert (status, headers["allow"]) == (405, "POST")


def test_every_answer_carries_the_headers_that_browsers_obey(live, picture):
    for status, headers, _ in (live.ask("GET", "/"), live.ask("GET", "/nowhere"), live.predict(picture())):
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy and "*" not in policy
        assert not [name for name in headers if name.startswith("access-control-")]
        assert "server" not in headers
        assert status in (200, 404)
    assert live.predict(picture())[1]["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.", "[::1]:80", "10.0.0.1", "a@b"]
)
def test_other_host_names_are_not_answered(live, host):
    own = host in ("localhost.", "[::1]:80")
    assert live.ask("GET", "/model", headers={"Host": host})[0] == (200 if own else 421)
    assert live.ask("POST", "/predict", b"x", {"Host": host, "Content-Type": "image/png"})[0] == (415 if own else 421)


def test_requests_without_a_host_or_with_two_are_not_answered(live):
    assert b" 400 " in live.say(b"GET /model HTTP/1.1\r\n\r\n").split(b"\r\n")[0]
    assert b" 400 " in live.say(b"GET /model HTTP/1.0\r\n\r\n").split(b"\r\n")[0]
    two = live.say(b"GET /model HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n").split(b"\r\n")[0]
    assert b" 400 " in two
    absolute = live.say(b"GET http://evil.example/model HTTP/1.1\r\nHost: evil.example\r\n\r\n").split(b"\r\n")[0]
    assert b" 421 " in absolute


@pytest.mark.parametrize(
    ("headers", "wanted"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "OWN", "Sec-Fetch-Site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_a_page_of_somebody_else_cannot_have_images_classified(live, picture, headers, wanted):
    sent = {name: live.url if value == "OWN" else value for name, value in headers.items()}
    status, found, _ = live.predict(picture(), "image/png", **{k.replace("-", "_"): v for k, v in sent.items()})
    assert status == wanted
    assert "access-control-allow-origin" not in found
    status, found, _ = live.ask("OPTIONS", "/predict", headers={**sent, "Access-Control-Request-Method": "POST"})
    assert status == 405 and "access-control-allow-origin" not in found


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e/%2e%2e/gate.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/__init__.py",
        "/static/..\\app.py",
        "/static/%00",
        "/static/",
    ],
)
def test_nothing_but_the_page_is_found_below_static(live, path):
    answer = live.say(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert answer.split(b" ")[1] == b"404", answer
    assert b"root:" not in answer and b"import" not in answer


def test_the_page_is_answered_and_kept_by_its_tag(live):
    status, headers, text = live.ask("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html") and "<html" in text
    from zoo.deployment.server.page import page_files

    for name, file in page_files().items():
        status, headers, _ = live.ask("GET", f"/static/{name}")
        assert (status, headers["etag"]) == (200, file.etag)
        assert live.ask("GET", f"/static/{name}", headers={"If-None-Match": file.etag})[0] == 304


@pytest.mark.parametrize("path", ["/", "/health", "/ready"])
def test_head_is_get_without_its_body(live, path):
    status, headers, text = live.ask("GET", path)
    alone = live.ask("HEAD", path)
    assert status == alone[0] == 200 and text and not alone[2]
    assert alone[1]["content-length"] == headers["content-length"]


def test_metrics_count_and_tell_nothing_of_the_images(live, picture):
    live.predict(picture())
    status, headers, text = live.ask("GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    for name in ("zoo_requests_total", "zoo_request_seconds_bucket", "zoo_queue_images", "zoo_batch_images_bucket"):
        assert f"\n{name}" in text
    assert 'zoo_requests_total{route="/predict",status="200"}' in text
    assert not [label for label in ("benign", "malignant", "normal") if label in text]


def test_the_schema_names_every_route_and_status(live):
    schema = live.ask("GET", "/openapi.json")[2]
    assert set(schema["paths"]) == {"/health", "/ready", "/metrics", "/models", "/model", "/predict"}
    predict = schema["paths"]["/predict"]["post"]
    assert {"200", "400", "403", "404", "408", "413", "415", "422", "503"} <= set(predict["responses"])
    assert "multipart/form-data" in predict["requestBody"]["content"]
    assert live.ask("GET", "/docs")[0] == 404  # it would ask another server for its scripts
