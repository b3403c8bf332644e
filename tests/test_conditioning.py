"""Internal self-conditioning and augmentation labels: nothing at first, and then the blocks behind one alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_networks import ADM, DDPM, DIT, UVIT
from samples import each_value_once
from test_mp_networks import DIT as MP_DIT
from test_mp_networks import TEXT, UNET, batch_of
from test_mp_networks import UVIT as MP_UVIT
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scalelong.model.architectures import load_backbone, make_backbone
from scalelong.model.backbone_config import BackboneConfig
from scalelong.model.diffusers_export import unet2d_config
from scalelong.model.fitted_weights import Weights, fit
from scalelong.model.presets import MODEL_PRESETS
from scalelong.model.skip_scale import Unscaled, make_skip_scale

AS_MODULATION = replace(UVIT, self_condition_form="modulation")
CONFIGS: dict[str, Any] = {
    **{"uvit": UVIT, "modulation": AS_MODULATION, "dit": DIT, "ddpm": DDPM, "adm": ADM},
    **{"mpuvit": MP_UVIT, "mptext": TEXT, "mpdit": MP_DIT, "edm2": UNET},
    "mpmodulation": replace(MP_UVIT, self_condition_form="modulation"),
    "residual": replace(ADM, skip="residual"),
}
ALIKE = ("ddpm", "mptext", "mpdit", "mpmodulation")
"""Networks that have in common with one of the others what is looked at here."""
each_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive) if name in ALIKE else name for name in CONFIGS]
)


def make(config: BackboneConfig, mode: str = "ls", **options: Any) -> Any:
    torch.manual_seed(0)
    return make_backbone(config, skip_scale=make_skip_scale(mode, 0.7), **options)


def drawn(model: Any) -> Any:
    """With parameters none of which is zero, so that every block and every condition counts."""
    torch.manual_seed(1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def outputs_of_blocks(model: Any, batch: tuple[Tensor, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    stop = model.watch_blocks(lambda _number, output: found.append(output.detach()))
    model(*batch)
    stop()
    return found


@each_network
def test_the_widths_of_blocks_are_those_of_what_they_put_out(name):
    config = CONFIGS[name]
    features = outputs_of_blocks(make(config), batch_of(config))
    assert config.block_widths == tuple(x.shape[2] if x.dim() == 3 else x.shape[1] for x in features)


@each_network
def test_a_network_begins_as_the_one_without_conditions(name):
    """To the bit, in every parameter and in what it predicts, with labels of augmentations too."""
    config, batch = CONFIGS[name], batch_of(CONFIGS[name])
    # The first block, the middle one and the last but one take turns.
    block = (0, len(config.block_widths) // 2, len(config.block_widths) - 2)[list(CONFIGS).index(name) % 3]
    plain, model = make(config), make(replace(config, self_condition_block=block, augment_dim=9))
    added = [n for n in model.state_dict() if n.startswith(("self_condition.", "augment_embed."))]
    assert {n.partition(".")[0] for n in added} == {"self_condition", "augment_embed"}
    assert [n for n in model.state_dict() if n not in added] == list(plain.state_dict())
    assert all(torch.equal(model.state_dict()[n], value) for n, value in plain.state_dict().items())
    # The ends of DiT and UNet begin as zero, which would hide what differs before them.
    model.load_state_dict(drawn(plain).state_dict(), strict=False)
    labels = (None,) * (3 - len(batch)) + (torch.randn(2, 9),)
    assert plain(*batch).any()
    assert torch.equal(model(*batch, *labels), plain(*batch))
    assert torch.equal(model(*batch), plain(*batch))


@each_network
def test_the_projection_changes_the_blocks_behind_the_tap_alone(name):
    config, batch = CONFIGS[name], batch_of(CONFIGS[name])
    for block in (0, len(config.block_widths) // 2):
        model = drawn(make(replace(config, self_condition_block=block)))
        before, output = outputs_of_blocks(model, batch), model(*batch)
        with torch.no_grad():
            model.self_condition.proj.weight.copy_(torch.randn_like(model.self_condition.proj.weight))
        after = outputs_of_blocks(model, batch)
        changed = [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]
        assert changed == [False] * (block + 1) + [True] * (len(changed) - block - 1)
        assert not torch.equal(model(*batch), output)


@each_network
def test_features_and_gradients_are_those_of_forward_whatever_is_recomputed(name):
    config = replace(CONFIGS[name], self_condition_block=1, augment_dim=9)
    batch = batch_of(config)
    labels = (*batch, *(None,) * (3 - len(batch)), torch.randn(2, 9))
    models = [drawn(make(config, recompute=how)) for how in ("none", "blocks")]
    outputs = [model(*labels, keeps=2) for model in models]
    for (output, kept), model in zip(outputs, models, strict=True):
        assert torch.equal(output, model(*labels))
        assert torch.equal(kept, model.features(*labels, blocks=[2])[2])
        assert model.pooled(kept).shape == (2, config.block_widths[2])
        (output.square().mean() + model.pooled(kept).square().mean()).backward()
    for (n, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert p.grad is not None, n
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), n
    for part in (models[0].self_condition, models[0].augment_embed):
        assert all(p.grad.any() for p in part.parameters())


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["uvit", "modulation", "dit", "adm", "edm2"])
def test_it_compiles_as_one_graph(name):
    model = drawn(make(replace(CONFIGS[name], self_condition_block=1, augment_dim=9))).eval()
    labels = (*batch_of(CONFIGS[name]), torch.randn(2, 9))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*labels), model(*labels))


@each_value_once(
    "name,mode", tuple(name for name in CONFIGS if name not in ALIKE), ("none", "cs", "geometric", "ls", "inv-sqrt2")
)
def test_an_export_has_it(tmp_path, name, mode):
    if (name, mode) == ("residual", "geometric"):
        pytest.skip("a sum is not renormalised")
    model = drawn(make(replace(CONFIGS[name], self_condition_block=1, augment_dim=9), mode)).eval()
    model.save_pretrained(tmp_path)
    again, batch = load_backbone(tmp_path), batch_of(CONFIGS[name])
    assert again.config == model.config
    assert torch.equal(again(*batch), model(*batch))


LOOKED_AT = ("cifar10-uvit-s2", "imagenet256-dit-s2", "cifar10-ddpm-unet", "digits-uvit", "digits-unet")
PRESETS = [name if name in LOOKED_AT else pytest.param(name, marks=pytest.mark.exhaustive) for name in MODEL_PRESETS]


@pytest.mark.parametrize("preset", PRESETS)
def test_it_costs_at_most_two_per_cent(preset):
    """Of the parameters, and of the work of a step."""
    config = MODEL_PRESETS[preset]
    block = len(config.block_widths) // 2
    with torch.device("meta"):
        plain = make_backbone(config, skip_scale=Unscaled())
        model: Any = make_backbone(replace(config, self_condition_block=block), skip_scale=Unscaled())
    assert 0 < model.num_params() - plain.num_params() <= 0.02 * plain.num_params()
    assert 0 < model.flops() - plain.flops() <= 0.02 * plain.flops()


@pytest.mark.parametrize("name", ["uvit", "dit", "adm", "edm2"])
def test_flops_count_it(name):
    config = replace(CONFIGS[name], self_condition_block=1)
    counts = []
    for one in (config, replace(config, self_condition_block=None)):
        model = make(one, "none").eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*batch_of(one, B=1))
        counts.append((model.flops(), counter.get_total_flops()))
    (ours, counted), (ours_without, counted_without) = counts
    assert ours - ours_without == counted - counted_without > 0


@pytest.mark.parametrize("name", ["mpuvit", "mpdit", "edm2"])
def test_conditions_keep_their_magnitude(name):
    config = replace(CONFIGS[name], self_condition_block=1)
    part = make(config).self_condition
    nn.init.constant_(part.gain.gain, 2.0)
    width = part.proj.out_features
    c_BD, z_BF, time_BD = (torch.randn(4096, n) for n in (width, part.proj.in_features, width))
    assert part(c_BD, 7 * z_BF, time_BD).square().mean().sqrt().item() == pytest.approx(1, abs=0.02)
    assert make(config).after_step().keys() >= {"self_condition.proj.weight", "self_condition.time_scale.weight"}


@pytest.mark.parametrize("name", ["uvit", "dit", "mpuvit"])
def test_under_mup_it_begins_as_nothing_and_learns_by_its_kinds(name):
    mup: Any = {"parametrization": "mup", "base_width": 16}
    config, batch = replace(CONFIGS[name], self_condition_block=1, augment_dim=9, **mup), batch_of(CONFIGS[name])
    model, plain = make(config), make(replace(config, self_condition_block=None, augment_dim=0))
    features = zip(outputs_of_blocks(model, batch), outputs_of_blocks(plain, batch), strict=True)
    assert all(torch.equal(x, y) for x, y in features)
    rates = {n: g.learning_rate_factor for g in model.parameter_groups() for n in g.names}
    if name == "mpuvit":
        assert rates["self_condition.proj.weight"] == pytest.approx(2**-0.5)
    else:
        assert not model.self_condition.proj.weight.any()
        assert (rates["self_condition.proj.weight"], rates["self_condition.time_scale.weight"]) == (0.5, 1.0)
        assert rates["augment_embed.weight"] == 1.0


def test_weights_of_a_network_without_it_begin_one_with_it():
    plain, batch = drawn(make(UVIT)), batch_of(UVIT)
    config = replace(UVIT, self_condition_block=2)
    fresh = make(config).state_dict()
    state, lines = fit(Weights(plain.state_dict(), UVIT), config, plain.skip_scale, fresh, has_null_label=False)
    model = make(config)
    model.load_state_dict(state)
    assert torch.equal(model(*batch), plain(*batch))
    assert any("new: internal self-conditioning" in line for line in lines)
    # The features of another block mean something else; those of the same one are taken.
    trained = drawn(make(config))
    for block, is_taken in ((2, True), (1, False)):
        other = replace(config, self_condition_block=block)
        given = Weights(trained.state_dict(), config)
        state, _ = fit(given, other, trained.skip_scale, make(other).state_dict(), has_null_label=False)
        assert state["self_condition.proj.weight"].any().item() is is_taken


def test_bad_input_is_named():
    for config in (UVIT, DIT, ADM, UNET):
        last = len(config.block_widths) - 1
        for block in (last, -1, 99):
            with pytest.raises(ValueError, match=rf"self_condition_block {block}: .* has the blocks 0 to {last}"):
                replace(config, self_condition_block=block)
    with pytest.raises(ValueError, match="self_condition_block is the number of a block, got True"):
        replace(UVIT, self_condition_block=True)
    with pytest.raises(ValueError, match="token or modulation, got 'both'"):
        replace(UVIT, self_condition_form="both")
    with pytest.raises(ValueError, match="takes no self_condition_block: its block_widths are not known"):
        BackboneConfig(img_size=8, self_condition_block=0)
    with pytest.raises(ValueError, match="takes no augmentation labels"):
        make(UVIT)(*batch_of(UVIT), torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"expected augmentation labels \(2, 9\), got \(2, 3\)"):
        make(replace(UVIT, augment_dim=9))(*batch_of(UVIT), torch.zeros(2, 3))
    for change in ({"self_condition_block": 0}, {"augment_dim": 9}):
        with pytest.raises(ValueError, match=f"diffusers has no {next(iter(change))}"):
            unet2d_config(replace(DDPM, **change), Unscaled())
