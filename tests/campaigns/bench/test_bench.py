"""The bench: equal arithmetic on both sides, counted bytes, bars, turns and the model."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch.nn.utils import parameters_to_vector

BENCH = Path(__file__).parent
sys.path.insert(0, str(BENCH))

import baseline  # noqa: E402
import bench  # noqa: E402
import images  # noqa: E402
import imagenet  # noqa: E402
import log_cost  # noqa: E402
import methods  # noqa: E402
import report  # noqa: E402
import scale  # noqa: E402
import scanning  # noqa: E402
import setting  # noqa: E402
import traffic  # noqa: E402
import turns  # noqa: E402
from passes import Passes  # noqa: E402
from single_steps import Steps  # noqa: E402
from job.cluster import comm  # noqa: E402
from job.config import Config  # noqa: E402
from job.distill import DISTILLERS  # noqa: E402
from job.engine.sync_norm import SynchronisedNorm  # noqa: E402
from job.frameworks.simsiam import SimSiamFramework  # noqa: E402
from job.position import Count  # noqa: E402
from job.engine.run import Run  # noqa: E402
from job.frameworks import FRAMEWORKS  # noqa: E402
from job.train import train_epoch  # noqa: E402
from job.build import build  # noqa: E402
from mgd.assignment import assign  # noqa: E402
from mgd.loss import partial_l2  # noqa: E402
from mgd.reducers import absolute_max_pooling  # noqa: E402
from job.data.augment import normalize  # noqa: E402
from job.networks import build_resnet  # noqa: E402

pytestmark = pytest.mark.run

MEETING = {name: bar for name, (_, bar, _) in report.BARS.items()}
BEYOND = {"<=": lambda bar: bar * 1.01, ">=": lambda bar: bar * 0.99, "==": lambda bar: not bar}
TURN = """
import itertools, sys
from pathlib import Path
from job.cluster import comm
from turns import take_turns

comm.start()
turn = itertools.count(1)
take_turns(Path(sys.argv[1]), lambda: {"turn": next(turn), "rank": comm.rank()})
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A folder with eight photographs and a teacher."""
    folder = tmp_path_factory.mktemp("photos")
    setting.write_photos(folder, 8)
    setting.write_teacher(folder)
    return folder


def test_table_requires_all_figures_except_gpu():
    cpu = {name: value for name, value in MEETING.items() if not name.startswith("gpu")}
    assert report.table(MEETING) == report.table(cpu) == []
    assert report.table({}) == list(cpu)
    assert report.table({}, complete=False) == []


@pytest.mark.parametrize("name", report.BARS)
def test_table_names_a_missed_bar(name, capsys):
    sign, bar, _ = report.BARS[name]
    assert report.table(MEETING | {name: BEYOND[sign](bar)}) == [name]
    missed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "MISSED" in line]
    assert missed == [name]


@pytest.mark.parametrize(
    "seconds, quick, code", [(5.0, [], 1), (0.1, [], 0), (5.0, ["--quick"], 0)]
)
def test_bench_exit_code(seconds, quick, code, monkeypatch):
    """1 if a bar is missed, except with --quick."""

    def matching(_):
        """A part."""
        return {"solve_s": seconds}

    monkeypatch.setattr(bench, "Bench", lambda folder, quick: None)
    monkeypatch.setattr(bench, "PARTS", {"matching": matching, "step": None})
    monkeypatch.setattr(sys, "argv", ["bench.py", *quick, "--only", "matching"])
    try:
        bench.main()
        ended = 0
    except SystemExit as end:
        ended = 1 if isinstance(end.code, str) else end.code
    assert ended == code


def test_scale_reads_the_saved_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.keep({"date": "2000-01-01", "passes_bare_s": 8.0, "passes_images": 16})
    assert len(list(tmp_path.glob("2000-01-01-*.json"))) == 1
    assert scale.measured_seconds(json.loads((tmp_path / scale.LATEST.name).read_text()))[0] == 0.5


def test_page_has_bars_and_latest_figures():
    latest = json.loads((BENCH / "results/latest.json").read_text())
    page = (BENCH / "README.md").read_text().partition("## Methods")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    elsewhere = ("gpu_", "method_")
    expected = {figure for figure in report.BARS if not figure.startswith(elsewhere)}
    assert {figure for figure, _, _ in rows} == expected
    for figure, shown, bar in rows:
        sense, bound, _ = report.BARS[figure]
        prefix = {"<=": "at most ", ">=": "at least ", "==": ""}[sense]
        assert bar.startswith(prefix) and json.loads(bar.removeprefix(prefix)) == bound, figure
        if figure not in latest:  # newer than that run
            continue
        number = json.loads(shown.removeprefix("under "))
        if shown.startswith("under "):
            assert latest[figure] < number, figure
        else:
            digits = len(shown.partition(".")[2])
            assert round(latest[figure], digits) == number, figure


def test_methods_has_all_frameworks_and_distillers():
    configs = [Config(**{"teacher": "a.pth"} | more) for more in methods.METHODS.values()]
    assert {config.framework for config in configs} == FRAMEWORKS.keys()
    distillers = {name for config in configs if config.teacher for name in config.distill}
    assert distillers == DISTILLERS.keys()


def calls(modules):
    """Return a counter of the forward passes of modules, which grows from now on."""
    counted = Counter()
    for module in modules:
        kind = type(module).__name__
        module.register_forward_hook(lambda *_, kind=kind: counted.update([kind]))
    return counted


def test_a_step_s_cpu_seconds_exclude_signs_of_collapse(recipe, tmp_path):
    def compute(output):
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        return {}

    options = SimpleNamespace(photos=recipe, size=32)
    with Run(str(tmp_path / "run"), 1) as run:
        steps = Steps(options, run, 4, **methods.METHODS["alone"])
        steps.training.framework.signs = compute
        steps.training.framework.warnings = lambda signs: {}
        start = time.process_time()
        seconds = steps.cpu_seconds()
        assert 0 < seconds < time.process_time() - start - 0.3


@pytest.mark.parametrize("name", ["mgd", *bench.QUICK_METHODS])
def test_bare_passes_are_those_of_a_step(name, recipe, tmp_path):
    """Each layer is used as often. Trained parameters get gradients, which are not the run's."""
    options = SimpleNamespace(photos=recipe, size=32)
    with Run(str(tmp_path / "run"), 1) as run:
        steps = Steps(options, run, 4, **methods.METHODS[name])
        training, bare = steps.training, Passes(steps.training)
        teacher = training.distillation.networks.teacher.net
        heads = [head for _, head in bare.heads]
        own = [bare.student, bare.predictor, *heads, *(net for net, _ in bare.others.values())]
        in_step = calls(layer for net in (training.trained, teacher) for layer in net.modules())
        steps.seconds()
        in_step, added = +in_step, [bucket.added for bucket in training.gradients.buckets]
        in_passes = calls(layer for net in own for layer in net.modules())
        seconds = bare()
    layers = ("Conv2d", "Linear", "BatchNorm1d")
    assert {kind: in_passes[kind] for kind in layers} == {kind: in_step[kind] for kind in layers}
    assert seconds.keys() - {"key"} == {"student", "teacher", "bare"}
    assert seconds["bare"] == pytest.approx(sum(seconds.values()) / 2)
    trained = [value for net in own for value in net.parameters() if value.requires_grad]
    assert all(value.grad is not None for value in trained)
    assert added == [bucket.added for bucket in training.gradients.buckets]


def test_ratio_is_the_median_over_turns():
    """A machine that is slower in a turn is slower for both sides."""
    below = [1.0, 2.0, 4.0, 1.0, 3.0]
    assert setting.ratio([1.5 * value for value in below], below) == pytest.approx(1.5)
    disturbed = [1.5, 99.0, 6.0]
    assert setting.ratio(disturbed, [1.0, 2.0, 4.0]) == pytest.approx(1.5)
    with pytest.raises(ValueError):
        setting.ratio([1.0], [1.0, 2.0])


def test_interleaved_drops_the_first_turn():
    done = []
    tasks = {
        "slow": lambda: (done.append("slow"), time.sleep(0.02)),
        "quick": lambda: done.append("quick"),
    }
    times = setting.interleaved(tasks, repeats=2)
    assert done == ["slow", "quick"] * 3
    assert [len(values) for values in times.values()] == [2, 2] and min(times["slow"]) >= 0.02


def test_baseline_pooling_and_distance_are_ours():
    random = torch.Generator().manual_seed(0)
    teacher, student = (
        torch.randn(3, 12, 5, 4, generator=random),
        torch.randn(3, 4, 5, 4, generator=random),
    )
    matching, margin = (
        torch.randperm(12, generator=random).view(3, 4),
        torch.randn(12, generator=random),
    )
    target, margins = absolute_max_pooling(teacher, margin, matching)
    assert torch.equal(baseline.absolute_max_pooling(teacher, matching), target)
    theirs, ours = (
        baseline.partial_l2(student, target, margins),
        partial_l2(student, target, margins),
    )
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-6)


def test_baseline_step_is_ours(recipe, tmp_path):
    """Loss and update are equal, from the same weights on the same views.

    The second step's loss also depends on the moved keys, the queue and the momentum. With this
    factor both losses matter. The effect of rounding grows with each step.
    """
    torch.set_num_threads(1)
    baseline.hvd.init()
    with Run(str(tmp_path / "run"), keep=1) as run:
        training = build(setting.config(recipe, 8, 64, moco_k=64, loss_factor=1e7), run)
        plain = baseline.Baseline(torch.load(recipe / "teacher.pth"), K=64, factor=1e7)
        net = training.framework.module
        plain.query.load_state_dict(net.encoder_q.state_dict())
        plain.key.load_state_dict(net.encoder_k.state_dict())
        plain.queue = net.queue.clone()
        before = parameters_to_vector(plain.query.parameters()).clone()
        run.count = Count(10)
        journal, random = log_cost.journal(training), torch.Generator().manual_seed(0)
        journal.start_epoch(0, 0.03)
        for step, tolerance in enumerate((1e-5, 1e-3)):
            query, key = torch.randint(256, (2, 8, 3, 64, 64), dtype=torch.uint8, generator=random)
            batch = [query, key], torch.arange(8), []
            train_epoch(training, iter([batch]), journal, 0, range(step, step + 1))
            theirs = plain.step(normalize(query).contiguous(), normalize(key).contiguous())
            ours = journal.records[-1]
            assert ours["loss"] == pytest.approx(theirs, rel=tolerance)
            assert min(ours["contrastive"], ours["distillation"]) > 0.1 * ours["loss"]
            if step == 0:
                moved, mine = (
                    parameters_to_vector(net.parameters()) for net in (plain.query, net.encoder_q)
                )
                assert (mine - moved).norm() < 1e-2 * (moved - before).norm()
        assert (net.queue - plain.queue).norm() < 1e-2 * plain.queue.norm()


def test_scale_has_the_recipe_s_parameters():
    """ResNet-18 with MoCo v2's head, and the distiller's batch norms."""
    student, channels = build_resnet("resnet18", mlp=True), (64, 128, 256, 512)
    of_student = sum(value.numel() for value in student.parameters())
    assert scale.PARAMETERS == of_student + 2 * sum(channels)


@pytest.mark.skipif(
    not importlib.util.find_spec("ortools"),
    reason="OR-Tools is not installed: see tests/campaigns/bench/flow.py",
)
def test_flow_has_the_cost_of_our_matching(tmp_path):
    random = np.random.default_rng(0)
    costs = [random.random((S, T)) for S, T in ((6, 24), (16, 32), (8, 8))]
    np.savez(tmp_path / "costs.npz", *costs)
    done = subprocess.run(
        [sys.executable, BENCH / "flow.py", tmp_path / "costs.npz"],
        capture_output=True,
        text=True,
        check=True,
    )
    ours = [cost.gather(1, assign(cost).T).sum().item() for cost in map(torch.from_numpy, costs)]
    # The flow's costs are rounded to 1e-6.
    assert json.loads(done.stdout)["totals"] == pytest.approx(ours, abs=1e-4)


def test_received_counts_arrived_bytes():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client, server.accept()[0] as peer:
            for size in (1, 1000, 100_000):
                before = traffic.received()
                client.sendall(bytes(size))
                left = size
                while left:
                    left -= len(peer.recv(left))
                assert traffic.received() - before == size


@pytest.mark.parametrize("N", [2, 4])
def test_scale_models_the_counted_bytes(N, tmp_path):
    """With enough images and repeats, chance and the workers' other messages matter little."""
    options = [tmp_path, *"--images-per-worker 256 --size 16 --repeats 40".split()]
    options += ["--parameters", 100_000]
    with open(tmp_path / "output.txt", "w") as output:
        process = turns.launch(N, BENCH / "traffic.py", options, output)
        try:
            assert process.wait(120) == 0, (tmp_path / "output.txt").read_text()
        finally:
            process.terminate()
    counted = json.loads((tmp_path / "traffic.json").read_text())
    modelled = scale.modelled(N, B=256, size=16, dim=traffic.DIM, parameters=100_000)
    for name, model in modelled.items():
        assert counted[f"{name}_bytes_{N}"] == pytest.approx(model, rel=0.02), name


def test_bytes_grow_only_in_the_original(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale.py", "--seconds-per-image", "0.0025"])
    scale.main()
    first = capsys.readouterr().out.partition("SimSiam")[0]
    rows = [line.split() for line in first.splitlines() if line[:8].strip().isdigit()]
    table = {int(cells[0]): [float(cell) for cell in cells[1:]] for cells in rows}
    assert list(table) == scale.WORKERS
    batch = 32 * 3 * 224**2 / 1e6  # MB of a worker's images
    for N, row in table.items():
        ours, _, _, efficiency, original, _, _, original_efficiency, gradients, _ = row
        assert ours < batch and original == pytest.approx(4 * (N - 1) * batch, rel=1e-3)
        assert 0 < original_efficiency < efficiency < 1
        assert gradients == pytest.approx(2 * (N - 1) / N * 46.0, rel=1e-2)


def test_scale_has_simsiam_s_collectives(monkeypatch):
    """Each batch norm has one per view and direction."""
    monkeypatch.setattr(comm, "size", lambda: 2)
    for sync_bn, count in scale.COLLECTIVES.items():
        config = Config(framework="simsiam", arch="resnet18", sync_bn=sync_bn)
        modules = SimSiamFramework(config, [4]).module.modules()
        norms = sum(isinstance(module, SynchronisedNorm) for module in modules)
        assert 2 * 2 * norms == count


def test_norm_table_grows_with_workers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scale.py", "--seconds-per-image", "0.0025"])
    scale.main()
    table = capsys.readouterr().out.split("--sync-bn")[1].splitlines()[2:6]
    rows = [[float(cell.rstrip("%")) for cell in line.split()] for line in table]
    assert [row[0] for row in rows] == [8, 16, 32, 64]
    assert rows[0][1] == pytest.approx(96 * 28 * 50e-6, abs=1e-3)
    for below, above in zip(rows, rows[1:], strict=False):
        assert all(a < b < 100 for a, b in zip(below[1:], above[1:], strict=True))
    assert all(heads < every for _, _, every, _, heads in rows)


def test_hop_of_two_rings():
    fixed, hop = 2e-4, 3e-5
    for N in (2, 4):
        assert scale.hop(N, fixed + 2 * 2 * (N - 1) * hop, fixed) == pytest.approx(hop)
    assert scale.hop(2, 1e-4, 2e-4) == 0.0  # noise


def test_wait_table_grows_with_workers(monkeypatch, capsys):
    argv = ["--seconds-per-image", "0.0025", "--hop", "1e-5", "--fixed", "1e-4"]
    monkeypatch.setattr(sys, "argv", ["scale.py", *argv])
    scale.main()
    lines = capsys.readouterr().out.split("Small messages")[1].splitlines()[4:8]
    table = [[float(cell.rstrip("%")) for cell in line.split()] for line in lines]
    assert [row[0] for row in table] == [8, 16, 32, 64]
    collectives = scale.BUCKETS + 3  # key images, keys, scalars
    assert table[0][1] == pytest.approx(1e3 * collectives * (1e-4 + 28e-5), abs=0.01)
    for _, gloo, gloo_exposed, nccl, nccl_exposed, last, fraction in table:
        assert nccl < gloo and gloo_exposed < gloo and nccl_exposed < nccl
        step = 1e3 * 32 / 2100
        waited = nccl_exposed + last
        assert fraction == pytest.approx(100 * waited / (step + waited), abs=1)
    for below, above in zip(table, table[1:], strict=False):
        assert all(a < b for a, b in zip(below, above, strict=True))


def test_only_gpu_needs_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "Bench", lambda folder, quick: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only", "gpu"])
    with pytest.raises(SystemExit, match="error: --only gpu: no GPU here"):
        bench.main()


def test_scale_shows_counted_bytes(monkeypatch, tmp_path, capsys):
    setting = {"images": 16, "size": 224, "dim": 128, "parameters": scale.PARAMETERS}
    figures = {f"traffic_{name}": value for name, value in setting.items()}
    for N in (2, 4):
        figures |= {f"{name}_bytes_{N}": 7e6 for name in scale.modelled(N, *setting.values())}
    monkeypatch.setattr(scale, "LATEST", tmp_path / "latest.json")
    scale.LATEST.write_text(json.dumps(figures))
    monkeypatch.setattr(sys, "argv", ["scale.py"])
    scale.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if "counted    7.000 MB" in line]
    assert len(lines) == 8
    # 16 x 128 floats of one other worker
    assert sum("keys" in line and "model    0.008 MB" in line for line in lines) == 1


def test_workers_stop_between_turns(tmp_path):
    script = tmp_path / "turn.py"
    script.write_text(TURN)
    python_path = f"{BENCH}:{os.environ.get('PYTHONPATH', '')}"
    with turns.Job(2, script, tmp_path / "job", [], PYTHONPATH=python_path) as job:
        for turn in (1, 2):
            results = job.turn()
            assert [(one["turn"], one["rank"]) for one in results] == [(turn, 0), (turn, 1)]
            workers = [psutil.Process(one["pid"]) for one in results]
            spent = [worker.cpu_times() for worker in workers]
            time.sleep(0.3)
            assert all(turns.is_stopped(worker.pid) for worker in workers)
            assert [worker.cpu_times() for worker in workers] == spent
    assert job.process.returncode == 0
    assert not any(worker.is_running() for worker in workers)


def test_step_with_the_options_of_gpus(recipe, tmp_path):
    """Loader processes, views on the device, and bf16."""
    options = "--size 32 --batch 4 --loaders -1 --augment-on device --precision bf16".split()
    arguments = ["ours", recipe, *options, "--passes"]
    with turns.Job(1, BENCH / "step.py", tmp_path / "job", arguments) as job:
        assert "bare" not in job.turn()[0]
        [figures] = job.turn()
    names = "step bare student key teacher memory logging drawing".split()
    assert min(figures[name] for name in names) > 0
    log = (tmp_path / "job" / "log.txt").read_text()
    assert len(log.splitlines()) >= 6  # three steps, and the ends of their epochs
    [event_file] = (tmp_path / "job" / "tensorboard").iterdir()
    assert event_file.stat().st_size > 1000


def test_job_that_ends_early_shows_its_output(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('no photographs')")
    with (
        pytest.raises(RuntimeError, match="no photographs"),
        turns.Job(1, script, tmp_path / "job", []) as job,
    ):
        job.turn()


def test_is_stopped_from_stop_to_continue():
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            for number, stopped in ((signal.SIGSTOP, True), (signal.SIGCONT, False)):
                process.send_signal(number)
                deadline = time.monotonic() + 5
                while turns.is_stopped(process.pid) != stopped:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
        finally:
            process.kill()


def test_images_measures_steps_decoders_and_memory(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "SIDES", {"500": (setting.PHOTO_SIZE, 2), "600": ((600, 450), 2)})
    monkeypatch.setattr(images, "BATCH", 4)
    argv = [str(tmp_path), str(recipe), *"--size 64 --repeats 1 --processes 1".split()]
    monkeypatch.setattr(sys, "argv", ["images.py", *argv])
    monkeypatch.setattr(setting, "pin", lambda: None)
    images.main()
    figures = json.loads((tmp_path / "images.json").read_text())
    names = "read decode draw crop colours hue blur flip collate send all".split()
    assert {f"images_{name}_ms" for name in names} < figures.keys()
    assert min(figures.values()) > 0
    assert figures["loaders_1_unique_bytes"] <= figures["loaders_1_resident_bytes"]
    assert {"jpeg_500_simplejpeg_8_over_pil", "views_600_over_full"} <= figures.keys()


@pytest.mark.parametrize("name", ["opencv", "simplejpeg"])
def test_decoders_reduce_alike(recipe, name):
    """Each decodes the same pixels at the same fraction of the sides."""
    content = Path(setting.photos(recipe)[0]).read_bytes()
    decode, divisors = images.decoders()[name]
    for divisor in divisors:
        assert np.array_equal(decode(content, divisor), images.by_pil(content, divisor))


def test_scanning_measures_its_links(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "CLASSES", 2)
    monkeypatch.setattr(scanning, "BATCH", 4)
    photo = setting.photos(recipe)[0]
    figures = scanning.measure(tmp_path, photo, [8, 16], 1)
    assert min(figures.values()) > 0 and len(figures) == 11
    root = scanning.links(tmp_path, photo, 16)
    assert sum(len(files) for _, _, files in os.walk(root)) == 16


def test_imagenet_measures_all_tasks(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "CLASSES", 2)
    given = imagenet.Setting(tmp_path, setting.photos(recipe)[0], 400, loaders=1, queries=3)
    figures = imagenet.measure(given, list(imagenet.TASKS))
    for name in imagenet.TASKS:
        assert figures[f"imagenet_{name}_s"] > 0 and figures[f"imagenet_{name}_bytes"] >= 0
    searching = [name for name in figures if name.endswith(("_over_products", "_core_hours"))]
    assert len(searching) == 4 and all(figures[name] > 0 for name in searching)
    assert figures["imagenet_slowest"] == "first_batch"  # it starts processes


def test_imagenet_names_a_failing_task(recipe, tmp_path, monkeypatch):
    def failing(given):
        raise ValueError("no images")

    with pytest.raises(RuntimeError, match="the task failing has failed"):
        imagenet.measured(failing, None)
