"""Set-up of tests of several workers: `horovodrun -np N python -m pytest -q tests/workers`.

Plain pytest runs them with one worker. Every worker runs the same tests in the same order. A test
asserts after its last collective, on values that all workers have. If it failed before that on one
worker, the others would wait.
"""

import contextlib
import os
import shutil
import sys
import tempfile

import pytest
import torch

RANK = int(os.environ.get("HOROVOD_RANK", 0))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Give each worker its own folder: in a common one they would remove each other's files."""
    config.option.basetemp = tempfile.mkdtemp(prefix=f"pytest-worker{RANK}-")


@pytest.hookimpl(trylast=True)  # after the reporter has been registered
def pytest_configure(config):
    if RANK:
        config.pluginmanager.unregister(name="terminalreporter")


def pytest_sessionfinish(session, exitstatus):
    if exitstatus == pytest.ExitCode.OK:
        shutil.rmtree(session.config.option.basetemp, ignore_errors=True)


def pytest_runtest_logreport(report):
    if RANK and report.failed:
        print(
            f"{report.nodeid} on worker {RANK}:\n{report.longreprtext}", file=sys.stderr, flush=True
        )


@pytest.hookimpl(trylast=True)
def pytest_unconfigure():
    """End together: when one worker ends, the launcher kills the others, maybe before a summary."""
    sys.stdout.flush()
    if comm := sys.modules.get("job.cluster.comm"):
        with contextlib.suppress(comm.WorkerGone):
            comm.total(torch.ones(1), "leave")


@pytest.fixture(scope="session", autouse=True)
def run(tmp_path_factory):
    """The session's only run, on CPUs. If a worker is missing in a collective, it ends soon."""
    from job.engine.run import Run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "20")
        patch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "60")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        run = Run(str(tmp_path_factory.mktemp("run")), keep=1).__enter__()
    torch.set_num_threads(1)
    run.stop.restore()
    return run
