"""Runs with --augment-on device."""

import signal

from runs import differences, of_kind

SMALL = "-a resnet18 --image-size 32 --batch-size 8 --epochs 2 --moco-k 20 --mlp".split()
SMALL += "--moco-t 0.2 --aug-plus --cos".split()
STEPS = 2 * (50 // 8)


def test_stopped_run_resumes_to_the_same_bytes(start_job, images, tmp_path):
    """The uninterrupted run has no loader processes."""
    options = [images, *SMALL, "--augment-on", "device", "--resume", "auto"]
    reference = start_job(2, tmp_path / "reference", [*options, "-j", 0])
    stopped = start_job(2, tmp_path / "stopped", [*options, "-j", 1])
    stopped.wait_for_step(2)
    stopped.workers()[-1].send_signal(signal.SIGTERM)
    for job in (stopped, reference):
        output = job.finish()
        assert job.process.returncode == 0, output
    done = stopped.steps()
    assert done == list(range(1, done[-1] + 1)) and done[-1] < STEPS
    resumed = start_job(2, tmp_path / "stopped", [*options, "-j", 1])
    output = resumed.finish()
    assert resumed.process.returncode == 0, output
    assert len(of_kind(resumed.folder, "resumed")) == 1
    assert resumed.steps() == reference.steps() == list(range(1, STEPS + 1))
    assert differences(reference.folder, resumed.folder) == []
