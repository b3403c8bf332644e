"""Sampling: every sampler against a distribution whose denoiser is known exactly, guidance, grids of images."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from scalelong.model.backbone import Backbone
from scalelong.model.presets import UVIT_PRESETS
from scalelong.train.diffusion.process import PROCESSES, VariancePreserving
from scalelong.train.errors import UserError
from scalelong.train.hosts.processes import Processes
from scalelong.train.objective import make_objective
from scalelong.train.objective_config import SAMPLER_NAMES, NoiseName, ObjectiveConfig
from scalelong.train.sampling import generate as generate_module
from scalelong.train.sampling.generate import generate, guided, labels_in_turn, to_uint8
from scalelong.train.sampling.grid import grid_columns, picture_format, save_grid
from scalelong.train.sampling.samplers import denoise

pytest.importorskip("diffusers")

from diffusers_schedulers import BY_DIFFUSERS, make_scheduler

# Pixels of the data are independent, N(MEAN, STD^2).
MEAN, STD = 0.3, 0.5
# Machines that are shared stall for longer than Hypothesis waits.
unhurried = settings(deadline=None)
OBJECTIVES = {name: make_objective(ObjectiveConfig(noise=cast(NoiseName, name))) for name in PROCESSES}
each_process = pytest.mark.parametrize("name", PROCESSES)


class ExactDenoiser:
    """D(x, sigma) of such data, and what the probability-flow ODE makes of a noise."""

    def __init__(self, process: VariancePreserving):
        self.process = process
        self.sigmas: list[float] = []

    def __call__(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        self.sigmas.append(sigma)
        return MEAN + STD**2 / (STD**2 + sigma**2) * (x_BCHW - MEAN)

    def network_times(self) -> list[float]:
        times = torch.tensor([self.process.time_of_sigma(sigma) for sigma in self.sigmas], dtype=torch.float64)
        return self.process.network_time(times).tolist()

    def solution(self, noise_BCHW: Tensor) -> Tensor:
        """The ODE keeps (x - √ᾱ m) / √(ᾱ s² + 1 - ᾱ) as it was at the start."""
        last = self.process.grid_time(torch.tensor(1000.0, dtype=torch.float64))
        alpha_bar = self.process.alpha_bar(last).float()
        return MEAN + STD * (noise_BCHW - alpha_bar.sqrt() * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar).sqrt()


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in range(count)]


@each_process
@pytest.mark.parametrize(
    ("sampler", "steps", "within"),
    # Errors of the standard deviation as measured, 50 steps of first order lose 6 % of it.
    [("dpm-solver++", 50, 0.02), ("ddim", 50, 0.04), ("euler", 50, 0.04), ("ddim", 250, 0.015), ("euler", 250, 0.015)],
)
def test_deterministic_samplers_reach_the_distribution(name, sampler, steps, within):
    noise = torch.randn(64, 1, 16, 16)
    samples = denoise(ExactDenoiser(PROCESSES[name]), PROCESSES[name], noise, sampler=sampler, steps=steps)
    # The discrete schedule starts from pure noise where a trace of the mean should be left.
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(STD, abs=within)


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "within"),
    [
        ("vp-sde", "euler-ancestral", 400, 0.015),
        ("scaled-linear", "euler-ancestral", 400, 0.015),
        ("vp-sde", "euler-maruyama", 500, 0.015),
    ],
)
def test_stochastic_samplers_reach_the_distribution(name, sampler, steps, within):
    noise = torch.randn(200, 1, 16, 16)
    denoiser = ExactDenoiser(PROCESSES[name])
    samples = denoise(denoiser, PROCESSES[name], noise, sampler=sampler, steps=steps, generators=generators(200))
    # 51,200 pixels: standard errors of 0.002.
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert samples.std().item() == pytest.approx(STD, abs=within)
    # Noise was added: the samples have forgotten where they started.
    assert abs(torch.corrcoef(torch.stack([samples.flatten(), noise.flatten()]))[0, 1]) < 0.05


@each_process
@pytest.mark.parametrize(("sampler", "within"), [("dpm-solver++", 0.02), ("ddim", 0.05), ("euler", 0.05)])
def test_deterministic_samplers_follow_the_probability_flow_pixel_by_pixel(name, sampler, within):
    noise = torch.randn(4, 1, 16, 16)
    denoiser = ExactDenoiser(PROCESSES[name])
    samples = denoise(denoiser, PROCESSES[name], noise, sampler=sampler, steps=200)
    torch.testing.assert_close(samples, denoiser.solution(noise), rtol=0, atol=within)


@pytest.mark.parametrize(
    "sampler",
    [
        "dpm-solver++",
        "euler",
        "ddim",
    ],
)
def test_steps_need_not_divide_the_grid(sampler):
    noise = torch.randn(4, 1, 16, 16)
    denoiser = ExactDenoiser(PROCESSES["vp-sde"])
    samples = denoise(denoiser, PROCESSES["vp-sde"], noise, sampler=sampler, steps=600)
    torch.testing.assert_close(samples, denoiser.solution(noise), rtol=0, atol=0.02)


@each_process
@pytest.mark.parametrize("sampler", [name for name in SAMPLER_NAMES if name != "euler-maruyama"])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_the_network_is_asked_steps_times_from_pure_noise_downwards(name, sampler, steps):
    denoiser = ExactDenoiser(PROCESSES[name])
    noise = torch.randn(2, 1, 4, 4)
    denoise(denoiser, PROCESSES[name], noise, sampler=sampler, steps=steps, generators=generators(2))
    times = np.array(denoiser.network_times())
    assert len(times) == steps
    assert times[0] == pytest.approx(1000 if name == "scaled-linear" else 999)
    # Heun's method asks at the end of one step, and at the start of the next.
    assert (np.diff(times) <= 0 if sampler == "heun" else np.diff(times) < 0).all()


def test_euler_maruyama_asks_the_network_from_time_one_to_a_thousandth():
    denoiser = ExactDenoiser(PROCESSES["vp-sde"])
    noise = torch.randn(2, 1, 4, 4)
    denoise(denoiser, PROCESSES["vp-sde"], noise, sampler="euler-maruyama", steps=10, generators=generators(2))
    np.testing.assert_allclose(denoiser.network_times(), 999 * np.linspace(1, 1e-3, 10), rtol=1e-5)


def test_euler_maruyama_needs_a_continuous_process():
    process = PROCESSES["scaled-linear"]
    with pytest.raises(UserError, match=r"euler-maruyama needs .*--objective vp-sde"):
        denoise(ExactDenoiser(process), process, torch.randn(1, 1, 2, 2), sampler="euler-maruyama", steps=1)


def test_an_unknown_sampler_is_told_the_known_ones():
    with pytest.raises(UserError, match=", ".join(SAMPLER_NAMES).replace("+", r"\+")):
        denoise(ExactDenoiser(PROCESSES["vp-sde"]), PROCESSES["vp-sde"], torch.randn(1, 1, 2, 2), sampler="x", steps=1)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
@pytest.mark.parametrize("steps", [0, 1001, 2000])
def test_more_steps_than_the_grid_has_and_none_are_refused(sampler, steps):
    denoiser = ExactDenoiser(PROCESSES["vp-sde"])
    with pytest.raises(UserError, match=f"1 to 1000 steps, not {steps}"):
        denoise(denoiser, PROCESSES["vp-sde"], torch.randn(1, 1, 2, 2), sampler=sampler, steps=steps)
    assert not denoiser.sigmas


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_as_many_steps_as_the_grid_has_visit_all_of_it(sampler):
    denoiser = ExactDenoiser(PROCESSES["vp-sde"])
    noise = torch.randn(1, 1, 2, 2)
    samples = denoise(denoiser, PROCESSES["vp-sde"], noise, sampler=sampler, steps=1000, generators=generators(1))
    assert samples.isfinite().all()
    assert len(denoiser.sigmas) == 1000
    assert len(set(denoiser.sigmas)) == (501 if sampler == "heun" else 1000)


class PlainUse:
    """diffusers' schedulers as their documentation has them: asked for the noise at the network's time."""

    def __init__(self, process: VariancePreserving):
        self.process, self.denoiser = process, ExactDenoiser(process)

    def predict(self, x_BCHW: Tensor, t: Tensor) -> Tensor:
        signal, noise_level = (float(level) for level in self.process.levels(t.double()))
        sigma = noise_level / signal
        return (x_BCHW / signal - self.denoiser(x_BCHW / signal, sigma)) / sigma

    def draw(self, noise_BCHW: Tensor, sampler: str, steps: int) -> Tensor:
        scheduler, own = make_scheduler(sampler, self.process), generators(len(noise_BCHW))
        if sampler == "euler-maruyama":
            scheduler.set_timesteps(steps)
            x_BCHW = mean_BCHW = noise_BCHW
            for t in scheduler.timesteps:
                predicted = self.predict(x_BCHW, t)
                x_BCHW, mean_BCHW = scheduler.step_pred(predicted, x_BCHW, t, generator=own)
            return mean_BCHW
        scheduler.register_to_config(prediction_type="epsilon")
        scheduler.set_timesteps(steps)
        x_BCHW = noise_BCHW * scheduler.init_noise_sigma
        for k in scheduler.timesteps:
            predicted = self.predict(scheduler.scale_model_input(x_BCHW, k), self.process.grid_time(k + 1.0))
            x_BCHW = scheduler.step(predicted, k, x_BCHW, generator=own).prev_sample
        return x_BCHW


@each_process
@pytest.mark.parametrize("sampler", BY_DIFFUSERS)
def test_samplers_of_d_give_what_schedulers_give_that_are_asked_for_the_noise(name, sampler):
    process, noise = PROCESSES[name], torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    if sampler == "euler-maruyama" and name != "vp-sde":
        return
    expected = PlainUse(process).draw(noise, sampler, 30)
    drawn = denoise(ExactDenoiser(process), process, noise, sampler=sampler, steps=30, generators=generators(2))
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-3)


class LabelModel:
    """Predicts its label, everywhere; remembers how it was called."""

    def __init__(self):
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None) -> Tensor:
        self.calls.append((x_BCHW, t_B, y_B))
        y_B = torch.zeros(len(x_BCHW)) if y_B is None else y_B
        return y_B[:, None, None, None] + x_BCHW * t_B[:, None, None, None]


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, 3.0])
def test_guidance_moves_away_from_the_unconditional_prediction(strength):
    x, labels, sigma = torch.randn(3, 1, 2, 2), torch.tensor([1, 5, 7]), 2.0
    found = guided(cast(Backbone, LabelModel()), OBJECTIVES["vp-sde"], labels, 9, strength)(x, sigma)
    shown, time = x / math.sqrt(1 + sigma**2), 999 * PROCESSES["vp-sde"].time_of_sigma(sigma)
    conditional = labels[:, None, None, None] + time * shown
    unconditional = 9 + time * shown
    noise = conditional + strength * (conditional - unconditional)
    torch.testing.assert_close(found, x - sigma * noise, rtol=1e-5, atol=1e-4)


def test_guidance_is_kept_to_its_interval():
    labels, interval = torch.tensor([1, 5]), (0.5, 2.0)
    x, passes = torch.randn(2, 1, 2, 2), {}
    for sigma in (0.4, 0.5, 0.6, 2.0, 2.1):
        model = LabelModel()
        find = lambda strength, **how: guided(cast(Backbone, model), OBJECTIVES["vp-sde"], labels, 9, strength, **how)  # noqa: B023, E731
        inside = interval[0] < sigma <= interval[1]
        found = find(1.5, interval=interval)(x, sigma)
        passes[sigma] = len(model.calls[0][0])
        torch.testing.assert_close(found, find(1.5 if inside else 0.0)(x, sigma), rtol=0, atol=0)
    assert passes == {0.4: 2, 0.5: 2, 0.6: 4, 2.0: 4, 2.1: 2}  # outside, the batch is not doubled


def test_an_interval_that_holds_all_noise_is_none():
    everywhere = generate_toys(guidance_interval=(0.0, 1e9))
    np.testing.assert_array_equal(everywhere, generate_toys())
    assert not np.array_equal(generate_toys(guidance_interval=(0.1, 1.0)), everywhere)


@pytest.mark.parametrize(("labels", "strength", "passes"), [([1, 5], 0.0, 2), ([1, 5], 1.0, 4), (None, 1.0, 2)])
def test_only_guidance_doubles_the_batch(labels, strength, passes):
    model = LabelModel()
    condition = None if labels is None else torch.tensor(labels)
    sigma = float(
        PROCESSES["linear"].levels(torch.tensor([4.0]))[1] / PROCESSES["linear"].levels(torch.tensor([4.0]))[0]
    )
    guided(cast(Backbone, model), OBJECTIVES["linear"], condition, 9, strength)(torch.randn(2, 1, 2, 2), sigma)
    ((x_BCHW, t_B, _),) = model.calls
    assert x_BCHW.shape == (passes, 1, 2, 2)
    assert t_B.tolist() == pytest.approx([3.0] * passes, abs=1e-3)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_network_computes_in_the_dtype_that_is_asked_for(autocast):
    linear, seen = torch.nn.Linear(4, 4), []

    def network(x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None) -> Tensor:
        seen.append(linear(x_BCHW))
        return seen[-1]

    denoiser = guided(cast(Backbone, network), OBJECTIVES["vp-sde"], None, None, 0.0, autocast)
    assert denoiser(torch.randn(1, 1, 4, 4), 0.5).dtype == torch.float32
    assert seen[0].dtype == (autocast or torch.float32)


class ToyNetwork:
    """What ``generate`` needs of a network: each pixel for itself, so that a batch cannot change the rounding."""

    def __init__(self, channels: int = 1, img_size: int = 4):
        self.config = replace(UVIT_PRESETS["digits-uvit"], in_channels=channels, img_size=img_size)

    def parameters(self) -> Iterator[Tensor]:
        yield torch.zeros(1)

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None) -> Tensor:
        shift = 0 if y_B is None else y_B[:, None, None, None] / 20
        return (x_BCHW - shift) * 0.9


SETTINGS = {"null_condition": 9, "steps": 4, "guidance": 0.5, "seed": 3, "sampler": "ddim"}


def generate_toys(**changes) -> np.ndarray:
    settings = {"labels": range(7), "numbers": range(7), **SETTINGS, **changes}
    conditions, numbers = labels_in_turn(settings.pop("labels")), settings.pop("numbers")
    return np.stack(list(generate(cast(Backbone, ToyNetwork()), OBJECTIVES["vp-sde"], conditions, numbers, **settings)))


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_an_image_does_not_depend_on_the_batches(sampler):
    together = generate_toys(sampler=sampler, batch_size=100)
    for batch_size in (1, 3, 7):
        np.testing.assert_array_equal(generate_toys(sampler=sampler, batch_size=batch_size), together)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_an_image_does_not_depend_on_how_many_there_are(sampler):
    few = generate_toys(sampler=sampler, numbers=[5, 0, 2])
    np.testing.assert_array_equal(few, generate_toys(sampler=sampler)[[5, 0, 2]])


class Together:
    """Ranks that share a generation, on threads: what each gets of the others."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=30)
        self._values: list[Any] = [None] * world_size

    def rank(self, rank: int) -> Processes:
        return cast(
            Processes,
            SimpleNamespace(
                rank=rank, world_size=self.world_size, gather=partial(self.gather, rank), agree=lambda action: action()
            ),
        )

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


@pytest.mark.parametrize("sampler", ["ddim", "euler-ancestral"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_share_images_and_each_gets_all_in_their_order(sampler, world_size):
    alone, together = generate_toys(sampler=sampler), Together(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        shared = pool.map(lambda rank: generate_toys(sampler=sampler, processes=together.rank(rank)), range(world_size))
        for images in shared:
            np.testing.assert_array_equal(images, alone)


def test_ranks_have_even_shares_of_at_most_a_batch():
    sizes: list[list[int]] = [[], []]
    together = Together(2)

    def count(rank: int) -> None:
        network = ToyNetwork()
        conditions = labels_in_turn(range(7))
        counted = lambda numbers: sizes[rank].append(len(numbers)) or conditions(numbers)  # noqa: E731
        how = {**SETTINGS, "batch_size": 3, "processes": together.rank(rank)}
        assert len(list(generate(cast(Backbone, network), OBJECTIVES["vp-sde"], counted, range(10), **how))) == 10

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(count, range(2)))
    assert sizes == [[3, 3], [3, 1]]


def test_images_come_as_they_are_drawn():
    asked: list[int] = []
    conditions = labels_in_turn(range(7))
    images = generate(
        cast(Backbone, ToyNetwork()),
        OBJECTIVES["vp-sde"],
        lambda numbers: asked.extend(numbers) or conditions(numbers),
        range(1000),
        **{**SETTINGS, "batch_size": 2},
    )
    next(images)
    assert asked == [0, 1]
    assert not torch.is_inference_mode_enabled()


def test_images_depend_on_seed_number_and_label():
    images = generate_toys(labels=[1] * 7)
    assert len({image.tobytes() for image in images}) == 7
    assert not np.array_equal(images, generate_toys(labels=[1] * 7, seed=4))
    assert not np.array_equal(images, generate_toys(labels=[2] * 7))


@pytest.mark.parametrize(
    "sampler",
    [
        "euler-ancestral",
        "euler-maruyama",
    ],
)
def test_noise_added_on_the_way_depends_on_the_seed(sampler, monkeypatch):
    # The same start for all seeds, so that only the noise of the sampler can tell them apart.
    monkeypatch.setattr(generate_module, "draw_noise", lambda seed, n, shape, stream: np.zeros(shape, dtype=np.float32))
    assert not np.array_equal(generate_toys(sampler=sampler, seed=1), generate_toys(sampler=sampler, seed=2))


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1])
def test_every_seed_that_a_run_may_have_can_be_sampled(seed):
    assert generate_toys(seed=seed).shape == (7, 4, 4, 1)


def test_images_are_eight_bit_channels_last_and_leave_no_gradient():
    network = ToyNetwork(channels=3, img_size=8)
    images = np.stack(
        list(generate(cast(Backbone, network), OBJECTIVES["vp-sde"], labels_in_turn([]), range(7), **SETTINGS))
    )
    assert (images.shape, images.dtype) == ((7, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("value", "expected"), [(-1.0, 0), (1.0, 255), (0.0, 128), (-5.0, 0), (5.0, 255), (1 / 255, 128), (-1 / 255, 127)]
)
def test_values_become_the_nearest_of_256_levels(value, expected):
    assert to_uint8(torch.full((1, 1, 1, 1), value)).item() == expected


def test_every_level_survives_a_round_trip():
    levels = torch.arange(256, dtype=torch.float32)
    found = to_uint8((levels / 127.5 - 1).reshape(1, 4, 8, 8))
    np.testing.assert_array_equal(found, levels.reshape(1, 4, 8, 8).permute(0, 2, 3, 1))


def test_labels_take_turns():
    assert labels_in_turn([4, 0, 2])([0, 1, 2, 3, 7]).tolist() == [4, 0, 2, 4, 0]  # type: ignore[union-attr]
    assert labels_in_turn([])([0, 1]) is None


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_enlarged_in_its_place(channels, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (5, 4, 4, channels), dtype=np.uint8)
    path = tmp_path / "new" / "grid.png"
    save_grid(images, path, columns=3, tile=12)
    with Image.open(path) as picture:
        assert picture.mode == {1: "L", 3: "RGB"}[channels]
        canvas = np.asarray(picture).reshape(picture.height, picture.width, channels)
    # Three columns and two rows of 12 pixels, with 2 of white around each.
    assert canvas.shape == (2 + 2 * 14, 2 + 3 * 14, channels)
    white = np.ones(canvas.shape, dtype=bool)
    for n, image in enumerate(images):
        top, left = 2 + n // 3 * 14, 2 + n % 3 * 14
        tile = (slice(top, top + 12), slice(left, left + 12))
        np.testing.assert_array_equal(canvas[tile], image.repeat(3, 0).repeat(3, 1))
        white[tile] = False
    assert (canvas[white] == 255).all()


@pytest.mark.parametrize(("suffix", "kind"), [("", "PNG"), (".JPG", "JPEG"), (".webp", "WEBP"), (".png", "PNG")])
def test_a_picture_is_what_its_suffix_says(suffix, kind, tmp_path):
    path = tmp_path / f"grid{suffix}"
    save_grid(np.zeros((2, 8, 8, 3), dtype=np.uint8), path, columns=2, captions=["ant", "bee"])
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == (kind, (2 + 2 * 66, 2 + 78))


def test_another_suffix_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(UserError, match=r"written as \.png, .*, not \.svg"):
        picture_format(tmp_path / "grid.svg")


def test_captions_stand_below_their_images(tmp_path):
    images = np.full((4, 16, 16, 1), 255, dtype=np.uint8)
    save_grid(images, tmp_path / "grid.png", columns=2, captions=["a", "b", "c", "d"])
    with Image.open(tmp_path / "grid.png") as picture:
        dark = np.asarray(picture) < 128
    assert not dark[:66].any()
    assert dark[66:78, :66].any()
    assert dark[66:78, 68:].any()


def test_large_images_are_not_enlarged(tmp_path):
    save_grid(np.zeros((1, 64, 64, 3), dtype=np.uint8), tmp_path / "grid.png", columns=1)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (68, 68)


def test_a_grid_replaces_the_one_before_and_leaves_nothing_else(tmp_path):
    for grey in (10, 20):
        save_grid(np.full((1, 48, 48, 1), grey, dtype=np.uint8), tmp_path / "grid.png", columns=1)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.getpixel((10, 10)) == 20


@pytest.mark.parametrize(
    ("num_images", "num_classes", "expected"),
    [
        (100, 10, 10),
        (12, 2, 4),
        (100, 2, 10),
        (100, 3, 9),
        (100, 0, 10),
        (10, 1, 4),
        (5, 10, 3),
        (100, 1000, 10),
        (16, 16, 4),
        (17, 17, 5),
        (1, 0, 1),
    ],
)
def test_a_grid_is_near_a_square_with_each_class_in_columns_of_its_own(num_images, num_classes, expected):
    assert grid_columns(num_images, num_classes) == expected


@unhurried
@given(num_images=st.integers(1, 500), num_classes=st.integers(0, 1000))
def test_a_grid_has_no_empty_column(num_images, num_classes):
    assert 1 <= grid_columns(num_images, num_classes) <= num_images
