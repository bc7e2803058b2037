"""Compare options, program and versions of the workers at the start of a run.

A worker that differs would train another network.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy
import PIL
import simplejpeg
import torch
import torchvision

from job.cluster import comm
from job.cluster.objects import allgather_text
from job.declare import flag
from job.errors import RunError
from job.text import first_names

ROOT = Path(__file__).parents[2]
PACKAGES = (torch, torchvision, numpy, PIL, simplejpeg, cv2)  # their versions can change results
PLUGINS = ("pillow-heif", "pillow-jxl-plugin")  # decode further image formats
PROGRAM, KERNELS = "this program's files", "CPU kernels"
LEVELS = ("AVX2", "AVX512")  # of CPU kernels, in ascending order. All others are below
MOST = 8  # ranks in an error
Facts = dict[str, str]  # by name, causes before effects: the first difference is reported


def check(options: Mapping[str, Any], node: str, on_cpu: bool) -> None:
    """Compare program, versions, CPU kernels and options of all workers. A collective.

    options: of the program, by name. node: of this worker. on_cpu: whether its device is a CPU.
    RunError, on all workers: a fact differs between two workers.
    """
    if comm.size() > 1:
        mine = json.dumps([node, facts(options, on_cpu)])
        workers = [json.loads(text) for text in allgather_text(mine, "start")]
        if line := difference([node for node, _ in workers], [facts for _, facts in workers]):
            raise RunError(line)


def check_versions(packages: Sequence[str], node: str) -> None:
    """Compare versions of packages that only some runs use. A collective.

    packages: their names for pip. node: of this worker.
    RunError, on all workers: a version differs between two workers.
    """
    if packages and comm.size() > 1:
        mine = json.dumps([node, {name: version(name) for name in packages}])
        workers = [json.loads(text) for text in allgather_text(mine, "versions")]
        if line := difference([node for node, _ in workers], [facts for _, facts in workers]):
            raise RunError(line)


def facts(options: Mapping[str, Any], on_cpu: bool) -> Facts:
    """Return the facts that must be the same on all workers, by name.

    Of CPU kernels only torch's own matter: each worker computes its optimizer step with them.
    """
    facts = {PROGRAM: program_digest()}
    facts |= {package.__name__: str(package.__version__) for package in PACKAGES}
    facts |= {name: version(name) for name in PLUGINS}
    facts |= {"Horovod": comm.version()}
    facts |= {KERNELS: torch.backends.cpu.get_cpu_capability()} if on_cpu else {}
    return facts | {flag(name): str(value) or "''" for name, value in options.items()}


def version(package: str) -> str:
    """Return the version of a package; `none` if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def program_digest() -> str:
    """Return the SHA-256 (first 16 hex digits) of the program's Python files, with their names."""
    digest = hashlib.sha256()
    for path in sorted(
        path for package in ("job", "mgd", "moco") for path in (ROOT / package).rglob("*.py")
    ):
        digest.update(
            f"{path.relative_to(ROOT)}\n".encode() + hashlib.sha256(path.read_bytes()).digest()
        )
    return digest.hexdigest()[:16]


def difference(nodes: list[str], workers: list[Facts]) -> str:
    """Return an error on the first difference between workers, or "".

    The expected value is that of most workers. A worker without a fact is not compared.

    nodes, workers: node and facts of each worker.
    """
    names = dict.fromkeys(name for facts in workers for name in facts)
    differing = [
        name for name in names if len({facts[name] for facts in workers if name in facts}) > 1
    ]
    if not differing:
        return ""
    name = differing[0]
    values = {rank: facts[name] for rank, facts in enumerate(workers) if name in facts}
    usual = max(values.values(), key=list(values.values()).count)
    other = next(value for value in values.values() if value != usual)
    as_on = next(rank for rank, value in values.items() if value == usual)
    ranks = [rank for rank, value in values.items() if value == other]
    where = f"worker{'s' * (len(ranks) > 1)} {first_names(ranks, MOST)}"
    on_nodes = ", ".join(dict.fromkeys(nodes[rank] for rank in ranks[:MOST]))
    more = f"; other differences: {len(differing) - 1}" if differing[1:] else ""
    return (
        f"{name} {other} on {where} (node {on_nodes}): expected {usual}, "
        f"as on worker {as_on}{more}. {advice(name, values)}"
    )


def advice(name: str, values: dict[int, str]) -> str:
    """Return advice on a difference. values: of the workers, by rank."""
    if name == KERNELS:
        least = min(
            values.values(), key=lambda value: LEVELS.index(value) if value in LEVELS else -1
        )
        level = f"Set ATEN_CPU_CAPABILITY={least.lower()} for all workers"
        return f"{level}, or use nodes with the same CPUs"
    if name.startswith("--"):
        return "Start all workers with the same options"
    return "Install the same version, or use the same image, on all nodes"
