import math

import pytest

from job.config import Config
from job.errors import RunError
from job.schedules import (
    LOG_REFRESH,
    learning_rate,
    parse_refresh,
    parse_save_every,
    distillation_strength,
)


def by_formula(epoch, lr, epochs, cos, schedule, warmup):
    """The rate of an epoch as the papers write it, in exact steps."""
    if epoch < warmup:
        return lr * (0.001 * (1 - epoch / warmup) + epoch / warmup)
    if cos:
        return lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
    for drop in schedule:
        lr = lr / 10 if epoch >= drop else lr
    return lr


SETTINGS = [
    dict(lr=0.03, epochs=200, cos=True, schedule=[120, 160], warmup_epochs=3),
    dict(lr=0.03, epochs=200, cos=False, schedule=[120, 160], warmup_epochs=3),
    dict(lr=0.5, epochs=10, cos=True, schedule=[], warmup_epochs=1),
    dict(lr=0.5, epochs=10, cos=False, schedule=[], warmup_epochs=0),
    dict(lr=1.0, epochs=12, cos=False, schedule=[7, 2, 2], warmup_epochs=4),
    dict(lr=1.0, epochs=1, cos=True, schedule=[], warmup_epochs=0),
    dict(lr=1.0, epochs=2, cos=True, schedule=[0], warmup_epochs=5),
    dict(lr=0.0, epochs=5, cos=False, schedule=[1], warmup_epochs=2),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_rate_of_every_epoch_is_that_of_the_formula(setting):
    config = Config(**setting)
    for epoch in range(config.epochs):
        expected = by_formula(
            epoch, config.lr, config.epochs, config.cos, config.schedule, config.warmup_epochs
        )
        assert learning_rate(config, epoch) == pytest.approx(expected, rel=1e-12, abs=1e-15), epoch


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 3e-5),
        (1, 0.01002),
        (2, 0.02001),
        (3, 0.029983),
        (100, 0.015),
        (150, 0.0043934),
        (199, 1.8506e-6),
    ],
)
def test_rates_of_the_published_recipe(epoch, rate):
    assert learning_rate(Config(cos=True), epoch) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 5), (4, 3), (200, 7)])
def test_the_pull_falls_by_as_much_each_step_and_would_be_nothing_after_the_last(epochs, steps):
    found = [
        distillation_strength(epoch, step, epochs, steps)
        for epoch in range(epochs)
        for step in range(steps)
    ]
    assert found == pytest.approx([1 - done / (epochs * steps) for done in range(epochs * steps)])
    assert found[0] == 1 and distillation_strength(epochs, 0, epochs, steps) == 0


def epochs_of(text, end=200):
    at = parse_refresh(text)
    return [epoch for epoch in range(end) if at(epoch)]


@pytest.mark.parametrize(
    ("text", "epochs"),
    [
        ("log", [0, 1, 2, 3, 6, 9, 15, 26, 43, 74, 126]),
        ("never", []),
        ("every:1", list(range(200))),
        ("every:7", list(range(0, 200, 7))),
        ("every:500", [0]),
        ("0", [0]),
        ("5", [5]),
        ("0,5,10", [0, 5, 10]),
        ("10,5,5", [5, 10]),
        ("199,200", [199]),
    ],
)
def test_the_matching_is_solved_at_the_epochs_of_the_schedule(text, epochs):
    assert epochs_of(text) == epochs


def test_the_published_refreshes_are_before_training_and_after_these_epochs():
    assert LOG_REFRESH == (0, 1, 2, 3, 6, 9, 15, 26, 43, 74, 126)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Log",
        "every",
        "every:",
        "every:0",
        "every:-1",
        "every:1.5",
        "-1",
        "1,",
        ",1",
        "1, 2",
        "1;2",
    ],
)
def test_another_refresh_schedule_is_refused_with_what_there_is(text):
    with pytest.raises(RunError) as caught:
        parse_refresh(text, "--refresh-epochs")
    message = str(caught.value)
    assert "\n" not in message
    assert f"--refresh-epochs {text!r}" in message
    assert all(way in message for way in ("log", "never", "every:N", "0,5,10"))


def saves(text, epochs, steps):
    """The steps done at each save of a run, which asks after every step, as it does at an epoch's end for the next epoch."""
    at, found = parse_save_every(text), []
    for epoch in range(epochs):
        for step in range(steps):
            done = (epoch, step + 1) if step + 1 < steps else (epoch + 1, 0)
            if at(*done, epoch * steps + step + 1):
                found.append(epoch * steps + step + 1)
    return found


@pytest.mark.parametrize("steps", [1, 2, 7, 10])
@pytest.mark.parametrize("period", [1, 2, 3, 7, 10, 100])
def test_checkpoints_come_every_so_many_epochs_or_steps(period, steps):
    epochs = 9
    assert saves(str(period), epochs, steps) == [
        n * steps for n in range(1, epochs + 1) if n % period == 0
    ]
    assert saves(f"{period}steps", epochs, steps) == [
        n for n in range(1, epochs * steps + 1) if n % period == 0
    ]


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5", "steps", "0steps", "5 steps", "5step", "05", "auto"]
)
def test_another_period_is_refused_with_what_there_is(text):
    with pytest.raises(RunError) as caught:
        parse_save_every(text, "--save-every")
    message = str(caught.value)
    assert "\n" not in message
    assert f"--save-every {text!r}" in message
    assert "500steps" in message
