"""What the credit costs in verl's scoring pass, measured on a CPU:

    PYTHONPATH=.:examples OMP_NUM_THREADS=1 .venv-verl/bin/python tests/with_verl/cost.py

One worker of verl's scores a batch in turns: as verl does (rows packed), with credit, and as with credit (a row for
each response) but without reading the signals. Each turn gives ratios, and their medians are printed. Times are this
process's CPU time. So it matters little what else the machine does.
"""

import conftest  # noqa: F401  isort: skip
import tempfile
import time
from statistics import median

import parts
import torch
import verl_rhythm
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from verl.utils import tensordict_utils as tu

from metrics import Signals

TURNS = 7


def make_model(folder: str) -> str:
    """A Qwen3 with 11 million random weights, in a folder."""
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


def scores_only(model, ids, mask, heads, window, horizon, score) -> Signals:
    """In the place of observe: the same pass, in which nothing is recorded."""
    with torch.no_grad():
        logprobs, entropy = score(model, ids, mask, entropy=True)
    return Signals(logprobs, entropy, torch.zeros_like(logprobs), torch.zeros_like(logprobs), heads)


def measure(name: str, path: str, vocabulary: int, rows: int, lengths: tuple[int, int]) -> None:
    worker = parts.start_worker(path, tokens=4096)
    batch = parts.make_batch(vocabulary, rows, lengths=lengths)
    with_credit, again = batch.clone(), batch.clone()
    tu.assign_non_tensor(with_credit, rhythm=dict(credit="coupled", heads_every=10**9))
    tu.assign_non_tensor(again, rhythm=dict(credit="coupled", heads_every=1))
    worker.infer_batch(batch.clone())  # the first passes are slow
    worker.infer_batch(with_credit.clone())

    own, credit, split, unread = [], [], [], []  # seconds
    observe = verl_rhythm.observe
    for _ in range(TURNS):
        own.append(time_of(worker.infer_batch, batch.clone()))
        credit.append(time_of(worker.infer_batch, with_credit.clone()))
        split.append(time_of(worker.infer_batch, again.clone()))
        verl_rhythm.observe = scores_only
        unread.append(time_of(worker.infer_batch, with_credit.clone()))
        verl_rhythm.observe = observe

    # An update on the same batch.
    train = batch.clone()
    sizes = batch["responses"].offsets().diff()
    train["old_log_probs"] = parts.jagged([torch.zeros(int(n)) for n in sizes])
    train["advantages"] = parts.jagged([torch.ones(int(n)) for n in sizes])
    tu.assign_non_tensor(train, mini_batch_size=rows, global_batch_size=rows, compute_loss=True)
    update = median(time_of(worker.train_mini_batch, train.clone()) for _ in range(3))

    def ratio(of: list[float], to: list[float]) -> str:
        ratios = [x / y for x, y in zip(of, to)]
        return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    tokens = int(batch["input_ids"].offsets()[-1])
    print(
        f"| {name} | {tokens:,} | {median(own):.2f} s | {ratio(credit, own)} | {ratio(credit, unread)} | "
        f"{ratio(split, unread)} | {update / median(own):.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    print("| model | tokens | verl's | credit / verl's | credit / unread | with split / unread | update / verl's |")
    print("|---|---|---|---|---|---|---|")
    measure("the tiny model, 1.4 million weights", parts.TINY, 30, rows=64, lengths=(20, 128))
    with tempfile.TemporaryDirectory() as folder:
        measure("Qwen3, 11 million random weights", make_model(folder), 4096, rows=16, lengths=(200, 500))
