"""What is due after which step, and the learning rate."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import small_config

from scalelong.train.config import OptimizerConfig
from scalelong.train.errors import UserError
from scalelong.train.schedule import (
    SCHEDULES,
    WITH_HORIZON,
    Due,
    check_rates,
    learning_rate,
    passes,
    what_is_due,
    with_horizon,
)


@pytest.fixture
def config(tmp_path):
    """Steps of 32 images, 320 in all."""
    config = small_config(
        tmp_path,
        total_images=320,
        images_per_log=64,
        images_per_grid=0,
        images_per_average=96,
        images_per_checkpoint=100,
        images_per_validation=160,
    )
    return replace(config, optimizer=replace(config.optimizer, ema_stds=(0.05,)))


def due_at(config) -> list[tuple[str, ...]]:
    """The names of what is due after each of ten steps."""
    steps = [what_is_due(config, images_seen) for images_seen in range(0, 320, 32)]
    return [tuple(name for name in Due._fields if getattr(due, name)) for due in steps]


def test_each_is_due_when_a_multiple_of_its_images_is_passed_and_all_at_the_end(config):
    assert due_at(config) == [
        # 32, 64, 96, 128, 160 images
        *((), ("log",), ("averages",), ("log", "checkpoint"), ("log", "validation")),
        *(("log", "averages"), ("checkpoint",), ("log",), ("averages",)),  # 192, 224, 256, 288
        ("log", "grid", "averages", "checkpoint", "validation", "last"),
    ]


def test_samples_are_scored_only_where_that_is_asked_for_and_then_at_the_end_too(config):
    assert not any("evaluation" in names for names in due_at(config))
    names = due_at(replace(config, images_per_evaluation=224, num_validation_images=0))
    assert [n for n, at_step in enumerate(names, start=1) if "evaluation" in at_step] == [7, 10]
    assert "log" in names[6]
    assert not any("validation" in at_step for at_step in names)


def test_a_log_of_every_step_and_no_averages(config):
    config = replace(config, images_per_log=0, optimizer=replace(config.optimizer, ema_stds=()))
    due = due_at(config)
    assert all("log" in names for names in due)
    assert not any("averages" in names for names in due)


def test_a_run_whose_total_is_no_multiple_of_a_step_ends_past_it(config):
    assert [what_is_due(replace(config, total_images=33), seen).last for seen in (0, 32)] == [False, True]


def test_passes_counts_multiples_once():
    assert [passes(a, a + 32, 100) for a in range(0, 224, 32)] == [False, False, False, True, False, False, True]
    assert not passes(0, 32, 0)


def test_the_learning_rate_rises_over_the_warm_up_and_stays(config):
    optimizer = replace(config.optimizer, learning_rate=1e-3, warmup_images=64)
    config = replace(config, optimizer=optimizer)
    assert [learning_rate(config, seen) for seen in (0, 16, 64, 1000)] == pytest.approx([0, 2.5e-4, 1e-3, 1e-3])
    assert learning_rate(replace(config, optimizer=replace(optimizer, warmup_images=0)), 0) == 1e-3


def factors(optimizer, schedule: str, positions, **fields) -> list[float]:
    return [SCHEDULES[schedule](replace(optimizer, **fields), seen) for seen in positions]


def test_each_schedule_is_its_equation(config):
    optimizer = replace(config.optimizer, warmup_images=100)
    cosine = factors(optimizer, "cosine", (50, 100, 300, 500, 900, 2000), horizon_images=900)
    expected = [0.5, 1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0, 0]
    assert cosine == pytest.approx(expected, abs=1e-12)
    cosine = factors(optimizer, "cosine", (100, 500, 900, 2000), horizon_images=900, final_factor=0.2)
    assert cosine == pytest.approx([1, 0.6, 0.2, 0.2])
    falling = factors(optimizer, "inverse-sqrt", (50, 100, 400, 10_000))
    assert falling == pytest.approx([0.5, 1, 0.5, 0.1])
    falling = factors(optimizer, "inverse-sqrt", (50, 400, 1600), stable_images=400)
    assert falling == pytest.approx([0.5, 1, 0.5])
    stable = factors(optimizer, "warmup-stable-decay", (50, 100, 800, 850, 1000, 1500), horizon_images=1000)
    assert stable == pytest.approx([0.5, 1, 1, 0.5, 0, 0])
    numbers = {"horizon_images": 1000, "decay_images": 400, "final_factor": 0.1}
    stable = factors(optimizer, "warmup-stable-decay", (600, 700, 1000), **numbers)
    assert stable == pytest.approx([1, 0.1 + 0.9 * 0.5, 0.1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(seen=st.integers(0, 10**7), horizon=st.integers(1, 10**7), warmup=st.integers(0, 10**6), final=st.floats(0, 1))
def test_a_schedule_multiplies_by_a_share(schedule, seen, horizon, warmup, final):
    optimizer = OptimizerConfig(warmup_images=warmup, horizon_images=horizon, final_factor=final)
    assert 0 <= SCHEDULES[schedule](optimizer, seen) <= 1


def test_a_horizon_that_is_not_given_is_the_total(config):
    optimizer = config.optimizer
    assert with_horizon(config) == config
    for schedule in WITH_HORIZON:
        asked = replace(config, optimizer=replace(optimizer, schedule=schedule))
        assert with_horizon(asked).optimizer.horizon_images == 320
        assert with_horizon(with_horizon(asked)) == with_horizon(asked)
    given = replace(config, optimizer=replace(optimizer, schedule="cosine", horizon_images=500))
    assert with_horizon(given).optimizer.horizon_images == 500


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"schedule": "cosine", "horizon_images": 200}, r"rate is 0 from --optimizer\.horizon-images 200 on"),
        ({"schedule": "cosine", "warmup_images": 321}, r"warmup-images 321 do not fit into .*horizon-images 320"),
        ({"schedule": "warmup-stable-decay", "decay_images": 300}, r"decay-images 300 do not fit into .* 320"),
    ],
)
def test_schedules_that_end_too_early_are_refused(config, fields, named):
    with pytest.raises(UserError, match=named):
        with_horizon(replace(config, optimizer=replace(config.optimizer, **fields)))


def test_a_schedule_may_change_while_no_step_would_have_had_another_rate(config):
    stable = with_horizon(replace(config, optimizer=replace(config.optimizer, schedule="warmup-stable-decay")))
    longer = replace(stable, optimizer=replace(stable.optimizer, horizon_images=1000))
    check_rates(stable, longer, 256 + 32)  # the next step is the first of the decay
    with pytest.raises(UserError, match=r"step at 288 images .*--optimizer\.horizon-images 320 -> 1000"):
        check_rates(stable, longer, 320)
    check_rates(config, stable, 256)
    with pytest.raises(UserError, match=r"--optimizer\.schedule constant -> warmup-stable-decay"):
        check_rates(config, stable, 320)


def test_schedules_are_functions_of_the_images_seen_that_rise_over_the_warm_up(config):
    optimizer = replace(config.optimizer, warmup_images=64, horizon_images=320)
    for schedule in SCHEDULES.values():
        factors = [schedule(optimizer, seen) for seen in (0, 16, 32, 48)]
        assert factors == sorted(factors)
        assert factors[0] == 0
        assert [schedule(optimizer, seen) for seen in (0, 16, 32, 48)] == factors
