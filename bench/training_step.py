"""A whole training step, as the benchmarks of the backbones time it: forward, backward, AdamW and EMA."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalelong.bench.compare import DEVICE, ON_GPU
from scalelong.bench.record import Row, environment
from scalelong.bench.timing import Timing
from scalelong.model.architectures import BackboneConfig
from scalelong.model.backbone import Backbone

Network = Callable[..., Tensor]
MAX_SECONDS = 4.0 if ON_GPU else 10.0
# Dense bf16 products per second, by compute capability: the datasheets of A100 and of H100 and H200 (SXM).
PEAK_FLOPS = {(8, 0): 312e12, (9, 0): 989e12}


class Trainer:
    """What all providers train with: the parameters of one model, a batch, a fused AdamW and an EMA.

    Args:
        inputs: what the network is called with, a tensor whose noise it predicts first.
        dtype: fp32, or that of autocast over fp32 parameters.
    """

    def __init__(self, model: nn.Module, inputs: tuple, dtype: torch.dtype):
        self.inputs, self.dtype = inputs, dtype
        self.noise = torch.randn_like(inputs[0])
        self.parameters: list[Tensor] = list(model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)

    def step(self, network: Network) -> None:
        self.find_gradients(network)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1e-4)

    def find_gradients(self, network: Network) -> None:
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(DEVICE.type, self.dtype)
        with autocast:
            loss = F.mse_loss(network(*self.inputs), self.noise)
        loss.backward()


def noisy_batch(config: BackboneConfig, batch: int) -> tuple[Tensor, ...]:
    """Images, times and, for a model with labels, labels."""
    images = torch.randn(batch, config.in_channels, config.img_size, config.img_size, device=DEVICE)
    inputs = (images, torch.rand(batch, device=DEVICE) * 999)
    if config.num_classes:
        inputs += (torch.randint(config.num_classes, (batch,), device=DEVICE),)
    return inputs


def compiled(network: Network) -> Network:
    return torch.compile(network, fullgraph=True, dynamic=False)


def step_rows(op: str, shape: str, dtype: torch.dtype, layout: str, timings: Mapping[str, Timing]) -> list[Row]:
    return [
        Row(
            **environment(DEVICE),
            op=op,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            layout=layout,
            direction="step",
            provider=name,
            ms_median=timing.ms_median,
            ms_p20=timing.ms_p20,
            ms_p80=timing.ms_p80,
            gb_per_s=None,
            percent_of_copy=None,
            peak_mb=timing.peak_mb,
        )
        for name, timing in timings.items()
    ]


def speed(model: Backbone, batch: int, name: str, timing: Timing) -> str:
    images_per_second = 1e3 * batch / timing.ms_median
    flops = 3 * model.flops() * images_per_second
    line = f"{name} {images_per_second:.4g} images/s, {flops / 1e12:.3g} TFLOP/s"
    peak = PEAK_FLOPS.get(torch.cuda.get_device_capability(DEVICE)) if ON_GPU else None
    return line if peak is None else f"{line}, MFU {100 * flops / peak:.3g} %"
