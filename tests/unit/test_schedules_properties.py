import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job.config import Config
from job.errors import RunError
from job.schedules import learning_rate, parse_refresh, parse_save_every

RATES = st.floats(1e-6, 1e3)


def configs(cos, shortest=0, longest=40):
    """Options of a rate with a warm-up of so many epochs."""
    return st.builds(
        Config,
        lr=RATES,
        epochs=st.integers(1, 300),
        warmup_epochs=st.integers(shortest, longest),
        cos=st.just(cos),
        schedule=st.lists(st.integers(0, 300), max_size=5),
    )


@given(configs(cos=True, shortest=1) | configs(cos=False, shortest=1), st.data())
def test_the_warm_up_rises_in_equal_steps_from_a_thousandth(config, data):
    epoch = data.draw(st.integers(0, config.warmup_epochs - 1))
    rates = [learning_rate(config, e) for e in (0, epoch, epoch + 1)]
    assert rates[0] == pytest.approx(config.lr / 1000)
    assert rates[1] == pytest.approx(config.lr * (0.001 + 0.999 * epoch / config.warmup_epochs))
    if epoch + 1 < config.warmup_epochs:
        assert rates[2] - rates[1] == pytest.approx(0.999 * config.lr / config.warmup_epochs)


@given(configs(cos=True, longest=0), st.data())
def test_the_cosine_falls_from_the_whole_rate_to_nothing_without_a_jump(config, data):
    epoch = data.draw(st.integers(0, config.epochs))
    assert learning_rate(config, 0) == config.lr
    assert learning_rate(config, config.epochs) == pytest.approx(0, abs=1e-12 * config.lr)
    here, there = learning_rate(config, epoch), learning_rate(config, config.epochs - epoch)
    assert here + there == pytest.approx(config.lr)  # the second half mirrors the first
    if epoch:
        fall = learning_rate(config, epoch - 1) - here
        assert 0 <= fall <= config.lr * math.pi / (2 * config.epochs) * (1 + 1e-9)


@given(configs(cos=False, longest=0), st.integers(0, 300), st.randoms(use_true_random=False))
def test_the_rate_falls_tenfold_at_each_epoch_of_the_schedule_in_whatever_order_it_is_given(
    config, epoch, random
):
    shuffled = dataclasses.replace(
        config, schedule=random.sample(config.schedule, len(config.schedule))
    )
    assert learning_rate(config, epoch) == learning_rate(shuffled, epoch)
    drops = config.schedule.count(epoch + 1)
    assert learning_rate(config, epoch + 1) == pytest.approx(
        learning_rate(config, epoch) * 0.1**drops
    )


@given(configs(cos=True) | configs(cos=False), st.floats(2**-10, 2**10), st.data())
def test_the_rate_is_never_above_the_one_asked_for_and_grows_with_it(config, factor, data):
    epoch = data.draw(st.integers(0, config.epochs - 1))
    rate = learning_rate(config, epoch)
    assert 0 <= rate <= config.lr * (1 + 1e-12)
    assert learning_rate(
        dataclasses.replace(config, lr=factor * config.lr), epoch
    ) == pytest.approx(factor * rate)


@given(st.integers(1, 50), st.integers(0, 500))
def test_a_period_of_refreshes_counts_epochs(period, epoch):
    assert parse_refresh(f"every:{period}")(epoch) == (epoch % period == 0)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=8), st.integers(0, 500))
def test_a_list_of_refreshes_names_epochs(chosen, epoch):
    assert parse_refresh(",".join(map(str, chosen)))(epoch) == (epoch in chosen)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 12), st.booleans())
def test_saves_come_every_so_many_epochs_or_steps_of_the_whole_run(period, epochs, steps, by_steps):
    save_at = parse_save_every(f"{period}steps" if by_steps else str(period))
    done = [divmod(count, steps) for count in range(1, epochs * steps + 1)]
    saves = [count for count, (epoch, step) in enumerate(done, 1) if save_at(epoch, step, count)]
    every = period if by_steps else period * steps
    assert saves == list(range(every, epochs * steps + 1, every))


WORDS = st.text("0123456789,:every stepslogn.-+٣", max_size=12) | st.text(max_size=5)


@given(WORDS | st.integers(4000, 6000).map(lambda n: "9" * n))
@pytest.mark.parametrize("parse", [parse_refresh, parse_save_every])
def test_any_other_text_is_one_line(parse, text):
    try:
        answer = parse(text, "--flag")(3, *(0, 5) * (parse is parse_save_every))
    except RunError as error:
        assert str(error).startswith("--flag ") and "\n" not in str(error)
    else:
        assert answer in (True, False)
