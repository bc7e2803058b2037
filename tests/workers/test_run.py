"""Run on several workers: errors, totals, bad images and launchers."""

import pytest
import torch

from job.cluster import comm, launch, task
from job.errors import RunError
from job.cluster.objects import allgather
from job.data.image_files import ImageFolder, ImageList
from job.metrics.log import Log
from job.engine.run import Run
from job.text import printable
from runs import Kept, of_kind


@pytest.fixture
def run(run, monkeypatch):
    """The session's run, with its own log and without bad images."""
    monkeypatch.setattr(run, "log", Kept())
    monkeypatch.setattr(run, "bad_images", set())
    return run


def every(value):
    return allgather(value, "every")


def raised(work):
    """Return the RunError of `work` on each worker: (text, code), or None."""
    try:
        work()
    except RunError as error:
        return every((str(error), error.code))
    return every(None)


def test_rank_and_size(run):
    assert every((run.rank, run.size)) == [(rank, comm.size()) for rank in range(comm.size())]


def test_on_first_returns_the_result_on_all(run):
    calls = []

    def work():
        calls.append(run.rank)
        return {"of": run.rank, "tensor": torch.arange(3)}

    result = run.on_first(work)
    assert every((result["of"], result["tensor"].tolist())) == [(0, [0, 1, 2])] * comm.size()
    assert every(calls) == [[0]] + [[]] * (comm.size() - 1)


@pytest.mark.parametrize("code", [1, 2])
def test_on_first_raises_the_error_on_all(run, code):
    def fail():
        raise RunError(f"worker {run.rank} failed", code)

    assert raised(lambda: run.on_first(fail)) == [("worker 0 failed", code)] * comm.size()


def test_on_all_returns_each_worker_its_result(run):
    assert every(run.on_all(lambda: run.rank)) == list(range(comm.size()))


@pytest.mark.parametrize("code", [1, 2])
def test_on_all_names_the_worker_of_an_error(run, code):
    def fail():
        if run.rank == comm.size() - 1:
            raise RunError(f"worker {run.rank} lacks a package", code)

    where = f"rank {comm.size() - 1} on {task.node()}: " if comm.size() > 1 else ""
    text = f"{where}worker {comm.size() - 1} lacks a package"
    assert raised(lambda: run.on_all(fail)) == [(text, code)] * comm.size()


def test_on_all_names_no_worker_if_all_fail(run):
    def fail():
        raise RunError("no")

    assert raised(lambda: run.on_all(fail)) == [("no", 2)] * comm.size()


def test_log_on_a_full_disk_ends_all_workers(run, monkeypatch):
    log = Log(speaks=run.rank == 0)
    log.file = open("/dev/full", "ab", buffering=0)
    monkeypatch.setattr(run, "log", log)
    assert run.total(one=1) == {"one": comm.size()}
    log.note("hello")
    [(text, code)] = set(raised(lambda: run.total(one=1)))
    assert text.startswith("cannot write to /dev/full: No space left on device") and code == 2
    log.close()


def test_on_first_works_after_an_error(run):
    raised(lambda: run.on_first(lambda: (_ for _ in ()).throw(RunError("no"))))
    assert every(run.on_first(lambda: 7)) == [7] * comm.size()


def test_total_sums_each_value(run):
    """Numbers, booleans and tensors, in float64: counts above 2**24 are exact."""
    ranks = range(1, comm.size() + 1)
    rank = run.rank + 1
    total = run.total(
        images=2**24 + rank,
        stop=run.rank == 0,
        loss=torch.tensor(0.5 * rank, requires_grad=True),
        correct=torch.tensor(10 * rank),
    )
    expected = {
        "images": float(sum(2**24 + rank for rank in ranks)),
        "stop": 1.0,
        "loss": 0.5 * sum(ranks),
        "correct": 10.0 * sum(ranks),
    }
    assert every(total) == [expected] * comm.size()


def test_resume_records_later_checkpoints(run, monkeypatch, tmp_path):
    """A resume from an earlier checkpoint records those that the run will replace."""
    for epoch in (1, 2, 3):
        (tmp_path / f"checkpoint_{epoch:04d}_000000.pth.tar").touch()
    for name, value in Run(str(tmp_path), keep=3).__dict__.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "log", Log(speaks=run.rank == 0))
    for epoch in (1, 3):
        saved = {"epoch": epoch, "step": 0, "images": 56, "workers": run.size}
        saved["config"] = {"batch_size": 8}
        run.begin({"batch_size": 8}, saved, 56, "auto")
        run.log.close()
    later = [record["later"] for record in of_kind(tmp_path, "resumed")]
    names = [f"checkpoint_{epoch:04d}_000000.pth.tar" for epoch in (2, 3)]
    assert every(later)[0] == [names, []]


@pytest.fixture
def ranks(run):
    """One file name per worker."""
    return [f"{rank}.png" for rank in range(comm.size())]


@pytest.fixture
def many(ranks):
    """A list of 1000 images, which begins with `ranks`."""
    return ImageList("", [*ranks, *(f"good{number}.png" for number in range(1000 - len(ranks)))], 0)


def bad(*paths):
    """Return the texts of a loader about undecodable files."""
    return [printable(f"{path}: truncated") for path in paths]


def test_bad_images_are_one_set_on_all_workers(run, ranks, many):
    run.note_bad_images(bad(ranks[run.rank], "shared.png"), 100, many)
    run.note_bad_images(bad(ranks[run.rank], "late.png") if run.rank == 0 else [], 100, many)
    files = {*bad(*ranks, "shared.png", "late.png")}
    for bad_images, logged in every((run.bad_images, run.log.texts("undecodable"))):
        assert bad_images == files
        assert sorted(logged) == sorted(files)  # each once


@pytest.mark.parametrize(
    "old, new", [("/data/a", "/staged/b"), ("/data/two\u3000words", "/data/two\u3000words")]
)
def test_bad_images_of_moved_data_count_once(run, old, new, ranks, many):
    """A resume can have its data in another folder, whose name may not be printable."""
    paths = [f"{old}/train/{name}" for name in ranks]
    run.note_bad_images(bad(paths[run.rank]), 100, ImageList(f"{old}/", many.names, 0))
    labels = [-1] * comm.size()
    images = ImageFolder(f"{new}/train", [], ranks, labels, 0)
    errors = raised(lambda: run.note_bad_images(bad(images.path(run.rank)), 100, images))
    assert every(run.bad_images) == [{*bad(*(f"train/{name}" for name in ranks))}] * comm.size()
    [first] = bad(images.path(0))
    text = f"{comm.size()} of {comm.size()} images cannot be decoded, and --max-bad-images is 100"
    assert errors == [(f"{text}; the first: {first}", 2)] * comm.size()


def test_bad_images_up_to_the_limit_are_allowed(run, ranks, many):
    errors = raised(lambda: run.note_bad_images(bad(ranks[run.rank]), comm.size(), many))
    assert errors == [None] * comm.size()


def test_one_bad_image_above_the_limit_ends_all(run, ranks, many):
    """Each worker has only one, so only the total is above the limit."""
    limit = comm.size() - 1
    errors = raised(lambda: run.note_bad_images(bad(ranks[run.rank]), limit, many))
    text = f"{comm.size()} of 1000 images cannot be decoded, and --max-bad-images is {limit}; "
    assert errors == [(f"{text}the first: {bad('0.png')[0]}", 2)] * comm.size()


@pytest.mark.parametrize("root", ["", "lists/list.txt"])
@pytest.mark.parametrize("twice", [False, True])
def test_only_bad_images_end_all_workers(run, root, twice, ranks):
    """A list can name each file twice. The log has the paths of the list."""
    paths = [f"/far/a: b/{name}" for name in ranks]
    images = ImageList(root, paths * (1 + twice), 0)
    errors = raised(lambda: run.note_bad_images(bad(paths[run.rank]), 100, images))
    text = f"{len(images)} of {len(images)} images cannot be decoded, and --max-bad-images is 100; "
    assert errors == [(f"{text}the first: {bad(paths[0])[0]}", 2)] * comm.size()
    assert every(run.log.texts("undecodable"))[0] == bad(*paths)
    assert raised(lambda: run.note_bad_images([], 100, images)) == [None] * comm.size()


# tests/slurm runs the real srun.
@pytest.fixture(params=[name for name in task.LAUNCHERS if name != "srun"])
def launcher(request, monkeypatch):
    """A launcher's name, and a function that sets its variables for a number of tasks."""
    for variables in task.LAUNCHERS.values():
        for variable in variables:
            monkeypatch.delenv(variable, raising=False)
    rank, size = task.LAUNCHERS[request.param]
    monkeypatch.setenv(rank, str(comm.rank()))
    # The start sets Horovod's settings, devices and threads. Restore this session's afterwards.
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(comm, "start", lambda: None)  # this session's workers are connected
    return request.param, lambda tasks: monkeypatch.setenv(size, str(tasks))


def test_tasks_that_are_not_workers_are_refused(launcher):
    """They would be separate runs of one worker each, which overwrite each other's files."""
    name, set_tasks = launcher
    set_tasks(comm.size() + 1)
    errors = raised(lambda: launch.start({}))
    text = f"{name} started {comm.size() + 1} tasks, but Horovod has {comm.size()} workers"
    assert all(error and error[0].startswith(text) and error[1] == 2 for error in errors)


def test_as_many_tasks_as_workers_start(launcher):
    _, set_tasks = launcher
    set_tasks(comm.size())
    assert raised(lambda: launch.start({})) == [None] * comm.size()
