"""How several processes train one model: each holds the whole of it (DDP), or a part (FSDP).

The gradients of all ranks are averaged once per step; losses are scaled so that the average is the gradient of the
global batch.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from DeBERTa.config import TrainConfig
from DeBERTa.model.encoder import Layer
from DeBERTa.training.distributed import get_world_size, is_distributed


def wrap_parallel(objective: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """What to call in training instead of `objective`; all processes start with the weights of the first one.

    `--sharding zero2` and `fsdp` shard the parameters in place, so that optimisers have to be built after this: gradients
    and moments are sharded with them. With `zero2` a layer gathered for the forward pass stays so until its backward
    pass has ended; with `fsdp` it is gathered twice.
    """
    if not is_distributed():
        return objective
    if config.sharding == "none":
        # Which parameters have no gradient depends on the config: position tables, for one, where positions are
        # relative. Looking for them costs a walk over the graph once a step.
        places = [device] if device.type == "cuda" else None
        return DistributedDataParallel(
            objective, device_ids=places, find_unused_parameters=True, gradient_as_bucket_view=True
        )
    for tensor in objective.state_dict().values():
        dist.broadcast(tensor, src=0)
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for module in objective.modules():
        if isinstance(module, Layer):
            fully_shard(module, mesh=mesh, reshard_after_forward=config.sharding == "fsdp")
            register_fsdp_forward_method(module, "decode")
    return fully_shard(objective, mesh=mesh, reshard_after_forward=False)


@contextmanager
def gradient_sync(objective: nn.Module, last: bool) -> Iterator[None]:
    """Forward and backward of one part of a step: gradients are exchanged with those of the last part."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(last)
        yield
    elif isinstance(objective, DistributedDataParallel) and not last:
        with objective.no_sync():
            yield
    else:
        yield


def gather_full(value: object, on_host: bool = False) -> object:
    """Tensors in nested dicts and lists with the parts of all processes put together. Called in every process.

    With `on_host` what was put together leaves the device, so that this holds one such tensor at a time.
    """
    if isinstance(value, DTensor):
        tensor = _put_together(value)
        return tensor.cpu() if on_host else tensor
    if isinstance(value, dict):
        return {key: gather_full(item, on_host) for key, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(gather_full(item, on_host) for item in value)
    return value


def _put_together(value: DTensor) -> torch.Tensor:
    """`value.full_tensor()`, without gradient, but for the kind of all-gather.

    Its all-gather is a coalesced one. After each collective gloo's two threads write the name of its kind to one string
    without a lock (PyTorch 2.13, `ProcessGroupGloo::runLoop`). Names of up to 15 letters are stored in place; this one
    is longer, and its memory is sooner or later freed twice, so that a process crashes, or worse.
    """
    if value.placements != (Shard(0),):
        return value.full_tensor()
    mesh, mine = value.device_mesh, value.to_local().detach()
    rows = math.ceil(len(value) / mesh.size())  # the last processes may have fewer, or none
    padded = mine.new_zeros(rows, *value.shape[1:])
    padded[: len(mine)] = mine
    parts = mine.new_empty(rows * mesh.size(), *value.shape[1:])
    dist.all_gather_single(parts, padded, group=mesh.get_group())
    return parts[: len(value)]


def shard_like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, cut as `parameter` is; every process has the whole already."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


@torch.no_grad()
def load_full_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Set all parameters from whole tensors with the names of `model.state_dict()`."""
    for name, parameter in model.state_dict().items():
        parameter.copy_(shard_like(weights[name], parameter))


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Set an optimiser's state from one with whole tensors."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        index: {name: shard_like(value, parameters[index]) for name, value in moments.items()}
        for index, moments in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": cut})
