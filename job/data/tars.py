"""Tar shards as the webdataset library has them: written, and searched without being unpacked.

A shard holds <key>.<ending> with an image's bytes, <key>.cls with its label, and <key>.json with its name as "path".
"""

import io
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import BinaryIO

from job.data.images import readable_endings
from job.errors import RunError
from job.run.files import whole_file

MAX_CLASSES = 2**20  # a larger label is no number of a class


@dataclass
class Shard:
    """What lies in a tar file: its name and size in bytes; of each image offset, size in bytes, label, name."""

    name: str
    size: int
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def write_shard(path: str, images: Iterable[tuple[int, str, int, bytes]]) -> None:
    """Write a tar file of images (key, name, label, content); nothing in it tells when or by whom."""
    with whole_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for key, name, label, content in images:
            ending = os.path.splitext(name)[1].lower()
            parts = {ending: content, ".cls": str(label).encode(), ".json": json.dumps({"path": name}).encode()}
            for part, value in parts.items():
                member = tarfile.TarInfo(f"{key:09d}{part}")
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))


def read_shard(path: str) -> Shard:
    """Return what a tar file of webdataset's kind holds. RunError: it is not whole, or an image has no label."""
    shard = Shard(os.path.basename(path), os.path.getsize(path))
    endings = readable_endings()
    with open(path, "rb") as file:
        for members in samples(file, path).values():
            image = next((member for ending, member in members.items() if ending in endings), None)
            if image:
                name, label = described(file, path, image, members)
                shard.offsets.append(image.offset_data)
                shard.sizes.append(image.size)
                shard.labels.append(label)
                shard.names.append(name)
    return shard


def samples(file: BinaryIO, path: str) -> dict[tuple[str, str], dict[str, tarfile.TarInfo]]:
    """Return (folder, key) -> {ending: member} of an open tar file, in its order. RunError: it is not whole."""
    found: dict[tuple[str, str], dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, name = os.path.split(member.name)
                    key, _, ending = name.partition(".")
                    found.setdefault((folder, key), {})[f".{ending.lower()}"] = member
            end = tar.offset
    except tarfile.TarError as error:
        raise RunError(f"{path} is no whole, uncompressed tar file ({error}): copy it anew, or decompress it") from None
    # tarfile takes a damaged or cut header for the end.
    if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
        raise RunError(f"{path} is no whole tar file: it is damaged or cut at byte {end}; copy it anew")
    return found


def described(file: BinaryIO, path: str, image: tarfile.TarInfo, members: dict[str, tarfile.TarInfo]) -> tuple[str, int]:
    """Return the name and label of the image whose `members` lie in the open tar file `path`. RunError: it has no label."""

    def content(ending: str) -> bytes:
        member = members.get(ending)
        return os.pread(file.fileno(), member.size, member.offset_data) if member else b""

    try:
        meta = json.loads(content(".json") or "{}")
        meta = meta if isinstance(meta, dict) else {}
        label = int(content(".cls") or str(meta["label"]))
        if not 0 <= label < MAX_CLASSES:
            raise ValueError
        name = str(meta.get("path") or image.name)
        os.fsencode(name)  # JSON may have what no file's name can
    except (ValueError, KeyError):
        raise RunError(
            f"{path}: {image.name} has no label that can be read: expected the class's number, from 0 on, "
            "in a .cls beside it, or in a .json as label; and as path, if the .json has one, a file's name"
        ) from None
    return name, label
