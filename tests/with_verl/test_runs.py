"""verl's own command with each of its trainers: whole steps, two workers on a local Ray. See run_verl.py."""

import pytest
from run_verl import run


@pytest.mark.parametrize("trainer, use_v1", [("v1", True), ("v0", False)])
def test_two_whole_steps(trainer, use_v1, tmp_path):
    steps = run(
        tmp_path, f"trainer.use_v1={use_v1}", "+algorithm.rhythm.credit=coupled", "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4", "trainer.total_training_steps=2",
        "trainer.val_before_train=False", "trainer.test_freq=-1", train=64, test=8, time_limit=600,
    )  # fmt: skip
    assert [step["training/global_step"] for step in steps] == [1, 2]
    for step in steps:
        assert 1.1 < step["rhythm/gamma"] < 1.3
        assert 0.4 < step["rhythm/credited"] < 0.7
        assert 0 <= step["rhythm/clipped_credited"] < 0.2 and 0 <= step["rhythm/clipped_others"] < 0.2
        assert step["actor/grad_norm"] > 0 and step["timing_s/old_log_prob"] > 0
        # verl's returns of GRPO are its advantages before gamma: the largest one was multiplied by a value of gamma.
        factor = step["critic/advantages/max"] / step["critic/returns/max"]
        assert min(abs(factor - gamma) for gamma in (1.25, 1.5, 1.75)) < 1e-3, factor
        # The scores are those of the model that sampled.
        assert step["training/rollout_probs_diff_mean"] < 1e-3
    # The counts of clipped tokens were taken out.
    assert not [name for name in steps[0] if "tokens_credited" in name]
