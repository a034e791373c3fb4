"""TRL's GRPOTrainer with attention-guided credit. To copy: this file and the five files of the algorithm.

    RhythmGRPOTrainer(model=..., reward_funcs=..., args=..., train_dataset=..., credit="coupled", q=0.4, amp=1.5)
    python -m examples.trl_rhythm                      the tiny model learns Countdown in some minutes

TRL's losses take one advantage for a response or one for each of its tokens. So gamma goes into the advantages, and no
loss is written again.
"""

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.hf_argparser import HfArg

from credit import CREDITS, assign_credit
from grpo import shape_advantages
from heads import Heads, split_heads
from metrics import Signals, measure_heads, observe, right_padding

try:
    from trl import GRPOConfig, GRPOTrainer  # isort: skip
    from accelerate.utils import is_peft_model
except ImportError as e:
    if __name__ == "__main__":
        sys.exit(f"error: {e}: this needs pip install trl==1.16.0")
    raise

SPAN_ROWS = 32  # responses of each process that the head split is measured on
CLIPPING = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # TRL's losses that clip the ratio
LOSSES = (*CLIPPING, "cispo", "sapo", "vespo")  # all of them that take an advantage for each token
PROMPTS, GROUP, MINIBATCHES, MAX_TOKENS = 32, 8, 4, 128  # of the command's batches


class RhythmGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages are multiplied by gamma, one number for each token of a response.

    credit is a name of credit.CREDITS; q, amp, alpha, k, lowest and produced are its settings; sign says which
    advantages it applies to (grpo.shape_advantages); window and horizon are WAAD's and FAI's. The head split is
    measured at the first batch of rollouts and every heads_every batches. "uniform" is GRPOTrainer, to the bit.

    The signals come from the pass in which TRL scores pi_old, which gives TRL's own log-probs. Where TRL makes no such
    pass, because its ratio is 1 by construction, one is added. TRL's log gets credit/gamma, the mean over tokens, and
    the shares of tokens with and without credit whose ratio is clipped. ValueError for what this cannot follow, for
    example GPT-2, to which padding in front of a prompt counts as text.
    """

    def __init__(self, *args, credit: str = "coupled", sign: str = "both", q: float = 0.4, amp: float = 1.5,
                 alpha: float = 0.5, k: int = 3, lowest: bool = False, produced: bool = False, window: int = 10,
                 horizon: tuple[int, int | None] = (10, 100), heads_every: int = 10, **kwargs):  # fmt: skip
        self.credit, self.sign, self.window, self.horizon, self.heads_every = credit, sign, window, horizon, heads_every
        self.settings = dict(q=q, amp=amp, alpha=alpha, k=k, lowest=lowest, produced=produced)
        self.generator, self.heads, self.batches = torch.Generator(), None, 0
        self.signals, self.logprobs, self.scores_next = None, None, False
        token = torch.ones(1, 1, dtype=torch.bool)
        self._shape(torch.ones(1), Signals(*torch.zeros(4, 1, 1), None), token)  # raises for a wrong name or setting
        super().__init__(*args, **kwargs)
        self.generator.manual_seed(self.args.seed + self.accelerator.process_index)
        adapters = self.model.peft_config.values() if is_peft_model(self.model) else ()
        devices = getattr(self.model, "hf_device_map", None) or {}
        obstacles = {
            "a vision model": self._is_vlm,
            "tools or environments": self.tools or self.environment_factories,
            "use_liger_kernel": self.args.use_liger_kernel,
            "layers on several devices": len(set(devices.values())) > 1,
            "adapters that add tokens to the prompt": any(a.is_prompt_learning for a in adapters),
            f"loss_type {self.loss_type!r}": self.loss_type not in LOSSES,
            f"importance_sampling_level {self.importance_sampling_level!r}, which gives all tokens of a response one "
            "gradient": self.importance_sampling_level != "token",
        }
        if credit != "uniform" and any(obstacles.values()):
            raise ValueError(f"credit {credit!r} cannot follow {next(x for x, there in obstacles.items() if there)}")

    def _generate_and_score_completions(self, inputs):
        if self.credit == "uniform" or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        args, self.signals = self.args, None
        generate_every = args.steps_per_generation * self.num_iterations
        self.scores_next = args.gradient_accumulation_steps % generate_every != 0 or (
            self.use_vllm and self.vllm_importance_sampling_correction
        )  # TRL's own rule for when it scores pi_old
        out = super()._generate_and_score_completions(inputs)
        if "tool_mask" in out:
            raise ValueError(f"credit {self.credit!r} cannot follow responses that are partly an environment's")
        if self.signals is None:
            ids, attention = (torch.cat([out[f"prompt_{x}"], out[f"completion_{x}"]], 1) for x in ("ids", "mask"))
            self.signals = self._observe(ids, attention, out["completion_ids"].shape[1])
        mask = out["completion_mask"].bool()
        out["advantages"], out["gamma"] = self._shape(out["advantages"], self.signals, mask)
        self._log_mean("credit/gamma", out["gamma"], mask)
        return out

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if self.scores_next:  # pi_old comes before the reference model
            self.scores_next = False
            self.signals = self._observe(input_ids, attention_mask, logits_to_keep)
            return self.signals.logprobs, None, None
        found = super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        self.logprobs = found[0].detach()
        return found

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if "gamma" in inputs and self.loss_type in CLIPPING:
            ratio = (self.logprobs - inputs.get("old_per_token_logps", self.logprobs)).exp()  # [B,T]
            low, high = ratio < 1 - self.epsilon_low, ratio > 1 + self.epsilon_high
            clipped = torch.where(inputs["advantages"] > 0, high, low & (inputs["advantages"] < 0))
            mask, credited = inputs["completion_mask"].bool(), inputs["gamma"] != 1
            self._log_mean("credit/clipped_inside", clipped, mask & credited)
            self._log_mean("credit/clipped_outside", clipped, mask & ~credited)
        return loss

    def _observe(self, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Signals:
        """Signals of the last `keep` tokens [B,keep], without dropout."""
        self.model.eval()
        try:
            return self._observe_in_passes(input_ids, attention_mask, keep)
        finally:
            self.model.train()

    def _observe_in_passes(self, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Signals:
        """Passes of as many rows as TRL's."""
        n = input_ids.shape[1]
        mask = attention_mask.bool() & (torch.arange(n, device=input_ids.device) >= n - keep)
        if self.batches == 0:
            self._check_padding(input_ids[:1][attention_mask[:1].bool()][:16])

        def passes(rows: Tensor | slice) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            size = self.args.per_device_train_batch_size
            return zip(*(x[rows].split(size) for x in (input_ids, mask, attention_mask)))

        # The head split, measured on the first rows of every process together. TRL may have masked truncated ones.
        if self.heads is None or self.batches % self.heads_every == 0:
            spans, tokens = 0.0, 0
            unmasked_first = (~mask.any(1)).int().argsort(stable=True)
            for ids, response, attention in passes(unmasked_first[:SPAN_ROWS]):
                places = right_padding(attention, response)
                ids, response = ids.gather(1, places), response.gather(1, places)
                measured = measure_heads(self.model, ids, response, score=self._score)
                spans = spans + measured.spans.nan_to_num() * response.sum()
                tokens = tokens + response.sum()
            spans = self.accelerator.reduce(spans) / self.accelerator.reduce(tokens)  # alike in every process
            if spans.isfinite().all():  # else no process has a response token
                self.heads = Heads(measured.layers, spans, *split_heads(spans))
        self.batches += 1

        # Log-probs, entropy, WAAD and FAI.
        parts = []
        for ids, response, attention in passes(slice(None)):
            seen = observe(
                self.model, ids, response, self.heads, self.window, self.horizon, attention, score=self._score
            )
            parts.append(seen[:4])
        return Signals(*(torch.cat(x)[:, -keep:] for x in zip(*parts)), self.heads)

    @torch.no_grad()
    def _check_padding(self, ids: Tensor) -> None:
        """ValueError for a model whose log-probs of these tokens [N] change with padding in front of them.

        TRL pads prompts on the left and gives no positions. The signals come from rows without that padding. So pi_old
        would be another distribution than the one that TRL's loss divides by it, and the first ratio would not be 1.
        """
        n, real = len(ids), torch.ones_like(ids)
        alone, padded = (
            super(RhythmGRPOTrainer, self)._get_per_token_logps_and_entropies(
                self.model, pad(ids, (padding, 0))[None], pad(real, (padding, 0))[None], n - 1
            )[0]
            for padding in (0, n)
        )
        in_float32 = next(self.model.parameters()).dtype == torch.float32 and not (self.args.bf16 or self.args.fp16)
        apart = (alone - padded).abs().mean().item()
        if not apart < (1e-3 if in_float32 else 0.3):
            raise ValueError(
                f"{type(self.model).__name__} counts padding in front of a prompt as text (log-probs differ by "
                f"{apart:.2g}), so TRL scores it otherwise than it samples: credit {self.credit!r} cannot follow"
            )

    def _score(self, model, input_ids: Tensor, mask: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        """TRL's log-probs and entropy of right-padded rows, at its temperature and precision; [B,N], 0 outside mask."""
        n, unmasked = input_ids.shape[1], torch.ones_like(input_ids)  # causal attention never sees padding on the right
        keep = n - int(mask.any(0).int().argmax())  # from the first response token on
        logprobs, entropies, _ = super()._get_per_token_logps_and_entropies(
            model, input_ids, unmasked, keep, compute_entropy=entropy
        )
        return tuple(torch.where(mask, pad(x.float(), (n - x.shape[1], 0)), 0.0) for x in (logprobs, entropies))

    def _shape(self, advantages: Tensor, signals: Signals, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The advantage of each token and gamma, [B,T] both."""
        gamma = assign_credit(self.credit, signals, mask, **self.settings, generator=self.generator)
        return shape_advantages(advantages, gamma, self.sign), gamma

    def _log_mean(self, name: str, x: Tensor, where: Tensor) -> None:
        """Log the mean over the places `where`, of all processes."""
        total, count = self.accelerator.reduce(torch.stack([(x * where).sum(), where.sum()]).float()).tolist()
        self._metrics["train"][name].append(total / count if count else math.nan)


@dataclass
class Args:
    """Train the tiny model on Countdown with TRL; prints its success on held-out problems before and after."""

    credit: Literal[CREDITS] = HfArg(default="coupled", help="Which tokens get more of the advantage.")
    batches: int = HfArg(default=8, help=f"Batches of {PROMPTS * GROUP} rollouts, {MINIBATCHES} updates on each.")
    lr: float = HfArg(default=3e-4, help="Learning rate.")
    problems: int = HfArg(default=192, help="Held-out problems, two sampled responses to each.")
    seed: int = HfArg(default=0, help="Seed of sampling and training.")


def main(args: Args) -> None:
    from datasets import Dataset

    import tasks
    from eval import evaluate, mean_interval
    from node.settings import TINY, load_model
    from rollout import TorchActor

    # The tiny model, its problems and its reward.
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(TINY)
    actor, held_out = TorchActor(model, tokenizer), tasks.load("countdown-tiny", "test", args.problems)
    before = evaluate(actor, "countdown-tiny", held_out, n=2, max_tokens=MAX_TOKENS)[1].mean(1)
    problems = {p.prompt: p for p in tasks.load("countdown-tiny", "train", PROMPTS * args.batches, args.seed)}

    def reward(prompts, completions, **_) -> list[float]:
        return [tasks.get("countdown-tiny").reward(problems[p], text) for p, text in zip(prompts, completions)]

    # TRL's trainer, with the settings of train.py.
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=MINIBATCHES * args.batches, steps_per_generation=MINIBATCHES,
        per_device_train_batch_size=PROMPTS * GROUP // MINIBATCHES, num_generations=GROUP, loss_type="grpo",
        max_completion_length=MAX_TOKENS, learning_rate=args.lr, lr_scheduler_type="constant_with_warmup",
        warmup_steps=2 * MINIBATCHES, weight_decay=0.0, optim="adamw_torch_fused", gradient_checkpointing=False,
        bf16=False, seed=args.seed, report_to="none", save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = RhythmGRPOTrainer(
        model, reward, config, Dataset.from_list([{"prompt": p} for p in problems]), processing_class=tokenizer,
        credit=args.credit,
    )  # fmt: skip
    trainer.train()
    after = evaluate(actor, "countdown-tiny", held_out, n=2, max_tokens=MAX_TOKENS)[1].mean(1)
    (low, high), gain = (100 * x.mean().item() for x in (before, after)), mean_interval(after - before)
    seconds = time.perf_counter() - start
    print(
        f"held-out success {low:.1f} % -> {high:.1f} % with credit {args.credit}, {100 * gain[0]:+.1f} points "
        f"(95 % interval ± {100 * gain[1]:.1f}), {args.batches} batches, {seconds:.0f} s"
    )


if __name__ == "__main__":
    from node.settings import parse_args

    main(parse_args(Args))
