"""Read foreign files: their format, whether they are complete, and their content."""

import contextlib
import hashlib
import json
import os
import warnings

from safetensors import safe_open

from job.checkpoints import folder
from job.errors import RunError

# First 8 digits of the md5 sums of MoCo's released files.
RELEASED = {
    "moco_v1_200ep_pretrain.pth.tar": "b251726a",
    "moco_v2_200ep_pretrain.pth.tar": "59fd9945",
    "moco_v2_800ep_pretrain.pth.tar": "a04e12f8",
}
LFS = b"version https://git-lfs"


def read_content(path: str) -> dict:
    """Return the content of a file in torch's format or safetensors'.

    RunError: it is incomplete, in another format, or not the released file that its name promises.
    """
    start = read_start(path)
    check_released(path)
    if start.startswith(folder.TORCH) and not is_safetensors(start):
        with warnings.catch_warnings(action="ignore"):  # torch's, about how the file was saved
            return folder.load(path, foreign=True)
    if not is_safetensors(start):
        advice = (
            "it is a pointer of Git LFS: git lfs pull"
            if start.startswith(LFS)
            else "download or copy it again, or choose another file"
        )
        raise RunError(f"{path} is not a checkpoint, it begins with {start[:24]!r}: {advice}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return {"state_dict": tensors, **described(file.metadata() or {})}
    except Exception as error:
        raise RunError(
            f"{path} is not a complete safetensors file ({error}): use another one"
        ) from None


def described(metadata: dict[str, str]) -> dict:
    """Return the network's name in a safetensors file, and its images' size, mean and deviation.

    metadata: of the file; each value can be missing.
    """
    images: dict = {}
    for name in ("image_size", "mean", "std"):
        with contextlib.suppress(KeyError, ValueError):
            images[name] = json.loads(metadata[name])
    return {"arch": metadata.get("arch")} | ({"input": images} if images else {})


def read_start(path: str) -> bytes:
    """Return a file's first bytes. RunError: it is empty, unreadable, or not a regular file."""
    folder.check_is_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as error:
        raise RunError(
            f"{path}: {error.strerror}; expected a checkpoint. Check its permissions"
        ) from None
    if not start:
        raise RunError(f"{path} is empty: download or copy it again")
    return start


def is_safetensors(start: bytes) -> bool:
    """Return whether a file starts as safetensors files do.

    They start with 8 bytes, the length of the header, at most 100 MB, and the header's brace.
    """
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= 100_000_000


def check_released(path: str) -> None:
    """RunError: the file has the name of a released one, but another md5."""
    expected = RELEASED.get(os.path.basename(path))
    if not expected:
        return
    with open(path, "rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    if not md5.startswith(expected):
        raise RunError(
            f"{path} has md5 {md5[:8]}...; expected {expected}..., as the released file: download "
            "it again, or rename it if it is another file"
        )
