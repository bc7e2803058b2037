"""The origin of an exported file, which is stored in the file."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from importlib import metadata
from typing import Any

from job.checkpoints import hub
from job.checkpoints.foreign import Backbone
from job.config import Config, LinearConfig
from job.export.network import Network

CONFIGS = (Config, LinearConfig)
NO_PATHS = {each.name for config in CONFIGS for each in fields(config) if not each.metadata["path"]}


def program() -> str:
    """Return this program's name, and its version if it is installed."""
    name = "moco-mgd"
    with contextlib.suppress(metadata.PackageNotFoundError):
        name += f" {metadata.version('moco-mgd')}"
    return name


def describe_origin(path: str, network: Network, weights: Backbone) -> dict[str, Any]:
    """Return the origin of an exported file and its network, in JSON's types.

    path: the checkpoint.
    """
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    source = os.path.basename(os.path.realpath(path))
    origin: dict[str, Any] = {"source": source, "sha256": sha256}
    origin |= {"arch": network.arch, **network.details}
    origin |= {"epoch": weights.meta["epoch"], "program": program()}
    origin |= {"mean": network.mean, "std": network.std}
    if config := weights.meta["config"]:
        origin["config"] = {name: without_folders(name, value) for name, value in config.items()}
    if network.changes:
        origin["note"] = f"small stem: {network.changes}"
    return json.loads(json.dumps(origin, default=str, skipkeys=True))


def without_folders(name: str, value: Any) -> Any:
    """Return an option's value, of a path only the last component, as others may get the file.

    A name with "/", such as timm/NAME or hub:timm/NAME, is not a path. Options of other versions
    can have paths.
    """
    return value if name in NO_PATHS else base_name(value)


def base_name(value: Any) -> Any:
    """Return the last component of a path, or of each path of a list."""
    if isinstance(value, list):
        return [base_name(item) for item in value]
    if not isinstance(value, str) or value.startswith(hub.PREFIX):
        return value
    return os.path.basename(value.rstrip("/"))


def folders_of(options: Mapping[str, Any]) -> str:
    """Return the names of the folders and lists of images of a run."""
    more = options.get("more_data")
    folders = [options.get("data", ""), *(more if isinstance(more, list) else [])]
    return ", ".join(base_name(str(each)) for each in folders)


def as_text(origin: dict) -> dict[str, str]:
    """Return values that are not text as JSON, because safetensors and ONNX store only text."""
    texts = [value if isinstance(value, str) else json.dumps(value) for value in origin.values()]
    return dict(zip(origin, texts, strict=True))
