"""The sampler (the paper's actor_infer): VLLMActor, and TorchActor for machines without vLLM. One interface.

Both sample the model's own distribution: temperature 1 unless another is given, no top-p, no top-k. They also return
the log-probability of each sampled token, so that the trainer can measure at every step how far sampler and trainer
differ.
"""

import gc
import logging
import math
import os
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from node import precision, ranks
from node.output import in_one_line
from node.reload import clear_prefix_cache, copy_weights, share_classes, wake
from node.settings import (
    check_one_start,
    end_tokens,
    explain_start,
    load_config,
    load_generation_config,
    load_model,
)


class Rollout(NamedTuple):
    """One response. ids includes the end-of-text token, if the response got there."""

    prompt_ids: list[int]  # token numbers of the prompt
    ids: list[int]  # token numbers of the response
    logprobs: list[float]  # of ids, under the sampler's weights and temperature
    text: str  # the response as the model wrote it, without what ended it
    truncated: bool  # hit max_tokens before it ended


class Chat(NamedTuple):
    """How a prompt becomes a user's message in the model's own chat template."""

    system: str | None = None  # a system message before it
    thinking: bool | None = None  # on or off, for templates that have enable_thinking; None: the template's default


def chat(args) -> Chat | None:
    """What --chat, --system and --thinking ask for. ValueError for one of the latter without --chat."""
    if not args.chat:
        for name in ("system", "thinking"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name}: only with --chat")
        return None
    return Chat(args.system, None if args.thinking is None else args.thinking == "on")


def start_actor(
    engine: str,
    name: str,
    max_model_len: int,
    seed: int,
    kv_cache_gib: float = 0.5,
    model=None,
    tokenizer=None,
    sleep_mode: bool = False,
    dtype: str = "auto",
    chat: Chat | None = None,
):
    """The sampler for --engine. vllm loads the checkpoint itself; torch samples the given model, or loads it."""
    if engine == "vllm":
        return VLLMActor(name, max_model_len, seed, kv_cache_gib, sleep_mode, dtype, chat)
    if model is None:
        model, tokenizer = load_model(name)
    return TorchActor(model, tokenizer, max_model_len, chat=chat)


def encode(
    tokenizer, prompts: list[str] | list[list[int]], max_tokens: int, max_model_len: int, chat: Chat | None = None
) -> list[list[int]]:
    """Token numbers of each prompt. ValueError for a prompt that is empty, or too long for max_model_len.

    prompts: texts, or token numbers already. chat: put texts into the chat template.
    """
    encoded = tokenize(tokenizer, prompts, chat) if prompts and isinstance(prompts[0], str) else prompts
    for prompt, ids in zip(prompts, encoded):
        if not ids or len(ids) + max_tokens > max_model_len:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and a response of up to {max_tokens} do not fit --max_model_len "
                f"{max_model_len} (or the prompt is empty); raise it or lower --max_tokens: {prompt[:80]!r}"
            )
    return encoded


def tokenize(tokenizer, prompts: list[str], chat: Chat | None = None) -> list[list[int]]:
    """Token numbers of each prompt: as it is, or as a user's message in the model's own chat template."""
    if chat and not tokenizer.chat_template:
        raise ValueError(
            f"--chat: {tokenizer.name_or_path} has no chat template, it is a base model: leave --chat away"
        )
    if chat:
        before = [{"role": "system", "content": chat.system}] if chat.system else []
        chats = [[*before, {"role": "user", "content": prompt}] for prompt in prompts]
        options = {} if chat.thinking is None else {"enable_thinking": chat.thinking}
        try:
            encoded = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False, **options)
        except Exception as e:  # jinja2's: templates refuse what their model was not taught, often a system message
            raise ValueError(
                f"--chat: the template of {tokenizer.name_or_path} refuses this message ({in_one_line(e)}). If it is "
                "the system message, leave --system away"
            ) from e
    else:
        encoded = tokenizer(prompts).input_ids
    check_one_start(tokenizer, encoded)
    return encoded


def read_text(tokenizer, ids: list[int], ends: Sequence[int]) -> str:
    """The text of a response, as the model wrote it: other special tokens (<think>, for some tokenizers) stay in it.

    Only what follows the text is cut off: a token that ends it, and padding.
    """
    length = len(ids)
    while length and (ids[length - 1] in ends or ids[length - 1] == tokenizer.pad_token_id):
        length -= 1
    return tokenizer.decode(ids[:length], skip_special_tokens=False, clean_up_tokenization_spaces=False)


class VLLMActor:
    """vLLM inside this process, so that reload() can hand over the trainer's tensors without a copy through disk.

    kv_cache_gib: the size of the KV cache. It is set explicitly, because vLLM's default would take the memory that
        training needs.
    sleep_mode: free the GPU for the trainer between calls. vLLM allows one such engine in a process.
    dtype: --dtype. chat: put prompts into the chat template.
    """

    def __init__(
        self,
        path: str,
        max_model_len: int = 512,
        seed: int = 0,
        kv_cache_gib: float = 0.5,
        sleep_mode: bool = False,
        dtype: str = "auto",
        chat: Chat | None = None,
    ):
        config = load_config(path)  # ValueError, in one line, if there is no such model
        # vLLM reads these when it is imported and when it starts. The engine has to be in this process; else, what the
        # user has set stays.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        try:
            from vllm import LLM
        except ImportError as e:
            raise ValueError(f"vLLM cannot be imported ({e}): install requirements.txt, or use --engine torch") from e
        on_gpu, threads = torch.cuda.is_available(), torch.get_num_threads()
        self.max_model_len, self.sleeps, self.asleep = max_model_len, on_gpu and sleep_mode, False
        self.chat = chat
        options = {}
        if ranks.world_size() > 1:  # each rank has an engine of its own
            options |= dict(distributed_executor_backend="external_launcher", tensor_parallel_size=1)
        if on_gpu:  # gpu_memory_utilization is only a start-up check here: the cache's size is set below
            options |= dict(enable_sleep_mode=sleep_mode, gpu_memory_utilization=0.05)
        try:
            self.llm = LLM(
                str(path),
                dtype=precision.choose_dtype(dtype, config),
                enforce_eager=not on_gpu,
                max_model_len=max_model_len,
                max_num_seqs=256,
                kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
                logprobs_mode="processed_logprobs",
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=seed,
                **options,
            )
        except Exception as e:  # of any kind: of vLLM's checks, or of the libraries below it
            raise ValueError(explain_start(e, path, max_model_len, kv_cache_gib)) from e
        reloading = logging.getLogger("vllm.model_executor.model_loader.reload.inplace")
        if not reloading.handlers:  # show vLLM's warning about weights that were not loaded, whatever the log level
            reloading.addHandler(logging.StreamHandler())
            reloading.setLevel(logging.WARNING)
        if on_gpu:
            torch.set_num_threads(threads)  # vLLM has set it to one
        share_classes(self.llm)
        self.tokenizer = self.llm.get_tokenizer()
        self.ends = end_tokens(self.tokenizer, config, load_generation_config(path))
        (first,) = self.generate([[0]], max_tokens=1, temperature=0.0)[0]
        if not math.isfinite(first.logprobs[0]):
            raise ValueError(f"{path!r}: log-probabilities are not finite, so a weight is NaN or infinite")

    def generate(
        self,
        prompts: list[str] | list[list[int]],
        n: int = 1,
        max_tokens: int = 128,
        temperature: float = 1.0,
        stop: Sequence[str] | None = None,
        progress: bool = False,
    ) -> list[list[Rollout]]:
        """n responses to each prompt (text or token numbers), as [len(prompts)][n]. Temperature 0 is greedy.

        stop: texts that end a response. The tokens that they are made of belong to it, its text ends before them.
        """
        from vllm import SamplingParams, TokensPrompt

        encoded = encode(self.tokenizer, prompts, max_tokens, self.max_model_len, self.chat)
        settings = SamplingParams(
            n=n, max_tokens=max_tokens, temperature=temperature, stop_token_ids=self.ends,
            stop=list(stop or ()), detokenize=bool(stop), skip_special_tokens=False,
            logprobs=0,  # only the sampled token's log-probability
        )  # fmt: skip
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=ids) for ids in encoded], settings, use_tqdm=progress
        )
        return [[self._rollout(ids, o, stop) for o in out.outputs] for ids, out in zip(encoded, outputs)]

    def _rollout(self, prompt_ids: list[int], output, stop: Sequence[str]) -> Rollout:
        ids = list(output.token_ids)
        logprobs = [candidates[token].logprob for token, candidates in zip(ids, output.logprobs)]
        text = cut_at(read_text(self.tokenizer, ids, self.ends), stop)
        return Rollout(prompt_ids, ids, logprobs, text, output.finish_reason == "length")

    def sleep(self) -> None:
        """Release the GPU memory of weights and cache until reload(). Does nothing on a CPU."""
        if self.sleeps:
            self.llm.sleep(level=2)
            self.asleep = True

    def reload(self, model) -> None:
        """Copy the model's weights into vLLM, in place, and clear its prefix cache of the old weights.

        A sleeping engine is woken in this order: memory for the weights, the weights, memory for the cache.
        """
        if self.asleep:
            wake(self.llm, "weights")
        copy_weights(self.llm, model)
        if self.asleep:
            wake(self.llm, "kv_cache")
            self.asleep = False
        clear_prefix_cache(self.llm)

    def close(self) -> None:
        """Stop the engine and free its memory. All ranks call. vLLM also ends the process group."""
        ranks.wait_for_all()  # a rank that exits early can crash ranks that still communicate with it
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class TorchActor:
    """The same interface, using transformers' generate, for small models. Samples the trainer's own model.

    It keeps the logits of a whole batch while it generates. With a large vocabulary, use vLLM.
    """

    def __init__(self, model, tokenizer, max_model_len: int = 512, batch: int = 256, chat: Chat | None = None):
        self.model, self.tokenizer, self.max_model_len, self.batch = model, tokenizer, max_model_len, batch
        self.chat, self.ends = chat, end_tokens(tokenizer, model.config, model.generation_config)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str] | list[list[int]],
        n: int = 1,
        max_tokens: int = 128,
        temperature: float = 1.0,
        stop: Sequence[str] | None = None,
        progress: bool = False,
    ) -> list[list[Rollout]]:
        """As VLLMActor.generate."""
        each = encode(self.tokenizer, prompts, max_tokens, self.max_model_len, self.chat)
        encoded = [ids for ids in each for _ in range(n)]
        flat, was_training = [], [m for m in self.model.modules() if m.training]
        self.model.eval()
        for start in tqdm(range(0, len(encoded), self.batch), desc="generate", disable=not progress):
            flat += self._batch(encoded[start : start + self.batch], max_tokens, temperature, stop)
        for module in was_training:
            module.training = True
        return [flat[i : i + n] for i in range(0, len(flat), n)]

    def _batch(
        self, encoded: list[list[int]], max_tokens: int, temperature: float, stop: Sequence[str] | None
    ) -> list[Rollout]:
        width, device = max(map(len, encoded)), self.model.device
        ids = torch.tensor([[0] * (width - len(row)) + row for row in encoded], device=device)  # padded left
        attend = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=device)
        # transformers limits sampling to 50 tokens by itself (top_k), and takes what is not set from the model's
        # generation_config.json. The model is lent an empty one, so that its own distribution is sampled.
        sampling = dict(temperature=temperature, top_k=0, top_p=1.0) if temperature > 0 else {}
        settings = GenerationConfig(
            max_new_tokens=max_tokens, do_sample=temperature > 0, **sampling, eos_token_id=self.ends or None,
            pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        criteria = [lambda so_far, scores: self._stop_now(so_far[:, width:], stop)] if stop else []
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            out = self.model.generate(
                ids, attention_mask=attend, generation_config=settings, stopping_criteria=criteria
            )
        finally:
            self.model.generation_config = own
        new = out.sequences[:, width:]  # [B,T]
        logprobs = torch.stack(
            [
                (step.float() / (temperature or 1.0)).log_softmax(-1).gather(1, token[:, None])[:, 0]
                for step, token in zip(out.logits, new.T)
            ],
            1,
        )  # [B,T]
        rollouts = []
        for prompt_ids, row, lp in zip(encoded, new.tolist(), logprobs.tolist()):
            length = next((i + 1 for i, token in enumerate(row) if token in self.ends), len(row))
            whole = read_text(self.tokenizer, row[:length], self.ends)
            text = cut_at(whole, stop)
            if text != whole:  # stopped by a text: the response ends with the first token that completes it
                length = next(i for i in range(1, length + 1) if self._stops(row[:i], stop))
            truncated = text == whole and row[length - 1] not in self.ends
            rollouts.append(Rollout(prompt_ids, row[:length], lp[:length], text, truncated))
        return rollouts

    def _stop_now(self, new: Tensor, stop: Sequence[str]) -> Tensor:
        """Which rows hold a stop, [B,T] -> [B]. (transformers' stop_strings fails for character-level tokenizers.)"""
        recent = new[:, -8 * max(map(len, stop)) :].tolist()
        return torch.tensor([self._stops(row, stop) for row in recent], device=new.device)

    def _stops(self, ids: list[int], stop: Sequence[str]) -> bool:
        text = read_text(self.tokenizer, ids, self.ends)
        return cut_at(text, stop) != text

    def sleep(self) -> None:
        """Nothing to free."""

    def reload(self, model) -> None:
        """Nothing to copy, unless the trainer's model is not the one that is sampled here."""
        if model is not self.model:
            self.model.load_state_dict(model.state_dict())

    def close(self) -> None:
        """Nothing to stop."""


def cut_at(text: str, stop: Sequence[str] | None) -> str:
    """The text before the first of these stops.

    >>> cut_at("42. Question: 1 + 1?", ["Question:", "42,"])
    '42. '
    """
    return text[: min((text.index(s) for s in stop or () if s in text), default=len(text))]


def pad_batch(rollouts: list[Rollout]) -> tuple[Tensor, Tensor, Tensor]:
    """Token numbers [B,N], the mask of response tokens [B,N] bool, and the sampler's log-probs [B,N].

    Padded on the right with token 0. Any token would do: causal attention never looks there, and the mask excludes it.
    """
    n = max(len(r.prompt_ids) + len(r.ids) for r in rollouts)
    input_ids = torch.zeros(len(rollouts), n, dtype=torch.long)
    mask, logprobs = torch.zeros(len(rollouts), n, dtype=torch.bool), torch.zeros(len(rollouts), n)
    for b, r in enumerate(rollouts):
        start, end = len(r.prompt_ids), len(r.prompt_ids) + len(r.ids)
        input_ids[b, :end] = torch.tensor(r.prompt_ids + r.ids)
        mask[b, start:end] = True
        logprobs[b, start:end] = torch.tensor(r.logprobs)
    return input_ids, mask, logprobs
