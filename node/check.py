"""Is this machine ready for a long run? One line per check: ok, or what is wrong and what to do. Under five minutes.

    python -m node.check                                 with the tiny model
    python -m node.check --model Qwen/Qwen3-0.6B         the step and the reload with this model
    python -m node.check --engine torch                  without vLLM

On a machine without a GPU it checks what a CPU can run. The exit status is 0 if all checks passed.
"""

import importlib.metadata
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
    set_seed,
)
from transformers.hf_argparser import HfArg

import attention
import grpo
import heads
import metrics
import tasks
from node import checkpoint, memory, precision, ranks, replay
from node.output import minutes
from node.prepare import describe_attention
from node.run import Clock, gap_limit_at_start
from node.settings import TINY, fill_defaults, load_config, load_tokenizer, parse_args
from node.stale import count_comparable, find_stale_weight, try_reload
from rollout import start_actor

ROOT = Path(__file__).parents[1]
CREDIT_LIMIT = 0.1  # share of a step; a few per cent are normal, so above this something is wrong on this machine


@dataclass
class Args:
    """Check that this machine can train: versions, numbers, a whole step, the reload, a kill, memory, cost, ranks."""

    model: str = HfArg(default=TINY, help="Folder or hub name of the model for the step and the reload.")
    engine: Literal["vllm", "torch"] = HfArg(
        default="vllm", help="The sampler; torch is transformers' generate, for machines without vLLM."
    )


class Failed(Exception):
    """A check did not pass: what is wrong, and what to do."""


def require(holds: bool, wrong: str) -> None:
    """Raise Failed, with what is wrong, unless it holds."""
    if not holds:
        raise Failed(wrong)


def device_and_dtype() -> tuple[torch.device, torch.dtype]:
    """Where this machine trains, and in what type: bfloat16 on a GPU, float32 on a CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device()), torch.bfloat16
    return torch.device("cpu"), torch.float32


def versions(args: Args) -> str:
    """The installed versions, and whether torch can use the GPU."""
    pinned = dict(re.findall(r"^([a-z-]+)==([0-9.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("torch", "transformers", "vllm"):
        for installed in (name, f"{name}-cpu"):
            try:
                found[name] = importlib.metadata.version(installed)
            except importlib.metadata.PackageNotFoundError:
                continue
    require(
        "vllm" in found or args.engine == "torch",
        "vLLM is not installed: pip install -r requirements.txt, or --engine torch",
    )
    require(
        torch.cuda.is_available() or shutil.which("nvidia-smi") is None,
        f"nvidia-smi is here and torch {torch.__version__} cannot use a GPU: its CUDA is newer than the driver, or it "
        "is a CPU build. Update the driver, or install the torch that requirements.txt pins",
    )
    other = [f"{name} {v}, not {pinned[name]}" for name, v in found.items() if v.split("+")[0] != pinned.get(name, v)]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    where = f"{len(gpus)} x {gpus[0]}, CUDA {torch.version.cuda}" if gpus else f"CPU, {torch.get_num_threads()} threads"
    tested = f"; tested with others: {', '.join(other)}" if other else ""
    return ", ".join(f"{name} {v}" for name, v in found.items()) + f"; {where}{tested}"


SHAPE = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
             max_position_embeddings=512)  # fmt: skip
KINDS: dict[str, PreTrainedConfig] = {
    "plain causal": LlamaConfig(**SHAPE, num_key_value_heads=4),
    "grouped heads": Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16),
    "sliding window": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=24),
}


def signals(args: Args) -> str:
    """Compare WAAD, FAI and spans, in this machine's precision, with those of full maps."""
    device, dtype = device_and_dtype()
    worst = {"WAAD": 0.0, "FAI": 0.0, "span": 0.0}
    for kind, config in KINDS.items():
        # A small random model and a batch.
        set_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                p.data *= 12  # fresh weights attend almost evenly; this makes maps with peaks
        model = model.to(device, dtype)
        ids = torch.randint(0, 64, (2, 200), device=device)
        mask = (torch.arange(200, device=device) >= 8) & (torch.arange(200, device=device) < 190).expand(2, -1)
        # Without maps, and by the definitions on full maps of the same queries and keys.
        got = metrics.observe(model, ids, mask)
        maps = full_maps(model, ids, got.heads.layers)
        spans = torch.stack([heads.head_spans(m, mask) for m in maps])
        local_map, global_map = (
            torch.cat([m[:, chosen] for m, chosen in zip(maps, group)], 1).mean(1)
            for group in (got.heads.is_local, got.heads.is_global)
        )
        for name, ours, theirs in (
            ("WAAD", got.waad, metrics.waad(local_map, mask)),
            ("FAI", got.fai, metrics.fai(global_map, mask)),
            ("span", got.heads.spans, spans),
        ):
            worst[name] = max(worst[name], (ours - theirs).abs().max().item())
            limit = {"WAAD": 1e-3, "FAI": 1e-4, "span": 1e-2}[name]
            require(
                worst[name] < limit,
                f"{kind}: {name} differs from full maps by {worst[name]:.2g} (limit {limit:g}). The fused attention of "
                "this torch returns another log-sum-exp: use the pinned torch, or --credit uniform",
            )
        # Are the queries and keys right? In float32, against transformers' eager maps.
        model = model.float()  # in bfloat16 two passes that round differently drift apart from layer to layer
        maps = full_maps(model, ids, got.heads.layers)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            eager = model(ids, output_attentions=True).attentions
        apart = max((eager[layer] - m).abs().max().item() for layer, m in zip(got.heads.layers, maps))
        require(apart < 1e-4, f"{kind}: our maps differ from transformers' eager ones by {apart:.2g} (limit 1e-4)")
    return (
        f"{dtype}".removeprefix("torch.")
        + ", largest differences "
        + ", ".join(f"{name} {x:.0e}" for name, x in worst.items())
    )


def full_maps(model, ids: Tensor, layers: list[int]) -> list[Tensor]:
    """The layers' maps [B,H,N,N] from recorded queries and keys, by a softmax in float64."""
    with torch.no_grad(), attention.recording(model, layers) as recorded:
        model(ids)
    maps = []
    for layer in recorded.values():
        key = layer.key.repeat_interleave(layer.query.shape[1] // layer.key.shape[1], 1).double()
        scores = layer.query.double() @ key.mT * layer.scale
        n = scores.shape[-1]
        seen = (
            torch.ones(n, n, dtype=torch.bool, device=ids.device).tril() if layer.attn_mask is None else layer.attn_mask
        )
        maps.append(scores.masked_fill(~seen, -torch.inf).softmax(-1).float())
    return maps


def long_spans(args: Args) -> str:
    """The span of a head that looks near, 32,768 tokens from the start: a small difference of large positions."""
    device, dtype = device_and_dtype()
    n, d = 2**15, 32
    angle = torch.arange(n, device=device).double()[:, None] * 1000.0 ** -(
        torch.arange(d // 2, device=device) / (d // 2)
    )
    q = torch.cat([angle.cos(), angle.sin()], -1)[None, None].to(dtype)  # scores depend on t - s, highest at 0
    rows = torch.arange(n - 40, n, device=device)
    back = rows[:, None] - torch.arange(n, device=device)
    scores = (q[0, 0, rows].double() @ q[0, 0].double().T).masked_fill(back < 0, -torch.inf)
    want = (scores.softmax(-1) * back).sum(-1).mean().item()
    layer = attention.Recorded(q, q, 1.0, None, None)  # spans do not look at the log-sum-exp
    got = metrics.streamed_spans(layer, (torch.arange(n, device=device) >= n - 40)[None]).item()
    require(
        abs(got / want - 1) < 1e-3,
        f"{got:.3f} tokens, not {want:.3f}: fused attention in float32 is not exact here (TF32?): "
        'torch.set_float32_matmul_precision("highest")',
    )
    return f"{got:.3f} tokens, exactly {want:.3f}"


class Loop:
    """A model, an optimizer and a sampler as train.py has them, for a few small steps."""

    def __init__(self, args: Args, train):
        self.train = train
        self.args, _ = fill_defaults(
            train.Args(model=args.model, engine=args.engine, prompts=4, group=4, minibatches=2),
            train.DEFAULTS,
            args.model,
        )
        dtype = precision.choose_dtype("auto", load_config(args.model))
        self.args = replace(self.args, max_tokens=min(64, self.args.max_tokens), dtype=dtype)
        device = ranks.start()
        self.model = checkpoint.load_sharded(args.model, device, dtype)
        self.tokenizer = load_tokenizer(args.model, self.args.max_model_len)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.args.lr, weight_decay=0.0, fused=True)
        self.actor = start_actor(
            args.engine, args.model, self.args.max_model_len, 0, self.args.kv_cache_gib, self.model, self.tokenizer,
            sleep_mode=True, dtype=dtype,
        )  # fmt: skip
        set_seed(0)
        self.problems, self.made, self.heads = tasks.load(self.args.task, "train", 64), 0, None

    def step(self) -> dict:
        """One training step; its record."""
        batch = [self.problems[(4 * self.made + i) % 64] for i in range(4)]
        self.made += 1
        generator = torch.Generator().manual_seed(self.made)
        record, self.heads = self.train.train_step(
            self.args, self.model, self.optimizer, self.actor, batch, self.heads, generator
        )
        return record

    def close(self) -> None:
        """Stop the sampler."""
        self.actor.close()


def steps(loop: Loop) -> str:
    """Two whole steps: sample, verify, score, credit, update, reload; on a GPU the sampler sleeps and wakes."""
    records = [loop.step() for _ in range(2)]
    limit = gap_limit_at_start(loop.args.dtype)
    stale = [r["stale_weight"] for r in records if r["stale_weight"]]
    require(not stale, f"after a reload the sampler does not hold {stale[:1]} as the trainer does: use the pinned vLLM")
    gap = max(r["gap_mean"] for r in records)
    require(gap < limit, f"the sampler's log-probabilities differ from the trainer's by {gap:.2g} on average: as above")
    require(all(r["skipped"] == 0 for r in records), "a gradient was not finite")
    runner = describe_runner(loop.actor)
    slept = "slept and woke" if getattr(loop.actor, "sleeps", False) else "no sleep on this device"
    where = describe_attention(loop.model, loop.heads.layers)
    return f"gap {gap:.0e}, reward {records[-1]['reward']:.2f}, {slept}{runner}; {where}"


def describe_runner(actor) -> str:
    """Which of vLLM's model runners is at work on a GPU, and how to take the other one. vLLM chooses by model."""
    if not hasattr(actor, "llm") or not torch.cuda.is_available():
        return ""
    if actor.llm.llm_engine.vllm_config.use_v2_model_runner:
        return ", vLLM's model runner V2 (VLLM_USE_V2_MODEL_RUNNER=0 takes V1, should V2 fail)"
    return ", vLLM's model runner V1"


def reload(loop: Loop) -> str:
    """Compare every weight of vLLM with the trainer's, and check that a skipped reload is noticed.

    Some of vLLM's weights cannot be compared, so its responses are compared too: sleep and reload must not change them.
    """
    if loop.args.engine == "torch":
        return "not needed: --engine torch samples the trainer's own weights"
    try_reload(loop.actor, loop.model, loop.problems, loop.args.max_tokens, loop.args.dtype)
    apart = compare_responses(loop)
    generator, everything = torch.Generator().manual_seed(0), 10**6
    different = find_stale_weight(loop.actor, loop.model, generator, everything)
    require(different is None, f"{different} is not the trainer's after a reload: use the pinned vLLM")
    with torch.no_grad():
        for p in loop.model.parameters():
            p.mul_(1.01)
    noticed = find_stale_weight(loop.actor, loop.model, generator)
    loop.actor.sleep()
    loop.actor.reload(loop.model)
    require(noticed is not None, "a skipped reload was not noticed: a stale sampler would go on unseen")
    different = find_stale_weight(loop.actor, loop.model, generator, everything)
    require(different is None, f"{different} is not the trainer's after a reload: use the pinned vLLM")
    compared, count = count_comparable(loop.actor, loop.model)
    return (
        f"compared {compared} of {count} tensors, all equal; after sleep and reload the same responses, within "
        f"{apart:.0e}; a skipped reload is noticed at {noticed}"
    )


def compare_responses(loop: Loop) -> float:
    """Sample greedily before and after sleep and reload of the same weights. Returns how far log-probs differ."""

    def respond() -> list:
        prompts = [problem.prompt for problem in loop.problems[:8]]
        return [response for (response,) in loop.actor.generate(prompts, max_tokens=16, temperature=0.0)]

    before = respond()
    loop.actor.sleep()
    loop.actor.reload(loop.model)
    after = respond()
    different = sum(a.ids != b.ids for a, b in zip(before, after))
    require(
        not different,
        f"{different} of {len(before)} greedy responses differ after a reload of the same weights: use the pinned vLLM",
    )
    apart = max(abs(x - y) for a, b in zip(before, after) for x, y in zip(a.logprobs, b.logprobs))
    limit = gap_limit_at_start(loop.args.dtype)
    require(
        apart < limit, f"a reload of the same weights changes log-probabilities by {apart:.2g}: use the pinned vLLM"
    )
    return apart


@contextmanager
def time_signals() -> Iterator[Clock]:
    """Within the context, clock.seconds["signals"] is the time that observe() spends on WAAD and FAI."""
    clock, own = Clock(), {name: getattr(metrics, name) for name in ("streamed_waad", "streamed_fai")}

    def timed(function: Callable) -> Callable:
        def run(*inputs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # or the pass before it would be counted here
            with clock("signals"):
                return function(*inputs)

        return run

    try:
        for name, function in own.items():
            setattr(metrics, name, timed(function))
        yield clock
    finally:
        for name, function in own.items():
            setattr(metrics, name, function)


def cost(loop: Loop) -> str:
    """The share of a step that WAAD, FAI and gamma take on this machine."""
    shares = []
    for _ in range(3):
        with time_signals() as clock:
            seconds = loop.step()["seconds"]
        shares.append((clock.seconds.get("signals", 0.0) + seconds["credit"]) / sum(seconds.values()))
    share = statistics.median(shares)
    require(
        share < CREDIT_LIMIT, f"{100 * share:.1f} % of a step; a few per cent are expected: python -m examples.bench"
    )
    return f"{100 * share:.1f} % of a step of {loop.args.prompts * loop.args.group} rollouts"


PATIENCE = 600  # seconds that a small run may take to its first checkpoint
SMALL = ["--prompts", "4", "--group", "4", "--minibatches", "2", "--eval_problems", "4", "--max_tokens", "64",
         "--save_every", "1", "--eval_every", "0"]  # fmt: skip


def run_and_kill(folder: Path, engine: str) -> None:
    """Start a run of the tiny model, and kill it when its first checkpoint is there."""
    command = [sys.executable, "train.py", *SMALL, "--engine", engine, "--steps", "50", "--out", str(folder)]
    said, end = folder.with_name("said"), time.monotonic() + PATIENCE
    with said.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        while process.poll() is None and not checkpoint.list_checkpoints(folder) and time.monotonic() < end:
            time.sleep(0.1)
        process.kill()
        process.wait()
    lines = said.read_text().strip().splitlines()
    require(bool(checkpoint.list_checkpoints(folder)), f"no checkpoint was written: {lines[-1:]}")


def kill_and_resume(args: Args) -> str:
    """Kill a small run with kill -9 after a checkpoint, resume it, and check that it ends."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        run_and_kill(folder, args.engine)
        at = int(checkpoint.list_checkpoints(folder)[-1].name.removeprefix("checkpoint-"))
        command = [sys.executable, "train.py", "--resume", str(folder), "--steps", str(at + 2)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        require(done.returncode == 0, f"it did not go on: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logged = [r["step"] for r in records if "reward" in r]
        require(logged == list(range(1, at + 3)), f"its log has the steps {logged}, not 1 to {at + 2}")
    return f"killed after step {at}, went on to step {at + 2}"


def memory_formula(args: Args) -> str:
    """Compare the memory of a training pass with the formula of node/memory.py."""
    # What the formula says of a model that fits anywhere.
    device, _ = device_and_dtype()
    on_gpu = device.type == "cuda"
    shape = Qwen3Config(
        vocab_size=8192, hidden_size=1024 if on_gpu else 128, intermediate_size=3072 if on_gpu else 384,
        num_hidden_layers=12 if on_gpu else 4, num_attention_heads=8, num_key_value_heads=4,
        head_dim=128 if on_gpu else 32, tie_word_embeddings=True,
    )  # fmt: skip
    set_seed(0)
    tokens = 2048 if on_gpu else 256
    gib = memory.estimate(shape, 1, tokens, dtype_bytes=2 if on_gpu else 4)
    if on_gpu:
        torch.cuda.empty_cache()
    # Two steps of that model.
    before = torch.cuda.memory_allocated() if on_gpu else 0
    ranks.start()
    model = ranks.shard(AutoModelForCausalLM.from_config(shape, dtype=torch.float32), device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)
    ids = torch.randint(0, 8192, (1, tokens), device=device)
    mask = torch.arange(tokens, device=device)[None] >= 8
    for turn in range(2):  # the second has the moments as well
        if on_gpu and turn:
            torch.cuda.reset_peak_memory_stats()
        grpo.token_logprobs(model, ids, mask)[0].sum().backward()
        gradients = [p.grad for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    # On a GPU the peak is measured; on a CPU only the sizes of what stays are known.
    if on_gpu:
        measured, expected = (torch.cuda.max_memory_allocated() - before) / memory.GIB, gib["train"]
        tolerance = 0.15
    else:
        moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
        measured = sum(x.nbytes for x in [*model.parameters(), *gradients, *moments]) / memory.GIB
        expected, tolerance = gib["weights"] + gib["gradients"] + gib["AdamW"], 0.001
    require(
        abs(measured / expected - 1) < tolerance,
        f"{measured:.3f} GiB, the formula says {expected:.3f}: leave that much more room than --dry_run asks for",
    )
    what = "peak of a pass" if on_gpu else "weights, gradients and moments"
    return f"{what}: {measured:.3f} GiB, by the formula {expected:.3f}"


def compare_replays(one: list[dict], two: list[dict]) -> float:
    """The largest difference between the losses of two replays. Raises Failed if it is more than rounding."""
    apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two))
    norms = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(one, two))
    limits = (1e-4, 1e-3) if not torch.cuda.is_available() else (2e-3, 0.05)
    require(
        apart < limits[0] and norms < limits[1],
        f"losses differ by {apart:.2g}, gradient norms by {100 * norms:.2g} %: the ranks do not talk (NCCL?) or the "
        "passes are not shared as they should be",
    )
    return apart


def two_ranks(args: Args) -> str:
    """Check that two ranks learn from given rollouts what one rank learns."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        return "not checked: one GPU"
    with tempfile.TemporaryDirectory() as folder:
        rollouts, records = Path(folder) / "rollouts", []
        replay.record_rollouts(rollouts)
        for count in (1, 2):
            out = Path(folder) / str(count)
            command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone", "-m",
                       "node.replay", str(rollouts), str(out)]  # fmt: skip
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
            last = (done.stderr.strip().splitlines() or ["?"])[-1]
            require(done.returncode == 0, f"torchrun with {count} process(es) failed: {last}")
            records.append(json.loads(out.read_text()))
    return f"losses of three steps differ by {compare_replays(*records):.0e}"


def main(args: Args, train) -> None:
    """All checks. train: the module, whose step is checked."""
    began, failed = time.perf_counter(), []
    with ranks.errors_in_one_line():
        load_config(args.model)

    def check(name: str, run: Callable[[], str]) -> None:
        start = time.perf_counter()
        try:
            verdict, text = "ok  ", run()
        except Failed as e:
            verdict, text = "FAIL", str(e)
        except (Exception, SystemExit) as e:  # whatever it is, the other checks still tell something
            verdict, text = "FAIL", f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
        failed.extend([name] if verdict == "FAIL" else [])
        print(f"{verdict} {name:<22} {text} ({time.perf_counter() - start:.0f} s)", flush=True)

    check("versions", lambda: versions(args))
    check("signals", lambda: signals(args))
    check("spans at 32k", lambda: long_spans(args))
    check("memory formula", lambda: memory_formula(args))
    loops: list[Loop] = []

    def first_of(run: Callable[[Loop], str]) -> str:
        loops.append(Loop(args, train))
        return run(loops[0])

    check("two steps", lambda: first_of(steps))
    for name, run in (("reload", reload), ("cost of the credit", cost)):
        # A second engine would fail for another reason: vLLM allows one in a process.
        check(name, lambda run=run: run(loops[0]) if loops else require(False, "the loop could not be started: above"))
    for one in loops:
        one.close()
    check("kill and resume", lambda: kill_and_resume(args))
    check("two ranks", lambda: two_ranks(args))
    ranks.stop()
    took = minutes(time.perf_counter() - began)
    if failed:
        sys.exit(f"{len(failed)} of 9 checks failed in {took}: {', '.join(failed)}")
    print(f"all 9 checks passed in {took}: this machine can train")


if __name__ == "__main__":
    import train  # here, so that nothing in this folder depends on the loop

    main(parse_args(Args), train)
