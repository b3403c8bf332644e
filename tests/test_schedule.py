"""What is due after which step, and the learning rate."""

from dataclasses import replace

import pytest
from running import small_config

from scalelong.train.schedule import SCHEDULES, Due, learning_rate, passes, what_is_due


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


def test_schedules_are_functions_of_the_images_seen_that_rise_over_the_warm_up(config):
    optimizer = replace(config.optimizer, warmup_images=64)
    for schedule in SCHEDULES.values():
        factors = [schedule(optimizer, seen) for seen in (0, 16, 32, 48)]
        assert factors == sorted(factors)
        assert factors[0] == 0
        assert [schedule(optimizer, seen) for seen in (0, 16, 32, 48)] == factors
