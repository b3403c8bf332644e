"""Linear probes: what they read, what they take, and that they tell a trained network from one that is not."""

import csv
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("sklearn")

from running import run_command, small_config

from scalelong.model.architectures import make_backbone
from scalelong.model.presets import MODEL_PRESETS
from scalelong.train.checkpoint import load_model
from scalelong.train.commands import export
from scalelong.train.commands.probe import SIGMAS, main
from scalelong.train.data.cluttered_digits import VIEWS, cluttered, cluttered_digits_folder
from scalelong.train.data.source import open_source
from scalelong.train.errors import UserError
from scalelong.train.objective import make_objective
from scalelong.train.objective_config import ObjectiveConfig
from scalelong.train.probing.features import BlockFeatures, Column, FeatureFile, PixelFeatures
from scalelong.train.probing.heads import HeadsConfig, accuracies, train_heads
from scalelong.train.probing.images import ProbeImages, open_probe_images
from scalelong.train.probing.probe import ProbePlan, run_probe

WIDTHS = (5, 8, 5, 3)
COLUMNS = [Column(f"block {n}", 0.1, width) for n, width in enumerate(WIDTHS)]


def filled(path: Path, parts: list[Tensor], columns: list[Column] = COLUMNS) -> FeatureFile:
    file = FeatureFile(path, len(parts[0]), columns)
    file.write(0, parts)
    return file


def test_features_lie_in_a_file_by_their_widths(tmp_path):
    parts = [torch.randn(7, width) for width in WIDTHS]
    file = filled(tmp_path / "features", parts)
    assert [file.columns[place].width for place in range(4)] == [3, 5, 5, 8]
    expected = torch.cat([parts[place] for place in (3, 0, 2, 1)], dim=1)
    assert torch.equal(file.rows(np.array([4, 2])), expected[[4, 2]].half().float())
    assert file.path.stat().st_size == 2 * 7 * sum(WIDTHS)
    with pytest.raises(UserError, match="features of block 1 are not finite: their network has diverged"):
        file.write(0, [torch.full((7, width), np.inf if n == 1 else 0.0) for n, width in enumerate(WIDTHS)])
    with pytest.raises(UserError, match="features of block 1 are 16 times as large as those of the first images"):
        file.write(0, [torch.full((7, width), 1e5 if n == 1 else 0.0) for n, width in enumerate(WIDTHS)])
    file.remove()
    assert not file.path.exists()


def test_features_beyond_16_bits_are_read_as_they_were(tmp_path):
    parts = [torch.randn(7, width) * (1e7 if n == 1 else 1.0) for n, width in enumerate(WIDTHS)]
    file = filled(tmp_path / "features", parts)
    expected = [parts[place].half().float() if place != 1 else parts[1] for place in (3, 0, 2, 1)]
    torch.testing.assert_close(file.rows(slice(0, 7)), torch.cat(expected, dim=1), rtol=2.0**-11, atol=0.0)
    assert torch.equal(file.rows(slice(0, 7))[:, :13], torch.cat(expected, dim=1)[:, :13])


@pytest.mark.parametrize("standardise", [False, True])
def test_probes_that_are_trained_together_are_those_trained_alone(tmp_path, standardise):
    labels = np.arange(60) % 3
    parts = [
        torch.randn(60, width) + 2.0 * torch.from_numpy(labels)[:, None] * (n == 1) for n, width in enumerate(WIDTHS)
    ]
    config = HeadsConfig(epochs=8, batch_size=16, learning_rate=0.05, standardise=standardise)
    together = filled(tmp_path / "all", parts)
    heads = train_heads(together, labels, 3, config)
    shares, logits_LBK = accuracies(heads, together, labels), heads.logits(together.rows(slice(0, 60)))
    for place, column in enumerate(together.columns):
        number = COLUMNS.index(column)
        alone = filled(tmp_path / f"{number}", [parts[number]], [column])
        head = train_heads(alone, labels, 3, config)
        torch.testing.assert_close(head.logits(alone.rows(slice(0, 60)))[0], logits_LBK[place], rtol=1e-4, atol=1e-5)
        assert accuracies(head, alone, labels) == [shares[place]]
    assert max(shares) == shares[together.order.index(1)] > 0.8
    assert all(
        torch.equal(a, b) for a, b in zip(heads.weights, train_heads(together, labels, 3, config).weights, strict=True)
    )


def test_a_probe_is_a_logistic_regression_by_adam(tmp_path):
    features, labels = torch.randn(20, 6).half().float(), np.arange(20) % 4
    config = HeadsConfig(epochs=5, batch_size=20, learning_rate=0.1)
    heads = train_heads(filled(tmp_path / "file", [features], [Column("x", None, 6)]), labels, 4, config)
    layer = torch.nn.Linear(6, 4)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(features), torch.from_numpy(labels)).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(heads.weights[0][0].T, layer.weight, rtol=1e-4, atol=1e-6)


def test_features_are_means_of_what_blocks_put_out_at_the_noise_level(tmp_path):
    config = replace(MODEL_PRESETS["digits-uvit"], width=16, depth=2)
    model, objective = make_backbone(config).eval(), make_objective(ObjectiveConfig())
    extractor = BlockFeatures(model, objective, ["in_blocks.0", "mid_block"], (0.06, 2.0), label=10)
    assert [(c.source, c.sigma) for c in extractor.columns] == [
        *(("in_blocks.0", 0.06), ("mid_block", 0.06), ("in_blocks.0", 2.0), ("mid_block", 2.0))
    ]
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    first, later = extractor(images, 0), extractor(images, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, extractor(images, 0), strict=True))
    assert not torch.equal(first[0], later[0]), "each image has noise of its own"
    torch.testing.assert_close(extractor(images[1:], 1)[3], first[3][1:])
    seen: list[Tensor] = []
    model.watch_blocks(lambda number, hidden: seen.append(hidden) if number == 1 else None)
    extractor(images, 0)
    # Label and time are no positions.
    torch.testing.assert_close(seen[1][:, 2:].mean(dim=1), first[3])


def plan_of(preset: str, num_train: int, num_test: int) -> ProbePlan:
    config = MODEL_PRESETS[preset]
    with torch.device("meta"):
        model = make_backbone(config)
    names = [name for name, _ in model.named_blocks()]
    columns = BlockFeatures(model, make_objective(ObjectiveConfig()), names, SIGMAS).columns
    return ProbePlan(num_train, num_test, 10, tuple(columns), 128)


def test_fifty_thousand_images_of_a_published_network_are_planned():
    plan = plan_of("cifar10-uvit-s2", 50_000, 10_000)
    assert plan.bytes_on_disk == 2 * 60_000 * 13 * 512 * 3
    assert plan.bytes_in_memory < 100e6
    assert plan.lines() == [
        "50,000 images of 10 classes and 10,000 held out; 39 probes on 19,968 features of each",
        f"features: 2.4 GB on disk; beside the network {plan.bytes_in_memory / 1e6:.3g} MB of memory",
    ]


class Drawn:
    """Features that cost nothing to make."""

    def __init__(self):
        self.columns = [Column(f"{n}", None, 512) for n in range(8)]

    def __call__(self, images_BCHW: Tensor, first: int) -> list[Tensor]:
        return [torch.full((len(images_BCHW), 512), float(first + n)) for n in range(8)]


class Numbers(ProbeImages):
    """Images that need no files."""

    @property
    def labels(self) -> np.ndarray:
        return self.indices % 10

    def read(self, numbers: range, pool: Any) -> Tensor:
        return torch.zeros(len(numbers), 1, 1, 1)


def anonymous_memory() -> int:
    """Bytes of this process that no file stands behind."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def test_features_are_never_held_in_memory_and_once_on_disk(tmp_path):
    images: Any = Numbers(None, np.arange(4096), None)  # type: ignore[arg-type]
    few: Any = Numbers(None, np.arange(64), None)  # type: ignore[arg-type]
    before, peak, on_disk, done = anonymous_memory(), 0, 0, threading.Event()

    def watch() -> None:
        nonlocal peak, on_disk
        while not done.wait(0.005):
            peak = max(peak, anonymous_memory() - before)
            on_disk = max(on_disk, sum(path.stat().st_size for path in tmp_path.glob(".probe-*")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    lines: list[str] = []
    try:
        run_probe(images, few, 10, [Drawn()], HeadsConfig(epochs=1), folder=tmp_path, say=lines.append)
    finally:
        done.set()
        watcher.join()
    size = 2 * 4096 * (4096 + 64)
    assert on_disk == size
    assert peak < 0.75 * size
    assert not list(tmp_path.iterdir())
    assert lines[2].startswith("about ")


class Gratings(Numbers):
    """Waves of one of four directions, of any phase, brightness, contrast and length: no pixel tells the direction."""

    def __init__(self, count: int, seed: int):
        super().__init__(None, np.arange(count), None)  # type: ignore[arg-type]
        draws, (y, x) = np.random.default_rng(seed), np.mgrid[:8, :8]
        angle, number = (np.pi / 4 * self.labels)[:, None, None], (count, 1, 1)
        waves = np.cos(
            2 * np.pi * draws.uniform(0.18, 0.3, number) * (np.cos(angle) * x + np.sin(angle) * y)
            + draws.uniform(0, 2 * np.pi, number)
        )
        images = draws.uniform(-0.3, 0.3, number) + draws.uniform(0.3, 0.7, number) * waves
        object.__setattr__(self, "pixels", torch.tensor(images, dtype=torch.float32)[:, None])

    @property
    def labels(self) -> np.ndarray:
        return self.indices % 4

    def read(self, numbers: range, pool: Any) -> Tensor:
        return self.pixels[numbers.start : numbers.stop]  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_trained_network_is_told_from_one_that_is_not(tmp_path):
    """Where pixels do poorly: it has learned what waves are, in 200 steps, and is never told of directions."""
    train, test, objective = Gratings(600, 0), Gratings(300, 1), make_objective(ObjectiveConfig())
    model = make_backbone(replace(MODEL_PRESETS["digits-uvit"], width=32, depth=2, num_classes=0))
    names = [name for name, _ in model.named_blocks()]
    config = HeadsConfig(epochs=20, learning_rate=0.01, standardise=True)

    def best() -> float:
        extractor = BlockFeatures(model.eval(), objective, names, (0.1,))
        rows = run_probe(train, test, 4, [extractor], config, folder=tmp_path, say=lambda _: None)
        return max(row.accuracy for row in rows)

    random, pixels = (
        best(),
        run_probe(train, test, 4, [PixelFeatures(64)], config, folder=tmp_path, say=lambda _: None)[0].accuracy,
    )
    optimizer = torch.optim.AdamW(model.train().parameters(), betas=(0.9, 0.99))
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20)
        chosen = train.read(range(600), None)[torch.randint(600, (64,))]
        optimizer.zero_grad()
        objective.loss(model, chosen, torch.randn_like(chosen), torch.rand(64), None).backward()
        optimizer.step()
    assert best() > 0.15 + max(random, pixels), (random, pixels)


def images_in(folder: Path, *names: str, count: int = 6) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


MODEL = replace(MODEL_PRESETS["digits-uvit"], width=16, depth=2)


def test_a_fifth_is_held_out_where_there_is_no_test_split(tmp_path):
    train, test, names = open_probe_images(str(images_in(tmp_path, "cat", "dog", count=10)), MODEL, 1000)
    assert (len(train), len(test), names) == (16, 4, ("cat", "dog"))
    assert not set(train.indices) & set(test.indices)
    digits, held_out, _ = open_probe_images("digits", MODEL, 100)
    assert (len(digits), len(held_out)) == (100, 100)
    assert digits.source is not held_out.source
    with pytest.raises(UserError, match="too few: a fifth of them is held out"):
        open_probe_images(str(images_in(tmp_path / "few", "a", "b", count=2)), MODEL, 1000)


def test_digits_under_nuisance_are_functions_of_seed_and_number():
    digits = np.random.default_rng(0).integers(0, 255, (5, 8, 8)).astype(np.float32)
    first, second = (cluttered(digits[0], digits, 0, number) for number in (3, 4))
    assert np.array_equal(first, cluttered(digits[0], digits, 0, 3))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, cluttered(digits[0], digits, 1, 3))
    folder = cluttered_digits_folder()
    for split, num_views in VIEWS.items():
        source = open_source("cluttered-digits", 10, split=split)
        assert len(source) == num_views * len(open_source("digits", 10, split=split))
    assert Image.open(next((folder / "test" / "7").iterdir())).size == first.shape


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of few steps."""
    pytest.importorskip("deepspeed")
    from scalelong.train.loop import train

    run = tmp_path_factory.mktemp("probe") / "run"
    train(small_config(run, total_images=64, num_validation_images=0))
    return run


FEW = ("--max-images", "60", "--heads.epochs", "2", "--times", "0.06", "1")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_command_repeats_bit_for_bit_whatever_holds_the_network(run, tmp_path, capsys):
    main([str(run), *FEW, "--features", "network", "pixels"])
    printed = capsys.readouterr().out
    for words in ("60 images of 10 classes and 60 held out; 7 probes", "GB on disk", "about ", "sigma 0.06", "best: "):
        assert words in printed
    rows = rows_of(run / "probe.csv")
    assert [(row["source"], row["sigma"]) for row in rows] == [
        *((name, sigma) for sigma in ("0.06", "1.0") for name in ("in_blocks.0", "mid_block", "out_blocks.0")),
        ("pixels", ""),
    ]
    assert (run / "probe.png").is_file()
    assert (run / "probe.md").read_text().startswith("| features")
    model, _ = load_model(run)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    export.main([str(run), "--out", str(tmp_path / "export")])
    sizes = ("--", "--model.width", "32", "--model.depth", "2")
    out = ("--features", "network", "pixels", "--out", str(tmp_path / "again.csv"))
    for first, last in (
        ((str(run),), ()),
        ((str(tmp_path / "export"),), ()),
        (("digits-uvit", "--init-from", str(tmp_path / "weights.pth")), sizes),
    ):
        main([*first, *FEW, *out, *last])
        again = rows_of(tmp_path / "again.csv")
        assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows]
        assert [row["train_accuracy"] for row in again] == [row["train_accuracy"] for row in rows]
    main([str(run), *FEW, *out, "--blocks", "mid_block", "-1", "--weights", "random"])
    assert [row["source"] for row in rows_of(tmp_path / "again.csv")][:2] == ["mid_block", "out_blocks.0"]


@pytest.mark.slow
def test_bad_input_is_one_line(run, tmp_path):
    one, flat = images_in(tmp_path / "one", "cat"), tmp_path / "flat"
    images_in(flat, ".")
    for arguments, words in (
        (["--blocks", "in_blocks.7"], "--blocks: UViT has no block 'in_blocks.7'; there are in_blocks.0, mid_block"),
        (["--blocks", "3"], "UViT has 3 blocks, 0 to 2, no block 3"),
        (["--times", "0"], "noise levels of this network are above 0"),
        (["--times", "1e9"], "--times 1e+09: noise levels"),
        (["--data.path", str(one)], "has one class, 'cat'"),
        (["--data.path", str(flat)], "no class folders"),
        (["--data.path", str(tmp_path / "none")], "no such folder"),
        (["--heads.epochs", "0"], "--heads.epochs"),
        (["--", "--model.width", "32"], "change a recipe"),
    ):
        with pytest.raises(UserError) as caught:
            main([str(run), *FEW, *arguments])
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    for arguments, words in (
        (["digits-uvit"], "the recipe digits-uvit has no weights: --init-from PATH"),
        (["no-recipe", "--init-from", "x"], "unknown recipe 'no-recipe'"),
        ([str(tmp_path)], "is no run folder"),
    ):
        with pytest.raises(UserError, match=words):
            main(arguments)
    done = run_command("probe", run, "--blocks", "head", module="scalelong")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no block 'head'" in done.stderr
