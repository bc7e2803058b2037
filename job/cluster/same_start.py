"""Compare the workers at the start: a worker with another option or program trains another network."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy
import PIL
import torch
import torchvision

from job.cluster import comm
from job.cluster.objects import allgather_text
from job.declare import flag
from job.errors import RunError
from job.text import first_names

ROOT = Path(__file__).parents[2]
PACKAGES = (torch, torchvision, numpy, PIL, cv2)  # their versions can change what is computed
PLUGINS = ("pillow-heif", "pillow-jxl-plugin")  # without one a worker cannot decode some images
PROGRAM, KERNELS = "this program's files", "CPU kernels"
LEVELS = ("AVX2", "AVX512")  # of CPU kernels, in ascending order; all others are below
MOST = 8  # ranks in a line
Facts = dict[str, str]  # in the order in which a difference is reported: causes before effects


def check(options: Mapping[str, Any], node: str, on_cpu: bool) -> None:
    """Compare program, versions, CPU kernels and options of all workers. A collective.

    options: values by name. node: of this worker. on_cpu: whether this worker computes on a CPU.
    RunError, on all workers: a fact differs between two workers.
    """
    if comm.size() > 1:
        found = [
            json.loads(text)
            for text in allgather_text(json.dumps([node, facts(options, on_cpu)]), "start")
        ]
        if line := difference([node for node, _ in found], [facts for _, facts in found]):
            raise RunError(line)


def check_versions(packages: Sequence[str], node: str) -> None:
    """Compare versions of packages that only some runs use, by their names for pip. A collective.

    node: of this worker. RunError, on all workers: a version differs between two workers.
    """
    if packages and comm.size() > 1:
        mine = json.dumps([node, {name: version(name) for name in packages}])
        found = [json.loads(text) for text in allgather_text(mine, "versions")]
        if line := difference([node for node, _ in found], [facts for _, facts in found]):
            raise RunError(line)


def facts(options: Mapping[str, Any], on_cpu: bool) -> Facts:
    """Return what must be the same on all workers, by name.

    Of CPU kernels only torch's own matter: each worker computes its step of the optimizer with them.
    """
    found = {PROGRAM: program_digest()}
    found |= {package.__name__: str(package.__version__) for package in PACKAGES}
    found |= {name: version(name) for name in PLUGINS}
    found |= {"Horovod": comm.version()}
    found |= {KERNELS: torch.backends.cpu.get_cpu_capability()} if on_cpu else {}
    return found | {flag(name): str(value) or "''" for name, value in options.items()}


def version(package: str) -> str:
    """Return the version of a package; `none` if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def program_digest() -> str:
    """Return the SHA-256 (first 16 hex digits) of the names and contents of this program's Python files."""
    digest = hashlib.sha256()
    for path in sorted(
        path for package in ("job", "mgd", "moco") for path in (ROOT / package).rglob("*.py")
    ):
        digest.update(
            f"{path.relative_to(ROOT)}\n".encode() + hashlib.sha256(path.read_bytes()).digest()
        )
    return digest.hexdigest()[:16]


def difference(nodes: list[str], found: list[Facts]) -> str:
    """Return an error's line on the first difference between workers, with the number of others; or an empty text.

    nodes, found: of each worker. Most workers' value is the expected one. A worker without a fact is not compared.
    """
    names = dict.fromkeys(name for facts in found for name in facts)
    differing = [
        name for name in names if len({facts[name] for facts in found if name in facts}) > 1
    ]
    if not differing:
        return ""
    name = differing[0]
    values = {rank: facts[name] for rank, facts in enumerate(found) if name in facts}
    usual = max(values.values(), key=list(values.values()).count)
    other = next(value for value in values.values() if value != usual)
    as_on = next(rank for rank, value in values.items() if value == usual)
    ranks = [rank for rank, value in values.items() if value == other]
    workers = f"worker{'s' * (len(ranks) > 1)} {first_names(ranks, MOST)}"
    where = ", ".join(dict.fromkeys(nodes[rank] for rank in ranks[:MOST]))
    more = f"; other differences: {len(differing) - 1}" if differing[1:] else ""
    return f"{name} {other} on {workers} (node {where}): expected {usual}, as on worker {as_on}{more}. {advice(name, values)}"


def advice(name: str, values: dict[int, str]) -> str:
    """Return what to do about a difference; values: those found, by rank."""
    if name == KERNELS:
        least = min(
            values.values(), key=lambda value: LEVELS.index(value) if value in LEVELS else -1
        )
        return f"Set ATEN_CPU_CAPABILITY={least.lower()} for all workers, or use nodes of one kind"
    if name.startswith("--"):
        return "Start all workers with the same options"
    return "Install the same version, or use the same image, on all nodes"
