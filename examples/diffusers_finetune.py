"""Training a UNet of Hugging Face diffusers without labels, on 8x8 digits: the usual loop, and one line for ScaleLong.

    python examples/diffusers_finetune.py --skip-scale ls --steps 500 --output runs/digits

It prints the loss, draws a grid of samples and saves the averaged network, which ``scalelong.PatchedUNet`` loads as it
is and ``UNet2DModel.from_pretrained`` without its scaled skips. With ``--model`` it starts from a network saved so, and
with ``--gates-from`` from its learned gates too. ``--resume FOLDER`` goes on where a run that wrote to FOLDER ended,
with its averages and its optimizer.
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
    resume: Path | None = None
    """The output folder of an earlier run, to go on from its end."""
    skip_scale: str = "cs"
    """none, inv-sqrt2, cs, geometric, ls or ls-separate."""
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


def train(unet: UNet2DModel, ema: EMAModel, optimizer: Any, schedule: Any, arguments: Arguments) -> None:
    images = digits()
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


def save(unet: UNet2DModel, ema: EMAModel, optimizer: Any, folder: Path) -> None:
    """What a run needs to go on."""
    unet.save_pretrained(folder / "unet")
    ema.save_pretrained(folder / "unet_ema")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def resume(unet: UNet2DModel, ema: EMAModel, optimizer: Any, folder: Path) -> None:
    """Of a class of diffusers, EMAModel.from_pretrained would give averages without the gates, and no error."""
    unet.load_state_dict(scalelong.PatchedUNet.from_pretrained(folder / "unet").state_dict())
    ema.load_state_dict(EMAModel.from_pretrained(folder / "unet_ema", scalelong.PatchedUNet).state_dict())
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


def main(arguments: Arguments) -> None:
    torch.manual_seed(arguments.seed)
    unet = make_unet(arguments)
    policy = {"skip_scale": arguments.skip_scale, "kappa": arguments.kappa, "gates_from": arguments.gates_from}
    print(scalelong.patch_diffusers(unet, **policy))  # the one line
    # After the patch: so the averages hold the gates, and the configuration says how the skips are scaled.
    ema = EMAModel(unet.parameters(), decay=0.99, model_cls=scalelong.PatchedUNet, model_config=unet.config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=arguments.learning_rate)
    if arguments.resume is not None:
        resume(unet, ema, optimizer, arguments.resume / "state")
    print(f"{len(ema.shadow_params)} averages of {len(list(unet.parameters()))} parameters")
    schedule = DDPMScheduler(num_train_timesteps=1000)
    train(unet, ema, optimizer, schedule, arguments)

    save(unet, ema, optimizer, arguments.output / "state")
    ema.copy_to(unet.parameters())
    unet.save_pretrained(arguments.output)
    pipeline: Any = DDIMPipeline(unet.eval(), DDIMScheduler(num_train_timesteps=1000))
    images = pipeline(batch_size=16, num_inference_steps=20).images
    make_image_grid(images, rows=4, cols=4, resize=32).save(arguments.output / "samples.png")
    print(f"saved {arguments.output}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
