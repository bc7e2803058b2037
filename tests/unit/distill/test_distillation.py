"""Several distillers of one teacher: targets, losses, weights, factors and changes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from job.config import Config
from job.distill import distillation, loss_factor
from job.cluster import comm
from job.cluster.stop import Stopped
from job.distill.base import Change, Distiller, Networks
from job.distill.distillation import Distillation
from job.distill.teacher import Teacher
from job.frameworks.base import MicroBatch, Output
from job.position import START, Position

STEPS = 5
FEATURES = {"layer4": torch.arange(12.0).view(2, 3, 2, 1)}


class Scaled(Distiller):
    """The loss is `size` times the mean square of the student's features."""

    def __init__(self, config, name, size, seen=None):
        super().__init__(config, {}, None)
        self.name, self.size, self.seen = name, size, [] if seen is None else seen

    def targets(self, teacher, generator):
        self.seen.append((self.name, teacher, torch.randint(2**40, (), generator=generator).item()))
        return self.name

    def loss(self, student, targets):
        assert targets == self.name
        return self.size * student["layer4"].square().mean() / self.factor

    def before_epoch(self, epoch, networks):
        self.seen.append((self.name, "measured", self.factor.item()))
        recorded = (self.name, "recorded", epoch)
        return Change({"factor": torch.tensor(self.size)}, lambda: self.seen.append(recorded))


class Counted(nn.Module):
    """Return FEATURES, and count the passes."""

    passes = 0

    def forward(self, images):
        self.passes += 1
        assert not torch.is_grad_enabled()
        return FEATURES


@pytest.fixture
def seen():
    return []


def together(seen=None, sizes=(1.0, 4.0), **options):
    """Return two distillers, `one` and `two`, and their teacher's network."""
    config = Config(**options)
    run = SimpleNamespace(lines=[], log=None, device=torch.device("cpu"))
    run.log = SimpleNamespace(line=run.lines.append, record=lambda *_, **__: None)
    teacher = Teacher(Counted(), norms={}, digest="abc", shown="")
    framework = SimpleNamespace(encoder=Counted(), reference=3.0, reference_text="three")
    framework.distilled_views = 1
    distillers = [
        Scaled(config, name, size, seen) for name, size in zip(("one", "two"), sizes, strict=True)
    ]
    return Distillation(config, Networks(run, None, framework, teacher), distillers), teacher.net


def batch(part=0, position=START):
    return MicroBatch(torch.zeros(2, 3, 4, 4), position, part, 2 * part)


def output():
    return Output({}, FEATURES, torch.zeros(2, 1), {})


def test_teacher_runs_once_per_micro_batch(seen):
    """Each distiller's random numbers depend only on the position and the micro-batch."""
    both, net = together(seen)
    assert both.targets(batch()) == [["one"], ["two"]] and net.passes == 1
    both.targets(batch(1))
    both.targets(batch(position=Position(0, 1)))
    assert net.passes == 3
    assert [(name, features is FEATURES) for name, features, _ in seen] == [
        ("one", True),
        ("two", True),
    ] * 3
    drawn = [number for *_, number in seen]
    assert drawn[::2] == drawn[1::2] and len(set(drawn)) == 3
    both.targets(batch())
    assert seen[-1][2] == drawn[0]


@pytest.mark.parametrize("views", [1, 2])
def test_loss_is_mean_over_distilled_views(seen, views):
    """Random targets differ between views."""
    both, net = together(seen, loss_factor=2.0)
    both.networks.framework.distilled_views = views
    others = (torch.ones(2, 3, 4, 4),)
    targets = both.targets(MicroBatch(torch.zeros(2, 3, 4, 4), START, 0, 0, others))
    assert targets == [["one"] * views, ["two"] * views] and net.passes == views
    drawn = [number for name, _, number in seen if name == "one"]
    assert len(set(drawn)) == views
    second = {"layer4": 3 * FEATURES["layer4"]}
    outputs = Output({}, FEATURES, torch.zeros(2, 1), {}, (second,) * (views - 1))
    actual = both.losses(outputs, targets, START, STEPS)
    square = FEATURES["layer4"].square().mean().item() * (1 if views == 1 else (1 + 9) / 2)
    assert actual["one"].item() == pytest.approx(square / 2)
    assert actual["two"].item() == pytest.approx(4 * square / 2)


def test_after_update_gets_rows_of_first_views(monkeypatch, seen):
    """It is called once a step with the rows of all micro-batches, only on distillers with rows."""
    both, _ = together(seen)
    both.networks.framework.distilled_views = 2
    first, second = both.distillers
    received = []
    monkeypatch.setattr(
        first, "targets", lambda features, generator: torch.tensor([[len(seen)], [9]])
    )
    monkeypatch.setattr(first, "to_gather", lambda targets: targets)
    monkeypatch.setattr(first, "after_update", received.append)
    monkeypatch.setattr(second, "after_update", lambda _: pytest.fail("called"))
    for step in range(2):
        for part in range(2):
            images = torch.zeros(2, 3, 4, 4)
            both.targets(MicroBatch(images, Position(0, step), part, 2 * part, (images,)))
        both.after_update()
    both.after_update()
    assert [rows[:, 0].tolist() for rows in received] == [[0, 9, 2, 9], [4, 9, 6, 9]]


def test_gathers_overlap_student_passes(monkeypatch):
    """A gather starts after the teacher's pass, with a name for each micro-batch."""
    both, _ = together()
    events = []
    monkeypatch.setattr(both.distillers[0], "to_gather", lambda targets: torch.ones(2, 1))
    monkeypatch.setattr(both.distillers[0], "after_update", lambda _: events.append("update"))

    def begin(tensor, name):
        events.append(name)
        return comm.Pending(name, tensor)

    def wait(pending):
        events.append("wait")
        return pending.handle

    monkeypatch.setattr(comm, "begin_gather", begin)
    monkeypatch.setattr(comm, "wait", wait)
    for part in range(2):
        both.targets(batch(part))
    assert events == ["distill.one.0", "distill.one.1"]
    both.after_update()
    assert events[2:] == ["wait", "wait", "update"]


def test_losses_use_each_distiller_factor():
    both, _ = together(loss_factor=2.0)
    both.distillers[1].factor.fill_(8.0)
    losses = both.losses(output(), [["one"], ["two"]], START, STEPS)
    square = FEATURES["layer4"].square().mean().item()
    assert both.names == ["one", "two"]
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {"one": square / 2, "two": 4 * square / 8}
    )


WEIGHED = {"distill": ["gram", "mgd"], "distill_weights": [1.0, 0.5]}


@pytest.mark.parametrize("options", [{}, WEIGHED], ids=["equal", "weighed"])
def test_losses_use_each_distiller_weight(monkeypatch, options):
    both, _ = together(epochs=2, loss_ramp=True, loss_factor=2.0, **options)
    losses = both.losses(output(), [["one"], ["two"]], START, STEPS)
    first_losses = {name: loss.item() for name, loss in losses.items()}
    one, two = options.get("distill_weights", [1.0, 1.0])
    square = FEATURES["layer4"].square().mean().item()
    assert first_losses == pytest.approx({"one": one * square / 2, "two": two * 4 * square / 2})
    monkeypatch.setattr(both.distillers[1], "weight", lambda position, steps: 7.0)
    later = both.losses(output(), [["one"], ["two"]], Position(1, 0), STEPS)
    assert later["one"].item() == pytest.approx(0.5 * first_losses["one"])
    assert later["two"].item() == pytest.approx(7 * first_losses["two"])


@pytest.mark.parametrize("share", [0.5, 10.0])
@pytest.mark.parametrize("weights", [[], [3.0, 1.0], [1.0, 0.0]], ids=str)
def test_measured_losses_sum_to_loss_share(monkeypatch, share, weights):
    """The fractions follow the weights, by default equal ones. The losses differ by far in size."""
    crops = [(torch.zeros(2, 3, 4, 4), torch.arange(2))]
    monkeypatch.setattr(loss_factor, "centre_crops", lambda *_: crops)
    options = {"distill": ["gram", "mgd"], "distill_weights": weights, "loss_share": share}
    both, _ = together(sizes=(1.0, 4e6), **options)
    for distiller in both.distillers:
        run = both.networks.run
        run.rank, run.size, run.autocast = 0, 1, lambda _: torch.autocast("cpu", enabled=False)
        monkeypatch.setattr(distiller, "before_epoch", lambda *_: Change())
    both.networks = Networks(
        run, [None] * loss_factor.BATCH, both.networks.framework, both.networks.teacher
    )
    both.before_epoch(0)
    losses = both.losses(output(), [["one"], ["two"]], START, STEPS)
    one, two = weights or [1.0, 1.0]
    assert losses["one"].item() == pytest.approx(share * 3.0 * one / (one + two))
    assert losses["two"].item() == pytest.approx(share * 3.0 * two / (one + two))
    assert [line.split()[0] for line in run.lines] == ["one:", "two:"]
    factors = [distiller.factor.item() for distiller in both.distillers]
    both.distillers[0].size = 9.0
    both.before_epoch(1)
    assert [distiller.factor.item() for distiller in both.distillers] == factors  # measured once


def measure_factor(distiller, networks, share):
    """Return a measured factor, and record its calls in `seen`."""
    distiller.seen.append((distiller.name, "factor measured", distiller.factor.item()))
    recorded = (distiller.name, "factor recorded", share)
    return Change({"factor": torch.tensor(share)}, lambda: distiller.seen.append(recorded))


def test_factor_is_measured_after_change(monkeypatch, seen):
    both, _ = together(seen, loss_share=1.0, loss_factor=5.0)
    monkeypatch.setattr(distillation, "measure_factor", measure_factor)
    both.before_epoch(0)
    assert seen == [
        *[("one", "measured", 5.0), ("one", "factor measured", 1.0)],
        *[("two", "measured", 5.0), ("two", "factor measured", 4.0)],
        *[("one", "recorded", 0), ("one", "factor recorded", 0.5)],
        *[("two", "recorded", 0), ("two", "factor recorded", 0.5)],
    ]
    assert [distiller.factor.item() for distiller in both.distillers] == [0.5, 0.5]


@pytest.mark.parametrize("stopped_in", ["before_epoch", "factor"])
def test_stop_leaves_all_distillers_unchanged(monkeypatch, seen, stopped_in):
    both, _ = together(seen, loss_share=1.0, loss_factor=5.0)

    def stop(*_):
        raise Stopped

    def measure_or_stop(distiller, *arguments):
        return stop() if distiller.name == "two" else measure_factor(distiller, *arguments)

    monkeypatch.setattr(distillation, "measure_factor", measure_or_stop)
    if stopped_in == "before_epoch":
        monkeypatch.setattr(both.distillers[1], "before_epoch", stop)
    with pytest.raises(Stopped):
        both.before_epoch(0)
    assert seen[:2] == [("one", "measured", 5.0), ("one", "factor measured", 1.0)]
    assert not any("recorded" in event for _, event, _ in seen)
    assert [distiller.factor.item() for distiller in both.distillers] == [5.0, 5.0]


def test_histograms_have_distiller_names(monkeypatch):
    both, _ = together()
    for number, distiller in enumerate(both.distillers):
        monkeypatch.setattr(distiller, "histograms", lambda number=number: {"bn1/weight": number})
    assert both.histograms() == {"one/bn1/weight": 0, "two/bn1/weight": 1}


def test_change_refuses_unknown_tensor():
    both, _ = together()
    with pytest.raises(KeyError, match="matching9"):
        both.distillers[0].apply(Change({"matching9": torch.zeros(1)}))


def test_given_factor_is_not_measured(monkeypatch, seen):
    both, _ = together(seen, loss_share=0.0, loss_factor=5.0)
    monkeypatch.setattr(distillation, "measure_factor", lambda *_: pytest.fail("measured"))
    both.before_epoch(0)
    factors = [distiller.factor.item() for distiller in both.distillers]
    assert factors == [1.0, 4.0]  # from each distiller's change


def test_distillation_without_teacher_is_empty():
    empty = Distillation(Config(), None, [])
    empty.before_epoch(0)
    assert empty.targets(batch()) == [] and empty.losses(output(), [], START, STEPS) == {}
    assert empty.names == [] and empty.digest == "" and empty.frozen() == empty.histograms() == {}
