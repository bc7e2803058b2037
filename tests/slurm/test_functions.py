"""slurm/functions.sh with stand-ins for the commands of SLURM and container engines."""

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from job.show.read import discover
from job.show.read.history import read_record
from jobs import REPO

pytestmark = pytest.mark.short

COMMAND = ["python", "-m", "job.train", "my data", "--out", "r"]
# The variables of a job that `run` needs.
NEEDS = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node1",
    "RUNTIME": "none",
    "VENV": "",
    "IMAGE": "",
    "MOUNTS": "",
    "DATA": "",
}
NEEDS |= {"MGD_NODE_ADDRESSES": "node1=10.0.0.1", "MAX_REQUEUES": "20", "RUN": "r"}


def decisions(done) -> list[str]:
    """Return the reasons in a job's decision records."""
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"kind": "decision", ')]
    return [json.loads(line)["reason"] for line in lines]


@pytest.fixture
def shell(tmp_path):
    """A function that sources functions.sh and runs lines, with stand-ins for programs."""

    def run(lines, programs=None, folder=tmp_path, **variables):
        for name, text in (programs or {}).items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
        } | variables
        script = f"set -euo pipefail\n. {REPO}/slurm/functions.sh\n{lines}"
        return subprocess.run(
            ["bash", "-c", script, "script", *COMMAND],
            env=environment,
            cwd=folder,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
        )

    run.folder = tmp_path
    return run


# Stand-ins that write the arguments and the environment of a task, or of its container, to files.
WRITE = 'printf "%s\\0" "$@" >"$HERE/arguments"; env >"$HERE/environment"'
SRUN = f"""case $* in
    *--container-image*) {WRITE} ;;
    *) while [[ $1 = --* ]]; do shift; done; [ "$1" = bash ] && exec "$@"; {WRITE} ;;
esac"""
ENGINE = f'[[ " $* " != *" run "* ]] || {{ {WRITE}; }}'
STAND_INS = {"srun": SRUN, "apptainer": WRITE, "docker": ENGINE, "podman": ENGINE}
ENGINES = ["docker", "podman"]
CONTAINERS = [*ENGINES, "apptainer", "pyxis"]


@pytest.fixture
def started(shell, tmp_path):
    """A function that starts a task by a runtime and returns its arguments and environment."""

    def start(runtime, **variables):
        (tmp_path / "image").touch()
        values = {
            "DATA": "data",
            "RUN": "r",
            "RUNTIME": runtime,
            "SLURM_JOB_ID": "7",
            "SLURM_PROCID": "0",
        }
        values |= {
            "HERE": str(tmp_path),
            "IMAGE": "image" if runtime in ENGINES else f"{tmp_path}/image",
        }
        values |= {
            "SLURM_JOB_NODELIST": "node1",
            "SLURMD_NODENAME": "node1",
            "MGD_NODE_ADDRESSES": "node1=10.0.0.1",
            "VENV": "",
        }
        lines = 'settle() { exit "$1"; }\n: "${MOUNTS=}"\nrun "$@"'
        done = shell(lines, STAND_INS, **values | variables)
        assert done.returncode == 0, done.stdout + done.stderr
        arguments = (tmp_path / "arguments").read_text().split("\0")[:-1]
        return arguments, dict(
            line.split("=", 1)
            for line in (tmp_path / "environment").read_text().splitlines()
            if "=" in line
        )

    return start


@pytest.fixture
def refused(shell, tmp_path):
    """A function that sources functions.sh with invalid settings and returns the error."""

    def source(**variables):
        (tmp_path / "image").touch()
        done = shell("echo sourced", **{"IMAGE": "image", "DATA": "", "RUN": "r"} | variables)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        [line] = done.stderr.splitlines()
        return line.removeprefix("error: batch: ")

    return source


def mounts(arguments) -> dict[str, str]:
    """Return the paths in a container, each ro or rw, in the order of the arguments."""
    if arguments[0].startswith("--export"):
        [option] = [option for option in arguments if option.startswith("--container-mounts=")]
        entries = [mount.split(":") for mount in option.split("=", 1)[1].split(",")]
    else:
        rows = [next(csv.reader([value])) for value in values_of("--mount", arguments)]
        assert all(row[0] == "type=bind" for row in rows)
        entries = [[row[1][7:], row[2][7:], *row[3:]] for row in rows]  # without source=, target=
    assert all(source == target for source, target, *_ in entries)
    modes = {source: (more or ["rw"])[0] for source, _, *more in entries}
    modes.pop("/etc/nccl.conf", None)  # this machine may have one
    return modes


def values_of(option, arguments) -> list[str]:
    """Return the argument after each occurrence of an option."""
    return [
        arguments[number + 1] for number, argument in enumerate(arguments) if argument == option
    ]


def test_paths_expand_the_home_folder(shell, tmp_path):
    names = ["DATA", "ARCHIVE", "LOCAL", "RUN", "IMAGE"]
    home = {"HOME": f"{tmp_path}/my & home"}
    lines = " ".join(["printf '%s\\n'", *(f'"${name}"' for name in names)])
    done = shell(lines, **dict.fromkeys(names, "~/a b~/c") | home)
    assert done.stdout.splitlines() == [f"{home['HOME']}/a b~/c"] * len(names), done.stderr
    assert shell('echo "${DATA-unset} ${RUN-unset}"', RUN="./~/r").stdout == "unset ./~/r\n"
    (tmp_path / "my & home" / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "my & home" / "venv" / "bin" / "activate").touch()
    assert shell('echo "$VENV"', VENV="~/venv", **home).stdout == f"{home['HOME']}/venv\n"


@pytest.mark.parametrize("runtime", ["none", *CONTAINERS])
def test_command_is_the_same_in_each_runtime(started, tmp_path, runtime):
    (tmp_path / "my data").mkdir()
    data = "data" if runtime == "pyxis" else "my data"
    (tmp_path / data).mkdir(exist_ok=True)
    arguments, environment = started(runtime, DATA=data)
    assert arguments[-len(COMMAND) :] == COMMAND
    before = arguments[: -len(COMMAND)]
    expected = {str(tmp_path): "ro", f"{tmp_path}/{data}": "ro", f"{tmp_path}/r": "rw"}
    if runtime == "none":
        assert before == []
        return
    assert mounts(before) == expected
    assert list(mounts(before)) == sorted(expected)
    before = [
        word
        for word in before
        if word != "--mount" and not word.startswith(("type=bind", "--container-mounts"))
    ]
    if runtime == "apptainer":
        options = f"--cleanenv --no-mount home,cwd --pwd {tmp_path} {tmp_path}/image"
        assert before == ["exec", *options.split()]
        assert environment["APPTAINERENV_PYTHONSAFEPATH"] == "1"
    elif runtime == "pyxis":
        container = [
            f"--container-image={tmp_path}/image",
            f"--container-workdir={tmp_path}",
            "--no-container-mount-home",
        ]
        assert before == ["--export=ALL", "--kill-on-bad-exit=1", *container]
        assert environment["PYTHONSAFEPATH"] == "1"
    else:
        assert before[-1] == "image" and before[before.index("--workdir") + 1] == str(tmp_path)


def test_task_has_the_cores_of_the_job(shell):
    done = shell('start_tasks "$@"', {"srun": 'echo "$@"'}, SLURM_CPUS_PER_TASK="8")
    assert done.stdout.startswith("--export=ALL --kill-on-bad-exit=1 --cpus-per-task=8 python ")


@pytest.fixture
def linked(tmp_path):
    """A function that returns paths in a file system with /scratch -> /lustre and more links."""
    for name in (
        "lustre/me/data/train",
        "lustre/me/teachers",
        "lustre/me/runs",
        "lustre/local",
        "home/project",
    ):
        (tmp_path / name).mkdir(parents=True)
    for name in ("lustre/me/data/train/1.png", "lustre/me/teachers/t.pth.tar", "lustre/local/list"):
        (tmp_path / name).write_text(Path(name).name)
    links = {
        "scratch": "lustre",
        "mine": "scratch/me",
        "h": "home",
        "lustre/me/data/last": "train/1.png",
    }
    links |= {
        "home/project/runs": f"{tmp_path}/mine/runs",
        "home/project/teachers": f"{tmp_path}/scratch/me/teachers",
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    return lambda *names: [f"{tmp_path}/{name}" for name in names]


# Run shell lines in a root folder made of a container's mounts. Each line of stdin is one mount:
# "ro PATH" or "rw PATH".
CONTAINER = """set -eu
mount -t tmpfs tmpfs "$1"
for name in bin lib lib64 usr; do
    if [ -L /$name ]; then cp -P /$name "$1"; continue; fi
    mkdir "$1/$name" && mount --bind /$name "$1/$name"
done
while read -r mode path; do
    if [ -d "$path" ]; then mkdir -p "$1$path"; else mkdir -p "$1${path%/*}" && touch "$1$path"; fi
    mount --bind "$path" "$1$path"
    [ $mode = rw ] || mount -o remount,bind,ro "$1$path"
done
exec chroot "$1" sh -euc "$2"
"""


@pytest.mark.parametrize("runtime", CONTAINERS)
def test_mounts_have_every_name_of_a_path(started, linked, tmp_path, runtime):
    """No mount covers a link in a mounted folder, because the container has the link itself."""
    [data, project, file, root] = linked("mine/data", "h/project", "scratch/local/list", "root")
    given = {"DATA": data, "RUN": "runs/r", "MOUNTS": f"teachers\n  {file}\n\n"}
    arguments, _ = started(runtime, folder=tmp_path / "home/project", PWD=project, **given)
    read = linked(
        "h/project",
        "home/project",
        "mine/data",
        "scratch/me/data",
        "lustre/me/data",
        "scratch/local/list",
    )
    read += linked("lustre/local/list", "scratch/me/teachers", "lustre/me/teachers")
    write = linked("mine/runs/r", "scratch/me/runs/r", "lustre/me/runs/r")
    assert mounts(arguments) == dict.fromkeys(read, "ro") | dict.fromkeys(write, "rw")

    names = linked("mine/data/last", "scratch/me/data/last", "lustre/me/data/train/1.png")
    names += [*linked("scratch/local/list"), "teachers/t.pth.tar"]
    names += linked("h/project/teachers/t.pth.tar", "scratch/me/teachers/t.pth.tar")
    lines = f"cd {project}; cat {' '.join(names)}; echo written | tee runs/r/1 >{write[0]}/2; "
    lines += f"! touch {data}/new 2>&-"
    os.mkdir(root)
    unshared = ["unshare", "--mount", "bash", "-c", CONTAINER, "container", root, lines]
    given = "".join(f"{mode} {path}\n" for path, mode in mounts(arguments).items())
    done = subprocess.run(unshared, input=given, capture_output=True, text=True)
    if "Operation not permitted" in done.stderr:
        pytest.skip("only root can mount folders")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "1.png" * 3 + "list" + "t.pth.tar" * 3
    assert [(Path(write[-1]) / name).read_text() for name in "12"] == ["written\n"] * 2


@pytest.mark.parametrize("runtime", [*ENGINES, "apptainer"])
def test_mounts_quote_any_path(started, tmp_path, runtime):
    paths = [
        f"{tmp_path}/{name}"
        for name in ("two words", "[a]", "a", 'c:o,m"ma', "file", "$HOME", "b\\s")
    ]
    for path in paths:
        os.mkdir(path)
    (tmp_path / "r").symlink_to(tmp_path / "run of, mine")
    arguments, _ = started(
        runtime,
        HOME=str(tmp_path),
        MOUNTS="\n".join(["~/two words", *paths[1:]]),
        RUN="r",
        DATA=paths[3],
    )
    expected = dict.fromkeys([str(tmp_path), *paths], "ro") | {f"{tmp_path}/run of, mine": "rw"}
    assert mounts(arguments) == expected
    assert (tmp_path / "run of, mine").is_dir()


def test_mounts_are_unique(started, tmp_path):
    """A path that is given twice is mounted once, writable if it is RUN."""
    (tmp_path / "data").mkdir()
    arguments, _ = started(
        "docker", MOUNTS=f"data\n{tmp_path}/data/\n.", DATA="data/../data", RUN="data/."
    )
    assert mounts(arguments) == {str(tmp_path): "ro", f"{tmp_path}/data": "rw"}
    assert arguments.count("--mount") == 2


def test_paths_resolve_dots(shell, tmp_path):
    """A container has no folder `x`, so the shell must resolve the dots."""
    values = {"DATA": f"{tmp_path}/x/../y", "RUN": "../run"}
    assert shell('echo "$DATA $RUN"', **values).stdout == f"{tmp_path}/y {tmp_path.parent}/run\n"


@pytest.mark.parametrize("runtime", CONTAINERS)
@pytest.mark.parametrize(
    ("variables", "error"),
    [
        (
            {"MOUNTS": "/etc /nowhere"},
            "MOUNTS='/etc /nowhere': missing; expected one file or folder a line",
        ),
        (
            {"MOUNTS": "/etc\n/nowhere\n/usr"},
            "MOUNTS='/nowhere': missing; expected one file or folder a line",
        ),
        ({"MOUNTS": "/"}, "/: the node's root folder; expected a folder in it"),
        ({"RUN": "loop/run"}, "loop/run: expected a path without a loop of links"),
        (
            {"RUN": "a\nb"},
            "cannot mount $'{}/a\\nb': expected no line break, and no space at the end",
        ),
        (
            {"DATA": "blank "},
            "cannot mount '{}/blank ': expected no line break, and no space at the end",
        ),
        ({"IMAGE": ""}, "IMAGE: empty; expected the image for RUNTIME={runtime}"),
    ],
)
def test_containers_refuse_invalid_settings(refused, tmp_path, runtime, variables, error):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "blank ").mkdir()
    assert refused(RUNTIME=runtime, **variables).endswith(
        error.replace("{}", str(tmp_path)).replace("{runtime}", runtime)
    )


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("DATA", "a:b"),
        ("RUN", "a,b"),
        ("PWD", "two words"),
        ("LOCAL", "a:b"),
        ("MOUNTS", "two words"),
        ("MOUNTS", "a:b"),
    ]
    + [
        ("MOUNTS", "a,b"),
        ("MOUNTS", 'a"b'),
        ("MOUNTS", "a$b"),
        ("MOUNTS", "a`b"),
        ("MOUNTS", "a\\b"),
    ],
)
def test_pyxis_refuses_special_characters(refused, tmp_path, variable, name):
    (tmp_path / name).mkdir()
    values = (
        {"folder": tmp_path / name}
        if variable == "PWD"
        else {variable: name, "ARCHIVE": "data.tar"}
    )
    error = refused(RUNTIME="pyxis", **{"LOCAL": "/tmp", "IMAGE": f"{tmp_path}/image"} | values)
    assert error.startswith("RUNTIME=pyxis cannot mount '") and name in error


MISSING_IMAGE = "missing file; expected an image, or its address in a registry"


@pytest.mark.parametrize(
    ("runtime", "image", "expected"),
    [
        ("docker", "moco-mgd:0.1.0", "moco-mgd:0.1.0"),
        ("docker", "docker.io/x/y", "docker.io/x/y"),
        (
            "docker",
            "./image",
            "error: batch: IMAGE=./image: a file; expected a name that docker image ls shows",
        ),
        (
            "podman",
            "./image",
            "error: batch: IMAGE=./image: a file; expected a name that podman image ls shows",
        ),
        ("apptainer", "docker://x/y:z", "docker://x/y:z"),
        ("apptainer", "image", "{}/image"),
        (
            "apptainer",
            "x/y:z",
            f"error: batch: IMAGE=x/y:z: {MISSING_IMAGE}",
        ),
        ("pyxis", "x/y:z", "x/y:z"),
        ("pyxis", "image", "{}/image"),
        (
            "pyxis",
            "./a.sqsh",
            f"error: batch: IMAGE=./a.sqsh: {MISSING_IMAGE}",
        ),
        (
            "pyxis",
            "a.sqsh",
            f"error: batch: IMAGE=a.sqsh: {MISSING_IMAGE}",
        ),
    ],
)
def test_image_file_has_an_absolute_path(shell, tmp_path, runtime, image, expected):
    (tmp_path / "image").touch()
    done = shell('echo "$IMAGE"', RUNTIME=runtime, IMAGE=image, RUN="r")
    assert done.stdout + done.stderr == expected.replace("{}", str(tmp_path)) + "\n"


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"RUNTIME": "rkt"}, "RUNTIME=rkt: expected none, docker, podman, apptainer or pyxis"),
        (
            {"RUNTIME": "none", "VENV": "nowhere"},
            "VENV=nowhere: no bin/activate; expected a virtual environment. Run make setup",
        ),
        (
            {"RUNTIME": "none", "VENV": "", "MAX_REQUEUES": "many"},
            "MAX_REQUEUES=many: expected an integer of 0 or more",
        ),
        (
            {"RUNTIME": "none", "VENV": "", "STOP_SECONDS": "-1"},
            "STOP_SECONDS=-1: expected an integer of 0 or more",
        ),
    ],
)
def test_settings_refuse_invalid_values(refused, variables, error):
    assert refused(**variables) == error


@pytest.mark.parametrize("runtime", CONTAINERS)
def test_containers_get_no_slurm_token(started, runtime):
    """Other variables are passed by name or in the environment, never in the arguments."""
    given = {"SLURM_JWT": "a token", "NCCL_DEBUG": "INFO", "AWS_KEY": "a key"}
    given |= {"FI_PROVIDER": "provider", "OFI_NCCL_PROTOCOL": "RDMA", "UCX_TLS": "rc,tcp"}
    given |= {"FI": "no prefix"}
    arguments, environment = started(runtime, **given, CUDA_VISIBLE_DEVICES="1")
    secret = environment["MGD_SECRET"]
    assert len(secret) > 32 and not any(
        value in word for value in [secret, *given.values()] for word in arguments
    )
    if runtime in ENGINES:
        passed = {*values_of("--env", arguments)}
        network = {"NCCL_DEBUG", "FI_PROVIDER", "OFI_NCCL_PROTOCOL", "UCX_TLS"}
        expected = {"MGD_SECRET", "SLURM_JOB_ID"} | network
        assert passed & {*given, "MGD_SECRET", "SLURM_JOB_ID"} == expected
    elif runtime == "apptainer":
        passed = {
            name[13:]: value
            for name, value in environment.items()
            if name.startswith("APPTAINERENV_")
        }
        assert (
            passed["MGD_SECRET"] == secret
            and passed["SLURM_JOB_ID"] == "7"
            and passed["CUDA_VISIBLE_DEVICES"] == "1"
        )
        assert not passed.keys() & {"SLURM_JWT", "AWS_KEY", "FI"} and passed["UCX_TLS"] == "rc,tcp"
    else:
        assert "SLURM_JWT" not in environment


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({}, None),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
        ({"SLURM_GPUS_ON_NODE": "2"}, "2"),
        ({"SLURM_STEP_GPUS": "1,3", "SLURM_GPUS_ON_NODE": "2"}, '"device=1,3"'),
        ({"SLURM_JOB_GPUS": "0,1"}, "all"),
    ],
    ids=str,
)
@pytest.mark.parametrize("runtime", ["docker", "apptainer"])
def test_containers_have_gpus_by_any_variable(started, runtime, variables, gpus):
    arguments, _ = started(runtime, **variables)
    if runtime == "apptainer":
        assert ("--nv" in arguments) == (gpus is not None)
    else:
        assert (arguments[arguments.index("--gpus") + 1] if "--gpus" in arguments else None) == gpus


@pytest.mark.parametrize(
    ("variables", "gpus"),
    [
        ({}, []),
        ({"SLURM_GPUS_ON_NODE": "2"}, ["all"]),
        ({"SLURM_STEP_GPUS": "1,3", "SLURM_JOB_GPUS": "0,1,3"}, ["1", "3"]),
    ],
    ids=str,
)
def test_podman_gets_gpus_as_devices(started, variables, gpus):
    arguments, _ = started("podman", **variables)
    assert values_of("--device", arguments) == [f"nvidia.com/gpu={n}" for n in gpus]


@pytest.mark.parametrize("runtime", CONTAINERS)
def test_mounts_include_the_files_of_nccl(started, tmp_path_factory, runtime):
    """NCCL finds a name without a folder in LD_LIBRARY_PATH, and itself reports a missing file."""
    site = tmp_path_factory.mktemp("site")
    for name in ("nccl.conf", "libnccl-net.so"):
        (site / name).touch()
    (site / "plugin.so").symlink_to("libnccl-net.so")
    given = {"NCCL_CONF_FILE": f"{site}/nccl.conf", "NCCL_TUNER_PLUGIN": "tuner"}
    given |= {"NCCL_NET_PLUGIN": f"{site}/plugin.so", "NCCL_TOPO_FILE": "/nowhere/topo.xml"}
    more = mounts(started(runtime, **given)[0]).items() - mounts(started(runtime)[0]).items()
    names = ("nccl.conf", "plugin.so", "libnccl-net.so")
    assert dict(more) == {f"{site}/{name}": "ro" for name in names}


def test_job_scripts_export_the_same_variables():
    files = (REPO / "slurm").glob("*.sbatch")
    lines = {line for file in files for line in file.read_text().splitlines() if "--export" in line}
    [names] = (line.partition("=")[2].split(",") for line in lines if line.startswith("#SBATCH"))
    assert names[:4] == ["HOME", "USER", "PATH", "LD_LIBRARY_PATH"]
    assert {"NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "NCCL_NET_PLUGIN", "FI_PROVIDER"} <= {*names}


def test_node_addresses_omit_loopback_names(shell):
    """A number stays. A name is resolved. Unknown names and the machine's own are omitted."""
    nodes = {
        "node1": "10.0.0.1",
        "node2": "lan-name",
        "node3": "own-name",
        "node4": "nowhere",
        "node5": "127.0.0.1",
    }
    lines = "\n".join(
        f"NodeName={name} Arch=x86_64 CoresPerSocket=1 NodeAddr={address} NodeHostName=h Port=1"
        for name, address in nodes.items()
    )
    resolve = """case $2 in
        *.*) echo "$2 STREAM" ;;
        lan-name) echo "10.0.0.2 STREAM lan-name" ;;
        own-name) echo "127.0.1.1 STREAM own-name" ;;
        *) exit 2 ;;
    esac"""
    done = shell(
        "node_addresses",
        {"scontrol": f"cat <<'END'\n{lines}\nEND", "getent": resolve},
        SLURM_JOB_NODELIST="node[1-5]",
    )
    assert (done.returncode, done.stdout) == (0, "node1=10.0.0.1 node2=10.0.0.2 node5=127.0.0.1 ")


CONTROL = """[ "$1" = requeue ] && echo "$*" || echo "JobId=7 JobState=RUNNING Reason=None\""""


def test_newest_checkpoint_on_a_disk_without_links(shell, linkless):
    """Next to a copy and an incomplete one. A job is requeued only if a try saves a newer one."""

    def newest(folder):
        return shell("newest_checkpoint", RUN=str(folder)).stdout.strip()

    assert newest(linkless / "missing") == newest(linkless) == "none"
    positions = ("9999_000012", "10000_000000", "9999_000100")
    for name in [*(f"checkpoint_{position}" for position in positions), "last", "best"]:
        (linkless / f"{name}.pth.tar").touch()
    (linkless / "checkpoint_10001_000000.pth.tar.new").touch()
    assert newest(linkless) == "checkpoint_10000_000000.pth.tar"
    needs = {"SLURM_JOB_ID": "7", "MAX_REQUEUES": "20", "RUN": str(linkless)}
    control = {"scontrol": CONTROL}
    ended = shell("settle 1", control, **needs)
    assert decisions(ended) == ["nothing-saved"]
    damaged = '"$RUN/checkpoint_10000_000000.pth.tar"'
    rewritten = f"rm {damaged}; echo >{damaged}; settle 1"
    requeued = shell(rewritten, control, **needs)
    assert decisions(requeued) == ["requeued"] and requeued.stdout.endswith("requeue 7\n")


def test_secret_is_new_in_each_try(shell):
    """It is only in the tasks' environment, which other users cannot read."""
    variables = NEEDS | {"MAX_REQUEUES": "0", "MGD_SECRET": "old"}
    programs = {
        "srun": 'echo "$MGD_SECRET" >>secrets; echo "$*"',
        "scontrol": "echo JobState=RUNNING",
    }
    outputs = [shell('run "$@"', programs, **variables).stdout for _ in range(2)]
    secrets = (shell.folder / "secrets").read_text().splitlines()
    assert len(set(secrets)) == 2 and all(len(secret) == 44 for secret in secrets)
    assert not any(secret in text for secret in secrets for text in outputs)
    assert "-m job.train" in outputs[0]


@pytest.mark.parametrize("moment", ["while srun starts", "before step is set"])
def test_signals_are_repeated(shell, moment):
    """srun loses a signal while it starts the tasks."""
    srun = """count=0
    trap 'count=$((count + 1)); [ $count = 1 ] || { echo "signals $count"; exit 1; }' USR2
    touch ready
    [ -n "$UNSET" ] || kill -USR2 $PPID
    for _ in $(seq 1000); do sleep 0.1; done"""
    unset = moment == "before step is set"
    signal = "until [ -e ready ]; do sleep 0.1; done; kill -USR2 $$"
    debug = f"set -T; trap 'case $BASH_COMMAND in step=*) {signal}; esac' DEBUG; " if unset else ""
    # Signals are repeated after 5 calls of `sleep 1`.
    programs = {"srun": srun, "scontrol": CONTROL, "sleep": f"{shutil.which('sleep')} 0.1"}
    variables = NEEDS | {"STOP_SECONDS": "9000", "UNSET": "1" if unset else ""}
    done = shell(debug + 'run "$@"', programs, **variables)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[3] == "signals 2" and lines[-1] == "requeue 7" and decisions(done) == ["requeued"]


DOWN = "echo 'Slurmctld is DOWN' >&2; exit 1"  # scontrol without a controller
RUNNING = "JobId=7 JobState=RUNNING Requeue=1 Restarts=0"


def controller(job=RUNNING, down_for=0):
    """A stand-in for scontrol that fails `down_for` times. `requeue` prints its arguments."""
    return {
        "sleep": "",
        "scontrol": f"""echo "$1" >>calls
        [ "$(grep -c . calls)" -gt {down_for} ] || {{ {DOWN}; }}
        case $1 in requeue) echo "$*" ;; show) echo "{job} Reason=None" ;; esac""",
    }


def calls(folder) -> list[str]:
    """Return the commands that the stand-in for scontrol received."""
    return (folder / "calls").read_text().split() if (folder / "calls").exists() else []


@pytest.mark.parametrize(
    ("status", "reason"),
    [(0, "complete"), (2, "mistake"), (1, "nothing-saved")],
)
def test_end_needs_no_controller(shell, tmp_path, status, reason):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/complete").write_text("done\n")
    done = shell('run "$@"', controller(down_for=99) | {"srun": f"exit {status}"}, **NEEDS)
    assert (done.returncode, done.stderr, decisions(done)) == (status, "", [reason])
    assert calls(tmp_path) == []


def test_end_needs_no_scontrol(shell, tmp_path):
    """Each task then resolves the nodes' addresses."""
    (tmp_path / "r").mkdir()
    lines = 'RUN=r; echo done >r/complete; exec 2>&1; PATH=$PWD/bin; run "$@"'
    link = "ln -s $PWD/srun $(which bash realpath mkdir cat sed awk grep sort tail head base64) bin"
    needs = NEEDS | {"MGD_NODE_ADDRESSES": ""}
    done = shell(f"mkdir bin; {link}; {lines}", {"srun": "exit 0"}, **needs)
    assert done.returncode == 0, done.stdout
    assert decisions(done) == ["complete"]


@pytest.mark.parametrize(
    ("lines", "down_for", "code", "last"),
    [
        ("", 3, 0, "requeue 7"),
        (
            "",
            99,
            2,
            "error: batch: not requeued: SLURM does not answer scontrol show job -o 7 "
            "(Slurmctld is DOWN)",
        ),
        (
            "command() { false; }",
            99,
            2,
            "error: batch: not requeued: no scontrol in PATH; expected SLURM's commands",
        ),
    ],
    ids=["down for a moment", "down", "not in PATH"],
)
def test_requeue_waits_for_the_controller(shell, tmp_path, lines, down_for, code, last):
    done = shell(f"{lines}\nsignalled=USR2; settle 0", controller(down_for=down_for), **NEEDS)
    assert done.returncode == code
    assert (done.stdout + done.stderr).splitlines()[-1].startswith(last), done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == (code > 0)
    assert len(calls(tmp_path)) == (0 if lines else 12 if code else 3 + 4)


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ("JobState=COMPLETING Requeue=1 Restarts=1", "requeued-by-slurm"),
        ("JobState=PENDING Requeue=1 Restarts=1", "requeued-by-slurm"),
        (
            "JobState=PENDING Reason=job_requeued_in_held_state Restarts=1",
            "held-by-slurm",
        ),
        ("JobState=COMPLETING Requeue=1 Restarts=0", "ended-by-slurm"),
        ("JobState=RUNNING Requeue=0 Restarts=0", "no-requeue"),
    ],
)
@pytest.mark.parametrize("most", ["20", "0"])
def test_decision_follows_slurm(shell, job, reason, most):
    """The reason is SLURM's even if MAX_REQUEUES forbids a requeue."""
    done = shell(
        "signalled=TERM; settle 143", controller(f"JobId=7 {job}"), **NEEDS | {"MAX_REQUEUES": most}
    )
    assert (done.returncode, done.stderr, decisions(done)) == (143, "", [reason])


def test_two_tries_without_a_checkpoint_end_a_job(shell, tmp_path):
    """A new checkpoint, and a try of another job, restart the count."""

    def ended(restarts, save="", job="7", lines="signalled=USR2; settle 0"):
        save = save and f"mkdir -p r; touch r/checkpoint_{save}_000000.pth.tar;"
        done = shell(
            f"{save} {lines}",
            controller(),
            **NEEDS | {"SLURM_RESTART_COUNT": restarts, "SLURM_JOB_ID": job},
        )
        [reason] = decisions(done)
        assert done.stdout.endswith(f"requeue {job}\n") == (reason in ("requeued", "late"))
        return reason

    late = "sleep() { :; }; STOP_SECONDS=1 requeue_late"
    assert not (tmp_path / "r").exists()  # as during staging
    assert ended("0") == ended("0") == "requeued"  # the same try
    assert ended("1", save="0001") == ended("2") == "requeued"
    assert ended("3") == ended("3", lines=late) == "nothing-saved-twice"
    assert ended("0", job="8") == "requeued"
    ended("1", save="0002", job="8", lines="settle 2")  # not requeued
    assert not (tmp_path / "r/.nothing-saved").exists()


def test_job_id_in_arrays(shell):
    """A job that is submitted from within an array inherits the array's number."""
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert shell("job_id", SLURM_JOB_ID="7", **array).stdout == "7_3\n"
    assert shell("job_id", SLURM_JOB_ID="8", **array).stdout == "8\n"
    assert shell("job_id", SLURM_JOB_ID="8").stdout == "8\n"


def test_try_is_a_record(shell, tmp_path):
    """mgd-watch finds a run folder of any name by this record."""
    control = "".join(map(chr, range(1, 32)))
    run = tmp_path / f'my "run" \\ & {control}\x7f é \udcff 1'  # \udcff: a byte that is not UTF-8
    done = shell(
        'run "$@"',
        {"srun": "exit 2"},
        **NEEDS | {"RUN": str(run), "SLURM_RESTART_COUNT": "1", "SLURM_JOB_NODELIST": "n[1-2]"},
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith('{"kind": "try"')]
    kind, record = read_record(line)
    assert kind == "try" and (record["number"], record["nodes"], record["run"]) == (
        2,
        "n[1-2]",
        str(run),
    )
    (tmp_path / "job.log").write_text(done.stdout, encoding="utf-8", errors="surrogateescape")
    [source] = discover.find(tmp_path / "job.log", {})
    assert source.path == run and source.log.content.tries == 2


def test_heterogeneous_job_is_refused(shell):
    het = {"SLURM_HET_SIZE": "2", "SLURM_JOB_ID_HET_GROUP_0": "7"}
    done = shell("echo started", SLURM_JOB_ID="7", **het)
    assert (done.returncode, done.stdout) == (2, "")
    line = "error: batch: a heterogeneous job of 2 components; expected one. "
    assert done.stderr == line + "Submit it without ':' and 'hetjob'\n"
    other = shell("echo started", SLURM_JOB_ID="9", **het)  # submitted from within such a job
    assert other.stdout == "started\n"


def test_environment_drops_harmful_variables(shell):
    """They would replace packages or ranks. The repository's own package runs."""
    harmful = ["PYTHONPATH", "PYTHONHOME", "HOROVOD_RANK", "HOROVOD_SIZE"]
    harmful += ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"]
    kept = {"HOROVOD_GLOO_IFACE": "ib0", "NCCL_DEBUG": "INFO", "LD_LIBRARY_PATH": "/lib"}
    names = " ".join(f'"{name} ${{{name}-}}"' for name in [*harmful, *kept])
    done = shell(f'printf "%s\\n" {names}', **dict.fromkeys(harmful, "x"), **kept)
    assert done.stdout.splitlines() == [
        *(f"{name} " for name in harmful),
        *(f"{name} {value}" for name, value in kept.items()),
    ]
    needs = {"RUNTIME": "none", "VENV": "", "PYTHONPATH": "/x"}
    done = shell('start_tasks "$@"', {"srun": 'echo "$PYTHONPATH $PYTHONSAFEPATH"'}, **needs)
    assert done.stdout == f"{REPO} 1\n"


def test_job_scripts_find_the_repository_alike():
    """Each has the lines, because SLURM runs a copy of the script without its folder."""
    scripts = {path.name: path.read_text() for path in (REPO / "slurm").glob("*.sbatch")}
    assert len(scripts) == 3
    blocks = {
        text[text.index("# SLURM runs a copy") : text.index("\nfi\n\n", text.index("exit 2"))]
        for text in scripts.values()
    }
    assert len(blocks) == 1


def test_run_folder_error_is_one_line(shell):
    done = shell('run "$@"', controller(), **NEEDS | {"RUN": "/proc/nowhere"})
    assert done.returncode == 2
    line = "error: batch: RUN=/proc/nowhere: No such file or directory; "
    assert done.stderr == f"{line}expected a folder that this job can make. Choose another\n"


def test_pyxis_accepts_any_archive_name(shell):
    """Its files are unpacked into a folder with a plain name."""
    given = {
        "RUNTIME": "pyxis",
        "IMAGE": "registry/image",
        "ARCHIVE": "/shared/my data, all.tar",
        "LOCAL": "/tmp/local",
        "RUN": "r",
    }
    assert shell("echo fine", **given).stdout == "fine\n"
