"""Checkpoints that a run can be killed around: whole or not there at all, checked when read, the last few kept.

A checkpoint is a folder checkpoint-STEP: the model and tokenizer as transformers writes them, optimizer.pt, trainer.pt
(random states, position in the data, ...), and manifest.json, written last, with the size and CRC-32 of every file. It
is made under another name and renamed when it is on the disk.
"""

import json
import os
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging

from node import ranks

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as f:
        while block := f.read(2**24):
            value = zlib.crc32(block, value)
    return value


def _sync(path: Path) -> None:
    """Have what was written reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save(folder: Path, state: dict, model, tokenizer, optimizer, keep: int) -> None:
    """Write folder/checkpoint-STEP, of state["step"], and remove all but the last `keep`; rank 0 writes, all call.

    Raises OSError, with what is left to go on from, when it cannot be written.
    """
    _reshard(model)
    state = {**state, "rng": ranks.all_gather([_random_state()])}
    moments, weights = (
        get_optimizer_state_dict(model, optimizer, options=WHOLE),
        get_model_state_dict(model, options=WHOLE),
    )
    if ranks.rank() == 0:
        final, making = folder / f"checkpoint-{state['step']}", folder / "checkpoint-unfinished"
        try:
            shutil.rmtree(making, ignore_errors=True)
            logging.disable_progress_bar()
            model.save_pretrained(making, state_dict=weights)
            tokenizer.save_pretrained(making)
            torch.save(moments, making / "optimizer.pt")
            torch.save(state, making / "trainer.pt")
            files = sorted(making.iterdir())
            manifest = {f.name: [f.stat().st_size, _crc(f)] for f in files}
            (making / "manifest.json").write_text(json.dumps(manifest, indent=1))
            for path in (*files, making / "manifest.json", making):
                _sync(path)
            shutil.rmtree(final, ignore_errors=True)
            making.rename(final)
            _sync(folder)
        except Exception as e:  # a full disk shows as OSError, RuntimeError or SafetensorError, by who was writing
            shutil.rmtree(making, ignore_errors=True)
            left = listed(folder)
            rest = f"{left[-1].name} is there: make room, then --resume {folder}" if left else "none is there before it"
            raise OSError(f"{final} could not be written ({e}); {rest}") from e
        for old in listed(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)


def listed(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def damage(path: Path) -> str | None:
    """What in a checkpoint is not as it was written; None if it is whole."""
    try:
        for name, (size, crc) in json.loads((path / "manifest.json").read_text()).items():
            if (path / name).stat().st_size != size or _crc(path / name) != crc:
                return f"{name} is not as it was written"
    except (OSError, ValueError) as e:
        return str(e)
    return None


def latest(folder: str | Path | None) -> tuple[Path, dict] | None:
    """The newest checkpoint of a run that is whole, and its state; all ranks call, rank 0 chooses.

    A damaged one is named on stderr and passed over. None if there is no run or no checkpoint yet; ValueError if all
    are damaged.
    """
    if folder is None:
        return None
    folder, chosen = Path(folder), None
    for path in reversed(listed(folder)) if ranks.rank() == 0 else ():
        if (why := damage(path)) is None:
            chosen = path
            break
        print(f"{path} is damaged ({why}): trying the one before", file=sys.stderr, flush=True)
    else:
        if ranks.rank() == 0 and listed(folder):
            raise ValueError(f"no checkpoint in {folder} is whole; begin anew with another --out")
    chosen = ranks.from_rank_0(chosen)
    return chosen and (chosen, torch.load(chosen / "trainer.pt", weights_only=True, map_location="cpu"))


def restore(path: Path, state: dict, model, optimizer) -> None:
    """Put the optimizer's and the random generators' states back. Rank 0 reads the optimizer's and hands it out."""
    _reshard(model)
    moments = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu") if ranks.rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=ranks.world_size() > 1)
    set_optimizer_state_dict(model, optimizer, moments, options=options)
    if len(state["rng"]) == ranks.world_size():  # with another number of ranks the random draws are others
        mine = state["rng"][ranks.rank()]
        torch.set_rng_state(mine["cpu"])
        name, keys, *rest = mine["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        if torch.cuda.is_available() and mine["cuda"] is not None:
            torch.cuda.set_rng_state(mine["cuda"])


def _random_state() -> dict:
    name, keys, *rest = np.random.get_state()  # vLLM draws the seeds of requests from it
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda, "numpy": (name, torch.tensor(keys.astype(np.int64)), *rest)}


def _reshard(model) -> None:
    """A pass without gradient leaves the weights of FSDP's root gathered, where no state dict finds them."""
    if isinstance(model, FSDPModule):
        model.reshard()
