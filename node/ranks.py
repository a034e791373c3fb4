"""Several processes, one run. torchrun starts one process, a rank, for each GPU.

Every rank holds the same small things: problems, rollouts, advantages, random order. Each does its share of the large
ones: it samples its share of the problems and makes its share of the passes. FSDP2 shards the weights, their gradients
and the optimizer's state over the ranks, and gathers a layer's weights while that layer runs. In a single process
my_share, all_gather, all_reduce_sum and the like return their input.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from node.output import in_one_line
from node.weights import stored_groups, stored_tensors, to_stored

INTERRUPTED = 130  # the exit status of a program that Ctrl-C has ended
ROOT = Path(__file__).resolve().parents[1]


def world_size() -> int:
    """How many ranks there are: torchrun's WORLD_SIZE, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number, from 0 to world_size() - 1."""
    return int(os.environ.get("RANK", 0))


def start() -> torch.device:
    """Join the other ranks, if there are any. Returns this rank's device."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized() and (world_size() > 1 or on_gpu):
        # Objects and flags go over gloo, tensors on a GPU over NCCL. A single GPU also gets a process group, of size
        # one, because FSDP2 does the mixed precision there too.
        where = {} if world_size() > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **where)
    return device


def stop() -> None:
    """Leave the other ranks. Close the sampler first: it uses the process group, and vLLM ends it."""
    if dist.is_initialized():
        dist.barrier()  # a rank that exits early can crash ranks that still communicate with it
        dist.destroy_process_group()


def print_once(text: str) -> None:
    """Print it once, whatever the number of ranks."""
    if rank() == 0:
        print(text, flush=True)


def exit_with_error(message: str) -> None:
    """End the run with a message. Other ranks wait 15 s, so that rank 0's message is printed first."""
    if rank() > 0:
        time.sleep(15)
    sys.exit(f"error: {message}")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Within the context, errors that a user can cause end the run with one line; those of a bug have their traceback.

    - ValueError, OSError: wrong arguments, data or files. The message says what to do.
    - ImportError, RuntimeError, SafetensorError, if a library raises them: a package that is missing, a GPU that cannot
      be used, a file that cannot be read. The line names the library, and our line that called it.
    - MemoryError, torch.OutOfMemoryError: the host or the GPU has too little memory.
    - KeyboardInterrupt: Ctrl-C before the first step of this process.
    """
    try:
        yield
    except (ValueError, OSError) as e:
        exit_with_error(e)
    except (ImportError, RuntimeError, MemoryError, SafetensorError) as e:
        calls = traceback.extract_tb(e.__traceback__)
        ours = [call for call in calls if _is_ours(call.filename)]
        is_memory = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if calls[-1] is ours[-1] and not is_memory:  # raised in our own code
            raise
        exit_with_error(
            f"{type(e).__name__}: {in_one_line(e)} (raised by {_library(calls[-1].filename)}, called in "
            f"{Path(ours[-1].filename).name}, line {ours[-1].lineno})"
        )
    except KeyboardInterrupt:
        print_once("stopped before the first step, as asked: nothing has changed. To start again: the same command")
        sys.exit(INTERRUPTED)


def _is_ours(file: str) -> bool:
    return ROOT in Path(file).parents and "site-packages" not in file


def _library(file: str) -> str:
    """The name of the package that a file belongs to."""
    parts = Path(file).parts
    return parts[parts.index("site-packages") + 1] if "site-packages" in parts else Path(file).name


def decoder_layers(model) -> torch.nn.ModuleList:
    """The model's decoder layers. ValueError for a model that does not keep them in get_decoder().layers."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise ValueError(f"{type(model).__name__} keeps no layers in get_decoder().layers, so it cannot be sharded")
    return layers


def shard(model, device: torch.device, dtype: str = "auto"):
    """The model on this rank's device, sharded by FSDP2. In a single process on a CPU, the model as it is.

    Weights, gradients and optimizer state are float32. On a GPU the passes run in bfloat16, unless dtype is float32;
    gradients are still summed in float32. Weights move to the device layer by layer.
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
    """Shard again the weights that a pass without gradient leaves gathered, those of FSDP2's root.

    Call it before making an optimizer or a state dict: model.parameters() would give the gathered weights.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def has_own_weights(model) -> bool:
    """Whether the parameters are those of the optimizer: all sharded, if FSDP2 shards the model.

    They may not be, after a pass that was interrupted: a layer keeps its gathered weights, in another precision.
    """
    return not isinstance(model, FSDPModule) or all(isinstance(p, DTensor) for p in model.parameters())


def wait_for_all() -> None:
    """Wait until every rank has come here."""
    any_rank(False)


def named_weights(model) -> Iterator[tuple[str, Tensor]]:
    """Every weight and persistent buffer, with the name that a checkpoint has for it, gathered from the ranks.

    One tensor of the model is gathered at a time; of a mixture of experts, all experts of a layer.
    """
    tensors = stored_tensors(model)
    for group in stored_groups(model):
        yield from to_stored(model, {name: gather_weight(tensors[name]) for name in group.names}).items()


def gather_weight(p: Tensor) -> Tensor:
    """A weight, gathered from the ranks if it is sharded. All ranks must call."""
    p = p.detach()
    return p.full_tensor() if isinstance(p, DTensor) else p


def my_share(items: list) -> list:
    """This rank's part of a list."""
    return items[rank() :: world_size()]


def all_gather(mine: list) -> list:
    """The whole list, in its order, from each rank's share of it. All ranks must call."""
    if world_size() == 1:
        return mine
    parts = [None] * world_size()
    dist.all_gather_object(parts, mine)
    total = sum(len(part) for part in parts)
    return [parts[i % world_size()][i // world_size()] for i in range(total)]


def gather_lists(mine: list) -> list:
    """The ranks' lists, one after the other. All ranks must call."""
    return [item for part in all_gather([mine]) for item in part]


def from_rank_0(value):
    """Rank 0's value, on every rank. All ranks must call."""
    return all_gather([value])[0]


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over the ranks, in place. All ranks must call."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def any_rank(flag: bool) -> bool:
    """Whether flag is true on any rank. All ranks must call."""
    return bool(all_reduce_sum(torch.tensor(float(flag))) > 0)
