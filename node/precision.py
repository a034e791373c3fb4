"""--dtype: the type that the model's passes and vLLM compute in. Weights, gradients and AdamW are always float32.

On a GPU, FSDP2 makes the passes run in bfloat16 (ranks.shard). A model that is not sharded, as in the laboratory,
computes in float32 there. On a CPU, autocast does it, here. A CPU with instructions for bfloat16 (avx512_bf16) is 2
to 3 times faster with it, if the model is wide enough for its matrices to take most of the time.
"""

import torch

WIDE = 512  # hidden size
HELP = "Type of the model's passes and of vLLM; auto is bfloat16 on a GPU, and for large models on a CPU that has it."


def choose_dtype(dtype: str, config) -> str:
    """What "auto" means on this machine for a model with this transformers config. Any other dtype is returned."""
    if dtype != "auto":
        return dtype
    width = getattr(config.get_text_config(), "hidden_size", 0)  # some kinds have none
    able = torch.cuda.is_available() or (torch.cpu.get_capabilities().get("avx512_bf16", False) and width >= WIDE)
    return "bfloat16" if able else "float32"


def autocast_for(model) -> torch.autocast:
    """autocast() with --dtype auto, for a model outside of a run."""
    return autocast(choose_dtype("auto", model.config), next(model.parameters()).device)


def autocast(dtype: str, device: torch.device | str) -> torch.autocast:
    """The context for the model's passes. It caches no casts, because gradient steps within it change the weights."""
    on_cpu = torch.device(device).type == "cpu"
    enabled = on_cpu and dtype == "bfloat16"
    return torch.autocast("cpu" if on_cpu else "cuda", torch.bfloat16, enabled=enabled, cache_enabled=False)
