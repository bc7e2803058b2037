"""docker/build_horovod.sh without its compilers: wheels, sources, folders and memory."""

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from disks import mount, unmount

SCRIPT = Path(__file__).parents[2] / "docker/build_horovod.sh"
ARCHIVE = re.search(r"sdist_sha256=(\w+)", SCRIPT.read_text())[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Create an environment with this one's packages, in which Horovod can be replaced."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("-packages"))
    )
    return folder / "bin/python"


@pytest.fixture
def build(python, tmp_path):
    """A function that runs the script with variables.

    A wrong source archive ends the script before it compiles. It fetches no CUDA compiler.
    """
    (tmp_path / "wrong.tar.gz").write_text("wrong\n")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TMPDIR")
    }
    environment |= {
        "HOROVOD_WHEELS": str(tmp_path / "wheels"),
        "HOROVOD_SDIST": str(tmp_path / "wrong.tar.gz"),
    }
    environment |= {"HOROVOD_BACKEND": "gloo"}

    def run(*launcher, **variables):
        command = [*launcher, "bash", SCRIPT, python]
        return subprocess.run(
            command, env=environment | variables, cwd=tmp_path, capture_output=True, text=True
        )

    return run


def wrong_archive(path):
    """Return the script's error about the archive of `build`."""
    digest = hashlib.sha256(b"wrong\n").hexdigest()
    return (
        f"build_horovod: HOROVOD_SDIST {path}: damaged or changed, its sha256 is {digest}; "
        f"expected {ARCHIVE}. Download it again\n"
    )


def test_help_is_the_head_of_the_script():
    done = subprocess.run(["bash", SCRIPT, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Build Horovod ") and "  HOROVOD_WHEELS " in done.stdout
    assert "set -" not in done.stdout


def function(name):
    """Return the text of a function of the script."""
    return re.search(rf"^{name}\(\) {{\n.*?^}}$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)[0]


# Cached wheels.


def keep_wheel(wheels, damaged=False):
    """Save the installed Horovod in `wheels` as the script does.

    damaged: its library has a wrong content.
    """
    recipe = hashlib.sha256(SCRIPT.read_bytes()).hexdigest()[:8]
    system = platform.freedesktop_os_release()
    system = system["ID"] + system.get("VERSION_ID", "") + "-" + "".join(platform.libc_ver())
    key = f"torch-{torch.__version__}-{sys.implementation.cache_tag}-{platform.machine()}-{system}"
    distribution = importlib.metadata.distribution("horovod")
    files = {
        str(file): Path(file.locate())
        for file in distribution.files
        if not str(file).startswith("..")
    }
    for backend in ("gloo", "nccl"):
        folder = wheels / f"horovod-0.28.1-{key}-{backend}-{recipe}"
        folder.mkdir(parents=True)
        tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
        file = folder / f"horovod-0.28.1-{tag}-{tag}-linux_{platform.machine()}.whl"
        with zipfile.ZipFile(file, "w") as wheel:
            for name, path in files.items():
                if path.suffix != ".pyc":
                    wrong = damaged and name.endswith(".so")
                    wheel.writestr(name, b"damaged" * 1000 if wrong else path.read_bytes())


@pytest.mark.slow
@pytest.mark.short
def test_cached_wheel_is_installed(build, python, tmp_path):
    keep_wheel(tmp_path / "wheels")
    done = build()
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"build_horovod: using the wheel in {tmp_path}/wheels/\S+\n", done.stdout)
    code = "import horovod; print(horovod.__file__)"
    done = subprocess.run(
        [python, "-c", code], env={}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(python.parents[1]))


@pytest.mark.slow
def test_cached_wheel_that_cannot_load_is_rebuilt(build, tmp_path):
    keep_wheel(tmp_path / "wheels", damaged=True)
    done = build()
    line = r"the wheel in \S+ does not load \(ImportError: .+\): building it again\n$"
    assert re.search(line, done.stdout)
    assert (done.returncode, done.stderr) == (2, wrong_archive(tmp_path / "wrong.tar.gz"))
    assert len(list((tmp_path / "wheels").glob("*/*.whl"))) == 2  # both remain until replaced


@pytest.mark.slow
def test_wheel_that_pip_refuses_is_not_built_again(build, python, tmp_path):
    keep_wheel(tmp_path / "wheels")
    done = build(PIP_PREFIX="/dev/null/prefix")
    problem = f"build_horovod: pip cannot install Horovod into {python}: "
    problem += "ERROR: Could not install packages due to an OSError: "
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(problem)


def test_missing_package_is_one_line(build, python, tmp_path):
    (tmp_path / "cffi.py").write_text("raise ModuleNotFoundError(\"No module named 'cffi'\")")
    done = build(PYTHONPATH=str(tmp_path))
    problem = f"build_horovod: {python}: No module named 'cffi'"
    fix = "expected torch and the packages of moco-mgd[horovod]. Install them there"
    assert (done.returncode, done.stderr) == (2, f"{problem}; {fix}\n")


def test_library_has_no_folder_of_its_build():
    [library] = [
        Path(file.locate())
        for file in importlib.metadata.files("horovod")
        if file.name.startswith("mpi_lib_v2")
    ]
    done = subprocess.run(
        ["readelf", "--dynamic", "--wide", library], capture_output=True, text=True, check=True
    )
    assert "NEEDED" in done.stdout and not re.search("RPATH|RUNPATH", done.stdout)


LOADED = """
import horovod.torch
print(*{line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}, sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.version.cuda, reason="a torch without CUDA")
def test_library_loads_cuda_and_nccl_of_torch():
    """It must load without an installed CUDA toolkit, as in the image."""
    loaded = subprocess.check_output([sys.executable, "-c", LOADED], text=True).splitlines()
    libraries = [line for line in loaded if re.search(r"/lib(nccl|cudart)\.so", line)]
    packages = Path(torch.__file__).parents[1]
    names = [Path(line).relative_to(packages / "nvidia").name for line in libraries]
    assert sorted(name.partition(".")[0] for name in names) == ["libcudart", "libnccl"]


# Run a command with this machine's CUDA toolkits hidden.
HIDDEN = """
for folder in /usr/local/cuda* "${CUDA_HOME:-/usr/local/cuda}"; do
    [ ! -d "$folder" ] || mount -t tmpfs tmpfs "$folder" || exit 77
done
exec "$@"
"""
BUILT = "import horovod.torch as hvd; assert hvd.nccl_built() and hvd.gloo_built()"


@pytest.mark.slow
@pytest.mark.skipif(not torch.version.cuda, reason="a torch without CUDA")
@pytest.mark.short
def test_library_with_nccl_loads_without_the_toolkit():
    """A library that was built with a toolkit does so too."""
    program = [sys.executable, "-c", BUILT]
    done = subprocess.run(["unshare", "--mount", "sh", "-c", HIDDEN, "sh", *program])
    if done.returncode in (1, 77) and os.getuid():
        pytest.skip("mounting is not allowed here, run as root")
    assert done.returncode == 0


# NCCL, and CUDA's compiler.

GLOO = "building with Gloo only, for CPUs"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "nccl"),
        ({"toolkit": ""}, "nccl"),
        ({"requested": "nccl", "toolkit": ""}, "nccl"),
        ({"requested": "gloo"}, "gloo"),
        ({"torch_cuda": "none"}, f"torch 3.0 is a CPU build: {GLOO}\ngloo"),
        ({"nccl": "none"}, f"(nvidia-nccl) is not installed: {GLOO}\ngloo"),
        (
            {"torch_cuda": "12.6", "toolkit": ""},
            f"no CUDA 12 toolkit is installed: {GLOO}\ngloo",
        ),
        ({"torch_cuda": "12.6"}, "nccl"),
        (
            {"torch_cuda": "none", "requested": "nccl"},
            "HOROVOD_BACKEND=nccl: torch 3.0 is a CPU build; expected torch with CUDA and NCCL",
        ),
    ],
    ids=str,
)
def test_nccl_is_built_in_if_possible(given, line):
    values = {"requested": "", "torch": "3.0", "torch_cuda": "13.0"}
    values |= {"nccl": "/nccl", "toolkit": "/cuda"} | given
    values["cuda"] = values["torch_cuda"].partition(".")[0]
    code = 'note() { echo "$*"; }; fail() { echo "$*"; exit 2; }\n'
    code += f"{function('without_nccl')}\n{function('choose_backend')}\n"
    code += "choose_backend; echo $backend"
    environment = {"PATH": os.environ["PATH"]} | values
    done = subprocess.run(["bash", "-euc", code], env=environment, capture_output=True, text=True)
    assert (done.stderr, line in done.stdout) == ("", True), done.stdout
    assert done.stdout.endswith(("nccl\n", "gloo\n", "compiler\n"))


def test_unknown_backend_is_one_line(build):
    done = build(HOROVOD_BACKEND="mpi")
    line = "build_horovod: HOROVOD_BACKEND=mpi: expected nccl, gloo or nothing\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


# A fake Python. Its pip saves its arguments and installs a library.
PIP = """#!/bin/bash
printf '%s\\n' "$@" >arguments
while [ "$1" != --target ]; do shift; done
mkdir -p "$2/nvidia/cu13/lib" && touch "$2/nvidia/cu13/lib/libcudart.so.13"
"""


@pytest.mark.parametrize(("version", "pinned"), [("13.0", True), ("13.4", False)])
def test_cuda_compiler_is_fetched_with_hashes(tmp_path, version, pinned):
    (tmp_path / "python").write_text(PIP)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "constraints.txt").write_bytes((SCRIPT.parent / "constraints.txt").read_bytes())
    code = f"python=./python work={tmp_path}/work log=log\n"
    code += f"cuda=13 torch_cuda={version}\nmkdir work\n"
    code += f"{function('fetch_toolkit')}\nfetch_toolkit; echo $toolkit"
    done = subprocess.run(["bash", "-euc", code], cwd=tmp_path, capture_output=True, text=True)
    toolkit = tmp_path / "work/toolkit/nvidia/cu13"
    assert (done.stdout, done.stderr) == (f"{toolkit}\n", "")
    assert (toolkit / "lib64/libcudart.so").samefile(toolkit / "lib/libcudart.so.13")
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:3] == ["-m", "pip", "install"]
    if not pinned:
        assert arguments[-1] == "cuda-toolkit[nvcc,cccl]==13.4.*"
        return
    assert arguments[-4:] == ["--require-hashes", "--no-deps", "-r", f"{tmp_path}/work/toolkit.txt"]
    blocks = re.split(r"\n(?=\S)", (tmp_path / "work/toolkit.txt").read_text())
    names = [block.partition("==")[0] for block in blocks]
    names = [name.removeprefix("nvidia-").removeprefix("cuda-") for name in names]
    assert names == ["nvcc", "crt", "cccl", "runtime", "nvvm"]
    assert all(block.count("--hash=sha256:") > 1 for block in blocks)


@pytest.mark.parametrize(
    ("driver", "requested", "code", "line"),
    [
        (False, "", 0, f"cannot be fetched (log: log): {GLOO}\nkept gloo\n"),
        (False, "nccl", 2, "HOROVOD_BACKEND=nccl: CUDA 13's compiler (nvidia-cuda-nvcc) cannot be"),
        (True, "", 2, "cannot be fetched (log: log), and this machine has GPUs. Install a CUDA 13"),
    ],
)
def test_missing_cuda_compiler_is_an_error_with_gpus(driver, requested, code, line):
    lines = f'cuda=13 log=log requested={requested} backend=nccl; note() {{ echo "$*"; }}\n'
    lines += 'fail() { echo "$*"; exit 2; }; use_kept() { echo "kept $backend"; }\n'
    lines += f"fetch_toolkit() {{ return 1; }}; has_driver() {{ {str(driver).lower()}; }}\n"
    lines += f"{function('without_nccl')}\n{function('provide_toolkit')}\nprovide_toolkit"
    done = subprocess.run(["bash", "-euc", lines], capture_output=True, text=True)
    assert (done.returncode, done.stderr, line in done.stdout) == (code, "", True), done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not torch.version.cuda, reason="a torch without CUDA")
@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia/version"), reason="an error with GPUs")
def test_cached_wheel_with_gloo_needs_no_registry(build, tmp_path):
    keep_wheel(tmp_path / "wheels")
    [folder] = (tmp_path / "wheels").glob("*-nccl-*")
    shutil.rmtree(folder)
    variables = {"HOROVOD_BACKEND": "", "HOROVOD_SDIST": "/nowhere/horovod.tar.gz"}
    done = build("unshare", "--mount", "sh", "-c", HIDDEN, "sh", PIP_NO_INDEX="1", **variables)
    if done.returncode in (1, 77) and os.getuid():
        pytest.skip("mounting is not allowed here, run as root")
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot be fetched" in done.stdout
    assert re.search(r"using the wheel in \S+-gloo-\w+\n$", done.stdout)


# The source archive and the work folder.


def test_missing_source_archive_is_one_line(build, tmp_path):
    done = build(HOROVOD_SDIST="/nowhere/horovod.tar.gz")
    problem = "build_horovod: HOROVOD_SDIST /nowhere/horovod.tar.gz: cannot be read"
    line = f"{problem}; expected the source archive of horovod 0.28.1\n"
    assert (done.returncode, done.stderr) == (2, line)


@pytest.mark.parametrize("folder", ["plain", "with a space", "noexec", "missing"])
def test_work_folder_can_run_programs(tmp_path, folder):
    """Its path has no special characters."""
    given, wheels = tmp_path / folder, tmp_path / "wheels"
    wheels.mkdir()
    if folder != "missing":
        given.mkdir()
    if folder == "noexec":
        mount("-t", "tmpfs", "-o", "noexec", "tmpfs", given)
    pattern = re.search("^plain=.*$", SCRIPT.read_text(), re.MULTILINE)[0]
    code = f"cache={wheels}\n{pattern}\n{function('make_work')}\nmake_work"
    environment = os.environ | {"TMPDIR": str(given)}
    try:
        done = subprocess.run(
            ["bash", "-euc", code], env=environment, capture_output=True, text=True, check=True
        )
        work = Path(done.stdout.removesuffix("\n"))
        assert (work.parent == given) == (folder == "plain")
        shutil.rmtree(work)
        assert not given.exists() or list(given.iterdir()) == []
    finally:
        unmount(given)


def test_missing_work_folder_is_one_line(build, tmp_path):
    (tmp_path / "wheels").mkdir()
    folders = ["/tmp", "/var/tmp", str(tmp_path / "wheels")]
    mounts = "".join(
        f"mount --bind {folder} {folder}; mount -o remount,bind,noexec {folder}; "
        for folder in folders
    )
    launcher = ["unshare", "--mount", "sh", "-c", f'set -e; {mounts} exec "$@"', "sh"]
    if subprocess.run([*launcher, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here, run as root")
    if Path(torch.__file__).is_relative_to("/tmp"):
        pytest.skip("torch's libraries are in /tmp and cannot be loaded there")
    done = build(*launcher)
    assert (done.returncode, done.stderr) == (
        2,
        "build_horovod: TMPDIR /tmp: no program can run there, nor in /tmp, /var/tmp and "
        f"{tmp_path}/wheels; expected a folder that is not mounted noexec, and has only letters, "
        "digits, '.', '_' and '-' in its path. Set TMPDIR to one\n",
    )


# Changes of the source.

UNCHANGED = "the change of CMakeLists.txt to 'STANDARD 17' does not apply"


@pytest.mark.parametrize(
    "text, result, problem",
    [
        ("set(STANDARD 14)\n", "set(STANDARD 17)\n", ""),
        ("set(STANDARD 15)\n", "set(STANDARD 15)\n", UNCHANGED),
        ("set(STANDARD 17)\n", "set(STANDARD 17)\n", UNCHANGED),
    ],
    ids=["applies", "no match", "already changed"],
)
def test_edit_applies_or_ends_the_build(tmp_path, text, result, problem):
    (tmp_path / "CMakeLists.txt").write_text(text)
    code = f'source=. version=0.28.1; fail() {{ echo "$*"; exit 2; }}\n{function("edit")}\n'
    code += "edit CMakeLists.txt 's/STANDARD 14/STANDARD 17/' 'STANDARD 17'; echo applied"
    done = subprocess.run(["bash", "-euc", code], cwd=tmp_path, capture_output=True, text=True)
    error = f"{problem}; expected the files of horovod 0.28.1\n"
    assert done.stdout == (error if problem else "applied\n")
    code = 2 if problem else 0
    assert (done.returncode, (tmp_path / "CMakeLists.txt").read_text()) == (code, result)


# The number of concurrent compilers.


@pytest.fixture
def group():
    """Create a control group of this machine with a limit of 3 GB of memory."""
    first = Path("/sys/fs/cgroup/memory")
    top, limit = Path("/sys/fs/cgroup"), "memory.max"
    if first.is_dir():
        top, limit = first, "memory.limit_in_bytes"
    path = top / f"moco-mgd-test-{os.getpid()}"
    try:
        path.mkdir()
        (path / limit).write_text(str(3 * 2**30))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield path
    path.rmdir()


def test_count_jobs_follows_the_memory_limit(group):
    inner = group / "inner"
    inner.mkdir()
    code = f"echo $$ >{inner}/cgroup.procs; python={sys.executable}\n"
    code += f"{function('count_jobs')}\ncount_jobs"
    try:
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    finally:
        inner.rmdir()
    assert (done.stdout, done.stderr) == ("1\n", "")
