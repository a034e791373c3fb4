"""What several tests with verl need: its config, batches of its kind, and a worker of its own, without Ray."""

import os
from functools import partial
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import TrainingWorkerConfig
from verl.workers.utils.losses import ppo_loss

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "assets/tiny")
# On a CPU: no flash attention, no FSDP1, no compiler. float32, so that numbers can be compared.
ON_CPU = [
    "trainer.device=cpu",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.fsdp_config.strategy=fsdp2",
    "actor_rollout_ref.actor.use_torch_compile=False",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
]


def compose_config(*overrides: str):
    """verl's config with these overrides, as its command composes it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", list(overrides))


def start_worker(model: str, *overrides: str, tokens: int = 256):
    """verl's TrainingWorker of one process, with its engine and its loss. tokens: of one pass."""
    from verl.workers.engine_workers import TrainingWorker

    os.environ.update(WORLD_SIZE="1", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29512")
    config = compose_config(
        *ON_CPU, f"actor_rollout_ref.model.path={model}", "actor_rollout_ref.rollout.name=cpu",
        "actor_rollout_ref.actor.use_dynamic_bsz=True", f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={tokens}",
        "actor_rollout_ref.actor.optim.lr=1e-3", "actor_rollout_ref.actor.optim.total_training_steps=10",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False", *overrides,
    )  # fmt: skip
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.model_config = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    engine = actor.engine
    engine.use_dynamic_bsz = True
    engine.max_token_len_per_gpu = engine.infer_max_token_len_per_gpu = tokens
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model", model_config=actor.model_config, engine_config=engine,
            optimizer_config=actor.optim, checkpoint_config=actor.checkpoint,
        )
    )  # fmt: skip
    worker.reset()
    worker.set_loss_fn(partial(ppo_loss, config=actor))
    return worker


def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def make_batch(vocabulary: int = 30, rows: int = 12, seed: int = 0, lengths: tuple[int, int] = (4, 60)) -> TensorDict:
    """A batch as verl's v1 trainer hands it to a worker: random tokens, prompts of 3 to 9, responses of `lengths`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: tuple = ()) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator)

    prompts = [draw(2, vocabulary, (int(draw(3, 10)),)) for _ in range(rows)]
    responses = [draw(2, vocabulary, (int(draw(lengths[0], lengths[1] + 1)),)) for _ in range(rows)]
    marks = [torch.ones(len(response), dtype=torch.long) for response in responses]
    marks[1][2:4] = 0  # tokens of a tool, say
    marks[2][:] = 0  # a row that verl adds to fill a batch
    ids = [torch.cat(pair) for pair in zip(prompts, responses)]
    tensors = {
        "prompts": jagged(prompts),
        "responses": jagged(responses),
        "response_mask": jagged(marks),
        "loss_mask": jagged(marks),
        "input_ids": jagged(ids),
        "position_ids": jagged([torch.arange(len(row)) for row in ids]),
    }
    return tu.get_tensordict(tensors, {"temperature": 1.0, "calculate_entropy": True, "compute_loss": False})


def values(metric) -> list[float]:
    """The numbers of one of verl's metrics, which are lists or of its class Metric."""
    return list(getattr(metric, "values", metric))
