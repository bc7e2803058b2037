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
    """The session's run with a log of its own, and no bad images yet."""
    monkeypatch.setattr(run, "log", Kept())
    monkeypatch.setattr(run, "bad_images", set())
    return run


def every(value):
    return allgather(value, "every")


def raised(work):
    """What RunError `work` raises, as (text, code) of each worker; None where it raises none."""
    try:
        work()
    except RunError as error:
        return every((str(error), error.code))
    return every(None)


def test_a_run_knows_its_place(run):
    assert every((run.rank, run.size)) == [(rank, comm.size()) for rank in range(comm.size())]


def test_on_first_gives_all_what_the_first_worker_found(run):
    calls = []

    def work():
        calls.append(run.rank)
        return {"of": run.rank, "tensor": torch.arange(3)}

    result = run.on_first(work)
    assert every((result["of"], result["tensor"].tolist())) == [(0, [0, 1, 2])] * comm.size()
    assert every(calls) == [[0]] + [[]] * (comm.size() - 1)


@pytest.mark.parametrize("code", [1, 2])
def test_an_error_of_the_first_worker_is_everyones_with_its_text_and_code(run, code):
    def fail():
        raise RunError(f"worker {run.rank} has found nothing", code)

    assert (
        raised(lambda: run.on_first(fail)) == [("worker 0 has found nothing", code)] * comm.size()
    )


def test_on_all_gives_each_worker_its_own_result(run):
    assert every(run.on_all(lambda: run.rank)) == list(range(comm.size()))


@pytest.mark.parametrize("code", [1, 2])
def test_an_error_of_the_last_worker_only_is_everyones_with_its_rank_and_node(run, code):
    def fail():
        if run.rank == comm.size() - 1:
            raise RunError(f"worker {run.rank} lacks a package", code)

    where = f"rank {comm.size() - 1} on {task.node()}: " if comm.size() > 1 else ""
    text = f"{where}worker {comm.size() - 1} lacks a package"
    assert raised(lambda: run.on_all(fail)) == [(text, code)] * comm.size()


def test_an_error_of_all_workers_has_no_rank(run):
    def fail():
        raise RunError("no")

    assert raised(lambda: run.on_all(fail)) == [("no", 2)] * comm.size()


def test_a_log_that_the_disk_does_not_take_ends_all_workers_with_its_error(run, monkeypatch):
    log = Log(speaks=run.rank == 0)
    log.file = open("/dev/full", "ab", buffering=0)
    monkeypatch.setattr(run, "log", log)
    assert run.total(one=1) == {"one": comm.size()}
    log.note("hello")
    [(said, code)] = set(raised(lambda: run.total(one=1)))
    assert said.startswith("cannot write to /dev/full: No space left on device") and code == 2
    log.close()


def test_workers_go_on_after_an_error_of_the_first(run):
    raised(lambda: run.on_first(lambda: (_ for _ in ()).throw(RunError("no"))))
    assert every(run.on_first(lambda: 7)) == [7] * comm.size()


def test_total_sums_each_value_over_the_workers(run):
    """Numbers, truths and tensors, in float64: a count beyond 2**24 keeps its last digit."""
    ranks = range(1, comm.size() + 1)
    mine = run.rank + 1
    found = run.total(
        images=2**24 + mine,
        stop=run.rank == 0,
        loss=torch.tensor(0.5 * mine, requires_grad=True),
        correct=torch.tensor(10 * mine),
    )
    expected = {
        "images": float(sum(2**24 + rank for rank in ranks)),
        "stop": 1.0,
        "loss": 0.5 * sum(ranks),
        "correct": 10.0 * sum(ranks),
    }
    assert every(found) == [expected] * comm.size()


def test_going_back_names_the_checkpoints_that_are_replaced(run, monkeypatch, tmp_path):
    """Whichever name --resume gives: a number, last.pth.tar or best.pth.tar."""
    for epoch in (1, 2, 3):
        (tmp_path / f"checkpoint_{epoch:04d}_000000.pth.tar").touch()
    for name, value in Run(str(tmp_path), keep=3).__dict__.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "log", Log(speaks=run.rank == 0))
    for epoch in (1, 3):
        saved = {
            "epoch": epoch,
            "step": 0,
            "images": 56,
            "config": {"batch_size": 8},
            "workers": run.size,
        }
        run.begin({"batch_size": 8}, saved, 56, "auto")
        run.log.close()
    later = [record["later"] for record in of_kind(tmp_path, "resumed")]
    assert every(later)[0] == [
        ["checkpoint_0002_000000.pth.tar", "checkpoint_0003_000000.pth.tar"],
        [],
    ]


@pytest.fixture
def ranks(run):
    """A file's name of each worker."""
    return [f"{rank}.png" for rank in range(comm.size())]


@pytest.fixture
def many(ranks):
    """A list of 1000 images, with those of `ranks`."""
    return ImageList("", [*ranks, *(f"good{number}.png" for number in range(1000 - len(ranks)))], 0)


def bad(*paths):
    """Undecodable files as a loader names them."""
    return [printable(f"{path}: truncated") for path in paths]


def test_bad_images_are_the_same_set_everywhere_each_named_once(run, ranks, many):
    run.note_bad_images(bad(ranks[run.rank], "shared.png"), 100, many)
    run.note_bad_images(bad(ranks[run.rank], "late.png") if run.rank == 0 else [], 100, many)
    files = {*bad(*ranks, "shared.png", "late.png")}
    for found, named in every((run.bad_images, run.log.texts("undecodable"))):
        assert found == files
        assert sorted(named) == sorted(files)


@pytest.mark.parametrize(
    "old, new", [("/data/a", "/staged/b"), ("/data/two\u3000words", "/data/two\u3000words")]
)
def test_bad_images_of_data_that_has_moved_count_once(run, old, new, ranks, many):
    """As those of a checkpoint do; and all images of a root are found to be bad if its name does not print."""
    paths = [f"{old}/train/{name}" for name in ranks]
    run.note_bad_images(bad(paths[run.rank]), 100, ImageList(f"{old}/", many.names, 0))
    labels = [-1] * comm.size()
    images = ImageFolder(f"{new}/train", [], ranks, labels, 0)
    found = raised(lambda: run.note_bad_images(bad(images.path(run.rank)), 100, images))
    assert every(run.bad_images) == [{*bad(*(f"train/{name}" for name in ranks))}] * comm.size()
    [first] = bad(images.path(0))
    text = f"{comm.size()} of {comm.size()} images cannot be decoded, and --max-bad-images is 100"
    assert found == [(f"{text}; the first: {first}", 2)] * comm.size()


def test_bad_images_up_to_the_limit_are_let_pass(run, ranks, many):
    found = raised(lambda: run.note_bad_images(bad(ranks[run.rank]), comm.size(), many))
    assert found == [None] * comm.size()


def test_one_bad_image_above_the_limit_ends_all_workers(run, ranks, many):
    """Each worker has met one alone: none of them knows by itself that the limit is passed."""
    limit = comm.size() - 1
    found = raised(lambda: run.note_bad_images(bad(ranks[run.rank]), limit, many))
    text = f"{comm.size()} of 1000 images cannot be decoded, and --max-bad-images is {limit}; "
    assert found == [(f"{text}the first: {bad('0.png')[0]}", 2)] * comm.size()


@pytest.mark.parametrize("root", ["", "lists/list.txt"])
@pytest.mark.parametrize("twice", [False, True])
def test_images_that_are_all_bad_end_all_workers(run, root, twice, ranks):
    """Also those of a list, which can name a file twice. They are logged under their own paths."""
    paths = [f"/far/a: b/{name}" for name in ranks]
    images = ImageList(root, paths * (1 + twice), 0)
    found = raised(lambda: run.note_bad_images(bad(paths[run.rank]), 100, images))
    text = f"{len(images)} of {len(images)} images cannot be decoded, and --max-bad-images is 100; "
    assert found == [(f"{text}the first: {bad(paths[0])[0]}", 2)] * comm.size()
    assert every(run.log.texts("undecodable"))[0] == bad(*paths)
    assert raised(lambda: run.note_bad_images([], 100, images)) == [None] * comm.size()


@pytest.fixture(
    params=[name for name in task.LAUNCHERS if name != "srun"]
)  # which is run for real in tests/slurm
def launcher(request, monkeypatch):
    """(name, size -> None): a launcher whose variables can be set as if it had started so many tasks."""
    for variables in task.LAUNCHERS.values():
        for variable in variables:
            monkeypatch.delenv(variable, raising=False)
    rank, size = task.LAUNCHERS[request.param]
    monkeypatch.setenv(rank, str(comm.rank()))
    # What starting sets as it goes is put back: Horovod's settings, and devices and threads of this session.
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(comm, "start", lambda: None)  # this session's workers are connected
    return request.param, lambda tasks: monkeypatch.setenv(size, str(tasks))


def test_tasks_that_are_not_horovods_workers_are_refused(launcher):
    """So many whole runs, each of one worker, would write over one another's files."""
    name, start = launcher
    start(comm.size() + 1)
    found = raised(lambda: launch.start({}))
    text = f"{name} started {comm.size() + 1} tasks, but Horovod has {comm.size()} workers"
    assert all(error and error[0].startswith(text) and error[1] == 2 for error in found)


def test_as_many_tasks_as_horovod_has_workers_start(launcher):
    _, start = launcher
    start(comm.size())
    assert raised(lambda: launch.start({})) == [None] * comm.size()
