"""Whether a call of a layer runs our forward and nothing beside it, so that arguments of our own reach it.

Networks give a fused layer more than PyTorch's own takes (a skip, an activation). Adapters, pruning, hooks, offload and
sharding put something in its place or around it that expects what the plain network gives: that is called as it is.
"""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

# Their hooks bring weights and take them away again, whatever the arguments of the call. DeepSpeed wraps some of them
# for NVTX, which leaves these no other name.
_MOVERS_OF_WEIGHTS = ("deepspeed.runtime.zero.", "deepspeed.utils.nvtx")


def is_called_by_class(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call runs ``kind.forward`` and nothing beside it that looks at what passes.

    Whoever watches a module by hooks, or gave it another forward, is to be called as by the plain network.
    """
    return (
        isinstance(module, kind)
        and has_method_of(module, "forward", kind)
        and not (module._backward_pre_hooks or module._backward_hooks)
        and not (module._forward_pre_hooks and _watch(module._forward_pre_hooks.values()))
        and not (module._forward_hooks and _watch(module._forward_hooks.values()))
        and not _has_any_global_hook()
    )


def _watch(hooks: Iterable[object]) -> bool:
    return any(not (getattr(hook, "__module__", None) or "").startswith(_MOVERS_OF_WEIGHTS) for hook in hooks)


def has_forward_of_class(module: nn.Module) -> bool:
    """Also where it stands in the instance once more, as accelerate's hooks leave it when they go."""
    return has_method_of(module, "forward", type(module))


def has_method_of(module: nn.Module, name: str, kind: type[nn.Module]) -> bool:
    """Whether ``module.name`` is the method of ``kind``, replaced neither in a class between nor in the instance."""
    # Not by getattr on the bound method: torch.compile finds no __func__ there.
    own, method = vars(module).get(name), getattr(kind, name)
    return getattr(type(module), name) is method and (own is None or getattr(own, "__func__", None) is method)
