"""Event files, read by TensorBoard's own reader."""

import io
import os
import resource
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from errors import refused
from job.config import read_config
from job.position import Count
from job.metrics.events import Events
from job.metrics.log import Log
from job.train import train

STEPS = 4  # of an epoch


@pytest.fixture
def events(tmp_path):
    """A function that opens a run's events, and keeps their warnings in `events.warnings`."""
    opened = []

    def start(position=(0, 0), every=1):
        opened.append(
            Events(
                str(tmp_path), position, Count(STEPS), every, ["contrastive"], start.warnings.append
            )
        )
        return opened[-1]

    start.warnings = []
    yield start
    for each in opened:
        each.close()


def shown(folder):
    """Return TensorBoard's reader after reading all of a run's events."""
    reader = EventAccumulator(
        str(folder / "tensorboard"),
        size_guidance=dict.fromkeys(("scalars", "histograms", "images"), 0),
    )
    return reader.Reload()


def scalars(folder, tag):
    """Return the (step, value) pairs of a tag, in order."""
    return [(event.step, pytest.approx(event.value)) for event in shown(folder).Scalars(tag)]


def step(done, **more):
    """Return the record of step `done`, counted from 0."""
    return {
        "steps": done + 1,
        "epoch": done // STEPS,
        "step": done % STEPS,
        "loss": 1 / (done + 1),
        **more,
    }


def test_scalars_have_tag_of_kind_and_name(tmp_path, events):
    some = events()
    some.record(step(5, contrastive=2.0, distillation=3.0, lr=0.5))
    some.record({"epoch": 1, "step": 0, "stage": 4, "cost_after": 0.25, "solving": 0.5})
    some.record({"steps": 6, "epoch": 1, "step": 1, "feature_std": 0.9})
    some.record({"steps": 4, "epoch": 1, "step": 0, "knn": 80.0, "knn_seconds": 2.0})
    some.record({"steps": 8, "epoch": 1, "step": STEPS, "val_top1": 70.0})
    some.record({"kind": "saved", "time": 1.8e9, "epoch": 1, "step": 1, "seconds": 2.0})
    some.record({"kind": "later", "epoch": 1, "step": 1, "loss": 9.0})
    actual = {tag: scalars(tmp_path, tag) for tag in shown(tmp_path).Tags()["scalars"]}
    assert actual == {
        "steps/loss": [(5, 1 / 6)],
        "steps/contrastive": [(5, 2)],
        "steps/distillation": [(5, 3)],
        "steps/ratio": [(5, 1.5)],
        "steps/lr": [(5, 0.5)],
        "refreshes/layer4/cost_after": [(4, 0.25)],
        "refreshes/layer4/solving": [(4, 0.5)],
        "signs/feature_std": [(5, 0.9)],
        "knn/knn": [(4, 80)],
        "knn/knn_seconds": [(4, 2)],
        "validation/val_top1": [(7, 70)],  # at the epoch's last step, not the next one
    }


def test_scalars_have_tag_of_distiller(tmp_path, events):
    some = events()
    for number, distiller in enumerate(("one", "two")):
        position = {"epoch": 1, "step": 0, "distiller": distiller}
        some.record({"kind": "factor", **position, "loss_factor": number})
        some.record({"kind": "refresh", **position, "stage": 4, "changed": number})
    actual = {tag: scalars(tmp_path, tag) for tag in shown(tmp_path).Tags()["scalars"]}
    tags = ("other/{}/loss_factor", "refreshes/{}/layer4/changed")
    assert actual == {
        tag.format(name): [(4, number)]
        for number, name in enumerate(("one", "two"))
        for tag in tags
    }


@pytest.mark.parametrize(
    ("every", "expected"), [(1, range(8)), (2, [1, 3, 5, 7]), (3, [2, 3, 6, 7]), (99, [3, 7])]
)
def test_scalars_every_few_steps_and_at_epoch_end(tmp_path, events, every, expected):
    some = events(every=every)
    for done in range(8):
        some.record(step(done))
    assert [position for position, _ in scalars(tmp_path, "steps/loss")] == list(expected)


def test_resume_before_validation_keeps_last_step(tmp_path, events):
    first = events()
    for done in range(STEPS):
        first.record(step(done))
    second = events((0, STEPS))
    second.record({"epoch": 0, "step": STEPS, "val_top1": 70.0})
    second.record(step(STEPS))
    assert [position for position, _ in scalars(tmp_path, "steps/loss")] == list(range(STEPS + 1))
    assert [position for position, _ in scalars(tmp_path, "validation/val_top1")] == [STEPS - 1]


@pytest.mark.parametrize("resumed", range(1, 9))
def test_resume_shows_each_step_once(tmp_path, events, resumed):
    """Refreshes and validations too. The resumed run replaces those after its checkpoint."""

    def write(some, first, last, loss):
        for done in range(first, last):
            if done % STEPS == 0:
                some.record({"epoch": done // STEPS, "step": 0, "stage": 1, "changed": loss})
                some.histogram("margins", (done // STEPS, 0), np.full(3, loss))
            some.record(step(done) | {"loss": loss})
            if done % STEPS == STEPS - 1:
                some.record({"epoch": done // STEPS, "step": STEPS, "val_top1": loss})

    write(events(), 0, 9, 1.0)
    write(events(divmod(resumed, STEPS)), resumed, 12, 2.0)
    assert scalars(tmp_path, "steps/loss") == [
        (done, 1.0 if done < resumed else 2.0) for done in range(12)
    ]
    starts = [(0, 1.0), (4, 1.0 if resumed > 4 else 2.0), (8, 1.0 if resumed > 8 else 2.0)]
    assert scalars(tmp_path, "refreshes/layer1/changed") == starts
    assert [
        (event.step, event.histogram_value.min) for event in shown(tmp_path).Histograms("margins")
    ] == starts
    ends = [(done, 1.0 if done < resumed else 2.0) for done in (3, 7, 11)]
    assert scalars(tmp_path, "validation/val_top1") == ends


def test_events_are_flushed(tmp_path, events):
    some = events()
    for done in range(3):
        some.record(step(done))
        assert len(scalars(tmp_path, "steps/loss")) == done + 1


def test_histogram_has_finite_values(tmp_path, events):
    some = events()
    some.histogram("margins", (1, 0), np.array([[-1.0, np.nan, -1.0], [2.0, np.inf, -np.inf]]))
    some.histogram("none", (1, 0), np.array([np.nan]))
    some.histogram("one", (1, 0), np.ones(5))
    reader = shown(tmp_path)
    assert sorted(reader.Tags()["histograms"]) == ["margins", "one"]
    [event] = reader.Histograms("margins")
    assert event.step == STEPS
    assert (event.histogram_value.num, event.histogram_value.min, event.histogram_value.max) == (
        3,
        -1,
        2,
    )
    assert sum(event.histogram_value.bucket) == 3


def test_picture_keeps_pixels(tmp_path, events):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    events().picture("views", (0, 2), pixels)
    [event] = shown(tmp_path).Images("views")
    assert event.step == 2
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), pixels)


def test_log_writes_records_to_events(tmp_path, events):
    log = Log(True)
    log.open(str(tmp_path), (0, 0))
    log.events = events()
    log.record("step", **step(2))
    log.close()
    assert scalars(tmp_path, "steps/loss") == [(2, 1 / 3)]
    assert log.events.file.closed


def test_full_disk_is_one_warning(tmp_path, events):
    some = events()
    some.record(step(0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(some.file.name) + 20, before[1]))
    try:
        for done in range(1, 5):
            some.record(step(done))
        some.histogram("margins", (0, 0), np.ones(5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    some.record(step(5))
    [warning] = events.warnings
    assert warning.startswith(
        f"cannot write to {some.file.name}: File too large. The run continues"
    )
    assert scalars(tmp_path, "steps/loss") == [(0, 1.0)]
    events((0, 1)).record(step(1))  # the run, resumed
    assert scalars(tmp_path, "steps/loss") == [(0, 1.0), (1, 0.5)]


def test_missing_package_ends_run_before_folder(images, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    small = ["--image-size", "32", "--batch-size", "8", "--moco-k", "8", "-j", "0", "--tensorboard"]
    config = read_config([str(images), *small, "--out", str(tmp_path / "run")])
    message = refused(train, config)
    assert message.startswith("--tensorboard: the package tensorboard is missing")
    assert "pip install '.[tensorboard]'" in message
    assert not (tmp_path / "run").exists()


def test_resume_is_read_last_for_any_clock(tmp_path, events, monkeypatch):
    """The run resumes on a node whose clock is a day behind, and again at the same time."""
    now = time.time()
    for start, clock in ((0, now + 86400), (3, now), (5, now)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        some = events(divmod(start, STEPS))
        for done in range(start, start + 4):
            some.record(step(done) | {"loss": float(start)})
    expected = [(done, 0 if done < 3 else 3 if done < 5 else 5) for done in range(9)]
    assert scalars(tmp_path, "steps/loss") == expected
