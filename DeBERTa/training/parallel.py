"""Data-parallel training: replicated parameters (DDP) or shards (FSDP2).

Gradients are averaged over the ranks once per step; losses are scaled so that the average is the gradient
of the global batch.

Full state dictionaries exist on rank 0 alone. They are gathered and loaded one tensor at a time: another
rank never holds more than its own state and one more tensor. `torch.distributed.checkpoint.state_dict` does
the same with `full_state_dict=True`, but its all-gather makes gloo corrupt memory (see `all_gather_full`).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from DeBERTa.config import TrainConfig
from DeBERTa.data.batch import Batch
from DeBERTa.errors import DamagedCheckpointError
from DeBERTa.model.encoder import Layer
from DeBERTa.model.pretraining import MaskedLanguageModel, RTDModel
from DeBERTa.training.distributed import broadcast_value, get_world_size, is_distributed, is_rank_zero

# PyTorch 2.13 renames the second to the first, and warns of the old name.
all_gather_into_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Objective(nn.Module):
    """A module whose forward pass is a method of its model.

    DDP and FSDP act on the forward passes of modules.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: Callable, *args: Any, **kwargs: Any) -> Any:
        """Return the result of a method of the model."""
        return method(*args, **kwargs)


def wrap_parallel(
    model: MaskedLanguageModel | RTDModel,
    parts: dict[str, nn.Module],
    config: TrainConfig,
    device: torch.device,
    precision: str,
) -> dict[str, nn.Module]:
    """Return the objectives to call for the parts of `model`.

    All ranks have rank 0's weights.
    parts: the modules with an update of their own; they contain all parameters.
    `--sharding none`: DDP. Every rank holds parameters, gradients and optimizer state.
    `--sharding zero2`: FSDP2 with `reshard_after_forward=False`. Gradients, optimizer state and, between
    steps, parameters are sharded. Parameters are all-gathered once per micro-batch, in the forward pass.
    `--sharding fsdp`: the parameters of a layer are freed after its forward pass and all-gathered again for
    its backward pass. Those outside of layers (embeddings, heads) are not freed: they are needed again first.
    Training in bfloat16 on a GPU, both all-gather the parameters of layers in bfloat16.

    Sharding replaces the parameters: build optimizers after this. To evaluate only, nothing is wrapped.
    """
    objectives = {name: Objective(part) for name, part in parts.items()}
    if not is_distributed() or not config.do_train:
        return dict(objectives)
    if config.sharding == "none":
        ordered = order_by_gradient(model)
        return {name: replicate(objective, ordered) for name, objective in objectives.items()}
    # On a CPU, autocast leaves the dtype of LayerNorm to its input, and kernels take float32 parameters.
    dtype = torch.bfloat16 if precision == "bf16" and device.type == "cuda" else None
    return {name: shard(objective, config, device, dtype) for name, objective in objectives.items()}


def shard(
    objective: Objective, config: TrainConfig, device: torch.device, dtype: torch.dtype | None
) -> Objective:
    """Shard the parameters of an objective and of its layers by FSDP2.

    They have rank 0's values.
    dtype: of the layers' parameters in all-gathers and in the forward and backward pass, if not their own.
    Autocast would cast the same weights after the all-gather. Of LayerNorm the weights alone are rounded. The
    shards, the reduction of gradients, embeddings and heads stay in float32.
    """
    policy = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for tensor in objective.state_dict().values():
        dist.broadcast(tensor, src=0)
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for module in objective.modules():
        if isinstance(module, Layer):
            is_freed = config.sharding == "fsdp"
            fully_shard(module, mesh=mesh, reshard_after_forward=is_freed, mp_policy=policy)
            register_fsdp_forward_method(module, "decode")
    fully_shard(objective, mesh=mesh, reshard_after_forward=False)
    return objective


def replicate(objective: Objective, ordered: list[nn.Parameter]) -> DistributedDataParallel:
    """Return the objective under DDP, with buckets that follow `ordered` at once.

    DDP first has one bucket for all gradients, and after its first backward pass several, in the order of
    that pass. From three ranks on, other buckets mean sums in another order. A resumed run would therefore
    have other bits after its first step, if a backward pass that computes nothing did not come before.
    With `find_unused_parameters` buckets stay. It was not taken: it traverses the graph and reduces a map of
    used parameters in every step, for which a GPU waits, and the relative-position table, whose gradient is
    complete last, is in one of the first buckets and holds back the others.
    """
    own = set(objective.parameters())
    ordered = [parameter for parameter in ordered if parameter in own]
    for parameter in own - set(ordered):
        parameter.requires_grad_(False)  # DDP would wait for its gradient
    replicated = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    # Backward passes go from the last summand to the first.
    replicated(lambda: torch.stack([parameter.sum() for parameter in reversed(ordered)]).sum()).backward()
    replicated.zero_grad(set_to_none=True)
    return replicated


def order_by_gradient(model: MaskedLanguageModel | RTDModel) -> list[nn.Parameter]:
    """Return the parameters with a gradient, in the order in which it is complete.

    Which ones have none depends on the config: position tables, for example, where positions are relative.
    They are found by a backward pass of the plain model on the meta device, which computes nothing.
    """
    parameters, ordered = dict(model.named_parameters()), []
    with torch.device("meta"):
        twin = type(model)(model.config)  # type: ignore[arg-type]  # the config is of this type
    for name, parameter in twin.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: ordered.append(parameters[name]))
    ids = torch.ones(1, 2, dtype=torch.int64)
    batch = Batch.from_tensors(ids, ids > 0, ids, torch.zeros(1, 2)).to(torch.device("meta"))
    if isinstance(twin, RTDModel):
        (masked, _), detected = twin(batch)
        (masked.loss.sum() + detected.loss).backward()
    else:
        twin.compute_masked_loss(batch, is_sampled=False).loss.sum().backward()
    return ordered


def sync_gradients(objective: nn.Module, is_last: bool) -> AbstractContextManager:
    """Return the context for the forward and backward pass of one micro-batch.

    Gradients are reduced in the backward pass of the last micro-batch.
    Until then sharded ranks accumulate full gradients: they trade memory for one reduction per step.
    """
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(is_last)
    if isinstance(objective, DistributedDataParallel) and not is_last:
        return objective.no_sync()
    return nullcontext()


def all_gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor of a shard, without gradient, on every rank.

    Other tensors are returned unchanged. `DTensor.full_tensor()` does the same by a coalesced all-gather.
    After each collective gloo's two threads write the name of its kind to one string without a lock (PyTorch
    2.13, `ProcessGroupGloo::runLoop`). Names of up to 15 letters are stored in place. That of a coalesced
    all-gather is longer, and its memory is sooner or later freed twice: the process crashes, or worse.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.placements != (Shard(0),):  # a norm, to be reduced
        return tensor.full_tensor()
    shard = _pad_shard(tensor)
    full = shard.new_empty(len(shard) * tensor.device_mesh.size(), *shard.shape[1:])
    all_gather_into_tensor(full, shard, group=tensor.device_mesh.get_group())
    return full[: len(tensor)]


def gather_to_rank_zero(state: Any) -> Any:
    """Copy a nested state to host memory on rank 0, with full tensors for shards.

    Collective: every rank calls it.
    Other ranks receive None in place of every tensor.
    """
    if isinstance(state, DTensor):
        return _gather_shards(state)
    if isinstance(state, torch.Tensor):
        return _copy_to_host(state) if is_rank_zero() else None
    if isinstance(state, dict):
        return {key: gather_to_rank_zero(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gather_to_rank_zero(value) for value in state)
    return state


def load_full_weights(model: nn.Module, weights: dict[str, torch.Tensor] | None) -> None:
    """Set all parameters from rank 0's full tensors.

    `weights` has the names of `model.state_dict()`.
    Collective: every rank calls it, with None on ranks other than 0.
    """
    for name, target in model.state_dict().items():
        _load_tensor(target, None if weights is None else weights[name])


def load_full_optimizer_state(optimizer: torch.optim.Optimizer, state: dict | None) -> None:
    """Set moments and update counts from rank 0's full `optimizer.state_dict()`.

    Collective: every rank calls it, with None on ranks other than 0. Learning rates and other settings of the
    parameter groups do not change. Raises `DamagedCheckpointError` on rank 0 when a tensor does not fit its
    parameter.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    full = {} if state is None else state["state"]
    # Scalars are sent as numbers; None stands for a tensor of the parameter's shape.
    scalars = [
        (index, {name: None if value.dim() else value for name, value in values.items()})
        for index, values in full.items()
    ]
    loaded: dict[int, dict[str, torch.Tensor]] = {}
    for index, values in broadcast_value(scalars):
        loaded[index] = {name: torch.as_tensor(v) for name, v in values.items() if v is not None}
        for name in (name for name, value in values.items() if value is None):
            loaded[index][name] = torch.empty_like(parameters[index], requires_grad=False)
            _load_tensor(loaded[index][name], full[index][name] if full else None)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": loaded})


@torch.no_grad()
def _load_tensor(target: torch.Tensor, full: torch.Tensor | None) -> None:
    """Set `target` from rank 0's full tensor: broadcast it, or scatter its rows."""
    if full is not None and full.shape != target.shape:
        raise DamagedCheckpointError(
            f"the checkpoint does not fit the model: a tensor has shape {tuple(full.shape)}, its parameter "
            f"{tuple(target.shape)}; resume with the version that wrote it"
        )
    if isinstance(target, DTensor):
        shard, local, shards = _pad_shard(target), target.to_local(), None
        if full is not None:
            shards = list(_pad(full.to(shard), len(shard) * get_world_size()).split(len(shard)))
        dist.scatter(shard, shards, src=0)
        local.copy_(shard[: len(local)])
        return
    if full is not None:
        target.copy_(full)
    if is_distributed():
        dist.broadcast(target, src=0)


def _gather_shards(tensor: DTensor) -> torch.Tensor | None:
    shard, full, shards = _pad_shard(tensor), None, None
    if is_rank_zero():
        full = shard.new_empty(len(shard) * get_world_size(), *shard.shape[1:])
        shards = list(full.split(len(shard)))
    dist.gather(shard, shards, dst=0)
    return None if full is None else _copy_to_host(full[: len(tensor)])


def _pad_shard(tensor: DTensor) -> torch.Tensor:
    """Return this rank's rows, padded to the same number on every rank.

    Without padding, the last ranks may have fewer rows, or none.
    """
    return _pad(tensor.to_local().detach(), -(-len(tensor) // tensor.device_mesh.size()))


def _pad(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    if len(tensor) < rows:
        tensor = F.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, rows - len(tensor)])
    return tensor.contiguous()


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
