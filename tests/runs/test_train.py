"""Whole runs of the real command: the same bytes whatever interrupts them, and errors for people."""

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

SMALL = "-a resnet18 --image-size 32 --batch-size 8 --epochs 2 --moco-k 20 --mlp --moco-t 0.2 --aug-plus --cos".split()
SMALL += "--warmup-epochs 1 --save-every 2steps --keep 99".split()
EPOCH = 50 // 8  # steps
STEPS = 2 * EPOCH


@pytest.fixture(scope="module")
def undisturbed(start_job, images, teacher_file, tmp_path_factory):
    """A function N -> (folder, output) of a run of N workers that nothing interrupts, with a checkpoint of each step."""
    runs = {}

    def run(workers):
        if workers not in runs:
            folder = tmp_path_factory.mktemp("runs") / f"undisturbed{workers}"
            options = ["--teacher", teacher_file, "-j", 0, "--save-every", "1steps"]
            job = start_job(workers, folder, [images, *SMALL, *options])
            runs[workers] = folder, job.finish()
            assert job.process.returncode == 0, runs[workers][1]
        return runs[workers]

    return run


def wait_for_resume(job, times):
    """Wait until a run has been resumed so many times."""
    while len(of_kind(job.folder, "resumed")) < times:
        assert job.process.poll() is None, f"the run ended early:\n{job.process.stdout.read()}"
        time.sleep(0.02)


def test_a_requeued_job_that_went_back_goes_on_from_there(
    undisturbed, start_job, images, teacher_file, tmp_path, monkeypatch
):
    """Killed before the first save, and after; with --resume PATH each time, as in a job script. PATH is kept."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    shutil.copytree(undisturbed(2)[0], tmp_path / "run", symlinks=True)
    path, common = (
        tmp_path / "run/checkpoint_0000_000002.pth.tar",
        ["--teacher", teacher_file, "-j", 0, "--keep", 1],
    )
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
    assert differences(undisturbed(2)[0], job.folder) == []
    assert records_of(job.folder) == records_of(undisturbed(2)[0])
    assert path.exists() and len(list(job.folder.glob("checkpoint_*"))) == 2

    before = contents(job.folder)
    job = start_job(
        2, tmp_path / "run", [images, *SMALL, *common, "--resume", "auto", "--epochs", 1]
    )
    assert job.finish().endswith(
        "nothing to do, and nothing changed: 2 epochs are done; --epochs is 1\n"
    )
    assert job.process.returncode == 0 and contents(job.folder) == before


@pytest.mark.parametrize("workers, step, loaders", [(2, 3, 1), (4, 7, 0)])
def test_a_killed_run_resumes_to_the_same_bytes(
    undisturbed, start_job, images, teacher_file, tmp_path, workers, step, loaders
):
    """So do two runs that nothing interrupts, and any number of loader processes.

    With TensorBoard's files, which change nothing, and in which each step is once, as it was done last.
    """
    options = [
        images,
        *SMALL,
        "--teacher",
        teacher_file,
        "-j",
        loaders,
        "--resume",
        "auto",
        "--tensorboard",
        "-p",
        1,
    ]
    job = start_job(workers, tmp_path / "run", options)
    job.wait_for_step(step)
    job.kill()
    assert len(job.steps()) < STEPS
    again = start_job(workers, tmp_path / "run", options)
    output = again.finish()
    assert again.process.returncode == 0, output
    [resumed] = of_kind(again.folder, "resumed")
    assert (resumed["epoch"], resumed["step"]) > (0, 0)
    assert again.steps() == list(range(1, STEPS + 1))
    assert differences(undisturbed(workers)[0], again.folder) == []
    losses = [
        (record["steps"] - 1, pytest.approx(record["loss"]))
        for record in of_kind(again.folder, "step")
    ]
    shown = EventAccumulator(
        str(again.folder / "tensorboard"), size_guidance={"histograms": 0, "images": 0}
    ).Reload()
    assert len(os.listdir(again.folder / "tensorboard")) == 2  # files, one a process that wrote
    assert [(event.step, event.value) for event in shown.Scalars("steps/loss")] == losses
    assert [event.step for event in shown.Images("matching/mgd/layer4")] == [0, EPOCH]
    assert [event.step for event in shown.Images("views/query beside key")] == [0, EPOCH]
    assert [event.step for event in shown.Histograms("mgd/bn1/weight")] == [0, EPOCH, STEPS]


def test_a_run_that_changes_its_batch_size_counts_each_step_once(images, tmp_path):
    """Report and watch have its epochs, --check-every and --save-every follow the count, and rates that jump are said."""
    options = "--image-size 16 --stem small --width 16 --moco-k 8 -j 0 --cos --warmup-epochs 0 --tensorboard -p 1".split()
    options += ["--resume", "auto", "--check-every", "3", "--save-every", "4steps", "--keep", "99"]
    for epochs, batch_size in ((1, 10), (2, 20), (3, 5)):
        given = [*options, "--epochs", epochs, "--batch-size", batch_size, "--out", tmp_path]
        command = [sys.executable, "-m", "job.train", images, *given]
        done = subprocess.run(map(str, command), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    jumps = [
        record["text"] for record in of_kind(tmp_path, "warning") if record["id"] == "rate_jump"
    ]
    assert ["0.03" in text and "0.015" in text for text in jumps].count(
        True
    ) == 1  # from epoch 0 to 1
    check_steps(tmp_path, 5 + 2 + 10)
    [run] = find_runs([tmp_path])
    ends = (
        [(step + 1) / 5 for step in range(5)]
        + [1.5, 2]
        + [2 + (step + 1) / 10 for step in range(10)]
    )
    assert run.epochs.tolist() == pytest.approx(ends)
    assert run.step_seconds == pytest.approx(
        np.repeat([10, 20, 5], [5, 2, 10]) / run.column("images_per_s")
    )
    assert run.progress.share == 1 and run.progress.place == (2, 10, 10)
    assert [sign["steps"] for sign in run.history.signs] == [3, 5, 6, 7, 9, 12, 15, 17]
    saved = [torch.load(path, weights_only=True)["steps"] for path in run.history.checkpoints]
    assert saved == [4, 5, 7, 8, 12, 16, 17]


def test_records_tell_what_a_refresh_has_cost(undisturbed):
    refreshes = of_kind(undisturbed(2)[0], "refresh")
    assert len(refreshes) == 8
    for name in ("measuring", "gathering", "solving"):
        assert all(0 < record[name] < 300 for record in refreshes)
        assert (
            len({record[name] for record in refreshes}) == 2
        )  # of the whole refresh, the same for its four stages


SIGNALS = {
    "one": (2, signal.SIGUSR2, 0),
    "all its processes": (2, signal.SIGHUP, 1),
    "launcher": (2, signal.SIGTERM, 1),
    "all": (4, signal.SIGINT, 0),
}


def paused(whole, step):
    """The variables that stop rank 0 before it records a step. whole: the folder of such a run."""
    records = [record for record in all_records(whole) if record["kind"] != "saved"]
    [write] = [
        n
        for n, record in enumerate(records, 1)
        if (record["kind"], record.get("steps")) == ("step", step)
    ]
    return injected(f"0 write metrics.jsonl {write} 1 -{signal.SIGSTOP:d}")


def wait_for_signal(process, number):
    """Wait until a stopped process has been sent a signal."""
    waiting = 0
    while not waiting >> (number - 1) & 1:
        [mask] = re.findall(r"ShdPnd:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
        waiting = int(mask, 16)
        time.sleep(0.02)


@pytest.mark.parametrize("reached", SIGNALS)
def test_a_signal_saves_at_a_common_step_what_an_undisturbed_run_has_there(
    undisturbed, start_job, images, teacher_file, tmp_path, monkeypatch, reached
):
    """--save-every is an epoch here: only the signal can have saved within one. One worker that gets it is enough.

    Rank 0 is stopped until the signal has been sent, so that the run cannot end before.
    """
    workers, number, loaders = SIGNALS[reached]
    options = [
        images,
        *SMALL,
        "--save-every",
        1,
        "--teacher",
        teacher_file,
        "-j",
        loaders,
        "--resume",
        "auto",
    ]
    with monkeypatch.context() as patch:
        for name, value in paused(undisturbed(workers)[0], 3).items():
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
    for process in processes[reached]:
        process.send_signal(number)
    if reached != "one":
        wait_for_signal(first, number)
    first.resume()
    output = job.finish()
    assert job.process.returncode == 0, output
    assert of_kind(job.folder, "end")[-1]["how"] == "stopped" and "resource_tracker" not in output
    done = job.steps()
    assert done == list(range(1, done[-1] + 1)) and done[-1] < STEPS
    name = f"checkpoint_{done[-1] // EPOCH:04d}_{done[-1] % EPOCH:06d}.pth.tar"
    assert differences(undisturbed(workers)[0], job.folder, name) == []
    if reached == "one":
        again = start_job(workers, tmp_path / "run", options)
        output = again.finish()
        assert again.process.returncode == 0, output
        [resumed] = of_kind(again.folder, "resumed")
        assert (resumed["epoch"], resumed["step"]) == divmod(done[-1], EPOCH)
        assert again.steps() == list(range(1, STEPS + 1))
        assert differences(undisturbed(workers)[0], again.folder) == []


@pytest.mark.parametrize("workers", [1, 4])
def test_a_refresh_gives_the_same_matrix_at_any_number_of_workers(
    undisturbed, start_job, images, teacher_file, tmp_path, workers
):
    """From the checkpoint at the end of the first epoch of two workers, on as many as they are: the second refresh."""
    folder, _ = undisturbed(2)
    whole = torch.load(folder / "checkpoint_0001_000000.pth.tar", weights_only=True)
    (tmp_path / "run").mkdir()
    torch.save(whole, tmp_path / "run" / "checkpoint_0001_000000.pth.tar")
    job = start_job(
        workers,
        tmp_path / "run",
        [images, *SMALL, "--teacher", teacher_file, "-j", 0, "--resume", "auto"],
    )
    output = job.finish()
    assert job.process.returncode == 0, output
    [resumed], [start] = of_kind(job.folder, "resumed"), of_kind(job.folder, "start")
    assert (resumed["workers"], start["workers"]) == (2, workers)
    before = whole["mgd"]
    expected = torch.load(folder / "last.pth.tar", weights_only=True)["mgd"]
    found = torch.load(job.folder / "last.pth.tar", weights_only=True)["mgd"]
    for stage in (1, 2, 3, 4):
        assert torch.equal(found[f"matching{stage}"], expected[f"matching{stage}"]), stage
    assert any(
        not torch.equal(before[f"matching{stage}"], expected[f"matching{stage}"])
        for stage in (1, 2, 3, 4)
    )


def test_a_run_goes_on_within_an_epoch_with_another_number_of_workers(
    undisturbed, start_job, images, teacher_file, tmp_path
):
    folder, _ = undisturbed(2)
    source = folder / "checkpoint_0001_000004.pth.tar"
    arguments = [images, *SMALL, "--teacher", teacher_file, "-j", 0, "--resume", source]
    job = start_job(1, tmp_path / "run", arguments)
    output = job.finish()
    assert job.process.returncode == 0, output
    [resumed], [start] = of_kind(job.folder, "resumed"), of_kind(job.folder, "start")
    assert (resumed["epoch"], resumed["step"], resumed["workers"], start["workers"]) == (1, 4, 2, 1)
    assert job.steps() == [11, 12]


@pytest.mark.parametrize(
    "save_every, said",
    [
        ("1steps", "parameters are not finite after epoch 1, step 1"),
        ("1", "loss is not finite at epoch 1, step 1"),
    ],
)
def test_a_run_that_diverges_stops_all_workers_and_leaves_the_checkpoints(
    undisturbed, start_job, images, teacher_file, tmp_path, save_every, said
):
    """Whether it is a loss or what would be saved that is not finite first."""
    good = (undisturbed(2)[0] / "checkpoint_0001_000000.pth.tar").read_bytes()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint_0001_000000.pth.tar").write_bytes(good)
    options = [images, *SMALL, "--teacher", teacher_file, "-j", 0, "--refresh-epochs", "never"]
    job = start_job(
        2,
        tmp_path / "run",
        [*options, "--resume", "auto", "--lr", "1e30", "--save-every", save_every],
    )
    output = job.finish()
    assert job.process.returncode != 0
    [end] = of_kind(job.folder, "end")
    assert (end["how"], end["code"]) == ("error", 1) and said in end["text"]
    assert output.count(f"error: {end['text']}\n") == 1, output
    assert sorted(path.name for path in job.folder.glob("*.pth.tar*")) == [
        "checkpoint_0001_000000.pth.tar",
        "last.pth.tar",
    ]
    assert (job.folder / "checkpoint_0001_000000.pth.tar").read_bytes() == good


@pytest.fixture(scope="module")
def small_stem_teacher_file(tmp_path_factory):
    """A ResNet-18 with the small stem and random weights, laid out as MoCo's released files."""
    torch.manual_seed(6)
    path = tmp_path_factory.mktemp("teacher") / "small.pth.tar"
    state = {
        f"module.{key}": value
        for key, value in build_moco(comm, "resnet18", K=64, stem="small").state_dict().items()
    }
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": state}, path)
    return path


@pytest.mark.parametrize(
    "options, layers",  # groups and channels of each matching that is solved
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
def test_a_run_with_other_options_resumes_to_the_same_bytes(
    start_job, images, teacher_file, small_stem_teacher_file, tmp_path, monkeypatch, options, layers
):
    if (
        "bf16" in options
    ):  # by the same kernels on any CPU: on one, perhaps by oneDNN's, the gradient was once infinite
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    given = [images, *SMALL, "--teacher", teacher_file, "-j", 0, "--save-every", "1"]
    given += [] if "random" in options else ["--refresh-epochs", "0"]
    given += options.format(small=small_stem_teacher_file).split()
    whole = start_job(1, tmp_path / "whole", given)
    output = whole.finish()
    assert whole.process.returncode == 0, output
    assert [
        (record["groups"], record["channels"]) for record in of_kind(whole.folder, "refresh")
    ] == layers
    accuracies = of_kind(tmp_path / "whole", "knn")
    assert [record["knn_images"] for record in accuracies] == [9] * options.count("--knn-every") * 2
    assert all(0 < record["knn_seconds"] < 300 for record in accuracies)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "checkpoint_0001_000000.pth.tar").hardlink_to(
        tmp_path / "whole" / "checkpoint_0001_000000.pth.tar"
    )
    part = start_job(1, tmp_path / "part", [*given, "--resume", "auto"])
    output = part.finish()
    assert part.process.returncode == 0, output
    assert differences(tmp_path / "whole", tmp_path / "part") == []


def test_a_share_is_what_the_loss_begins_with_and_a_ramp_takes_it_to_nothing(
    start_job, images, teacher_file, tmp_path
):
    """Of a run that learns nothing; the factor is measured after the refresh, once, and saved.

    Four random crops of noise a worker have up to half more of the loss than what was measured.
    """
    for matching, options in {
        "solved": "--refresh-epochs 0",
        "random": "--matching random",
    }.items():
        given = [
            images,
            *SMALL,
            "--teacher",
            teacher_file,
            "-j",
            0,
            *f"--loss-share 0.5 --loss-ramp --lr 0 {options}".split(),
        ]
        job = start_job(2, tmp_path / matching, given)
        output = job.finish()
        assert job.process.returncode == 0, output
        kinds = [record["kind"] for record in records_of(job.folder)]
        assert kinds[: kinds.index("step")] == ["refresh"] * 4 * (matching == "solved") + ["factor"]
        [factor] = [record["loss_factor"] for record in of_kind(job.folder, "factor")]
        assert (
            torch.load(job.folder / "last.pth.tar", weights_only=True)["mgd"]["factor"].item()
            == factor
        )
        steps = of_kind(job.folder, "step")
        losses = [record["distillation"] for record in steps]
        whole = [loss / (1 - step / STEPS) for step, loss in enumerate(losses)]
        assert sum(whole) / STEPS == pytest.approx(0.5 * math.log(21), rel=0.3)
        assert all(0.5 < loss / (0.5 * math.log(21)) < 2 for loss in whole), whole
        assert all(
            record["loss"] == pytest.approx(record["contrastive"] + record["distillation"])
            for record in steps[-1:]
        )


def test_a_run_records_its_start_its_saves_and_its_end(undisturbed):
    folder, _ = undisturbed(2)
    [start], [end], [teacher] = (of_kind(folder, kind) for kind in ("start", "end", "teacher"))
    assert (start["epoch"], start["step"], start["workers"], start["nodes"]) == (0, 0, 2, 1)
    assert (start["images"], start["steps_an_epoch"], teacher["arch"]) == (50, EPOCH, "resnet50")
    assert start["losses"] == ["contrastive"]
    assert start["options"] == yaml.safe_load((folder / "config.yaml").read_text())
    assert f"torch {torch.__version__}" in start["versions"] and start["launcher"] == "horovodrun"
    assert (end["how"], end["code"], f"{end['text']}\n") == (
        "complete",
        0,
        (folder / "complete").read_text(),
    )
    saves = of_kind(folder, "saved")
    assert [(record["epoch"], record["step"]) for record in saves] == [
        divmod(done, EPOCH) for done in range(1, STEPS + 1)
    ]
    assert all(0 < record["seconds"] < end["time"] - start["time"] for record in saves)


def test_signs_of_collapse_are_recorded_at_each_epoch_s_end(undisturbed):
    folder, _ = undisturbed(2)
    signs = of_kind(folder, "collapse")
    assert [(record["epoch"], record["step"]) for record in signs] == [
        (0, EPOCH - 1),
        (1, EPOCH - 1),
    ]
    for record in signs:
        assert 0 < record["feature_std"] < 1.1 and 1 <= record["queue_rank"] <= 20  # keys
        assert [record[f"dead_layer{stage}"] for stage in (1, 2, 3, 4)] == [0] * 4


def broken_teacher(tmp_path, teacher_file, how):
    content = torch.load(teacher_file, weights_only=True)
    path = tmp_path / "broken.pth.tar"
    if how == "missing key":
        del content["state_dict"]["module.encoder_q.layer3.2.bn2.weight"]
    if how == "wrong md5":
        path = tmp_path / "moco_v2_200ep_pretrain.pth.tar"
    if how == "code":
        content["optimizer"] = subprocess.Popen
    torch.save(content, path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


TEACHERS = {
    "missing key": "layer3.2.bn2.weight is missing",
    "wrong md5": "has md5",
    "code": "holds code or objects besides tensors",
    "truncated": "is damaged, or cut short",
    "architecture": "does not fit resnet34",
    "none": "no such file",
}
OPTIONS = {
    "--batch-size 64": "has 50 images only; expected a batch",
    "--batch-size 1": "batch norm needs two",
    "--gpu 0": "--gpu: not an option of this program",
    "--resume nowhere.pth.tar": "no such file",
}


@pytest.fixture(scope="module")
def errors(images, teacher_file, tmp_path_factory):
    """The line with which each of TEACHERS and OPTIONS is refused, by name."""
    folder, commands = tmp_path_factory.mktemp("errors"), {}
    for how in TEACHERS:
        (folder / how).mkdir()
        path = (
            folder / "none" / "none"
            if how == "none"
            else broken_teacher(folder / how, teacher_file, how)
        )
        commands[how] = [
            "--teacher",
            path,
            *(["--teacher-arch", "resnet34"] if how == "architecture" else []),
        ]
    commands |= {options: options.split() for options in OPTIONS}
    lines = errors_of(
        "job.train",
        [[images, *SMALL, "--out", folder / "run", *more] for more in commands.values()],
    )
    assert not (folder / "run").exists()
    return dict(zip(commands, lines, strict=True))


@pytest.mark.parametrize("how", TEACHERS)
def test_a_teacher_that_does_not_fit_is_one_line_and_exit_code_2(errors, how):
    assert TEACHERS[how] in errors[how]


@pytest.mark.parametrize("options", OPTIONS)
def test_what_cannot_be_trained_is_one_line_and_exit_code_2(errors, options):
    assert OPTIONS[options] in errors[options]


def test_an_error_is_said_once_by_all_workers_together(start_job, images, tmp_path):
    job = start_job(2, tmp_path / "run", [images, *SMALL, "--batch-size", 7])
    output = job.finish()
    assert job.process.returncode == 2 and "Traceback" not in output
    assert output.count("--batch-size 7 cannot be shared equally by 2 workers: choose 6 or 8") == 1
    assert not job.folder.exists()


@pytest.mark.parametrize(
    "check_every, save_every, said",
    [
        (3, "2steps", "after epoch 0, step 3: 1 of 2"),
        (7, "9", "after epoch 1, step 1: "),  # longer than an epoch, whose end saves nothing here
        (99, "2steps", "after epoch 0, step 4, and are not saved: "),
    ],
)
def test_a_bit_that_flips_on_one_worker_ends_the_run_and_is_not_saved(
    start_job, images, tmp_path, monkeypatch, check_every, save_every, said
):
    """At the next check, or at the next save if that comes first."""
    (tmp_path / "sitecustomize.py").write_text(FLIP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    job = start_job(
        2,
        tmp_path / "run",
        [images, *SMALL, "-j", 0, "--check-every", check_every, "--save-every", save_every],
    )
    output = job.finish()
    assert job.process.returncode != 0
    [end] = of_kind(job.folder, "end")
    assert (end["how"], end["code"]) == ("error", 1), output
    assert all(part in end["text"] for part in (said, "moco.encoder_q.layer1.0", "worker 1 "))
    assert output.count(f"error: {end['text']}\n") == 1, output
    saved = ["checkpoint_0000_000002.pth.tar"] if save_every == "2steps" else []
    assert [path.name for path in job.folder.glob("checkpoint_*")] == saved


def test_a_finished_folder_is_not_written_over(undisturbed, images, teacher_file):
    folder, _ = undisturbed(2)
    [line] = errors_of("job.train", [[images, *SMALL, "--teacher", teacher_file, "--out", folder]])
    assert "holds a run already" in line


def test_the_original_s_resume_of_a_teacher_is_recognised(
    start_job, images, teacher_file, tmp_path
):
    """Also a queue smaller than the batch, and no launcher: one worker by plain python."""
    arguments = [
        images,
        *SMALL,
        "--resume",
        teacher_file,
        "--epochs",
        1,
        "--moco-k",
        5,
        "-j",
        0,
        "--out",
        tmp_path / "run",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "job.train", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "a checkpoint of resnet50, not a run of resnet18; it is used as --teacher" in done.stdout
    assert "318 tensors under module.encoder_q.* loaded, none missing" in done.stdout
    assert (tmp_path / "run" / "last.pth.tar").is_file()
    assert f"teacher: {teacher_file}" in (tmp_path / "run" / "config.yaml").read_text()
