"""How an import looks at a file; a DICOM is copied without its patient's data, and the patient becomes a pseudonym."""

from __future__ import annotations

import functools
import secrets
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from zoo.data.dicom import DicomFault, anonymous_copy, is_dicom, pseudonym, read_subject
from zoo.data.facts import ImageFacts, look_at, look_at_file
from zoo.data.window import DEFAULT_CT, Windowing, parse_rescale, parse_window
from zoo.errors import one_line
from zoo.files import sha256_bytes, write_error, write_text


class Look:
    """What an import does with each file: windows it and, for a DICOM, copies it and names its patient anew.

    copy: whether DICOMs are copied below images (None and True) or stay where they are (False).
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
        """Return what makes pseudonyms unguessable: 16 bytes, kept beside the manifest for the next import."""
        try:
            return bytes.fromhex(self.salt_file.read_text(encoding="ascii").strip())
        except (OSError, ValueError):
            return secrets.token_bytes(16)

    def keep_salt(self) -> None:
        """Write the salt, readable by its owner alone; not to be committed."""
        write_text(self.salt_file, self.salt.hex() + "\n")
        self.salt_file.chmod(0o600)

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
        with self._lock:
            key, salt = read_subject(data).key, self.salt
        patient = f"patient-{pseudonym(key, salt)}" if key else ""
        self.found_dicom = True
        self.found_patients |= bool(patient)
        if self.copy is False:
            return path, patient, facts
        sample = pseudonym(path, salt)
        copy = anonymous_copy(data, patient, sample)
        path = f"{patient or 'no-patient'}/{sample}.dcm"
        target = self.images / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(copy)
        except OSError as error:
            raise write_error(target, error) from error
        with self._lock:
            self.copied.add(path)
        return path, patient, replace(facts, sha256=sha256_bytes(copy), bytes=len(copy))


def maybe_dicom(file: Path) -> bool:
    """Return whether a file begins as a DICOM does; one that cannot be read does not."""
    try:
        if not file.is_file():  # a pipe would be waited for
            return False
        with file.open("rb") as stream:
            return is_dicom(stream.read(132))
    except OSError:
        return False


def default_window(root: Path, paths: Iterable[str]) -> str | None:
    """Return the window of lungs where the source's first DICOM is a CT."""
    for path in paths:
        if Path(path).suffix.lower() in (".dcm", ".dicom", ".ima", ""):
            try:
                return DEFAULT_CT if read_subject((root / path).read_bytes()).modality == "CT" else None
            except (OSError, DicomFault):
                continue
    return None


def subject_of(file: Path) -> str | None:
    """Return the patient that a DICOM names, "" where none is named, None for what is no DICOM."""
    if not maybe_dicom(file):
        return None
    try:
        return read_subject(file.read_bytes()).key
    except (OSError, DicomFault):
        return ""
