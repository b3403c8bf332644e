"""What (seed, position) decides: permutations, flips, dropped labels, times and noise, and who takes which position."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scalelong.train.data import order as data_order
from scalelong.train.data.order import BatchPlan, Order, Stream, draw_noise, draw_samples, generator

# Machines that are shared stall for longer than Hypothesis waits.
unhurried = settings(deadline=None)
seeds = st.integers(0, 2**63 - 1)
positions = st.integers(0, 2**45)


@unhurried
@given(seed=seeds, num_images=st.integers(1, 200), epoch=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(seed, num_images, epoch):
    order = Order(seed, num_images)
    first = epoch * num_images
    assert sorted(order.index(p) for p in range(first, first + num_images)) == list(range(num_images))


@unhurried
@given(seed=seeds, num_images=st.integers(1, 30), asked=st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_the_order_does_not_depend_on_what_was_asked_before(seed, num_images, asked):
    order = Order(seed, num_images)
    assert [order.index(p) for p in asked] == [Order(seed, num_images).index(p) for p in asked]


def test_a_permutation_is_drawn_once_though_readers_are_ahead_of_their_labels(monkeypatch):
    drawn: list[int] = []
    monkeypatch.setattr(data_order, "_permutation", lambda seed, n, epoch: drawn.append(epoch) or np.arange(n))
    order = Order(0, 10)
    for position in range(40):
        order.index(position + 5)
        order.index(position)
    assert drawn == [0, 1, 2, 3, 4]


def test_epochs_and_seeds_are_shuffled_differently():
    shuffles = {tuple(Order(seed, 50).index(e * 50 + i) for i in range(50)) for seed in range(4) for e in range(4)}
    assert len(shuffles) == 16


def stacked(draws) -> np.ndarray:
    return np.stack([draws.flip_u, draws.drop_u, draws.time_u, draws.caption_u])


@unhurried
@given(seed=seeds, first=positions, lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_the_draws_of_a_range_are_those_of_its_parts(seed, first, lengths):
    edges = first + np.cumsum([0, *lengths])
    parts = [stacked(draw_samples(seed, range(int(a), int(b)))) for a, b in pairwise(edges)]
    whole = stacked(draw_samples(seed, range(first, first + sum(lengths))))
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("name", ["flip_u", "drop_u", "time_u", "caption_u"])
def test_draws_are_uniform(name):
    draws = getattr(draw_samples(3, range(20_000)), name)
    assert stats.kstest(draws, "uniform").pvalue > 1e-3


def test_draws_of_one_position_and_of_neighbours_are_unrelated():
    now = stacked(draw_samples(5, range(40_000)))
    later = stacked(draw_samples(5, range(1, 40_001)))
    correlations = np.corrcoef(np.concatenate([now, later]))
    # Of 40,000 pairs, five standard errors.
    assert np.abs(correlations[~np.eye(8, dtype=bool)]).max() < 5 / np.sqrt(40_000)


def test_seeds_draw_differently():
    assert not np.any(draw_samples(0, range(100)).time_u == draw_samples(1, range(100)).time_u)


def test_draws_stay_below_one_in_fp32_even_for_the_largest_random_number(monkeypatch):
    class Largest:
        def __init__(self, **_):
            pass

        def random_raw(self, count: int) -> np.ndarray:
            return np.full(count, 2**64 - 1, dtype=np.uint64)

    monkeypatch.setattr(data_order.np.random, "Philox", Largest)
    for draws in stacked(draw_samples(0, range(2))):
        assert draws.dtype == np.float32
        assert (draws == np.nextafter(np.float32(1), np.float32(0))).all()


@unhurried
@given(seed=seeds, first=positions)
def test_draws_lie_in_zero_to_one_in_steps_that_fp32_holds_exactly(seed, first):
    draws = stacked(draw_samples(seed, range(first, first + 50))).astype(np.float64)
    assert ((draws >= 0) & (draws < 1)).all()
    assert (draws * 2**24 == np.floor(draws * 2**24)).all()


def test_half_of_the_images_are_flipped_if_any():
    draws = draw_samples(0, range(40_000))
    assert draws.flips(True).mean() == pytest.approx(0.5, abs=0.01)
    assert not draws.flips(False).any()


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_labels_are_dropped_as_often_as_asked(probability):
    dropped = draw_samples(0, range(40_000)).drops_label(probability)
    # Four standard errors.
    assert dropped.mean() == pytest.approx(probability, abs=4 * np.sqrt(probability * (1 - probability) / 40_000))


@pytest.mark.parametrize("stream", [Stream.NOISE, Stream.GENERATION])
def test_noise_is_standard_normal(stream):
    noise = np.stack([draw_noise(1, p, (3, 16, 16), stream) for p in range(50)])
    assert noise.dtype == np.float32
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3


@unhurried
@given(seed=seeds, position=positions)
def test_noise_depends_on_its_arguments_alone(seed, position):
    np.testing.assert_array_equal(draw_noise(seed, position, (2, 3)), draw_noise(seed, position, (2, 3)))


@unhurried
@given(seed=st.integers(0, 2**63 - 2), position=positions)
def test_noise_differs_between_positions_seeds_and_streams(seed, position):
    here = draw_noise(seed, position, (8,))
    others = [
        draw_noise(seed, position + 1, (8,)),
        draw_noise(seed + 1, position, (8,)),
        draw_noise(seed, position, (8,), Stream.GENERATION),
    ]
    assert all(not np.any(here == other) for other in others)


def test_noise_of_neighbouring_positions_is_unrelated():
    noise = np.stack([draw_noise(0, p, (10_000,)) for p in range(8)])
    correlations = np.corrcoef(noise)[~np.eye(8, dtype=bool)]
    assert np.abs(correlations).max() < 5 / np.sqrt(10_000)


def test_every_purpose_has_random_numbers_of_its_own():
    firsts = {generator(0, stream, 0).integers(2**62) for stream in Stream}
    assert len(firsts) == len(Stream)


@unhurried
@given(
    world_size=st.integers(1, 6),
    accumulation_steps=st.integers(1, 5),
    micro_batch=st.integers(1, 5),
    first=positions,
    step=st.integers(0, 1000),
)
def test_the_processes_together_take_every_position_of_a_step_once(
    world_size, accumulation_steps, micro_batch, first, step
):
    images_per_step = world_size * accumulation_steps * micro_batch
    taken = [
        position
        for rank in range(world_size)
        for accumulation in range(accumulation_steps)
        for position in BatchPlan(first, images_per_step, accumulation_steps, rank, world_size).positions(
            step * accumulation_steps + accumulation
        )
    ]
    start = first + step * images_per_step
    assert sorted(taken) == list(range(start, start + images_per_step))


def test_within_a_step_all_ranks_come_before_the_next_accumulation_step():
    plans = [BatchPlan(100, 12, accumulation_steps=2, rank=rank, world_size=3) for rank in range(3)]
    runs = [plan.positions(batch).start for batch in range(4) for plan in plans]
    assert runs == list(range(100, 124, 2))


@unhurried
@given(world_size=st.integers(1, 4), accumulation_steps=st.integers(1, 4), micro_batch=st.integers(1, 4))
def test_micro_batches_have_one_size(world_size, accumulation_steps, micro_batch):
    plan = BatchPlan(7, world_size * accumulation_steps * micro_batch, accumulation_steps, world_size - 1, world_size)
    assert {len(plan.positions(batch)) for batch in range(10)} == {plan.micro_batch} == {micro_batch}


def test_a_resumed_plan_goes_on_where_the_first_one_was():
    whole = BatchPlan(0, 24, accumulation_steps=2, rank=1, world_size=3)
    resumed = BatchPlan(5 * 24, 24, accumulation_steps=2, rank=1, world_size=3)
    assert [resumed.positions(batch) for batch in range(6)] == [whole.positions(10 + batch) for batch in range(6)]


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="10 does not divide by 3 processes x 2 accumulation steps"):
        BatchPlan(0, 10, accumulation_steps=2, world_size=3)
