"""What is refused, and README's recipe, against verl's own config. No GPU and no model is needed."""

import re
import shlex

import parts
import pytest
import verl_rhythm
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

BASE = ["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.name=vllm"]
CREDIT = "+algorithm.rhythm.credit=coupled"


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["+algorithm.rhythm.credit=coupler"], "unknown credit 'coupler': choose one of coupled, local"),
        ([CREDIT, "+algorithm.rhythm.qq=1"], "algorithm.rhythm has no setting qq; it has credit, q, amp"),
        ([CREDIT, "+algorithm.rhythm.q=2"], "algorithm.rhythm: q = 2: the share of tokens"),
        ([CREDIT, "+algorithm.rhythm.sign=up"], "unknown sign 'up': choose one of both"),
        ([CREDIT, "+algorithm.rhythm.heads_every=0"], "heads_every = 0: give 1 or more"),
        ([CREDIT, "model_engine=megatron"], "cannot follow actor.strategy=megatron"),
        ([CREDIT, "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"], "cannot follow sequence parallelism"),
        ([CREDIT, "algorithm.rollout_correction.bypass_mode=True"], "bypass_mode=True, where nothing scores pi_old"),
        ([CREDIT, "actor_rollout_ref.actor.policy_loss.loss_mode=geo_mean"], "averages the advantages"),
        ([CREDIT, "algorithm.adv_estimator=optimal_token_baseline"], "whose place for sum_pi_squared gamma takes"),
        ([CREDIT, "trainer.v1.trainer_mode=separate_async"], "trainer_mode=separate_async; use sync"),
    ],
)
def test_refusals_are_one_line_before_anything_starts(overrides, message):
    config = parts.compose_config(*BASE, *overrides)
    with pytest.raises(SystemExit) as stop:
        validate_config(config, use_reference_policy=False, use_critic=False)
    text = stop.value.code
    assert text.startswith("error: ") and message in text and "\n" not in text


@pytest.mark.parametrize("overrides", [[], ["+algorithm.rhythm.credit=uniform"]])
def test_plain_verl_without_credit(overrides):
    assert verl_rhythm.read_settings(parts.compose_config(*BASE, *overrides)) is None


def recipe(name: str) -> list[str]:
    """The overrides of a list in README's recipe: the words of `name=( ... )`."""
    text = (parts.ROOT / "examples/README.md").read_text()
    block = re.search(rf"^{name}=\(\n(.*?)^\)", text, re.DOTALL | re.MULTILINE).group(1)
    assert all("#" in line for line in block.splitlines()), "a line without a comment"
    return shlex.split(block.replace("$MODEL", parts.TINY).replace("$HERE", "/here"), comments=True)


@pytest.mark.parametrize("nodes, lists", [(1, ["settings"]), (8, ["settings", "eight_nodes"])])
def test_the_recipe_is_composed_and_accepted_by_verl(nodes, lists):
    config = parts.compose_config(*[override for name in lists for override in recipe(name)])
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    settings = verl_rhythm.read_settings(config)
    assert settings == verl_rhythm.Rhythm(credit="coupled")

    # The paper's numbers, as node/paper.sh has them for train.py.
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.trainer.nnodes == nodes and config.trainer.n_gpus_per_node == 8
    responses = config.data.train_batch_size * rollout.n
    assert responses == (512 if nodes == 1 else 1024)
    assert responses / (actor.ppo_mini_batch_size * rollout.n) == 16  # gradient steps
    assert (actor.optim.lr, rollout.temperature, config.trainer.total_training_steps) == (1e-6, 1.0, 500)
    assert (config.data.max_response_length, actor.clip_ratio_low, actor.clip_ratio_high) == (1024, 0.2, 0.2)
    assert actor.loss_agg_mode == "seq-mean-token-mean" and not actor.use_kl_loss and actor.entropy_coeff == 0
    assert config.algorithm.adv_estimator == "grpo" and not config.algorithm.use_kl_in_reward
    assert actor.optim.weight_decay == 0.0 and need_critic(config) is False
    # Each GPU gets equally many rows of a mini-batch.
    assert actor.ppo_mini_batch_size * rollout.n % (nodes * 8) == 0
