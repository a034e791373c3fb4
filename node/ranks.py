"""Several processes, one run: ranks, shards, and what the ranks tell each other. One process is the case of one rank.

Every rank holds the same small things (problems, rollouts, advantages, random order) and does its share of the large
ones: it samples its share of the problems and makes its share of the passes. FSDP2 shards the weights, their gradients
and the optimizer's state over the ranks and gathers a layer's weights while that layer runs.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def world_size() -> int:
    """How many ranks there are: torchrun's WORLD_SIZE, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this process is."""
    return int(os.environ.get("RANK", 0))


def start() -> torch.device:
    """Join the other ranks, if there are any. Returns this rank's device."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized() and (world_size() > 1 or on_gpu):
        # Objects and flags go over gloo, tensors on a GPU over NCCL. Alone on a GPU there is a group of one, so that
        # weights in float32 and passes in bfloat16 come from FSDP there too.
        where = {} if world_size() > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **where)
    return device


def stop() -> None:
    """Leave the other ranks; after the sampler has been closed, which also uses the group (vLLM ends it itself)."""
    if dist.is_initialized():
        dist.barrier()  # one that leaves early can take another, still talking to it, down
        dist.destroy_process_group()


def print_once(text: str) -> None:
    """Print it once, whatever the number of ranks."""
    if rank() == 0:
        print(text, flush=True)


def exit_with_error(message: str) -> None:
    """End the run with a message. Rank 0 speaks first; another one is heard if rank 0 had nothing to say."""
    if rank() > 0:
        time.sleep(5)
    sys.exit(f"error: {message}")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Within the context, what is wrong with arguments, data or files ends the run with its message alone."""
    try:
        yield
    except (ValueError, OSError) as e:
        exit_with_error(e)


def decoder_layers(model) -> torch.nn.ModuleList:
    """The model's decoder layers. ValueError for a model that keeps them elsewhere than the common ones."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise ValueError(f"{type(model).__name__} keeps no layers in get_decoder().layers: not supported here")
    return layers


def shard(model, device: torch.device, dtype: str = "auto"):
    """The model on this rank's device: over several ranks, or on a GPU, as FSDP2 shards; alone on a CPU as it is.

    Float32 weights, gradients and optimizer state; on a GPU the passes run in bfloat16, unless dtype says float32, and
    gradients of passes and ranks are summed in float32. Weights move to the device layer by layer.
    """
    if not dist.is_initialized():
        return model.to(device)
    mixed = device.type == "cuda" and dtype != "float32"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def reshard(model) -> None:
    """Needed after a pass without gradient: it leaves the weights of FSDP's root gathered, and model.parameters() then
    gives those, which no optimizer may hold and no state dict finds."""
    if isinstance(model, FSDPModule):
        model.reshard()


def wait_for_all() -> None:
    """Until every rank has come here, where there are several."""
    any_rank(False)


def named_weights(model) -> Iterator[tuple[str, Tensor]]:
    """Every weight by name, whole, one at a time. (vLLM keeps the parts of a fused layer until the last has come.)"""
    for name, p in model.named_parameters():
        yield name, gather_weight(p)


def gather_weight(p: Tensor) -> Tensor:
    """A weight of which each rank has a part (all must call), or which is whole already."""
    p = p.detach()
    return p.full_tensor() if isinstance(p, DTensor) else p


def my_share(items: list) -> list:
    """This rank's part of a list."""
    return items[rank() :: world_size()]


def all_gather(mine: list) -> list:
    """The whole list again, in its order, from each rank's share (all must call)."""
    if world_size() == 1:
        return mine
    parts = [None] * world_size()
    dist.all_gather_object(parts, mine)
    total = sum(len(part) for part in parts)
    return [parts[i % world_size()][i // world_size()] for i in range(total)]


def from_rank_0(value):
    """Rank 0's value, on every rank (all must call)."""
    return all_gather([value])[0]


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over the ranks (all must call)."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def any_rank(flag: bool) -> bool:
    """Whether it is so on any rank (all must call)."""
    return bool(all_reduce_sum(torch.tensor(float(flag))) > 0)
