"""horovodrun as docker/build_horovod.sh builds it."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from horovod.runner.common.util import safe_shell_exec

from disks import mount, unmount

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[2]


def horovodrun(program="print('started')", workers=1, **variables):
    """Return the exit code, the last line of stdout, and whether stderr has a traceback."""
    launcher = os.path.join(os.path.dirname(sys.executable), "horovodrun")
    command = [launcher, "-np", str(workers), sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    return done.returncode, done.stdout.strip().splitlines()[-1:], "Traceback" in done.stderr


def test_invalid_home_is_ignored():
    assert horovodrun(HOME="/dev/null/home") == (0, ["[0]<stdout>:started"], False)


@pytest.mark.parametrize("option", ["ro", "size=4k"], ids=["read-only", "full"])
def test_unwritable_home_is_ignored(tmp_path, option):
    mount("-t", "tmpfs", "-o", option, "tmpfs", tmp_path)
    try:
        if option != "ro":
            (tmp_path / "filler").write_bytes(bytes(4096))
        assert horovodrun(HOME=str(tmp_path)) == (0, ["[0]<stdout>:started"], False)
    finally:
        unmount(tmp_path)


def test_writable_home_has_the_cache(tmp_path):
    assert horovodrun(HOME=str(tmp_path))[:2] == (0, ["[0]<stdout>:started"])
    assert (tmp_path / ".horovod" / "cache.bin").stat().st_size


@pytest.mark.short
def test_exit_code_is_the_first_failed_worker_s():
    """The launcher ends the other worker, which would wait for an hour."""
    wait = "import os, sys, time; os.environ['HOROVOD_RANK'] == '0' and time.sleep(3600)"
    code, _, traceback = horovodrun(f"{wait}; sys.exit(2)", workers=2)
    assert code == 2 and not traceback


@pytest.mark.parametrize("state", [">/dev/full", ">&-"], ids=["full", "closed"])
def test_unwritable_output_does_not_block_workers(tmp_path, state):
    """The worker prints more than a pipe holds."""
    launcher = os.path.join(os.path.dirname(sys.executable), "horovodrun")
    program = f"print(('x' * 100 + '\\n') * 2000, flush=True); open({str(tmp_path / 'end')!r}, 'w')"
    command = [launcher, "-np", "1", sys.executable, "-c", program]
    shell = ["bash", "-c", f'exec "$@" {state}', "-", *command]
    process = subprocess.Popen(shell, stderr=subprocess.PIPE, start_new_session=True)
    try:
        process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0 and (tmp_path / "end").exists()


@pytest.mark.parametrize(
    "line", ["{}; code=$?; sleep 1; exit $code", "exec {}"], ids=["slow", "none"]
)
@pytest.mark.short
def test_exit_code_of_a_worker_ended_by_a_signal(tmp_path, line):
    """Its shell ends a second later, or the worker has replaced the shell, as in bash."""
    up, stop = tmp_path / "up", threading.Event()
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, [15])"
    wait = f"{block}; open({str(up)!r}, 'w'); signal.sigwait([15])"
    program = f"import signal, sys; {wait}; sys.exit(7)"
    command = line.format(shlex.join([sys.executable, "-c", program]))
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(safe_shell_exec.execute, command, env=dict(os.environ), events=[stop])
        while not up.exists() and not ended.done():
            time.sleep(0.02)
        stop.set()
        assert ended.result() == 7


def test_shell_that_outlives_its_worker_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_shell_exec, "GRACEFUL_TERMINATION_TIME_S", 0.5)
    command = ["sh", "-c", f"sleep 1000; read line; touch {shlex.quote(str(tmp_path / 'end'))}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as shell:
        late = threading.Timer(20, shell.stdin.close)  # ends an endless wait
        late.start()
        while not psutil.Process(shell.pid).children():
            time.sleep(0.02)
        safe_shell_exec.terminate_executor_shell_and_children(shell.pid)
        late.cancel()
        shell.wait()
    assert not (tmp_path / "end").exists()


def test_build_names_its_option_if_home_is_unwritable():
    environment = os.environ | {"HOME": "/dev/null/home"}
    for name in ("XDG_CACHE_HOME", "HOROVOD_WHEELS"):
        environment.pop(name, None)
    done = subprocess.run(
        [REPO / "docker" / "build_horovod.sh", sys.executable],
        env=environment,
        capture_output=True,
        text=True,
    )
    problem = "/dev/null/home/.cache/moco-mgd/wheels: cannot be written to"
    fix = "expected a folder for the wheel. Set HOROVOD_WHEELS to another one"
    assert (done.returncode, done.stderr) == (2, f"build_horovod: {problem}; {fix}\n")
