"""Training a UNet of Hugging Face diffusers without labels, on 8x8 digits: the usual loop, and one line for ScaleLong.

    python examples/diffusers_finetune.py --skip-scale ls --steps 500 --output runs/digits

It prints the loss, draws a grid of samples and saves the network as ``UNet2DModel.from_pretrained`` reads it. With
``--model`` it starts from a network that was saved that way, and with ``--gates-from`` from its learned gates too.
It needs diffusers, scikit-learn, pillow and tyro, and downloads nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from sklearn.datasets import load_digits
from torch import Tensor

import scalelong


@dataclass
class Arguments:
    output: Path
    """Folder for the network and the samples."""
    model: Path | None = None
    """A saved UNet2DModel to start from; without, a new one."""
    gates_from: Path | None = None
    """The folder of a network that was saved with learned gates, to start from them."""
    skip_scale: str = "cs"
    """none, inv-sqrt2, cs, ls or ls-separate."""
    kappa: float = 0.7
    """Of cs."""
    steps: int = 500
    batch_size: int = 64
    learning_rate: float = 1e-3
    channels: int = 32
    """Of the first level of a new network."""
    seed: int = 0


def make_unet(arguments: Arguments) -> UNet2DModel:
    if arguments.model is not None:
        return UNet2DModel.from_pretrained(arguments.model)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(arguments.channels, 2 * arguments.channels),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def digits() -> Tensor:
    """(1797, 1, 8, 8) in [-1, 1]."""
    pixels, _ = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1


def train(unet: UNet2DModel, ema: EMAModel, schedule: Any, arguments: Arguments) -> None:
    images = digits()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=arguments.learning_rate)
    learning_rate = get_cosine_schedule_with_warmup(optimizer, arguments.steps // 10, arguments.steps)
    total = 0.0
    every = max(1, arguments.steps // 10)
    for step in range(1, arguments.steps + 1):
        clean = images[torch.randint(len(images), (arguments.batch_size,))]
        noise = torch.randn_like(clean)
        t = torch.randint(schedule.config.num_train_timesteps, (arguments.batch_size,))
        loss = F.mse_loss(unet(schedule.add_noise(clean, noise, t), t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        learning_rate.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        total += loss.item()
        if step % every == 0:
            print(f"step {step}: loss {total / every:.4f}", flush=True)
            total = 0.0


def main(arguments: Arguments) -> None:
    torch.manual_seed(arguments.seed)
    unet = make_unet(arguments)
    policy = {"skip_scale": arguments.skip_scale, "kappa": arguments.kappa, "gates_from": arguments.gates_from}
    print(scalelong.patch_diffusers(unet, **policy))  # the one line
    ema = EMAModel(unet.parameters(), decay=0.99)
    schedule = DDPMScheduler(num_train_timesteps=1000)
    train(unet, ema, schedule, arguments)

    ema.copy_to(unet.parameters())
    unet.save_pretrained(arguments.output)
    pipeline: Any = DDIMPipeline(unet.eval(), DDIMScheduler(num_train_timesteps=1000))
    images = pipeline(batch_size=16, num_inference_steps=20).images
    make_image_grid(images, rows=4, cols=4, resize=32).save(arguments.output / "samples.png")
    print(f"saved {arguments.output}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
