"""Several processes, one run: ranks, shards, and what the ranks tell each other. One process is the case of one rank.

Every rank holds the same small things (problems, rollouts, advantages, random order) and does its share of the large
ones: it samples its share of the problems and makes its share of the passes. FSDP2 shards the weights, their gradients
and the optimizer's state over the ranks and gathers a layer's weights while that layer runs.
"""

import os
import sys
import time
from collections.abc import Iterator
from types import MethodType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from grpo import local_logprobs


def world() -> int:
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
    if not dist.is_initialized() and (world() > 1 or on_gpu):
        # Objects and flags go over gloo, tensors on a GPU over NCCL. Alone on a GPU there is a group of one, so that
        # weights in float32 and passes in bfloat16 come from FSDP there too.
        where = {} if world() > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **where)
    return device


def stop() -> None:
    """Leave the other ranks; after the sampler has been closed, which also uses the group."""
    if dist.is_initialized():
        dist.barrier()  # one that leaves early can take another, still talking to it, down
        dist.destroy_process_group()


def fail(message: str) -> None:
    """End the run with a message. Rank 0 speaks first; another one is heard if rank 0 had nothing to say."""
    if rank() > 0:
        time.sleep(5)
    sys.exit(f"error: {message}")


def shard(model, device: torch.device):
    """The model on this rank's device: over several ranks, or on a GPU, as FSDP2 shards; alone on a CPU as it is.

    Float32 weights, gradients and optimizer state; on a GPU the passes run in bfloat16 and gradients are summed in
    float32. Weights move to the device layer by layer.
    """
    if not dist.is_initialized():
        return model.to(device)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    if not hasattr(model.base_model, "layers"):
        raise ValueError(
            f"{type(model).__name__} keeps its layers elsewhere than in base_model.layers: not sharded yet"
        )
    mesh = dist.init_device_mesh(device.type, (world(),))
    for layer in model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.local_logprobs = MethodType(local_logprobs, model)  # FSDP gathers weights around a module's own methods only
    register_fsdp_forward_method(model, "local_logprobs")
    return model


def weights(model) -> Iterator[tuple[str, Tensor]]:
    """Every named weight, whole, one at a time: no device ever holds more than one besides its shards."""
    for name, p in model.named_parameters():
        p = p.detach()
        yield name, p.full_tensor() if isinstance(p, DTensor) else p


def share(items: list) -> list:
    """This rank's part of a list."""
    return items[rank() :: world()]


def gather(mine: list) -> list:
    """The whole list again, in its order, from each rank's part (all must call)."""
    if world() == 1:
        return mine
    parts = [None] * world()
    dist.all_gather_object(parts, mine)
    return [parts[i % world()][i // world()] for i in range(sum(map(len, parts)))]


def total(x: Tensor) -> Tensor:
    """The sum over the ranks (all must call)."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def any_rank(flag: bool) -> bool:
    """Whether it is so on any rank (all must call)."""
    return bool(total(torch.tensor(float(flag))) > 0)
