"""A small UNet on the Triton kernels, run by Triton's interpreter; test_unet_fused.py starts this as a program."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

from dataclasses import replace

import torch
from interpreter_fixtures import faster_interpreter
from test_unet_fused import ADM, assert_parity, make_batch, make_model

from scalelong.bench.published_unet import as_published
from scalelong.kernels.backend import backend_of

torch.set_num_threads(1)
config = replace(ADM, img_size=8, channel_mult=(1, 2), attention_resolutions=(2,))
for channels_last, mode in ((False, ("ls", "before-norm")), (True, ("cs", "after-norm"))):
    torch.manual_seed(0)
    ours, batch = make_model(config, mode, channels_last=channels_last), make_batch(config, 2)
    assert backend_of(batch[0]) == "triton"
    with faster_interpreter():
        assert_parity(ours, as_published(ours, channels_last=channels_last), [batch], torch.float32)
