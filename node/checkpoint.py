"""Crash-safe checkpoints: complete or not there at all, checked when they are read, the last few kept.

A checkpoint is a folder checkpoint-STEP with

    the model and the tokenizer   in transformers' format
    optimizer/                    AdamW's moments, a part for each rank (torch.distributed.checkpoint)
    trainer.pt                    step, position in the data, which problems these are, head split, ...
    train_args.json               the run's arguments
    manifest.json                 written last: size and CRC-32 of every file

It is written under another name, and renamed when it is on the disk. No rank ever holds more than its share of the run
and a few of the model's tensors.
"""

import json
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoModelForCausalLM

from node import ranks
from node.output import in_one_line, write_whole
from node.settings import (
    check_not_quantized,
    check_shapes,
    check_weights,
    keep_soft_caps,
    load_config,
    load_generation_config,
    load_model,
)
from node.weights import find_sources, from_stored, stored_groups, stored_tensors, to_stored

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process: that is meant
UNFINISHED = "checkpoint-unfinished"  # the folder that a checkpoint is written to, before it is renamed
SHARD_BYTES = 32 * 2**20  # weights are gathered and written so many at a time, or a tensor, if that is larger


def load_sharded(name: str, device: torch.device, dtype: str = "auto"):
    """The transformers model of a folder or hub name, on this rank's device, sharded as ranks.shard does.

    With several ranks, or on a GPU, each rank reads its own part of each weight from the files, so no host holds more
    of the model than its ranks' shares. Raises ValueError if the files lack weights of the model.
    """
    if not dist.is_initialized():
        return load_model(name, str(device))[0]
    config = load_config(name)
    check_not_quantized(name, config)
    with _parameters_without_memory():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    keep_soft_caps(model)
    model.generation_config = load_generation_config(name) or model.generation_config
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    model = ranks.shard(model, device, dtype).to_empty(device=device)
    model.tie_weights()  # to_empty gives either of a tied pair memory of its own
    for key, buffer in model.named_buffers():
        buffer.copy_(buffers[key])
    model.eval()
    try:
        folder = name if os.path.isdir(name) else snapshot_download(name, allow_patterns=["*.safetensors", "*.json"])
        _read_weights(model, name, Path(folder))
    except (CheckpointException, SafetensorError) as e:
        raise ValueError(f"cannot read {name!r} in shares from its .safetensors files: {_reason(e)}") from e
    return model


def _read_weights(model, name: str, folder: Path) -> None:
    """Read this rank's share of the weights, and the buffers. ValueError if the files do not fit the model.

    What transformers joins, such as the experts of a layer, is read whole, one such tensor at a time.
    """
    files, shapes = {}, {}  # the file and the shape of each stored tensor
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for stored_name in file.keys():
                files[stored_name], shapes[stored_name] = path, file.get_slice(stored_name).get_shape()
    if not files:
        raise ValueError(f"{name!r} has no .safetensors files, and only those can be read in shares")

    # Weights that are stored as the model has them: each rank reads its share.
    renamed, sources = find_sources(model, files)
    tensors = {key: tensor.detach() for key, tensor in stored_tensors(model).items()}
    missing = tensors.keys() - renamed.values()
    shares = {stored_name: tensors[key] for stored_name, key in renamed.items()}
    check_shapes(name, {stored_name: (shapes[stored_name], share.shape) for stored_name, share in shares.items()})
    dcp.load(shares, storage_reader=HuggingFaceStorageReader(str(folder)))

    def read(stored_name: str) -> torch.Tensor:
        with safe_open(files[stored_name], "pt") as file:
            return file.get_tensor(stored_name)

    # Weights that transformers makes from several stored ones.
    for source in sources:
        made = from_stored(model, source, read)
        for key in made:
            _copy_share(tensors[key], made[key])
        missing -= made.keys()
        del made  # or it would be held while the next is made

    # What is missing, and what is left over.
    joined = {stored_name for source in sources for stored_name, _ in source.parts}
    check_weights(name, model, missing, files.keys() - renamed.keys() - joined - model.state_dict().keys())


def _copy_share(tensor: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy into a tensor that may be sharded this rank's part of the whole."""
    if isinstance(tensor, DTensor):
        shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        whole = whole[tuple(slice(first, first + size) for first, size in zip(start, shape))]
        tensor = tensor.to_local()
    tensor.copy_(whole)


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Within the context, new modules get their parameters on the meta device, without memory. Buffers are real."""
    register = torch.nn.Module.register_parameter

    def on_meta(module, name: str, p: torch.nn.Parameter | None) -> None:
        if p is not None and not p.is_meta:
            p = torch.nn.Parameter(p.to("meta"), p.requires_grad)
        register(module, name, p)

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def _reason(e: Exception) -> str:
    """What went wrong, in one line; if several ranks failed, the first of them."""
    cause = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
    return in_one_line(cause)


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as f:
        while block := f.read(2**24):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    """Wait until what was written is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save(folder: Path, state: dict, model, tokenizer, optimizer, keep: int, args=None) -> None:
    """Write folder/checkpoint-STEP, where STEP is state["step"], and remove all but the last `keep`. All ranks call.

    args: the run's arguments, a dataclass. If it cannot be written, raises OSError that names the checkpoint to resume
    from.
    """
    ranks.reshard(model)
    final, making = folder / f"checkpoint-{state['step']}", folder / UNFINISHED
    first = ranks.rank() == 0
    try:
        # Rank 0 writes the small files; all ranks gather the weights, and write their own parts of the moments.
        if first:
            _save_description(making, model, tokenizer)
            torch.save(state, making / "trainer.pt")
            if args:
                write_whole(making / "train_args.json", json.dumps(asdict(args), indent=1))
        ranks.wait_for_all()  # each rank writes into the folder, which rank 0 has now made
        _save_weights(model, making)
        moments = _moments(model, optimizer)
        dcp.save(moments, checkpoint_id=making / "optimizer", no_dist=_is_alone())
        # The manifest comes last, and the folder gets its name when all of it is on the disk.
        if first:
            files = sorted(f for f in making.rglob("*") if f.is_file())
            manifest = {str(f.relative_to(making)): [f.stat().st_size, _crc(f)] for f in files}
            write_whole(making / "manifest.json", json.dumps(manifest, indent=1))
            for path in (*files, making / "manifest.json", making / "optimizer", making):
                _sync(path)
            shutil.rmtree(final, ignore_errors=True)
            making.rename(final)
            _sync(folder)
    except (Exception, CheckpointException) as e:  # a full disk raises different errors, depending on who writes
        if first:
            shutil.rmtree(making, ignore_errors=True)
        left = list_checkpoints(folder)
        rest = f"{left[-1].name} is there: make room, then --resume {folder}" if left else "none is there before it"
        raise OSError(f"{final} could not be written ({_room(folder, model, 1) or _reason(e)}); {rest}") from e
    if first:
        found = list_checkpoints(folder)
        up_to_this = found[: found.index(final) + 1]  # a later one is damaged: the run went on from one before it
        for old in up_to_this[:-keep]:
            shutil.rmtree(old, ignore_errors=True)


def try_saving(folder: Path, model, tokenizer, keep: int, saves_left: int) -> None:
    """Write all of a checkpoint but its numbers, and remove it. ValueError if it cannot be written. Rank 0 calls.

    Also ValueError if the disk has no room for the checkpoints that are still to come: at most saves_left, and at most
    keep + 1 at a time, because the oldest is removed after the newest is written.
    """
    making = folder / UNFINISHED
    try:
        _save_description(making, model, tokenizer)
    except Exception as e:  # whatever transformers refuses to write
        raise ValueError(f"a checkpoint of this model cannot be written: {type(e).__name__}: {in_one_line(e)}") from e
    finally:
        shutil.rmtree(making, ignore_errors=True)
    to_come = min(saves_left, max(1, keep + 1 - len(list_checkpoints(folder))))
    if lack := _room(folder, model, to_come):
        raise ValueError(f"{lack}. Make room, lower --keep, or give --out on another disk")


def _save_description(making: Path, model, tokenizer) -> None:
    """Write what describes the model, without its weights, into a new folder: configuration and tokenizer."""
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    model.config.save_pretrained(making)
    if model.generation_config:
        # As it is: save_pretrained refuses what some models come with, a temperature without do_sample, say.
        model.generation_config.to_json_file(making / "generation_config.json")
    tokenizer.save_pretrained(making)


def count_bytes(model) -> int:
    """The size of a checkpoint without its small files: the stored tensors, and two float32 moments of each weight."""
    stored = sum(tensor.numel() * tensor.element_size() for tensor in stored_tensors(model).values())
    return stored + 8 * sum(p.numel() for p in model.parameters())


def _room(folder: Path, model, count: int) -> str | None:
    """What to say if the folder's disk has no room for `count` more checkpoints, else None."""
    needed, free = count * count_bytes(model), shutil.disk_usage(folder).free
    if needed <= free:
        return None
    return f"the disk of {folder} is too full: {count} checkpoint(s) need {_gib(needed)}, and {_gib(free)} are free"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def read_args(path: str | Path) -> dict:
    """The arguments of the run that wrote a checkpoint. Empty for a model that has none: it was not trained here, or by
    an older version."""
    try:
        return json.loads((Path(path) / "train_args.json").read_text())
    except (OSError, ValueError):
        return {}


def _save_weights(model, folder: Path) -> None:
    """Write the weights in transformers' format: all ranks gather some at a time, rank 0 writes them."""
    tensors, first = stored_tensors(model), ranks.rank() == 0
    groups = {group.names[0]: group.names for group in stored_groups(model)}
    sizes = {}  # of each group, as a tensor without memory of so many bytes
    for key, names in groups.items():
        size = sum(tensors[name].numel() * tensors[name].element_size() for name in names)
        sizes[key] = torch.empty(size, dtype=torch.uint8, device="meta")
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=SHARD_BYTES)
    weight_map = {}  # the file of each stored tensor
    for file, keys in plan.filename_to_tensors.items():
        part = {}
        for key in keys:
            gathered = {name: ranks.gather_weight(tensors[name]) for name in groups[key]}
            if first:
                part |= {name: x.cpu().contiguous() for name, x in to_stored(model, gathered).items()}
        if first:
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
    if plan.is_sharded and first:
        index = {"metadata": plan.metadata, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def find_damage(path: Path) -> str | None:
    """What in a checkpoint is not as it was written. None if it is undamaged."""
    try:
        for name, (size, crc) in json.loads((path / "manifest.json").read_text()).items():
            if (path / name).stat().st_size != size or _crc(path / name) != crc:
                return f"{name} is not as it was written"
    except (OSError, ValueError) as e:
        return str(e)
    return None


def find_latest(folder: str | Path | None) -> tuple[Path, dict] | tuple[None, None]:
    """The newest checkpoint of a run that is not damaged, and its state. All ranks call, rank 0 chooses.

    A damaged one is named on stderr and skipped. (None, None) if there is no run or no checkpoint yet. ValueError if
    all are damaged.
    """
    if folder is None:
        return None, None
    folder = Path(folder)
    newest = _newest_undamaged(folder) if ranks.rank() == 0 else None
    newest = ranks.from_rank_0(newest)
    if newest is None:
        return None, None
    return newest, torch.load(newest / "trainer.pt", weights_only=True, map_location="cpu")


def _newest_undamaged(folder: Path) -> Path | None:
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        why = find_damage(path)
        if why is None:
            return path
        print(f"{path} is damaged ({why}): trying the one before", file=sys.stderr, flush=True)
    if checkpoints:
        raise ValueError(f"every checkpoint in {folder} is damaged: start a new run with another --out")
    return None


def restore(path: Path, model, optimizer) -> None:
    """Restore the optimizer's moments. The number of ranks may differ from before.

    Its settings stay as they are, for example the learning rate: they are those of the run's arguments now.
    """
    ranks.reshard(model)
    settings = [{name: x for name, x in group.items() if name != "params"} for group in optimizer.param_groups]
    moments = _moments(model, optimizer)  # the present ones: what is read replaces them
    # Partial: weights that had no gradient yet, such as those of an indexer, have no moments in the checkpoint.
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(moments, checkpoint_id=path / "optimizer", planner=planner, no_dist=_is_alone())
    set_optimizer_state_dict(model, optimizer, moments)
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)


def _moments(model, optimizer) -> dict:
    """AdamW's state, to be written, or to be read into. If there is none yet, it is made, and counts no steps.

    torch makes it by a step with gradients of 0, and would count that one.
    """
    is_new = not optimizer.state
    moments = get_optimizer_state_dict(model, optimizer)
    if is_new:
        for of_weight in (*optimizer.state.values(), *moments["state"].values()):
            of_weight["step"].zero_()
    return moments


def _is_alone() -> bool:
    """Whether this is one process on a CPU, which needs no collectives, although vLLM has made a process group.

    It is better without: gloo starts threads for the first collective, and from then on a step on two cores took 1.6
    times as long.
    """
    return ranks.world_size() == 1 and not torch.cuda.is_available()
