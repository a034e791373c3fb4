"""The formula against small models that are measured: saved tensors, peaks, optimizer states, FSDP2's shards."""

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Qwen3Config,
)

import grpo
from node import memory, prepare

VOCABULARY = 1000
BYTES = {torch.float32: 4, torch.bfloat16: 2}


def config(layers=4, hidden=256, tied=True, heads=8, kind=Qwen3Config):
    return kind(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=3 * hidden, num_attention_heads=heads,
        num_key_value_heads=2, head_dim=32, vocab_size=VOCABULARY, tie_word_embeddings=tied,
        attn_implementation="sdpa",
    )  # fmt: skip


def make(config, dtype=torch.float32, checkpointing=False):
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def batch(rows, length):
    ids = torch.randint(0, VOCABULARY, (rows, length))
    return ids, torch.arange(length).expand(rows, length) >= 4


def saved_bytes(model, ids, mask):
    """What one pass saves for its backward pass, each storage once, without the weights; and the pass's result."""
    weights, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = grpo.token_logprobs(model, ids, mask)[0]  # holds the graph, so that no storage is freed and used again
    return sum(size for pointer, size in saved.items() if pointer not in weights), result


def peak_bytes(work):
    """The most that work() holds at any one time beyond what is there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("dtype", BYTES, ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("shape", [(4, 256, 4, 64), (10, 128, 2, 200), (4, 512, 3, 128)], ids=str)
def test_activations_are_those_that_a_pass_saves(shape, checkpointing, dtype, monkeypatch):
    layers, hidden, rows, length = shape
    monkeypatch.setattr(grpo, "CHUNK", 16 * VOCABULARY)  # the logits run in chunks and are not kept
    model = make(config(layers, hidden), dtype, checkpointing)
    measured, _ = saved_bytes(model, *batch(rows, length))
    kept, _ = memory.activations(model.config, BYTES[dtype], checkpointing)
    assert rows * length * kept == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("dtype", BYTES, ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_the_peak_of_a_pass_and_its_backward_pass(checkpointing, dtype, monkeypatch):
    monkeypatch.setattr(grpo, "CHUNK", 16 * VOCABULARY)
    model, inputs = make(config(6), dtype, checkpointing), batch(8, 128)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    measured = peak_bytes(lambda: grpo.token_logprobs(model, *inputs)[0].sum().backward())
    estimated = 8 * 128 * sum(memory.activations(model.config, BYTES[dtype], checkpointing))
    assert estimated == pytest.approx(measured, rel=0.15)


def test_the_logits_take_three_float32_copies_of_a_chunk(monkeypatch):
    vocabulary = 20_000
    monkeypatch.setattr(grpo, "CHUNK", 200 * vocabulary)
    shape = config(layers=1, hidden=32, heads=2)
    shape.vocab_size = vocabulary
    model, inputs = make(shape), batch(4, 256)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    measured = peak_bytes(lambda: grpo.token_logprobs(model, *inputs)[0].sum().backward())
    assert 12 * grpo.CHUNK + 1024 * sum(memory.activations(shape, 4)) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_gradients_and_moments_are_counted_exactly(tied):
    model = make(config(tied=tied))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    grpo.token_logprobs(model, *batch(2, 16))[0].sum().backward()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    gib = memory.estimate(model.config, dtype_bytes=4)
    for name, tensors in (
        ("weights", [*model.parameters()]), ("gradients", [p.grad for p in model.parameters()]), ("AdamW", moments)
    ):  # fmt: skip
        assert round(gib[name] * memory.GIB) == sum(x.nbytes for x in tensors), name


def shard(rank, world, dtype, store, out):
    """A rank of an FSDP2 run on the CPU: bytes of weights, gradients and moments, and a pass's peak beyond them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    model = make(config(6))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if dtype == "bfloat16" else MixedPrecisionPolicy()
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = batch(1, 8)[0]  # so few tokens that nearly all of the peak is FSDP2's

    def work():
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()

    work()
    optimizer.step()
    peak = peak_bytes(work)
    local = [[p.to_local() for p in model.parameters()], [p.grad.to_local() for p in model.parameters()]]
    local.append([x.to_local() for state in optimizer.state.values() for x in state.values() if x.ndim])
    if rank == 0:
        torch.save([*(sum(x.nbytes for x in part) for part in local), peak], out)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world, dtype", [(1, "bfloat16"), (1, "float32"), (2, "bfloat16")])
def test_fsdp2_shards_and_gathers_as_the_formula_says(world, dtype, tmp_path):
    torch.multiprocessing.spawn(shard, (world, dtype, tmp_path / "store", tmp_path / "out"), nprocs=world)
    weights, gradients, moments, peak = torch.load(tmp_path / "out")
    gib = memory.estimate(config(6), world=world, dtype_bytes=2 if dtype == "bfloat16" else 4)
    for name, measured in (("weights", weights), ("gradients", gradients), ("AdamW", moments)):
        assert gib[name] * memory.GIB == pytest.approx(measured, rel=0.01), name
    if world == 1:  # with more, gloo makes copies of its own; with one, no next layer is on its way
        assert 0.8 < peak / ((gib["gathered"] + gib["unreduced gradients"]) * memory.GIB) < 1


def test_float32_on_a_gpu_keeps_the_maps_of_grouped_heads():
    shape, tokens, row = memory.qwen3("0.6B"), 2048, 512
    without, with_maps = (memory.activations(shape, 4, False, longest)[0] for longest in (0, row))
    assert (with_maps - without) * tokens == 4 * 28 * 16 * (tokens // row) * row**2, "a map [N,N] a row, head and layer"
    assert memory.activations(shape, 2, False, row) == memory.activations(shape, 2)


def test_phases_and_peaks():
    shape = memory.qwen3("1.7B")
    gib = memory.estimate(shape, world=8, micro_tokens=4096, kv_cache_gib=20)
    parts = list(gib)[: list(gib).index("train")]
    assert gib["peak, awake"] == pytest.approx(sum(gib[x] for x in parts))
    assert gib["peak, asleep"] == gib["generate"] > gib["train"], "with so large a cache"
    assert memory.estimate(shape)["peak, asleep"] == memory.estimate(shape)["train"]


def test_the_largest_micro_tokens_is_the_largest():
    shape, how = memory.qwen3("4B"), dict(world=8, kv_cache_gib=8)
    n = memory.largest_micro_tokens(72, 1280, shape, **how)
    peak = "peak, asleep"
    assert memory.estimate(shape, micro_tokens=n, **how)[peak] <= 72
    assert memory.estimate(shape, micro_tokens=n + 256, **how)[peak] > 72
    assert memory.largest_micro_tokens(20, 1280, shape, **how) == 0


def test_other_models_are_counted_too():
    gib = memory.estimate(config(kind=LlamaConfig), dtype_bytes=4)
    model = make(config(kind=LlamaConfig))
    assert round(gib["weights"] * memory.GIB) == sum(p.nbytes for p in model.parameters())


def test_the_table_has_every_model_on_one_and_on_eight():
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in memory.table().splitlines()]
    assert len({len(r) for r in rows}) == 1
    assert [tuple(r[:2]) for r in rows[2:]] == [(size, n) for size in memory.QWEN3 for n in ("1", "8")]


# Kinds that can be trained and lack a size that the formula counts.
OTHERS = [
    GPT2Config(n_layer=2, n_embd=32, n_head=2),
    GPTNeoXConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=48),
    MambaConfig(num_hidden_layers=2, hidden_size=32),
    OPTConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=32),
]


@pytest.mark.parametrize("shape", OTHERS, ids=lambda shape: shape.model_type)
def test_a_plan_says_in_one_line_why_there_is_no_memory_in_it(shape):
    weights, gib = memory.describe(shape, 1, micro_tokens=512)
    with torch.device("meta"):
        count = AutoModelForCausalLM.from_config(shape).num_parameters()
    assert weights == f"{count:,} weights" and "\n" not in gib
    assert gib.startswith(f"GiB on each GPU: not computed, because the formula does not fit {shape.model_type} (")
    assert prepare.describe_layers(shape).startswith("2 layers. ")


def test_a_plan_of_a_model_that_cannot_be_made_says_so(monkeypatch):
    def from_config(config):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors\nmore")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", from_config)
    weights, gib = memory.describe(OTHERS[0])
    assert weights == (
        "its weights cannot be counted without making them (Tensor.item() cannot be called on meta tensors more)"
    )
    assert gib.startswith("GiB on each GPU: not computed") and "\n" not in gib
