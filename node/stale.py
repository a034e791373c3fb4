"""Does the sampler have the trainer's weights? Compares the tensors directly, after each reload.

A sampler that has silently kept its old weights also has other log-probabilities than the trainer. But at a learning
rate of 1e-6 the difference grows too slowly to be seen in bfloat16. So a few of vLLM's own tensors are compared,
exactly.
"""

from functools import partial

import torch
from torch import Tensor

from node import ranks


def find_stale_weight(sampler, model, generator: torch.Generator, count: int = 8) -> str | None:
    """The name of a weight that differs between vLLM and the trainer, or None.

    Compares the output head and count - 1 other tensors of vLLM, chosen at random in each call; of a matrix, 64
    columns. The comparison is exact, because the trainer's numbers are cast to vLLM's type, as vLLM does. All ranks
    must call, with equal generators. A sampler without vLLM samples the trainer's own weights: None.
    """
    if not hasattr(sampler, "llm"):
        return None
    weights = dict(model.named_parameters()) | {"lm_head.weight": model.get_output_embeddings().weight}
    pairs = comparable_weights(sampler, weights)
    if not pairs:
        ranks.exit_with_error(
            f"vLLM names no weight of {type(model).__name__} as the trainer does: a reload could not be checked"
        )
    stale_weight = None
    for name, parts in _draw_pairs(pairs, generator, count):
        expected = torch.cat([ranks.gather_weight(weights[part]) for part in parts])
        columns = None
        if expected.ndim == 2:
            columns = torch.randperm(expected.shape[1], generator=generator)[:64].to(expected.device)
            expected = expected[:, columns]
        actual = sampler.llm.apply_model(partial(_read_weight, name=name, columns=columns))[0]
        actual = actual[: len(expected)]  # vLLM pads the vocabulary
        if stale_weight is None and not torch.equal(actual, expected.to(actual.dtype)):
            stale_weight = name  # no return here: the other ranks would wait in the next gather_weight
    return stale_weight


def comparable_weights(sampler, weights: dict[str, Tensor]) -> list[tuple[str, list[str]]]:
    """Which tensors can be compared: (vLLM's name, the trainer's names of its parts), the output head first.

    vLLM joins some weights, for example q_proj, k_proj and v_proj into qkv_proj; these are the parts.
    """
    names, packed = sampler.llm.apply_model(_names)[0]
    pairs = []
    for name in names:
        module, _, kind = name.rpartition(".")  # model.layers.0.self_attn.qkv_proj, weight
        parent, _, last = module.rpartition(".")  # model.layers.0.self_attn, qkv_proj
        parts = [f"{parent}.{part}.{kind}" for part in packed.get(last, ())] or [name]
        if all(part in weights for part in parts):
            pairs.append((name, parts))
    return sorted(pairs, key=lambda pair: pair[0] != "lm_head.weight")


def _draw_pairs(pairs: list, generator: torch.Generator, count: int) -> list:
    """The first pair, and count - 1 of the others at random."""
    others = torch.randperm(len(pairs) - 1, generator=generator)[: count - 1] + 1
    return [pairs[i] for i in (0, *others.tolist())]


def _names(model) -> tuple[list[str], dict[str, list[str]]]:
    """Runs within vLLM: the names of its weights, and which of its modules join several of a checkpoint's."""
    names = [name for name, _ in model.named_parameters()]
    if "lm_head.weight" not in names and hasattr(model, "lm_head"):
        names.append("lm_head.weight")  # tied to the embedding, but perhaps packed by itself
    return names, getattr(model, "packed_modules_mapping", {})


def _read_weight(model, name: str, columns: Tensor | None) -> Tensor:
    """Runs within vLLM: its weight of this name, or only some columns of it.

    Some kernels store the matrix in a packed format that we cannot read. So the layer is applied to unit vectors: the
    result for unit vector e_j is column j. This is exact, because all other products are 0.
    """
    parent, kind = name.rpartition(".")[::2]
    module = model.get_submodule(parent)
    weight = getattr(module, kind).detach()
    if columns is None:
        return weight
    method = getattr(module, "quant_method", None)
    if method is None or parent.endswith("embed_tokens"):
        return weight[:, columns]
    width = getattr(module, "input_size_per_partition", None) or module.embedding_dim
    units = torch.zeros(len(columns), width, dtype=weight.dtype, device=weight.device)
    units[torch.arange(len(columns)), columns] = 1
    return method.apply(module, units, None).T
