"""Runs started by Python code: the process's state afterwards, signals, options."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from multiprocessing import forkserver

import cv2
import pytest
import torch

from job import cli
from job.cluster.deterministic import apply, prepare
from job.cluster.stop import SIGNALS, Stopped
from job.config import Config, LinearConfig
from job.data.images import prepare_process
from job.data.fork_server import server_id, start_fork_server
from job.engine.call import RESUME, called, result
from job.engine.run import Run
from job.errors import RunError
from process import different, state


@pytest.fixture
def run(tmp_path):
    return Run(str(tmp_path / "run"), keep=1)


ENDS = {
    "complete": None,
    "stopped": Stopped(),
    "refused": RunError("no"),
    "failed": ZeroDivisionError(),
}


@pytest.mark.parametrize("end", ENDS)
def test_called_restores_the_process(run, end, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "7")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    signal.signal(signal.SIGUSR2, lambda *_: None)
    threads, error = (torch.get_num_threads(), cv2.getNumThreads()), ENDS[end]
    torch.set_num_threads(3)
    cv2.setNumThreads(2)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            before = state()
            try:
                with called(run):
                    assert signal.getsignal(signal.SIGINT) == run.stop.note
                    assert torch.is_grad_enabled() and not torch.backends.cudnn.benchmark
                    torch.nn.Linear(2, 2).weight.sum().backward()
                    assert torch.rand(1).dtype == torch.float32
                    torch.backends.cudnn.deterministic = True
                    apply({"deterministic": True}, torch.device("cuda"))
                    prepare({"deterministic": True})
                    os.environ["HOROVOD_CYCLE_TIME"] = os.environ["MGD_NEW"] = "1"
                    gc.freeze()
                    prepare_process()
                    sys.path.append("modules of --log-to")
                    assert cv2.getNumThreads() == 1
                    assert warnings.filters[0][3].match("PIL.Image")
                    if error:
                        raise error
            except (KeyboardInterrupt, RunError, ZeroDivisionError) as raised:
                assert isinstance(raised, KeyboardInterrupt) == isinstance(error, Stopped)
            assert not different(before, state())
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
        torch.set_default_dtype(torch.float32)
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)


MEMORY = """
import contextlib, sys
from job.cluster.memory import keep_freed_memory
from job.engine.call import called
from job.engine.run import Run
from process import kept_memory

for error in (None, ZeroDivisionError):
    with contextlib.suppress(ZeroDivisionError), called(Run(sys.argv[1], keep=1)):
        keep_freed_memory()
        print("kept", kept_memory())
        if error:
            raise error
    print("kept", kept_memory())
"""


@pytest.mark.slow
def test_called_restores_malloc(tmp_path):
    """An error does not prevent it.

    It needs a new process, because in a used heap the freed blocks are not at the end.
    """
    program = [sys.executable, "-c", MEMORY, str(tmp_path / "run")]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        program, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    kept = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("kept ")]
    largest = 2**27  # bytes, of which malloc keeps half
    assert [size > largest for size in kept] == [True, False] * 2


@pytest.mark.parametrize("incomplete", ["", "stopped by a signal: half a file"])
def test_signal_raises_keyboard_interrupt(run, capsys, incomplete):
    with pytest.raises(KeyboardInterrupt) as ended:
        with called(run, incomplete):
            os.kill(os.getpid(), signal.SIGTERM)
            assert list(run.rounds(9)) == [1, 2, 3]
    assert ended.value.args == (incomplete or RESUME,)
    assert ("--resume auto" in capsys.readouterr().out) == (not incomplete)


def test_other_thread_sets_no_handler(run):
    seen, before = [], [signal.getsignal(number) for number in SIGNALS]

    def work():
        with called(run):
            seen.append([signal.getsignal(number) for number in SIGNALS])
            seen.append(result(run).numbers)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, {}]


def test_called_refuses_a_second_run(run, tmp_path):
    with called(run):
        with pytest.raises(RunError, match="another run is in progress in this process"):
            with called(Run(str(tmp_path / "other"), keep=1)):
                pass
    with called(Run(str(tmp_path / "other"), keep=1)) as other:
        assert other.rank == 0


def test_called_keeps_the_caller_s_processes(run):
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    try:
        with called(run):
            pass
        assert process.is_alive()
    finally:
        process.kill()
        process.join()


@pytest.mark.slow
def test_fork_server_of_caller_blocks_no_signals(run):
    before = state()
    with called(run):
        start_fork_server()
        assert server_id()
        multiprocessing.get_start_method()  # starting a process calls it too
    assert server_id() is None and not different(before, state())
    process = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(600,))
    try:
        process.start()
        process.terminate()
        process.join(60)
        assert process.exitcode == -signal.SIGTERM
        with called(run):
            start_fork_server()
        assert server_id()  # the caller's
    finally:
        forkserver._forkserver._stop()  # loader processes of other tests need their own


def test_options_are_converted(tmp_path):
    lists = {"more_data": ("b", "c"), "distill": ("gram",)}
    config = cli.checked(Config(data=tmp_path / "a", **lists, lr="3e-2", epochs=7))
    assert (config.data, config.more_data) == (f"{tmp_path}/a", ["b", "c"])
    assert config.distill == ["gram"]
    assert (config.lr, config.epochs) == (0.03, 7)
    assert cli.checked(LinearConfig(data="a", batch_size=512, lars=True)).lr == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "^DIR: missing; expected a folder"),
        ({"epochs": 0}, "^--epochs 0: expected at least 1"),
        ({"arch": "resnet19"}, "^--arch 'resnet19': did you mean resnet1"),
        ({"mlp": "yes"}, "^--mlp 'yes': expected true or false"),
        ({"data": 3.5j}, "^--data 3.5j: expected text"),
    ],
)
def test_options_refuse_invalid_values(options, message):
    with pytest.raises(RunError, match=message):
        cli.checked(Config(**({"data": "a"} if options else {}) | options))
