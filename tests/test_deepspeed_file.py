"""A user's own DeepSpeed JSON: what is merged, what is refused, and offloading by flag or file."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from running import SMALL, losses, run_command, small_config

from scalelong.train.errors import UserError
from scalelong.train.loop import train
from scalelong.train.zero.engine_config import deepspeed_config

STEP = 32


def merged(folder: Path, values: object, **changes) -> dict:
    file = folder / "ds.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values))
    return deepspeed_config(small_config(folder / "run", deepspeed_config=file, **changes), 32, 1000)


def test_a_file_adds_to_what_the_flags_give(tmp_path):
    values = {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "round_robin_gradients": True},
        "communication_data_type": "fp32",
        "bf16": {"enabled": False},
        "train_batch_size": 32,
        "gradient_clipping": "auto",
    }
    plain = deepspeed_config(small_config(tmp_path / "run", zero_stage=2), 32, 1000)
    expected = {**plain, "communication_data_type": "fp32", "train_batch_size": 32}
    expected["zero_optimization"] = {**plain["zero_optimization"], "overlap_comm": True, "round_robin_gradients": True}
    assert merged(tmp_path, values, zero_stage=2) == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization.stage is 3, but --zero-stage gives 1; change"),
        ({"train_batch_size": 64}, r"train_batch_size is 64, but --images-per-step gives 32"),
        ({"train_micro_batch_size_per_gpu": 4}, r"is 4, but --images-per-step and --accumulation-steps gives 32"),
        ({"gradient_accumulation_steps": 2}, r"is 2, but --accumulation-steps gives 1"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping is 1.0, but --optimizer.clip-grad-norm gives 0.0"),
        ({"torch_autocast": {"enabled": True}}, r"torch_autocast.enabled is true, but --precision gives nothing"),
        ({"optimizer": {"type": "Adam"}}, r"optimizer is not DeepSpeed's here: see --optimizer"),
        ({"bf16": {"enabled": True}}, r"bf16 is not DeepSpeed's here: see --precision"),
        ({"gradient_clippin": 1.0}, r"unknown key gradient_clippin; perhaps you meant gradient_clipping"),
        ({"zero_optimization": {"overlap_com": True}}, r"unknown key zero_optimization.overlap_com"),
        ({"zero_optimization": {"offload_optimizer": {"dev": 1}}}, r"unknown key .*offload_optimizer.dev"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, r"unknown key data_types.*meant grad_accum_dtype"),
        ({"zero_optimization": {"overlap_comm": "maybe"}}, r"zero_optimization.overlap_comm: .*boolean"),
        ({"elasticity": {"enabled": True}}, r"Elastic training has been removed"),
        ({"sparse_attention": {}}, r"Sparse Attention has been removed"),
        ({"zero_optimization": {"mics_shard_size": 8}}, r"MiCS .* has been removed"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, r"zero_quantized_weights is not supported"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, r"device nvme is not supported"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            r"parameters can be offloaded with --zero-stage 3",
        ),
        ("{", r"is no JSON"),
        ([], r"must hold a JSON object"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(tmp_path, values, words):
    with pytest.raises(UserError, match=words) as caught:
        merged(tmp_path, values, zero_stage=1)
    assert "\n" not in str(caught.value)


def test_a_flag_and_the_file_may_not_disagree_on_offloading(tmp_path):
    nowhere = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    with pytest.raises(UserError, match=r"device is \"none\", but --offload gives \"cpu\""):
        merged(tmp_path, nowhere, zero_stage=2, offload="optimizer")
    with pytest.raises(UserError, match="can be offloaded with --zero-stage 1, 2 or 3"):
        deepspeed_config(small_config(tmp_path / "run", offload="optimizer"), 32, 1000)


@pytest.mark.slow
def test_a_file_that_does_not_fit_stops_the_command_before_anything_is_written(tmp_path):
    (tmp_path / "ds.json").write_text('{"nebula": {"enabled": true}}')
    done = run_command("digits-uvit", *SMALL, "--run", tmp_path / "run", "--deepspeed-config", tmp_path / "ds.json")
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {tmp_path}/ds.json: Nebula checkpointing has been removed"
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """Six steps with nothing offloaded."""
    config = small_config(tmp_path_factory.mktemp("plain") / "run", total_images=6 * STEP)
    assert train(config) == 0
    return config.run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "offload"),
    [
        (1, "optimizer"),
        (2, "optimizer"),
        pytest.param(3, "optimizer", marks=pytest.mark.exhaustive),
        (3, "parameters"),
        (3, "by file"),
    ],
)
def test_offloading_trains_saves_and_resumes_as_without(plain, tmp_path, stage, offload):
    config = small_config(tmp_path / "run", zero_stage=stage)
    if offload == "by file":
        section = {"device": "cpu", "pin_memory": False}
        values = {"zero_optimization": {"offload_optimizer": section, "offload_param": section}}
        (tmp_path / "ds.json").write_text(json.dumps(values))
        offloaded = replace(config, deepspeed_config=tmp_path / "ds.json")
    else:
        offloaded = replace(config, offload=offload)
    # The last two steps without offloading: its checkpoint is as any other.
    for steps, part in ((2, offloaded), (4, offloaded), (6, config)):
        train(replace(part, total_images=steps * STEP))
    np.testing.assert_allclose(losses(config.run), losses(plain), rtol=1e-5)
    for name in ("model", "ema", "optimizer"):
        reached, expected = (load_file(r / "checkpoints/192" / f"{name}.safetensors") for r in (config.run, plain))
        for key, value in expected.items():
            np.testing.assert_allclose(reached[key], value, rtol=1e-3, atol=1e-5, err_msg=f"{name} {key}")
