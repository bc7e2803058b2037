"""Other people's checkpoint files: whether one is what it seems to be, and what it holds."""

import contextlib
import hashlib
import json
import os
import warnings

from safetensors import safe_open

from job.checkpoints import folder
from job.errors import RunError

# Beginnings of the md5 sums of MoCo's released files.
RELEASED = {
    "moco_v1_200ep_pretrain.pth.tar": "b251726a",
    "moco_v2_200ep_pretrain.pth.tar": "59fd9945",
    "moco_v2_800ep_pretrain.pth.tar": "a04e12f8",
}
TORCH = (b"PK\x03\x04", b"\x80")  # how torch's files begin: archives, and before torch 1.6 pickles

LFS = b"version https://git-lfs"


def read_content(path: str) -> dict:
    """Return what a file holds, of torch's format or safetensors'. RunError: it is not whole, or not what its name promises."""
    start = read_start(path)
    check_released(path)
    if start.startswith(TORCH) and not is_safetensors(start):
        with warnings.catch_warnings(
            action="ignore"
        ):  # of torch's, about how somebody else saved it
            return folder.load(path, foreign=True)
    if not is_safetensors(start):
        advice = (
            "it is a pointer of Git LFS: git lfs pull"
            if start.startswith(LFS)
            else "download or copy it again"
        )
        raise RunError(f"{path} is no checkpoint, it begins with {start[:24]!r}: {advice}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            return {"state_dict": tensors, **described(file.metadata() or {})}
    except Exception as error:
        raise RunError(
            f"{path} is not a whole safetensors file ({error}): use another one"
        ) from None


def described(metadata: dict[str, str]) -> dict:
    """Return a safetensors file's network and its images' size, mean and deviation, if it has them."""
    found: dict = {}
    for name in ("image_size", "mean", "std"):
        with contextlib.suppress(KeyError, ValueError):
            found[name] = json.loads(metadata[name])
    return {"arch": metadata.get("arch")} | ({"input": found} if found else {})


def read_start(path: str) -> bytes:
    """Return a file's first bytes. RunError: it has none, cannot be read, or is no file."""
    folder.check_is_file(path)
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as error:
        raise RunError(
            f"{path}: {error.strerror}; expected a checkpoint that can be read"
        ) from None
    if not start:
        raise RunError(f"{path} is empty: download or copy it again")
    return start


def is_safetensors(start: bytes) -> bool:
    """Whether a file begins as safetensors' do: the length of a header in 8 bytes, at most 100 MB, and its brace."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= 100_000_000


def check_released(path: str) -> None:
    """RunError: a file that has the name of a released one, but another md5."""
    expected = RELEASED.get(os.path.basename(path))
    if not expected:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if not found.startswith(expected):
        raise RunError(
            f"{path} has md5 {found[:8]}..., the released file {expected}...: download it again, or rename it if it is another"
        )
