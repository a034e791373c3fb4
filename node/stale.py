"""Does the sampler hold the trainer's weights after a reload? Looked at, not guessed from log-probabilities.

At a learning rate of 1e-6 a sampler that has silently kept its old weights drifts too slowly for a difference of
log-probabilities in bfloat16 to show it. So a few of vLLM's own tensors are compared with the trainer's, exactly.
"""

from functools import partial

import torch
from torch import Tensor

from node import ranks


def find_stale_weight(sampler, model, generator: torch.Generator, count: int = 8) -> str | None:
    """The name of a weight that vLLM does not hold as the trainer does, or None.

    Looks at the output head and at count - 1 other tensors of vLLM's, drawn anew each time, and at 64 columns of each
    that is a matrix. Exact: the trainer's numbers are cast to vLLM's type, as vLLM does. All ranks must call, with
    equal generators. An actor without vLLM samples the trainer's own weights.
    """
    if not hasattr(sampler, "llm"):
        return None
    weights = dict(model.named_parameters()) | {"lm_head.weight": model.get_output_embeddings().weight}
    pairs, found = comparable_weights(sampler, weights), None
    if not pairs:
        ranks.exit_with_error(
            f"vLLM names no weight of {type(model).__name__} as the trainer does: a reload could not be checked"
        )
    for name, parts in _draw_pairs(pairs, generator, count):
        want = torch.cat([ranks.gather_weight(weights[part]) for part in parts])
        columns = None
        if want.ndim == 2:
            columns = torch.randperm(want.shape[1], generator=generator)[:64].to(want.device)
            want = want[:, columns]
        held = sampler.llm.apply_model(partial(_read_weight, name=name, columns=columns))[0]
        if not torch.equal(held[: len(want)], want.to(held.dtype)):  # vLLM pads the vocabulary
            found = found or name  # the other ranks go on to the next weight, so this one does
    return found


def comparable_weights(sampler, weights: dict[str, Tensor]) -> list[tuple[str, list[str]]]:
    """vLLM's weights by name, each with the trainer's names of its parts; the output head first."""
    names, packed = sampler.llm.apply_model(_names)[0]
    pairs = []
    for name in names:
        module, kind = name.rpartition(".")[::2]
        layer, last = module.rpartition(".")[::2]
        parts = [f"{layer}.{part}.{kind}" for part in packed.get(last, ())] or [name]
        if all(part in weights for part in parts):
            pairs.append((name, parts))
    return sorted(pairs, key=lambda pair: pair[0] != "lm_head.weight")


def _draw_pairs(pairs: list, generator: torch.Generator, count: int) -> list:
    """The first and count - 1 of the others."""
    others = torch.randperm(len(pairs) - 1, generator=generator)[: count - 1] + 1
    return [pairs[i] for i in (0, *others.tolist())]


def _names(model) -> tuple[list[str], dict[str, list[str]]]:
    """Within vLLM: the names of its weights, and which of its modules hold several of a checkpoint's."""
    names = [name for name, _ in model.named_parameters()]
    if "lm_head.weight" not in names and hasattr(model, "lm_head"):
        names.append("lm_head.weight")  # tied to the embedding, but perhaps packed by itself
    return names, getattr(model, "packed_modules_mapping", {})


def _read_weight(model, name: str, columns: Tensor | None) -> Tensor:
    """Within vLLM: its weight of this name, of a matrix those columns.

    A layer's matrix is read as what the layer makes of unit vectors, since some kernels keep it packed. Exact, for it
    only adds zeros.
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
