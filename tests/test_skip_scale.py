import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from scalelong.model.skip_gates import TokenGate
from scalelong.model.skip_scale import (
    SKIP_SCALE_NAMES,
    ConstantScale,
    Geometric,
    InverseSqrt2,
    LearnedScale,
    SkipScale,
    SkipShape,
    Unscaled,
    described,
    make_skip_scale,
    skip_scale_from_dict,
    skip_scale_to_dict,
)
from scalelong.model.uvit import UViT, UViTConfig

CONFIG = UViTConfig(img_size=16, patch_size=2, width=64, depth=8, num_heads=4)
N, T = CONFIG.num_skips, CONFIG.num_tokens


def calls_of_the_decoder(model: UViT) -> list[tuple]:
    """(block, skip, scale) for each decoder block, in the order in which they run."""
    calls = []
    for block in model.out_blocks:
        block.register_forward_pre_hook(lambda block, args: calls.append((block, args[1].features, args[1].scale)))
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16), torch.tensor([1.0, 500.0]))
    return calls


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Unscaled(), [None, None, None, None]),
        (InverseSqrt2(), [1 / math.sqrt(2)] * 4),
        (ConstantScale(0.7), [0.7**3, 0.7**2, 0.7, 1.0]),
        (ConstantScale(1.0), [1.0] * 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_factors_in_execution_order(policy, expected):
    calls = calls_of_the_decoder(UViT(CONFIG, skip_scale=policy))
    assert [scale for _, _, scale in calls] == (expected if None in expected else pytest.approx(expected, rel=1e-15))


def test_kappa_defaults_to_the_published_half():
    assert make_skip_scale("cs") == ConstantScale() == ConstantScale(0.5)


def test_skips_are_consumed_last_in_first_out():
    model = UViT(CONFIG)
    outputs = []
    for block in model.in_blocks:
        block.register_forward_hook(lambda block, args, output: outputs.append(output))
    skips = [skip for _, skip, _ in calls_of_the_decoder(model)]
    assert all(a is b for a, b in zip(skips, reversed(outputs), strict=True))


def test_skip_blocks_counts_from_the_outermost():
    model = UViT(CONFIG)
    executed = [block for block, _, _ in calls_of_the_decoder(model)]
    assert model.skip_blocks() == list(zip(range(N, 0, -1), executed, strict=True))


def test_one_shared_gate_scales_every_skip():
    model = UViT(CONFIG, skip_scale=LearnedScale())
    for _, skip, scale in calls_of_the_decoder(model):
        assert torch.equal(scale, model.get_submodule("se")(skip))


def test_separate_gates_are_stored_in_execution_order():
    model = UViT(CONFIG, skip_scale=LearnedScale(shared=False))
    for executed, (_, skip, scale) in enumerate(calls_of_the_decoder(model)):
        assert torch.equal(scale, model.get_submodule(f"se.{executed}")(skip))


def test_gate_is_one_factor_in_0_1_for_each_token():
    gate = TokenGate(T, 16)(10 * torch.randn(3, T, 64))
    assert gate.shape == (3, T, 1)
    assert ((gate > 0) & (gate < 1)).all()


def test_gate_is_the_published_formula():
    gate = TokenGate(T, 16).double()
    s = torch.randn(3, T, 64, dtype=torch.float64)
    pooled = s.sum(-1) / 64
    hidden = (pooled @ gate.layer1.weight.T + gate.layer1.bias).clamp(min=0)
    expected = 1 / (1 + torch.exp(-(hidden @ gate.layer2.weight.T + gate.layer2.bias)))
    torch.testing.assert_close(gate(s)[..., 0], expected)


def test_gate_pools_over_features():
    gate = TokenGate(T, 16).double()
    s = torch.randn(3, T, 64, dtype=torch.float64)
    torch.testing.assert_close(gate(s[..., torch.randperm(64)]), gate(s))


def test_gate_mixes_across_tokens():
    gate = TokenGate(T, 16).double()
    s = torch.randn(1, T, 64, dtype=torch.float64)
    changed = s.clone()
    changed[:, 0] += 10
    assert (gate(changed) != gate(s)).all()


def test_gates_start_near_one_half():
    gate = TokenGate(257, 16)(torch.randn(4, 257, 512))
    assert (gate - 0.5).abs().max() < 0.1


@pytest.mark.parametrize(("num_tokens", "num_params"), [(257, 8_497), (258, 8_530), (334, 13_714)])
def test_parameters_of_the_gates(num_tokens, num_params):
    def count(policy):
        return sum(p.numel() for p in policy.make_gates(6 * [SkipShape("tokens", 64, 64, num_tokens)]).parameters())

    assert TokenGate(num_tokens, 16).layer1.out_features == num_tokens // 16
    assert count(LearnedScale()) == num_params
    assert count(LearnedScale(shared=False)) == 6 * num_params


def test_a_short_sequence_keeps_one_hidden_unit():
    assert TokenGate(5, 16).layer1.out_features == 1


@pytest.mark.parametrize("policy", [Unscaled(), InverseSqrt2(), ConstantScale()])
def test_fixed_policies_have_no_parameters(policy):
    assert policy.make_gates(6 * [SkipShape("tokens", 64, 64, 257)]) is None


def test_gates_keep_the_default_initialisation_inside_a_model():
    config = UViTConfig(img_size=32, patch_size=2, width=32, depth=2, num_heads=2)
    model = UViT(config, skip_scale=LearnedScale())
    assert isinstance(model.se, TokenGate)
    for layer in (model.se.layer1, model.se.layer2):
        bound = layer.in_features**-0.5
        for parameter in (layer.weight, layer.bias):
            assert 0.8 * bound < parameter.abs().max() <= bound
        # A uniform distribution, not a truncated normal one.
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_every_other_linear_is_trunc_normal_with_zero_bias():
    model = UViT(CONFIG, skip_scale=LearnedScale())
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.startswith("se.")]
    assert len(linears) == 9 * 4 + 4 + 1
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert linear.bias is None or not linear.bias.any()


@pytest.mark.parametrize("kappa", [0.0, -0.5, 1.5, math.nan, math.inf])
def test_kappa_outside_0_1_is_refused(kappa):
    with pytest.raises(ValueError, match=rf"\(0, 1\], got {kappa}"):
        ConstantScale(kappa)
    with pytest.raises(ValueError, match=rf"\(0, 1\], got {kappa}"):
        make_skip_scale("cs", kappa)


def test_a_reduction_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LearnedScale(reduction=0)


def test_names_make_policies():
    fixed = [Unscaled(), InverseSqrt2(), ConstantScale(0.7), Geometric(0.7)]
    policies = [*fixed, LearnedScale(), LearnedScale(shared=False)]
    assert [make_skip_scale(name, 0.7) for name in SKIP_SCALE_NAMES] == policies


def test_the_registry_is_by_the_names_of_the_command_line():
    assert tuple(SkipScale.known)[: len(SKIP_SCALE_NAMES)] == SKIP_SCALE_NAMES
    assert [make_skip_scale(name).kind for name in SKIP_SCALE_NAMES] == list(SKIP_SCALE_NAMES)
    assert skip_scale_to_dict(LearnedScale(8, shared=False)) == {"kind": "ls-separate", "reduction": 8, "shared": False}
    assert make_skip_scale("ls", reduction=8) == LearnedScale(8)
    with pytest.raises(ValueError, match="none of this version cannot be made of"):
        make_skip_scale("none", reduction=8)


def test_a_policy_in_words():
    assert [described(make_skip_scale(name, 0.7)) for name in SKIP_SCALE_NAMES] == [
        "none",
        "inv-sqrt2",
        "cs (kappa 0.7)",
        "geometric (kappa 0.7, renorm True)",
        "ls (reduction 16)",
        "ls-separate (reduction 16)",
    ]


def test_a_name_that_is_taken_stays_with_its_policy():
    class Other(SkipScale, kind="cs"):
        pass

    assert make_skip_scale("cs") == ConstantScale()
    with pytest.raises(ValueError, match="another policy has its name"):
        skip_scale_to_dict(Other())


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown skip scale 'se'; there are none, inv-sqrt2, cs, geometric, ls"):
        make_skip_scale("se")


@pytest.mark.parametrize(
    "policy",
    [
        *(Unscaled(), InverseSqrt2(), ConstantScale(0.7), Geometric(0.7), Geometric(0.7, renorm=False)),
        *(LearnedScale(), LearnedScale(reduction=8, shared=False)),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_a_policy_survives_json(policy):
    assert skip_scale_from_dict(json.loads(json.dumps(skip_scale_to_dict(policy)))) == policy


@pytest.mark.parametrize("description", [{"policy": "Magic"}, {"kappa": 0.5}])
def test_an_unknown_description_is_refused(description):
    with pytest.raises(ValueError, match=r"unknown skip-scale policy .*; there are none, inv-sqrt2, cs"):
        skip_scale_from_dict(description)


@dataclass(frozen=True)
class Halving(SkipScale):
    """A policy of one's own."""

    by: float = 2.0
    but: tuple[int, ...] = ()

    def scale(self, i, num_skips, skip, gates):
        return 1.0 if i in self.but else self.by**-i


def test_a_policy_of_ones_own_is_saved_and_loaded(tmp_path):
    policy = Halving(3.0, (1, 2))
    assert skip_scale_from_dict(json.loads(json.dumps(skip_scale_to_dict(policy)))) == policy
    model = UViT(CONFIG, skip_scale=policy)
    model.save_pretrained(tmp_path)
    assert UViT.from_pretrained(tmp_path).skip_scale == policy


def test_a_policy_of_ones_own_that_is_not_defined_is_named(tmp_path, monkeypatch):
    UViT(CONFIG, skip_scale=Halving()).save_pretrained(tmp_path)
    monkeypatch.delitem(SkipScale.known, "Halving")
    with pytest.raises(ValueError, match=r"config.json .*unknown skip-scale policy 'Halving'.* must be defined before"):
        UViT.from_pretrained(tmp_path)


class Stateful(SkipScale):
    def __init__(self, factor: float):
        object.__setattr__(self, "factor", factor)
        super().__init__()


def named_like_ours() -> SkipScale:
    return type("ConstantScale", (SkipScale,), {"__module__": "elsewhere"})()


@pytest.mark.parametrize("make", [lambda: Stateful(0.5), named_like_ours, lambda: Halving(but=[1])])  # type: ignore[arg-type]
def test_a_policy_that_would_not_come_back_is_not_saved(tmp_path, make):
    with pytest.raises(ValueError, match="cannot be saved"):
        UViT(CONFIG, skip_scale=make()).save_pretrained(tmp_path)
    assert skip_scale_from_dict({"policy": "ConstantScale", "kappa": 0.7}) == ConstantScale(0.7)  # as it was saved


@pytest.mark.parametrize("description", ["cs", None, {"policy": "ConstantScale", "factor": 0.5}, {"policy": {}}])
def test_a_description_that_does_not_fit_is_refused(description):
    with pytest.raises(ValueError, match=r"skip scale is a dictionary|cannot be made of|unknown skip-scale policy"):
        skip_scale_from_dict(description)
