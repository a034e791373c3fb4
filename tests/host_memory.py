"""Under torchrun: load a model in shares, make AdamW's moments, save; each rank writes the memory it took, in bytes.

torchrun --nproc-per-node 2 tests/host_memory.py MODEL OUT
"""

import ctypes
import json
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from node import checkpoint, ranks


def held():
    """Bytes of memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))


def peak(work):
    """The most that work() takes the process to, looked at every few milliseconds."""
    seen, done = [held()], threading.Event()

    def watch():
        while not done.is_set():
            seen.append(held())
            time.sleep(0.003)

    thread = threading.Thread(target=watch)
    thread.start()
    result = work()
    done.set()
    thread.join()
    return max(seen), result


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


def main():
    device = ranks.start()
    before = held()
    loading, model = peak(lambda: checkpoint.load_sharded(sys.argv[1], device))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.0, fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the gradients that were freed would still be held
    state = {"step": 1}
    saving, _ = peak(lambda: checkpoint.save(Path(sys.argv[2]), state, model, NoTokenizer(), optimizer, 1))
    found = ranks.all_gather([[loading - before, saving - before]])
    if ranks.rank() == 0:
        (Path(sys.argv[2]) / "memory.json").write_text(json.dumps(found))
    ranks.stop()


if __name__ == "__main__":
    main()
