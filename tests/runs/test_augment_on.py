"""Whole runs with --augment-on device."""

import signal

from runs import differences, of_kind

SMALL = "-a resnet18 --image-size 32 --batch-size 8 --epochs 2 --moco-k 20 --mlp --moco-t 0.2 --aug-plus --cos".split()
STEPS = 2 * (50 // 8)


def test_a_stopped_run_resumes_to_the_same_bytes(start_job, images, tmp_path):
    """One that nothing interrupts runs beside it, without loader processes."""
    options = [images, *SMALL, "--augment-on", "device", "--resume", "auto"]
    whole, stopped = (
        start_job(2, tmp_path / "whole", [*options, "-j", 0]),
        start_job(2, tmp_path / "part", [*options, "-j", 1]),
    )
    stopped.wait_for_step(2)
    stopped.workers()[-1].send_signal(signal.SIGTERM)
    for job in (stopped, whole):
        output = job.finish()
        assert job.process.returncode == 0, output
    done = stopped.steps()
    assert done == list(range(1, done[-1] + 1)) and done[-1] < STEPS
    resumed = start_job(2, tmp_path / "part", [*options, "-j", 1])
    output = resumed.finish()
    assert resumed.process.returncode == 0, output
    assert len(of_kind(resumed.folder, "resumed")) == 1
    assert resumed.steps() == whole.steps() == list(range(1, STEPS + 1))
    assert differences(whole.folder, resumed.folder) == []
