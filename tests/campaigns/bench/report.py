"""The bench's report: a table of the figures with their bars, and the files of results."""

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

from methods import METHODS

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "torchvision",
    "horovod",
    "numpy",
    "scipy",
    "pillow",
    "opencv-python-headless",
    "simplejpeg",
    "ortools",
)

# figure: its smallest or largest permitted value, and its meaning
BARS = {
    "step_over_passes": ("<=", 1.10, "a step over the bare sum of its networks' passes"),
    "speed_over_baseline": (">=", 1.6, "images/s over the plain baseline's"),
    "memory_over_baseline": ("<=", 0.5, "peak memory of a worker over the baseline's"),
    "share_logging": (
        "<=",
        0.01,
        "fraction of a step for journal, log, hints and TensorBoard's scalars",
    ),
    "input_over_pil": (">=", 4.0, "two views on one core, images/s over PIL's"),
    "decode_crop_images_per_s": (">=", 450, "only decoding and two crops, images/s on one core"),
    "scan_1281167_cpu_s": ("<=", 3.0, "a scan of ImageNet's 1,281,167 files, CPU seconds"),
    "loader_growth": ("<=", 1.1, "memory of a loader process, 1,281,167 files over 100,000"),
    "imagenet_slowest_cpu_s": (
        "<=",
        60,
        "the slowest work on as many images, CPU seconds",
    ),
    "imagenet_largest_gb": ("<=", 2.0, "memory of the largest of these, GB"),
    "imagenet_knn_2048_over_products": ("<=", 1.6, "k-NN over its bare products, ResNet-50"),
    "imagenet_knn_512_over_products": ("<=", 2.2, "the same, ResNet-18"),
    "refresh_over_baseline": (
        ">=",
        2.6,
        "speed of measuring a refresh over the baseline's, 2 workers",
    ),
    "solve_s": ("<=", 0.6, "solving all four stages, s"),
    "shuffle_bytes_constant": (
        "==",
        True,
        "a worker receives at most a batch of key images, 2 and 4 workers",
    ),
    "shuffle_bytes_over_float": ("<=", 0.26, "bytes of key images over those of floats"),
    "weak_scaling": (">=", 0.9, "step of one worker over that of two, one core each"),
    "extract_over_bare": (">=", 0.9, "only decoding and passes, over extraction of features"),
    "validate_over_bare": (">=", 0.9, "the same over validation"),
    "gpu_float32_step_over_passes": ("<=", 1.10, "on GPUs: a step over its passes"),
    "gpu_bf16_step_over_passes": ("<=", 1.10, "the same in bf16"),
    **{
        f"method_{name}_over_passes": ("<=", 1.10, f"{name}: a step over its passes, one core")
        for name in METHODS
    },
}
HOLDS = {
    "<=": lambda value, bar: value <= bar,
    ">=": lambda value, bar: value >= bar,
    "==": lambda value, bar: value == bar,
}


def circumstances(quick: bool) -> dict:
    """Return machine, versions, command, date, and the machine's load."""
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
    """Return processor, cores, memory and GPUs."""
    with open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    return ", ".join(
        [model[1] if model else platform.machine(), f"{os.cpu_count()} cores", memory, *gpus]
    )


def version(package: str) -> str | None:
    """Return a package's name and version, or None if it is not installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def table(figures: dict, complete: bool = True) -> list[str]:
    """Print all figures, those with bars first. Return the names of figures that miss their bar.

    complete: a missing figure also misses its bar, unless it is a figure of GPUs.
    """
    required = [name for name in BARS if complete and not name.startswith("gpu")]
    missed = [name for name in required if name not in figures]
    for name, (sign, bar, meaning) in BARS.items():
        if name in figures:
            met = HOLDS[sign](figures[name], bar)
            verdict = "met   " if met else "MISSED"
            value = shown(figures[name])
            print(f"{name:34} {value:>12}  {sign} {shown(bar):6} {verdict}  {meaning}")
            missed += [] if met else [name]
    for name, value in figures.items():
        if name not in BARS:
            print(f"{name:34} {shown(value):>12}")
    return missed


def shown(value) -> str:
    if value is None:
        return "not installed: see tests/campaigns/bench/flow.py"
    if isinstance(value, float):
        return f"{value:.3f}" if value < 1000 else f"{value:,.0f}"
    return str(value)


def keep(figures: dict) -> None:
    """Write results/latest.json and a copy named by date and machine."""
    RESULTS.mkdir(exist_ok=True)
    machine = (
        f"gpu{torch.cuda.device_count()}"
        if torch.cuda.is_available()
        else f"{platform.machine()}-{os.cpu_count()}cores"
    )
    text = json.dumps(figures, indent=1) + "\n"
    for name in ("latest", f"{figures['date']}-{machine}"):
        (RESULTS / f"{name}.json").write_text(text)
    print(f"written to {RESULTS / 'latest.json'}")
