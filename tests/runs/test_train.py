"""Runs of job.train: the same bytes after any interruption, records, options and errors."""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inject import injected
from job.cluster import comm
from job.show.read.runs import find_runs
from runs import FLIP, all_records, check_steps, contents, differences, errors_of, of_kind
from runs import records as records_of
from job.frameworks.moco import build_moco

SMALL = "-a resnet18 --image-size 32 --batch-size 8 --epochs 2 --moco-k 20 --mlp".split()
SMALL += "--moco-t 0.2 --aug-plus --cos --warmup-epochs 1 --save-every 2steps --keep 99".split()
EPOCH = 50 // 8  # steps
STEPS = 2 * EPOCH


@pytest.fixture(scope="module")
def reference(start_job, images, teacher_file, tmp_path_factory):
    """A function from N to folder and output of an uninterrupted run of N workers.

    The run has a checkpoint of each step.
    """
    runs = {}

    def run(workers):
        if workers not in runs:
            folder = tmp_path_factory.mktemp("runs") / f"reference{workers}"
            options = ["--teacher", teacher_file, "-j", 0, "--save-every", "1steps"]
            job = start_job(workers, folder, [images, *SMALL, *options])
            runs[workers] = folder, job.finish()
            assert job.process.returncode == 0, runs[workers][1]
        return runs[workers]

    return run


def wait_for_resume(job, times):
    """Wait until a run has been resumed `times` times."""
    while len(of_kind(job.folder, "resumed")) < times:
        assert job.process.poll() is None, f"the run ended early:\n{job.process.stdout.read()}"
        time.sleep(0.02)


def test_requeued_job_resumes_its_newest_checkpoint(
    reference, start_job, images, teacher_file, tmp_path, monkeypatch
):
    """It is killed before and after the first save. Each try has --resume PATH. PATH is kept."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    shutil.copytree(reference(2)[0], tmp_path / "run", symlinks=True)
    path = tmp_path / "run/checkpoint_0000_000002.pth.tar"
    common = ["--teacher", teacher_file, "-j", 0, "--keep", 1]
    options = [images, *SMALL, *common, "--resume", path]
    for tries, save_every in enumerate((9, "1steps"), 1):
        job = start_job(2, tmp_path / "run", [*options, "--save-every", save_every])
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(tries))  # of the next try
        wait_for_resume(job, tries)
        job.wait_for_step(4)
        job.kill()
        assert len(job.steps()) < STEPS
    job = start_job(2, tmp_path / "run", [*options, "--save-every", 9])
    output = job.finish()
    assert job.process.returncode == 0, output
    assert [
        (record["epoch"], record["step"]) > (0, 2) for record in of_kind(job.folder, "resumed")
    ] == [False, False, True]
    assert job.steps() == list(range(1, STEPS + 1))
    assert differences(reference(2)[0], job.folder) == []
    assert records_of(job.folder) == records_of(reference(2)[0])
    assert path.exists() and len(list(job.folder.glob("checkpoint_*"))) == 2

    before = contents(job.folder)
    options = [images, *SMALL, *common, "--resume", "auto", "--epochs", 1]
    job = start_job(2, tmp_path / "run", options)
    assert job.finish().endswith(
        "nothing to do, and nothing changed: 2 epochs are done; --epochs is 1\n"
    )
    assert job.process.returncode == 0 and contents(job.folder) == before


@pytest.mark.parametrize(
    "workers, step, loaders", [pytest.param(2, 3, 1, marks=pytest.mark.short), (4, 7, 0)]
)
def test_killed_run_resumes_to_the_same_bytes(
    reference, start_job, images, teacher_file, tmp_path, workers, step, loaders
):
    """The number of loader processes differs, and TensorBoard is on.

    TensorBoard shows each step once, with the values of the last time that it was done.
    """
    options = [images, *SMALL, "--teacher", teacher_file, "-j", loaders, "--resume", "auto"]
    options += ["--tensorboard", "-p", 1]
    job = start_job(workers, tmp_path / "run", options)
    job.wait_for_step(step)
    job.kill()
    assert len(job.steps()) < STEPS
    resumed = start_job(workers, tmp_path / "run", options)
    output = resumed.finish()
    assert resumed.process.returncode == 0, output
    [record] = of_kind(resumed.folder, "resumed")
    assert (record["epoch"], record["step"]) > (0, 0)
    assert resumed.steps() == list(range(1, STEPS + 1))
    assert differences(reference(workers)[0], resumed.folder) == []
    losses = [
        (record["steps"] - 1, pytest.approx(record["loss"]))
        for record in of_kind(resumed.folder, "step")
    ]
    board = resumed.folder / "tensorboard"
    assert len(os.listdir(board)) == 2  # one file per process that wrote
    shown = EventAccumulator(str(board), size_guidance={"histograms": 0, "images": 0}).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("steps/loss")] == losses
    assert [event.step for event in shown.Images("matching/mgd/layer4")] == [0, EPOCH]
    assert [event.step for event in shown.Images("views/query beside key")] == [0, EPOCH]
    assert [event.step for event in shown.Histograms("mgd/bn1/weight")] == [0, EPOCH, STEPS]


def test_steps_count_once_after_other_batch_sizes(images, tmp_path):
    """Report, watch, --check-every and --save-every agree. Jumps of the rate are logged."""
    options = "--image-size 16 --stem small --width 16 --moco-k 8 -j 0 --cos".split()
    options += "--warmup-epochs 0 --tensorboard -p 1 --resume auto".split()
    options += "--check-every 3 --save-every 4steps --keep 99".split()
    for epochs, batch_size in ((1, 10), (2, 20), (3, 5)):
        given = [*options, "--epochs", epochs, "--batch-size", batch_size, "--out", tmp_path]
        command = [sys.executable, "-m", "job.train", images, *given]
        done = subprocess.run(map(str, command), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    jumps = [
        record["text"] for record in of_kind(tmp_path, "warning") if record["id"] == "rate_jump"
    ]
    from_epoch_0_to_1 = [text for text in jumps if "0.03" in text and "0.015" in text]
    assert len(from_epoch_0_to_1) == 1
    check_steps(tmp_path, 5 + 2 + 10)
    [run] = find_runs([tmp_path])
    ends = [(step + 1) / 5 for step in range(5)] + [1.5, 2]
    ends += [2 + (step + 1) / 10 for step in range(10)]
    assert run.epochs.tolist() == pytest.approx(ends)
    batch_sizes = np.repeat([10, 20, 5], [5, 2, 10])
    assert run.step_seconds == pytest.approx(batch_sizes / run.column("images_per_s"))
    assert run.progress.fraction == 1 and run.progress.position == (2, 10, 10)
    assert [sign["steps"] for sign in run.history.signs] == [3, 5, 6, 7, 9, 12, 15, 17]
    saved = [torch.load(path, weights_only=True)["steps"] for path in run.history.checkpoints]
    assert saved == [4, 5, 7, 8, 12, 16, 17]


@pytest.mark.short
def test_refresh_records_have_their_seconds(reference):
    refreshes = of_kind(reference(2)[0], "refresh")
    assert len(refreshes) == 8
    for name in ("measuring", "gathering", "solving"):
        assert all(0 < record[name] < 300 for record in refreshes)
        # The four stages of a refresh have the same values.
        assert len({record[name] for record in refreshes}) == 2


SIGNALS = {
    "one": (2, signal.SIGUSR2, 0),
    "all its processes": (2, signal.SIGHUP, 1),
    "launcher": (2, signal.SIGTERM, 1),
    "all": (4, signal.SIGINT, 0),
}


def pause_before(step, folder):
    """Return the variables that stop rank 0 before it records a step.

    folder: of a complete run with the same records.
    """
    records = [record for record in all_records(folder) if record["kind"] != "saved"]
    [write] = [
        n
        for n, record in enumerate(records, 1)
        if (record["kind"], record.get("steps")) == ("step", step)
    ]
    return injected(f"0 write metrics.jsonl {write} 1 -{signal.SIGSTOP:d}")


def wait_for_signal(process, number):
    """Wait until a stopped process has a pending signal."""
    waiting = 0
    while not waiting >> (number - 1) & 1:
        [mask] = re.findall(r"ShdPnd:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
        waiting = int(mask, 16)
        time.sleep(0.02)


@pytest.mark.parametrize("target", SIGNALS)
def test_signal_saves_at_a_common_step(
    reference, start_job, images, teacher_file, tmp_path, monkeypatch, target
):
    """The checkpoint has the reference's bytes, even if only one worker gets the signal.

    --save-every is an epoch here, so only the signal can save within one. Rank 0 is stopped until
    the signal has been sent, so that the run cannot end before.
    """
    workers, number, loaders = SIGNALS[target]
    options = [images, *SMALL, "--save-every", 1, "--teacher", teacher_file, "-j", loaders]
    options += ["--resume", "auto"]
    with monkeypatch.context() as patch:
        for name, value in pause_before(3, reference(workers)[0]).items():
            patch.setenv(name, value)
        job = start_job(workers, tmp_path / "run", options)
    first = job.wait_for_pause()
    processes = {
        "one": job.workers()[-1:],
        "all": job.workers(),
        "all its processes": [
            process
            for worker in job.workers()
            for process in [worker, *worker.children(recursive=True)]
        ],
        "launcher": [job.process],
    }
    for process in processes[target]:
        process.send_signal(number)
    if target != "one":
        wait_for_signal(first, number)
    first.resume()
    output = job.finish()
    assert job.process.returncode == 0, output
    assert of_kind(job.folder, "end")[-1]["how"] == "stopped" and "resource_tracker" not in output
    done = job.steps()
    assert done == list(range(1, done[-1] + 1)) and done[-1] < STEPS
    name = f"checkpoint_{done[-1] // EPOCH:04d}_{done[-1] % EPOCH:06d}.pth.tar"
    assert differences(reference(workers)[0], job.folder, name) == []
    if target == "one":
        resumed = start_job(workers, tmp_path / "run", options)
        output = resumed.finish()
        assert resumed.process.returncode == 0, output
        [record] = of_kind(resumed.folder, "resumed")
        assert (record["epoch"], record["step"]) == divmod(done[-1], EPOCH)
        assert resumed.steps() == list(range(1, STEPS + 1))
        assert differences(reference(workers)[0], resumed.folder) == []


@pytest.mark.parametrize("workers", [1, 4])
def test_refresh_is_equal_on_any_workers(
    reference, start_job, images, teacher_file, tmp_path, workers
):
    """The second refresh, from the checkpoint of two workers after the first epoch."""
    folder, _ = reference(2)
    checkpoint = torch.load(folder / "checkpoint_0001_000000.pth.tar", weights_only=True)
    (tmp_path / "run").mkdir()
    torch.save(checkpoint, tmp_path / "run" / "checkpoint_0001_000000.pth.tar")
    options = [images, *SMALL, "--teacher", teacher_file, "-j", 0, "--resume", "auto"]
    job = start_job(workers, tmp_path / "run", options)
    output = job.finish()
    assert job.process.returncode == 0, output
    [resumed], [start] = of_kind(job.folder, "resumed"), of_kind(job.folder, "start")
    assert (resumed["workers"], start["workers"]) == (2, workers)
    before = checkpoint["mgd"]
    expected = torch.load(folder / "last.pth.tar", weights_only=True)["mgd"]
    after = torch.load(job.folder / "last.pth.tar", weights_only=True)["mgd"]
    names = [f"matching{stage}" for stage in (1, 2, 3, 4)]
    assert all(torch.equal(after[name], expected[name]) for name in names)
    assert not all(torch.equal(before[name], expected[name]) for name in names)


def test_resume_on_other_workers_within_an_epoch(
    reference, start_job, images, teacher_file, tmp_path
):
    folder, _ = reference(2)
    source = folder / "checkpoint_0001_000004.pth.tar"
    arguments = [images, *SMALL, "--teacher", teacher_file, "-j", 0, "--resume", source]
    job = start_job(1, tmp_path / "run", arguments)
    output = job.finish()
    assert job.process.returncode == 0, output
    [resumed], [start] = of_kind(job.folder, "resumed"), of_kind(job.folder, "start")
    assert (resumed["epoch"], resumed["step"], resumed["workers"], start["workers"]) == (1, 4, 2, 1)
    assert job.steps() == [11, 12]


@pytest.mark.parametrize(
    "save_every, error",
    [
        ("1steps", "parameters are not finite after epoch 1, step 1"),
        ("1", "loss is not finite at epoch 1, step 1"),
    ],
)
def test_diverging_run_keeps_its_checkpoints(
    reference, start_job, images, teacher_file, tmp_path, save_every, error
):
    """All workers stop if a loss or a value to save is not finite."""
    good = (reference(2)[0] / "checkpoint_0001_000000.pth.tar").read_bytes()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint_0001_000000.pth.tar").write_bytes(good)
    options = [images, *SMALL, "--teacher", teacher_file, "-j", 0, "--refresh-epochs", "never"]
    options += ["--resume", "auto", "--lr", "1e30", "--save-every", save_every]
    job = start_job(2, tmp_path / "run", options)
    output = job.finish()
    assert job.process.returncode != 0
    [end] = of_kind(job.folder, "end")
    assert (end["how"], end["code"]) == ("error", 1) and error in end["text"]
    assert output.count(f"error: {end['text']}\n") == 1, output
    assert sorted(path.name for path in job.folder.glob("*.pth.tar*")) == [
        "checkpoint_0001_000000.pth.tar",
        "last.pth.tar",
    ]
    assert (job.folder / "checkpoint_0001_000000.pth.tar").read_bytes() == good


@pytest.fixture(scope="module")
def small_stem_teacher_file(tmp_path_factory):
    """A ResNet-18 with the small stem and random weights, in the layout of MoCo's files."""
    torch.manual_seed(6)
    path = tmp_path_factory.mktemp("teacher") / "small.pth.tar"
    state = build_moco(comm, "resnet18", K=64, stem="small").state_dict()
    state = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": state}, path)
    return path


@pytest.mark.parametrize(
    "options, layers",  # groups and channels of each solved matching
    [
        (
            "--reducer rd --margins init --no-aug-plus --no-cos --schedule 1",
            [(4, 64), (4, 128), (4, 256), (4, 512)],
        ),
        (
            "--reducer sp --precision bf16 --image-size 16 --mgd-stages 3 4 --no-mlp --knn-every 1",
            [(4, 256), (4, 512)],
        ),
        (
            "--reducer sm --stem small --width 32 --image-size 16 --teacher {small}",
            [(1, 32), (1, 64), (1, 128), (1, 256)],
        ),
        (
            "--reducer rd --loss-share 0.1 --loss-ramp --mgd-stages 3 4 --stage-weights 1 0.2 "
            "--distill gram mgd projector --gram-stages 1 2 3 --projector-stages 2 4",
            [(4, 256), (4, 512)],
        ),
        ("--matching random --loss-share 0.1", []),
        ("--mgd-correction --mgd-pooled 2 --mgd-stages 2 3 --loss-share 1", [(4, 128), (4, 256)]),
    ],
)
def test_options_resume_to_the_same_bytes(
    start_job, images, teacher_file, small_stem_teacher_file, tmp_path, monkeypatch, options, layers
):
    if "bf16" in options:
        # The same kernels on any CPU. On one CPU, a gradient was once infinite, maybe by oneDNN's.
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    arguments = [images, *SMALL, "--teacher", teacher_file, "-j", 0, "--save-every", "1"]
    arguments += [] if "random" in options else ["--refresh-epochs", "0"]
    arguments += options.format(small=small_stem_teacher_file).split()
    reference = start_job(1, tmp_path / "reference", arguments)
    output = reference.finish()
    assert reference.process.returncode == 0, output
    refreshes = of_kind(reference.folder, "refresh")
    assert [(record["groups"], record["channels"]) for record in refreshes] == layers
    accuracies = of_kind(reference.folder, "knn")
    assert [record["knn_images"] for record in accuracies] == [9] * options.count("--knn-every") * 2
    assert all(0 < record["knn_seconds"] < 300 for record in accuracies)
    (tmp_path / "resumed").mkdir()
    checkpoint = "checkpoint_0001_000000.pth.tar"
    (tmp_path / "resumed" / checkpoint).hardlink_to(reference.folder / checkpoint)
    resumed = start_job(1, tmp_path / "resumed", [*arguments, "--resume", "auto"])
    output = resumed.finish()
    assert resumed.process.returncode == 0, output
    assert differences(reference.folder, resumed.folder) == []


def test_loss_share_and_ramp(start_job, images, teacher_file, tmp_path):
    """The distillation loss starts at --loss-share. The ramp reduces it to 0. The rate is 0.

    The factor is measured once, after the refresh, and saved. The loss of four random crops of
    noise per worker can exceed the measured loss by a half.
    """
    for matching, options in {
        "solved": "--refresh-epochs 0",
        "random": "--matching random",
    }.items():
        arguments = [images, *SMALL, "--teacher", teacher_file, "-j", 0, *options.split()]
        arguments += "--loss-share 0.5 --loss-ramp --lr 0".split()
        job = start_job(2, tmp_path / matching, arguments)
        output = job.finish()
        assert job.process.returncode == 0, output
        kinds = [record["kind"] for record in records_of(job.folder)]
        assert kinds[: kinds.index("step")] == ["refresh"] * 4 * (matching == "solved") + ["factor"]
        [factor] = [record["loss_factor"] for record in of_kind(job.folder, "factor")]
        saved = torch.load(job.folder / "last.pth.tar", weights_only=True)["mgd"]["factor"]
        assert saved.item() == factor
        steps = of_kind(job.folder, "step")
        losses = [record["distillation"] for record in steps]
        unramped = [loss / (1 - step / STEPS) for step, loss in enumerate(losses)]
        assert sum(unramped) / STEPS == pytest.approx(0.5 * math.log(21), rel=0.3)
        assert all(0.5 < loss / (0.5 * math.log(21)) < 2 for loss in unramped), unramped
        last = steps[-1]
        assert last["loss"] == pytest.approx(last["contrastive"] + last["distillation"])


@pytest.mark.short
def test_records_of_start_saves_and_end(reference):
    folder, _ = reference(2)
    [start], [end], [teacher] = (of_kind(folder, kind) for kind in ("start", "end", "teacher"))
    assert (start["epoch"], start["step"], start["workers"], start["nodes"]) == (0, 0, 2, 1)
    assert (start["images"], start["steps_an_epoch"], teacher["arch"]) == (50, EPOCH, "resnet50")
    assert start["losses"] == ["contrastive"]
    assert start["options"] == yaml.safe_load((folder / "config.yaml").read_text())
    assert f"torch {torch.__version__}" in start["versions"] and start["launcher"] == "horovodrun"
    assert (end["how"], end["code"]) == ("complete", 0)
    assert f"{end['text']}\n" == (folder / "complete").read_text()
    saves = of_kind(folder, "saved")
    assert [(record["epoch"], record["step"]) for record in saves] == [
        divmod(done, EPOCH) for done in range(1, STEPS + 1)
    ]
    assert all(0 < record["seconds"] < end["time"] - start["time"] for record in saves)


@pytest.mark.short
def test_collapse_records_at_each_epoch_end(reference):
    folder, _ = reference(2)
    signs = of_kind(folder, "collapse")
    ends = [(0, EPOCH - 1), (1, EPOCH - 1)]
    assert [(record["epoch"], record["step"]) for record in signs] == ends
    for record in signs:
        assert 0 < record["feature_std"] < 1.1 and 1 <= record["queue_rank"] <= 20  # keys
        assert [record[f"dead_layer{stage}"] for stage in (1, 2, 3, 4)] == [0] * 4


def broken_teacher(tmp_path, teacher_file, defect):
    content = torch.load(teacher_file, weights_only=True)
    path = tmp_path / "broken.pth.tar"
    if defect == "missing key":
        del content["state_dict"]["module.encoder_q.layer3.2.bn2.weight"]
    if defect == "wrong md5":
        path = tmp_path / "moco_v2_200ep_pretrain.pth.tar"
    if defect == "code":
        content["optimizer"] = subprocess.Popen
    torch.save(content, path)
    if defect == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


TEACHERS = {
    "missing key": "layer3.2.bn2.weight is missing",
    "wrong md5": "has md5",
    "code": "holds code or objects besides tensors",
    "truncated": "is damaged, or cut short",
    "architecture": "does not fit resnet34",
    "none": "/none: no such file; expected a checkpoint",
}
OPTIONS = {
    "--batch-size 64": "has only 50 images; expected at most 50. Choose a",
    "--batch-size 1": "batch norm needs two",
    "--gpu 0": "--gpu: not an option of this program",
    "--resume nowhere.pth.tar": "--resume nowhere.pth.tar: no such file; expected a checkpoint",
}


@pytest.fixture(scope="module")
def errors(images, teacher_file, tmp_path_factory):
    """The error line of each of TEACHERS and OPTIONS by name. Each has exit code 2."""
    folder, commands = tmp_path_factory.mktemp("errors"), {}
    for defect in TEACHERS:
        (folder / defect).mkdir()
        path = folder / "none" / "none"
        if defect != "none":
            path = broken_teacher(folder / defect, teacher_file, defect)
        commands[defect] = ["--teacher", path]
    commands["architecture"] += ["--teacher-arch", "resnet34"]
    commands |= {options: options.split() for options in OPTIONS}
    common = [images, *SMALL, "--out", folder / "run"]
    lines = errors_of("job.train", [[*common, *more] for more in commands.values()])
    assert not (folder / "run").exists()
    return dict(zip(commands, lines, strict=True))


@pytest.mark.parametrize("name", [*TEACHERS, *OPTIONS])
def test_invalid_teachers_and_options(errors, name):
    assert (TEACHERS | OPTIONS)[name] in errors[name]


def test_workers_print_one_error(start_job, images, tmp_path):
    job = start_job(2, tmp_path / "run", [images, *SMALL, "--batch-size", 7])
    output = job.finish()
    assert job.process.returncode == 2 and "Traceback" not in output
    assert output.count("--batch-size 7 cannot be shared equally by 2 workers: choose 6 or 8") == 1
    assert not job.folder.exists()


@pytest.mark.parametrize(
    "check_every, save_every, error",
    [
        pytest.param(3, "2steps", "after epoch 0, step 3: 1 of 2", marks=pytest.mark.short),
        (7, "9", "after epoch 1, step 1: "),  # longer than an epoch, without a save
        (99, "2steps", "after epoch 0, step 4, and are not saved: "),
    ],
)
def test_flipped_bit_ends_the_run_and_is_not_saved(
    start_job, images, tmp_path, monkeypatch, check_every, save_every, error
):
    """The next check or save, whichever is first, ends the run."""
    (tmp_path / "sitecustomize.py").write_text(FLIP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    options = [images, *SMALL, "-j", 0, "--check-every", check_every, "--save-every", save_every]
    job = start_job(2, tmp_path / "run", options)
    output = job.finish()
    assert job.process.returncode != 0
    [end] = of_kind(job.folder, "end")
    assert (end["how"], end["code"]) == ("error", 1), output
    assert all(part in end["text"] for part in (error, "moco.encoder_q.layer1.0", "worker 1 "))
    assert output.count(f"error: {end['text']}\n") == 1, output
    saved = ["checkpoint_0000_000002.pth.tar"] if save_every == "2steps" else []
    assert [path.name for path in job.folder.glob("checkpoint_*")] == saved


def test_folder_of_a_run_is_refused(reference, images, teacher_file):
    folder, _ = reference(2)
    [line] = errors_of("job.train", [[images, *SMALL, "--teacher", teacher_file, "--out", folder]])
    assert "holds a run already" in line


def test_resume_of_a_teacher_is_recognised(images, teacher_file, tmp_path):
    """The original program accepts it too. The queue is smaller than the batch. One worker runs."""
    arguments = [images, *SMALL, "--resume", teacher_file, "--epochs", 1, "--moco-k", 5, "-j", 0]
    arguments += ["--out", tmp_path / "run"]
    command = [sys.executable, "-m", "job.train", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a checkpoint of resnet50, not a run of resnet18; it is used as --teacher" in done.stdout
    assert "318 tensors under module.encoder_q.* loaded, none missing" in done.stdout
    assert (tmp_path / "run" / "last.pth.tar").is_file()
    assert f"teacher: {teacher_file}" in (tmp_path / "run" / "config.yaml").read_text()
