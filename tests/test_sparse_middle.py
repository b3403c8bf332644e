"""A sparse middle (SPRINT): what its blocks see, how it is fused with what sees all tokens, and training with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_networks import DIT as DIT_WITH_SKIPS
from plain_networks import UVIT
from samples import each_value_once
from test_mp_networks import DIT as MP_DIT
from test_mp_networks import UNET, batch_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scalelong.model.architectures import load_backbone, make_backbone
from scalelong.model.backbone import Backbone
from scalelong.model.fitted_weights import Weights, fit
from scalelong.model.hidden_matrices import HiddenMatrix, hidden_matrices
from scalelong.model.parameter_kinds import kind_of
from scalelong.model.skip_scale import LongSkip, make_skip_scale
from scalelong.model.sparse_middle import MASK_TOKEN, MiddleTokens
from scalelong.train.data.middle import draw_middle
from scalelong.train.data.order import BatchPlan
from scalelong.train.objective import make_objective
from scalelong.train.objective_config import ObjectiveConfig
from scalelong.train.sampling.generate import guided

SPARSE: dict[str, Any] = {"sparse_ratio": 0.75, "dense_blocks": 1}
DIT = replace(DIT_WITH_SKIPS, skip="none")
CONFIGS: dict[str, Any] = {
    "uvit": replace(UVIT, depth=6),
    "text": replace(UVIT, num_classes=0, context_tokens=3, context_dim=12),
    "dit": DIT_WITH_SKIPS,
    "mpdit": MP_DIT,
}
SMALLEST = replace(UVIT, in_channels=1, width=16, num_heads=2, depth=2, num_classes=11, time_mlp=False)
KAPPA, NUM_PATCHES = 0.5, 16
each_network = pytest.mark.parametrize("name", CONFIGS)


def make(config: Any, policy: str = "cs", **options: Any) -> Any:
    torch.manual_seed(0)
    return make_backbone(config, skip_scale=make_skip_scale(policy, KAPPA), **options)


def alive(model: Any) -> Any:
    """With parameters none of which is zero, so that every block counts."""
    torch.manual_seed(1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def kept_of(count: int = 2, num_kept: int = 4) -> Tensor:
    torch.manual_seed(2)
    return torch.stack([torch.randperm(NUM_PATCHES)[:num_kept].sort().values for _ in range(count)])


@each_network
def test_a_network_that_drops_nothing_is_the_dense_one(name):
    """To the bit: with the same seed, told to keep all, in training on all of them (a ratio of 0), and saved."""
    config, batch = CONFIGS[name], batch_of(CONFIGS[name])
    dense, model = make(config), make(replace(config, **SPARSE))
    full = make(replace(config, sparse_ratio=0.0, dense_blocks=1))
    assert model.state_dict().keys() - dense.state_dict().keys() == {MASK_TOKEN}
    assert all(torch.equal(model.state_dict()[n], value) for n, value in dense.state_dict().items())
    model.load_state_dict(alive(dense).state_dict(), strict=False)
    full.load_state_dict(model.state_dict())
    expected = dense(*batch)
    assert expected.any()
    everything = MiddleTokens(torch.arange(NUM_PATCHES).expand(2, -1), torch.tensor([False, False]))
    for found in (
        model(*batch),
        model(*batch, middle=everything),
        full(*batch, middle=everything._replace(kept_BK=None)),
    ):
        assert torch.equal(found, expected)


def restored(model: Any, seen_BSD: Tensor, kept_BK: Tensor) -> Tensor:
    """Written out, image by image."""
    E: int = model.sparse_middle.num_extras
    mask_D: Tensor = model.sparse_middle.mask_token[0]
    rows = []
    for image, patches in zip(seen_BSD, kept_BK.tolist(), strict=True):
        at: dict[int, Tensor] = {
            **{n: image[n] for n in range(E)},
            **{E + patch: image[E + n] for n, patch in enumerate(patches)},
        }
        rows.append(torch.stack([at.get(n, mask_D) for n in range(E + NUM_PATCHES)]))
    return torch.stack(rows)


@pytest.mark.parametrize("policy", ["none", "cs", "geometric", "ls-separate"])
def test_a_uvit_is_the_formula_written_out(policy):
    """Skips from the middle to the middle are of the tokens that it sees; that of the last block before it is fused."""
    model, kept_BK = alive(make(replace(CONFIGS["uvit"], **SPARSE), policy)).double(), kept_of()
    x, t, y = batch_of(model.config)
    x, E = x.double(), model.config.num_extras

    def skip_of(i: int, s_BTD: Tensor) -> LongSkip:
        if policy != "ls-separate" or s_BTD.shape[1] == model.config.num_tokens:
            return model.skip_scale.long_skip(i, model.skips, s_BTD, model.se)
        padded_BTD = torch.zeros(2, model.config.num_tokens, s_BTD.shape[2], dtype=s_BTD.dtype)
        for n, patches in enumerate(kept_BK.tolist()):
            padded_BTD[n, [*range(E), *(E + patch for patch in patches)]] = s_BTD[n]
        gate_BT1 = model.skip_scale.scale(i, 3, padded_BTD, model.se)
        places = [[*range(E), *(E + patch for patch in patches)] for patches in kept_BK.tolist()]
        return LongSkip(s_BTD, torch.stack([g[p] for g, p in zip(gate_BT1, places, strict=True)]), i)

    first = model.in_blocks[0](model._embed(x, t, y, None)[0])
    seen = torch.cat([first[:, :E], torch.stack([f[E:][p] for f, p in zip(first, kept_BK, strict=True)])], dim=1)
    second = model.in_blocks[1](seen)
    third = model.in_blocks[2](second)
    h = model.out_blocks[0](model.mid_block(third), skip_of(3, third))
    h = restored(model, model.out_blocks[1](h, skip_of(2, second)), kept_BK)
    h = model.norm(model.out_blocks[2](h, skip_of(1, first)))
    expected = model.decoder_pred(h)[:, E:]
    found: list[Tensor] = []
    model.decoder_pred.register_forward_hook(lambda _layer, _inputs, output: found.append(output[:, E:]))
    model(x, t, y, middle=MiddleTokens(kept_BK))
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", ["none", "inv-sqrt2", "ls"])
def test_a_dit_without_other_skips_has_one_past_the_middle(policy):
    model, kept_BK = alive(make(replace(DIT, **SPARSE), policy)).double(), kept_of()
    x, t, y = batch_of(model.config)
    c_BD, _ = model._condition(x.double(), t, y, None)
    first = model.blocks[0](model.x_embedder(x.double()) + model.pos_embed, c_BD)
    h = torch.stack([f[p] for f, p in zip(first, kept_BK, strict=True)])
    for block in model.blocks[1:3]:
        h = block(h, c_BD)
    skip = model.skip_scale.long_skip(1, model.skips, first, model.skip_gates)
    expected = model.blocks[3](restored(model, h, kept_BK), c_BD, skip)
    *_, last = model.hidden_states(x.double(), t, y, middle=MiddleTokens(kept_BK))
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-12)
    assert model.skip_blocks() == [(1, model.blocks[3])]
    assert hidden_matrices(model)["blocks.3.skip_linear.weight"] == HiddenMatrix(skip_width=32)


@each_network
def test_only_the_middle_sees_fewer_tokens_and_operations_are_counted(name):
    config = replace(CONFIGS[name], **SPARSE)
    model, seen = make(config), list[int]()
    model.watch_blocks(lambda _number, output: seen.append(output.shape[1]))
    # The kernel that attention takes on a CPU is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*batch_of(config), middle=MiddleTokens(kept_of()))
    T = config.num_tokens
    assert seen == [T, *[T - 12] * (len(config.block_widths) - 2), T]
    assert model.training_flops(2) == counter.get_total_flops() < model.flops(2)


def gradients(model: Any, batch: Any, middle: MiddleTokens) -> list[Tensor]:
    model.zero_grad()
    model(*batch, middle=middle).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@each_value_once("name, policy, recompute", tuple(CONFIGS), ("ls", "cs"), ("blocks", 0.5))
def test_every_parameter_has_a_gradient_whatever_is_recomputed(name, policy, recompute):
    config = replace(CONFIGS[name], **SPARSE)
    model, batch, middle = alive(make(config, policy)), batch_of(config), MiddleTokens(kept_of())
    before = gradients(model, batch, middle)
    assert len(before) == len(list(model.parameters()))
    assert model.sparse_middle.mask_token.grad.any()
    model.recompute = recompute
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(model, batch, middle), strict=True))
    # Of a step on all tokens it is zero, and there.
    gradients(model, batch, MiddleTokens(None, torch.tensor([False, False])))
    assert not model.sparse_middle.mask_token.grad.any()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["uvit", "dit"])
def test_a_graph_is_the_same_network(name):
    config = replace(CONFIGS[name], **SPARSE)
    model, batch, middle = (
        alive(make(config, "ls")),
        batch_of(config),
        MiddleTokens(kept_of(), torch.tensor([True, False])),
    )
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*batch, middle=middle), model(*batch, middle=middle), rtol=0, atol=1e-5)


@each_network
def test_an_image_that_goes_past_the_middle_depends_on_no_block_of_it(name):
    config = replace(CONFIGS[name], path_drop=0.1, **SPARSE)
    model, batch = alive(make(config)), batch_of(config)
    past, runs = MiddleTokens.none(2, torch.device("cpu")), list[int]()
    one_by_one = model(*batch, middle=MiddleTokens(kept_of(), torch.tensor([True, False])))
    model.watch_blocks(lambda number, _output: runs.append(number))
    shallow = model(*batch, middle=past)
    assert runs == [0, len(config.block_widths) - 1]
    torch.testing.assert_close(shallow[0], one_by_one[0], rtol=0, atol=1e-5)
    assert not torch.allclose(shallow[1], one_by_one[1], atol=1e-3)


def test_path_drop_guidance_guides_away_from_the_network_without_its_middle():
    config = replace(SMALLEST, path_drop=0.1, **SPARSE)
    model, (x, _, y) = alive(make(config)).eval(), batch_of(config)
    objective, null, sigma = make_objective(ObjectiveConfig()), 10, 1.5
    seen = objective.process.signal_of_sigma(sigma) * x
    time = objective.process.network_time(torch.full((2,), objective.process.time_of_sigma(sigma)))
    conditional = model(seen, time, y)
    shallow = model(seen, time, torch.full_like(y, null), middle=MiddleTokens.none(2, x.device))
    expected = objective.denoiser(lambda *_: conditional + 2.0 * (conditional - shallow))(x, sigma)
    with torch.no_grad():
        found = guided(model, objective, y, null, 2.0, path_drop=True)(x, sigma)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, guided(model, objective, y, null, 2.0)(x, sigma))


def test_what_is_kept_is_a_function_of_the_seed_and_the_position():
    config = replace(SMALLEST, path_drop=0.25, **SPARSE)
    middle = draw_middle(config, 3, range(1000, 2000), drops=True)
    assert middle is not None
    assert middle.kept_BK is not None
    assert middle.left_out_B is not None
    kept = middle.kept_BK.numpy()
    # One patch of each group of 2 x 2, each as likely as the others; 0.04 are some three deviations.
    groups = kept // 4 // 2 * 2 + kept % 4 // 2
    assert (np.sort(groups, axis=1) == np.arange(4)).all()
    assert np.abs(np.bincount(kept.ravel(), minlength=16) / 1000 - 0.25).max() < 0.05
    assert middle.left_out_B.float().mean() == pytest.approx(0.25, abs=0.05)
    assert not torch.equal(middle.kept_BK[0], middle.kept_BK[1])
    # Two processes, in two steps of two micro-batches each, draw what one does.
    plans = [BatchPlan(1000, 16, accumulation_steps=2, rank=rank, world_size=2) for rank in range(2)]
    for plan in plans:
        for number in range(4):
            part = draw_middle(config, 3, plan.positions(number), drops=True)
            places = torch.tensor(plan.positions(number)) - 1000
            assert part is not None
            assert torch.equal(part.kept_BK, middle.kept_BK[places])  # type: ignore[arg-type]
            assert torch.equal(part.left_out_B, middle.left_out_B[places])  # type: ignore[arg-type]
            assert plan.step_of(number) == 1000 + 16 * (number // 2)
    other = draw_middle(config, 4, range(1000, 2000), drops=True)
    assert other is not None
    assert not torch.equal(other.kept_BK, middle.kept_BK)  # type: ignore[arg-type]
    assert draw_middle(SMALLEST, 3, range(4), drops=False) is None
    # On all tokens, the same images go past the middle.
    later = draw_middle(config, 3, range(1000, 2000), drops=False)
    assert later is not None
    assert later.kept_BK is None
    assert torch.equal(later.left_out_B, middle.left_out_B)  # type: ignore[arg-type]


@pytest.mark.parametrize(("side", "num_kept"), [(3, 5), (6, 27), (8, 40)])
def test_any_number_of_patches_of_any_image_can_be_kept(side, num_kept):
    config = replace(SMALLEST, img_size=2 * side, sparse_ratio=1 - num_kept / side**2, dense_blocks=1)
    assert config.num_kept == num_kept
    middle = draw_middle(config, 0, range(200), drops=True)
    assert middle is not None
    assert all(len(set(kept)) == num_kept for kept in middle.kept_BK.tolist())  # type: ignore[union-attr]
    counts = torch.bincount(middle.kept_BK.flatten(), minlength=side**2)  # type: ignore[union-attr]
    assert (counts > 0).all()


def test_under_mup_the_mask_token_is_a_vector_and_of_unit_rms_among_magnitude_preserving_layers():
    wide = replace(CONFIGS["uvit"], width=64, num_heads=8, parametrization="mup", base_width=32, **SPARSE)
    model = make(wide)
    kind = kind_of(MASK_TOKEN, model.parameter_kinds())
    assert (kind.init, kind.learning_rate, kind.weight_decay, kind.output, kind.epsilon) == (0.02, 1, 1, 1, 0.5)
    assert float(model.sparse_middle.mask_token.detach().std()) == pytest.approx(0.02, rel=0.3)
    preserving = make(replace(MP_DIT, **SPARSE))
    mask, restore = preserving.sparse_middle.mask_token, preserving.after_step()[MASK_TOKEN]
    for token in (mask, restore(3 * mask)):
        assert float(token.detach().square().mean()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("block", [0, 2, 5])
def test_a_block_of_any_part_conditions_those_behind_it(block):
    config = replace(CONFIGS["uvit"], self_condition_block=block, **SPARSE)
    for form in ("token", "modulation"):
        model, batch = alive(make(replace(config, self_condition_form=form))), batch_of(config)
        gradients(model, batch, MiddleTokens(kept_of()))
        assert model.self_condition.proj.weight.grad.any()


def test_networks_are_saved_and_weights_go_from_dense_to_sparse_and_back(tmp_path):
    sparse = replace(DIT, path_drop=0.1, **SPARSE)
    model = alive(make(sparse, "inv-sqrt2"))
    model.save_pretrained(tmp_path)
    loaded, batch, middle = load_backbone(tmp_path), batch_of(sparse), MiddleTokens(kept_of())
    assert loaded.config == sparse
    assert torch.equal(loaded(*batch, middle=middle), model(*batch, middle=middle))

    def put(before: Any, config: Any) -> tuple[Backbone, list[str]]:
        network = make(config, "none")
        weights = Weights(before.state_dict(), before.config, before.skip_scale)
        state, lines = fit(weights, config, network.skip_scale, network.state_dict(), has_null_label=False)
        network.load_state_dict(state)
        return network, lines

    later, lines = put(model, replace(sparse, sparse_ratio=0.0))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in later.state_dict().items())
    dense, lines = put(model, DIT)
    assert [line for line in lines if "not used" in line] == [
        "not used: the mask token of a sparse middle",
        "not used: the projection past a sparse middle",
    ]
    _, lines = put(dense, sparse)
    assert {line.partition(",")[0] for line in lines if line.startswith("new")} == {
        "new: the mask token of a sparse middle",
        "new: the projection past a sparse middle",
    }
    _, lines = put(model, replace(sparse, depth=4, sparse_ratio=0.5))
    assert not [line for line in lines if line.startswith("new")]
    uvit = make(CONFIGS["uvit"])
    _, lines = put(uvit, replace(CONFIGS["uvit"], **SPARSE))
    assert "new: the mask token of a sparse middle, 32 parameters" in lines


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (UVIT, {"sparse_ratio": 1.0}, r"sparse_ratio must be a share in \[0, 1\), got 1.0"),
    (UVIT, {"sparse_ratio": -0.1}, r"sparse_ratio must be a share in \[0, 1\), got -0.1"),
    (UVIT, {"sparse_ratio": float("nan")}, "sparse_ratio must be a share"),
    (UVIT, {"sparse_ratio": True}, "sparse_ratio must be a share"),
    (UVIT, {"sparse_ratio": "0.5"}, "sparse_ratio must be a share"),
    (UVIT, {"sparse_ratio": 0.01}, "sparse_ratio 0.01 keeps 16 of 16 patches"),
    (UVIT, {"sparse_ratio": 0.99}, "sparse_ratio 0.99 keeps 0 of 16 patches"),
    (UVIT, {"sparse_ratio": 0.75, "path_drop": 1.0}, r"path_drop must be a share in \[0, 1\), got 1.0"),
    (UVIT, {"path_drop": 0.1}, "path_drop is of a network with a sparse middle: it needs a sparse_ratio"),
    (UVIT, {"sparse_ratio": 0.75, "dense_blocks": 0}, "dense_blocks must be at least 1, got 0"),
    (UVIT, {"sparse_ratio": 0.75, "dense_blocks": 1.5}, "dense_blocks is a whole number, got 1.5"),
    (UVIT, {"sparse_ratio": 0.75, "dense_blocks": 3}, "leave no block between them: this UViT has the blocks 0 to 4"),
    (DIT, {"sparse_ratio": 0.75}, "dense_blocks 2 at each end leave no block between them: this DiT"),
    (UVIT, {"sparse_ratio": 0.5, "path_drop": 0.1, "self_condition_block": 2}, "path_drop goes past the block 2"),
    (UNET, {"sparse_ratio": 0.75}, "a EDM2UNet takes no sparse_ratio: its blocks see no patches as tokens"),
]


@pytest.mark.parametrize(("config", "changes", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_shapes_that_make_no_sense_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_tokens_of_a_middle_that_there_is_not_and_guidance_without_path_drop_are_refused():
    config = replace(SMALLEST, **SPARSE)
    x, t, y = batch_of(config)
    with pytest.raises(ValueError, match=r"UViT: this model has no sparse middle \(sparse_ratio\)"):
        make(SMALLEST)(x, t, y, middle=MiddleTokens(kept_of()))
    with pytest.raises(ValueError, match="UViT: tokens of the middle are of 3 images, not of 2"):
        make(config)(x, t, y, middle=MiddleTokens(kept_of(3)))
    with pytest.raises(ValueError, match="path_drop guidance needs a UViT that was trained"):
        config.check_path_drop(True)
    with pytest.raises(ValueError, match="has 2 factors, the network has 1 long skips"):
        make_backbone(replace(DIT, **SPARSE), skip_scale=make_skip_scale("given", factors=(1.0, 0.5)))


STEP = 32
FLAGS: list[object] = [
    *("--model.width", 16, "--model.num-heads", 2, "--model.depth", 2, "--images-per-step", STEP),
    *(
        "--model.sparse-ratio",
        0.75,
        "--model.dense-blocks",
        1,
        "--model.path-drop",
        0.2,
        "--optimizer.warmup-images",
        32,
    ),
    *("--sample.num-images", 4, "--sample.steps", 2, "--num-validation-images", 0, "--images-per-log", 0),
]


def run(recipe: str, folder: Path, steps: int, *more: object) -> Any:
    pytest.importorskip("deepspeed")
    from scalelong.train.command_line import parse_train_arguments
    from scalelong.train.loop import train

    flags = [*FLAGS, "--run", folder, "--total-images", steps * STEP, *more]
    config = parse_train_arguments([recipe, *map(str, flags)])
    assert train(config) == 0
    return config


def assert_same(left: Path, right: Path, steps: int) -> None:
    from safetensors.torch import load_file

    for name in ("model", "ema", "optimizer"):
        mine, other = (load_file(x / "checkpoints" / str(steps * STEP) / f"{name}.safetensors") for x in (left, right))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_a_run_that_turns_dense_resumes_exactly_and_its_export_draws_with_path_drop(tmp_path, capfd):
    from running import log_rows

    from scalelong.train.commands.export import main as export
    from scalelong.train.resources import flops_of_training
    from scalelong.train.sampling.pipeline import Pipeline

    more = ["--sparse-images", STEP + 1, "--sample.path-drop", True, "--skip-scale", "ls"]
    config = run("digits-uvit", tmp_path / "straight", 3, *more)
    for steps in (1, 3):
        run("digits-uvit", tmp_path / "resumed", steps, *more)
    assert_same(tmp_path / "straight", tmp_path / "resumed", 3)
    model = make_backbone(config.model, skip_scale=config.skip_scale)
    ratios = [row["tflops_per_device"] / row["images_per_second"] for row in log_rows(config.run)]
    per_image = [3 * flops / 1e12 for flops in (model.training_flops(), model.training_flops(), model.flops())]
    assert ratios == pytest.approx(per_image)
    assert flops_of_training(model, config, 3 * STEP) == 3 * STEP * (2 * model.training_flops() + model.flops())
    export([str(config.run), "--out", str(tmp_path / "export")])
    pipeline = Pipeline.from_pretrained(tmp_path / "export")
    assert pipeline.config.path_drop
    dropped, whole = (pipeline([3], steps=2, guidance=4.0, path_drop=choice)[0] for choice in (None, False))
    assert dropped.tobytes() != whole.tobytes()


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["digits-uvit", "digits-dit"])
def test_two_ranks_go_on_bit_for_bit_for_fifty_steps(tmp_path, recipe):
    pytest.importorskip("deepspeed")
    from running import train_on_ranks

    depth = ["--model.depth", 4] if recipe == "digits-dit" else []
    more = [*FLAGS, *depth, "--sparse-images", 40 * STEP, "--zero-stage", 2]
    for name, stops in (("straight", [50]), ("resumed", [25, 50])):
        for steps in stops:
            train_on_ranks(2, recipe, *more, "--total-images", steps * STEP, "--run", tmp_path / name)
    assert_same(tmp_path / "straight", tmp_path / "resumed", 50)


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("digits-uvit", ["--sparse-images", 32], "sparse_images is of a model whose middle drops patches"),
        ("digits-uvit", ["--model.sparse-ratio", 0, "--sparse-images", 32], "sparse_images is of a model"),
        ("digits-uvit", ["--model.sparse-ratio", 0.5, "--sparse-images", -1], "sparse_images must be not negative"),
        ("digits-uvit", ["--model.sparse-ratio", 0.5, "--sample.path-drop", True], "path_drop guidance needs a UViT"),
        ("digits-unet", ["--model.sparse-ratio", 0.5], "a UNet takes no sparse_ratio"),
    ],
)
def test_flags_that_make_no_sense_are_refused(recipe, flags, message):
    pytest.importorskip("tyro")
    from scalelong.train.command_line import parse_train_arguments
    from scalelong.train.errors import UserError

    with pytest.raises(UserError, match=message):
        parse_train_arguments([recipe, *map(str, flags)])
