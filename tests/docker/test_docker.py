"""The image, runs in it, and the engine of docker/local-engine.sh."""

import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import psutil
import pytest

from engine import copy_image
from runs import differences, records

REPO = Path(__file__).parents[2]
SCRIPT = REPO / "docker/local-engine.sh"
SMALL = "-a resnet18 --image-size 32 --batch-size 8 --epochs 2 --aug-plus --cos".split()
SMALL += "--warmup-epochs 1 --refresh-epochs 0,1 --keep 1 --workers 0".split()
SMALL += "--framework simsiam --dim 64 --pred-dim 16 --fix-pred-lr".split()
EPOCH = 50 // 8  # steps
STEPS = 2 * EPOCH
UNKNOWN = 4242  # a user id without an entry in the image
DEFAULT = 10001  # the image's default user id


# The contents of the image.

LOOK = """
import ctypes, glob, json, os, shutil, sys, sysconfig
import horovod.torch
site = os.path.dirname(os.path.dirname(__import__("torch").__file__))
programs = "gcc g++ cc c++ clang make cmake nvcc ptxas ld as git pytest".split()
headers = (sysconfig.get_path("include") + "/Python.h", site + "/torch/include")
caches = "/tmp/* /tmp/.* /root/.cache /var/lib/apt/lists/* /var/cache/apt/*".split()
driver = "/etc/libibverbs.d/mlx5.driver"
commands = os.path.dirname(sys.executable)
def is_ours(name):
    return name in ("job", "tests", "triton") or name.startswith(("mgd", "moco"))
print(json.dumps({
    "programs": [name for name in programs if shutil.which(name)],
    "headers": [path for path in headers if os.path.exists(path)],
    "caches": [path for path in caches if glob.glob(path)],
    "sources": glob.glob("/build*") + glob.glob("/runs/*"),
    "InfiniBand": bool(ctypes.CDLL("libibverbs.so.1") and glob.glob(driver)),
    "NCCL": horovod.torch.nccl_built() > 0,
    "project": sorted(name for name in os.listdir(site) if is_ours(name)),
    "commands": sorted(name for name in os.listdir(commands) if name.startswith("mgd-")),
}))
"""


@pytest.mark.short
def test_image_contents(docker, image):
    contents = json.loads(docker("run", "--rm", "--user", "0", image, "python", "-c", LOOK))
    programs = "embed export linear pack report train watch".split()
    assert contents == {
        "programs": [],
        "headers": [],
        "caches": [],
        "sources": [],
        "InfiniBand": True,
        "NCCL": True,  # built without a CUDA toolkit if the base image has none
        "project": ["job", "mgd", "moco", "moco_mgd-0.1.0.dist-info"],
        "commands": [f"mgd-{name}" for name in programs],
    }


@pytest.mark.short
def test_image_settings(docker, image):
    """The image sets no variables of Horovod, NCCL, OpenMP, CUDA or pip."""
    [content] = json.loads(docker("image", "inspect", image))
    config = content["Config"]
    assert config["User"] == f"{DEFAULT}:{DEFAULT}"
    assert config["Entrypoint"] == ["/usr/bin/env"]
    prefixes = ("HOROVOD_", "NCCL_", "OMP_", "CUDA_", "PIP_")
    assert not [setting for setting in config["Env"] if setting.startswith(prefixes)]
    assert "MGD_IMAGE=moco-mgd:test" in config["Env"]
    assert config["Labels"]["org.opencontainers.image.version"] == "test"
    assert content["Size"] < 5.7e9


@pytest.mark.short
def test_image_prints_the_options(docker, image):
    assert "--teacher-arch X" in docker("run", "--rm", image)


@pytest.mark.short
def test_wrong_command_line_is_one_line(docker, image):
    command = ["docker", "run", "--rm", "--network=host", image]
    command += "python -m job.train /nowhere --batch-size x".split()
    done = subprocess.run(
        command, env=docker.environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")


@pytest.mark.short
def test_build_context_has_only_copied_files(docker, tmp_path):
    """No runs, environments, tests or results of the repository."""
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\nCMD x\n")
    docker("build", "-f", tmp_path / "Dockerfile", "-t", "moco-mgd-context:test", ".")
    container = docker("create", "moco-mgd-context:test").strip()
    try:
        words = ["docker", "export", container]
        done = subprocess.run(words, env=docker.environment, capture_output=True, check=True)
    finally:
        docker("rm", container)
        docker("rmi", "moco-mgd-context:test")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        files = {member.name: member.size for member in archive if member.isfile()}
    top = {"LICENSE", "README.md", "pyproject.toml", "setup.py", "docker/build_horovod.sh"}
    top |= {"docker/constraints.txt", "docker/pip.txt"}
    packages = ("job/", "mgd/", "moco/")
    others = {name for name in files if name not in top and not name.startswith(packages)}
    assert top <= set(files) and "job/presets/small.yaml" in files
    # docker adds these files to any container.
    added = {".dockerenv", "dev/console", "etc/hostname", "etc/hosts", "etc/resolv.conf"}
    assert others <= {"Dockerfile", ".dockerignore"} | added
    assert not [name for name in files if "__pycache__" in name or "/results/" in name]
    assert sum(files.values()) < 2 * code_size()


def code_size():
    """Return the bytes of the packages' modules. Their compiled files have 1.4 times as many."""
    files = [path for name in ("job", "mgd", "moco") for path in (REPO / name).rglob("*.py")]
    return sum(path.stat().st_size for path in files)


def test_code_change_rebuilds_the_last_layers(docker, build, image, tmp_path):
    for name in ("docker", "job", "mgd", "moco"):
        shutil.copytree(REPO / name, tmp_path / name)
    for name in (".dockerignore", "LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(REPO / name, tmp_path)
    with open(tmp_path / "mgd/loss.py", "a") as file:
        file.write(f"# {time.time()}\n")
    changed = build("moco-mgd-changed:test", tmp_path)
    before, after = (
        json.loads(docker("image", "inspect", name, "--format", "{{json .RootFS.Layers}}"))
        for name in (image, changed)
    )
    docker("rmi", changed)
    pairs = zip(before, after, strict=True)
    same = list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    assert before != after
    history = docker("history", "--human=false", "--format", "{{.Size}}", image)
    sizes = sorted(map(int, history.split()))
    # All layers except Python, the environment and the base.
    assert sum(sizes[:-3]) < 4 * code_size()
    assert len(same) >= len(before) - 2


# Runs in the image.


class Run:
    """A run of two workers in a container."""

    def __init__(self, engine, image, name, mounts, folder, arguments, user=None, init=True):
        self.engine, self.name, self.folder = engine, name, folder
        options = ["--rm", f"--name={name}", "--network=host", "--ipc=host", "--cap-drop=ALL"]
        options += ["--security-opt=no-new-privileges"]
        options += ["-e", "OMP_NUM_THREADS=1", "-e", "CUDA_VISIBLE_DEVICES="]
        options += ["--init"] * init + (["--user", f"{user}:{user}"] if user else [])
        for source, target in {folder.parent: "/runs", **mounts}.items():
            options += ["-v", f"{source}:{target}" + ":ro" * (target != "/runs")]
        program = "horovodrun -np 2 python -m job.train /data".split()
        program += [*map(str, arguments), "--out", f"/runs/{folder.name}"]
        self.process = subprocess.Popen(
            [engine.name, "run", *options, image, *program],
            env=engine.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self):
        """Return the processes of the container, on this machine."""
        first = psutil.Process(int(self.engine("inspect", "--format", "{{.State.Pid}}", self.name)))
        return [first, *first.children(recursive=True)]

    def wait_for_step(self, step):
        until = time.monotonic() + 120
        while len(curve(self.folder)) < step:
            if self.process.poll() is not None:
                pytest.fail(f"the run ended early:\n{self.process.stdout.read()}")
            assert time.monotonic() < until, f"no step {step} within 120 s"
            time.sleep(0.02)

    def finish(self):
        """Wait for the end and return the exit code and the output."""
        output, _ = self.process.communicate(timeout=300)
        return self.process.returncode, output


def curve(folder):
    """Return the records of a run's steps and refreshes, without times."""
    return [record for record in records(folder) if record["kind"] in ("step", "refresh")]


def owners(folder):
    return {(path.lstat().st_uid, path.lstat().st_gid) for path in [folder, *folder.rglob("*")]}


@pytest.fixture(scope="module")
def outside(start_job, images, teacher_file, tmp_path_factory):
    """The folder of a run without a container, with the same versions."""
    folder = tmp_path_factory.mktemp("outside") / "run"
    job = start_job(2, folder, [images, *SMALL, "--teacher", teacher_file])
    output = job.finish()
    assert job.process.returncode == 0, output
    return folder


@pytest.fixture
def start_run(image, images, teacher_file):
    """A function that starts a Run. Remaining containers are removed at the end."""
    runs = []
    for folder in [images, *(path for path in images.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)

    def start(engine, folder, *more, user=None, init=True):
        folder.parent.mkdir(exist_ok=True)
        os.chown(folder.parent, user or DEFAULT, user or DEFAULT)
        arguments = [*SMALL, "--teacher", "/teacher.pth.tar", *more]
        name = f"moco-mgd-test-{os.getpid()}-{len(runs)}"
        mounts = {images: "/data", teacher_file: "/teacher.pth.tar"}
        runs.append(Run(engine, image, name, mounts, folder, arguments, user, init))
        return runs[-1]

    yield start
    for run in runs:
        run.engine("rm", "--force", run.name, check=False)
        run.process.wait(timeout=60)


@pytest.mark.short
def test_run_equals_one_without_a_container(start_run, docker, outside, tmp_path):
    run = start_run(docker, tmp_path / "runs/run")
    code, output = run.finish()
    assert code == 0, output
    assert "image moco-mgd:test" in output
    steps = curve(run.folder)
    assert len([record for record in steps if record["kind"] == "step"]) == STEPS
    assert steps == curve(outside)
    assert differences(outside, run.folder) == []
    assert owners(run.folder) == {(DEFAULT, DEFAULT)}


def check_saved_by_signal(run):
    """Check that a run has stopped and saved in its first epoch, because of the signal."""
    code, output = run.finish()
    assert code == 0, output
    assert "stopped by a signal" in output
    done = curve(run.folder)[-1]["steps"]
    checkpoint = f"checkpoint_{done // EPOCH:04d}_{done % EPOCH:06d}.pth.tar"
    assert done < STEPS and (run.folder / checkpoint).exists()


def test_stopped_and_killed_container_resumes(start_run, containers, outside, tmp_path):
    """The bytes are the same for any user. A killed container leaves no process."""
    folder = tmp_path / "runs/run"
    run = start_run(containers, folder, "--resume", "auto", user=UNKNOWN)
    run.wait_for_step(6)  # 4 refreshes, 2 steps
    containers("stop", "--time", "60", run.name)
    check_saved_by_signal(run)

    options = ["--save-every", "2steps", "--resume", "auto"]
    run = start_run(containers, folder, *options, user=UNKNOWN)
    run.wait_for_step(12)  # 4 refreshes, 8 steps
    processes = run.processes()
    assert len(processes) >= 4
    containers("kill", "--signal", "KILL", run.name)
    code, output = run.finish()
    assert code == 128 + signal.SIGKILL, output
    assert not [process for process in processes if process.is_running()]

    run = start_run(containers, folder, *options, user=UNKNOWN)
    code, output = run.finish()
    assert code == 0, output
    assert "resuming from" in output
    assert curve(folder) == curve(outside)
    assert differences(outside, folder) == []
    assert owners(folder) == {(UNKNOWN, UNKNOWN)}


def test_container_without_init_saves(start_run, docker, tmp_path):
    run = start_run(docker, tmp_path / "runs/run", init=False)
    run.wait_for_step(6)
    docker("stop", "--time", "60", run.name)
    check_saved_by_signal(run)


def test_podman_builds_the_image(podman, docker, engine, tmp_path):
    """It builds a quick stage, because the others need minutes. podman parses the entire file."""
    copy_image(engine["BASE_IMAGE"], docker, podman)
    base = f"localhost/{engine['BASE_IMAGE']}"
    options = [f"--build-arg={name}={base}" for name in ("BASE_IMAGE", "RUNTIME_IMAGE")]
    options += ["--network=host", "--file=docker/Dockerfile", "--target=system"]
    tag = "moco-mgd-system:test"
    podman("build", *options, f"--tag={tag}", ".", timeout=300)
    code = "import ctypes; ctypes.CDLL('libibverbs.so.1')"
    podman("run", "--rm", "--network=host", tag, "python3", "-c", code)


# docker/local-engine.sh.


def local_engine(action, folder, **environment):
    """Run docker/local-engine.sh and return its exit code and its output."""
    arguments = [shutil.which("bash"), SCRIPT, action]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180)
    environment = os.environ | {"LOCAL_ENGINE": str(folder)} | environment
    done = subprocess.run(arguments, env=environment, **options)
    return done.returncode, done.stdout.replace("local-engine: ", "")


@pytest.mark.short
def test_running_engine_is_used_and_not_stopped(docker, engine, tmp_path):
    host = engine["DOCKER_HOST"]
    before = docker("info", "--format", "{{.ID}}")
    code, output = local_engine("up", tmp_path, DOCKER_HOST=host)
    lines = [f"an engine answers already at {host}: using it", f"export DOCKER_HOST={host}"]
    lines += [f"export BASE_IMAGE={engine['BASE_IMAGE']}"]
    assert (code, output.splitlines()) == (0, lines)
    line = f"an engine that was not started here answers at {host}\n"
    assert local_engine("status", tmp_path, DOCKER_HOST=host) == (0, line)
    line = f"no engine of {tmp_path} runs: nothing to stop\n"
    assert local_engine("down", tmp_path, DOCKER_HOST=host) == (0, line)
    assert docker("info", "--format", "{{.ID}}") == before


@pytest.fixture
def nowhere(tmp_path):
    """An environment in which no engine answers."""
    return {"DOCKER_HOST": f"unix://{tmp_path}/none.sock"}


def test_engine_starts_and_stops_next_to_another(docker, nowhere, tmp_path):
    folder = tmp_path / "engine"
    other = docker("info", "--format", "{{.ID}}")
    assert local_engine("status", folder, **nowhere) == (3, "no engine answers\n")
    try:
        code, output = local_engine("up", folder, **nowhere)
        assert code == 0, output
        [host] = re.findall(r"^export DOCKER_HOST=(unix:///run/.*)$", output, re.M)
        pids = Path(host.removeprefix("unix://")).with_name("dockerd.pid")
        pid = int(pids.read_text())
        line = f"runs, pid {pid}, 0 containers: DOCKER_HOST={host}\n"
        assert local_engine("status", folder, **nowhere) == (0, line)
        code, output = local_engine("up", folder, **nowhere)
        assert (code, output.splitlines()[0]) == (0, f"runs already, pid {pid}")
        assert "import" not in output and "debootstrap" not in output  # the base image is kept
        [base] = re.findall(r"^export BASE_IMAGE=(.*)$", output, re.M)
        command = ["docker", "--host", host, "run", "--rm", "--network=host", base, "true"]
        subprocess.run(command, check=True, timeout=60)
    finally:
        code, output = local_engine("down", folder, **nowhere)
    assert (code, output) == (0, f"stopped, pid {pid}; its images stay in {folder}/data\n")
    assert not Path(f"/proc/{pid}").exists()
    mounts = Path("/proc/mounts").read_text()
    assert str(folder) not in mounts and str(pids.parent) not in mounts
    assert local_engine("status", folder, **nowhere) == (3, "no engine answers\n")
    assert docker("info", "--format", "{{.ID}}") == other
    shutil.rmtree(folder)

    # As after a restart of the machine: another process has the number in the pid file.
    pids.parent.mkdir()
    with subprocess.Popen(["sleep", "60"]) as process:
        pids.write_text(str(process.pid))
        line = f"no engine of {folder} runs: nothing to stop\n"
        assert local_engine("down", folder, **nowhere) == (0, line)
        assert process.poll() is None
        process.kill()
    shutil.rmtree(pids.parent)


@pytest.mark.short
def test_missing_programs_are_named_with_packages(nowhere, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "realpath", "sha256sum", "sort", "xargs", "cut", "echo"):
        (programs / name).symlink_to(shutil.which(name))
    # Not debootstrap: the script also searches /usr/sbin.
    line = "missing packages. Run apt-get install docker.io\n"
    assert local_engine("up", tmp_path / "engine", PATH=str(programs), **nowhere) == (2, line)
    assert local_engine("start", tmp_path / "engine") == (2, "expected up, status or down\n")
