"""What PyTorch runs inside a block."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CASTS = ("_to_copy", "copy_")


class OperatorsSeen(TorchDispatchMode):
    """``all``: the name of each operator, and the tensors that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.all.append((func.overloadpacket.__name__, tensors))
        return func(*args, **(kwargs or {}))

    def casts(self, numel: int) -> list[str]:
        """Those from one dtype to another that read at least so many elements."""
        return [
            name
            for name, tensors in self.all
            if name in CASTS and tensors[-1].numel() >= numel and (name == "_to_copy" or _differ(tensors))
        ]


def _differ(tensors: list[Tensor]) -> bool:
    return len({x.dtype for x in tensors}) > 1
