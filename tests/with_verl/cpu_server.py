"""A rollout server without vLLM: rollout.TorchActor in an actor of Ray's."""

import asyncio

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.workers.rollout.replica import TokenOutput

from rollout import TorchActor


class Server:
    """Generates for one worker. Requests that come within half a second are one batch."""

    def __init__(self, path: str, max_tokens: int):
        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.actor = TorchActor(model, AutoTokenizer.from_pretrained(path))
        self.max_tokens, self.waiting, self.step = max_tokens, [], 0

    async def generate(self, prompt_ids: list[int], sampling_params: dict, **_) -> TokenOutput:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((prompt_ids, sampling_params.get("temperature", 1.0), future))
        if len(self.waiting) == 1:
            self.task = asyncio.create_task(self._answer())
        return await future

    async def _answer(self) -> None:
        await asyncio.sleep(0.5)
        requests, self.waiting = self.waiting, []
        for temperature in {request[1] for request in requests}:
            these = [request for request in requests if request[1] == temperature]
            prompts = [prompt_ids for prompt_ids, _, _ in these]
            for (_, _, future), [rollout] in zip(
                these, self.actor.generate(prompts, max_tokens=self.max_tokens, temperature=temperature)
            ):
                future.set_result(
                    TokenOutput(
                        token_ids=rollout.ids,
                        log_probs=rollout.logprobs,
                        stop_reason="length" if rollout.truncated else "completed",
                        extra_fields={"global_steps": self.step},
                    )
                )

    async def load(self, weights: dict, step: int) -> None:
        self.actor.model.load_state_dict(weights, strict=False)  # a tied head is not sent
        self.step = step

    async def wake_up(self) -> None:
        pass

    async def sleep(self) -> None:
        pass
