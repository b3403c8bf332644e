"""Sampling: every sampler against a distribution whose denoiser is known exactly, guidance, grids of images."""

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from scalelong.model.backbone import Backbone
from scalelong.model.presets import UVIT_PRESETS
from scalelong.train.config import SAMPLER_NAMES
from scalelong.train.errors import UserError
from scalelong.train.objective import PROCESSES, Process
from scalelong.train.sampling import generate as generate_module
from scalelong.train.sampling.generate import default_labels, generate, guided, to_uint8
from scalelong.train.sampling.grid import grid_columns, save_grid
from scalelong.train.sampling.samplers import denoise, make_scheduler

pytest.importorskip("diffusers")

# Pixels of the data are independent, N(MEAN, STD^2).
MEAN, STD = 0.3, 0.5
# Machines that are shared stall for longer than Hypothesis waits.
unhurried = settings(deadline=None)
each_process = pytest.mark.parametrize("name", PROCESSES)


class ExactDenoiser:
    """The best prediction of the noise for such data, and what the probability-flow ODE makes of a noise."""

    def __init__(self, process: Process):
        self.process = process
        self.network_times: list[float] = []

    def alpha_bar(self, network_time: Tensor) -> Tensor:
        # Network time is a straight line over time.
        at_0, at_1 = (float(self.process.network_time(torch.tensor(t, dtype=torch.float64))) for t in (0.0, 1.0))
        return self.process.alpha_bar((network_time.double() - at_0) / (at_1 - at_0))

    def __call__(self, x_BCHW: Tensor, network_time: Tensor) -> Tensor:
        self.network_times.append(float(network_time))
        alpha_bar = self.alpha_bar(network_time)
        variance = alpha_bar * STD**2 + 1 - alpha_bar
        return ((1 - alpha_bar).sqrt() * (x_BCHW - alpha_bar.sqrt() * MEAN) / variance).to(x_BCHW.dtype)

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
    times = np.array(denoiser.network_times)
    assert len(times) == steps
    assert times[0] == pytest.approx(1000 if name == "scaled-linear" else 999)
    assert (np.diff(times) < 0).all()


def test_euler_maruyama_asks_the_network_from_time_one_to_a_thousandth():
    denoiser = ExactDenoiser(PROCESSES["vp-sde"])
    noise = torch.randn(2, 1, 4, 4)
    denoise(denoiser, PROCESSES["vp-sde"], noise, sampler="euler-maruyama", steps=10, generators=generators(2))
    np.testing.assert_allclose(denoiser.network_times, 999 * np.linspace(1, 1e-3, 10), rtol=1e-5)


def test_euler_maruyama_needs_a_continuous_process():
    with pytest.raises(UserError, match=r"euler-maruyama needs .*--objective vp-sde"):
        make_scheduler("euler-maruyama", PROCESSES["scaled-linear"])


def test_an_unknown_sampler_is_told_the_known_ones():
    with pytest.raises(UserError, match=", ".join(SAMPLER_NAMES).replace("+", r"\+")):
        make_scheduler("no-such", PROCESSES["vp-sde"])


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [("dpm-solver++", 1001), ("dpm-solver++", 2000), ("ddim", 2000), ("euler", 2000), ("euler-ancestral", 2000)],
)
def test_more_steps_than_the_grid_has_work_or_are_refused(sampler, steps):
    process, noise = PROCESSES["vp-sde"], torch.randn(1, 1, 2, 2)
    try:
        samples = denoise(
            ExactDenoiser(process), process, noise, sampler=sampler, steps=steps, generators=generators(1)
        )
    except UserError:
        return
    assert samples.isfinite().all()


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
    x, labels, t = torch.randn(3, 1, 2, 2), torch.tensor([1, 5, 7]), torch.tensor(2.0)
    found = guided(cast(Backbone, LabelModel()), labels, 9, strength)(x, t)
    conditional = labels[:, None, None, None] + 2 * x
    unconditional = 9 + 2 * x
    torch.testing.assert_close(found, conditional + strength * (conditional - unconditional))


@pytest.mark.parametrize(("labels", "strength", "passes"), [([1, 5], 0.0, 2), ([1, 5], 1.0, 4), (None, 1.0, 2)])
def test_only_guidance_doubles_the_batch(labels, strength, passes):
    model = LabelModel()
    condition = None if labels is None else torch.tensor(labels)
    guided(cast(Backbone, model), condition, 9, strength)(torch.randn(2, 1, 2, 2), torch.tensor(3.0))
    ((x_BCHW, t_B, _),) = model.calls
    assert x_BCHW.shape == (passes, 1, 2, 2)
    assert t_B.tolist() == [3.0] * passes


class ToyNetwork:
    """What ``generate`` needs of a network: each pixel for itself, so that a batch cannot change the rounding."""

    def __init__(self, channels: int = 1, img_size: int = 4):
        self.config = replace(UVIT_PRESETS["digits-uvit"], in_channels=channels, img_size=img_size)

    def parameters(self) -> Iterator[Tensor]:
        yield torch.zeros(1)

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None) -> Tensor:
        shift = 0 if y_B is None else y_B[:, None, None, None] / 20
        return (x_BCHW - shift) * 0.9


SETTINGS = {"num_images": 7, "null_condition": 9, "steps": 4, "guidance": 0.5, "seed": 3, "sampler": "ddim"}


def generate_toys(**changes) -> np.ndarray:
    settings = {"labels": list(range(7)), **SETTINGS, **changes}
    return generate(cast(Backbone, ToyNetwork()), PROCESSES["vp-sde"], settings.pop("labels"), **settings)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_an_image_does_not_depend_on_the_batches(sampler):
    together = generate_toys(sampler=sampler, batch_size=100)
    for batch_size in (1, 3, 7):
        np.testing.assert_array_equal(generate_toys(sampler=sampler, batch_size=batch_size), together)


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
def test_an_image_does_not_depend_on_how_many_there_are(sampler):
    few = generate_toys(sampler=sampler, num_images=3, labels=[0, 1, 2])
    np.testing.assert_array_equal(few, generate_toys(sampler=sampler)[:3])


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
    images = generate(cast(Backbone, ToyNetwork(channels=3, img_size=8)), PROCESSES["vp-sde"], None, **SETTINGS)
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


@pytest.mark.parametrize(("count", "classes", "expected"), [(5, 3, [0, 1, 2, 0, 1]), (2, 10, [0, 1]), (4, 0, None)])
def test_classes_take_turns(count, classes, expected):
    assert default_labels(count, classes) == expected


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
        (12, 2, 2),
        (100, 0, 10),
        (10, 1, 4),
        (5, 10, 3),
        (100, 1000, 10),
        (16, 16, 16),
        (17, 17, 5),
        (1, 0, 1),
    ],
)
def test_a_column_for_each_class_or_a_square(num_images, num_classes, expected):
    assert grid_columns(num_images, num_classes) == expected


@unhurried
@given(num_images=st.integers(1, 500), num_classes=st.integers(0, 1000))
def test_a_grid_has_no_empty_column(num_images, num_classes):
    assert 1 <= grid_columns(num_images, num_classes) <= num_images
