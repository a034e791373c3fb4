"""The trainer's weights go into vLLM, which runs in the same process: vLLM's own reload, and what it leaves undone.

vLLM's CPU build keeps some weights in a packed format, and its reload does not pack all of them again: not the experts
of a mixture, nor an output head that is tied to the embedding. Nothing warns; the sampler goes on with wrong numbers.
"""

import torch

from node import ranks
from node.output import in_one_line


def copy_weights(llm, model) -> None:
    """Copy the weights of the trainer's model into vLLM, in place. All ranks must call."""
    on_cpu = not torch.cuda.is_available()
    kernels = llm.apply_model(_take_expert_kernels)[0] if on_cpu else {}
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": ranks.named_weights(model)})
    for method, kernel in kernels.items():
        method.moe_kernel = method.moe_kernel or kernel
    if on_cpu:
        llm.apply_model(_pack_heads)


def wake(llm, what: str) -> None:
    """Give a sleeping vLLM its memory on the GPU again, for its "weights" or its "kv_cache"."""
    try:
        llm.wake_up(tags=[what])
    except RuntimeError as e:  # CUDA's, and vLLM's own
        ranks.exit_with_error(
            f"vLLM cannot take back the GPU memory of its {what} after it has slept: {in_one_line(e)}. "
            "Another process may use this GPU: see nvidia-smi. If none does, lower --micro_tokens or --kv_cache_gib. "
            "Then resume from the last checkpoint"
        )


def clear_prefix_cache(llm) -> None:
    """Forget keys and values that were computed with the old weights. vLLM refuses while a request still runs."""
    if not llm.reset_prefix_cache():
        ranks.exit_with_error(
            "vLLM has not cleared its prefix cache, because it still holds blocks of a request. Responses would mix "
            "old and new weights. Let every call of generate() end before reload()"
        )


def share_classes(llm) -> None:
    """Let the trainer run models whose class vLLM has changed.

    vLLM has no code of its own for some families, for example OLMo 2. It runs transformers' class for them, and gives
    that class a __call__ that reads self.do_not_compile. The trainer's model is of the same class and lacks it.
    """
    llm.apply_model(_set_do_not_compile)


def _set_do_not_compile(model) -> None:
    """Runs within vLLM, whose own modules keep their own value."""
    for module in model.modules():
        if "do_not_compile" in vars(module):
            type(module).do_not_compile = True


def _take_expert_kernels(model) -> dict:
    """Runs within vLLM: take the kernels of the experts away, and return them by their owners.

    While vLLM loads weights it packs the experts only for a new kernel, which it makes if there is none.
    """
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    kernels = {method: method.moe_kernel for method in methods if getattr(method, "moe_kernel", None)}
    for method in kernels:
        method.moe_kernel = None
    return kernels


def _pack_heads(model) -> None:
    """Runs within vLLM: pack every output head again. A head that is tied has no weight of its own to be loaded."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)
