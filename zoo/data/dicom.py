"""DICOM: bytes to pixels, the patient behind them as a pseudonym, and copies without the patient's data.

Reading needs the extra `dicom` (pydicom, pylibjpeg-openjpeg, python-gdcm). pydicom writes values of the header
into its log messages, warnings and errors; nothing of these leaves this module.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.apart import ChildFault, answer_with, ask, is_child
from zoo.data.window import Windowing

# Group 0002 or 0008 at the start, explicit or implicit, little or big endian: files without preamble.
_BARE = re.compile(
    rb"(\x02\x00|\x08\x00)[\x00-\x70]\x00(UI|UL|CS|OB|SH|DA|..\x00\x00)|\x00\x08\x00[\x00-\x70](UI|UL|CS|DA)", re.S
)
_NO_IMAGES = frozenset({"RTDOSE", "RTPLAN", "RTSTRUCT", "RTRECORD", "SEG", "SR", "PR", "KO", "REG", "DOC"})
_PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# All that a copy keeps besides the pixels: numbers and codes that decoding needs, and no free text.
_KEPT = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleIntercept",
    "RescaleSlope",
    *(
        f"{colour}PaletteColorLookupTable{what}"
        for colour in ("Red", "Green", "Blue")
        for what in ("Descriptor", "Data")
    ),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
)
_JPEG_2000 = re.compile(rb"\xff\x4f\xff\x51[\x00-\x01]")  # how a stream begins, bare or in boxes
_FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # of JPEG and JPEG-LS
_BYTES_A_PIXEL = 32  # colours of 16 bits, and copies
_MADE_BY_ZOO = "zoo: allow-list of pixel attributes"


class DicomFault(Exception):
    """Why a DICOM gives no pixels, without any value of its header; `no_image` where it was never to be one."""

    def __init__(self, reason: str, no_image: bool = False) -> None:
        super().__init__(reason)
        self.no_image = no_image


@dataclass(frozen=True)
class Subject:
    """Whose image it is: patient or, where no patient is named, the study; and the modality, e.g. CT.

    pseudonymous: whether the key is one of the zoo's own pseudonyms already.
    """

    key: str
    modality: str
    pseudonymous: bool = False


def maybe_dicom(file: Path) -> bool:
    """Return whether a file begins as a DICOM does; one that cannot be read does not."""
    try:
        if not file.is_file():  # a pipe would be waited for
            return False
        with file.open("rb") as stream:
            return is_dicom(stream.read(132))
    except OSError:
        return False


def is_dicom(data: bytes) -> bool:
    """Return whether bytes look like a DICOM, with or without the 128 bytes of preamble.

    >>> is_dicom(bytes(128) + b"DICM")
    True
    """
    return data[128:132] == b"DICM" or _BARE.match(data[:16]) is not None


def dicom_pixels(data: bytes, windowing: Windowing, max_pixels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a single-frame DICOM as uint8 RGB of shape (height, width, 3).

    Grey: slope and intercept (or the modality table) of the header, else those of `windowing`, then its window;
    without one the whole range of the stored bits. Padding is black, and MONOCHROME1 inverted. The header's own
    window is never used. Raises DicomFault.
    """
    with _quiet():
        dataset = _read(data)
        _check_header(dataset, max_pixels)
        try:
            return _pixels(dataset, _stored(dataset, data, max_pixels), windowing)
        except DicomFault:
            raise
        except ChildFault as fault:
            raise DicomFault(_why_undecodable(dataset, str(fault))) from None
        except Exception as error:  # a dozen kinds, whose words may hold values of the header
            raise DicomFault(_why_undecodable(dataset, type(error).__name__)) from None


def _why_undecodable(dataset: Any, kind: str) -> str:
    """Return in a few words why a DICOM that passed `_check_header` could then not be decoded."""
    with suppress(Exception):  # values that cannot be read are part of the damage
        syntax = dataset.file_meta.TransferSyntaxUID
        if syntax.is_compressed:
            return f"cannot decode the DICOM transfer syntax {syntax.name} ({kind})"
        sides = (dataset.get("Rows"), dataset.get("Columns"), dataset.get("BitsAllocated"))
        samples = dataset.get("SamplesPerPixel") or 1
        if all(isinstance(each, int) for each in (*sides, samples)):
            needed = sides[0] * sides[1] * samples * sides[2] // 8
            if len(dataset.get("PixelData") or b"") < needed:
                return "truncated"
    return f"unreadable DICOM ({kind})"


def dicom_size(data: bytes) -> tuple[int, int]:
    """Return rows and columns as a DICOM's header says, decoding no pixel; 0, 0 where it does not say.

    The whole header counts, also what stands behind the pixels: the decoder believes what comes last.
    """
    with _quiet(), suppress(Exception):
        dataset = _read(data)
        return max(0, int(dataset.get("Rows") or 0)), max(0, int(dataset.get("Columns") or 0))
    return 0, 0


def read_subject(data: bytes) -> Subject:
    """Return whose image a DICOM is; an empty key where it does not say. Raises DicomFault."""
    with _quiet():
        dataset = _read(data, stop_before_pixels=True)
        try:
            keys = (dataset.get("PatientID"), dataset.get("StudyInstanceUID"), dataset.get("SeriesInstanceUID"))
            key = next((str(each).strip() for each in keys if each and str(each).strip()), "")
            ours = str(dataset.get("DeidentificationMethod") or "") == _MADE_BY_ZOO
            named = re.fullmatch(r"patient-[0-9a-f]{16}", key) is not None
            return Subject(key, str(dataset.get("Modality") or ""), ours and named)
        except Exception as error:
            raise DicomFault(f"unreadable DICOM ({type(error).__name__})") from None


def pseudonym(key: str, salt: bytes) -> str:
    """Return 16 hexadecimal digits that stand for a key (HMAC-SHA-256); without the salt nobody can test a guess.

    >>> pseudonym("p1", b"x") == pseudonym("p1", b"x") != pseudonym("p1", b"y")
    True
    """
    return hmac.new(salt, key.encode(), hashlib.sha256).hexdigest()[:16]


def anonymous_copy(data: bytes, patient: str, uid: str) -> bytes:
    """Return a DICOM with the same pixels and nothing else but what decoding needs; raises DicomFault.

    Kept are the numbers and codes that decoding needs, the pixels as they are encoded, and modality; `patient`
    stands as PatientID. What is burnt into the pixels stays there. The same input gives the same bytes.
    """
    from pydicom import Dataset
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, SecondaryCaptureImageStorage

    with _quiet():
        old = _read(data)
        try:
            copy = Dataset()
            for keyword in (*_KEPT, *_PIXEL_KEYWORDS):
                if keyword in old:
                    copy.add(old[keyword])
            if "ModalityLUTSequence" in old:
                copy.ModalityLUTSequence = [_table_alone(item) for item in old.ModalityLUTSequence]
            instance = f"2.25.{int(uid, 16)}"
            copy.SOPClassUID, copy.SOPInstanceUID = SecondaryCaptureImageStorage, UID(instance)
            copy.PatientID, copy.PatientIdentityRemoved = patient, "YES"
            copy.DeidentificationMethod = _MADE_BY_ZOO
            if modality := _modality(old):
                copy.Modality = modality
            meta = FileMetaDataset()
            meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = SecondaryCaptureImageStorage, UID(instance)
            meta.TransferSyntaxUID = old.file_meta.TransferSyntaxUID
            written = io.BytesIO()
            implicit, little = old.original_encoding
            made = FileDataset(written, copy, bytes(128), meta, implicit, little)
            made.set_original_encoding(implicit, little)
            made.save_as(written, enforce_file_format=True)
            return written.getvalue()
        except DicomFault:
            raise
        except Exception as error:
            raise DicomFault(f"unreadable DICOM ({type(error).__name__})") from None


def _table_alone(item: Any) -> Any:
    """Return a modality table's item with its numbers alone: explanations are free text."""
    from pydicom import Dataset

    kept = Dataset()
    for keyword in ("LUTDescriptor", "LUTData"):
        if keyword in item:
            kept.add(item[keyword])
    return kept


def _modality(dataset: Any) -> str:
    value = str(dataset.get("Modality") or "")
    return value if re.fullmatch(r"[A-Z]{1,16}", value) else ""


def _read(data: bytes, stop_before_pixels: bool = False) -> Any:
    try:
        import pydicom
        from pydicom.dataset import FileMetaDataset
        from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian
    except ImportError:
        raise DicomFault("DICOM; install zoo[dicom] to read it") from None
    try:
        if _is_deflated(data):
            # Unpacking happens before any check of size: 389 kB of it can cost 808 MB.
            raise DicomFault("deflated DICOM is not read; save it without deflation")
        dataset: Any = pydicom.dcmread(io.BytesIO(data), force=True, stop_before_pixels=stop_before_pixels)
        if len(dataset) == 0:
            raise DicomFault("DICOM without content", no_image=True)
        if getattr(dataset, "file_meta", None) is None:
            dataset.file_meta = FileMetaDataset()
        if "TransferSyntaxUID" not in dataset.file_meta:
            implicit, little = dataset.original_encoding
            plain = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else plain
    except DicomFault:
        raise
    except Exception as error:
        raise DicomFault(f"unreadable DICOM ({type(error).__name__})") from None
    return dataset


def _is_deflated(data: bytes) -> bool:
    """Tell whether pydicom would unpack a DICOM: asked of its own reading of the header, which alone does not."""
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    stream = io.BytesIO(data)
    read_preamble(stream, force=True)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, _kind, _length: tag >> 16 != 2)
    return bool(meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian)


def _check_header(dataset: Any, max_pixels: int) -> None:
    """Raise DicomFault for what is no single image, or would cost too much, before any pixel is decoded."""
    try:
        modality, uid = _modality(dataset), dataset.get("SOPClassUID")
        kind = getattr(uid, "name", "")  # one that is not in DICOM's dictionary is its own name
        if modality in _NO_IMAGES or not any(keyword in dataset for keyword in _PIXEL_KEYWORDS):
            named = kind != str(uid) and re.fullmatch(r"[A-Za-z0-9 ()/-]{3,80}", kind)
            what = kind if named else modality if modality in _NO_IMAGES else ""
            raise DicomFault(f"DICOM without an image{f' ({what})' if what else ''}", no_image=True)
        rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
        frames, samples = int(dataset.get("NumberOfFrames") or 1), int(dataset.get("SamplesPerPixel") or 1)
    except DicomFault:
        raise
    except Exception as error:
        raise DicomFault(f"unreadable DICOM ({type(error).__name__})") from None
    if rows < 1 or columns < 1 or samples not in (1, 3):
        raise DicomFault(f"unreadable DICOM: {columns} x {rows} pixels of {samples} samples")
    if rows * columns > max_pixels:
        raise DicomFault(f"too large: {columns} x {rows} pixels, more than {max_pixels}")
    if frames > 1:
        raise DicomFault(f"DICOM of {frames} frames; save each frame that counts as a file of its own")
    try:
        _check_decoder(dataset)
        _check_codestream(dataset, rows, columns)
    except DicomFault:
        raise
    except Exception as error:  # a transfer syntax that is none
        raise DicomFault(f"unreadable DICOM ({type(error).__name__})") from None


def _check_codestream(dataset: Any, rows: int, columns: int) -> None:
    """Refuse a JPEG, JPEG-LS or JPEG 2000 stream of another size than the header's: decoders believe the stream."""
    from pydicom.encaps import generate_fragments
    from pydicom.uid import RLELossless

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_compressed or syntax == RLELossless:
        return
    parts = list(generate_fragments(dataset.get("PixelData") or b""))  # the first is the table of offsets
    whole = b"".join(parts)
    claimed: set[tuple[int, int] | None] = {
        _size_of_jpeg_2000(whole, each.start()) for each in _JPEG_2000.finditer(whole)
    }
    starts = [number for number, part in enumerate(parts) if part.startswith(b"\xff\xd8")]
    # A table of offsets may name any of them; a file of one frame has one.
    claimed |= {_size_of_jpeg(b"".join(parts[number:])) for number in starts[:16]}
    if not claimed - {None}:
        raise DicomFault("unreadable DICOM: its compressed image does not say its size")
    if claimed != {(columns, rows)} or len(starts) > 16:
        raise DicomFault("unreadable DICOM: its compressed image is of another size than its header says")


def _size_of_jpeg_2000(stream: bytes, place: int) -> tuple[int, int]:
    """Return columns and rows by the header of a JPEG 2000 stream (ISO/IEC 15444-1 A.5.1)."""
    wide, high, left, top = (int.from_bytes(stream[place + at : place + at + 4], "big") for at in (8, 12, 16, 20))
    return wide - left, high - top


def _size_of_jpeg(stream: bytes) -> tuple[int, int] | None:
    """Return columns and rows by the frame header of a JPEG (ISO/IEC 10918-1 B.2.2) or JPEG-LS (14495-1 C.2.2)."""
    place = 2
    while len(stream) >= place + 9 and stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker in _FRAME_MARKERS:
            high, wide = (int.from_bytes(stream[at : at + 2], "big") for at in (place + 5, place + 7))
            return wide, high
        if marker == 0xDA:  # the pixels begin
            break
        length = int.from_bytes(stream[place + 2 : place + 4], "big")
        place += 1 if marker == 0xFF else 2 if marker in (0x01, 0xD8) else 2 + length
    return None


def _check_decoder(dataset: Any) -> None:
    from pydicom.pixels import get_decoder

    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_compressed:
        return
    name = syntax.name if syntax.is_transfer_syntax and not syntax.is_private else "an unknown one"
    try:
        ready = get_decoder(syntax).is_available
    except NotImplementedError:
        raise DicomFault(f"cannot decode the DICOM transfer syntax {name}") from None
    if not ready:
        raise DicomFault(f"cannot decode the DICOM transfer syntax {name}; install zoo[dicom]")


def _stored(dataset: Any, data: bytes, max_pixels: int) -> np.ndarray[Any, Any]:
    """Return the pixels as they are stored; compressed ones from a child, for GDCM ends the process on damaged ones."""
    from pydicom.pixels import pixel_array

    if dataset.file_meta.TransferSyntaxUID.is_compressed and not is_child():
        return ask(__name__, data, max_pixels * _BYTES_A_PIXEL)
    found: np.ndarray[Any, Any] = pixel_array(dataset)
    return found


def work(most_bytes: int) -> None:
    """In a child: decode the DICOMs that `ask` sends."""
    import pydicom.pixels

    def decoded(data: bytes) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = pydicom.pixels.pixel_array(_read(data))
        return found

    with _quiet():
        answer_with(decoded, most_bytes)


def _pixels(dataset: Any, stored: np.ndarray[Any, Any], windowing: Windowing) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from pydicom.pixels import apply_color_lut

    bits = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    if stored.ndim == 3 and stored.shape[2] == 3:
        return _to_8_bits(stored, bits)
    if stored.ndim != 2:
        raise DicomFault(f"unreadable DICOM: pixels of {stored.ndim} dimensions")
    photometric = str(dataset.get("PhotometricInterpretation") or "")
    if photometric == "PALETTE COLOR":
        colours = apply_color_lut(stored, dataset)
        return _to_8_bits(colours[:, :, :3], 8 * colours.dtype.itemsize)
    padding = _padding(dataset, stored)
    if stored.dtype.kind == "f" and not windowing.windows:
        raise DicomFault("DICOM with floating-point pixels; name a window")
    if windowing.windows:
        pixels = windowing.grey(_measured(dataset, stored, windowing))
    else:
        low = -(1 << (bits - 1)) if int(dataset.get("PixelRepresentation") or 0) else 0
        shifted = np.clip(stored.astype(np.int64) - low, 0, (1 << bits) - 1)
        pixels = np.repeat(_to_8_bits(shifted, bits)[:, :, None], 3, axis=2)
    if photometric == "MONOCHROME1":
        pixels = 255 - pixels
    if padding is not None:
        pixels[padding] = 0
    return np.ascontiguousarray(pixels)


def _measured(dataset: Any, stored: np.ndarray[Any, Any], windowing: Windowing) -> np.ndarray[Any, Any]:
    from pydicom.pixels import apply_modality_lut

    if "ModalityLUTSequence" in dataset or "RescaleSlope" in dataset:
        return np.asarray(apply_modality_lut(stored, dataset))
    return stored.astype(np.float64) * windowing.slope + windowing.intercept


def _padding(dataset: Any, stored: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
    value = dataset.get("PixelPaddingValue")
    if value is None or value == "":
        return None
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = sorted((int(value), int(value if limit in (None, "") else limit)))
    inside: np.ndarray[Any, np.dtype[np.bool_]] = (stored >= ends[0]) & (stored <= ends[1])
    return inside


def _to_8_bits(values: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return [0, 2^bits - 1] as [0, 255], rounded; 8 bits come back as they are."""
    if bits == 8 and values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    return np.floor(values.astype(np.float64) * (255.0 / ((1 << bits) - 1)) + 0.5).clip(0, 255).astype(np.uint8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep pydicom's words, which hold values of the header, out of logs and off the screen."""
    logger = logging.getLogger("pydicom")
    logger.disabled = True
    filters: Any = warnings.filters
    if not any(each[0] == "ignore" and each[3] is not None and "pydicom" in str(each[3]) for each in filters):
        warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
    yield
