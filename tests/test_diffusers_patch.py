"""patch_diffusers: networks of diffusers against themselves, unpatched, and against hooks that scale their skips."""

import copy
import functools
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets import unet_2d_blocks
from diffusers.training_utils import EMAModel
from parity import sent_back
from test_house import modules_loaded_by

from scalelong.model import diffusers_blocks
from scalelong.model.diffusers_patch import patch_diffusers, unpatch_diffusers
from scalelong.model.skip_scale import ConstantScale, LearnedScale
from scalelong.model.unet_config import SKIP_POSITIONS

KAPPA = 0.7
ATTENDED = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
COMMON = {"sample_size": 8, "norm_num_groups": 8}
TEXT = {**COMMON, "cross_attention_dim": 16, "attention_head_dim": 8}
# The channels give some concatenations a group that lies over both parts, and others none.
NETWORKS = {
    "ddpm": (UNet2DModel, {**COMMON, **ATTENDED, "block_out_channels": (32, 64)}),
    "adm": (
        UNet2DModel,
        {
            **COMMON,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
            "downsample_type": "resnet",
            "upsample_type": "resnet",
        },
    ),
    "ncsnpp": (
        UNet2DModel,
        {
            "sample_size": 8,
            "norm_num_groups": None,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "mid_block_scale_factor": 2**0.5,
        },
    ),
    "sd15": (
        UNet2DConditionModel,
        {
            **TEXT,
            "block_out_channels": (32, 48),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
    ),
    "sdxl": (
        UNet2DConditionModel,
        {
            **TEXT,
            "block_out_channels": (32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
    ),
    "if": (
        UNet2DConditionModel,
        {
            **TEXT,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "act_fn": "gelu",
            "resnet_time_scale_shift": "scale_shift",
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "resnet_skip_time_act": True,
            "class_embed_type": None,
        },
    ),
}
each_network = pytest.mark.parametrize("name", NETWORKS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make_network(name: str = "ddpm", **more) -> Any:
    kind, config = NETWORKS[name]
    network = kind(**{**config, **more})
    with torch.no_grad():  # no parameter at 0 or 1, so that every one matters
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


def make_inputs(network: Any) -> dict:
    config = network.config
    inputs: dict = {"sample": torch.randn(2, config.in_channels, 8, 8), "timestep": torch.tensor([3, 700])}
    if isinstance(network, UNet2DConditionModel):
        inputs["encoder_hidden_states"] = torch.randn(2, 5, 16)
        if config.addition_embed_type is not None:
            inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
    return inputs


def cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, dict):
        return {name: cast(value, dtype) for name, value in x.items()}
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def results(network: Any, inputs: dict, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The output and the gradient of every parameter and of the sample, computed in ``dtype``."""
    network, inputs = copy.deepcopy(network).to(dtype), cast(inputs, dtype)
    inputs["sample"] = inputs["sample"].detach().requires_grad_()
    output = network(**inputs).sample
    leaves = {name: p for name, p in network.named_parameters() if p.requires_grad} | {"sample": inputs["sample"]}
    grads = torch.autograd.grad(output, list(leaves.values()), sent_back(output))
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_within_budget(patched: nn.Module, plain: nn.Module, inputs: dict, dtype: torch.dtype) -> None:
    """Output and gradients may be 2 and 4 times as wrong as those of ``plain``, whose fp64 results are the truth."""
    truths = results(plain, inputs, torch.float64)
    expected, found = (results(network, inputs, dtype) for network in (plain, patched))
    assert list(found) == list(truths)
    # What cancels leaves rounding errors alone, of the size of those of other gradients.
    scale = torch.stack([truth.abs().max() for truth in truths.values()]).median()
    for name, truth in truths.items():
        assert found[name].dtype == dtype, name
        error, plain_error = ((grads[name].double() - truth).abs().max() for grads in (found, expected))
        floor = 4 * torch.finfo(torch.float32).eps * truth.abs().max() + torch.finfo(dtype).eps * scale / 4
        allowed = (2 if name == "output" else 4) * plain_error + floor
        assert error <= allowed, f"{name}: {error:.3g}, allowed {allowed:.3g}, plain {plain_error:.3g}"


def patched_copy(network: Any, **options) -> Any:
    network = copy.deepcopy(network)
    patch_diffusers(network, **options)
    return network


def scaled_by_hooks(network: Any, factor_of: Callable[[int, Tensor], Tensor | float], position: str) -> Any:
    """A copy of a plain network, whose skip i is multiplied by ``factor_of(i, skip)`` where it was concatenated."""
    network = copy.deepcopy(network)
    decoder = [resnet for block in network.up_blocks for resnet in block.resnets]
    hidden = network.mid_block.resnets[-1].out_channels
    for i, resnet in zip(range(len(decoder), 0, -1), decoder, strict=True):
        _scale_skip(resnet, hidden, functools.partial(factor_of, i), position)
        hidden = resnet.out_channels
    return network


def _scale_skip(resnet: Any, hidden: int, factor_of: Callable[[Tensor], Tensor | float], position: str) -> None:
    factor: Tensor | float = 1.0

    def scaled(x: Tensor) -> Tensor:
        per_channel = factor[..., None, None] if isinstance(factor, Tensor) else factor
        return torch.cat([x[:, :hidden], x[:, hidden:] * per_channel], dim=1)

    def of_block(module, arguments):
        nonlocal factor
        factor = factor_of(arguments[0][:, hidden:])
        return (scaled(arguments[0]), *arguments[1:]) if position == "before-norm" else None

    resnet.register_forward_pre_hook(of_block)
    if position == "after-norm":
        resnet.norm1.register_forward_hook(lambda module, arguments, y: scaled(y))
        resnet.conv_shortcut.register_forward_pre_hook(lambda module, arguments: scaled(arguments[0]))


@each_network
@each_dtype
def test_outputs_and_gradients_of_every_parameter_are_within_budget(name, dtype):
    plain = make_network(name)
    assert_within_budget(patched_copy(plain, skip_scale="none"), plain, make_inputs(plain), dtype)


@pytest.mark.parametrize("name", ["ddpm", "sd15"])
def test_channels_last_is_within_budget_and_stays(name):
    plain = make_network(name).to(memory_format=torch.channels_last)
    patched = patched_copy(plain, skip_scale="cs", kappa=1.0)
    inputs = make_inputs(plain)
    inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
    assert_within_budget(patched, plain, inputs, torch.float32)
    layouts = []
    for block in patched.up_blocks:
        block.register_forward_hook(lambda module, arguments, y: layouts.append(y))
    patched(**inputs)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in layouts)
    assert len(layouts) == 2


@pytest.mark.parametrize("position", SKIP_POSITIONS)
@pytest.mark.parametrize("name", ["ncsnpp", "sd15"])
@each_dtype
def test_constant_scales_are_those_of_hooks(name, position, dtype):
    plain = make_network(name)
    patched = patched_copy(plain, skip_scale="cs", kappa=KAPPA, position=position)
    hooked = scaled_by_hooks(plain, lambda i, skip: KAPPA ** (i - 1), position)
    assert_within_budget(patched, hooked, make_inputs(plain), dtype)


@pytest.mark.parametrize("position", SKIP_POSITIONS)
@pytest.mark.parametrize("skip_scale", ["ls", "ls-separate"])
def test_learned_scales_are_those_of_hooks(skip_scale, position):
    plain = make_network("ddpm")
    patched = patched_copy(plain, skip_scale=skip_scale, position=position)
    plain.skip_gates = copy.deepcopy(patched.skip_gates)
    N = 6

    def hooked(network: Any) -> Any:
        def factor_of(i: int, skip: Tensor) -> Tensor:
            gates = copied.skip_gates
            gate = gates[str(skip.shape[1])] if skip_scale == "ls" else gates[N - i]
            return torch.sigmoid(gate.layer2(torch.relu(gate.layer1(skip.mean(dim=(2, 3))))))

        copied = scaled_by_hooks(network, factor_of, position)
        return copied

    inputs = make_inputs(plain)
    # Not by deepcopy, as the hooks would then still see the gates that they were made with.
    truths = results_of(hooked(plain).double(), inputs, torch.float64)
    found = results_of(patched, inputs, torch.float32)
    assert sorted(found) == sorted(truths)
    for name, truth in truths.items():
        torch.testing.assert_close(found[name].double(), truth, rtol=1e-4, atol=1e-4 * truth.abs().max().item() + 1e-6)


def results_of(network: Any, inputs: dict, dtype: torch.dtype) -> dict[str, Tensor]:
    output = network(**cast(inputs, dtype)).sample
    grads = torch.autograd.grad(output, list(network.parameters()), sent_back(output))
    return {"output": output.detach(), **dict(zip(dict(network.named_parameters()), grads, strict=True))}


def test_autocast_gives_the_dtypes_of_the_plain_network():
    plain = make_network("sd15")
    patched, inputs = patched_copy(plain, skip_scale="none"), make_inputs(plain)
    learned = patched_copy(plain, skip_scale="ls")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [network(**inputs).sample for network in (plain, patched, learned)]
    assert [y.dtype for y in outputs] == [torch.bfloat16] * 3
    truth = plain(**inputs).sample
    errors = [(y - truth).abs().max() for y in outputs[:2]]
    assert errors[1] <= 2 * errors[0]
    outputs[2].float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in learned.parameters())


@pytest.mark.parametrize("skip_scale", ["cs", "ls"])
def test_gradient_checkpointing_changes_no_bit_and_recomputes(skip_scale):
    network = patched_copy(make_network("sd15"), skip_scale=skip_scale, kappa=KAPPA)
    inputs = make_inputs(network)
    expected = results(network, inputs)
    network.enable_gradient_checkpointing()
    calls = []
    network.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    found = results(network, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["sd15", "ddpm"])
def test_freeu_acts_before_the_skip_is_scaled(name):
    plain = make_network(name)
    patched, inputs = patched_copy(plain, skip_scale="none"), make_inputs(plain)
    before = patched(**inputs).sample
    if name == "sd15":
        for network in (plain, patched):
            network.enable_freeu(s1=0.6, s2=0.4, b1=1.3, b2=1.2)
        torch.testing.assert_close(patched(**inputs).sample, plain(**inputs).sample, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(patched(**inputs).sample, before, atol=1e-3)
        patched.disable_freeu()
    else:  # whose attending blocks have no part in it
        for block in (*plain.up_blocks, *patched.up_blocks):
            block.s1, block.s2, block.b1, block.b2 = 0.6, 0.4, 1.3, 1.2
        torch.testing.assert_close(patched(**inputs).sample, plain(**inputs).sample, rtol=1e-4, atol=1e-5)
        for block in patched.up_blocks:
            del block.s1
    assert torch.equal(patched(**inputs).sample, before)


LORA_TARGETS = ["to_q", "conv1", "conv_shortcut"]


def add_lora(network: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    network.add_adapter(peft.LoraConfig(r=2, target_modules=LORA_TARGETS, init_lora_weights=False))


@pytest.mark.parametrize("skip_scale", ["none", "cs"])
@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_adapters_work_and_are_trained(skip_scale, lora_first):
    plain, patched = make_network("sd15"), None
    before = copy.deepcopy(plain)
    add_lora(plain)
    if lora_first:
        patched = patched_copy(plain, skip_scale=skip_scale, kappa=KAPPA)
    else:
        patched = patched_copy(before, skip_scale=skip_scale, kappa=KAPPA)
        add_lora(patched)
    kappa = KAPPA if skip_scale == "cs" else 1.0
    hooked = scaled_by_hooks(plain, lambda i, skip: kappa ** (i - 1), "before-norm")
    inputs = make_inputs(plain)
    truths, found = results(hooked, inputs, torch.float64), results(patched, inputs)
    assert list(found) == list(truths)
    assert sum("lora" in name for name in found) > 20
    for name, truth in truths.items():
        torch.testing.assert_close(found[name].double(), truth, rtol=1e-3, atol=1e-4 * truth.abs().max().item())
    unpatch_diffusers(patched)
    assert torch.equal(patched(**inputs).sample, plain(**inputs).sample)


def test_removing_an_adapter_brings_the_shortcut_back():
    network = patched_copy(make_network("sd15"), skip_scale="cs")
    inputs = make_inputs(network)
    before = network(**inputs).sample
    add_lora(network)
    assert not torch.equal(network(**inputs).sample, before)
    network.unload_lora()
    assert torch.equal(network(**inputs).sample, before)


ONE_LEVEL = {"block_out_channels": (32,), "layers_per_block": 1, "add_attention": False, "norm_num_groups": 8}
ONE_LEVEL_OF_TEXT = {**TEXT, "block_out_channels": (32,), "layers_per_block": 1, "mid_block_type": None}
SMALLEST = {
    "UpBlock2D": (UNet2DModel, {**ONE_LEVEL, "down_block_types": ("DownBlock2D",)}),
    "AttnUpBlock2D": (UNet2DModel, {**ONE_LEVEL, "down_block_types": ("DownBlock2D",)}),
    "SkipUpBlock2D": (UNet2DModel, {**ONE_LEVEL, "down_block_types": ("SkipDownBlock2D",)}),
    "CrossAttnUpBlock2D": (UNet2DConditionModel, {**ONE_LEVEL_OF_TEXT, "down_block_types": ("DownBlock2D",)}),
}


def make_smallest(block: str = "UpBlock2D") -> Any:
    """To compile takes long."""
    kind, config = SMALLEST[block]
    return kind(up_block_types=(block,), **config)


@pytest.mark.parametrize(
    ("block", "skip_scale"),
    [
        ("UpBlock2D", "ls-separate"),
        pytest.param("AttnUpBlock2D", "ls", marks=pytest.mark.exhaustive),
        pytest.param("SkipUpBlock2D", "cs", marks=pytest.mark.exhaustive),
        pytest.param("CrossAttnUpBlock2D", "cs", marks=pytest.mark.slow),
    ],
)
def test_compiles_to_one_graph(block, skip_scale):
    torch.compiler.reset()
    network = patched_copy(make_smallest(block), skip_scale=skip_scale, kappa=KAPPA)
    inputs = make_inputs(network)
    expected = results(network, inputs)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    output = compiled(**inputs).sample
    torch.testing.assert_close(output, expected["output"])
    output.backward(sent_back(output))
    for p_name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, expected[p_name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_network_is_patched_and_compiled_again():
    torch.compiler.reset()
    network = make_smallest()
    inputs = make_inputs(network)
    compiled: Any = torch.compile(network, fullgraph=True, backend="aot_eager")
    plain = compiled(**inputs).sample
    for kappa in (0.5, 0.8):
        patch_diffusers(compiled, skip_scale="cs", kappa=kappa)
        torch.testing.assert_close(compiled(**inputs).sample, network(**inputs).sample)
        assert not torch.allclose(network(**inputs).sample, plain, atol=1e-3)
    unpatch_diffusers(compiled)
    torch.testing.assert_close(compiled(**inputs).sample, plain)


@pytest.mark.slow
def test_inductor_gives_the_same():
    """On one skip: each of a dozen kernels that come of it is compiled by itself."""
    torch.compiler.reset()
    smallest = make_smallest().up_blocks[0]
    smallest.resnets = smallest.resnets[:1]
    block = patched_copy(smallest, skip_scale="ls")
    arguments = torch.randn(2, 32, 8, 8), (torch.randn(2, 32, 8, 8),), torch.randn(2, 128)
    results = []
    for f in (block, torch.compile(block, fullgraph=True)):
        output = f(*arguments)
        results.append([output, *torch.autograd.grad(output, list(block.parameters()), sent_back(output))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_a_copy_has_gates_of_its_own():
    network = patched_copy(make_network(), skip_scale="ls")
    copied, inputs = copy.deepcopy(network), make_inputs(network)
    expected = network(**inputs).sample
    assert torch.equal(copied(**inputs).sample, expected)
    with torch.no_grad():
        for p in copied.skip_gates.parameters():
            p.add_(1.0)
    assert torch.equal(network(**inputs).sample, expected)
    assert not torch.equal(copied(**inputs).sample, expected)


def test_an_average_of_parameters_holds_the_gates():
    network = patched_copy(make_network(), skip_scale="ls")
    average = EMAModel(network.parameters(), decay=0.5)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(0)
    average.copy_to(network.parameters())
    assert all(p.any() for p in network.skip_gates.parameters())


def test_the_gates_are_parameters_that_move_and_learn():
    network = make_network().bfloat16()
    patch_diffusers(network, skip_scale="ls")
    gates = dict(network.skip_gates.named_parameters())
    assert {p.dtype for p in gates.values()} == {torch.bfloat16}
    network.float()
    assert {p.dtype for p in gates.values()} == {torch.float32}
    assert list(network.parameters())[-len(gates) :] == list(gates.values())
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    before, inputs = copy.deepcopy(network.skip_gates), make_inputs(network)
    network(**inputs).sample.square().mean().backward()
    optimizer.step()
    for old, new in zip(before.parameters(), gates.values(), strict=True):
        assert not torch.equal(old, new)


@each_network
def test_a_fixed_policy_changes_neither_parameters_nor_names_nor_classes(name):
    network = make_network(name)
    modules = {name: type(module) for name, module in network.named_modules()}
    before = network.state_dict(keep_vars=True)
    patch_diffusers(network, skip_scale="cs")
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    for name, module in network.named_modules():
        assert isinstance(module, modules[name])
        convolutions = (diffusers_blocks.Conv3x3, diffusers_blocks.SkipConv1x1)
        assert type(module).__name__ == modules[name].__name__ or isinstance(module, convolutions)


def test_a_patched_network_is_saved_and_loaded_as_a_plain_one(tmp_path):
    network = patched_copy(make_network(), skip_scale="cs", kappa=KAPPA)
    inputs = make_inputs(network)
    expected = network(**inputs).sample
    network.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert not any(isinstance(module, tuple(diffusers_blocks.ORIGINALS)) for module in loaded.modules())
    patch_diffusers(loaded, skip_scale="cs", kappa=KAPPA)
    assert torch.equal(loaded(**inputs).sample, expected)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("skip_scale", ["ls", "ls-separate"])
def test_saved_gates_are_put_back(tmp_path, skip_scale, sharded):
    network = patched_copy(make_network(), skip_scale=skip_scale)
    inputs = make_inputs(network)
    expected = network(**inputs).sample
    network.save_pretrained(tmp_path, max_shard_size="500KB" if sharded else "10GB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == sharded
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert not hasattr(loaded, "skip_gates")
    patch_diffusers(loaded, skip_scale=skip_scale, gates_from=tmp_path if sharded else files[0])
    assert torch.equal(loaded(**inputs).sample, expected)
    assert loaded.skip_gates.training == loaded.training


@pytest.mark.parametrize("skip_scale", ["cs", "ls"])
def test_a_patched_network_can_be_pickled(skip_scale):
    network = patched_copy(make_network(), skip_scale=skip_scale)
    file, inputs = io.BytesIO(), make_inputs(network)
    torch.save(network, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(**inputs).sample, network(**inputs).sample)
    assert list(loaded.state_dict()) == list(network.state_dict())


@each_network
def test_unpatching_restores_every_bit_and_class(name):
    network = make_network(name)
    inputs, modules = make_inputs(network), [(name, type(module)) for name, module in network.named_modules()]
    before, attributes = network(**inputs).sample, {name: set(vars(m)) for name, m in network.named_modules()}
    patch_diffusers(network, skip_scale="ls")
    unpatch_diffusers(network)
    assert [(name, type(module)) for name, module in network.named_modules()] == modules
    assert {name: set(vars(m)) for name, m in network.named_modules()} == attributes
    assert torch.equal(network(**inputs).sample, before)
    unpatch_diffusers(network)
    assert torch.equal(network(**inputs).sample, before)


def test_patching_again_changes_the_policy_alone():
    plain = make_network()
    network, inputs = patched_copy(plain, skip_scale="cs", kappa=0.5), make_inputs(plain)
    reports = [patch_diffusers(network, skip_scale="cs", kappa=kappa) for kappa in (0.5, KAPPA)]
    assert reports[0].num_resnets == reports[1].num_resnets > 0
    assert torch.equal(network(**inputs).sample, patched_copy(plain, skip_scale="cs", kappa=KAPPA)(**inputs).sample)
    patch_diffusers(network, skip_scale="ls")
    gates = network.skip_gates
    patch_diffusers(network, skip_scale="ls", position="after-norm")
    assert network.skip_gates is gates
    patch_diffusers(network, skip_scale="ls-separate")
    assert network.skip_gates is not gates
    assert network.up_blocks[0].skips.gates is network.skip_gates
    patch_diffusers(network, skip_scale="none")
    assert list(network.state_dict()) == list(plain.state_dict())


def test_a_network_takes_over_blocks_that_were_patched_alone():
    network = make_network()
    before = list(network.state_dict())
    for block in network.up_blocks:
        patch_diffusers(block, skip_scale="ls-separate")
    report = patch_diffusers(network, skip_scale="cs", kappa=0.5)
    assert [skip.factor for skip in report.skips] == [0.5**k for k in (5, 4, 3, 2, 1, 0)]
    assert list(network.state_dict()) == before


def test_a_policy_of_ones_own():
    network = make_network()
    report = patch_diffusers(network, skip_scale=LearnedScale(reduction=4), kappa=7)
    assert report.policy == LearnedScale(reduction=4)
    assert network.skip_gates["64"].layer1.out_features == 16


@pytest.mark.parametrize(
    "wrap", [nn.ModuleList, lambda blocks: nn.Sequential(*blocks), lambda blocks: nn.ModuleDict({"decoder": blocks[0]})]
)
@pytest.mark.parametrize("skip_scale", ["cs", "ls"])
def test_containers_of_decoder_blocks(wrap, skip_scale):
    blocks = list(make_network().up_blocks)
    container = wrap(blocks)
    length = len(container)
    report = patch_diffusers(container, skip_scale=skip_scale)
    assert len(container) == length
    assert [skip.i for skip in report.skips] == list(range(3 * length, 0, -1))
    assert any("skip_gates" in name for name, _ in container.named_parameters()) == (skip_scale == "ls")
    h, skips = torch.randn(2, 64, 4, 4), tuple(torch.randn(2, C, 4, 4) for C in (32, 64, 64))
    assert blocks[0](h, skips, torch.randn(2, 128)).shape == (2, 64, 8, 8)


def test_a_single_block_counts_its_own_skips():
    block = make_network().up_blocks[1]
    report = patch_diffusers(block, skip_scale="cs", kappa=0.5)
    assert [(skip.hidden_channels, skip.skip_channels) for skip in report.skips] == [(64, 32), (32, 32), (32, 32)]
    assert [skip.factor for skip in report.skips] == [0.25, 0.5, 1.0]


def decoder_block(**more) -> Any:
    block = unet_2d_blocks.UpBlock2D(32, 32, 64, 16, num_layers=2, resnet_groups=8, add_upsample=False)
    block.resnets[1] = ResnetBlock2D(in_channels=96, temb_channels=16, groups=8, **more)
    return block


def assert_the_same_when_patched(block: Any) -> None:
    arguments = torch.randn(2, 32, 8, 8), (torch.randn(2, 32, 8, 8), torch.randn(2, 64, 8, 8)), torch.randn(2, 16)
    expected = block(*arguments)
    patch_diffusers(block, skip_scale="none")
    torch.testing.assert_close(block(*arguments), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {"out_channels": 96},
        {"out_channels": 96, "up": True},
        {"out_channels": 96, "down": True, "kernel": "fir"},
        {"out_channels": 64, "up": True, "kernel": "sde_vp"},
        {"out_channels": 64, "non_linearity": "mish"},
        {"out_channels": 64, "non_linearity": "gelu", "skip_time_act": True},
        {"out_channels": 64, "time_embedding_norm": "scale_shift", "output_scale_factor": 2.0},
        {"out_channels": 64, "conv_2d_out_channels": 32, "conv_shortcut_bias": False},
    ],
    ids=lambda more: "-".join(f"{value}" for value in more.values()),
)
def test_residual_blocks_of_every_kind(more):
    assert_the_same_when_patched(decoder_block(**more))


def test_a_tanh_gelu_and_an_embedding_that_is_absent():
    block = decoder_block(out_channels=64)
    for resnet in block.resnets:
        resnet.nonlinearity, resnet.time_emb_proj = nn.GELU("tanh"), None
    h, skips = torch.randn(2, 32, 8, 8), (torch.randn(2, 32, 8, 8), torch.randn(2, 64, 8, 8))
    expected = block(h, skips)
    patch_diffusers(block, skip_scale="none")
    torch.testing.assert_close(block(h, skips), expected, rtol=1e-4, atol=1e-5)


def test_dropout_draws_the_same_numbers():
    plain = make_network("sd15", dropout=0.5)
    patched, inputs = patched_copy(plain, skip_scale="none"), make_inputs(plain)
    outputs = []
    for network in (plain, patched):
        torch.manual_seed(5)
        outputs.append(network(**inputs).sample)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


class Doubled(nn.Module):
    """Something around a norm or a convolution."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


@pytest.mark.parametrize("position", SKIP_POSITIONS)
@pytest.mark.parametrize("wrapped", ["norm1", "norm2", "conv_shortcut"])
@pytest.mark.parametrize("wrapped_first", [True, False])
def test_wrapped_layers_are_left_to_themselves(wrapped, position, wrapped_first):
    plain = make_network("adm")
    patched = copy.deepcopy(plain)
    if not wrapped_first:
        patch_diffusers(patched, skip_scale="cs", kappa=KAPPA, position=position)
    for network in (plain, patched):
        for block in network.up_blocks:
            for resnet in block.resnets:
                setattr(resnet, wrapped, Doubled(getattr(resnet, wrapped)))
    if wrapped_first:
        patch_diffusers(patched, skip_scale="cs", kappa=KAPPA, position=position)
    hooked = scaled_by_hooks(plain, lambda i, skip: KAPPA ** (i - 1), position)
    inputs = make_inputs(plain)
    torch.testing.assert_close(patched(**inputs).sample, hooked(**inputs).sample, rtol=1e-4, atol=1e-4)


def test_hooks_of_norms_and_shortcuts_run():
    network = patched_copy(make_network(), skip_scale="cs")
    resnet, called = network.up_blocks[0].resnets[0], []
    for name in ("norm1", "norm2", "conv_shortcut"):
        getattr(resnet, name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    network(**make_inputs(network))
    assert called == ["norm1", "norm2", "conv_shortcut"]


def test_hooks_of_accelerate_before_and_after_the_patch():
    hooks = pytest.importorskip("accelerate.hooks")
    plain = make_network()
    inputs = make_inputs(plain)
    expected = plain(**inputs).sample
    first, second = plain.up_blocks[0].resnets[:2]
    layers = ("norm1", "norm2", "conv_shortcut")
    for name in layers:
        hooks.add_hook_to_module(getattr(first, name), hooks.ModelHook())
    report = patch_diffusers(plain, skip_scale="none")
    for name in layers:
        hooks.add_hook_to_module(getattr(second, name), hooks.ModelHook())
    assert report.num_shortcuts == 5
    torch.testing.assert_close(plain(**inputs).sample, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="was given a forward"):
        unpatch_diffusers(plain)
    hooks.remove_hook_from_module(plain, recurse=True)
    unpatch_diffusers(plain)
    assert torch.equal(plain(**inputs).sample, expected)


def published(kind: Any, channels: tuple[int, ...], down: str, up: str, **more) -> nn.Module:
    with torch.device("meta"):
        types = {
            "down_block_types": (down,) * len(channels),
            "up_block_types": (up,) * len(channels),
        }
        return kind(block_out_channels=channels, layers_per_block=2, **types, **more)


@pytest.mark.parametrize(
    ("channels", "straddling", "hidden_and_skip"),
    [
        ((128, 256, 256, 256), [4, 3], [(256, 256)] * 8 + [(256, 128)] * 2 + [(128, 128)] * 2),
        (
            (320, 640, 1280),
            [7, 6, 4, 3],
            [(1280, 1280)] * 2 + [(1280, 640)] * 2 + [(640, 640), (640, 320), (640, 320), (320, 320), (320, 320)],
        ),
    ],
    ids=["ddpm-cifar10", "sdxl"],
)
def test_the_report_of_published_networks(channels, straddling, hidden_and_skip):
    network = published(UNet2DModel, channels, "DownBlock2D", "UpBlock2D")
    report = patch_diffusers(network, skip_scale="cs", kappa=0.5)
    N = len(hidden_and_skip)
    assert [(skip.hidden_channels, skip.skip_channels) for skip in report.skips] == hidden_and_skip
    assert [(skip.i, skip.factor) for skip in report.skips] == [(i, 0.5 ** (i - 1)) for i in range(N, 0, -1)]
    assert [skip.i for skip in report.skips if skip.straddles] == straddling
    assert (report.num_decoder_blocks, report.num_shortcuts, report.num_straddling) == (
        len(channels), N, len(straddling)
    )  # fmt: skip
    norms = sum(isinstance(module, nn.GroupNorm) for module in network.modules())
    resnets = sum(isinstance(module, ResnetBlock2D) for module in network.modules())
    assert (report.num_norms, report.num_resnets) == (norms, resnets)


def test_the_report_reads_well():
    report = patch_diffusers(make_network(), skip_scale="cs", kappa=0.5)
    lines = str(report).splitlines()
    assert lines[0] == "6 skips scaled by ConstantScale(kappa=0.5)"
    assert lines[1] == "replaced: 2 decoder blocks, 12 residual blocks, 31 norms, 6 shortcuts"
    assert lines[3].split() == ["6", "64", "64", "0.0312", "no"]
    assert len(lines) == 3 + 6
    learned = patch_diffusers(make_network(), skip_scale="ls")
    assert "learned" in str(learned)
    assert {skip.factor for skip in learned.skips} == {None}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_scale": "nosuch"}, "unknown skip scale 'nosuch'"),
        ({"kappa": 0.0}, r"kappa must lie in \(0, 1\]"),
        ({"kappa": 1.5}, r"kappa must lie in \(0, 1\]"),
        ({"position": "sideways"}, "position of a skip scale"),
        ({"gates_from": "nowhere"}, "learns no gates"),
        ({"skip_scale": "ls", "gates_from": "nowhere"}, "there is no file nowhere"),
        ({"skip_scale": "ls", "gates_from": "."}, "nothing in . is called skip_gates"),
    ],
)
def test_bad_options_are_refused_and_change_nothing(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = make_network()
    with pytest.raises(ValueError, match=message):
        patch_diffusers(network, **options)
    assert not any(isinstance(module, tuple(diffusers_blocks.ORIGINALS)) for module in network.modules())


def test_gates_of_another_network_are_refused(tmp_path):
    patched_copy(make_network(), skip_scale="ls").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="are not those of LearnedScale"):
        patch_diffusers(make_network("sd15"), skip_scale="ls", gates_from=tmp_path)


def test_a_pipeline_is_refused_with_advice():
    from diffusers import DDPMPipeline, DDPMScheduler

    with pytest.raises(TypeError, match="got a DDPMPipeline; of a pipeline, pass its unet"):
        patch_diffusers(DDPMPipeline(make_network(), DDPMScheduler()))  # type: ignore[arg-type]


def test_a_module_without_skips_is_refused():
    with pytest.raises(ValueError, match="Linear holds no decoder block"):
        patch_diffusers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="UNetMidBlock2D holds no decoder block"):
        patch_diffusers(make_network().mid_block)


def test_decoder_blocks_that_are_not_supported_are_refused_by_name():
    block = unet_2d_blocks.KUpBlock2D(32, 32, 16, 0, num_layers=2, resnet_group_size=8)
    with pytest.raises(ValueError, match=r"unet_2d_blocks\.KUpBlock2D \(diffusers .*\) is not supported"):
        patch_diffusers(nn.ModuleList([*make_network().up_blocks, block]))


def test_other_residual_blocks_in_a_decoder_are_refused_by_name():
    block = decoder_block(out_channels=64)
    block.resnets[1] = unet_2d_blocks.ResnetBlockCondNorm2D(in_channels=96, out_channels=64, groups=8)
    with pytest.raises(ValueError, match=r"UpBlock2D .* with a ResnetBlockCondNorm2D is not supported"):
        patch_diffusers(block)


@pytest.mark.parametrize("kind", [unet_2d_blocks.UpBlock2D, ResnetBlock2D])
def test_a_forward_that_is_not_known_is_refused_by_name(kind, monkeypatch):
    network, known = make_network(), kind.forward

    @functools.wraps(known)
    def forward(self, *args, **kwargs):
        return known(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    message = rf"{kind.__name__} \(diffusers .*\) is not known here; known are the blocks of diffusers 0.33 to 0.42"
    with pytest.raises(ValueError, match=message):
        patch_diffusers(network)
    monkeypatch.undo()
    assert patch_diffusers(network).num_decoder_blocks == 2


class OtherUpBlock2D(unet_2d_blocks.UpBlock2D):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_subclasses_and_forwards_of_instances_are_refused_by_name():
    network = make_network()
    network.up_blocks[1].__class__ = OtherUpBlock2D
    with pytest.raises(ValueError, match=r"OtherUpBlock2D \(diffusers .*\) is not known here"):
        patch_diffusers(network)
    network.up_blocks[1].__class__ = unet_2d_blocks.UpBlock2D
    network.up_blocks[1].forward = lambda h, skips, temb: h
    with pytest.raises(ValueError, match=r"UpBlock2D \(diffusers .*\) was given a forward"):
        patch_diffusers(network)


def test_a_block_that_was_wrapped_since_cannot_be_unpatched():
    network = patched_copy(make_network(), skip_scale="cs")
    block = network.up_blocks[0]
    block.__class__ = type("ShardedBlock", (type(block),), {})
    with pytest.raises(ValueError, match=r"ShardedBlock .* was made of a patched block"):
        unpatch_diffusers(network)


def test_without_diffusers_the_error_says_so(monkeypatch):
    monkeypatch.delattr("scalelong.model.diffusers_blocks")
    for name in [name for name in sys.modules if name.startswith(("diffusers.", "scalelong.model.diffusers_blocks"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"needs diffusers 0.33 to 0.42 \(pip install diffusers\)"):
        patch_diffusers(nn.Linear(2, 2))


def test_diffusers_is_loaded_by_the_call_alone():
    loaded = modules_loaded_by("import scalelong; scalelong.patch_diffusers, scalelong.unpatch_diffusers")
    assert "scalelong.model.diffusers_patch" in loaded
    assert "diffusers" not in loaded


def test_policies_have_equal_reports():
    reports = [patch_diffusers(make_network(), skip_scale=policy) for policy in ("cs", ConstantScale(0.5))]
    assert reports[0] == reports[1]
