"""--dtype: what a model's passes and vLLM compute in. Weights, gradients and the optimizer are always float32.

On a GPU passes in bfloat16 are FSDP's (ranks.shard), so a model that nobody has sharded, as in the laboratory, computes
in float32 there; on a CPU they are autocast's, here. A CPU with instructions for bfloat16 (avx512_bf16) is 2 to 3 times
faster with it, once a model is wide enough for its matrices to take the time.
"""

import torch

WIDE = 512  # hidden size
HELP = "Of passes and of vLLM; auto: bfloat16 on a GPU, and on a CPU that has it for all but small models."


def choose_dtype(dtype: str, config) -> str:
    """What auto stands for on this machine, for a model of this transformers config; another dtype as it is."""
    if dtype != "auto":
        return dtype
    able = torch.cuda.is_available() or (
        torch.cpu.get_capabilities().get("avx512_bf16", False) and config.get_text_config().hidden_size >= WIDE
    )
    return "bfloat16" if able else "float32"


def autocast_for(model) -> torch.autocast:
    """autocast() in what auto stands for."""
    return autocast(choose_dtype("auto", model.config), next(model.parameters()).device)


def autocast(dtype: str, device: torch.device | str) -> torch.autocast:
    """The context for forward and backward passes. Casts are not kept: a step taken within it changes the weights."""
    on_cpu = torch.device(device).type == "cpu"
    enabled = on_cpu and dtype == "bfloat16"
    return torch.autocast("cpu" if on_cpu else "cuda", torch.bfloat16, enabled=enabled, cache_enabled=False)
