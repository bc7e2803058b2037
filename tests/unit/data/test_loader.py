"""Loader processes, and their failures. They start slowly, so few tests start them."""

import contextlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from multiprocessing.reduction import ForkingPickler

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import job.files
from job.data import loader, shards
from job.data.folders import TrainingOrder, every_nth_batch, scan
from job.cluster.children import end_children
from job.data.image_files import ImageFolder
from job.data.joined import JoinedImages
from job.data.fork_server import start_fork_server
from job.data.loader import Batches
from job.data.loader_process import Flag, Reading, Tasks, begin
from job.data.parcel import Parcel, Shared, unpack
from job.data.shards import PackedImages, save_index
from job.data.tars import Shard, read_shard, write_shard
from job.data.views import CentreViews, RandomViews, collate
from job.errors import RunError, WorkerError
from job.cluster.stop import SIGNALS, Stop
from job.data.augment import RandomView
from batches import SIZE, same, write_numbered


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of twelve images in two classes."""
    return write_numbered(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("rendered", [False, True])
def test_batches_equal_without_processes_after_signals(images, rendered):
    """Two processes prepare the batches of two epochs."""
    order = TrainingOrder(images, total=4, rank=1, size=2, seed=0, epochs=2, start=(0, 1))
    views = RandomViews(images, RandomView(SIZE, True), 2, 0, rendered)
    expected = [collate([views[draw] for draw in draws]) for draws in order]
    assert len(expected) == len(order) == 5
    assert same(list(Batches(views, order, 0)), expected)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    actual = []
    for batch in Batches(views, order, 2):
        actual.append(batch)
        processes = multiprocessing.active_children()
        for process in processes if len(actual) == 1 else []:
            for number in SIGNALS:
                os.kill(process.pid, number)
    assert len(processes) == 2
    assert same(actual, expected)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_batches_of_measuring_keep_their_order(images):
    batches = every_nth_batch(list(range(12)), 5, 0, 1)
    measured = list(Batches(CentreViews(images, SIZE), batches, 2))
    assert [len(labels) for _, labels, _ in measured] == [5, 5, 2]
    assert torch.cat([labels for _, labels, _ in measured]).tolist() == images.labels.tolist()


def test_batches_do_not_change_torch_s_generator(images):
    order = TrainingOrder(images, total=4, rank=0, size=1, seed=0, epochs=1)
    views = RandomViews(images, RandomView(SIZE, False), 2, seed=0)
    torch.manual_seed(1)
    first = list(Batches(views, order, 0))
    torch.manual_seed(2)
    assert same(first, list(Batches(views, order, 0)))


def test_parcel_keeps_values_layout_and_lists(images):
    views = RandomViews(images, RandomView(SIZE, True), 2, 0, rendered=False)
    query, key, _ = collate([views[0, index] for index in range(7)])
    batch = (query, key, torch.arange(7), [f"a/{'ü' * 200}\udcff{number}" for number in range(50)])
    pickled = ForkingPickler.dumps(Parcel(batch))
    assert len(pickled) < 4096
    actual = ForkingPickler.loads(pickled)
    assert same(actual, batch)
    assert actual[0][0].stride() == query[0].stride() and actual[0][0].is_contiguous(
        memory_format=torch.channels_last
    )
    actual[2][0] = 5  # it can be written to


# Failures in a loader process.


class Unpicklable(Exception):
    def __init__(self):
        super().__init__("held by a lock")
        self.lock = threading.Lock()


def take_all_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 10**4))
    with contextlib.suppress(OSError):
        while True:
            os.dup(0)


def kill_with_locks():
    """End as a process that is killed while it tests DataLoader's event."""
    frame = sys._getframe()
    while "done_event" not in frame.f_locals:
        frame = frame.f_back
    if condition := getattr(frame.f_locals["done_event"], "_cond", None):
        condition.acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def raise_error(error):
    raise error


# Name: the action of a loader process after image 7, and parts of the line.
TROUBLE = {
    "killed": (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        "was ended by SIGKILL while",
        "memory ran out",
        "--workers",
    ),
    "killed at DataLoader's event": (kill_with_locks, "was ended by SIGKILL while"),
    "crashed": (
        lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "was ended by SIGSEGV while",
        "Remove that file",
    ),
    "a bus error": (
        lambda: os.kill(os.getpid(), signal.SIGBUS),
        "was ended by SIGBUS while",
        "ran out",
    ),
    "left": (lambda: os._exit(3), "ended with exit code 3 while"),
    "an exception": (lambda: raise_error(KeyError("odd")), "KeyError: 'odd' (test_loader.py:"),
    "an exception that cannot be pickled": (
        lambda: raise_error(Unpicklable()),
        "Unpicklable: held by a lock",
    ),
    "no memory": (lambda: raise_error(MemoryError("17 GB")), "MemoryError: 17 GB"),
    "content that cannot be pickled": (
        lambda: [threading.Lock()],
        "TypeError: a batch holds a lock",
    ),
    "no file descriptors": (take_all_files, "OSError: [Errno 24] Too many open files"),
    "still": (lambda: os.kill(os.getpid(), signal.SIGSTOP),),
    "an error of ours": (
        lambda: raise_error(RunError("a file system fails")),
        "a file system fails",
    ),
}


class Troubled(CentreViews):
    """Views that fail at image 7."""

    def __init__(self, images, name):
        super().__init__(images, SIZE)
        self.name = name

    def __getitem__(self, index):
        view, label, bad = super().__getitem__(index)
        if index == 7:
            bad = TROUBLE[self.name][0]() or bad
        return view, label, bad


@pytest.mark.parametrize("name", sorted(TROUBLE.keys() - {"still"}))
def test_failure_names_cause_and_file(images, name):
    with pytest.raises(WorkerError) as caught:
        list(Batches(Troubled(images, name), [[0], [1], [6, 7], [8]], 2))
    for part in TROUBLE[name][1:]:
        assert part in str(caught.value)
    if name != "an error of ours":  # its text is complete
        assert images.path(7) in str(caught.value)


@pytest.mark.parametrize("name", ["an exception", "an error of ours"])
def test_failure_is_the_same_without_processes(images, name):
    with pytest.raises(WorkerError) as caught:
        list(Batches(Troubled(images, name), [[7]], 0))
    assert TROUBLE[name][1] in str(caught.value)


# A stopped loader process.


def still(images, **arguments):
    """Return batches of two processes. The second one never arrives, the first process has more."""
    return Batches(Troubled(images, "still"), [[0], [7], [2], [3], [4]], 2, **arguments)


def test_wait_warns_and_ends_at_its_limits(images):
    warnings = []
    batches = still(images, remark=warnings.append)
    next(batches)
    batches.warn, batches.end = 0.6, 2.0
    with pytest.raises(WorkerError) as caught:
        next(batches)
    assert warnings[-1].startswith("no batch for ") and f"reads {images.path(7)}" in warnings[-1]
    assert f"reads {images.path(7)}, ended after HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=2" in str(
        caught.value
    )


def test_wait_ends_after_a_signal(images, monkeypatch):
    monkeypatch.setattr(loader, "GRACE", 0.6)
    stop = Stop()
    try:
        batches = still(images, stop=stop)
        next(batches)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(
            WorkerError, match=f"SIGTERM arrived, but no batch .*{images.path(7)}.*--resume auto"
        ):
            next(batches)
    finally:
        stop.restore()


def test_wait_end_kills_stopped_processes(images):
    batches = Batches(Troubled(images, "still"), [[7], [7]], 2, patience=(0.3, 0.6))
    with pytest.raises(WorkerError, match="no batch for"):
        next(batches)
    assert not any(process.is_alive() for process in batches.processes)
    assert end_children()


def test_fork_server_end_is_named(images):
    batches = still(images)
    next(batches)
    processes = [psutil.Process(process.pid) for process in batches.processes]
    psutil.Process(processes[0].ppid()).kill()
    with pytest.raises(
        WorkerError,
        match="the process that starts loader processes has ended, probably because memory",
    ):
        list(batches)
    for process in processes:  # usually they end with the worker
        process.kill()


def test_fork_server_failure_unblocks_signals(monkeypatch):
    def fail():
        raise OSError("no file descriptors")

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    modules = list(forkserver._forkserver._preload_modules)
    monkeypatch.setattr(forkserver, "ensure_running", fail)
    with pytest.raises(OSError, match="no file descriptors"):
        start_fork_server()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    assert forkserver._forkserver._preload_modules == modules


@pytest.mark.slow
def test_fork_server_end_during_start_is_named(images, monkeypatch):
    start_fork_server()
    server, connect = forkserver._forkserver, forkserver.connect_to_new_process

    def kill_after(fds):
        os.kill(server._forkserver_pid, signal.SIGSTOP)
        ends = connect(fds)
        os.kill(server._forkserver_pid, signal.SIGKILL)
        return ends

    monkeypatch.setattr(forkserver, "connect_to_new_process", kill_after)
    with pytest.raises(
        WorkerError,
        match="the process that starts loader processes has ended, probably because memory",
    ):
        Batches(CentreViews(images, SIZE), [[0]], 1)


def test_lost_batch_is_an_error_not_a_dead_thread():
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    memory = Shared(8)
    memory.process = ended.pid
    assert isinstance(unpack(memory, [8]), FileNotFoundError)


# Later Pythons warn of forks with threads.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("kind", [Reading, Flag])
def test_late_loader_process_ends_silently(kind, capfd):
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    sent = kind(Shared(16))
    sent.memory.process = ended.pid
    process = multiprocessing.get_context("fork").Process(
        target=ForkingPickler.loads, args=(ForkingPickler.dumps(sent),)
    )
    process.start()
    process.join()
    assert (process.exitcode, capfd.readouterr().err) == (1, "")


MANY = 20_000


def many(kind, tmp_path):
    """Return a set of MANY images, which do not exist."""
    names = [f"class_{number % 9:04d}/image_{number:08d}.jpeg" for number in range(MANY)]
    folder = ImageFolder("root", ["c"], names, [number % 3 - 1 for number in range(MANY)], 0)
    if kind == "joined":
        return JoinedImages([folder, ImageFolder("other", ["c"], names[:9], [0] * 9, 0)], 0)
    if kind == "packed":
        offsets = list(range(MANY))
        save_index(str(tmp_path), ["c"], [Shard("0.tar", 0, offsets, offsets, [0] * MANY, names)])
        (tmp_path / "0.tar").touch()
        return PackedImages(str(tmp_path), 0)
    return folder


@pytest.mark.parametrize("kind", ["folder", "joined", "packed"])
def test_loader_processes_map_names_and_labels(tmp_path, kind):
    """A process's own data of a set does not grow with the set. It reads the same images."""
    images = many(kind, tmp_path)
    tasks = Tasks(CentreViews(images, SIZE), Reading(Shared(16)), packed=True)
    sent = [bytes(ForkingPickler.dumps(tasks)) for _ in range(2)]
    assert len(sent[0]) < 4000
    for actual in (ForkingPickler.loads(content).views.images for content in sent):
        assert [actual.path(index) for index in range(0, MANY, 777)] == [
            images.path(index) for index in range(0, MANY, 777)
        ]
        assert np.array_equal(actual.labels, images.labels) and actual.digest(
            0, 1, 8
        ) == images.digest(0, 1, 8)
    assert isinstance(images.labels, np.ndarray) and tasks.views.images is images


SMALL_SHM = """
import os, sys, torch
from job.data.folders import scan
from job.cluster.children import end_children
from job.data.loader import Batches
from job.data.views import CentreViews

if __name__ == "__main__":
    images = scan(sys.argv[1], "train")
    room = os.statvfs("/dev/shm")
    batches = list(Batches(CentreViews(images, 128), [list(range(12))] * 6, 2))
    print(len(batches), batches[0][0].nbytes > room.f_blocks * room.f_frsize)
"""


@pytest.mark.slow
@pytest.mark.short
def test_batches_need_no_dev_shm(images):
    """A mount namespace has a /dev/shm of 64 KiB, in which torch's own loaders hang."""
    data = os.path.dirname(images.root)
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm || exit 77; exec "$0" -c "$1" "$2"'
    command = ["unshare", "--mount", "sh", "-c", script, sys.executable, SMALL_SHM, data]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"mounting is not allowed here, run as root: {done.stderr.strip()}")
    assert done.stdout.split() == ["6", "True"], done.stderr


# A failing file system: its disk image is truncated.


def mounted(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here, run as root: {done.stderr.strip()}")


@pytest.fixture
def failing_disk(tmp_path, request):
    """A folder, plain or packed, on a disk whose reads fail, and a function that repairs it."""
    disk, mount = tmp_path / "disk.img", tmp_path / "disk"
    mount.mkdir()
    with open(disk, "wb") as file:
        file.truncate(2**24)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    mounted("-o", "loop", disk, mount)
    try:
        folder = mount / "train" / "a"
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (40, 40), (90 * number, 9, 9)).save(folder / f"{number}.bmp")
        if request.param == "packed":
            content = (folder / "0.bmp").read_bytes()
            write_shard(
                str(mount / "train" / "s.tar"),
                [(0, "a/0.bmp", 0, content), (1, "a/1.bmp", 0, content)],
            )
            shards.save_index(
                str(mount / "train"), ["a"], [read_shard(str(mount / "train" / "s.tar"))]
            )
        subprocess.run(["umount", mount], check=True)
        mounted("-o", "loop,ro", disk, mount)
        scanned = scan(str(mount), "train", max_bad=1)
        disk_bytes = disk.read_bytes()
        os.truncate(disk, 4096)

        def restore():
            with open(disk, "r+b") as file:
                file.write(disk_bytes)

        yield scanned, restore
    finally:
        subprocess.run(["umount", "--lazy", mount])


@pytest.mark.parametrize("failing_disk", ["folder", "packed"], indirect=True)
def test_failing_file_system_names_the_file(failing_disk, monkeypatch, capfd):
    """No image is replaced, because that would change the training."""
    images, _ = failing_disk
    monkeypatch.setattr(job.files, "PAUSES", (0, 0.1))
    with pytest.raises(WorkerError) as caught:
        next(Batches(CentreViews(images, SIZE), [[0]], 0))
    assert f"cannot read {images.path(0)}: Input/output error, tried 3 times" in str(caught.value)
    warnings = capfd.readouterr().err.splitlines()
    assert warnings == [
        f"warning: cannot read {images.path(0)}: Input/output error; next try in {pause} s"
        for pause in (0, 0.1)
    ]


@pytest.mark.parametrize("failing_disk", ["folder", "packed"], indirect=True)
def test_recovering_file_system_changes_no_batch(failing_disk, monkeypatch, capfd):
    images, restore = failing_disk
    monkeypatch.setattr(job.files, "PAUSES", (0, 600))
    monkeypatch.setattr(time, "sleep", lambda pause: restore() if pause else None)
    image, label, bad = images.read(0)
    assert (image.shape, label, bad) == ((40, 40, 3), 0, [])
    assert capfd.readouterr().err.count("Input/output error") == 2


# Loader processes of a killed worker.


def load(sender):
    """A loader process that would never end."""
    begin(0)
    sender.send(os.getpid())
    time.sleep(600)


def work(sender):
    """A worker with such a loader process, which does not end either."""
    multiprocessing.get_context("fork").Process(target=load, args=(sender,)).start()
    time.sleep(600)


# Later Pythons warn of forks with threads.
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_loader_process_ends_with_its_worker():
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(sender,))
    worker.start()
    assert receiver.poll(60)
    process = psutil.Process(receiver.recv())
    worker.kill()
    worker.join()
    _, alive = psutil.wait_procs([process], timeout=10)
    for left in alive:
        left.kill()
    assert not alive
