"""What the signals cost. Every ratio is of times measured in turns, in one process.

    python -m examples.bench                                            a scoring pass of Qwen3-0.6B's shape
    python -m examples.bench --table layer --lengths 4096 16384 32768   one layer of that shape, against full maps
    python -m examples.bench --table step --repeats 20                  a training step: TRL's, with credit, and ours
    python -m examples.bench --table step --model runs/smollm-words --task countdown-words --prompts 12 --minibatches 2

In the first two tables weights are random (time and memory do not depend on them), on a GPU in bfloat16, on CPUs in
float32. A training step is in bfloat16 where a CPU has it and the model is not small, else in float32.
"""

import ctypes
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from transformers.hf_argparser import HfArg

import metrics
import tasks
import train
from attention import Recorded, fused_attention
from grpo import token_logprobs
from heads import middle_layers
from node import precision
from node.check import time_signals
from node.output import markdown
from node.run import Clock
from node.settings import TINY, fill_defaults, load_config, load_model, parse_args
from rollout import start_actor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SCALE = 128**-0.5
TRL_TOKENS = 8192  # in one of TRL's passes at most: a larger batch is accumulated


@dataclass
class Args:
    """Measure what WAAD and FAI cost."""

    table: Literal["pass", "layer", "step"] = HfArg(
        default="pass", help="A scoring pass, one layer's attention, or a training step."
    )
    lengths: list[int] = HfArg(default_factory=lambda: [1024, 4096], help="Tokens in the sequence.")
    repeats: int = HfArg(default=3, help="Turns; the table shows medians.")
    model: str = HfArg(default=TINY, help="For the step: folder or hub name of a transformers checkpoint.")
    task: str | None = HfArg(default=None, help="For the step: its problems (default: as train.py).")
    prompts: int | None = HfArg(default=None, help="For the step: problems in a batch (default: as train.py).")
    minibatches: int | None = HfArg(default=None, help="For the step: updates from a batch (default: as train.py).")
    max_tokens: int | None = HfArg(default=None, help="For the step: longest response (default: as train.py).")
    maps_to: int = HfArg(default=4096, help="Longest sequence for which maps are made.")


def seconds(run: Callable) -> float:
    """Wall-clock seconds of one call."""
    clock = Clock()
    with clock("run"):
        run()
    return clock.seconds["run"]


def peak_mib(run: Callable) -> float:
    """MiB that one call takes at its peak, beyond what the process held before (Linux or CUDA)."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def status(name: str) -> int:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith(name))

    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or freed memory that is still held would hide the peak
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # reset the peak
    before = status("VmRSS")
    run()
    return (status("VmHWM") - before) / 2**10


def take_turns(runs: dict[str, Callable], repeats: int, label: str) -> dict[str, tuple[float, float]]:
    """{name: (median seconds, peak MiB)}, after one turn to warm up, in which memory is measured."""
    memory = {name: peak_mib(run) for name, run in tqdm(runs.items(), desc=f"{label}, memory", leave=False)}
    turns = [
        {name: seconds(run) for name, run in runs.items()}
        for _ in tqdm(range(repeats), desc=f"{label}, time", leave=False)
    ]
    return {name: (statistics.median(t[name] for t in turns), memory[name]) for name in runs}


def whole_pass(args: Args) -> None:
    """Scoring passes: plain, with signals, with signals and the split measured, and with eager maps."""
    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    # A random model of the shape of Qwen3-0.6B.
    model = Qwen3ForCausalLM(config).to(DEVICE, DTYPE).eval()
    layers = middle_layers(config.num_hidden_layers)
    rows = [["tokens", "scoring pass", "WAAD and FAI alone", "pass with them", "and the split",
             "eager maps of five layers"]]  # fmt: skip
    for n in args.lengths:
        ids = torch.randint(config.vocab_size, (1, n), device=DEVICE)
        mask = torch.arange(n, device=DEVICE)[None] >= 100
        heads = metrics.observe(model, ids[:, :256], mask[:, :256]).heads

        # The passes to be compared.
        def plain(ids=ids, mask=mask) -> None:
            with torch.no_grad():
                token_logprobs(model, ids, mask, entropy=True)

        alone = []

        def signals(ids=ids, mask=mask, heads=heads, alone=alone) -> None:
            with time_signals() as clock:
                metrics.observe(model, ids, mask, heads)
            alone.append(clock.seconds["signals"])

        def eager(ids=ids, mask=mask, heads=heads) -> None:
            # transformers' own maps of the five layers, then WAAD and FAI by their definitions.
            maps: dict[int, Tensor] = {}
            hooks = [
                model.model.layers[layer].self_attn.register_forward_hook(
                    lambda module, _, output: maps.__setitem__(module.layer_idx, output[1])
                )
                for layer in layers
            ]
            model.set_attn_implementation("eager")
            plain(ids, mask)
            model.set_attn_implementation("sdpa")
            for hook in hooks:
                hook.remove()
            local_map, global_map = (
                sum(maps[layer][:, chosen].sum(1) for layer, chosen in zip(layers, group)) / group.sum()
                for group in (heads.is_local, heads.is_global)
            )
            metrics.waad(local_map, mask), metrics.fai(global_map, mask)

        runs = {
            "plain": plain,
            "signals": signals,
            "split": lambda ids=ids, mask=mask: metrics.observe(model, ids, mask),
        }
        if n <= args.maps_to:
            runs["eager"] = eager
        found = take_turns(runs, args.repeats, f"{n} tokens")
        # Times as multiples of the plain pass.
        base, floor = found["plain"]
        cells = [f"{base:.2f} s, {floor:,.0f} MiB", f"{100 * statistics.median(alone) / base:.2f} %"]
        cells += [f"× {found[r][0] / base:.3f}, {found[r][1]:,.0f} MiB" for r in ("signals", "split")]
        cells += [f"× {found['eager'][0] / base:.2f}, {found['eager'][1]:,.0f} MiB" if "eager" in found else "not run"]
        rows.append([f"{n:,}", *cells])
    print(markdown(rows))


def one_layer(args: Args) -> None:
    """One layer's attention of 16 heads (8 key heads) of 128, five of them local, five global."""
    rows = [["tokens", "fused attention", "WAAD, FAI", "FAI to the end", "spans", "maps, then WAAD, FAI"]]
    for n in args.lengths:
        # Random queries and keys; the first five heads are local, the next five global.
        g = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, h, n, 128, generator=g).to(DEVICE, DTYPE) for h in (16, 8))
        mask = torch.arange(n, device=DEVICE)[None] >= 100
        layer = Recorded(q, k, SCALE, fused_attention(q, k, k, SCALE)[1], None)
        is_local, is_global = (torch.arange(16, device=DEVICE) // 5 == i for i in (0, 1))

        # Without maps, and with them.
        def signals(horizon=(10, 100), layer=layer, mask=mask, is_local=is_local, is_global=is_global) -> None:
            metrics.streamed_waad([(layer, is_local)], mask).mean(1)
            metrics.streamed_fai([(layer, is_global)], mask, horizon).mean(1)

        def maps(q=q, k=k, n=n, mask=mask, is_local=is_local, is_global=is_global) -> None:
            scores = (q @ k.repeat_interleave(2, 1).mT) * SCALE
            future = torch.ones(n, n, dtype=torch.bool, device=DEVICE).triu(1)
            a = scores.masked_fill_(future, -torch.inf).softmax(-1, torch.float32)  # [1,16,N,N]
            metrics.waad(a[:, is_local].mean(1), mask), metrics.fai(a[:, is_global].mean(1), mask)

        runs = {
            "fused": lambda q=q, k=k: fused_attention(q, k, k, SCALE),
            "signals": signals,
            "end": lambda signals=signals: signals((10, None)),
            "spans": lambda layer=layer, mask=mask: metrics.streamed_spans(layer, mask),
        }
        if n <= args.maps_to:
            runs["maps"] = maps
        found = take_turns(runs, args.repeats, f"{n} tokens")
        cells = [f"{found[r][0]:.3f} s, {found[r][1]:,.0f} MiB" if r in found else "not run"
                 for r in ("fused", "signals", "end", "spans", "maps")]  # fmt: skip
        rows.append([f"{n:,}", *cells])
    print(markdown(rows))


def whole_step(args: Args) -> None:
    """Training steps, in turns: TRL's GRPOTrainer, the same with coupled credit, and ours.

    The same problems and settings, the same precision, and a learning rate so small that TRL's two turns sample the
    same rollouts, or nearly. TRL generates with transformers: its vLLM mode wants a GPU. One
    trainer takes both of TRL's turns, because with uniform credit it is TRL's to the bit.
    """
    from datasets import Dataset

    from examples.trl_rhythm import GRPOConfig, RhythmGRPOTrainer

    # 1. Our side: train.py's settings, model and sampler.
    given = {name: getattr(args, name) for name in ("model", "task", "prompts", "minibatches", "max_tokens")}
    ours, _ = fill_defaults(train.Args(lr=1e-6, **given), train.DEFAULTS, args.model)
    auto = precision.choose_dtype("auto", load_config(args.model))
    ours = replace(ours, dtype=auto if DEVICE == "cpu" else "float32")  # alone on a GPU nothing here is sharded
    size, left = divmod(ours.prompts * ours.group, ours.minibatches)
    if left or ours.max_tokens > TRL_TOKENS:
        raise ValueError(f"--minibatches {ours.minibatches} must divide the {ours.prompts * ours.group} rollouts, and "
                         f"--max_tokens {ours.max_tokens} be {TRL_TOKENS} or less")  # fmt: skip
    problems = tasks.load(ours.task, "train")
    model, tokenizer = load_model(ours.model)
    actor = start_actor("vllm", ours.model, ours.max_model_len, 0, ours.kv_cache_gib, dtype=ours.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), ours.lr, weight_decay=0.0, fused=True)
    generator, heads = torch.Generator().manual_seed(0), None

    # 2. Who takes which turn, and what is noted of it.
    by_prompt = {p.prompt: p for p in problems}
    names = {"uniform": "TRL", "coupled": "TRL, coupled"}
    turns: list[dict[str, float]] = [{}]
    added: list[float] = []  # share of TRL's coupled steps that is neither TRL's nor the scoring pass it makes anyway
    phases: list[dict[str, float]] = []

    class Timed(RhythmGRPOTrainer):
        """Adds up what credit takes: everything that is not TRL's own, its way to log-probs included."""

        credit_seconds = 0.0

        def _observe(self, *args):
            start = time.perf_counter()
            found = super()._observe(*args)
            self.credit_seconds += time.perf_counter() - start
            return found

        def _score(self, *args, **kwargs):
            start = time.perf_counter()
            found = super()._score(*args, **kwargs)
            self.credit_seconds -= time.perf_counter() - start
            return found

        def _shape(self, *args):
            start = time.perf_counter()
            found = super()._shape(*args)
            self.credit_seconds += time.perf_counter() - start
            return found

    class TakeTurns(TrainerCallback):
        """TRL makes its steps (one batch of rollouts) with each credit; then ours learns from the same problems."""

        start = 0.0

        def on_step_begin(self, config, state, control, **kwargs) -> None:
            if state.global_step % ours.minibatches == 0:
                first = ["uniform", "coupled"][len(turns) % 2]  # each comes first in every other turn
                trainer.credit = first if not turns[-1] else ({"uniform", "coupled"} - {first}).pop()
                torch.manual_seed(len(turns))  # the same rollouts with both
                self.start, trainer.credit_seconds = time.perf_counter(), 0.0

        def on_step_end(self, config, state, control, **kwargs) -> None:
            nonlocal heads
            if state.global_step % ours.minibatches:
                return
            turns[-1][names[trainer.credit]] = whole = time.perf_counter() - self.start
            if trainer.credit == "coupled":
                added.append(trainer.credit_seconds / whole)
            if len(turns[-1]) < 2:
                return
            batch, before = problems[(len(turns) - 1) * ours.prompts :][: ours.prompts], clock.seconds["signals"]
            kept = heads if (len(turns) - 1) % ours.heads_every else None
            record, heads = train.train_step(ours, model, optimizer, actor, batch, kept, generator)
            turns[-1]["ours, coupled"] = sum(record["seconds"].values())
            signals = clock.seconds["signals"] - before  # a part of the scoring pass
            phases.append(record["seconds"] | {"score": record["seconds"]["score"] - signals, "WAAD and FAI": signals})
            bar.set_postfix({name: f"{seconds:.1f} s" for name, seconds in turns[-1].items()})
            turns.append({})
            bar.update()

    # 3. TRL's side: the same settings, in passes of at most TRL_TOKENS tokens.
    pieces = next(n for n in range(1, size + 1) if size % n == 0 and size * ours.max_tokens <= n * TRL_TOKENS)
    batches = [problems[i * ours.prompts :][: ours.prompts] for i in range(args.repeats + 1) for _ in names]
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=DEVICE == "cpu", bf16=ours.dtype == "bfloat16", report_to="none",
        disable_tqdm=True, save_strategy="no", logging_strategy="no", gradient_checkpointing=False,
        shuffle_dataset=False,
        max_steps=len(batches) * ours.minibatches,
        per_device_train_batch_size=size // pieces, gradient_accumulation_steps=pieces,
        steps_per_generation=ours.minibatches * pieces, num_generations=ours.group,
        max_completion_length=ours.max_tokens,
        learning_rate=ours.lr, beta=0.0, loss_type="grpo", epsilon=ours.epsilon, temperature=1.0,
        optim="adamw_torch_fused",
    )  # fmt: skip
    trainer = Timed(
        model=load_model(ours.model)[0],
        processing_class=tokenizer,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": p.prompt} for batch in batches for p in batch]),
        callbacks=[TakeTurns()],
        reward_funcs=lambda prompts, completions, **_: [
            tasks.get(ours.task).reward(by_prompt[p], c) for p, c in zip(prompts, completions)
        ],
    )
    trainer.remove_callback(PrinterCallback)

    # 4. Run, and print the medians over the turns.
    with tqdm(total=args.repeats + 1, desc="turns") as bar, time_signals() as clock:
        trainer.train()
    actor.close()
    turns, added, phases = turns[1:-1], added[1:], phases[1:]  # the first turn warms up, the last has not begun
    rows = [[f"{ours.prompts * ours.group} rollouts, {ours.dtype}", "s", "of TRL's time", "lowest and highest turn"]]
    for name in turns[0]:
        seconds, ratios = ([t[name] / (t["TRL"] if ratio else 1) for t in turns] for ratio in (False, True))
        middle = statistics.median(ratios)
        rows.append(
            [name, f"{statistics.median(seconds):.2f}", f"{middle:.3f}", f"{min(ratios):.3f}, {max(ratios):.3f}"]
        )
    print(markdown(rows))
    print(f"\nTRL, coupled: credit takes {100 * statistics.median(added):.1f} % of a step "
          f"({100 * min(added):.1f} to {100 * max(added):.1f}), measured within it")  # fmt: skip
    parts = ["generate", "score", "WAAD and FAI", "credit", "update", "reload"]
    whole = sum(p[n] for p in phases for n in parts)
    print("ours, coupled: " + ", ".join(f"{n} {100 * sum(p[n] for p in phases) / whole:.1f} %" for n in parts))


def main(args: Args) -> None:
    if min(args.lengths) <= 256 or args.repeats < 1:
        sys.exit("error: --lengths above 256 and --repeats of 1 or more, please")
    kind = DEVICE if args.table == "step" else f"{DEVICE}, {DTYPE}"
    print(f"{kind}, {torch.get_num_threads()} threads, medians of {args.repeats}\n")
    try:
        {"pass": whole_pass, "layer": one_layer, "step": whole_step}[args.table](args)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main(parse_args(Args))
