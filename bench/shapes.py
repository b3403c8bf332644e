"""The skip concatenations of public UNets: each resolution block of a decoder normalises cat([h, skip]) in 32 groups.

Derived from the block lists of DDPM (arXiv:2006.11239), ADM (arXiv:2105.05233), Stable Diffusion 1.5 (arXiv:2112.10752)
and SDXL (arXiv:2307.01952). On a GPU the batches are those of training; on a CPU the larger tensors take 8 to 60 MB.
"""

from dataclasses import dataclass

GROUPS = 32
LARGE_BYTES = 8e6  # from here on, memory decides and no longer the cost of a call


@dataclass(frozen=True)
class SkipConcat:
    network: str
    num_hidden: int
    num_skip: int
    size: int  # height and width
    gpu_batch: int
    cpu_batch: int

    @property
    def num_channels(self) -> int:
        return self.num_hidden + self.num_skip

    def num_elements(self, batch: int) -> int:
        return batch * self.num_channels * self.size**2

    def __str__(self) -> str:
        return f"{self.network}-{self.num_hidden}+{self.num_skip}:{self.size}"


# network, batch on a GPU, batch on a CPU: (channels of h, channels of the skip, height and width), innermost first
_NETWORKS: dict[tuple[str, int, int], tuple[tuple[int, int, int], ...]] = {
    ("ddpm-cifar10", 128, 16): (
        (256, 256, 4),
        (256, 256, 8),
        (256, 256, 16),
        (256, 128, 16),
        (256, 128, 32),
        (128, 128, 32),
    ),
    ("adm-imagenet64", 32, 4): (
        (768, 768, 8),
        (768, 576, 8),
        (768, 576, 16),
        (576, 576, 16),
        (576, 384, 16),
        (576, 384, 32),
        (384, 384, 32),
        (384, 192, 32),
        (384, 192, 64),
        (192, 192, 64),
    ),
    ("sd-1.5", 16, 2): (
        (1280, 1280, 8),
        (1280, 1280, 16),
        (1280, 640, 16),
        (1280, 640, 32),
        (640, 640, 32),
        (640, 320, 32),
        (640, 320, 64),
        (320, 320, 64),
    ),
    ("sdxl", 4, 1): (
        (1280, 1280, 32),
        (1280, 640, 32),
        (1280, 640, 64),
        (640, 640, 64),
        (640, 320, 64),
        (640, 320, 128),
        (320, 320, 128),
    ),
}
SKIP_CONCATS = tuple(
    SkipConcat(network, num_hidden, num_skip, size, gpu_batch, cpu_batch)
    for (network, gpu_batch, cpu_batch), shapes in _NETWORKS.items()
    for num_hidden, num_skip, size in shapes
)
