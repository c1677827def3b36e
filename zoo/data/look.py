"""How an import looks at a file; a DICOM is copied without its patient's data, and the patient becomes a pseudonym."""

from __future__ import annotations

import functools
import os
import secrets
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from zoo.data.dicom import DicomFault, anonymous_copy, maybe_dicom, pseudonym, read_subject
from zoo.data.facts import ImageFacts, look_at, look_at_file
from zoo.data.layouts import IMAGE_SUFFIXES
from zoo.data.window import DEFAULT_CT, Windowing, parse_rescale, parse_window
from zoo.errors import ZooError, one_line
from zoo.files import sha256_bytes, write_error, write_new

_SALT_BYTES = 16


class Look:
    """What an import does with each file: windows it and, for a DICOM, copies it and names its patient anew.

    copy: whether DICOMs are copied below images (None and True) or stay where they are (False). Where they are
    copied, nothing of the source's names is kept: the images beside them are named anew as well (`new_name`).
    """

    def __init__(
        self, root: Path, images: Path, salt_file: Path, window: str | None, rescale: str | None, copy: bool | None
    ) -> None:
        self.root, self.images, self.window, self.copy = root, images, window, copy
        self.windowing = Windowing(parse_window(window) if window else (), *parse_rescale(rescale or "1,0"))
        self.salt_file = salt_file
        self.copied: set[str] = set()
        self.found_patients = self.found_dicom = self.found_deep = False
        self._lock = threading.Lock()

    @functools.cached_property
    def salt(self) -> bytes:
        """Return what makes pseudonyms unguessable, kept beside the manifest for the next import."""
        return read_salt(self.salt_file) or secrets.token_bytes(_SALT_BYTES)

    @property
    def hides_names(self) -> bool:
        """Return whether nothing of the source's names may be written down."""
        return self.found_dicom and self.copy is not False

    def new_name(self, path: str) -> str:
        """Return a name that tells nothing, for an image that lies beside DICOMs."""
        suffix = PurePosixPath(path).suffix.lower()
        return f"no-patient/{pseudonym(path, self.salt)}{suffix if suffix in IMAGE_SUFFIXES else ''}"

    def __call__(self, path: str) -> tuple[str, str, ImageFacts]:
        """Return the image's path in the dataset, its patient's pseudonym or "", and its facts."""
        try:
            path.encode()
        except UnicodeEncodeError:
            return path, "", ImageFacts(reason="its name is no valid UTF-8")
        file = self.root / path
        if self.root.is_relative_to(self.images) or not maybe_dicom(file):
            facts = look_at_file(file, self.windowing)
            self.found_deep |= facts.header is not None and facts.header.mode.startswith(("I", "F"))
            return path, "", facts
        self.found_dicom = True
        try:
            return self._look_at_dicom(path, file.read_bytes())
        except DicomFault as fault:
            return path, "", ImageFacts(reason=str(fault), no_image=fault.no_image)
        except OSError as error:
            return path, "", ImageFacts(reason=one_line(error.strerror or error))

    def _look_at_dicom(self, path: str, data: bytes) -> tuple[str, str, ImageFacts]:
        facts = look_at(data, self.windowing)
        if facts.reason:
            return path, "", facts
        subject = read_subject(data)
        with self._lock:
            salt = self.salt
        patient = patient_group(subject.key, subject.pseudonymous, salt)
        self.found_patients |= bool(patient)
        if self.copy is False:
            return path, patient, facts
        sample = pseudonym(path, salt)
        copy = anonymous_copy(data, patient, sample)
        path = f"{patient or 'no-patient'}/{sample}.dcm"
        write_new(self.images / path, copy)
        with self._lock:
            self.copied.add(path)
        return path, patient, replace(facts, sha256=sha256_bytes(copy), bytes=len(copy))


def patient_group(key: str, pseudonymous: bool, salt: bytes) -> str:
    """Return the group of a patient's images: a pseudonym, or "" where no patient is named.

    >>> patient_group("", False, b"x")
    ''
    """
    return key if pseudonymous or not key else f"patient-{pseudonym(key, salt)}"


def read_salt(file: Path) -> bytes | None:
    """Return the salt of a dataset, None where there is none; raises ZooError for one that is damaged."""
    try:
        text = file.read_text(encoding="ascii").strip()
        salt = bytes.fromhex(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ZooError(
            f"cannot read the salt {str(file)!r}: {one_line(error)}; put the old one back, or remove it"
        ) from error
    if len(salt) < _SALT_BYTES:
        raise ZooError(
            f"the salt {str(file)!r} is shorter than {_SALT_BYTES} bytes; put the old one back, or remove it"
        )
    return salt


def write_salt(file: Path, salt: bytes) -> None:
    """Write a salt for its owner alone to read; it is not to be committed."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as stream:
            stream.write(salt.hex() + "\n")
    except OSError as error:
        raise write_error(file, error) from error


def default_window(root: Path, paths: Iterable[str]) -> str | None:
    """Return the window of lungs where the source's first readable DICOM is a CT."""
    for path in paths:
        if maybe_dicom(root / path):
            try:
                return DEFAULT_CT if read_subject((root / path).read_bytes()).modality == "CT" else None
            except (OSError, DicomFault):
                continue
    return None


def subject_of(file: Path) -> str | None:
    """Return the patient that a DICOM names, "" where none is named, None for what is no DICOM.

    Raises ZooError where DICOM cannot be read here at all.
    """
    if not maybe_dicom(file):
        return None
    try:
        return read_subject(file.read_bytes()).key
    except DicomFault as fault:
        if "install" in str(fault):
            raise ZooError(f"labels by patient need DICOM: {fault}") from None
        return ""
    except OSError:
        return ""
