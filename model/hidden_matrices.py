"""Hidden matrices: weights that map one hidden stream to another, by whose singular values Muon steps.

A weight may hold several maps: queries, keys and values are three, and what reads a long skip beside the stream has one
for each. Their gradients differ in size; orthogonalised as one, the largest would rule. The kernel of a convolution is
a matrix over all that a position of the output sees.

Shapes: O outputs, I inputs, * the sides of a kernel.
"""

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from scalelong.model.linear_layers import queries_first

if TYPE_CHECKING:
    from scalelong.model.backbone import Backbone


class HiddenMatrices(NamedTuple):
    """The hidden matrices of a network: patterns of names, as a shell's, separated by blanks."""

    names: str
    """All of them. Embeddings, in- and output layers, and what makes gains and shifts of time and class, are none."""
    queries_keys_values: str = "*.qkv.weight"
    """Of these, those whose outputs are queries, keys and values."""
    takes_skip: str = "*.skip_linear.weight"
    """Of these, those whose inputs are the stream and a long skip, where they stand in a block that takes one."""


class HiddenMatrix(NamedTuple):
    """A weight (O, I, *), and how it divides into maps."""

    skip_width: int = 0
    """How many of the inputs, the last ones, are a long skip's; 0: none."""
    num_maps: int = 1
    """Into how many equal parts the outputs are divided."""
    num_heads: int = 0
    """How many heads, where outputs are split into heads first and these into the parts; 0: the parts come first."""

    def apply(self, weight: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of each map as a matrix (outputs, inputs * kernel), in its place in (O, I, *)."""
        if self.num_heads:
            maps = HiddenMatrix(self.skip_width, self.num_maps).apply(queries_first(weight, self.num_heads), function)
            return heads_first(maps, self.num_heads, self.num_maps)
        widths = [weight.shape[1] - self.skip_width, self.skip_width] if self.skip_width else weight.shape[1]
        return torch.cat(
            [
                torch.cat([function(part.flatten(1)).view_as(part) for part in rows.split(widths, dim=1)], dim=1)
                for rows in weight.chunk(self.num_maps)
            ]
        )


def heads_first(rows: Tensor, num_heads: int, num_maps: int) -> Tensor:
    """The inverse of ``queries_first`` of rows."""
    return rows.unflatten(0, (num_maps, num_heads, -1)).transpose(0, 1).flatten(0, 2)


def hidden_matrices(network: "Backbone") -> Mapping[str, HiddenMatrix]:
    """The hidden matrices of a network by their names, in the order of its parameters.

    Raises:
        ValueError: its architecture does not say which they are.
    """
    table = network.matrices
    if table is None:
        raise ValueError(
            f"a {type(network).__name__} does not say which weights are hidden matrices (Backbone.matrices)"
        )
    # This file, seen from the network's, has another name than through the package.
    return dict(_find(network, table))  # pyright: ignore[reportArgumentType]


def hidden_layers(network: "Backbone") -> list[nn.Module]:
    """The layers that have the hidden matrices, in the order of their parameters; none where it does not say."""
    patterns = "" if network.matrices is None else network.matrices.names
    names = [name for name, _ in network.named_parameters() if _fits(name, patterns)]
    return [network.get_submodule(name.rpartition(".")[0]) for name in names]


def _find(network: "Backbone", table: HiddenMatrices) -> Iterator[tuple[str, HiddenMatrix]]:
    blocks = zip(network.skip_blocks(), network.skips, strict=True)
    skip_widths = {parameter: skip.width for (_, block), skip in blocks for parameter in block.parameters()}
    for name, parameter in network.named_parameters():
        if not _fits(name, table.names):
            continue
        skip_width = skip_widths.get(parameter, 0) if _fits(name, table.takes_skip) else 0
        if skip_width >= parameter.shape[1]:  # it is added to the stream
            skip_width = 0
        if _fits(name, table.queries_keys_values):
            yield name, HiddenMatrix(skip_width, 3, _heads(network.get_submodule(name.rsplit(".", 2)[0])))
        else:
            yield name, HiddenMatrix(skip_width)


def _heads(attention: nn.Module) -> int:
    """Of a layer whose projection is split into heads first: how many; else 0."""
    return int(attention.num_heads) if getattr(attention, "is_split_by_heads_first", False) else 0  # type: ignore[arg-type]


def _fits(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())
