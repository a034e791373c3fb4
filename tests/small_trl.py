"""Small runs of TRL's trainer and ours on the tiny model, and gamma made another way, from eager maps.

torchrun --nproc-per-node 2 tests/small_trl.py OUT          two ranks: what each of them saw, and weights, for the tests
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import credit
import grpo
import heads
import metrics
import tasks
from examples.trl_rhythm import GRPOConfig, GRPOTrainer, RhythmGRPOTrainer
from node.settings import TINY, load_model

HORIZON = (3, 100)  # the responses are short


def weights(model):
    """The model's weights by their own names, LoRA's adapters added in."""
    merged = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if "lora_" not in name
    }
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            merged[name.replace("base_model.model.", "") + ".weight"] += module.get_delta_weight("default").detach()
    return merged


class Recorder:
    """Keeps each batch of rollouts with the weights that it was scored with, and the inputs of each loss."""

    def _generate_and_score_completions(self, inputs):
        before, passes = weights(self.model), self.passes
        out = super()._generate_and_score_completions(inputs)
        self.batches_seen.append({**out, "weights": before, "passes": self.passes - passes})
        return out

    def _compute_loss(self, model, inputs):
        self.inputs_seen.append(inputs)
        return super()._compute_loss(model, inputs)


class TRL(Recorder, GRPOTrainer):
    pass


class Rhythm(Recorder, RhythmGRPOTrainer):
    pass


def reward(completion_ids, **_):
    """How many different tokens a response has: groups of equal reward are rare."""
    return [float(len(set(ids))) for ids in completion_ids]


def trainer(kind=Rhythm, steps=2, peft=None, horizon=HORIZON, path=TINY, **changes):
    """A trainer of 16 rollouts a batch in two minibatches. Credit's settings and TRL's may both be given."""
    names = ("credit", "amp", "q", "lowest", "sign", "heads_every")
    ours = {name: changes.pop(name) for name in names if name in changes}
    ours |= {} if kind is TRL else {"horizon": horizon}
    settings = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=8, steps_per_generation=2, num_generations=4,
        max_completion_length=24, max_steps=steps, learning_rate=1e-3, loss_type="grpo", bf16=False, use_cpu=True,
        gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    from datasets import Dataset

    model, tokenizer = load_model(path, "cpu")
    rows = Dataset.from_list([{"prompt": p.prompt} for p in tasks.load("countdown-tiny", "train", 32)])
    made = kind(
        model,
        reward,
        GRPOConfig(**settings | changes),
        rows,
        rows.select(range(4)),
        tokenizer,
        peft_config=peft,
        **ours,
    )
    made.batches_seen, made.inputs_seen, made.passes = [], [], 0

    def count(module, args, kwargs):  # passes that score, not those that generate
        made.passes += kwargs.get("use_cache") is False and not torch.is_grad_enabled()

    model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    return made


def trained(*args, **changes):
    """The trainer after its steps."""
    made = trainer(*args, **changes)
    made.train()
    return made


def eager_maps(batch):
    """Transformers' own maps of the middle layers on the batch as TRL padded it, and the mask of responses."""
    model, _ = load_model(TINY, "cpu")
    model.load_state_dict(batch["weights"], strict=False)  # the head is tied
    model.set_attn_implementation("eager")
    ids, attention = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    with torch.no_grad():
        maps = model(ids, attention_mask=attention, output_attentions=True).attentions
    mask = attention.bool()
    mask[:, : batch["prompt_ids"].shape[1]] = False
    return [maps[layer] for layer in heads.middle_layers(12)], mask


def eager_gammas(batches):
    """Coupled credit of each batch by the definitions, the head split measured on all of them together."""
    found = [eager_maps(batch) for batch in batches]
    spans = sum(torch.stack([heads.head_spans(m, mask) for m in maps]) * mask.sum() for maps, mask in found)
    groups = heads.split_heads(spans / sum(mask.sum() for _, mask in found))
    gammas = []
    for (maps, mask), batch in zip(found, batches):
        near, far = (torch.cat([m[:, g] for m, g in zip(maps, group)], 1).mean(1) for group in groups)
        gamma = credit.coupled_rhythm(metrics.waad(near, mask), metrics.fai(far, mask, HORIZON), mask)
        gammas.append(gamma[:, batch["prompt_ids"].shape[1] :])
    return gammas


def scored(model):
    """Log-probs of a ragged batch and how long each weight's gradient is, for a model wrapped by anyone."""
    n = 30
    ids = torch.randint(3, 30, (4, n), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(n) >= 6) & (torch.arange(n) < torch.tensor([[30], [20], [25], [12]]))
    signals = metrics.observe(model, ids, mask)
    logprobs, _ = grpo.token_logprobs(model, ids, mask)
    logprobs.sum().backward()
    gradients = {}
    for name, p in model.named_parameters():
        g = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        gradients[name.removeprefix("module.")] = g
    return {"logprobs": logprobs.detach(), "signals": signals[:4], "gradients": gradients}


def main(out):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    made = trained(steps=4)  # starts the process group
    rank = made.accelerator.process_index
    seen = {"batches": made.batches_seen, "weights": weights(made.model), "log": made.state.log_history}
    seen["DDP"] = scored(DistributedDataParallel(load_model(TINY, "cpu")[0]))
    sharded = load_model(TINY, "cpu")[0]
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))  # else a GPU's, if there is one
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    seen["FSDP2"] = scored(fully_shard(sharded, mesh=mesh))
    torch.save(seen, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
