"""What the credit costs in verl's scoring pass, measured on a CPU:

    PYTHONPATH=.:examples OMP_NUM_THREADS=1 .venv-verl/bin/python tests/with_verl/cost.py

One worker of verl's scores a batch with and without credit in turns. Each pair gives a ratio, and the median is
printed. Times are this process's CPU time. So it matters little what else the machine does.
"""

import conftest  # noqa: F401  isort: skip
import tempfile
import time
from statistics import median

import parts
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from verl.utils import tensordict_utils as tu

PAIRS = 7


def make_model(folder: str) -> str:
    """A Qwen3 with 8 million random weights, in a folder."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=9, num_attention_heads=8, head_dim=64)
    config = Qwen3Config(vocab_size=4096, num_key_value_heads=4, eos_token_id=1, pad_token_id=0, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(parts.TINY).save_pretrained(folder)
    return folder


def time_of(call, *args) -> float:
    start = time.process_time()
    call(*args)
    return time.process_time() - start


def measure(name: str, path: str, vocabulary: int, rows: int, lengths: tuple[int, int]) -> None:
    worker = parts.start_worker(path, tokens=4096)
    batch = parts.make_batch(vocabulary, rows, lengths=lengths)
    with_credit, again = batch.clone(), batch.clone()
    tu.assign_non_tensor(with_credit, rhythm=dict(credit="coupled", heads_every=10**9))
    tu.assign_non_tensor(again, rhythm=dict(credit="coupled", heads_every=1))
    worker.infer_batch(batch.clone())  # the first passes are slow
    worker.infer_batch(with_credit.clone())

    ratios, with_split, seconds = [], [], []
    for _ in range(PAIRS):
        seconds.append(time_of(worker.infer_batch, batch.clone()))
        ratios.append(time_of(worker.infer_batch, with_credit.clone()) / seconds[-1])
        with_split.append(time_of(worker.infer_batch, again.clone()) / seconds[-1])

    # An update on the same batch.
    train = batch.clone()
    sizes = batch["responses"].offsets().diff()
    train["old_log_probs"] = parts.jagged([torch.zeros(int(n)) for n in sizes])
    train["advantages"] = parts.jagged([torch.ones(int(n)) for n in sizes])
    tu.assign_non_tensor(train, mini_batch_size=rows, global_batch_size=rows, compute_loss=True)
    updates = [time_of(worker.train_mini_batch, train.clone()) / median(seconds) for _ in range(3)]

    ratio, split, update = median(ratios), median(with_split), median(updates)
    extra = 0.9 * (ratio - 1) + 0.1 * (split - 1)  # the split is measured at one batch of ten
    tokens = int(batch["input_ids"].offsets()[-1])
    print(
        f"| {name} | {tokens:,} | {median(seconds):.2f} s | {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
        f"{split:.2f} | {update:.1f} | {100 * extra / (1 + update):.1f} % |",
        flush=True,
    )


if __name__ == "__main__":
    print("| model | tokens | scoring pass | with credit, ratio | measuring the split too | update, ratio | extra |")
    print("|---|---|---|---|---|---|---|")
    measure("the tiny model, 1.4 million weights", parts.TINY, 30, rows=64, lengths=(20, 128))
    with tempfile.TemporaryDirectory() as folder:
        measure("Qwen3, 8 million random weights", make_model(folder), 4096, rows=16, lengths=(200, 500))
