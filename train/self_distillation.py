"""Contrastive self-distillation: the features of the network that is trained against those of its own average.

After DDAE++ (arXiv:2505.10999), whose body could not be read. The student is shown the first view of each image at its
training time, which costs no pass of its own, the averaged network the second view at a small fixed noise level; the
features of one block are pooled, projected and compared (diffusion/contrast.py). Inferred are the block, the teacher's
noise level, the heads, one direction (the other would take a second pass with gradients), and that a teacher with a
null label is told that one. Keys of all processes count as negatives for each query.

Shapes: B images of this process, F features of a block, N keys of all processes, O outputs of the heads.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scalelong.model.architectures import make_backbone
from scalelong.train.config import TrainConfig
from scalelong.train.data.batches import Batch
from scalelong.train.diffusion.contrast import ContrastHeads, alignment, contrast_loss, uniformity
from scalelong.train.hosts.processes import Processes
from scalelong.train.objective import make_objective
from scalelong.train.zero.averages import Ema, Teacher
from scalelong.train.zero.engine_config import AUTOCAST
from scalelong.train.zero.learned_loss import CONTRAST_HEADS


def make_contrast_heads(config: TrainConfig) -> ContrastHeads | None:
    """What the contrast learns beside the network; None without one."""
    o = config.objective
    if not o.contrast:
        return None
    return ContrastHeads(config.model.block_widths[config.contrast_block], o.contrast_hidden, o.contrast_outputs)


class SelfDistillation:
    """The teacher of a run, and the loss that it adds.

    Args:
        engine: of DeepSpeed, whose module carries the heads.
        ema: the averages of its weights.
    """

    def __init__(self, config: TrainConfig, engine: Any, ema: Ema, processes: Processes):
        self.config, self.engine, self.processes = config, engine, processes
        self.teacher = Teacher(ema, lambda: make_backbone(config.model, skip_scale=config.skip_scale))
        self.heads: ContrastHeads = getattr(engine.module, CONTRAST_HEADS)
        self.block = config.contrast_block
        self._pooled_BF: Tensor | None = None
        self._measured: list[Tensor] = []

    def begin_step(self) -> None:
        """Brings the teacher to where the averages are. Every rank must call it."""
        self.teacher.follow()

    def student(self, batch: Batch) -> Callable[..., Tensor]:
        """The network as an objective calls it, which is told how the batch was augmented."""
        assert batch.views is not None
        labels_BA = batch.views.labels_BA

        def network(x_BCHW: Tensor, t_B: Tensor, condition: Tensor | None, **more: Any) -> Tensor:
            output_BCHW, hidden = self.engine(x_BCHW, t_B, condition, labels_BA, keeps=self.block, **more)
            self._pooled_BF = self.engine.module.pooled(hidden)
            return output_BCHW

        return network

    def loss(self, batch: Batch) -> Tensor:
        """What the contrast adds to the loss of a batch that ``student`` has seen, a scalar in fp32."""
        assert self._pooled_BF is not None
        o = self.config.objective
        queries_BO = self.heads.queries(self._pooled_BF)
        own_BO = self.heads.keys(self._taught(batch))
        keys_NO = self._of_all(own_BO)
        loss = contrast_loss(queries_BO, keys_NO, self.processes.rank * len(own_BO), o.contrast_temperature)
        with torch.no_grad():
            self._measured.append(torch.stack([loss, alignment(queries_BO, own_BO), uniformity(keys_NO)]))
        self._pooled_BF = None
        return o.contrast * loss

    def take(self, *, measures: bool) -> dict[str, float]:
        """Figures of a step for the log, of this rank's queries, if asked for; they begin anew."""
        measured, self._measured = self._measured, []
        if not measures:
            return {}
        names = ("contrast_loss", "alignment", "uniformity")
        return dict(zip(names, torch.stack(measured).mean(dim=0).tolist(), strict=True))

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Tensor:
        """(B, F): what the teacher finds in the second views."""
        assert batch.views is not None
        config, (_, images_BCHW, labels_BA, noise_BCHW) = self.config, batch.views
        objective, condition, dtype = make_objective(config.objective), batch.condition, AUTOCAST.get(config.precision)
        x_BCHW, t_B = objective.shown_at(images_BCHW, noise_BCHW, config.objective.contrast_sigma)
        if condition is not None and config.null_label is not None:
            condition = torch.full_like(condition, config.null_label)
        network = self.teacher.network
        with torch.autocast(images_BCHW.device.type, dtype, enabled=dtype is not None):
            hidden = network.features(x_BCHW, t_B, condition, labels_BA, blocks=[self.block])[self.block]  # type: ignore[operator]
            return network.pooled(hidden)  # type: ignore[operator]

    def _of_all(self, keys_BO: Tensor) -> Tensor:
        """(N, O): the keys of all processes, by rank."""
        if self.processes.world_size == 1:
            return keys_BO
        parts = [torch.empty_like(keys_BO) for _ in range(self.processes.world_size)]
        dist.all_gather(parts, keys_BO.contiguous())
        return torch.cat(parts)
