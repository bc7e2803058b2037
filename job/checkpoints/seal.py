"""The checksum of a checkpoint file: SHA-256 of all its bytes, at its own end, as the comment of the zip archive that it is.

torch and all else that reads zip archives pass over a comment; the checksums within the archive leave out its headers and
its directory. By hand: `head -c -71 FILE | sha256sum` gives what `tail -c 64 FILE` says.
"""

import hashlib
import io
import os
import zipfile
from typing import BinaryIO

from job.errors import RunError

WORD = b"sha256:"
SIZE = len(WORD) + 64  # bytes of a seal
START = b"PK\x03\x04"  # of a zip archive, as torch tells its files
# torch ends an archive with this record and no comment: so whatever else ends one is what damage left of a seal.
RECORD, RECORD_SIZE = b"PK\x05\x06", 22


def seal(file: io.BufferedRandom) -> None:
    """Add its checksum to what torch.save has just written to `file`, which is open for reading as well."""
    file.seek(-2, os.SEEK_END)
    file.write(SIZE.to_bytes(2, "little"))  # the comment's length ends the archive's last record
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    file.write(WORD + digest.hexdigest().encode())


def verify(path: str) -> None:
    """RunError: the file is not what was written. One without a seal, as other programs write it, has checksums of its parts."""
    with open(path, "rb") as file:
        start = file.read(len(START))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - SIZE))
        end = file.read()
        sealed = end.startswith(WORD)
        if sealed and end != WORD + digest(file, size - SIZE).encode():
            raise RunError(
                f"{path} is damaged (its checksum is of other bytes): use another checkpoint"
            )
    if sealed or start != START:
        return
    record = end[-RECORD_SIZE:]
    if not (record.startswith(RECORD) and record.endswith(b"\0\0")):
        raise RunError(
            f"{path} is damaged, or cut short (neither a checksum nor an archive's end is there): use another one"
        )
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise RunError(f"{path} is damaged (checksum of {damaged}): use another checkpoint")


def read_seal(path: str) -> str:
    """Return the checksum that ends a file, 64 hexadecimal digits; "" if the file has no seal."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - SIZE))
        end = file.read()
    return end[len(WORD) :].decode(errors="replace") if end.startswith(WORD) else ""


def digest(file: BinaryIO, length: int) -> str:
    """The SHA-256 of a file's first `length` bytes, as hexadecimal digits."""
    sha = hashlib.sha256()
    file.seek(0)
    while block := file.read(min(length, 1 << 20)):
        sha.update(block)
        length -= len(block)
    return sha.hexdigest()
