"""Which families does vLLM reload rightly? Each is tried with a tiny random model, in a process of its own.

    python -m tests.families.reload                             all of them, about 15 s each
    python -m tests.families.reload --only qwen3_moe mixtral    some of them
    python -m tests.families.reload --out runs/reload.md        where the table goes; what it has is not tried again

The trainer's model is saved, and vLLM loads it. Then the trainer's weights are changed by 5 % and handed to vLLM.
Before and after that, vLLM samples, and the trainer's model scores the samples. The gap is the mean of
|log p_vLLM - log p_torch| over the sampled tokens. "Not reloaded" is the gap between the first samples and the changed
model, which a reload that does nothing would leave. All are in float32, unless the verdict says otherwise.

What is refused here is refused by a run before it trains (node/stale.py). Some families exist only tied or only untied:
vLLM computes another model for the other kind, or does not start.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.hf_argparser import HfArg

from assets import tiny
from node.output import markdown, write_whole
from node.run import gap_limit_at_start
from node.settings import load_model, parse_args
from node.stale import count_comparable, find_stale_weight
from rollout import VLLMActor, pad_batch

PROMPTS = ["3 7 5>38\n<think>", "1 2 3>10\n<think>", "12 15 9>36\n<think>"]
EVERY_TENSOR = 10**6
HEAD = ["family", "tied", "gap at the start", "not reloaded", "gap after the reload", "tensors compared", "verdict"]

SHAPE = dict(vocab_size=30, hidden_size=128, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=512, bos_token_id=None, eos_token_id=1,
             pad_token_id=0)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=32)
# What differs from SHAPE. A name of two words is a second model of a family.
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": dict(sliding_window=64),
    "gemma": {},
    "gemma2": dict(sliding_window=64, query_pre_attn_scalar=32),
    "gemma3_text": dict(sliding_window=64, query_pre_attn_scalar=32),
    "phi3": {},
    "opt": dict(num_key_value_heads=4, ffn_dim=96, word_embed_proj_dim=128),
    "exaone4": dict(sliding_window=64),
    "granite": dict(embedding_multiplier=2.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2),
    "falcon_h1": MAMBA | dict(mamba_d_ssm=256),
    "cohere": dict(logit_scale=0.5),
    "cohere2": dict(sliding_window=64, logit_scale=0.5),
    "smollm3": {},
    "olmo2": {},
    "olmo3": dict(sliding_window=64),
    "starcoder2": {},
    "gpt_neox": dict(num_key_value_heads=4),
    "gpt2": dict(num_key_value_heads=4, n_embd=128, n_layer=4, n_head=4, n_positions=512),
    "qwen3_moe": EXPERTS,
    "qwen3_moe padded": EXPERTS | dict(moe_intermediate_size=40),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2, intermediate_size=64),
    "glm4_moe": dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, first_k_dense_replace=1,
                     n_group=1, topk_group=1),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=64),
    "granitemoehybrid": MAMBA | dict(
        num_local_experts=4, num_experts_per_tok=2, intermediate_size=64, shared_intermediate_size=64,
        layer_types=["mamba", "attention", "mamba", "attention"],
    ),
    "qwen3_next": EXPERTS | dict(
        shared_expert_intermediate_size=64, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64,
        linear_value_head_dim=64, decoder_sparse_step=1,
    ),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=64, sliding_window=64),
    "gemma4_text": dict(sliding_window=64, global_head_dim=32, hidden_size_per_layer_input=0, num_kv_shared_layers=0),
}  # fmt: skip
ONLY_BFLOAT16 = ("qwen3_next",)  # vLLM's CPU build has no float32 kernel for its linear attention


@dataclass
class Args:
    """Try vLLM's reload with tiny random models of many families."""

    only: list[str] | None = HfArg(default=None, help="Families to try, by transformers' model types (default: all).")
    out: str = HfArg(default="lab/results/reload.md", help="File for the table; its lines are kept.")
    one: list[str] | None = HfArg(default=None, help="Used by itself: try this family in this process, tied or untied.")


def random_model(family: str, tied: bool):
    """A model with sharp preferences, so that wrong weights show in its log-probabilities."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family.split()[0]](**SHAPE | FAMILIES[family], tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim >= 2 and "embed" not in name and "lm_head" not in name:
                tensor.normal_(0, 1.5 * tensor.shape[-1] ** -0.5)
            elif tensor.ndim >= 2:
                tensor.normal_(0, 0.1)
            elif tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


@torch.no_grad()
def gap(model, groups) -> float:
    """Mean |log p_vLLM - log p_torch| of sampled tokens, from the logits as the model makes them."""
    ids, mask, sampled = pad_batch([r for group in groups for r in group])
    logprobs = model(ids).logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return (logprobs - sampled[:, 1:])[mask[:, 1:]].abs().mean().item()


def try_family(family: str, tied: bool) -> list[str]:
    """The line of the table without its first two columns."""
    dtype = "bfloat16" if family in ONLY_BFLOAT16 else "float32"
    with tempfile.TemporaryDirectory() as folder:
        random_model(family, tied).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
        model, _ = load_model(folder, "cpu")
        actor = VLLMActor(folder, max_model_len=256, kv_cache_gib=0.25, dtype=dtype)
        groups = actor.generate(PROMPTS, n=8, max_tokens=24)
        at_start = gap(model, groups)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.mul_(1 + 0.05 * torch.randn_like(tensor))
        not_reloaded = gap(model, groups)
        actor.reload(model)
        after = gap(model, actor.generate(PROMPTS, n=8, max_tokens=24))
        stale = find_stale_weight(actor, model, torch.Generator().manual_seed(0), EVERY_TENSOR)
        compared = "{} of {}".format(*count_comparable(actor, model))
        actor.close()
    limit = gap_limit_at_start(dtype)
    if at_start > limit:
        verdict = "refused: vLLM computes another model"
    elif after > limit:
        verdict = "refused: vLLM keeps old weights"
    elif stale:
        verdict = f"stops after the first step: {stale}"
    else:
        verdict = "right" if dtype == "float32" else "right, in bfloat16"
    return [f"{at_start:.0e}", f"{not_reloaded:.2f}", f"{after:.0e}", compared, verdict]


def run_alone(family: str, tied: str) -> list[str]:
    """try_family in a process of its own, because vLLM allows one engine in a process."""
    command = [sys.executable, "-m", "tests.families.reload", "--one", family, tied]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if done.returncode == 0:
        return done.stdout.strip().splitlines()[-1].split("\t")
    reason = (done.stderr.strip().splitlines() or ["?"])[-1].removeprefix("[rank0]: ").replace("|", "/")
    return ["", "", "", "", f"vLLM does not start: {reason[:80]}…"]


def read_table(path: Path) -> list[list[str]]:
    """The lines of a table that was written before."""
    lines = path.read_text().splitlines()[2:] if path.exists() else []
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]


def main(args: Args) -> None:
    if args.one:
        print("\t".join(try_family(args.one[0], args.one[1] == "tied")))
        return
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    wanted = args.only or [*FAMILIES]
    rows = [row for row in read_table(out) if not args.only or row[0] not in args.only]
    todo = [(f, t) for f in wanted for t in ("tied", "untied") if [f, t] not in [row[:2] for row in rows]]
    for family, tied in tqdm(todo, desc="families"):
        rows.append([family, tied, *run_alone(family, tied)])
        rows.sort(key=lambda row: [*FAMILIES].index(row[0]))
        write_whole(out, markdown([HEAD, *rows]) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main(parse_args(Args))
