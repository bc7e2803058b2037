"""The seal of a checkpoint file: the SHA-256 of its bytes, at its end.

The file is a zip archive, and the seal is the archive's comment, which torch and other readers
ignore. The archive's own checksums do not cover its headers and directory. By hand:
`head -c -71 FILE | sha256sum` and `tail -c 64 FILE` print the same.
"""

import hashlib
import io
import os
import zipfile
from typing import BinaryIO

from job.errors import RunError

LABEL = b"sha256:"
SIZE = len(LABEL) + 64  # bytes of a seal
START = b"PK\x03\x04"  # of a zip archive, by which torch recognises its files
# torch ends an archive with this record and no comment. Any other end is that of a damaged file.
RECORD, RECORD_SIZE = b"PK\x05\x06", 22


def seal(file: io.BufferedRandom) -> None:
    """Add the seal to a file that torch.save has written and that is open for reading too."""
    file.seek(-2, os.SEEK_END)
    file.write(SIZE.to_bytes(2, "little"))  # the comment's length ends the archive's last record
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    file.write(LABEL + digest.hexdigest().encode())


def verify(path: str) -> None:
    """Check the checksum of a file. RunError: the file is damaged.

    A file of another program has no seal. Then the archive's own checksums are checked.
    """
    with open(path, "rb") as file:
        start = file.read(len(START))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - SIZE))
        end = file.read()
        sealed = end.startswith(LABEL)
        if sealed and end != LABEL + digest(file, size - SIZE).encode():
            raise RunError(f"{path} is damaged (wrong checksum): use another checkpoint")
    if sealed or start != START:
        return
    record = end[-RECORD_SIZE:]
    if not (record.startswith(RECORD) and record.endswith(b"\0\0")):
        raise RunError(
            f"{path} is damaged, or cut short (it has neither a checksum nor an archive's end): "
            "use another checkpoint"
        )
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise RunError(
                f"{path} is damaged (wrong checksum of {damaged}): use another checkpoint"
            )


def read_seal(path: str) -> str:
    """Return the checksum that ends a file, 64 hexadecimal digits; "" if the file has no seal."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - SIZE))
        end = file.read()
    return end[len(LABEL) :].decode(errors="replace") if end.startswith(LABEL) else ""


def digest(file: BinaryIO, length: int) -> str:
    """Return the SHA-256 of a file's first `length` bytes, 64 hexadecimal digits."""
    sha = hashlib.sha256()
    file.seek(0)
    while block := file.read(min(length, 1 << 20)):
        sha.update(block)
        length -= len(block)
    return sha.hexdigest()
