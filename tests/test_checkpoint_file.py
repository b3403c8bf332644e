"""Checkpoints of other projects: whatever is found in a file, the network is read or one error names it."""

import os
import pickle
import random
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_house import FILES
from test_uvit_checkpoint import SIZES, make_inputs, make_state, save_pth, save_safetensors

from scalelong.model.checkpoint_file import read_state_dict, write_tensors
from scalelong.model.uvit_checkpoint import load_uvit_checkpoint


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.bfloat16, torch.float16)], ids=str)
def test_a_checkpoint_of_two_dtypes_becomes_fp32(dtypes):
    """Halved by their products, as many tools halve them, the norms left as they were."""
    state = {name: x.to(dtypes[0] if x.dim() > 1 else dtypes[1]) for name, x in make_state("labels").items()}
    model = load_uvit_checkpoint(state, **SIZES)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(*make_inputs("labels", torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_weights_that_are_no_floats_are_named(dtype):
    state = make_state()
    state["norm.weight"] = state["norm.weight"].to(dtype)
    with pytest.raises(ValueError, match=f"norm.weight is stored in {str(dtype)[6:]}; weights are in"):
        load_uvit_checkpoint(state, **SIZES)


def test_a_tensor_of_other_dimensions_is_named():
    for name in ("pos_embed", "patch_embed.proj.weight", "mid_block.mlp.fc1.weight"):
        with pytest.raises(
            ValueError, match=rf"not a U-ViT checkpoint: {name} has shape \(5,\), expected \d dimensions"
        ):
            load_uvit_checkpoint(make_state() | {name: torch.ones(5)}, **SIZES)


def compiled_blocks(name: str) -> str:
    return re.sub(r"(in_blocks|out_blocks)\.(\d+)\.", r"\1.\2._orig_mod.", name)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"module.module.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        compiled_blocks,
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["bare", "state_dict"])
@pytest.mark.parametrize("save", [None, save_pth])
def test_what_training_puts_around_names_is_taken_off(tmp_path, rename, nested, save):
    state = make_state()
    given: Any = {rename(name): tensor for name, tensor in state.items()}
    given = {"epoch": 7, "state_dict": given, "optimizer": {"state": {}}} if nested else given
    loaded = load_uvit_checkpoint(save(given, tmp_path) if save else given, **SIZES).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: {0: s["norm.weight"], **s}, "found the name 0, which is no text but int"),
        (lambda s: {("a", 1): s["norm.weight"]}, r"found the name \('a', 1\), which is no text but tuple"),
        (lambda s: {"step": 7, **s}, "found 'step' to be a int"),
        (lambda s: {"model": s, "ema": s}, "found 'model' to be a dict: if the weights are in there, pass that part"),
        (lambda s: {"state_dict": {"step": 7}}, "found 'step' to be a int"),
        (lambda s: list(s.values()), "expected a mapping from names to tensors, found a list"),
        (lambda s: s["norm.weight"], "expected a mapping from names to tensors, found a Tensor"),
        (lambda s: {f"module.{k}": v for k, v in s.items()} | s, "holds pos_embed twice, once as pos_embed"),
        (lambda s: {}, "not a U-ViT checkpoint: it has no pos_embed"),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_what_is_found_instead_of_a_state_dict_is_named(tmp_path, spoil, message, as_file):
    given = spoil(make_state())
    if as_file:
        given = save_pth(given, tmp_path)
        message = f"nnet_ema.pth.*{message}" if "U-ViT" not in message else message
    with pytest.raises(ValueError, match=message):
        load_uvit_checkpoint(given, **SIZES)


class ANetwork(torch.nn.Linear):
    pass


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "it is a web page, not a checkpoint"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "it is a web page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n", "it is a pointer of Git LFS"),
        (b'{"error": "Repository not found"}', "it is a text, not a checkpoint, and begins with '{\"error"),
    ],
    ids=["empty", "html", "xml", "lfs", "json"],
)
def test_a_file_of_something_else_is_named(tmp_path, content, message, suffix):
    path = tmp_path / f"nnet{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"cannot read the checkpoint .*nnet{suffix}: {message}") as caught:
        load_uvit_checkpoint(path, **SIZES)
    assert "weights_only" not in str(caught.value)


def test_a_whole_network_in_a_file_is_named(tmp_path):
    torch.save(ANetwork(2, 2), tmp_path / "nnet.pth")
    with pytest.raises(ValueError, match=r"it holds objects of \S*ANetwork, .* save its state_dict\(\)") as caught:
        load_uvit_checkpoint(tmp_path / "nnet.pth", **SIZES)
    assert "weights_only" not in str(caught.value)


def test_a_file_is_read_by_what_it_holds(tmp_path):
    state = make_state()
    for saved, renamed in ((save_pth(state, tmp_path), "a.safetensors"), (save_safetensors(state, tmp_path), "a.pth")):
        path = saved.rename(tmp_path / renamed)
        assert load_uvit_checkpoint(path, **SIZES).state_dict().keys() == state.keys()


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "safetensors"])
def test_damaged_files_are_refused_in_one_error(tmp_path, kind):
    """Cut and overwritten anywhere, a file is read as it was, where the tensors alone were hit, or refused."""
    state = {name: x.float() for name, x in make_state().items()}
    path = tmp_path / "nnet.pth"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({name: x.numpy() for name, x in state.items()}, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole, generator = path.read_bytes(), random.Random(0)
    refusals = []
    for _ in range(150):
        damaged = bytearray(whole)
        start = generator.randrange(min(len(whole), 6000) if generator.random() < 0.8 else len(whole))
        if generator.random() < 0.3:
            del damaged[start:]
        else:
            damaged[start : start + 8] = generator.randbytes(8)
        path.write_bytes(damaged)
        try:
            read_state_dict(path)
        except Exception as error:
            refusals.append(error)
    assert len(refusals) > 50
    assert {type(error) for error in refusals} == {ValueError}
    assert not any("weights_only" in str(error) or "\n" in str(error) for error in refusals)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids=oct)
def test_weights_have_the_permissions_of_any_new_file(tmp_path, umask):
    path = tmp_path / "weights.safetensors"
    before = os.umask(umask)
    try:
        write_tensors({"a": torch.ones(2)}, path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.chmod(0o640)
    write_tensors({"a": torch.zeros(3)}, path)
    assert path.stat().st_mode & 0o777 == 0o640
    assert load_file(path)["a"].shape == (3,)


def test_no_other_file_of_ours_writes_safetensors_by_itself():
    writers = {path.name for path in FILES if "save_file" in path.read_text() and "bench" not in path.parts}
    assert writers == {"checkpoint_file.py"}
