"""What a run that Python code calls leaves of its process, and how it ends."""

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
    "a mistake": ZeroDivisionError(),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_process_is_as_before(run, end, monkeypatch):
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
            except (KeyboardInterrupt, RunError, ZeroDivisionError) as found:
                assert isinstance(found, KeyboardInterrupt) == isinstance(error, Stopped)
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

with contextlib.suppress(ZeroDivisionError), called(Run(sys.argv[1], keep=1)):
    keep_freed_memory()
    print(kept_memory())
    if sys.argv[2] == "a mistake":
        raise ZeroDivisionError
print(kept_memory())
"""


@pytest.mark.parametrize("end", ["complete", "a mistake"])
def test_malloc_returns_freed_memory_again(tmp_path, end):
    """In a process of its own: in one with a used heap, the freed blocks are not at its end."""
    program = [sys.executable, "-c", MEMORY, str(tmp_path / "run"), end]
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        program, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    within, after = (int(line) for line in done.stdout.split()[-2:])
    largest = 2**27  # bytes; malloc keeps half of it
    assert after < largest < within


@pytest.mark.parametrize("incomplete", ["", "stopped by a signal: half a file"])
def test_a_signal_is_an_interrupt_with_what_to_do(run, capsys, incomplete):
    with pytest.raises(KeyboardInterrupt) as ended:
        with called(run, incomplete):
            os.kill(os.getpid(), signal.SIGTERM)
            assert list(run.rounds(9)) == [1, 2, 3]
    assert ended.value.args == (incomplete or RESUME,)
    assert ("--resume auto" in capsys.readouterr().out) == (not incomplete)


def test_outside_the_main_thread_no_handler_is_set(run):
    found, before = [], [signal.getsignal(number) for number in SIGNALS]

    def work():
        with called(run):
            found.append([signal.getsignal(number) for number in SIGNALS])
            found.append(result(run).numbers)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, {}]


def test_a_second_run_waits_for_the_end_of_the_first(run, tmp_path):
    with called(run):
        with pytest.raises(RunError, match="another run is in progress in this process"):
            with called(Run(str(tmp_path / "other"), keep=1)):
                pass
    with called(Run(str(tmp_path / "other"), keep=1)) as other:
        assert other.rank == 0


def test_processes_of_the_caller_stay(run):
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
def test_the_caller_s_own_fork_server_blocks_no_signals(run):
    before = state()
    with called(run):
        start_fork_server()
        assert server_id()
        multiprocessing.get_start_method()  # as the start of a process does
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


def test_options_are_checked_as_those_of_a_command_line(tmp_path):
    lists = {"more_data": ("b", "c"), "distill": ("gram",)}
    given = Config(data=tmp_path / "a", **lists, lr="3e-2", epochs=7)
    found = cli.checked(given)
    assert (found.data, found.more_data) == (f"{tmp_path}/a", ["b", "c"])
    assert found.distill == ["gram"]
    assert (found.lr, found.epochs) == (0.03, 7)
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
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(RunError, match=message):
        cli.checked(Config(**({"data": "a"} if options else {}) | options))
