"""The journal of job.train: records and log lines of steps and epochs."""

import math
import time
from types import SimpleNamespace

import pytest

from job.config import Config
from job.errors import RunError
from job.hints import Expectation
from job.frameworks.moco import MoCoFramework
from job.journal import TrainingJournal
from job.position import Count
from runs import Kept


class ProgressLog(Kept):
    """A log that keeps its progress lines too."""

    def __init__(self):
        super().__init__()
        self.progress_lines = []

    def progress(self, text, done, total, every):
        self.progress_lines.append((text, done, total, every))


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set."""
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.time)
    return now


def moco(config):
    """Return MoCo without its networks."""
    framework = object.__new__(MoCoFramework)
    framework.config, framework.reference = config, math.log(config.moco_k + 1)
    framework.reference_text = "ln(K + 1)"
    return framework


def journal_of(run, config):
    """Return the journal of a run with one distiller."""
    expectation = Expectation(config, moco(config), 1000)
    return TrainingJournal(run, config, moco(config), ["mgd"], expectation)


def journal(size=2, total=32, steps=5, print_freq=3):
    config = Config(moco_k=99, warmup_epochs=0, batch_size=total, print_freq=print_freq)
    run = SimpleNamespace(size=size, log=ProgressLog(), count=Count(steps))
    return journal_of(run, config)


def sums(contrastive=8.0, distillation=2.0, correct=8, gradient=6.0, **more):
    """Return a step's numbers, summed over the workers."""
    loss = contrastive + distillation
    losses = dict(loss=loss, contrastive=contrastive, mgd=distillation)
    return losses | dict(accuracy=100 * correct, gradient=gradient) | more


GRADIENTS = SimpleNamespace(not_finite=lambda: ["layer4.bn2.bias", "conv1.weight"])


def do(book, clock, step, numbers, wait=1.0, work=3.0):
    """Do a step in `wait` + `work` seconds."""
    with book.waiting():
        clock.time += wait
    clock.time += work
    book.step(step, numbers)


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({}, "A lower --lr may help"),
        ({"teacher": "t", "loss_share": 0.0}, "A lower --lr or a higher --loss-factor may help"),
        ({"teacher": "t", "loss_share": 0.1}, "A lower --lr or a lower --loss-share may help"),
        (
            {"precision": "bf16", "fp16_allreduce": True},
            "A lower --lr or --precision float32 or no --fp16-allreduce may help",
        ),
    ],
)
def test_check_finite_names_options_that_may_help(options, advice):
    run = SimpleNamespace(size=2, count=Count(5))
    book = journal_of(run, Config(**options))
    book.start_epoch(0, 0.1)
    with pytest.raises(RunError) as caught:
        book.check_finite(0, sums(contrastive=math.nan), GRADIENTS.not_finite)
    assert str(caught.value).endswith(f"untouched. {advice}")


def test_step_record_has_means_over_workers(clock):
    book = journal()
    book.start_epoch(3, 0.025)
    do(book, clock, 1, sums(stop=0, undecodable=0))
    assert book.run.log.records == [
        {
            "kind": "step",
            "steps": 17,
            "epoch": 3,
            "step": 1,
            "loss": 5.0,
            "contrastive": 4.0,
            "distillation": 1.0,
            "gradient_norm": 3.0,
            "accuracy": 25.0,
            "lr": 0.025,
            "images_per_s": 8.0,
            "data_wait": 0.25,
        }
    ]


def test_first_hint_is_of_the_run_s_first_step_only(clock):
    book = journal(steps=2)
    book.expectation.first = lambda record: {"weak": f"in step {record['steps']}"}
    for epoch in range(2):
        book.start_epoch(epoch, 0.1)
        for step in range(2):
            do(book, clock, step, sums())
    hints = [(record["id"], record["text"]) for record in book.run.log.of_kind("hint")]
    assert hints == [("weak", "in step 1")]


def test_steps_count_over_epochs_from_one(clock):
    book = journal(steps=2)
    for epoch in range(3):
        book.start_epoch(epoch, 0.1)
        for step in range(2):
            do(book, clock, step, sums())
    assert [record["steps"] for record in book.run.log.records] == [1, 2, 3, 4, 5, 6]


def test_time_excludes_work_between_epochs(clock):
    book = journal(total=12)
    book.start_epoch(0, 0.1)
    do(book, clock, 0, sums(), wait=0, work=2)
    do(book, clock, 1, sums(), wait=3, work=1)
    clock.time += 1000  # saving, and another refresh
    book.start_epoch(1, 0.1)
    do(book, clock, 0, sums(), wait=1, work=1)
    assert [(record["images_per_s"], record["data_wait"]) for record in book.run.log.records] == [
        (6, 0),
        (3, 0.75),
        (6, 0.5),
    ]


def test_work_between_steps_is_not_data_wait(clock):
    book = journal(total=12)
    book.start_epoch(0, 0.1)
    do(book, clock, 0, sums(), wait=1, work=1)
    clock.time += 9  # saving
    do(book, clock, 1, sums(), wait=1, work=2)
    assert [(record["images_per_s"], record["data_wait"]) for record in book.run.log.records] == [
        (6, 0.5),
        (1, 1 / 12),
    ]


def test_step_line_has_its_position_in_the_epoch(clock):
    book = journal(steps=5, print_freq=3)
    book.start_epoch(2, 0.03)
    do(book, clock, 4, sums(contrastive=8.0, distillation=2.0))
    [(text, done, total, every)] = book.run.log.progress_lines
    assert (done, total, every) == (5, 5, 3)
    assert text == (
        "epoch 2 step 5/5: loss 5.0000 = contrastive 4.0000 + distillation 1.0000 (ratio 0.25), "
        "contrast accuracy 25.0 %, lr 0.03000, 8.0 images/s, data wait 25 %"
    )


def test_step_line_without_teacher_has_no_distillation(clock):
    book = journal()
    book.start_epoch(0, 0.03)
    do(book, clock, 0, sums(distillation=0.0))
    assert "distillation" not in book.run.log.progress_lines[0][0]
    assert book.run.log.records[0]["distillation"] == 0


def test_epoch_ends_with_its_means(clock):
    book = journal(size=1, total=10)
    book.start_epoch(7, 0.5)
    do(book, clock, 0, sums(contrastive=1.0, distillation=0.0, correct=2), wait=0, work=1)
    do(book, clock, 1, sums(contrastive=3.0, distillation=1.0, correct=4), wait=3, work=1)
    book.end_epoch()
    assert book.run.log.lines == [
        "epoch 7 mean: loss 2.5000 = contrastive 2.0000 + distillation 0.5000 (ratio 0.25), "
        "contrast accuracy 30.0 %, lr 0.50000, 4.0 images/s, data wait 38 %"
    ]


def test_epoch_means_are_of_its_own_steps(clock):
    book = journal(size=1)
    for epoch, loss in enumerate([1.0, 5.0]):
        book.start_epoch(epoch, 0.1)
        do(book, clock, 0, sums(contrastive=loss, distillation=0.0))
        book.end_epoch()
    first, second = book.run.log.lines
    assert "loss 1.0000" in first and "loss 5.0000" in second


def test_epoch_without_steps_logs_no_line(clock):
    book = journal()
    book.start_epoch(0, 0.1)
    book.end_epoch()
    assert book.run.log.lines == []


def test_zero_loss_is_logged(clock):
    """The contrastive loss can underflow to 0, for example at a low temperature."""
    book = journal()
    book.start_epoch(0, 0.1)
    do(book, clock, 0, sums(contrastive=0.0, distillation=2.0))
    book.end_epoch()
    assert "loss 1.0000" in book.run.log.lines[0]


@pytest.mark.parametrize("loss", ["contrastive", "distillation"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_finite_names_loss_and_position(loss, value):
    book = journal()
    book.start_epoch(4, 0.1)
    with pytest.raises(RunError) as caught:
        book.check_finite(17, sums(**{loss: value}), GRADIENTS.not_finite)
    message = str(caught.value)
    assert "\n" not in message
    assert "epoch 4, step 17" in message
    assert f"{loss} {value}" in message
    assert caught.value.code == 1


@pytest.mark.parametrize("value", [0.0, 1e300, -1.0])
def test_check_finite_accepts_finite_losses(value):
    book = journal()
    book.start_epoch(0, 0.1)
    book.check_finite(0, sums(contrastive=value), GRADIENTS.not_finite)


def test_check_finite_refuses_a_gradient():
    book = journal()
    book.start_epoch(2, 0.1)
    with pytest.raises(RunError) as caught:
        book.check_finite(5, sums(gradient=float("inf")), GRADIENTS.not_finite)
    message = str(caught.value)
    assert "epoch 2, step 5" in message and caught.value.code == 1
    assert "gradient inf; in 2 parameters, in the backward pass first layer4.bn2.bias" in message


def test_signs_are_recorded_and_the_last_logged(clock):
    book = journal(steps=5)
    book.start_epoch(2, 0.1)
    do(book, clock, 0, sums())
    normal, collapsed = (
        {"feature_std": std, "queue_rank": 9.0, "dead_layer4": 0.0} for std in (0.9, 0.01)
    )
    book.watch(0, normal)
    book.watch(3, collapsed)
    book.end_epoch()
    assert [record for record in book.run.log.records if record["kind"] == "collapse"] == [
        {"kind": "collapse", "steps": 11, "epoch": 2, "step": 0, **normal},
        {"kind": "collapse", "steps": 14, "epoch": 2, "step": 3, **collapsed},
    ]
    _, features, line = book.run.log.lines
    others = "rank of the queue 9.0, dead channels 0 % of layer4"
    assert features == f"epoch 2 features: spread 0.01 (0: all alike, 1: even), {others}"
    [warning] = [record for record in book.run.log.records if record["kind"] == "warning"]
    assert warning["id"] == "same_features" and line == f"warning: {warning['text']}"


def test_signs_are_logged_in_their_epoch_only(clock):
    book = journal()
    for epoch in range(2):
        book.start_epoch(epoch, 0.1)
        do(book, clock, 0, sums())
        if epoch == 0:
            book.watch(0, {"feature_std": 0.9, "queue_rank": 9.0, "dead_layer4": 0.0})
        book.end_epoch()
    assert sum("features" in line for line in book.run.log.lines) == 1


def test_hints_follow_the_means_of_an_epoch(clock):
    book = journal(steps=20)
    for epoch in range(2):
        book.start_epoch(epoch, 0.1)
        for step in range(20):
            do(book, clock, step, sums(contrastive=2.0, distillation=100.0), wait=3, work=1)
        book.end_epoch()
    kinds = [line.split()[0] for line in book.run.log.lines]
    assert kinds == ["epoch", "hint:", "hint:", "epoch"]
    hints = [record for record in book.run.log.records if record["kind"] == "hint"]
    assert [record["id"] for record in hints] == ["pull", "wait"]
    assert [f"hint: {record['text']}" for record in hints] == book.run.log.lines[1:3]
    assert "50 times" in hints[0]["text"] and "75 %" in hints[1]["text"]
