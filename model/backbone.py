"""What the backbones have in common: long skips, hidden features, groups of parameters, and a folder to be saved in."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scalelong.model.architectures import FORMAT, model_to_dict, read_description
from scalelong.model.backbone_config import BackboneConfig, Recompute
from scalelong.model.checkpoint_file import check_keys, read_state_dict, with_one_dtype, write_tensors
from scalelong.model.conditioning import PARAMETERS as OF_CONDITIONS
from scalelong.model.conditioning import make_augment_embed, make_self_condition
from scalelong.model.hidden_matrices import HiddenMatrices
from scalelong.model.linear_wrappers import SigmaLinear
from scalelong.model.magnitude import MPFourier, forced_normalisation, unit_rms
from scalelong.model.mup import mup_kinds
from scalelong.model.parameter_kinds import ParameterKind, kind_of, multiply_outputs
from scalelong.model.recompute import run_block
from scalelong.model.skip_scale import LongSkip, SkipScale, SkipShape, Unscaled
from scalelong.model.skip_tuning import SkipTuning
from scalelong.model.sparse_middle import MASK_TOKEN, SparseMiddle, SparsePass
from scalelong.model.sparse_middle import MP_PARAMETERS as OF_MP_MIDDLE
from scalelong.model.sparse_middle import PARAMETERS as OF_MIDDLE

Hidden = TypeVar("Hidden")


class ParameterGroup(NamedTuple):
    """Parameters that an optimizer updates alike."""

    names: tuple[str, ...]
    """As in ``named_parameters()``."""
    learning_rate_factor: float = 1.0
    """Multiplies the run's learning rate."""
    weight_decay_factor: float = 1.0
    """Multiplies the run's weight decay."""
    epsilon_factor: float = 1.0
    """Multiplies Adam's epsilon."""


class Backbone(nn.Module):
    """A network that predicts the noise in an image, with scaled long skips: ``Model(config, skip_scale=...)``.

    Args:
        config: the network's shape.
        skip_scale: the policy that scales the long skips; unscaled if not given.
        recompute: what the blocks keep for backward: all of it ("none"), their inputs ("blocks"), or where the
            configuration has a ``block_memory`` at most a share in (0, 1); the rest is computed again. May be set on
            the model at any time.

    Raises:
        ValueError: a way of recomputing that the network does not have, or a policy for skips that it does not have.
    """

    config_class: ClassVar[type[BackboneConfig]]
    kinds: Sequence[ParameterKind]
    """The table of parameters; ``parameter_kinds`` may make another of it."""
    matrices: HiddenMatrices | None = None
    """Which weights are hidden matrices, whose steps an optimizer may orthogonalise; None: it does not say."""
    config: Any
    skips: tuple[SkipShape, ...] = ()
    """The long skips, in execution order: the first is i = N, the innermost."""
    skip_tuning: SkipTuning | None = None
    """While it samples: what the skips are multiplied by besides (``skip_tuning.tuned_skips``)."""
    __call__: Callable[..., Any]

    def __init__(self, config: BackboneConfig, *, skip_scale: SkipScale | None = None, recompute: Recompute = "none"):
        super().__init__()
        config.check_recompute(recompute)
        self.config = config
        self.skip_scale = skip_scale if skip_scale is not None else Unscaled()
        config.check_skip_scale(self.skip_scale)
        self.recompute: Recompute = recompute
        self.block_memory = config.block_memory
        self.self_condition: nn.Module | None = None
        self.augment_embed: nn.Module | None = None
        self.sparse_middle: SparseMiddle | None = None

    def named_blocks(self) -> list[tuple[str, nn.Module]]:
        """The blocks by the names of their modules, in execution order."""
        raise NotImplementedError

    def skip_blocks(self) -> list[tuple[int, nn.Module]]:
        """(i, the module that is called with the long skip i), in execution order, i = 1 the outermost."""
        raise NotImplementedError

    def watch_skips(self, watcher: Callable[[LongSkip, Tensor], None]) -> Callable[[], None]:
        """Calls ``watcher(skip, output)`` with each long skip and what the block that takes it in puts out.

        Where blocks are computed again in backward, it is called then too, with the same values.

        Returns:
            What ends it.
        """

        def report(_block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            watcher(next(x for x in inputs if isinstance(x, LongSkip)), output)

        return _until_stopped(block.register_forward_hook(report) for _, block in self.skip_blocks())

    def watch_blocks(self, watcher: Callable[[int, Tensor], None]) -> Callable[[], None]:
        """Calls ``watcher(number, output)`` with what each of ``named_blocks`` puts out, numbered in execution order.

        Where blocks are computed again in backward, it is called then too, with the same values.

        Returns:
            What ends it.
        """

        def report_of(number: int) -> Callable[..., None]:
            return lambda _block, _inputs, output: watcher(number, output)

        blocks = enumerate(block for _, block in self.named_blocks())
        return _until_stopped(block.register_forward_hook(report_of(number)) for number, block in blocks)

    def hidden_states(
        self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor | None = None, augment_BA: Tensor | None = None
    ) -> Iterator[Tensor]:
        """What each block puts out, in execution order, computed when it is asked for. Takes what ``forward`` takes."""
        raise NotImplementedError

    def pooled(self, hidden: Tensor) -> Tensor:
        """The mean of a block's features over their positions in the image: (B, D) of (B, T, D) or (B, C, H, W)."""
        return hidden.mean(dim=1) if hidden.dim() == 3 else hidden.mean(dim=(2, 3))

    def flops(self, batch_size: int = 1) -> int:
        """Floating-point operations of one forward pass, two per multiply-add; a training step costs three times that.

        Matrix products, convolutions and attention are counted; norms, activations and the gates are not.
        """
        raise NotImplementedError

    def training_flops(self, batch_size: int = 1) -> int:
        """Those of a forward pass in training: fewer where the middle is sparse."""
        return self.flops(batch_size)

    def features(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        y_B: Tensor | None = None,
        augment_BA: Tensor | None = None,
        *,
        blocks: Iterable[str | int],
    ) -> dict[str | int, Tensor]:
        """The hidden features that blocks put out, as ``forward`` computes them; differentiable.

        What comes after the last of these blocks is not computed.

        Args:
            x_BCHW, t_B, y_B, augment_BA: as ``forward`` takes them.
            blocks: names of blocks (``named_blocks``), or their numbers in execution order, negative from the last.

        Returns:
            The features by what was asked for, in that order: (B, T, D) of tokens, (B, C, H, W) of channels.

        Raises:
            ValueError: a block that the network does not have, or what ``forward`` raises.
        """
        numbers = {block: self.number_of_block(block) for block in blocks}
        found: dict[int, Tensor] = {}
        if numbers:
            inputs: Any = (x_BCHW, t_B, y_B) if augment_BA is None else (x_BCHW, t_B, y_B, augment_BA)
            for number, hidden in enumerate(self.hidden_states(*inputs)):
                if number in numbers.values():
                    found[number] = hidden
                if number == max(numbers.values()):
                    break
        return {block: found[number] for block, number in numbers.items()}

    def number_of_block(self, block: str | int) -> int:
        """The number of a block, 0 the first that runs, from its name, or its number from either end.

        Raises:
            ValueError: a block that the network does not have.
        """
        names = [name for name, _ in self.named_blocks()]
        if isinstance(block, str):
            if block not in names:
                raise ValueError(f"{type(self).__name__} has no block {block!r}; there are {', '.join(names)}")
            return names.index(block)
        number = index(block)
        if not -len(names) <= number < len(names):
            raise ValueError(f"{type(self).__name__} has {len(names)} blocks, 0 to {len(names) - 1}, no block {number}")
        return number % len(names)

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        """``block(*arguments)``, keeping for backward what ``recompute`` allows."""
        return run_block(block, *arguments, recompute=self.recompute, memory=self.block_memory)

    def _long_skip(
        self, executed: int, features: Tensor, gates: nn.Module | None, sparse: SparsePass | None = None
    ) -> LongSkip:
        """The long skip that the decoder's block number ``executed`` takes in."""
        i = len(self.skips) - executed
        if sparse is None:
            skip = self.skip_scale.long_skip(i, self.skips, features, gates)
        else:
            skip = sparse.long_skip(i, self.skip_scale, self.skips, features, gates)
        return skip if self.skip_tuning is None else self.skip_tuning.tune(skip, len(self.skips))

    def _add_conditions(self, width: int) -> None:
        """Makes what the configuration asks for beside time and label, of ``width`` features.

        Behind all of the published network, so that whatever else there is begins as without.
        """
        config = self.config
        how = {"preserves_magnitude": config.preserves_magnitude}
        if config.self_condition_block is not None:
            self.self_condition = make_self_condition(config.block_widths[config.self_condition_block], width, **how)
        if config.augment_dim:
            self.augment_embed = make_augment_embed(config.augment_dim, width, **how)
        if self.self_condition is None and self.augment_embed is None:
            return
        of_conditions = () if config.preserves_magnitude else OF_CONDITIONS
        self._begin(of_conditions, "self_condition.", "augment_embed.")

    def _add_sparse_middle(self, width: int, num_extras: int) -> None:
        """Makes what stands for tokens that a sparse middle has not seen, if the network has one. Last of all.

        Args:
            num_extras: tokens before the patches.
        """
        config = self.config
        if config.sparse_ratio is None:
            return
        blocks, preserves = config.middle_blocks, config.preserves_magnitude
        self.sparse_middle = SparseMiddle(width, num_extras=num_extras, blocks=blocks, preserves_magnitude=preserves)
        self._begin(OF_MP_MIDDLE if preserves else OF_MIDDLE, MASK_TOKEN)

    def _begin(self, kinds: Sequence[ParameterKind], *prefixes: str) -> None:
        """Gives parameters of these names their first values, by kinds that stand before those of the network."""
        self.kinds = (*kinds, *self.kinds)
        all_kinds = self.parameter_kinds()
        for name, parameter in self.named_parameters():
            if name.startswith(prefixes):
                kind_of(name, all_kinds).start(parameter)
        multiply_outputs(self, all_kinds)

    def _tokens_of_blocks(self, num_dropped: int) -> list[int]:
        """How many tokens each block sees, where those of the middle do not see so many."""
        c = self.config
        return [c.num_tokens - num_dropped * (n in c.middle_blocks) for n in range(len(c.block_widths))]

    def _with_augmentation(self, time_BD: Tensor, augment_BA: Tensor | None) -> Tensor:
        """The embedding of time, with that of how the images were augmented.

        Raises:
            ValueError: labels of another shape, or of a network that takes none.
        """
        if augment_BA is None:
            return time_BD
        expected, name = (len(time_BD), self.config.augment_dim), type(self).__name__
        if self.augment_embed is None:
            raise ValueError(f"{name}: this model takes no augmentation labels (augment_dim)")
        if augment_BA.shape != expected:
            raise ValueError(f"{name}: expected augmentation labels {expected}, got {tuple(augment_BA.shape)}")
        return time_BD + self.augment_embed(augment_BA.to(time_BD.dtype)).to(time_BD.dtype)

    def _condition_macs(self) -> int:
        """Multiply-adds of ``self_condition`` for one image."""
        parts = [] if self.self_condition is None else self.self_condition.parameters()
        return sum(p.numel() for p in parts if p.dim() > 1)

    def parameter_kinds(self) -> Sequence[ParameterKind]:
        """The table that ``init_weights`` and ``parameter_groups`` read. A parametrisation overrides it."""
        # This file, seen from there, has another name than through the package.
        return mup_kinds(self) if self.config.parametrization == "mup" else self.kinds  # pyright: ignore[reportArgumentType]

    def init_weights(self) -> None:
        """Gives every parameter the values that its kind begins with, and every layer its multiplier."""
        kinds = self.parameter_kinds()
        for name, parameter in self.named_parameters():
            kind_of(name, kinds).start(parameter)
        multiply_outputs(self, kinds)
        for module in self.modules():
            if isinstance(module, MPFourier):
                module.reset_buffers()
            elif isinstance(module, SigmaLinear):
                module.begin()

    def num_params(self) -> int:
        """How many numbers the parameters hold, gates included."""
        return sum(p.numel() for p in self.parameters())

    def parameter_groups(self) -> list[ParameterGroup]:
        """Every parameter in one group each, under its first name in ``named_parameters()`` and in their order.

        One group, in the order of ``parameters()``, where all are updated alike.
        """
        kinds = self.parameter_kinds()
        groups: dict[tuple[float, float, float], list[str]] = {}
        for name, _ in self.named_parameters():
            kind = kind_of(name, kinds)
            groups.setdefault((kind.learning_rate, kind.weight_decay, kind.epsilon), []).append(name)
        return [ParameterGroup(tuple(names), *factors) for factors, names in groups.items()]

    def after_step(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """What is put in the place of parameters after each step of an optimizer, by their names.

        Nothing, but for the weights of magnitude-preserving layers, whose rows it normalises. Each function is given a
        whole parameter (rows, ...), and may let a row depend on that row alone.
        """
        mask = {MASK_TOKEN: unit_rms} if self.sparse_middle is not None and self.config.preserves_magnitude else {}
        return {**forced_normalisation(self), **mask}

    def save_pretrained(self, folder: str | Path, *, pipeline: Mapping[str, Any] | None = None) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``, made if need be.

        Args:
            pipeline: what ``scalelong.Pipeline`` needs to know to draw images (train/sampling/pipeline_config.py).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {"format": FORMAT, **model_to_dict(self.config, self.skip_scale)}
        if pipeline is not None:
            description["pipeline"] = dict(pipeline)
        (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
        write_tensors({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what ``save_pretrained`` or ``scalelong export`` wrote; ``load_backbone`` takes any architecture.

        Raises:
            FileNotFoundError: the folder lacks one of the two files.
            ValueError: the description is of another architecture, or one of the files is damaged; says what it found.
        """
        folder = Path(folder)
        config, skip_scale = read_description(folder / "config.json", architecture=cls.config_class.architecture)
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"{folder} has no model.safetensors: not an exported model")
        model: Any = cls(config, skip_scale=skip_scale)
        state = with_one_dtype(read_state_dict(folder / "model.safetensors"))
        check_keys(state, model.state_dict(), cls.__name__)
        model.to(next(iter(state.values())).dtype).load_state_dict(state)
        return model.eval()


def _until_stopped(handles: Iterable[RemovableHandle]) -> Callable[[], None]:
    """What removes these hooks."""
    kept = list(handles)

    def stop() -> None:
        for handle in kept:
            handle.remove()

    return stop


def last_of(hidden_states: Iterator[Hidden]) -> Hidden:
    """Runs all blocks; what the last one puts out."""
    return last_and_kept(hidden_states, None)[0]


def last_and_kept(hidden_states: Iterator[Hidden], keeps: int | None) -> tuple[Hidden, Hidden | None]:
    """Runs all blocks; what the last one puts out, and what the block numbered ``keeps`` does, unless that is None."""
    kept = None
    for number, hidden in enumerate(hidden_states):
        if number == keeps:
            kept = hidden
    return hidden, kept  # pyright: ignore[reportPossiblyUnboundVariable, reportReturnType]
