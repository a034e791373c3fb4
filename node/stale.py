"""Does the sampler have the trainer's weights? Once, its log-probabilities are compared; after each reload, tensors.

try_reload, before training: hand changed weights to vLLM, and compare its log-probabilities with the trainer's. This
sees every weight, and also a model that vLLM computes in another way.

find_stale_weight, after each reload: a sampler that has silently kept its old weights also has other log-probabilities
than the trainer. But at a learning rate of 1e-6 the difference grows too slowly to be seen in bfloat16. So a few of
vLLM's own tensors are compared, exactly. Some cannot be read, for example experts that a kernel has packed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from grpo import token_logprobs
from node import precision, ranks
from node.output import in_one_line
from node.run import gap_limit_at_start
from node.weights import stored_groups, stored_tensors
from rollout import pad_batch
from tasks import Problem

TRIAL_PROBLEMS, TRIAL_TOKENS = 8, 16  # what a trial samples: so many prompts, tokens of each response


def try_reload(sampler, model, problems: list[Problem], max_tokens: int, dtype: str) -> str | None:
    """Raise ValueError if vLLM computes another model than the trainer, or does not take over changed weights.

    vLLM answers a few of the problems: first as it was started, then after a reload of weights that are changed by 5 %.
    The trainer scores both. Afterwards trainer and sampler have the weights from before. All ranks must call. Returns a
    line that says what was found. A sampler without vLLM samples the trainer's own weights: None.
    """
    if not hasattr(sampler, "llm"):
        return None
    limit = gap_limit_at_start(dtype)
    prompts, max_tokens = [problem.prompt for problem in problems[:TRIAL_PROBLEMS]], min(max_tokens, TRIAL_TOKENS)
    kind, remedy = type(model).__name__, "Use --engine torch, in one process"

    def check_gap(when: str) -> float:
        gap = _measure_gap(sampler, model, prompts, max_tokens, dtype)
        if not gap <= limit:  # not a number counts as too much
            raise ValueError(
                f"{kind}: vLLM's log-probabilities differ from the trainer's by {gap:.2g} on average {when} (limit "
                f"{limit:g}), so it would sample from another model. {remedy}"
            )
        return gap

    # As started; then with changed weights; then back to the weights from before.
    gap = check_gap("before the first step")
    with _changed_weights(model):
        try:
            sampler.reload(model)
        except Exception as e:  # whatever vLLM raises for names or shapes that it does not expect
            raise ValueError(
                f"{kind}: vLLM cannot take over its weights ({type(e).__name__}: {in_one_line(e)}). {remedy}"
            ) from e
        gap = max(gap, check_gap("after a reload of changed weights"))
    sampler.reload(model)
    compared, count = count_comparable(sampler, model)
    others = "" if compared == count else "; the others are checked here only, by these log-probabilities"
    return (
        f"vLLM takes over changed weights: its log-probabilities differ from the trainer's by {gap:.0e} on average. "
        f"{compared} of its {count} tensors can be compared after each step{others}"
    )


def _measure_gap(sampler, model, prompts: list[str], max_tokens: int, dtype: str) -> float:
    """Mean |log p_vLLM - log p_trainer| of sampled tokens, on the rank where it is largest. The sampler sleeps then."""
    groups = sampler.generate(prompts, max_tokens=max_tokens)
    sampler.sleep()
    device = next(model.parameters()).device
    ids, mask, sampled = (x.to(device) for x in pad_batch([response for (response,) in groups]))
    with torch.no_grad(), precision.autocast(dtype, device):
        scored, _ = token_logprobs(model, ids, mask)
    ranks.reshard(model)
    return max(ranks.all_gather([(scored - sampled)[mask].abs().mean().item()]))


@contextmanager
def _changed_weights(model) -> Iterator[None]:
    """Within the context, the float32 weights are changed by about 5 %; then they are as before, to the bit.

    Some bits of the mantissa are flipped at random, and flipped back. So no copy of the weights is needed.
    """

    def flip() -> None:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
        for p in model.parameters():
            share = p.detach().to_local() if isinstance(p, DTensor) else p.detach()
            flips = torch.randint(8, share.shape, generator=generator, dtype=torch.int32, device=share.device)
            share.view(torch.int32).bitwise_xor_(flips << 17)  # bits 17 to 19 of 23

    flip()
    try:
        yield
    finally:
        flip()


def find_stale_weight(sampler, model, generator: torch.Generator, count: int = 8) -> str | None:
    """The name of a weight that differs between vLLM and the trainer, or None.

    Compares the output head and count - 1 other tensors of vLLM, chosen at random in each call; of a matrix, 64
    columns. The comparison is exact, because the trainer's numbers are cast to vLLM's type, as vLLM does. All ranks
    must call, with equal generators. A sampler without vLLM samples the trainer's own weights: None.
    """
    if not hasattr(sampler, "llm"):
        return None
    weights = _plain_weights(model)
    pairs, _ = comparable_weights(sampler, weights)
    if not pairs:
        ranks.exit_with_error(
            f"vLLM names no weight of {type(model).__name__} as the trainer does: a reload could not be checked"
        )
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}  # GPT-2's
    stale_weight = None
    for name, parts in _draw_pairs(pairs, generator, count):
        gathered = [ranks.gather_weight(weights[part]) for part in parts]
        expected = torch.cat([x.T if id(weights[part]) in transposed else x for x, part in zip(gathered, parts)])
        columns, width = None, expected.shape[-1]
        if expected.ndim == 2:
            columns = torch.randperm(width, generator=generator)[:64].to(expected.device)
            expected = expected[:, columns]
        actual = sampler.llm.apply_model(partial(_read_weight, name=name, columns=columns, width=width))[0]
        actual = actual[: len(expected)]  # vLLM pads the vocabulary
        if stale_weight is None and not torch.equal(actual, expected.to(actual.dtype)):
            stale_weight = name  # no return here: the other ranks would wait in the next gather_weight
    return stale_weight


def count_comparable(sampler, model) -> tuple[int, int]:
    """How many of vLLM's tensors can be compared with the trainer's, and how many there are."""
    pairs, count = comparable_weights(sampler, _plain_weights(model))
    return len(pairs), count


def _plain_weights(model) -> dict[str, Tensor]:
    """The trainer's tensors that a checkpoint stores as they are, by their names there, and the output head."""
    tensors = stored_tensors(model)
    plain = {group.stored_name: tensors[group.names[0]] for group in stored_groups(model) if group.stored_name}
    return {"lm_head.weight": model.get_output_embeddings().weight} | plain


def comparable_weights(sampler, weights: dict[str, Tensor]) -> tuple[list[tuple[str, list[str]]], int]:
    """Which of vLLM's tensors can be compared, the output head first, and how many tensors vLLM has.

    Each is (vLLM's name, the names of its parts in `weights`). vLLM joins some weights, for example q_proj, k_proj and
    v_proj into qkv_proj; these are the parts.
    """
    names, packed, stored_names = sampler.llm.apply_model(partial(_names, stored_names=[*weights]))[0]
    pairs = []
    for name in names:
        module, _, kind = name.rpartition(".")  # model.layers.0.self_attn.qkv_proj, weight
        parent, _, last = module.rpartition(".")  # model.layers.0.self_attn, qkv_proj
        parts = [f"{parent}.{part}.{kind}" for part in packed.get(last, ())]
        if not parts or name in stored_names:
            parts = [name]
        if all(part in stored_names for part in parts):
            pairs.append((name, [stored_names[part] for part in parts]))
    return sorted(pairs, key=lambda pair: pair[0] != "lm_head.weight"), len(names)


def _draw_pairs(pairs: list, generator: torch.Generator, count: int) -> list:
    """The first pair, and count - 1 of the others at random."""
    others = torch.randperm(len(pairs) - 1, generator=generator)[: count - 1] + 1
    return [pairs[i] for i in (0, *others.tolist())]


def _names(model, stored_names: list[str]) -> tuple[list[str], dict[str, list[str]], dict[str, str]]:
    """Runs within vLLM: the names of its weights; which of its modules join several of a checkpoint's; and, for the
    stored names, by the names that vLLM gives to them."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    rename = mapper.get_rename_mapper().map_name if mapper else str
    renamed = {rename(name): name for name in stored_names}
    # Where vLLM gives another last name, it keeps other numbers: for Mamba's A_log, for example, A = -exp(A_log).
    renamed = {ours: name for ours, name in renamed.items() if ours and ours.split(".")[-1] == name.split(".")[-1]}
    names = [name for name, _ in model.named_parameters()]
    names += [name for name, _ in model.named_buffers() if name in renamed]
    if "lm_head.weight" not in names and hasattr(model, "lm_head"):
        names.append("lm_head.weight")  # tied to the embedding, but perhaps packed by itself
    return names, getattr(model, "packed_modules_mapping", {}), renamed


def _read_weight(model, name: str, columns: Tensor | None, width: int) -> Tensor:
    """Runs within vLLM: its weight of this name, or only some columns of it. width: how many columns it has.

    Some kernels store the matrix in a packed format that we cannot read. So the layer is applied to unit vectors: the
    result for unit vector e_j is column j. This is exact, because all other products are 0.
    """
    parent, kind = name.rpartition(".")[::2]
    module = model.get_submodule(parent)
    weight = getattr(module, kind).detach()
    if hasattr(module, "_cpu_unpacked_conv_weight") and kind == "weight":  # [d,width] of [d,1,width], in bfloat16
        return module._cpu_unpacked_conv_weight[:, None]
    if columns is None:
        return weight
    method = getattr(module, "quant_method", None)
    if method is None or parent.endswith("embed_tokens"):
        return weight[:, columns]
    if width != getattr(module, "input_size", None) and width != getattr(module, "embedding_dim", None):
        return weight[:0]  # equals nothing; given inputs of another width, the kernels of vLLM's CPU build abort
    units = torch.zeros(len(columns), width, dtype=weight.dtype, device=weight.device)
    units[torch.arange(len(columns)), columns] = 1
    return method.apply(module, units, None).T
