"""Weights from a hub: hub:resnet50 is torchvision's, hub:timm/NAME timm's.

The files are in the caches of torch and Hugging Face, and are read as any other file.
"""

import contextlib
import hashlib
import importlib
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torchvision import models

from job.errors import RunError
from job.networks import ARCHS, check_name, is_own, timm_networks

PREFIX = "hub:"
CHECKSUM = re.compile(r"-([0-9a-f]{8,})\.")  # the first digits of a file's SHA-256, in its name
FILES = ("model.safetensors", "pytorch_model.bin")  # on Hugging Face, the first that exists


class Weights(NamedTuple):
    """Weights from a hub. path: of the file in the cache. sha256: of the file."""

    arch: str
    path: str
    sha256: str


def fetch(name: str, download: bool = True) -> Weights:
    """Return the weights hub:NAME, from the cache or the hub.

    download: whether a file that is not in the cache is downloaded.
    RunError: the hub has no such weights, it cannot be reached, or the file does not match the
    checksum in its name. The error names the file to copy or remove.
    """
    arch = name.removeprefix(PREFIX)
    check_name(arch, PREFIX.removesuffix(":"))
    if is_own(arch):
        raise RunError(f"{name}: no weights of a user's function; expected a ResNet or timm/NAME")
    url, get = source(arch)
    try:
        path = get(download)
    except Exception as error:
        if not download:
            problem = "no file in the cache, and this program downloads none"
            raise RunError(f"{name}: {problem}") from None
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise RunError(
            f"{name}: cannot get the file: {cause:.200}; on another machine, download {url}, copy "
            f"it here, and give its path instead of {name}, with the network {arch}"
        ) from None
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not sha256.startswith(start := checksum(path)):
        problem = f"its SHA-256 begins with {sha256[: len(start)]}; expected {start}"
        raise RunError(f"{name}: {path}: {problem}. Remove the file")
    return Weights(arch, path, sha256)


def checksum(path: str) -> str:
    """Return the first digits of the SHA-256 in a file's name or address, or ""."""
    match = CHECKSUM.search(os.path.basename(path))
    return match[1] if match else ""


def source(arch: str) -> tuple[str, Callable[[bool], str]]:
    """Return the address of a network's weights, and a function that returns the file's path.

    The function's argument is whether it may download the file.
    """
    if arch in ARCHS:
        url = models.get_model_weights(arch)["DEFAULT"].url
        return url, lambda download: from_address(url, download)
    timm = timm_networks.import_timm(arch)
    config = timm.models.get_pretrained_cfg(arch.removeprefix(timm_networks.PREFIX))
    if repository := config.hf_hub_id:
        files = [config.hf_hub_filename] if config.hf_hub_filename else FILES
        url = f"https://huggingface.co/{repository}/resolve/main/{files[0]}"
        return url, lambda download: from_hugging_face(repository, files, download)
    if not config.url:
        raise RunError(f"{PREFIX}{arch}: timm has no weights of this name; expected another")
    return config.url, lambda download: from_address(config.url, download)


def from_address(url: str, download: bool) -> str:
    """Return the path of an address's file in torch's cache. Download a missing file.

    FileNotFoundError: it is missing, and must not be downloaded.
    """
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not os.path.exists(path):
        if not download:
            raise FileNotFoundError(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        start = checksum(url) or None
        torch.hub.download_url_to_file(url, path, hash_prefix=start, progress=False)
    return path


def from_hugging_face(
    repository: str,
    files: list[str] | tuple[str, ...],
    download: bool,
) -> str:
    """Return the path of the first of `files` in Hugging Face's cache. Download a missing file.

    EntryNotFoundError: the repository has none of them, or they must not be downloaded.
    """
    hub = importlib.import_module("huggingface_hub")
    local = {} if download else {"local_files_only": True}
    *others, last = files
    for name in others:
        with contextlib.suppress(hub.errors.EntryNotFoundError):
            return hub.hf_hub_download(repository, name, **local)
    return hub.hf_hub_download(repository, last, **local)
