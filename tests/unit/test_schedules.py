"""Schedules: learning rate, distillation strength, refreshes and saves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.config import Config
from job.errors import RunError
from job.schedules import (
    LOG_REFRESH,
    distillation_strength,
    learning_rate,
    parse_refresh,
    parse_save_every,
)


def by_formula(epoch, lr, epochs, cos, schedule, warmup):
    """Return the learning rate of an epoch, as in the papers."""
    if epoch < warmup:
        return lr * (0.001 * (1 - epoch / warmup) + epoch / warmup)
    if cos:
        return lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
    for drop in schedule:
        lr = lr / 10 if epoch >= drop else lr
    return lr


RATES = st.floats(1e-6, 1e3)


@st.composite
def configs(draw):
    """Options of a learning rate, with any warm-up and any order of the schedule's epochs."""
    return Config(
        lr=draw(RATES | st.just(0.0)),
        epochs=draw(st.integers(1, 300)),
        warmup_epochs=draw(st.integers(0, 40)),
        cos=draw(st.booleans()),
        schedule=draw(st.lists(st.integers(0, 300), max_size=5)),
    )


@given(configs(), st.data())
def test_learning_rate_equals_formula(config, data):
    """Warm-up, cosine and schedule are on or off."""
    epoch = data.draw(st.integers(0, config.epochs))
    expected = by_formula(
        epoch, config.lr, config.epochs, config.cos, config.schedule, config.warmup_epochs
    )
    accuracy = 1e-12 * config.lr
    assert learning_rate(config, epoch) == pytest.approx(expected, rel=1e-12, abs=accuracy)


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
def test_learning_rate_of_published_recipe(epoch, rate):
    assert learning_rate(Config(cos=True), epoch) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 5), (4, 3), (200, 7)])
def test_distillation_strength_falls_linearly_to_0(epochs, steps):
    strengths = [
        distillation_strength(epoch, step, epochs, steps)
        for epoch in range(epochs)
        for step in range(steps)
    ]
    total = epochs * steps
    assert strengths == pytest.approx([1 - done / total for done in range(total)])
    assert strengths[0] == 1 and distillation_strength(epochs, 0, epochs, steps) == 0


def epochs_of(text, end=200):
    at = parse_refresh(text)
    return [epoch for epoch in range(end) if at(epoch)]


@pytest.mark.parametrize(
    ("text", "epochs"),
    [
        ("log", [0, 1, 2, 3, 6, 9, 15, 26, 43, 74, 126]),
        ("never", []),
        ("every:7", list(range(0, 200, 7))),
        ("0,5,10", [0, 5, 10]),
    ],
)
def test_parse_refresh(text, epochs):
    assert epochs_of(text) == epochs


@given(st.integers(1, 50), st.integers(0, 500))
def test_parse_refresh_of_period(period, epoch):
    assert parse_refresh(f"every:{period}")(epoch) == (epoch % period == 0)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=8), st.integers(0, 500))
def test_parse_refresh_of_list(chosen, epoch):
    assert parse_refresh(",".join(map(str, chosen)))(epoch) == (epoch in chosen)


def test_log_refresh_is_published():
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
def test_parse_refresh_refuses_text(text):
    with pytest.raises(RunError) as caught:
        parse_refresh(text, "--refresh-epochs")
    message = str(caught.value)
    assert "\n" not in message
    assert f"--refresh-epochs {text!r}" in message
    assert all(form in message for form in ("log", "never", "every:N", "0,5,10"))


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 12), st.booleans())
def test_parse_save_every(period, epochs, steps, by_steps):
    save_at = parse_save_every(f"{period}steps" if by_steps else str(period))
    done = [divmod(count, steps) for count in range(1, epochs * steps + 1)]
    saves = [count for count, (epoch, step) in enumerate(done, 1) if save_at(epoch, step, count)]
    every = period if by_steps else period * steps
    assert saves == list(range(every, epochs * steps + 1, every))


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5", "steps", "0steps", "5 steps", "5step", "05", "auto"]
)
def test_parse_save_every_refuses_text(text):
    with pytest.raises(RunError) as caught:
        parse_save_every(text, "--save-every")
    message = str(caught.value)
    assert "\n" not in message
    assert f"--save-every {text!r}" in message
    assert "500steps" in message


TEXTS = st.text("0123456789,:every stepslogn.-+٣", max_size=12) | st.text(max_size=5)


@given(TEXTS | st.integers(4000, 6000).map(lambda n: "9" * n))
@pytest.mark.parametrize("parse", [parse_refresh, parse_save_every])
def test_parse_refuses_any_text_in_one_line(parse, text):
    try:
        answer = parse(text, "--flag")(3, *(0, 5) * (parse is parse_save_every))
    except RunError as error:
        assert str(error).startswith("--flag ") and "\n" not in str(error)
    else:
        assert answer in (True, False)
