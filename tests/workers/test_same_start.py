"""Workers that start with different options or versions end with the same error line."""

import dataclasses
import importlib.metadata
from functools import partial

import pytest
import timm
import torch

from job import embed
from job.cluster import comm, same_start, task
from job.config import Config, LinearConfig
from job.embed import EmbedConfig
from job.errors import RunError
from job.cluster.objects import allgather, allgather_text
from job.evaluate import classifier
from steps import build_training

MOBILE = "timm/mobilenetv3_small_050"

OPTIONS = dataclasses.asdict(Config(data="images", config=["small"]))


def last():
    """Return the rank of the last worker, which differs."""
    return comm.size() - 1


def outcome(on_cpu=True, **changed):
    """Return the error line of all workers, or None.

    changed: options of the last worker.
    """
    options = OPTIONS | (changed if comm.rank() == last() else {})
    try:
        same_start.check(options, f"node{comm.rank() // 2}", on_cpu)
        line = None
    except RunError as error:
        line = str(error)
        assert error.code == 2
    [line] = set(allgather(line, "outcome"))
    return line


def expected(text, advice, more=""):
    """Return the expected error line, or None with one worker.

    text: has one `{}` for the last worker, which has the minority, also of two.
    """
    where = f"on worker {last()} (node node{last() // 2})"
    return f"{text.format(where)}, as on worker 0{more}. {advice}" if last() else None


def test_same_start_is_no_error():
    assert outcome() is None


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"moco_t": 0.3}, "--moco-t 0.3 {}: expected 0.07"),
        ({"epochs": 3}, "--epochs 3 {}: expected 200"),
        ({"seed": 1}, "--seed 1 {}: expected 0"),
        ({"crop_min": 0.5}, "--crop-min 0.5 {}: expected 0.2"),
        ({"schedule": [1]}, "--schedule [1] {}: expected [120, 160]"),
        ({"resume": "auto"}, "--resume auto {}: expected ''"),
        ({"config": []}, "--config [] {}: expected ['small']"),
        ({"workers": 1}, "--workers 1 {}: expected -1"),
        ({"data": "/home/\udc80"}, "--data /home/\\udc80 {}: expected images"),
    ],
    ids=str,
)
def test_different_option_is_named_with_its_worker(changed, text):
    assert outcome(**changed) == expected(text, "Start all workers with the same options")


def test_other_differences_are_counted():
    more = "; other differences: 2"
    advice = "Start all workers with the same options"
    line = outcome(seed=1, lr=0.5, arch="resnet34")
    assert line == expected("--lr 0.5 {}: expected 0.03", advice, more)


def test_package_version_is_named_before_options(monkeypatch):
    if comm.rank() == last():
        monkeypatch.setattr(torch, "__version__", "2.13.0")
    version = allgather(torch.__version__ + "", "version")[0]
    more = "; other differences: 1"
    line = outcome(seed=1)
    advice = "Install the same version, or use the same image, on all nodes"
    assert line == expected(f"torch 2.13.0 {{}}: expected {version}", advice, more)


def test_program_digest_is_named_first(monkeypatch, tmp_path):
    own = same_start.program_digest()
    for package in ("job", "mgd", "moco"):
        (tmp_path / package / "run").mkdir(parents=True)
    (tmp_path / "moco" / "run" / "model.py").write_text("pass")
    monkeypatch.setattr(same_start, "ROOT", tmp_path)
    other = same_start.program_digest()
    (tmp_path / "moco" / "run" / "model.py").rename(tmp_path / "moco" / "model.py")
    assert len({own, other, same_start.program_digest()}) == 3
    (tmp_path / "moco" / "model.pyc").touch()
    other = same_start.program_digest()
    if comm.rank() != last():
        monkeypatch.undo()
    advice = "Install the same version, or use the same image, on all nodes"
    more = "; other differences: 1"
    text = f"this program's files {other} {{}}: expected {own}"
    assert outcome(seed=1) == expected(text, advice, more)


@pytest.mark.parametrize(
    ("own", "other", "least"), [("AVX512", "AVX2", "avx2"), ("DEFAULT", "SVE256", "default")]
)
def test_cpu_kernels_are_named_only_without_gpus(monkeypatch, own, other, least):
    kernels = other if comm.rank() == last() else own
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kernels)
    advice = f"Set ATEN_CPU_CAPABILITY={least} for all workers, or use nodes with the same CPUs"
    assert outcome() == expected(f"CPU kernels {other} {{}}: expected {own}", advice)
    assert outcome(on_cpu=False) is None


def outcome_of(work):
    """Return the error line of all workers in `work()`, or None."""
    try:
        work()
        line = None
    except RunError as error:
        line = str(error)
    [line] = set(allgather(line, "outcome"))
    return line


@pytest.fixture
def other_timm(monkeypatch):
    """Set another version of timm on the last worker. Return the expected error line."""
    own = importlib.metadata.version
    versions = {"timm": "1.0.0"} if comm.rank() == last() else {}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or own(name))
    advice = "Install the same version, or use the same image, on all nodes"
    where = f"on worker {last()} (node {task.node()})"
    line = f"timm 1.0.0 {where}: expected {own('timm')}, as on worker 0. {advice}"
    return line if last() else None


def test_timm_version_counts_only_for_timm_networks(run, other_timm):
    built = []
    assert outcome_of(lambda: run.build("timm/resnet18", lambda: built.append(1))) == other_timm
    assert len(built) == (not last())
    for arch in ("resnet18", "own_network:Small"):
        assert outcome_of(partial(run.build, arch, partial(built.append, arch))) is None
        assert built[-1] == arch


def test_worker_without_timm_is_named(run, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    expected = importlib.metadata.version("timm")
    if comm.rank() == last():
        monkeypatch.setattr(importlib.metadata, "version", version)
    line = outcome_of(lambda: run.build("timm/resnet18", lambda: None))
    assert last() == 0 or line.startswith(f"timm none on worker {last()} (node ")
    assert last() == 0 or f": expected {expected}, as on worker 0. " in line


def train_student(run, folder, path):
    build_training(run, folder, arch=MOBILE, image_size=32, batch_size=8)


def train_by_teacher(run, folder, path):
    build_training(run, folder, teacher=path, image_size=32, batch_size=8, distill=["simreg"])


def train_classifier(run, folder, path):
    classifier.frozen(LinearConfig(data=str(folder), pretrained=path, image_size=32), run)


def compute_features(run, folder, path):
    embed.write_features(EmbedConfig(data=str(folder), pretrained=path, out=f"{folder}/a.npy"), run)


WORKS = (train_student, train_by_teacher, train_classifier, compute_features)


@pytest.mark.parametrize("work", WORKS)
def test_programs_end_with_another_timm(run, other_timm, tmp_path, work):
    """It is enough that the checkpoint file names a network of timm."""
    path = run.on_first(lambda: str(tmp_path / "timm.pth"))
    if comm.rank() == 0:
        state = timm.create_model(MOBILE.removeprefix("timm/"), num_classes=0).state_dict()
        torch.save({"arch": MOBILE, "state_dict": state}, path)
    (tmp_path / "images").mkdir()
    if not last():
        pytest.skip("one worker has one version")
    assert outcome_of(lambda: work(run, tmp_path / "images", path)) == other_timm


def test_majority_has_the_expected_value():
    starts = [{"--seed": value} for value in ("1", "0", "1", "0", "0")]
    line = same_start.difference(["a", "a", "b", "b", "b"], starts)
    assert line.startswith("--seed 1 on workers 0, 2 (node a, b): expected 0, as on worker 1. ")
    line = same_start.difference(["a"] * 20, [{"--seed": "0"}] * 11 + [{"--seed": "1"}] * 9)
    assert line.startswith(
        "--seed 1 on workers 11, 12, 13, 14, 15, 16, 17, 18, ... (node a): expected 0"
    )


def test_text_arrives_unchanged():
    assert allgather_text(f"{comm.rank()} ü" * (comm.rank() + 1), "text") == [
        f"{n} ü" * (n + 1) for n in range(comm.size())
    ]
