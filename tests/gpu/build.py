"""Build Horovod in the session's environment, and record machine and versions.

python tests/gpu/build.py ENVIRONMENT [--carried FOLDER]. With a carried folder (carry.py),
ENVIRONMENT becomes a Python environment of this interpreter's torch and the carried wheels, made
without a package registry. Without one, this interpreter must have all packages.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import carry

SCRIPT = carry.REPO / "docker/build_horovod.sh"
FACTS = """
import json, platform, torch
import horovod.torch as hvd
import importlib.metadata as metadata
gpus = range(torch.cuda.device_count())
print(json.dumps({
    "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
    "memory_bytes": [torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus],
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version(), "horovod": metadata.version("horovod"),
    "nccl_built": int(hvd.nccl_built()),
}))
"""


def variables(folder: Path | None) -> dict[str, str]:
    """Return the environment variables by which the build finds the carried files."""
    if folder is None:
        return {}
    [source] = folder.glob("horovod-*.tar.gz")
    options = {"HOROVOD_SDIST": str(source), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    return options | {"PATH": f"{os.environ['PATH']}:{Path(sys.executable).parent}"}  # cmake


def lacks_nccl(facts: dict) -> bool:
    """Return whether the machine has GPUs and Horovod has no NCCL."""
    return bool(facts["gpus"]) and not facts["nccl_built"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environment", type=Path)
    parser.add_argument("--carried", type=Path)
    options = parser.parse_args()
    folder = options.carried and options.carried.resolve()
    start = time.perf_counter()
    python = carry.environment(options.environment, folder)
    subprocess.run([SCRIPT, python], env=os.environ | variables(folder), check=True)
    command = [python, "-c", FACTS]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    facts = json.loads(output.splitlines()[-1])
    record = {"kind": "machine", "build_seconds": round(time.perf_counter() - start, 1)}
    line = json.dumps(record | facts)
    print(line)
    if path := os.environ.get("GPU_RESULTS"):
        with open(path, "a") as file:
            file.write(line + "\n")
    if lacks_nccl(facts):
        sys.exit("Horovod has no NCCL, and this machine has GPUs. See the log of the build above")


if __name__ == "__main__":
    main()
