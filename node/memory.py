"""How much GPU memory training takes, by formula. Computed; never compared with a GPU.

    python -m node.memory      the table for Qwen3

Symbols: P is the number of weights (a tied head counts once). c is the size of a number in the forward pass in bytes
(2 for bfloat16). d is the width of the residual stream, q and k are the widths of all queries and of all keys, m is the
width of the MLP. H is the number of heads. FSDP2 shards over W GPUs. Each GPU holds, in bytes:

    weights                4 P/W   the float32 master copy; a gradient of the same size; two moments of AdamW, 8 P/W
    gathered               c (2 layers + root)   the layer at work, the next one on its way, and the root group
                           (embedding, head, last norm), which stays gathered from forward to backward pass
    unreduced gradients    c (layer + root), and the float32 buffer that reduces the larger of the two
    activations, per layer and token of a pass (--micro_tokens), which are kept for the backward pass:
        two norms of d     (8 + 4c) d    each: its input in float32, that normalised, and its output
        queries, keys      (4 + 3c) (q + k)    their norms' input in float32, that normalised, and what rotation gives;
                           the third c is the attention's output for q and the values for k, which are as wide
        log-sum-exp        4 H
        MLP                4c m    gate, its SiLU, up, and their product
        maps               4 H N   only in float32 with grouped heads, which torch does not fuse there: a row of each
                           head's attention map; N is the longest row (--max_model_len)
      and once, (4 + 2c) d: the last norm and the states that the head reads. With gradient checkpointing a layer keeps
      only its input, c d, and one layer at a time has all of the above again.
      The gradients that flow back through a layer add 2c (m + d).
    logits                 12 bytes each: float32 logits, log-probabilities and gradient of one chunk (grpo.CHUNK)
    vLLM, on the same GPU  c P (the whole model) and the cache, --kv_cache_gib: 4 k bytes a token and layer

FSDP2 gathers and reduces on one GPU too, in buffers of its own.

vLLM sleeps while the trainer works (level 2: it keeps neither weights nor cache). So the peak is the larger one of the
two phases, generate and train. Without sleep it is their sum, where the weights and the moments count once.

Left out are the memory of CUDA, NCCL and vLLM's own passes and graphs, and fragmentation. So "fits" means within nine
tenths of the GPU; 2 to 4 GiB for CUDA graphs and NCCL's buffers stay in use while vLLM sleeps. The layer is Qwen3's.
Layers without its two small norms take less.

On the host, rank 0 holds the largest tensor in float32 and a copy of it while a checkpoint is written: 8 bytes per
weight of it, or twice checkpoint.SHARD_BYTES if that is more. Loading takes less, and other ranks take less. Left out
is what Python, torch and vLLM take by themselves.
"""

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from grpo import CHUNK
from node.checkpoint import SHARD_BYTES
from node.output import in_one_line, markdown
from node.ranks import decoder_layers

GIB = 2**30
GPU_GIB, CONTEXT, KV_CACHE_GIB = 80, 1280, 8.0  # what the table assumes
# hidden size, layers, heads, key-value heads, width of a head, MLP, tied head?
QWEN3 = {
    "0.6B": (1024, 28, 16, 8, 128, 3072, True),
    "1.7B": (2048, 28, 16, 8, 128, 6144, True),
    "4B": (2560, 36, 32, 8, 128, 9728, True),
    "8B": (4096, 36, 32, 8, 128, 12288, False),
}


def qwen3(size: str) -> Qwen3Config:
    """The shape of a published Qwen3.

    >>> parameters(qwen3("0.6B"))
    (596049920, 15730944, 155582464)
    """
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
             "intermediate_size", "tie_word_embeddings")  # fmt: skip
    return Qwen3Config(vocab_size=151_936, **dict(zip(names, QWEN3[size])))


def parameters(config) -> tuple[int, int, int]:
    """Numbers of weights: of the whole model, a tied head counted once; of its largest layer; of its largest tensor."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = [sum(p.numel() for p in module.parameters()) for module in (model, *decoder_layers(model))]
    return count[0], max(count[1:]), max(p.numel() for p in model.parameters())


def activations(config, dtype_bytes: int = 2, checkpointing: bool = False, longest_row: int = 0) -> tuple[int, int]:
    """Bytes per token: what the forward pass keeps for the backward pass, and what the backward pass adds at its peak.

    longest_row: for the maps; 0 leaves them out.

    >>> kept, added = activations(qwen3("0.6B"))
    >>> kept // 2**10, added // 2**10
    (1969, 16)
    """
    config, c = config.get_text_config(), dtype_bytes
    d, m, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    q, k = heads * head_width(config), config.num_key_value_heads * head_width(config)
    layer = 2 * (4 + 2 * c) * d + (4 + 3 * c) * (q + k) + 4 * heads + 4 * c * m
    if c == 4 and config.num_key_value_heads < heads:
        layer += 4 * heads * longest_row
    kept = config.num_hidden_layers * (c * d if checkpointing else layer) + (4 + 2 * c) * d
    return kept, checkpointing * layer + 2 * c * (m + d)


def head_width(config) -> int:
    """Numbers in one query of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes(config) -> int:
    """Bytes of vLLM's cache per token: a key and a value in each layer, in bfloat16.

    >>> cache_bytes(qwen3("0.6B"))
    114688
    """
    config = config.get_text_config()
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_width(config) * 2


def estimate(
    config,
    world: int = 1,
    micro_tokens: int = 2048,
    kv_cache_gib: float = 0.5,
    dtype_bytes: int = 2,
    checkpointing: bool = False,
    longest_row: int | None = None,
) -> dict[str, float]:
    """GiB on each GPU by part, then by phase (train, generate), then the peak when vLLM sleeps and when it stays awake.

    config is a transformers config; world the number of GPUs; micro_tokens at least the longest row of a batch, which
    is never split; dtype_bytes the forward pass's (2: bfloat16, 4: float32); longest_row in tokens (default: a whole
    pass).
    """
    total, layer, largest = parameters(config)
    root = total - layer * config.get_text_config().num_hidden_layers
    row = micro_tokens if longest_row is None else longest_row
    gib = {
        "weights": 4 * total / world,
        "gradients": 4 * total / world,
        "AdamW": 8 * total / world,
        "gathered": dtype_bytes * (2 * layer + root),
        "unreduced gradients": dtype_bytes * (layer + root) + 4 * max(layer, root),
        "activations": micro_tokens * sum(activations(config, dtype_bytes, checkpointing, row)),
        "logits": 12 * min(CHUNK, micro_tokens * config.get_text_config().vocab_size),
        "vLLM weights": dtype_bytes * total,
        "vLLM cache": kv_cache_gib * GIB,
    }
    gib = {name: size / GIB for name, size in gib.items()}
    host = max(8 * largest, 2 * SHARD_BYTES) / GIB
    vllm = gib["vLLM weights"] + gib["vLLM cache"]
    train = sum(gib.values()) - vllm
    generate = gib["weights"] + gib["AdamW"] + vllm  # gradients are freed after each step
    return gib | {
        "train": train, "generate": generate, "peak, asleep": max(train, generate), "peak, awake": train + vllm,
        "host, saving": host,
    }  # fmt: skip


def describe(config, *how, **more) -> tuple[str, str]:
    """For a plan: the number of weights; the memory by estimate(), which takes the other arguments, or why it is not
    known.

    Not every model that can be trained has what the formula counts. Mamba has no heads, for example.
    """
    try:
        with torch.device("meta"):
            weights = f"{AutoModelForCausalLM.from_config(config).num_parameters():,} weights"
    except Exception as e:  # whatever the model's code cannot do without memory
        weights = f"its weights cannot be counted without making them ({in_one_line(e)})"
    try:
        gib = estimate(config, *how, **more)
    except Exception as e:  # whatever this configuration lacks
        reason = f"the formula does not fit {config.model_type} ({in_one_line(e)})"
        return weights, f"GiB on each GPU: not computed, because {reason}"
    parts = ", ".join(f"{name} {size:.1f}" for name, size in gib.items() if size >= 0.05)
    return weights, f"GiB on each GPU, computed: {parts}"


def largest_micro_tokens(limit_gib: float, context: int, config, **how) -> int:
    """The most --micro_tokens (in steps of 256) whose peak with vLLM asleep is within the limit; 0 if no row fits."""
    if estimate(config, micro_tokens=context, **how)["peak, asleep"] > limit_gib:
        return 0
    one, two = (estimate(config, micro_tokens=n * context, **how)["train"] for n in (1, 2))
    return int(context * (1 + (limit_gib - one) / (two - one))) // 256 * 256


def table() -> str:
    """The Markdown table: each Qwen3 on one and on eight GPUs."""
    limit = 0.9 * GPU_GIB
    head = (
        "model", "GPUs", "weights, gradients, AdamW", "gathered, unreduced", "activations, checkpointed", "logits",
        "vLLM", "peak, vLLM asleep", "awake", "fits asleep, awake", "largest micro_tokens, checkpointed",
        "rows in the cache", "host, saving",
    )  # fmt: skip
    rows = [list(head)]
    for size in QWEN3:
        config = qwen3(size)
        for world in (1, 8):
            how = dict(world=world, kv_cache_gib=KV_CACHE_GIB)
            gib, checkpointed = estimate(config, **how), estimate(config, checkpointing=True, **how)
            rows.append([
                size, f"{world}", f"{gib['weights'] + gib['gradients'] + gib['AdamW']:.1f}",
                f"{gib['gathered'] + gib['unreduced gradients']:.1f}",
                f"{gib['activations']:.1f}, {checkpointed['activations']:.1f}", f"{gib['logits']:.1f}",
                f"{gib['vLLM weights'] + gib['vLLM cache']:.1f}", f"{gib['peak, asleep']:.1f}",
                f"{gib['peak, awake']:.1f}",
                ", ".join("yes" if gib[f"peak, {x}"] <= limit else "no" for x in ("asleep", "awake")),
                ", ".join(
                    f"{largest_micro_tokens(limit, CONTEXT, config, checkpointing=x, **how):,}" for x in (False, True)
                ),
                f"{int(KV_CACHE_GIB * GIB / cache_bytes(config) / CONTEXT)}", f"{gib['host, saving']:.1f}",
            ])  # fmt: skip
    return markdown(rows)


if __name__ == "__main__":
    print(
        f"GiB per GPU of {GPU_GIB}, bfloat16 passes of 2,048 tokens, rows of {CONTEXT:,}, a cache of {KV_CACHE_GIB:g}; "
        f"fits: within nine tenths. Computed, not run on a GPU.\n\n{table()}"
    )
