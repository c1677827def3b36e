from __future__ import annotations

import csv
import functools
import io
import logging
from pathlib import Path

import numpy as np
import pytest

from zoo.data.decode import BadImage, decode
from zoo.data.dicom import DicomFault, anonymous_copy, is_dicom, pseudonym, read_subject
from zoo.data.sources import describe_import, import_dataset
from zoo.data.window import Windowing, parse_window
from zoo.errors import ZooError

pydicom = pytest.importorskip("pydicom")
LUNG = Windowing(parse_window("lung"))
NAME, BORN = "Mustermann^Erika", "19640812"


def make_dicom(
    stored: np.ndarray, patient: str = "PAT-0001", slope: float | None = 1, intercept: float = -1024, **tags
) -> bytes:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[patient, str(stored.tobytes())[:50]])
    made = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    made.SOPClassUID, made.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    made.PatientID, made.PatientName, made.PatientBirthDate = patient, NAME, BORN
    made.StudyInstanceUID, made.Modality, made.InstitutionName = (
        generate_uid(entropy_srcs=[patient]),
        "CT",
        "St. Elsewhere",
    )
    made.Rows, made.Columns = stored.shape[:2]
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 16, 15
    made.PixelRepresentation = int(stored.dtype.kind == "i")
    if slope is not None:
        made.RescaleSlope, made.RescaleIntercept = slope, intercept
    made.WindowCenter, made.WindowWidth = 9999, 1  # to be ignored
    for key, value in tags.items():
        setattr(made, key, value)
    if "PixelData" not in tags:
        made.PixelData = stored.tobytes()
    stream = io.BytesIO()
    made.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


HOUNSFIELD = np.array([[-1350, -600, 40], [150, -1024, 3000]])


def test_slope_and_intercept_come_first_and_the_headers_window_is_ignored():
    expected = LUNG.grey(HOUNSFIELD)
    unsigned = make_dicom((HOUNSFIELD + 2000).astype(np.uint16), intercept=-2000)
    assert (decode(unsigned, LUNG) == expected).all()
    assert (decode(make_dicom(HOUNSFIELD.astype(np.int16), intercept=0), LUNG) == expected).all()
    halved = make_dicom(((HOUNSFIELD + 2000) * 2).astype(np.uint16), slope=0.5, intercept=-2000)
    assert (decode(halved, LUNG) == expected).all()


def test_a_dicom_that_says_no_slope_takes_the_datasets():
    data = make_dicom((HOUNSFIELD + 2000).astype(np.uint16), slope=None)
    assert (decode(data, Windowing(LUNG.windows, 1.0, -2000.0)) == LUNG.grey(HOUNSFIELD)).all()


def test_monochrome1_is_inverted_and_padding_is_black():
    stored = (HOUNSFIELD + 2000).astype(np.uint16)
    inverted = make_dicom(stored, intercept=-2000, PhotometricInterpretation="MONOCHROME1")
    assert (decode(inverted, LUNG) == 255 - LUNG.grey(HOUNSFIELD)).all()
    stored[0, 0] = 63536  # how some scanners fill the corners
    padded = decode(make_dicom(stored, intercept=-2000, PixelPaddingValue=63536), LUNG)
    assert padded[0, 0].tolist() == [0, 0, 0]
    assert (padded.reshape(-1, 3)[1:] == LUNG.grey(HOUNSFIELD).reshape(-1, 3)[1:]).all()


def test_without_a_window_the_whole_range_of_the_stored_bits_is_shown():
    data = make_dicom(np.array([[0, 4095]], np.uint16), BitsStored=12, HighBit=11)
    assert decode(data)[0, :, 0].tolist() == [0, 255]
    signed = make_dicom(np.array([[-32768, 0, 32767]], np.int16))
    assert decode(signed)[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"NumberOfFrames": 4, "PixelData": bytes(48)}, "4 frames"),
        ({"Rows": 30_000, "Columns": 30_000}, "too large: 30000 x 30000"),
        ({"Rows": 0}, "unreadable DICOM"),
        ({"PixelData": bytes(4)}, "truncated"),
        ({"SamplesPerPixel": 2}, "2 samples"),
        ({"Modality": "RTDOSE"}, "without an image"),
    ],
)
def test_what_is_no_single_image_is_named(tags, reason):
    with pytest.raises(BadImage, match=reason):
        decode(make_dicom(HOUNSFIELD.astype(np.int16), **tags), LUNG)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"Modality": "RTDOSE", "SOPClassUID": "1.2.3"}, "DICOM without an image (RTDOSE)"),
        ({"Modality": "MUSTERMANN", "SOPClassUID": "1.2.3"}, "DICOM without an image"),
        ({"Modality": "CT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}, "DICOM without an image (CT Image Storage)"),
        ({"Modality": "CT", "SOPClassUID": "Mustermann"}, "DICOM without an image"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
def test_of_a_dicom_without_an_image_only_terms_of_dicom_are_said(tags, reason):
    from pydicom import dcmread, dcmwrite

    made = dcmread(io.BytesIO(make_dicom(HOUNSFIELD.astype(np.int16))))
    del made.PixelData
    for key, value in tags.items():
        setattr(made, key, value)
    stream = io.BytesIO()
    dcmwrite(stream, made)
    with pytest.raises(BadImage) as bad:
        decode(stream.getvalue(), LUNG)
    assert str(bad.value) == reason


@functools.cache
def bomb() -> bytes:
    """300 MB of zeros, deflated."""
    import zlib

    return zlib.compress(bytes(300_000_000), 9)[2:]


def meta_element(place: int, kind: bytes, value: bytes) -> bytes:
    """An element of group 0002, as explicit little endian writes it."""
    long = kind in (b"OB", b"UC", b"UN")
    length = bytes(2) + len(value).to_bytes(4, "little") if long else len(value).to_bytes(2, "little")
    return b"\x02\x00" + place.to_bytes(2, "little") + kind + length + value


@pytest.mark.parametrize(
    "before",
    [
        b"",
        meta_element(0x10, b"UI", b"1.2.840.10008.1.2.1\0"),  # named twice: the last one counts
        meta_element(0x02, b"UC", bytes(300)),  # an element of a kind that is rare there
        meta_element(0x03, b"OB", b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0"),
    ],
)
def test_a_deflated_dicom_is_refused_before_it_is_unpacked(before):
    import resource

    named = meta_element(0x10, b"UI", b"1.2.840.10008.1.2.1.99")
    data = bytes(128) + b"DICM" + before + named + bomb()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage, match="deflated"):
        decode(data, LUNG)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KiB


def compressed_dicom(stream: bytes, syntax: str, rows: int = 16, columns: int = 16, *more: bytes) -> bytes:
    from pydicom import dcmread
    from pydicom.encaps import encapsulate

    made = dcmread(io.BytesIO(make_dicom(np.zeros((rows, columns), np.uint16), slope=None)))
    made.file_meta.TransferSyntaxUID = syntax
    made.PixelData = encapsulate([stream, *more])
    made["PixelData"].VR = "OB"
    written = io.BytesIO()
    made.save_as(written, enforce_file_format=True)
    return written.getvalue()


def jpeg(marker: int, rows: int, columns: int, before: bytes = b"") -> bytes:
    size = rows.to_bytes(2, "big") + columns.to_bytes(2, "big")
    return b"\xff\xd8" + before + bytes([0xFF, marker]) + b"\x00\x0b\x10" + size + b"\x01\x01\x11\x00" + bytes(64)


def jpeg_2000(rows: int, columns: int) -> bytes:
    sides = [columns, rows, 0, 0, columns, rows, 0, 0]
    return b"\xff\x4f\xff\x51\x00\x29\x00\x00" + b"".join(each.to_bytes(4, "big") for each in sides) + bytes(64)


COMMENT = b"\xff\xff\xfe\x00\x08\xff\xc0\x00\x10\x00\x10"  # in it what looks like a frame of 16 x 16
JPEG_LS, JPEG_2000, LOSSLESS = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.70"


@pytest.mark.parametrize(
    ("syntax", "streams"),
    [
        (JPEG_LS, [jpeg(0xF7, 20000, 20000)]),
        (JPEG_LS, [jpeg(0xF7, 20000, 16, COMMENT)]),
        (JPEG_LS, [jpeg(0xF7, 16, 16), jpeg(0xF7, 20000, 20000)]),
        (LOSSLESS, [jpeg(0xC3, 65535, 65535)]),
        (JPEG_2000, [jpeg_2000(20000, 20000)]),
        (JPEG_2000, [jpeg_2000(16, 16) + jpeg_2000(20000, 20000)]),
        (JPEG_2000, [jpeg(0xC3, 16, 16) + jpeg_2000(20000, 20000)]),
        (JPEG_LS, [jpeg(0xF7, 16, 16)] * 40),
    ],
)
def test_a_stream_of_another_size_than_the_header_is_refused_before_it_is_decoded(syntax, streams):
    data = compressed_dicom(streams[0], syntax, 16, 16, *streams[1:])
    with pytest.raises(BadImage, match="of another size"):
        decode(data, LUNG)


@pytest.mark.parametrize("stream", [b"\x00" + jpeg(0xF7, 16, 16), b"\xff\xd8\xff\xda" + bytes(40)])
def test_a_stream_that_says_no_size_is_refused(stream):
    with pytest.raises(BadImage, match="does not say its size"):
        decode(compressed_dicom(stream, JPEG_LS), LUNG)


def test_of_a_syntax_that_nobody_decodes_that_is_said():
    with pytest.raises(BadImage, match="cannot decode the DICOM transfer syntax MPEG2"):
        decode(compressed_dicom(b"\x00\x00\x01\xb3" + bytes(40), "1.2.840.10008.1.2.4.100"), LUNG)


@pytest.mark.parametrize(
    ("syntax", "stream"),
    [(JPEG_LS, jpeg(0xF7, 20, 16, COMMENT)), (LOSSLESS, jpeg(0xC3, 20, 16)), (JPEG_2000, jpeg_2000(20, 16))],
)
def test_a_stream_of_the_headers_size_comes_to_its_decoder(syntax, stream):
    with pytest.raises(BadImage, match="cannot decode the DICOM transfer syntax"):  # which finds no pixels in it
        decode(compressed_dicom(stream, syntax, 20, 16), LUNG)


def test_damage_of_any_kind_is_a_bad_image_and_says_nothing_of_the_patient(caplog):
    data = make_dicom(HOUNSFIELD.astype(np.int16))
    draw = np.random.default_rng(0)
    with caplog.at_level(logging.DEBUG):
        for _ in range(300):
            broken = bytearray(data[: int(draw.integers(1, len(data)))])
            for place in draw.integers(0, len(broken), 6):
                broken[place] = int(draw.integers(0, 256))
            try:
                decode(bytes(broken), LUNG)
            except BadImage as error:
                assert "Mustermann" not in str(error)
                assert "PAT-0001" not in str(error)
    assert "Mustermann" not in caplog.text


def test_a_copy_has_the_same_pixels_and_nothing_of_the_patient():
    data = make_dicom(HOUNSFIELD.astype(np.int16), ImageComments="seen by Dr. Who", AccessionNumber="A77")
    copy = anonymous_copy(data, "patient-0123", "00ff")
    assert (decode(copy, LUNG) == decode(data, LUNG)).all()
    assert (decode(copy) == decode(data)).all()
    for text in (NAME, "Mustermann", BORN, "PAT-0001", "Elsewhere", "Dr. Who", "A77"):
        assert text.encode() not in copy
    assert read_subject(copy).key == "patient-0123"
    assert anonymous_copy(data, "patient-0123", "00ff") == copy


def test_a_subject_is_the_patient_else_the_study():
    assert read_subject(make_dicom(HOUNSFIELD.astype(np.int16), " P 1 ")).key == "P 1"
    nameless = read_subject(make_dicom(HOUNSFIELD.astype(np.int16), ""))
    assert nameless.key.startswith("1.2.")
    with pytest.raises(DicomFault):
        read_subject(b"")


def test_a_pseudonym_needs_its_salt():
    assert pseudonym("p", b"a") == pseudonym("p", b"a")
    assert len({pseudonym("p", salt) for salt in (b"a", b"b", b"c")}) == 3


def write_patients(folder: Path, patients: int = 12, slices: int = 2, labels: bool = True) -> Path:
    """Write patients' folders, named by them, and a CSV with a label for each patient."""
    draw = np.random.default_rng(1)
    for number in range(patients):
        for place in range(slices):
            path = folder / f"PAT-{number:04}" / f"{place}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            stored = draw.integers(-1000, 400, (24, 20)).astype(np.int16)
            path.write_bytes(make_dicom(stored, f"PAT-{number:04}", intercept=0))
    with (folder.parent / "labels.csv").open("w", newline="") as stream:
        rows = [(f"PAT-{number:04}", "nodule" if number % 2 else "clear") for number in range(patients)]
        csv.writer(stream).writerows([("PatientID", "label"), *rows])
    return folder


@pytest.fixture
def source(tmp_path) -> Path:
    return write_patients(tmp_path / "dicom")


def test_a_folder_with_labels_is_imported_by_patient_and_nothing_of_him_is_written(root, source, caplog):
    (source / "notes.txt").write_text("x")
    report = make_dicom(HOUNSFIELD.astype(np.int16), "PAT-0001", Modality="SR", PixelData=None)
    (source / "PAT-0001" / "report.dcm").write_bytes(report)
    dataset = import_dataset(source, "ct", root, labels=source.parent / "labels.csv")
    assert len(dataset.frame) == 24
    assert dataset.frame["group"].nunique() == 12
    assert dataset.facts["window"] == "lung"
    assert dataset.facts["split"]["group_patient"] is True
    assert any("without an image" in what for what in dataset.facts["left_out"])
    assert "window lung" in "; ".join(describe_import(dataset))
    written = [path for path in root.root.rglob("*") if path.is_file()]
    assert len(written) > 24
    for path in written:
        assert "PAT-" not in str(path.relative_to(root.root))
        for text in (b"PAT-0", b"Mustermann", BORN.encode(), b"Elsewhere"):
            assert text not in path.read_bytes(), path
    assert "PAT-" not in caplog.text
    assert (dataset.folder / ".salt").stat().st_mode & 0o077 == 0


def test_the_same_import_gives_the_same_bytes_and_another_salt_other_names(root, source):
    first = import_dataset(source, "ct", root, labels=source.parent / "labels.csv")
    before = (first.folder / "manifest.csv").read_bytes()
    again = import_dataset(source, "ct", root, labels=source.parent / "labels.csv")
    assert (again.folder / "manifest.csv").read_bytes() == before
    other = import_dataset(source, "ct2", root, labels=source.parent / "labels.csv")
    assert set(other.frame["group"]).isdisjoint(first.frame["group"])


def test_tensors_of_import_training_and_prediction_are_bit_identical(root, source):
    from zoo.data.cache import open_pixels
    from zoo.data.transforms import center_crop, normalise
    from zoo.deployment.predictor import Predictor
    from zoo.deployment.run_network import RunNetwork
    from zoo.models.nets import SimpleCNN
    from zoo.runs import Preprocessing
    from zoo.training.precision import PrecisionPlan

    dataset = import_dataset(source, "ct", root, labels=source.parent / "labels.csv", window="lung,mediastinum,bone")
    preprocessing = Preprocessing(
        image_size=16,
        crop_pct=0.8,
        interpolation="bilinear",
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.2),
        window=dataset.facts["window"],
    )
    pixels = open_pixels(dataset, "train", preprocessing)
    plan = PrecisionPlan("float32", channels_last=True)
    predictor = Predictor(RunNetwork(SimpleCNN(2), preprocessing, plan), preprocessing, dataset.classes)
    originals = {}
    for path in sorted(source.rglob("*.dcm")):
        seen = predictor.pixels(path.read_bytes())
        originals[normalise(seen[None], preprocessing).tobytes()] = path
    for place in range(len(pixels)):
        trained = normalise(center_crop(pixels[place], 16)[None], preprocessing)
        assert trained.tobytes() in originals
    assert len(originals) == 24


def test_a_dicom_folder_per_class_groups_by_patient_too(root, tmp_path):
    for label, offset in (("benign", 0), ("malignant", 50)):
        folder = write_patients(tmp_path / "source" / label, 6)
        for path in sorted(folder.iterdir()):
            path.rename(folder / f"{offset}-{path.name}")
    (tmp_path / "source" / "labels.csv").unlink()
    # Patients of one name under both classes are one group, so that no split tears them.
    dataset = import_dataset(tmp_path / "source", "ct", root, window="mediastinum")
    assert dataset.frame["group"].nunique() == 6
    assert dataset.facts["window"] == "mediastinum"


def test_dicoms_stay_where_they_are_if_asked(root, source):
    dataset = import_dataset(source, "ct", root, labels=source.parent / "labels.csv", copy=False)
    assert dataset.root == source
    assert not (dataset.folder / "images").exists()
    assert dataset.frame["group"].str.startswith("patient-").all()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("patient,diagnosis\nPAT-0001,x\n", "has no column 'label'"),
        ("name,label\nPAT-0001,x\n", "must have a column 'path' or one of patient"),
        ("patient,label\nPAT-0001,a\nPAT-0001,b\n", "another label further up"),
        ("patient,label\nPAT-9999,a\nPAT-9998,b\n", "labels no image"),
        ("patient,label\n,a\n", "is empty"),
    ],
)
def test_wrong_labels_are_refused(root, source, rows, said):
    (source.parent / "labels.csv").write_text(rows)
    with pytest.raises(ZooError, match=said):
        import_dataset(source, "ct", root, labels=source.parent / "labels.csv")
    assert not (root.data / "ct").exists()


def test_labels_may_name_files_or_folders(root, source):
    lines = ["path,label", *(f"PAT-{number:04},{'ab'[number % 2]}" for number in range(11)), "PAT-0011/0.dcm,a"]
    (source.parent / "labels.csv").write_text("\n".join(lines))
    dataset = import_dataset(source, "ct", root, labels=source.parent / "labels.csv")
    assert len(dataset.frame) == 23
    assert dataset.facts["left_out"]["images without a label"] == 1


@pytest.mark.parametrize("data", [b"", b"DICM", bytes(128), bytes(127) + b"DICM"])
def test_what_is_no_dicom(data):
    assert not is_dicom(data)


def test_every_real_dicom_is_decoded_or_named(assets):
    decoded, named = 0, {}
    for path in sorted((assets / "dicom").rglob("*.dcm")):
        data = path.read_bytes()
        try:
            pixels = decode(data, LUNG)
        except BadImage as error:
            named[path.name] = (str(error), error.no_image)
            continue
        decoded += 1
        copy = anonymous_copy(data, "patient-1", "01")
        assert (decode(copy, LUNG) == pixels).all()
        key = read_subject(data).key
        assert len(key) < 5 or key.encode() not in copy
    assert decoded >= 50
    assert named["rtstruct.dcm"] == ("DICOM without an image (RT Structure Set Storage)", True)
    assert named["image_dfl.dcm"][0].startswith("deflated")
    assert named["MR_truncated.dcm"] == ("truncated", False)
    assert "JPEG Extended" in named["JPGExtended.dcm"][0]
    assert sum(no_image for _, no_image in named.values()) >= 15


def test_real_chest_slices_look_like_lungs(assets):
    for path in sorted((assets / "dicom").glob("Lung*/*.dcm")):
        seen = decode(path.read_bytes(), LUNG)
        assert seen.shape == (512, 512, 3)
        assert 90 < seen.mean() < 150
        assert (seen == 55).mean() > 0.03  # air, -1024 HU
        assert (seen == 255).mean() > 0.02


def test_nothing_in_nested_items_survives_a_copy():
    from pydicom.dataset import Dataset

    item = Dataset()
    item.LUTDescriptor, item.LUTExplanation = [4, 0, 16], f"for {NAME}"
    item.add_new("LUTData", "US", [0, 5, 9, 12])
    item.PatientName = NAME
    data = make_dicom(np.array([[0, 1], [2, 3]], np.uint16), slope=None, PixelDataProviderURL="http://st-elsewhere/A77")
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.ModalityLUTSequence = [item]
    dataset.VOILUTSequence = [item]
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    window = Windowing(parse_window("6/12"))
    copy = anonymous_copy(stream.getvalue(), "patient-0123", "00ff")
    assert (decode(copy, window) == decode(stream.getvalue(), window)).all()
    for text in (b"Mustermann", b"elsewhere", b"A77"):
        assert text not in copy


def test_names_beside_dicoms_are_hidden_too_and_csv_groups(root, tmp_path):
    from PIL import Image

    source = write_patients(tmp_path / "dicom", 8)
    lines = ["path,label,group"]
    for number, path in enumerate(sorted(source.rglob("*.dcm"))):
        lines.append(f"dicom/{path.relative_to(source)},{'ab'[number // 2 % 2]},WARD-{number // 2}")
    for number in range(6):
        (source / f"DOE_JANE_{number}").mkdir()
        draw = np.random.default_rng(number)
        Image.fromarray(draw.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(
            source / f"DOE_JANE_{number}" / "p.png"
        )
        lines.append(f"dicom/DOE_JANE_{number}/p.png,{'ab'[number % 2]},WARD-{90 + number}")
    (source / "DOE_JANE_0" / "broken.dcm").write_bytes(bytes(128) + b"DICM" + b"x")
    lines.append("dicom/DOE_JANE_0/broken.dcm,a,WARD-90")
    (tmp_path / "all.csv").write_text("\n".join(lines))
    dataset = import_dataset(tmp_path / "all.csv", "ct", root, bad_images="skip")
    assert len(dataset.frame) == 22
    for path in (path for path in root.root.rglob("*") if path.is_file()):
        for text in (b"PAT-0", b"DOE_JANE", b"WARD"):
            assert text not in path.read_bytes(), path
            assert text.decode() not in str(path.relative_to(root.root))
    assert dataset.frame["group"].nunique() == 14


def test_patients_are_grouped_again_by_the_same_pseudonyms(root, source):
    from zoo.data.resplit import resplit_dataset

    dataset = import_dataset(source, "ct", root, labels=source.parent / "labels.csv", copy=False)
    again = resplit_dataset("ct", root, group_patient=True)
    assert again.frame["group"].tolist() == dataset.frame["group"].tolist()
    assert resplit_dataset("ct", root, group_patient=True).split_digest == again.split_digest
    copied = import_dataset(source, "copied", root, labels=source.parent / "labels.csv")
    assert resplit_dataset("copied", root, group_patient=True).frame["group"].tolist() == copied.frame["group"].tolist()
    for wrong in ({"group_regex": "(.)"}, {"group_blocks": 2}):
        with pytest.raises(ZooError, match="named by pseudonyms"):
            resplit_dataset("copied", root, **wrong)


def test_a_grouping_at_the_import_sees_the_real_names(root, tmp_path):
    source = write_patients(tmp_path / "dicom", 40, 1)
    dataset = import_dataset(source, "ct", root, labels=tmp_path / "labels.csv", group_regex=r"PAT-00(\d)")
    assert dataset.frame["group"].nunique() == 4
    assert dataset.frame["group"].str.fullmatch(r"(group|patient)-[0-9a-f]{16}").all()


def test_a_salt_that_is_damaged_is_refused(root, source):
    import_dataset(source, "ct", root, labels=source.parent / "labels.csv")
    for damage in ("", "00ff", "no hex"):
        (root.data / "ct" / ".salt").write_text(damage)
        with pytest.raises(ZooError, match="the salt"):
            import_dataset(source, "ct", root, labels=source.parent / "labels.csv")


def test_dicoms_without_ending_or_with_uids_as_names_are_taken(root, tmp_path):
    source = write_patients(tmp_path / "s", 12, 1)
    for number, path in enumerate(sorted(source.rglob("*.dcm"))):
        target = tmp_path / "c" / "ab"[number % 2] / (f"1.2.840.{number}" if number % 3 else f"IM{number}")
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    dataset = import_dataset(tmp_path / "c", "ct", root)
    assert len(dataset.frame) == 12
    assert dataset.facts["window"] == "lung"


def test_floating_point_pixels_need_a_window():
    values = np.array([[-1350.0, 150.0]], np.float32)
    data = make_dicom(HOUNSFIELD.astype(np.int16))
    dataset = pydicom.dcmread(io.BytesIO(data))
    del dataset.PixelData, dataset.RescaleSlope, dataset.RescaleIntercept, dataset.PixelRepresentation, dataset.HighBit
    del dataset.BitsStored
    dataset.Rows, dataset.Columns, dataset.BitsAllocated = 1, 2, 32
    dataset.FloatPixelData = values.tobytes()
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    with pytest.raises(BadImage, match="floating-point pixels; name a window"):
        decode(stream.getvalue())
    assert decode(stream.getvalue(), LUNG)[0, :, 0].tolist() == [0, 255]
