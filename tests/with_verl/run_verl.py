"""verl's own command on a machine without GPU: the tiny model learns Countdown.

    .venv-verl/bin/python tests/with_verl/run_verl.py --out runs/verl [overrides of verl's config]
    python tests/with_verl/run_verl.py --report lab/records/verl/countdown-coupled.jsonl

Two workers on a local Ray, FSDP2 over both, verl's agent loops, reward workers and trainer. In the place of vLLM's
servers are two of cpu_backend.py's.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    # The tiny model and Countdown, with train.py's settings for them.
    f"actor_rollout_ref.model.path={ROOT}/assets/tiny",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
    "actor_rollout_ref.model.custom_chat_template=\"{{ messages[0]['content'] }}\"",
    "actor_rollout_ref.model.enable_gradient_checkpointing=False",
    f"reward.custom_reward_function.path={ROOT}/examples/verl_task.py",
    "data.train_batch_size=32",
    "data.max_prompt_length=64",
    "data.max_response_length=128",
    "data.dataloader_num_workers=0",
    "algorithm.adv_estimator=grpo",
    "actor_rollout_ref.rollout.n=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",  # prompts: four updates a step
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
    "actor_rollout_ref.actor.optim.lr=2e-4",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=5",
    "actor_rollout_ref.actor.optim.weight_decay=0.0",
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096",
    "actor_rollout_ref.rollout.val_kwargs.do_sample=True",
    "actor_rollout_ref.rollout.val_kwargs.temperature=1.0",
    "trainer.total_epochs=100",
    "trainer.save_freq=-1",
    "trainer.resume_mode=disable",
    "trainer.logger=[console,file]",
    # A CPU, two workers.
    "trainer.device=cpu",
    "trainer.n_gpus_per_node=2",
    "actor_rollout_ref.actor.strategy=fsdp2",
    "actor_rollout_ref.actor.fsdp_config.strategy=fsdp2",
    "actor_rollout_ref.actor.use_torch_compile=False",
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
    "actor_rollout_ref.rollout.name=cpu",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "reward.num_workers=1",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "ray_kwargs.ray_init.num_cpus=16",
    "+ray_kwargs.ray_init.num_gpus=2",  # Ray's word for places of workers
    "+ray_kwargs.ray_init.object_store_memory=200000000",
    "+ray_kwargs.ray_init.include_dashboard=False",
]

VALIDATION = "val-core/countdown-tiny/acc/mean@4"


def run(folder: Path, *overrides: str, train: int = 640, test: int = 64, time_limit: float | None = None) -> list[dict]:
    """One run of verl's command. Returns what it logged, a dict a step. Raises with its output's end if it failed.

    time_limit: in seconds, because on an overloaded machine Ray may wait for its own processes for ever.
    """
    from examples import verl_task

    folder.mkdir(parents=True, exist_ok=True)
    verl_task.write("countdown-tiny", str(folder), train=train, test=test)
    log = folder / "metrics.jsonl"
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT}/examples:{ROOT}/tests/with_verl",
        "VERL_USE_EXTERNAL_MODULES": "cpu_backend,verl_rhythm",
        "VERL_PLATFORM": "cpu",
        "VERL_FILE_LOGGER_PATH": str(log.resolve()),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    files = [
        f"data.{split}_files={folder.resolve()}/{name}.parquet" for split, name in (("train", "train"), ("val", "test"))
    ]
    output = folder / "output.txt"
    with output.open("w") as printed:
        done = subprocess.run(
            [sys.executable, "-m", "verl.trainer.main_ppo", *SETTINGS, *files, *overrides],
            cwd=folder, env=environment, stdout=printed, stderr=subprocess.STDOUT, timeout=time_limit,
        )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"verl ended with {done.returncode}:\n{output.read_text()[-6000:]}")
    return [json.loads(line)["data"] for line in log.read_text().splitlines()]


def report(path: Path) -> None:
    """Print what a run learned, from what it logged."""
    steps = [json.loads(line)["data"] for line in path.read_text().splitlines()]
    validations = [step[VALIDATION] for step in steps if VALIDATION in step]
    steps = [step for step in steps if "rhythm/gamma" in step]
    before, after = validations[0], validations[-1]
    # Sampling error of 256 responses before and 256 after; the problems are the same.
    half = 1.96 * ((before * (1 - before) + after * (1 - after)) / 256) ** 0.5
    print(
        f"held-out success {100 * before:.1f} % -> {100 * after:.1f} %, {100 * (after - before):+.1f} points "
        f"(95 % interval ± {100 * half:.1f}), {len(steps)} steps"
    )
    for name in ("rhythm/gamma", "rhythm/credited", "rhythm/clipped_credited", "rhythm/clipped_others",
                 "training/rollout_probs_diff_max"):  # fmt: skip
        values = [step[name] for step in steps]
        print(f"{name}: {min(values):.2g} to {max(values):.2g}, mean {sum(values) / len(values):.4f}")
    shares = sorted(step["timing_s/old_log_prob"] / step["timing_s/step"] for step in steps)
    print(f"old_log_prob, median share of a step: {100 * shares[len(shares) // 2]:.1f} %")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/verl"))
    parser.add_argument("--report", type=Path, help="print what this file, a run's metrics.jsonl, says, and stop")
    args, overrides = parser.parse_known_args()
    if args.report is None:
        run(args.out, *overrides)
    report(args.report or args.out / "metrics.jsonl")
