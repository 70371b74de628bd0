"""Tensors that may be cut over the ranks: the parameters of FSDP and what belongs to them.

Under DDP every function here gives the tensor itself. Under FSDP a parameter, its gradient, its
optimizer state and its average are DTensors: each rank holds its part, and the full value is there
only where it is asked for. Checkpoints hold full values, so they know nothing of all this.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

SHOWN = 8  # tensors that do not fit, in a message


def shard(model: nn.Module) -> None:
    """Cut the parameters of a model over all ranks, in place: by child of its towers, then whole.

    Parameters that are used together are gathered together, and let go after their use.
    """
    from torch.distributed.fsdp import fully_shard  # half a second that only FSDP needs

    towers = [tower for tower in model.children() if any(tower.children())]
    for tower in towers:
        for part in tower.children():
            # a list has no forward whose start could gather its parameters: its items have
            modules = part.children() if isinstance(part, nn.ModuleList) else [part]
            for module in modules:
                if any(p.requires_grad for p in module.parameters()):
                    fully_shard(module)
    fully_shard(model)


def is_cut(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor; who made one has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part; shares memory with the tensor."""
    return tensor.to_local() if is_cut(tensor) else tensor


def full_value(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor. Every rank takes part."""
    return tensor.full_tensor() if is_cut(tensor) else tensor


def part_like(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a full value that is cut as `like` is. Sends no message."""
    full = full.to(like.device)
    if not is_cut(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def load_full(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy full values into a module, cut or not.

    Raises RuntimeError with the names whose shape differs or that only one side has.
    """
    state = module.state_dict()
    wanted = {name: tuple(value.shape) for name, value in state.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if wanted != found:
        names = [k for k in sorted(wanted | found) if wanted.get(k) != found.get(k)]
        shown = [f"{k}: {found.get(k)} -> {wanted.get(k)}" for k in names[:SHOWN]]
        more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        raise RuntimeError("; ".join([*shown, *more]))
    with torch.no_grad():
        for name, value in state.items():
            local_part(value).copy_(local_part(part_like(tensors[name], value)))


def sync_gradients(model: nn.Module, *, wanted: bool) -> None:
    """Whether the next backward of an FSDP model sums its gradients over the ranks."""
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(wanted)
