"""Write tar shards of the webdataset library's format, and read them without unpacking.

A shard holds <key>.<ending> with an image's bytes, <key>.cls with its label, and <key>.json with
its name as "path". Only the image is required. A label may also be the .json's "label". The key
may have dots: the label of a.v1.5.jpg is in a.v1.5.cls, else in a.v1.cls, else in a.cls.
"""

import io
import json
import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple, Self

from job.data.selection import Selection
from job.errors import RunError
from job.files import whole_file

MAX_CLASSES = 2**20  # a larger label is not the number of a class
MAX_LINKS = 40  # from one to the next, as in Linux
LARGEST = 2**43  # bytes: more than any real tar file, and less than ext4 can seek to
# Fields of a tar file's header, and the first byte of its names' prefix (POSIX ustar).
NAME, SIZE, CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)
TYPE, PREFIX = slice(156, 157), slice(345, 346)


@dataclass
class Shard:
    """A tar file and its images.

    size: of the file, in bytes. offsets, sizes, labels, names: of each image, offset and size in
    bytes, the label -1 without one.
    """

    name: str
    size: int
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


InvalidHeader = tarfile.InvalidHeaderError  # type: ignore[attr-defined]  # typeshed lacks it


class Member(tarfile.TarInfo):
    """A member of a tar file. Of regular files, only name and size are read, in a third the time.

    TarInfo reads members of other kinds, and damaged headers.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        """Return the next member of an open tar file. HeaderError: there is none, or it is damaged.

        Some releases of tarfile follow a negative size back, without end.
        """
        start = tar.fileobj.tell()
        member = cls.regular(tar.fileobj.read(tarfile.BLOCKSIZE), tar)
        if member is None:
            tar.fileobj.seek(start)
            try:
                member = super().fromtarfile(tar)
            except (ValueError, OverflowError, MemoryError) as error:  # of an impossible size
                raise InvalidHeader(str(error)) from None
        else:
            member.offset, member.offset_data = start, start + tarfile.BLOCKSIZE
            tar.offset = member.offset_data - -member.size // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        if member.size < 0 or not start < tar.offset < LARGEST:
            tar.offset = start
            raise InvalidHeader(f"invalid size {member.size}")
        return member

    @classmethod
    def regular(cls, header: bytes, tar: tarfile.TarFile) -> Self | None:
        """Return the regular file of a header, or None for another member or a damaged header."""
        if header[TYPE] != tarfile.REGTYPE or header[PREFIX] != b"\0" or tar.pax_headers:
            return None
        try:
            size, checksum = octal(header[SIZE]), octal(header[CHECKSUM])
        except ValueError:  # a number in another format
            return None
        # The checksum's own bytes count as spaces.
        if checksum != sum(header) - sum(header[CHECKSUM]) + sum(b" " * 8):
            return None
        member = cls(header[NAME].partition(b"\0")[0].decode(tar.encoding, tar.errors))
        member.size = size
        return member


def octal(digits: bytes) -> int:
    """Return a number of a tar file's header. ValueError: it has another format."""
    return int(digits.partition(b"\0")[0], 8)


class Sample(NamedTuple):
    """The names of an image in a tar file, its .cls and its .json, each "" without such a file."""

    image: str
    cls: str
    info: str

    @property
    def stem(self) -> str:
        """The sidecars' name without the ending."""
        return stem_of(self.cls or self.info)


def write_shard(path: str, images: Iterable[tuple[int, str, int, bytes]]) -> None:
    """Write a tar file of images (key, name, label, content), without times and user names."""
    with (
        whole_file(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for key, name, label, content in images:
            ending = os.path.splitext(name)[1].lower()
            files = {ending: content, ".json": json.dumps({"path": name}).encode()}
            if label >= 0:
                files = {ending: content, ".cls": str(label).encode()} | files
            for ending, value in files.items():
                member = tarfile.TarInfo(f"{key:09d}{ending}")
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))


def read_shard(path: str, selection: Selection | None = None) -> Shard:
    """Return the images of a tar file, and count them and the files left out in `selection`.

    RunError: the tar file is incomplete.
    """
    selection = selection or Selection()
    shard = Shard(os.path.basename(path), os.path.getsize(path))
    with open(path, "rb") as file:
        members = read_members(file, path, selection)
        for sample in samples(members, selection):
            name, label = described(file, members, sample, selection)
            shard.offsets.append(members[sample.image].offset_data)
            shard.sizes.append(members[sample.image].size)
            shard.labels.append(label)
            shard.names.append(name)
    return shard


def read_members(file: BinaryIO, path: str, selection: Selection) -> dict[str, tarfile.TarInfo]:
    """Return {name: member with its bytes} of an open tar file, in the order of the names.

    RunError: the tar file is incomplete.
    """
    found: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=Member) as tar:
            for member in tar:
                if not member.isdir():
                    name = normalised(member.name)
                    if name in found:
                        selection.left_out.add(
                            "replaced by a later one of the same name", member.name
                        )
                    found[name] = member
            end = tar.offset
    except tarfile.TarError as error:
        raise RunError(
            f"{path}: incomplete or compressed tar file ({error}). Copy it again, or decompress it"
        ) from None
    # To tarfile a damaged or cut header is the end.
    if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
        raise RunError(f"{path}: incomplete or damaged tar file, at byte {end}. Copy it again")
    members = {}
    for name, member in found.items():
        if not all(selection.keeps(each, member.name) for each in name.split("/")):
            continue
        target = followed(member, found)
        if target is None or not target.isreg():
            selection.left_out.add("that lead to no file of the tar", member.name)
        elif target.issparse():  # its bytes are in pieces
            selection.left_out.add("stored sparse", member.name)
        else:
            members[member.name] = target
    return members


def normalised(name: str) -> str:
    """Return posixpath.normpath(name), which is slow for most names."""
    return posixpath.normpath(name) if "/" in name or not name else name


def followed(
    member: tarfile.TarInfo | None, found: dict[str, tarfile.TarInfo]
) -> tarfile.TarInfo | None:
    """Return the member that a link leads to, None for a broken link, other members unchanged."""
    for _ in range(MAX_LINKS):
        if member is None or not (member.islnk() or member.issym()):
            return member
        folder = posixpath.dirname(member.name) if member.issym() else ""
        member = found.get(posixpath.normpath(posixpath.join(folder, member.linkname)))
    return None


def samples(members: dict[str, tarfile.TarInfo], selection: Selection) -> Iterator[Sample]:
    """Yield the images with their sidecars, in the order of their keys.

    The key is webdataset's, the name up to its first dot. An image such as a.seg.png is left out if
    a.jpg exists with the same sidecar, a.cls or a.json, because it belongs to that image.
    """
    order: dict[str, int] = {}
    for name in members:
        order.setdefault(key_of(name), len(order))
    endings = {name: ending_of(name) for name in members}
    images = [name for name, ending in endings.items() if ending in selection.endings]
    images.sort(key=lambda name: order[key_of(name)])
    sidecars = {
        f"{stem_of(name)}{ending}": name
        for name, ending in endings.items()
        if ending in (".cls", ".json")
    }
    found = [
        Sample(name, sidecar(name, ".cls", sidecars), sidecar(name, ".json", sidecars))
        for name in images
    ]
    main: dict[str, str] = {}  # stem of a sidecar -> the image of the same stem
    for sample in found:
        if sample.stem == stem_of(sample.image):
            main.setdefault(sample.stem, sample.image)
    for sample in found:
        if main.get(sample.stem, sample.image) == sample.image:
            selection.taken += 1
            yield sample
        else:
            selection.left_out.add("belonging to the image of the same label", sample.image)
    used = {name for sample in found for name in sample}
    for name in members:
        if name not in used:
            selection.takes(name)


def stem_of(name: str) -> str:
    """Return a name without its ending."""
    return os.path.splitext(name)[0]


def ending_of(name: str) -> str:
    """Return the ending of a name, in lower case."""
    return os.path.splitext(name)[1].lower()


def key_of(name: str) -> str:
    """Return a name up to the first dot behind its folder."""
    file = name.rfind("/") + 1
    return name[:file] + name[file:].partition(".")[0]


def sidecar(name: str, ending: str, sidecars: dict[str, str]) -> str:
    """Return an image's sidecar with this ending, or "" without one.

    For a.v1.5.jpg it is the one of a.v1.5, else of a.v1, else of a.
    """
    stem = stem_of(name)
    while f"{stem}{ending}" not in sidecars and len(stem) > len(key_of(name)):
        stem = stem.rpartition(".")[0]
    return sidecars.get(f"{stem}{ending}", "")


def described(
    file: BinaryIO, members: dict[str, tarfile.TarInfo], sample: Sample, selection: Selection
) -> tuple[str, int]:
    """Return an image's name and label, and count an image without one (-1) in `selection`."""
    image, cls, info = sample

    def content(name: str) -> bytes:
        return (
            os.pread(file.fileno(), members[name].size, members[name].offset_data) if name else b""
        )

    try:
        meta = json.loads(content(info) or "{}")
    except (ValueError, RecursionError):
        meta = None
    meta = meta if isinstance(meta, dict) else {}
    given = content(cls).strip() or meta.get("label")
    label = class_number(given)
    if given is None:
        selection.unlabelled.add("without one", image)
    elif label < 0:
        selection.unlabelled.add("with one that is no class number", f"{image}: {repr(given)[:40]}")
    name = str((info and stem_of(info) == stem_of(image) and meta.get("path")) or image)
    try:
        os.fsencode(name)
    except ValueError:  # JSON can have characters that a file's name cannot
        name = image
    return name, label


def class_number(given: bytes | object) -> int:
    """Return the label in a .cls or a .json, or -1 if it is not the number of a class."""
    try:
        label = int(given if isinstance(given, bytes) else str(given))
    except ValueError:
        return -1
    return label if 0 <= label < MAX_CLASSES else -1
