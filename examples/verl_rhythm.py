"""verl 0.9.1 with attention-guided credit, for runs on many nodes. To copy: this file and the algorithm's five files.

    export PYTHONPATH=/folder/with/the/six/files VERL_USE_EXTERNAL_MODULES=verl_rhythm
    python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo +algorithm.rhythm.credit=coupled ...

`import verl` imports this file in every process. No file of verl is edited. Four of its parts are replaced:

    the FSDP engine     In the pass that scores pi_old, observe also reads WAAD and FAI. gamma is made there, too.
    the v1 trainer      verl's default. It multiplies the advantages by gamma before the update.
    the v0 trainer      trainer.use_v1=False. The same.
    validate_config     Refuses what the credit cannot follow, in one line, before anything starts.

Without algorithm.rhythm, or with credit=uniform, all four do what verl's own do. The settings are in class Rhythm.
This file has four parts: 1. the settings, 2. the engine, 3. the trainers, 4. what is replaced.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial

import torch
import torch.distributed as dist
import transfer_queue
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad
from verl.trainer.ppo import ray_trainer
from verl.trainer.ppo.v1 import PPOTrainerSync
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
from verl.utils import config as verl_config
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.metric import Metric
from verl.utils.model import extract_multi_modal_inputs
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested

from credit import assign_credit
from grpo import find_clipped, micro_batches, shape_advantages
from heads import Heads, split_heads
from metrics import Signals, measure_heads, observe

# ---- 1. Settings ----


@dataclass(frozen=True)
class Rhythm:
    """algorithm.rhythm of verl's config: +algorithm.rhythm.credit=local +algorithm.rhythm.q=0.2, and so on."""

    credit: str = "coupled"  # a name of credit.CREDITS; scaled takes the mean of gamma on each rank alone
    q: float = 0.4  # the share of tokens to credit
    amp: float = 1.5  # gamma_amp
    alpha: float = 0.5  # coupled's
    k: int = 3  # coupled's
    lowest: bool = False  # credit the lowest q
    produced: bool = False  # give gamma_t to token t+1
    sign: str = "both"  # the advantages that gamma multiplies: both, positive or negative
    window: int = 10  # WAAD's W
    horizon: tuple[int, int | None] = (10, 100)  # FAI's
    heads_every: int = 10  # batches between two measurements of the head split
    heads_rows: int = 32  # responses of each rank that it is measured on


def read_settings(config) -> Rhythm | None:
    """algorithm.rhythm of verl's config; None for plain verl. ValueError for what the credit cannot follow."""
    section = config.algorithm.get("rhythm")
    if section is None:
        return None
    # Known names, and values that work: gamma of one token is made with them.
    names = [field.name for field in fields(Rhythm)]
    if unknown := sorted(set(section) - set(names)):
        raise ValueError(f"algorithm.rhythm has no setting {', '.join(unknown)}; it has {', '.join(names)}")
    settings = Rhythm(**section)
    for name in ("heads_every", "heads_rows", "window"):
        if getattr(settings, name) < 1:
            raise ValueError(f"algorithm.rhythm: {name} = {getattr(settings, name)}: give 1 or more")
    one = torch.ones(1, 1)
    try:
        gamma = make_gamma(settings, Signals(one, one, one, one, None), one.bool(), torch.Generator())
        shape_advantages(one[0], gamma, settings.sign)
    except (TypeError, ValueError) as e:
        raise ValueError(f"algorithm.rhythm: {e}") from e
    if settings.credit == "uniform":
        return None

    # What of verl's own settings the credit cannot follow: a text for each, and whether it is set.
    actor, trainer = config.actor_rollout_ref.actor, config.trainer
    correction = config.algorithm.get("rollout_correction") or {}
    obstacles = {
        f"actor.strategy={actor.strategy}, whose layers do not go through transformers' attention; use fsdp2": (
            actor.strategy not in ("fsdp", "fsdp2")
        ),
        "sequence parallelism, where no rank holds whole rows; set ulysses_sequence_parallel_size=1": (
            actor.strategy in ("fsdp", "fsdp2")
            and max(actor.get("ulysses_sequence_parallel_size", 1), actor.fsdp_config.ulysses_sequence_parallel_size)
            > 1
        ),
        "rollout_correction.bypass_mode=True, where nothing scores pi_old; set it to False": (
            correction.get("bypass_mode", False)
        ),
        "policy_loss.loss_mode=geo_mean, which averages the advantages of a response; use vanilla": (
            actor.policy_loss.loss_mode == "geo_mean"
        ),
        f"adv_estimator={config.algorithm.adv_estimator}, whose place for sum_pi_squared gamma takes; use grpo": (
            "optimal_token_baseline" in str(config.algorithm.adv_estimator)
        ),
        f"trainer.v1.trainer_mode={trainer.v1.trainer_mode}; use sync": (
            trainer.use_v1 and trainer.v1.trainer_mode != "sync"
        ),
    }
    for obstacle, is_there in obstacles.items():
        if is_there:
            raise ValueError(f"credit {settings.credit!r} cannot follow {obstacle}")
    return settings


def make_gamma(settings: Rhythm, signals: Signals, mask: Tensor, generator: torch.Generator) -> Tensor:
    """gamma [B,N] of the credit that is set; 1 outside the mask."""
    return assign_credit(
        settings.credit, signals, mask, q=settings.q, amp=settings.amp, alpha=settings.alpha, k=settings.k,
        lowest=settings.lowest, produced=settings.produced, generator=generator,
    )  # fmt: skip


# ---- 2. The engine: in each worker ----

SETTINGS = "rhythm"  # where the trainer puts the settings into a batch that is to be scored with credit
# gamma as the scoring pass gives it, beside log-probs and entropy. verl's v0 trainer takes one more number for each
# token, under this name. It belongs to an estimator that the credit refuses.
SCORED_GAMMA = "sum_pi_squared"
GAMMA = "rhythm_gamma"  # gamma of the response tokens, in a batch to train on


class RhythmEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine. A batch with settings is scored by observe; in one with gamma, clipped tokens are counted.

    All ranks use one head split, measured on heads_rows responses of each every heads_every batches.
    """

    heads: Heads | None = None
    batches = 0  # scored so far
    generator: torch.Generator | None = None  # of the credit "random"

    def forward_backward_batch(self, data: TensorDict, loss_function, forward_only: bool = False):
        if forward_only and SETTINGS in data.keys():
            return self._score_with_credit(data, Rhythm(**tu.get(data, SETTINGS)))
        if GAMMA in data.keys():
            loss_function = partial(loss_and_clipped, loss_function)
        return super().forward_backward_batch(data, loss_function, forward_only)

    def _score_with_credit(self, data: TensorDict, settings: Rhythm) -> dict:
        """log pi_old, entropy and gamma of a rank's responses, as verl returns them: nested, [B,length] each."""
        if extract_multi_modal_inputs(data.get("multi_modal_inputs", [])):
            raise ValueError(f"credit {settings.credit!r} cannot follow images, videos or sound in a prompt")
        self.batch_settings = {
            key: tu.get(data, key, default)
            for key, default in (("temperature", 1.0), ("use_fused_kernels", False), ("pad_token_id", 0))
        }
        ids, lengths, is_response, mask = pad_rows(data)  # [B,N], [B], [B,N], [B,N]

        # Passes of similar length, as large as verl's own.
        if tu.get(data, "use_dynamic_bsz", True):
            tokens = tu.get(data, "max_token_len_per_gpu")
        else:
            tokens = tu.get(data, "micro_batch_size_per_gpu") * ids.shape[1]

        def passes(rows: Tensor) -> list[tuple[Tensor, int, bool]]:
            return self._equally_many(micro_batches(is_response, rows, tokens))

        # The head split.
        every_row = torch.arange(len(ids), device=ids.device)
        if self.batches % settings.heads_every == 0:
            some_rows = every_row[:: -(-len(ids) // settings.heads_rows)]
            self.heads = self._measure_heads(ids, mask, passes(some_rows)) or self.heads
        self.batches += 1
        if self.heads is None:
            raise ValueError("no rank has a response token, so there is nothing to measure the head split on")

        # Log-probs, entropy, WAAD and FAI: one pass without gradient.
        scored = torch.zeros(4, *ids.shape, device=ids.device)
        for rows, width, _ in passes(every_row):
            *signals, _ = observe(
                self.module, ids[rows, :width], mask[rows, :width], self.heads, settings.window, settings.horizon,
                score=self._score,
            )  # fmt: skip
            scored[:, rows, :width] = torch.stack(signals)
        signals = Signals(*scored, self.heads)

        # gamma.
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(dist.get_rank())
        gamma = make_gamma(settings, signals, mask, self.generator)

        # In verl, column t belongs to token t+1.
        is_real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        outputs = {"log_probs": signals.logprobs, "entropy": signals.entropy, SCORED_GAMMA: gamma}
        offsets = pad(lengths.cumsum(0), (1, 0))
        nested = {
            name: torch.nested.nested_tensor_from_jagged(x.roll(-1, 1)[is_real], offsets) for name, x in outputs.items()
        }
        return {"model_output": nested, "loss": [1.0], "metrics": {}}

    def _measure_heads(self, ids: Tensor, mask: Tensor, passes: list[tuple[Tensor, int, bool]]) -> Heads | None:
        """One split for all ranks: spans are means over the response tokens of all passes of all ranks."""
        spans, tokens = 0.0, torch.zeros((), device=ids.device)
        for rows, width, is_new in passes:
            response = mask[rows, :width]
            measured = measure_heads(self.module, ids[rows, :width], response, score=self._score)
            weight = response.sum() * is_new
            spans, tokens = spans + measured.spans.nan_to_num() * weight, tokens + weight
        for total in (spans, tokens):
            dist.all_reduce(total, group=self.get_data_parallel_group())
        return Heads(measured.layers, spans / tokens, *split_heads(spans / tokens)) if tokens > 0 else None

    def _equally_many(self, passes: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int, bool]]:
        """The passes of one rank, each with False if it is repeated.

        All ranks must make equally many, or FSDP deadlocks. So a rank with fewer repeats some.
        """
        most = torch.tensor(len(passes), device=get_device_id())
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.get_data_parallel_group())
        return [(*passes[i % len(passes)], i < len(passes)) for i in range(int(most))]

    def _score(self, model, input_ids: Tensor, mask: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
        """verl's own log-probs and entropy of right-padded rows [B,N]: its temperature, precision and output head."""
        b, n = input_ids.shape
        offsets = torch.arange(0, b * n + 1, n, device=input_ids.device)
        positions = torch.arange(n, device=input_ids.device).repeat(b)
        batch = tu.get_tensordict(
            {
                "input_ids": torch.nested.nested_tensor_from_jagged(input_ids.flatten(), offsets),
                "position_ids": torch.nested.nested_tensor_from_jagged(positions, offsets),
            },
            {**self.batch_settings, "use_remove_padding": False, "calculate_entropy": entropy},
        )
        inputs, output_args = self.prepare_model_inputs(batch)
        inputs["attention_mask"] = None  # causal attention never sees padding on the right
        in_float32 = self._autocast_dtype == torch.float32
        with nullcontext() if in_float32 else torch.autocast(get_device_name(), self._autocast_dtype):
            output = self.prepare_model_outputs(model(**inputs, use_cache=False), output_args, batch, None)
        columns = (output[name].values().view(b, n).float() for name in ("log_probs", "entropy"))
        return tuple(pad(x[:, :-1], (1, 0)) for x in columns)


def pad_rows(data: TensorDict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch of verl's, padded on the right: ids [B,N], lengths [B], is_response [B,N], mask [B,N].

    The mask leaves out response tokens that are not the model's own, such as a tool's output.
    """
    nested = data["input_ids"].to(get_device_id())
    ids, lengths = nested.to_padded_tensor(0), nested.offsets().diff()
    response_mask = data["response_mask"].to(get_device_id())
    if response_mask.is_nested:  # v1
        sizes, response_mask = response_mask.offsets().diff(), response_mask.to_padded_tensor(0)
    else:  # v0, where padding lies on both sides
        sizes = data["attention_mask"][:, -response_mask.shape[1] :].sum(1).to(ids.device)

    # A response is the end of its row. place: the number of each token within the response.
    place = torch.arange(ids.shape[1], device=ids.device) - (lengths - sizes)[:, None]
    is_response = (place >= 0) & (place < sizes[:, None])
    is_own = response_mask.bool().gather(1, place.clamp(0, response_mask.shape[1] - 1))
    return ids, lengths, is_response, is_response & is_own


def loss_and_clipped(loss_function, model_output, data: TensorDict, dp_group=None) -> tuple[Tensor, dict]:
    """verl's loss, with metrics that count the tokens with and without credit, and those of them that are clipped."""
    loss, metrics = loss_function(model_output=model_output, data=data, dp_group=dp_group)
    config = loss_function.keywords["config"]
    logprobs = no_padding_2_padding(model_output["log_probs"].detach().float(), data)
    found = data.select("response_mask", "old_log_probs", "advantages", GAMMA).to_padded_tensor()
    mask = found["response_mask"].bool()
    clipped = find_clipped(
        logprobs, found["old_log_probs"], found["advantages"], mask, config.clip_ratio_low, config.clip_ratio_high
    )
    for kind, tokens in (("credited", mask & (found[GAMMA] != 1)), ("others", mask & (found[GAMMA] == 1))):
        metrics[f"rhythm/tokens_{kind}"] = Metric("sum", tokens.sum())
        metrics[f"rhythm/clipped_{kind}"] = Metric("sum", (clipped & tokens).sum())
    return loss, metrics


# ---- 3. The trainers: in the driver ----


class RhythmTrainer(PPOTrainerSync):
    """verl's v1 trainer, whose tensors lie in TransferQueue."""

    def __init__(self, config):
        super().__init__(config)
        self.rhythm = read_settings(config)

    def _compute_old_log_prob(self, batch, metrics: dict):
        if self.rhythm is None:
            return super()._compute_old_log_prob(batch, metrics)
        batch.extra_info[SETTINGS] = asdict(self.rhythm)
        scored = super()._compute_old_log_prob(batch, metrics)
        for info in (batch.extra_info, scored.extra_info):  # a reference model's pass needs none
            info.pop(SETTINGS, None)
        return scored

    def _update_actor(self, batch, metrics: dict):
        if self.rhythm is None:
            return super()._update_actor(batch, metrics)
        where = dict(keys=batch.keys, partition_id=batch.partition_id)
        data = transfer_queue.kv_batch_get(**where, select_fields=["advantages", SCORED_GAMMA, "response_mask"])
        gamma, advantages = response_from_nested(data[SCORED_GAMMA], data["response_mask"]), data["advantages"]
        shaped = torch.nested.nested_tensor_from_jagged(
            shape_tokens(advantages.values(), gamma.values(), self.rhythm.sign), advantages.offsets()
        )
        new_fields = TensorDict({"advantages": shaped, GAMMA: gamma}, batch_size=len(batch))
        batch = super()._update_actor(transfer_queue.kv_batch_put(**where, fields=new_fields), metrics)
        metrics.update(summarize(metrics, gamma.values(), data["response_mask"].values().bool()))
        return batch


class RhythmRayPPOTrainer(ray_trainer.RayPPOTrainer):
    """verl's v0 trainer, whose tensors are padded and lie in the driver."""

    def __init__(self, config, *args, **kwargs):
        self.rhythm = read_settings(config)
        if self.rhythm is not None:
            config.actor_rollout_ref.actor.calculate_sum_pi_squared = True  # so that SCORED_GAMMA is handed over
        super().__init__(config, *args, **kwargs)

    def _compute_old_log_prob(self, batch):
        if self.rhythm is None:
            return super()._compute_old_log_prob(batch)
        batch.meta_info[SETTINGS] = asdict(self.rhythm)
        scored, mfu = super()._compute_old_log_prob(batch)
        del batch.meta_info[SETTINGS]
        scored.batch[GAMMA] = scored.batch.pop(SCORED_GAMMA)
        return scored, mfu

    def _update_actor(self, batch):
        if self.rhythm is None:
            return super()._update_actor(batch)
        gamma = batch.batch[GAMMA]
        batch.batch["advantages"] = shape_tokens(batch.batch["advantages"], gamma, self.rhythm.sign)
        output = super()._update_actor(batch)
        metrics = output.meta_info["metrics"]
        metrics.update(summarize(metrics, gamma, batch.batch["response_mask"].bool()))
        return output


def shape_tokens(advantages: Tensor, gamma: Tensor, sign: str) -> Tensor:
    """grpo.shape_advantages where each token has an advantage of its own. All of one shape."""
    return shape_advantages(advantages.flatten(), gamma.flatten()[:, None], sign).view_as(advantages)


def summarize(metrics: dict, gamma: Tensor, mask: Tensor) -> dict[str, float]:
    """What verl logs of a step's credit. Takes the counts of loss_and_clipped out of metrics.

    rhythm/gamma: the mean over response tokens; rhythm/credited: the share with gamma != 1; rhythm/clipped_credited,
    rhythm/clipped_others: the share of the tokens with and without credit whose gradient is clipped to 0, by the rule
    of loss_mode=vanilla.
    """
    found = {"rhythm/gamma": gamma[mask].mean().item(), "rhythm/credited": (gamma[mask] != 1).float().mean().item()}
    for kind in ("credited", "others"):
        # Means over the mini-batches of both counts, so that their ratio is that of the sums.
        counts = (metrics.pop(f"actor/rhythm/{name}_{kind}") for name in ("clipped", "tokens"))
        clipped, tokens = (torch.tensor(getattr(x, "values", x), dtype=torch.float).mean().item() for x in counts)
        found[f"rhythm/clipped_{kind}"] = clipped / max(tokens, 1e-9)
    return found


# ---- 4. What is replaced ----


def validate_config(config, *args, **kwargs):
    """verl's check of its config, after ours."""
    try:
        read_settings(config)
    except ValueError as e:
        raise SystemExit(f"error: {e}") from None
    return verl_validate_config(config, *args, **kwargs)


verl_validate_config, verl_config.validate_config = verl_config.validate_config, validate_config
TRAINER_REGISTRY["sync"] = RhythmTrainer
ray_trainer.RayPPOTrainer = RhythmRayPPOTrainer
for strategy in ("fsdp", "fsdp2"):
    engines = EngineRegistry._engines["language_model"][strategy]  # {device: class}
    engines.update(dict.fromkeys(engines, RhythmEngine))
