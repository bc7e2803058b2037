"""What the bench says in the end: a table with the bars that the figures are held to, and files of results."""

import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

import psutil
import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "torchvision",
    "horovod",
    "numpy",
    "scipy",
    "pillow",
    "opencv-python-headless",
    "ortools",
)

# figure: the least or the most that it may be, and what it is
BARS = {
    "step_over_passes": ("<=", 1.10, "a step over the bare sum of its networks' passes"),
    "speed_over_baseline": (">=", 1.6, "images/s over the plain baseline's"),
    "memory_over_baseline": ("<=", 0.5, "peak memory of a worker over the baseline's"),
    "share_logging": (
        "<=",
        0.01,
        "journal, log, hints and TensorBoard's scalars of a step, of its time",
    ),
    "input_over_pil": (">=", 3.0, "two views a core over PIL's"),
    "decode_crop_images_per_s": (">=", 450, "decoding and two crops alone, images/s a core"),
    "scan_1281167_cpu_s": ("<=", 3.0, "a scan of ImageNet's 1,281,167 files, s of a processor"),
    "loader_growth": ("<=", 1.1, "memory of a loader process, 1,281,167 files over 100,000"),
    "refresh_over_baseline": (
        ">=",
        2.6,
        "speed of measuring a refresh, 2 workers, over the baseline's",
    ),
    "solve_s": ("<=", 0.6, "solving all four stages, s"),
    "shuffle_bytes_constant": (
        "==",
        True,
        "received key images of a worker stay within its batch, 2 and 4 workers",
    ),
    "shuffle_bytes_over_float": ("<=", 0.26, "of them, bytes over what floats would be"),
    "weak_scaling": (">=", 0.9, "step of one worker over that of two, one core each"),
    "extract_over_bare": (">=", 0.9, "bare decoding and passes over extraction of features"),
    "validate_over_bare": (">=", 0.9, "the same over validation"),
    "gpu_float32_step_over_passes": ("<=", 1.10, "where there are GPUs: a step over its passes"),
    "gpu_bf16_step_over_passes": ("<=", 1.10, "the same in bf16"),
}
HOLDS = {
    "<=": lambda value, bar: value <= bar,
    ">=": lambda value, bar: value >= bar,
    "==": lambda value, bar: value == bar,
}


def circumstances(quick: bool) -> dict:
    """Machine, versions, command, date, and how busy the machine was."""
    return {
        "machine": machine(),
        "versions": ", ".join(
            [f"python {platform.python_version()}", *filter(None, map(version, PACKAGES))]
        ),
        "command": f"python {' '.join(sys.argv)}",
        "date": time.strftime("%Y-%m-%d"),
        "load_before": os.getloadavg()[0],
        "quick": quick,
    }


def machine() -> str:
    """Processor, cores, memory, GPUs."""
    with open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    return ", ".join(
        [model[1] if model else platform.machine(), f"{os.cpu_count()} cores", memory, *gpus]
    )


def version(package: str) -> str | None:
    """A package's name and version, if it is installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def table(figures: dict, whole: bool = True) -> list[str]:
    """Print all figures, those with bars first; return the names of those that miss theirs, or are absent from the `whole`."""
    missed = [name for name in BARS if whole and name not in figures and not name.startswith("gpu")]
    for name, (sign, bar, what) in BARS.items():
        if name in figures:
            met = HOLDS[sign](figures[name], bar)
            print(
                f"{name:34} {shown(figures[name]):>12}  {sign} {shown(bar):6} {'met   ' if met else 'MISSED'}  {what}"
            )
            missed += [] if met else [name]
    for name, value in figures.items():
        if name not in BARS:
            print(f"{name:34} {shown(value):>12}")
    return missed


def shown(value) -> str:
    if value is None:
        return "not installed: tests/campaigns/bench/flow.py says how"
    if isinstance(value, float):
        return f"{value:.3f}" if value < 1000 else f"{value:,.0f}"
    return str(value)


def keep(figures: dict) -> None:
    """Write results/latest.json, and the same under date and kind of machine."""
    RESULTS.mkdir(exist_ok=True)
    kind = (
        f"gpu{torch.cuda.device_count()}"
        if torch.cuda.is_available()
        else f"{platform.machine()}-{os.cpu_count()}cores"
    )
    text = json.dumps(figures, indent=1) + "\n"
    for name in ("latest", f"{figures['date']}-{kind}"):
        (RESULTS / f"{name}.json").write_text(text)
    print(f"written to {RESULTS / 'latest.json'}")
