"""Weights in a network with other labels, image size or skips: what is taken, and what of it is computed again."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from scalelong.model.backbone import Backbone
from scalelong.model.backbone_config import BackboneConfig
from scalelong.model.dit_config import DiTConfig
from scalelong.model.fitted_weights import Weights, fit
from scalelong.model.nearest_preset import nearest_preset
from scalelong.model.presets import MODEL_PRESETS, UVIT_PRESETS
from scalelong.model.skip_scale import ConstantScale, LearnedScale, SkipScale, Unscaled
from scalelong.model.unet_config import UNetConfig
from scalelong.model.uvit_config import UViTConfig

UVIT = UViTConfig(img_size=8, patch_size=2, width=16, depth=2, num_heads=2, num_classes=6)
DIT = DiTConfig(img_size=8, patch_size=2, width=16, depth=2, num_heads=2, num_classes=6, skip="plain")
UNET = UNetConfig(img_size=8, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_groups=4, num_classes=6)


def made(config: BackboneConfig, policy: SkipScale | None = None, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    network: Backbone = config.network()(config, skip_scale=policy)
    with torch.no_grad():  # no weight is 0, and so none like another
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def fitted(
    before: Backbone, after: Backbone, *, known: bool = True, had_null: bool | None = True, has_null: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    known_of = (before.config, before.skip_scale) if known else (None, None)
    weights = Weights(before.state_dict(), *known_of, has_null_label=had_null)
    state, lines = fit(weights, after.config, after.skip_scale, after.state_dict(), has_null_label=has_null)
    with torch.device("meta"):
        without_storage = after.config.network()(after.config, skip_scale=after.skip_scale)
    expected = without_storage.state_dict()
    again = fit(weights, after.config, after.skip_scale, expected, has_null_label=has_null)[1]
    assert again == lines
    assert {name: x.shape for name, x in state.items()} == {name: x.shape for name, x in expected.items()}
    return state, lines


def changed(before: Backbone, state: dict[str, Tensor]) -> set[str]:
    theirs = before.state_dict()
    return {name for name, x in state.items() if name not in theirs or not torch.equal(x, theirs[name])}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("config", [UVIT, UNET, DIT], ids=lambda config: config.architecture)
@pytest.mark.parametrize("policy", [ConstantScale(), LearnedScale()], ids=lambda policy: policy.kind)
def test_the_same_network_takes_every_bit(config, policy, known):
    before, after = made(config, policy), made(config, policy, seed=1)
    state, lines = fitted(before, after, known=known)
    assert changed(before, state) == set()
    assert lines == [f"taken: {len(state)} tensors, {sum(x.numel() for x in state.values()):,} parameters"]


@pytest.mark.parametrize("config", [UVIT, UNET, DIT], ids=lambda config: config.architecture)
@pytest.mark.parametrize(
    ("rows", "had_null", "has_null", "expected"),
    [
        # of each new row the old one, None where it is new
        (6, True, True, [0, 1, 2, 3, 4, 5]),
        (6, None, True, [0, 1, 2, 3, 4, 5]),
        (4, True, True, [0, 1, 2, 5]),
        (8, True, True, [0, 1, 2, 3, 4, None, None, 5]),
        (8, None, True, [0, 1, 2, 3, 4, None, None, 5]),
        (8, False, True, [0, 1, 2, 3, 4, 5, None, None]),
        (6, False, True, [0, 1, 2, 3, 4, None]),
        (6, True, False, [0, 1, 2, 3, 4, None]),
        (3, True, False, [0, 1, 2]),
        (1, False, False, [0]),
    ],
)
def test_labels_are_taken_by_number_and_the_null_label_stays_last(config, rows, had_null, has_null, expected):
    before, after = made(config), made(replace(config, num_classes=rows), seed=1)
    state, lines = fitted(before, after, had_null=had_null, has_null=has_null)
    labels = "y_embedder.embedding_table.weight" if config is DIT else "label_emb.weight"
    old, fresh = (network.state_dict()[labels] for network in (before, after))
    for row, (number, found) in enumerate(zip(expected, state[labels], strict=True)):
        assert torch.equal(found, fresh[row] if number is None else old[number])
    assert changed(before, state) <= {labels}
    is_said = any(labels in line for line in lines)
    assert is_said == (rows != 6 or had_null not in (None, has_null))
    assert any("new" in line and labels in line for line in lines) or None not in expected


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("img_size", [4, 16, 6])
def test_positions_of_another_image_size_are_interpolated_and_those_of_extra_tokens_kept(img_size, known):
    before, after = made(UVIT), made(replace(UVIT, img_size=img_size), seed=1)
    state, lines = fitted(before, after, known=known)
    old, side = before.state_dict()["pos_embed"], img_size // 2
    assert torch.equal(state["pos_embed"][:, :2], old[:, :2])
    grid = old[:, 2:].reshape(1, 4, 4, 16).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    assert torch.equal(state["pos_embed"][:, 2:], grid.permute(0, 2, 3, 1).reshape(1, side**2, 16))
    assert changed(before, state) == {"pos_embed"}
    assert any(f"interpolated: positions of 4 x 4 patches to {side} x {side}" in line for line in lines)


@pytest.mark.parametrize("known", [True, False])
def test_labels_that_come_or_go_leave_the_other_positions_where_they_belong(known):
    labelled, plain = made(UVIT), made(replace(UVIT, num_classes=0), seed=1)
    state, lines = fitted(labelled, plain, known=known, has_null=False)
    assert torch.equal(state["pos_embed"], labelled.state_dict()["pos_embed"][:, 1:])
    assert "not used: the embedding of labels" in lines
    assert "not used: positions of label" in lines
    state, lines = fitted(plain, labelled, known=known, had_null=False)
    assert torch.equal(state["pos_embed"][:, 1:], plain.state_dict()["pos_embed"])
    for name in ("pos_embed", "label_emb.weight"):
        assert torch.equal(state[name][:, :1], labelled.state_dict()[name][:, :1])
    assert "new: the embedding of labels, 96 parameters" in lines
    assert "new: positions of label" in lines


@pytest.mark.parametrize("known", [True, False])
def test_text_may_be_longer_or_new(known):
    with_text = replace(UVIT, num_classes=0, context_tokens=5, context_dim=12)
    text = made(with_text)
    longer, plain = made(replace(with_text, context_tokens=7), seed=1), made(replace(UVIT, num_classes=0), seed=1)
    if known:  # the tensors alone do not tell how many of the tokens are text
        state, _ = fitted(text, longer, has_null=False)
        assert torch.equal(state["pos_embed"][:, :6], text.state_dict()["pos_embed"][:, :6])
        assert torch.equal(state["pos_embed"][:, 8:], text.state_dict()["pos_embed"][:, 6:])
    state, lines = fitted(plain, text, known=known, had_null=False, has_null=False)
    assert torch.equal(state["pos_embed"][:, 6:], plain.state_dict()["pos_embed"][:, 1:])
    assert "new: the projection of text, 208 parameters" in lines


@pytest.mark.parametrize("config", [UVIT, UNET], ids=lambda config: config.architecture)
@pytest.mark.parametrize("policy", [LearnedScale(), LearnedScale(shared=False)], ids=lambda policy: policy.kind)
def test_gates_of_another_policy_are_new(config, policy):
    plain, gated = made(config, Unscaled()), made(config, policy, seed=1)
    for before, known in (
        (plain, True),
        (plain, False),
        (made(config, LearnedScale(8, shared=not policy.shared)), True),
    ):
        state, lines = fitted(before, gated, known=known)
        gates = {name for name in state if name.startswith(("se.", "skip_gates."))}
        assert gates
        assert changed(before, state) == gates
        assert all(torch.equal(state[name], gated.state_dict()[name]) for name in gates)
        assert any(line.startswith("new: gates of the skips") for line in lines)
        assert any(line.startswith("skips: ") and "ls" in line for line in lines) == known
    state, lines = fitted(gated, plain)
    assert changed(gated, state) == set()
    assert "not used: gates of the skips" in lines


def test_gates_over_other_tokens_are_new():
    before, after = made(UVIT, LearnedScale()), made(replace(UVIT, img_size=16), LearnedScale(), seed=1)
    state, _ = fitted(before, after)
    assert changed(before, state) == {"pos_embed", *(name for name in state if name.startswith("se."))}


@pytest.mark.parametrize("known", [True, False])
def test_positions_of_a_dit_are_those_of_its_own_grid(known):
    """Which a run's averages, parameters alone, do not hold either."""
    before, after = made(DIT), made(replace(DIT, img_size=16), seed=1)
    state, lines = fitted(before, after, known=known)
    assert changed(before, state) == {"pos_embed"}
    assert torch.equal(state["pos_embed"], after.state_dict()["pos_embed"])
    assert lines[0].startswith("taken: ")
    averages = Weights({name: x for name, x in before.state_dict().items() if name != "pos_embed"})
    state, _ = fit(averages, DIT, before.skip_scale, made(DIT, seed=1).state_dict(), has_null_label=True)
    assert changed(before, state) == set()


@pytest.mark.parametrize("config", [UNET, DIT], ids=lambda config: config.architecture)
def test_a_learned_variance_is_left_and_the_noise_predicted_as_before(config):
    both, alone = made(replace(config, out_channels=6)), made(config, seed=1)
    last = "out.2" if config is UNET else "final_layer.linear"
    for known in (True, False):
        state, lines = fitted(both, alone, known=known)
        alone.load_state_dict(state)
        x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 5])
        torch.testing.assert_close(alone(x, t, y), both(x, t, y)[:, :3])
        assert f"not used: the variance, channels 3 and up of {last}" in lines


def test_projections_of_a_unet_in_another_order_compute_the_same():
    config = replace(UNET, attention_resolutions=(1, 2), num_heads=2)
    before, after = made(replace(config, use_new_attention_order=False)), made(config, seed=1)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 5])
    for old, new in ((before, after), (after, before)):
        state, _ = fitted(old, new)
        expected = old(x, t, y)
        new.load_state_dict(state)
        torch.testing.assert_close(new(x, t, y), expected)
        assert not torch.equal(*(network.state_dict()["middle_block.1.qkv.weight"] for network in (old, new)))


def test_half_precision_and_double_become_the_dtype_of_the_network():
    before = made(UVIT)
    for dtype in (torch.bfloat16, torch.float64):
        state, _ = fitted(before.to(dtype), made(UVIT, seed=1))
        assert {x.dtype for x in state.values()} == {torch.float32}
        assert all(torch.equal(state[name], x.float()) for name, x in before.state_dict().items())


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (UVIT, {"width": 32}, ["width 16 -> 32"]),
        (UVIT, {"depth": 4}, ["depth 2 -> 4"]),
        (UVIT, {"in_channels": 1}, ["in_channels 3 -> 1", "channels out 3 -> 1"]),
        (UVIT, {"out_channels": 6}, ["channels out 3 -> 6"]),
        (UVIT, {"patch_size": 4}, ["patch_size 2 -> 4"]),
        (UVIT, {"num_heads": 4}, ["num_heads 2 -> 4"]),
        (UVIT, {"final_conv": False}, ["final_conv True -> False"]),
        (DIT, {"width": 32}, ["width 16 -> 32"]),
        (DIT, {"depth": 4}, ["depth 2 -> 4"]),
        (DIT, {"patch_size": 4}, ["patch_size 2 -> 4"]),
        (DIT, {"mlp_ratio": 2.0}, ["mlp_ratio 4.0 -> 2.0"]),
        (DIT, {"skip": "none"}, ["skip plain -> none"]),
        (UNET, {"in_channels": 4}, ["in_channels 3 -> 4"]),
        (UNET, {"channel_mult": (1, 2, 2)}, ["channel_mult (1, 2) -> (1, 2, 2)"]),
        (UNET, {"num_head_channels": 4}, ["num_heads (1, 1) -> (2, 4)"]),
    ],
)
def test_weights_of_other_sizes_are_refused_naming_them(config, changes, words):
    before, after = made(config), made(replace(config, **changes))
    with pytest.raises(ValueError, match="nearest to them is the") as caught:
        fitted(before, after)
    assert all(word in str(caught.value) for word in words)
    if "num_head" in words[0]:  # which the tensors do not tell
        return
    with pytest.raises(ValueError, match="nearest to them is the"):
        fitted(before, after, known=False)


def test_weights_that_fit_nothing_name_the_nearest_architecture_and_preset():
    digits = made(UVIT_PRESETS["digits-uvit"])
    for known in (True, False):
        with pytest.raises(ValueError, match=r"width 96 -> 16.*nearest to them is the UViT digits-uvit"):
            fitted(digits, made(UVIT), known=known)
        with pytest.raises(ValueError, match=r"nearest to them is the UViT digits-uvit"):
            fitted(digits, made(UNET), known=known)
    other = Weights({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(10)})
    with pytest.raises(ValueError, match=r"they lack .*conv1.weight, fc.bias of them are not known; no architecture"):
        fit(other, UVIT, Unscaled(), made(UVIT).state_dict(), has_null_label=False)


@pytest.mark.parametrize("name", ["digits-uvit", "digits-unet", "photos32-uvit", "photos32-unet", "digits-dit"])
def test_each_preset_is_nearest_to_itself(name):
    config = MODEL_PRESETS[name]
    with torch.device("meta"):
        state = config.network()(config).state_dict()
    assert nearest_preset(state) == f"{config.architecture} {name}"
