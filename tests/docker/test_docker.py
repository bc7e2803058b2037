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
UNKNOWN, DEFAULT = (
    4242,
    10001,
)  # a user whom the image does not know, and the one that it runs as by itself


# What is in the image.

LOOK = """
import ctypes, glob, json, os, shutil, sys, sysconfig
import horovod.torch
site = os.path.dirname(os.path.dirname(__import__("torch").__file__))
print(json.dumps({
    "programs": [name for name in "gcc g++ cc c++ clang make cmake nvcc ptxas ld as git pytest".split() if shutil.which(name)],
    "headers": [p for p in (sysconfig.get_path("include") + "/Python.h", site + "/torch/include") if os.path.exists(p)],
    "caches": [p for p in ("/tmp/*", "/tmp/.*", "/root/.cache", "/var/lib/apt/lists/*", "/var/cache/apt/*") if glob.glob(p)],
    "sources": glob.glob("/build*") + glob.glob("/runs/*"),
    "InfiniBand": bool(ctypes.CDLL("libibverbs.so.1") and glob.glob("/etc/libibverbs.d/mlx5.driver")),
    "NCCL": horovod.torch.nccl_built() > 0,
    "project": sorted(n for n in os.listdir(site) if n in ("job", "tests", "triton") or n.startswith(("mgd", "moco"))),
    "commands": sorted(n for n in os.listdir(os.path.dirname(sys.executable)) if n.startswith("mgd-")),
}))
"""


def test_image_contents(docker, image):
    found = json.loads(docker("run", "--rm", "--user", "0", image, "python", "-c", LOOK))
    assert found == {
        "programs": [],
        "headers": [],
        "caches": [],
        "sources": [],
        "InfiniBand": True,
        "NCCL": True,  # built without a CUDA toolkit, if the base image has none
        "project": ["job", "mgd", "moco", "moco_mgd-0.1.0.dist-info"],
        "commands": [
            "mgd-embed",
            "mgd-export",
            "mgd-linear",
            "mgd-pack",
            "mgd-report",
            "mgd-train",
            "mgd-watch",
        ],
    }


def test_image_settings(docker, image):
    [content] = json.loads(docker("image", "inspect", image))
    config = content["Config"]
    assert config["User"] == f"{DEFAULT}:{DEFAULT}"
    assert config["Entrypoint"] == ["/usr/bin/env"]
    assert not [
        setting
        for setting in config["Env"]
        if setting.startswith(("HOROVOD_", "NCCL_", "OMP_", "CUDA_", "PIP_"))
    ]
    assert "MGD_IMAGE=moco-mgd:test" in config["Env"]
    assert config["Labels"]["org.opencontainers.image.version"] == "test"
    assert content["Size"] < 5.7e9


def test_image_prints_the_options(docker, image):
    assert "--teacher-arch X" in docker("run", "--rm", image)


def test_wrong_command_line_is_one_line(docker, image):
    words = [
        "docker",
        "run",
        "--rm",
        "--network=host",
        image,
        "python",
        "-m",
        "job.train",
        "/nowhere",
        "--batch-size",
        "x",
    ]
    done = subprocess.run(words, env=docker.environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")


def test_build_context_has_only_copied_files(docker, tmp_path):
    """Of all that lies in the repository: no runs, no environments, no tests, no results."""
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\nCMD x\n")
    docker("build", "-f", tmp_path / "Dockerfile", "-t", "moco-mgd-context:test", ".")
    container = docker("create", "moco-mgd-context:test").strip()
    try:
        exported = subprocess.run(
            ["docker", "export", container], env=docker.environment, capture_output=True, check=True
        )
    finally:
        docker("rm", container)
        docker("rmi", "moco-mgd-context:test")
    with tarfile.open(fileobj=io.BytesIO(exported.stdout)) as archive:
        files = {member.name: member.size for member in archive if member.isfile()}
    top = {"LICENSE", "README.md", "pyproject.toml", "setup.py", "docker/build_horovod.sh"}
    top |= {"docker/constraints.txt", "docker/pip.txt"}
    others = [
        name for name in files if name not in top and not name.startswith(("job/", "mgd/", "moco/"))
    ]
    assert top <= set(files) and "job/presets/small.yaml" in files
    mounts = {
        ".dockerenv",
        "dev/console",
        "etc/hostname",
        "etc/hosts",
        "etc/resolv.conf",
    }  # docker's own, of any container
    assert set(others) <= {"Dockerfile", ".dockerignore"} | mounts
    assert not [name for name in files if "__pycache__" in name or "/results/" in name]
    assert sum(files.values()) < 2 * code_size()


def code_size():
    """The bytes of the packages' modules; compiled, they take 1.4 times as many again."""
    return sum(
        path.stat().st_size
        for name in ("job", "mgd", "moco")
        for path in (REPO / name).rglob("*.py")
    )


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
    same = len(
        list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=True)))
    )
    assert before != after
    sizes = [
        int(size)
        for size in docker("history", "--human=false", "--format", "{{.Size}}", image).split()
    ]
    assert (
        sum(sorted(sizes)[:-3]) < 4 * code_size()
    )  # all except Python, the environment and the base
    assert same >= len(before) - 2


# Runs in it.


class Run:
    """A run of two workers in a container of its own."""

    def __init__(self, engine, image, name, mounts, folder, arguments, user=None, init=True):
        self.engine, self.name, self.folder = engine, name, folder
        options = [
            "--rm",
            "--name",
            name,
            "--network=host",
            "--ipc=host",
            "--cap-drop=ALL",
            "--security-opt=no-new-privileges",
        ]
        options += ["-e", "OMP_NUM_THREADS=1", "-e", "CUDA_VISIBLE_DEVICES="]
        options += ["--init"] * init + (["--user", f"{user}:{user}"] if user else [])
        for source, target in {folder.parent: "/runs", **mounts}.items():
            options += ["-v", f"{source}:{target}" + ":ro" * (target != "/runs")]
        program = [
            "horovodrun",
            "-np",
            2,
            "python",
            "-m",
            "job.train",
            "/data",
            *arguments,
            "--out",
            f"/runs/{folder.name}",
        ]
        self.process = subprocess.Popen(
            [engine.name, "run", *options, image, *map(str, program)],
            env=engine.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self):
        """The processes of the container, as this machine has them."""
        first = psutil.Process(int(self.engine("inspect", "--format", "{{.State.Pid}}", self.name)))
        return [first, *first.children(recursive=True)]

    def wait_for_step(self, step):
        until = time.monotonic() + 120
        while len(curve(self.folder)) < step:
            assert self.process.poll() is None, (
                f"the run ended early:\n{self.process.stdout.read()}"
            )
            assert time.monotonic() < until, f"step {step} has not come in 120 s"
            time.sleep(0.02)

    def finish(self):
        """Wait for the end; return the exit code and what was printed."""
        output, _ = self.process.communicate(timeout=300)
        return self.process.returncode, output


def curve(folder):
    """What a run computed, step by step and refresh by refresh, to the last digit: all but how long it took."""
    return [record for record in records(folder) if record["kind"] in ("step", "refresh")]


def owners(folder):
    return {(path.lstat().st_uid, path.lstat().st_gid) for path in [folder, *folder.rglob("*")]}


@pytest.fixture(scope="module")
def outside(start_job, images, teacher_file, tmp_path_factory):
    """The folder of a run without a container, by the same versions."""
    folder = tmp_path_factory.mktemp("outside") / "run"
    job = start_job(2, folder, [images, *SMALL, "--teacher", teacher_file])
    output = job.finish()
    assert job.process.returncode == 0, output
    return folder


@pytest.fixture
def start_run(image, images, teacher_file):
    """A function that starts a Run on the images and the teacher; a container that is left at the end is removed."""
    runs = []
    for folder in [images, *(path for path in images.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)

    def start(engine, folder, *more, user=None, init=True):
        folder.parent.mkdir(exist_ok=True)
        os.chown(folder.parent, user or DEFAULT, user or DEFAULT)
        arguments = [*SMALL, "--teacher", "/teacher.pth.tar", *more]
        name = f"moco-mgd-test-{os.getpid()}-{len(runs)}"
        runs.append(
            Run(
                engine,
                image,
                name,
                {images: "/data", teacher_file: "/teacher.pth.tar"},
                folder,
                arguments,
                user,
                init,
            )
        )
        return runs[-1]

    yield start
    for run in runs:
        run.engine("rm", "--force", run.name, check=False)
        run.process.wait(timeout=60)


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
    """Check that `run` has been stopped and has saved in its first epoch, which only the signal can have done."""
    code, output = run.finish()
    assert code == 0, output
    assert "stopped by a signal" in output
    done = curve(run.folder)[-1]["steps"]
    assert (
        done < STEPS
        and (run.folder / f"checkpoint_{done // EPOCH:04d}_{done % EPOCH:06d}.pth.tar").exists()
    )


def test_stopped_and_killed_container_resumes(start_run, containers, outside, tmp_path):
    """By any user. A killed container leaves no process."""
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
    """Its quick stage: the rest takes minutes. podman reads all of the file."""
    copy_image(engine["BASE_IMAGE"], docker, podman)
    arguments = [
        f"--build-arg={name}=localhost/{engine['BASE_IMAGE']}"
        for name in ("BASE_IMAGE", "RUNTIME_IMAGE")
    ]
    words = [
        "--network=host",
        "--file=docker/Dockerfile",
        "--target=system",
        "--tag=moco-mgd-system:test",
        *arguments,
    ]
    podman("build", *words, ".", timeout=300)
    podman(
        "run",
        "--rm",
        "--network=host",
        "moco-mgd-system:test",
        "python3",
        "-c",
        "import ctypes; ctypes.CDLL('libibverbs.so.1')",
    )


# docker/local-engine.sh.


def local_engine(action, folder, **environment):
    """The exit code of docker/local-engine.sh, and all that it said."""
    done = subprocess.run(
        [shutil.which("bash"), SCRIPT, action],
        env=os.environ | {"LOCAL_ENGINE": str(folder)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    return done.returncode, done.stdout.replace("local-engine: ", "")


def test_running_engine_is_used_and_not_stopped(docker, engine, tmp_path):
    host = engine["DOCKER_HOST"]
    before = docker("info", "--format", "{{.ID}}")
    code, said = local_engine("up", tmp_path, DOCKER_HOST=host)
    assert (code, said.splitlines()) == (
        0,
        [
            f"an engine answers already at {host}: using it",
            f"export DOCKER_HOST={host}",
            f"export BASE_IMAGE={engine['BASE_IMAGE']}",
        ],
    )
    said = f"an engine that was not started here answers at {host}\n"
    assert local_engine("status", tmp_path, DOCKER_HOST=host) == (0, said)
    said = f"no engine of {tmp_path} runs: nothing to stop\n"
    assert local_engine("down", tmp_path, DOCKER_HOST=host) == (0, said)
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
        code, said = local_engine("up", folder, **nowhere)
        assert code == 0, said
        [host] = re.findall(r"^export DOCKER_HOST=(unix:///run/.*)$", said, re.M)
        pids = Path(host.removeprefix("unix://")).with_name("dockerd.pid")
        pid = int(pids.read_text())
        assert local_engine("status", folder, **nowhere) == (
            0,
            f"runs, pid {pid}, 0 containers: DOCKER_HOST={host}\n",
        )
        begun = time.monotonic()
        code, said = local_engine("up", folder, **nowhere)
        assert (code, said.splitlines()[0]) == (0, f"runs already, pid {pid}")
        assert time.monotonic() - begun < 10
        [base] = re.findall(r"^export BASE_IMAGE=(.*)$", said, re.M)
        subprocess.run(
            ["docker", "--host", host, "run", "--rm", "--network=host", base, "true"],
            check=True,
            timeout=60,
        )
    finally:
        code, said = local_engine("down", folder, **nowhere)
    assert (code, said) == (0, f"stopped, pid {pid}; its images stay in {folder}/data\n")
    assert not Path(f"/proc/{pid}").exists()
    assert not [
        line
        for line in Path("/proc/mounts").read_text().splitlines()
        if str(folder) in line or str(pids.parent) in line
    ]
    assert local_engine("status", folder, **nowhere) == (3, "no engine answers\n")
    assert docker("info", "--format", "{{.ID}}") == other
    shutil.rmtree(folder)

    # As after a restart of the machine, when the number belongs to something else.
    pids.parent.mkdir()
    with subprocess.Popen(["sleep", "60"]) as process:
        pids.write_text(str(process.pid))
        assert local_engine("down", folder, **nowhere) == (
            0,
            f"no engine of {folder} runs: nothing to stop\n",
        )
        assert process.poll() is None
        process.kill()
    shutil.rmtree(pids.parent)


def test_missing_programs_are_named_with_packages(nowhere, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "realpath", "sha256sum", "sort", "xargs", "cut", "echo"):
        (programs / name).symlink_to(shutil.which(name))
    said = "missing packages. Run apt-get install docker.io\n"  # debootstrap lies in /usr/sbin, where the script looks too
    assert local_engine("up", tmp_path / "engine", PATH=str(programs), **nowhere) == (2, said)
    assert local_engine("start", tmp_path / "engine") == (2, "expected up, status or down\n")
