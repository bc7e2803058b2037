"""Jobs on a real SLURM of two nodes, and each event in the table of slurm/README.md."""

import http.client
import http.server
import os
import re
import shutil
import signal
import socket
import tarfile
import threading

import psutil
import pytest
import torch

from jobs import REPO, SIMSIAM, SMALL, STEPS, TEACHER, BatchJob
from runs import differences, of_kind, records

SIGNAL = "signal USR2: the tasks finish their step and save"


@pytest.fixture
def prolog(tmp_path):
    """A function that writes a task prolog, shell lines that each task runs first.

    They can print `export NAME=VALUE` to set a variable of the task.
    """

    def write(lines):
        path = tmp_path / "prolog.sh"
        path.write_text(f"#!/bin/bash\n{lines}\n")
        path.chmod(0o755)
        return {"SLURM_TASK_PROLOG": path}

    return write


def check_complete(job, undisturbed, workers=2, teacher=False, options=SMALL):
    """Check that a job is complete: each step once, and the bytes of an uninterrupted run."""
    assert job.wait_for_end() == "COMPLETED", job.text()
    job.wait_for_decision("complete", seconds=5)
    assert job.steps() == list(range(1, STEPS + 1))
    assert (job.run / "last.pth.tar").resolve().name == "checkpoint_0003_000000.pth.tar"
    assert differences(undisturbed(workers, teacher, options=options), job.run) == []


@pytest.mark.parametrize(
    ("sbatch", "workers"), [([], 4), (["--ntasks=3"], 3)], ids=["2 nodes x 2", "2 and 1"]
)
def test_job_trains_like_horovodrun(submit, undisturbed, teacher_file, sbatch, workers):
    """The digits are the same. After the start, the rendezvous is closed."""
    job = submit([*SMALL, *TEACHER, teacher_file], tasks_per_node=2, sbatch=sbatch)
    job.wait_for_step(1)
    preflight = next(line for line in job.text().splitlines() if "rendezvous" in line)
    nodes = f"{workers} workers on 2 nodes, 2 of them on node1, launcher srun; "
    assert preflight.startswith(f"{nodes}interface lo, rendezvous 127.0.0.1:")
    versions = (f"torch {torch.__version__}", "Horovod 0.28.1", "NCCL", "no container")
    assert all(version in preflight for version in versions)
    port = int(re.search(r"127.0.0.1:(\d+)", preflight)[1])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    check_complete(job, undisturbed, workers, teacher=True)
    assert records(job.run) == records(undisturbed(workers, teacher=True))
    assert job.decisions() == ["complete"]


def test_killed_rank_is_requeued(submit, undisturbed):
    """It ends in the same bytes. SimSiam synchronises batch norms over the nodes."""
    job = submit(SIMSIAM)
    job.wait_for_step(4)
    job.tasks()[1].send_signal(signal.SIGKILL)
    job.wait_for_decision("requeued")
    assert re.search(r"srun: error: node2: task 1: Killed", job.text())
    check_complete(job, undisturbed, options=SIMSIAM)


def test_rank_0_killed_in_a_save(submit, undisturbed):
    job = submit(SMALL)
    job.wait_for_step(1)
    tasks = job.tasks()
    job.wait("the first save", (job.run / "last.pth.tar").exists)
    job.wait("another save", lambda: list(job.run.glob("checkpoint_*.new")), pause=0.001)
    tasks[0].send_signal(signal.SIGKILL)
    job.wait("the end of rank 0", lambda: not tasks[0].is_running())
    [half] = job.run.glob("checkpoint_*.new")
    last = (job.run / "last.pth.tar").resolve()
    assert not half.with_suffix("").exists() and last.name < half.name
    assert torch.load(last, weights_only=True)["step"] in (0, 2)
    job.wait_for_decision("requeued")
    assert re.search(r"srun: error: node1: task 0: Killed", job.text())
    check_complete(job, undisturbed)


@pytest.mark.parametrize(
    "how",
    [
        ["scancel", "--batch", "--signal=USR2"],
        ["scancel", "--batch", "--signal=TERM"],
        ["scancel", "--signal=TERM"],
        ["scontrol", "requeue"],
        ["twice"],
    ],
    ids=" ".join,
)
def test_signal_saves_and_requeues_once(slurm, submit, undisturbed, how):
    """--save-every is an epoch, so only the signal can have saved in the first epoch."""
    job = submit([*SMALL, "--save-every", 1])
    job.wait_for_step(1)
    if how == ["twice"]:
        slurm("scancel", "--batch", "--signal=USR2", job.number)
        slurm("scancel", "--batch", "--signal=USR2", job.number)
    else:
        slurm(*how, job.number)
    job.wait_for_stop()
    saved = of_kind(job.run, "saved")[-1]
    check_complete(job, undisturbed)
    [resumed] = of_kind(job.run, "resumed")
    assert (resumed["epoch"], resumed["step"]) == (saved["epoch"], saved["step"])
    assert job.shown("Restarts") == "1"
    assert job.decisions() == [
        "requeued-by-slurm" if how == ["scontrol", "requeue"] else "requeued",
        "complete",
    ]


def test_time_limit_saves_and_requeues(slurm, submit, undisturbed):
    """A lower limit makes the signal due. SLURM sends it within half a minute.

    One task is suspended until then. All limits are hours away, so the job can be slow.
    """
    high, low = "timelimit=10:00:00", "timelimit=2:00:00"
    ahead = 4 * 60 * 60  # s
    sbatch = [f"--{high.replace('limit', '')}", f"--signal=B:USR2@{ahead}"]
    job = submit([*SMALL, "--save-every", 1], sbatch=sbatch)
    job.wait_for_step(1)
    task = job.tasks()[1]
    task.suspend()
    assert SIGNAL not in job.text()
    slurm("scontrol", "update", f"jobid={job.number}", low)
    job.wait_for_line(SIGNAL)
    slurm("scontrol", "update", f"jobid={job.number}", high)  # the next try has no signal
    task.resume()
    job.wait_for_stop()
    job.wait_for_decision("requeued")
    check_complete(job, undisturbed)
    assert job.text().count(SIGNAL) == 1 and job.shown("Restarts") == "1"


def test_signal_before_horovod_starts_requeues(slurm, submit, undisturbed):
    job = submit(SMALL)
    job.wait("the first try", lambda: job.records("try"))
    slurm("scancel", "--batch", "--signal=USR2", job.number)
    job.wait_for_decision("requeued")
    assert "launcher srun" not in job.text()  # the first line after the start of Horovod
    check_complete(job, undisturbed)
    assert job.shown("Restarts") == "1"


def test_signal_during_staging_requeues(slurm, submit, images, undisturbed, tmp_path):
    """The archive is a pipe without data in the first try."""
    archive = tmp_path / "photos.tar"
    os.mkfifo(archive)
    job = submit(SMALL, ARCHIVE=archive, LOCAL=tmp_path / "local", DATA="")
    job.wait_for_line("data: copying")
    slurm("scancel", "--batch", "--signal=USR2", job.number)
    job.wait_for_decision("requeued", seconds=60)
    archive.unlink()
    with tarfile.open(archive, "w") as file:
        file.add(images, "photos")
    check_complete(job, undisturbed)


def test_late_tasks_are_requeued(slurm, submit, undisturbed):
    job = submit(SMALL, STOP_SECONDS=3, HOROVOD_STALL_CHECK_TIME_SECONDS=300)
    job.wait_for_step(4)
    tasks = job.tasks()
    tasks[1].send_signal(signal.SIGSTOP)
    slurm("scancel", "--batch", "--signal=USR2", job.number)
    job.wait_for_decision("late", seconds=20)
    check_complete(job, undisturbed)
    assert job.shown("Restarts") == "1"


@pytest.mark.short
def test_scancel_leaves_no_process(slurm, submit):
    job = submit(SMALL)
    job.wait_for_step(2)
    slurm("scancel", job.number)
    job.wait("the end of all processes", lambda: not job.processes(), 60)
    assert job.wait_for_end() == "CANCELLED"
    assert "requeued" not in job.decisions() and "Traceback" not in job.text()
    assert job.shown("Restarts") == "0"


def test_failed_node_requeues(slurm, submit, undisturbed):
    job = submit(SMALL)
    job.wait_for_step(4)
    slurm("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    job.wait("the job's requeue", lambda: job.shown("JobState") == "PENDING")
    # The node may already have resumed.
    slurm("scontrol", "update", "nodename=node2", "state=resume", check=False)
    check_complete(job, undisturbed)
    assert job.shown("Restarts") == "1"
    assert of_kind(job.run, "resumed")
    log = (slurm.folder / "log/slurmctld.log").read_text()
    assert re.search("requeue.* due to failure of node node2", log)


def test_preempted_job_resumes(slurm, submit, undisturbed, tmp_path):
    job = submit(SMALL, sbatch=["--exclusive"])
    job.wait_for_step(2)
    arguments = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent"]
    slurm("sbatch", *arguments, "--wrap", "sleep 3")
    job.wait("the job's requeue", lambda: job.shown("JobState") == "PENDING")
    check_complete(job, undisturbed)
    assert of_kind(job.run, "resumed")


def test_ranks_wait_for_a_late_rank(submit, undisturbed, prolog, tmp_path):
    seen = tmp_path / "seen"
    hold = prolog(f'while [ "$SLURM_PROCID" = 1 ] && [ ! -e {seen} ]; do sleep 0.1; done')
    job = submit(SMALL, **hold)
    job.wait_for_line("waiting for rank 1 of 2 to start")
    seen.touch()
    check_complete(job, undisturbed)


class StandIn(http.server.BaseHTTPRequestHandler):
    """Another user's server at the rendezvous' port. It answers 200 with the request's path."""

    def do_GET(self):
        self.server.paths.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.path.encode())

    do_PUT = do_GET

    def log_message(self, *arguments):
        pass


def test_rendezvous_resists_other_users(slurm, submit, undisturbed, prolog, tmp_path):
    """Another server has the first port. While rank 1 waits, attackers connect to the rendezvous.

    Some send malformed requests, others stay silent.
    """
    attacked = tmp_path / "attacked"
    hold = prolog(f'while [ "$SLURM_PROCID" = 1 ] && [ ! -e {attacked} ]; do sleep 0.1; done')
    job = submit(SMALL, sbatch=["--hold"], **hold)
    port = 20000 + int(job.number) * 8 % 10000
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), StandIn)
    server.paths = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        slurm("scontrol", "release", job.number)
        job.wait("the rendezvous", lambda: not socket.socket().connect_ex(("127.0.0.1", port + 1)))
        paths = ["/started/x", "/go/all", "/global/0", f"/{'0' * 64}/started/1"]
        for path in [*paths, *["/started/1"] * 101]:
            client = http.client.HTTPConnection("127.0.0.1", port + 1, timeout=30)
            client.request("PUT", path, body=b"x" * 1000)
            assert client.getresponse().status in (400, 403)
        silent = [socket.create_connection(("127.0.0.1", port + 1)) for _ in range(100)]
        attacked.touch()
        job.wait_for_step(1)
        secret = job.tasks()[0].environ()["MGD_SECRET"]
    finally:
        server.shutdown()
        server.server_close()
    for client in silent:
        client.close()
    assert server.paths and all(path.startswith("/hello/") for path in server.paths)  # no token
    assert f"rendezvous 127.0.0.1:{port + 1};" in job.text()
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not any(secret in word for line in lines for word in line)
    check_complete(job, undisturbed)
    assert not any(secret.encode() in path.read_bytes() for path in (job.log, *job.run.iterdir()))


@pytest.mark.parametrize(
    ("lines", "variables", "error"),
    [
        (
            'if [ "$SLURM_PROCID" = 0 ]; then sleep 600; fi',
            {"MGD_START_SECONDS": 3},
            "error: rank 1 on node2: no answer from rank 0's rendezvous at 127.0.0.1",
        ),
        (
            "",
            {"MGD_NODE_ADDRESSES": "node1=203.0.113.9"},
            "error: rank 0 on node1: the address of node2 is unknown",
        ),
        (
            "",
            {"HOROVOD_GLOO_IFACE": "nosuch0"},
            "error: rank 0 on node1: HOROVOD_GLOO_IFACE=nosuch0",
        ),
        (
            'if [ "$SLURM_PROCID" = 1 ]; then echo "export HOROVOD_GLOO_IFACE=nosuch1"; fi',
            {},
            "error: rank 1 on node2: HOROVOD_GLOO_IFACE=nosuch1",
        ),
    ],
    ids=["unreachable", "unknown address", "wrong interface", "wrong interface on one node"],
)
def test_start_errors_are_one_line(submit, prolog, lines, variables, error):
    job = submit(SMALL, **prolog(lines), **variables)
    job.wait("a decision", job.decisions, 60)
    errors = [line for line in job.text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(error), job.text()
    assert "Traceback" not in job.text()
    assert job.wait_for_end() == "FAILED"
    assert job.shown("Restarts") == "0"


FAILING_UPDATE = """
import sys
if "job.train" in sys.orig_argv:
    import torch
    update, steps = torch.optim.SGD.step, iter(range(5))
    def step(self):
        if next(steps, None) is None:
            raise MemoryError
        return update(self)
    torch.optim.SGD.step = step
"""


def test_exception_on_one_rank_is_one_line(submit, prolog, tmp_path):
    """On one node, Python imports a module at its start that makes the sixth update fail."""
    (tmp_path / "sitecustomize.py").write_text(FAILING_UPDATE)
    export = f"export PYTHONPATH={tmp_path}:$PYTHONPATH"
    lines = f'if [ "$SLURM_PROCID" = 1 ]; then echo "{export}"; fi'
    job = submit([*SMALL, "--save-every", 3], **prolog(lines))
    job.wait_for_decision("nothing-saved")
    errors = [line for line in job.text().splitlines() if line.startswith("error: ")]
    assert errors == ["error: rank 1 on node2: MemoryError: "], job.text()
    assert job.steps()[:5] == [1, 2, 3, 4, 5]
    assert re.search(r"srun: error: node2: task 1: Exited with exit code 1", job.text())
    assert job.wait_for_end() == "FAILED"


@pytest.mark.parametrize(("stopped", "reporter"), [(1, "rank 0 on node1"), (0, "rank 1 on node2")])
def test_stalled_rank_is_reported_and_ends_the_try(submit, stopped, reporter):
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": 3, "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": 8}
    job = submit(SMALL, MAX_REQUEUES=0, **limits)
    job.wait_for_step(2)
    job.tasks()[stopped].send_signal(signal.SIGSTOP)
    other = f"rank {stopped} on node{stopped + 1} does not answer: it is stopped or unreachable"
    job.wait_for_line(other)
    report = next(line for line in job.text().splitlines() if other in line)
    awaited = r"('\S+'|the gradient of \S+) at \S+:\d+"
    assert re.fullmatch(rf"warning: {reporter} waits for {awaited} for [3-5] s; {other}", report)
    job.wait_for_line(f"error: {reporter} waits for")
    job.wait("a decision", job.decisions, 60)
    assert job.wait_for_end() == "FAILED"


@pytest.mark.short
def test_mistake_is_not_requeued(submit):
    job = submit([*SMALL, "--batch-size", "13"])
    assert job.wait_for_end() == "FAILED"
    # srun and slurmstepd print other errors, slurmstepd only if the tasks end one after the other.
    errors = [line for line in job.text().splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: --batch-size 13 cannot be shared equally by 2 workers: choose 12 or 14"
    ]
    assert job.decisions() == ["mistake"]
    assert job.shown("ExitCode") == "2:0"


def test_complete_run_is_not_trained_again(submit, undisturbed):
    job = submit(SMALL)
    check_complete(job, undisturbed)
    again = submit(SMALL, run=job.run)
    check_complete(again, undisturbed)
    assert "epoch 0 step" not in again.text()


def test_horovodrun_in_each_task_is_refused(submit, tmp_path, images):
    """Each task of srun would be a separate run, and overwrite the others' files."""
    script = tmp_path / "wrong.sbatch"
    program = f"python -m job.train {images} {' '.join(SMALL)} --out {tmp_path}/run9"
    script.write_text(f"#!/bin/bash\nsrun horovodrun -np 2 {program}\n")
    job = submit([], script=script)
    assert job.wait_for_end() == "FAILED"
    assert "error: srun started 2 tasks, and each a horovodrun of 2 workers" in job.text()
    assert not (tmp_path / "run9" / "metrics.jsonl").exists()


def test_linear_job_trains(submit, undisturbed):
    pretrained = undisturbed(2) / "last.pth.tar"
    job = submit(
        ["--pretrained", pretrained, "--epochs", 2, "--batch-size", 10, "--workers", 0],
        script="linear.sbatch",
    )
    assert job.wait_for_end() == "COMPLETED", job.text()
    assert job.decisions() == ["complete"]
    assert (job.run / "best.pth.tar").exists()


def test_readme_example_runs(slurm):
    if not (REPO / ".venv/bin/activate").exists():
        pytest.skip("the example needs .venv. Run make setup")
    page = (REPO / "slurm/README.md").read_text()
    command = re.search(r"^    (sbatch (?:.*\\\n)*.*DATA=digits \\\n.*)$", page, re.MULTILINE)
    number = slurm("bash", "-c", command[1]).split()[-1]
    run, log = REPO / "runs" / f"mgd-train-{number}", REPO / f"mgd-train-{number}.log"
    job = BatchJob(slurm, number, log, run)
    try:
        assert job.wait_for_end() == "COMPLETED", job.text()
        assert job.decisions() == ["complete"]
    finally:
        slurm("scancel", number, check=False)
        shutil.rmtree(run, ignore_errors=True)
        log.unlink(missing_ok=True)
