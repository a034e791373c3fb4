"""Three training steps on given rollouts: the same result for any number of ranks, up to rounding.

torchrun --nproc-per-node 2 -m node.replay ROLLOUTS OUT
"""

import json
import pickle
import sys
from pathlib import Path

import torch

import tasks
from node import checkpoint, ranks
from node.settings import TINY, load_model
from rollout import TorchActor

TASK, STEPS, PROMPTS = "countdown-tiny", 3, 6


class Replay:
    """A sampler that returns, for each prompt, the responses that were recorded for it."""

    def __init__(self, sampled: dict[str, list]):
        self.sampled = sampled

    def generate(self, prompts: list[str], n: int, max_tokens: int, stop=None) -> list[list]:
        """The recorded responses to the prompts."""
        return [self.sampled[p] for p in prompts]

    def sleep(self) -> None:
        """Nothing to free."""

    def reload(self, model) -> None:
        """Nothing to copy."""


def record_rollouts(path: Path) -> None:
    """Sample rollouts of the tiny model for main() to learn from."""
    torch.manual_seed(0)
    problems = tasks.load(TASK, "train", STEPS * PROMPTS)
    actor = TorchActor(*load_model(TINY))
    groups = actor.generate([p.prompt for p in problems], n=8, max_tokens=80)
    path.write_bytes(pickle.dumps((problems, {p.prompt: g for p, g in zip(problems, groups)})))


def main(rollouts: str, out: str, train) -> None:
    """Three training steps on the rollouts. train: the module."""
    problems, sampled = pickle.loads(Path(rollouts).read_bytes())
    device = ranks.start()
    args = train.Args(task=TASK, prompts=PROMPTS, group=8, minibatches=3, micro_tokens=700, credit="coupled")
    model = checkpoint.load_sharded(TINY, device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.0, fused=True)
    generator, heads, records = torch.Generator().manual_seed(0), None, []
    for step in range(STEPS):
        batch = problems[PROMPTS * step : PROMPTS * (step + 1)]
        found, heads = train.train_step(args, model, optimizer, Replay(sampled), batch, heads, generator)
        records.append(found)
    weights = {name: w.cpu().clone() for name, w in ranks.named_weights(model)}
    if ranks.rank() == 0:
        Path(out).write_text(json.dumps(records))
        torch.save(weights, out + ".pt")
    ranks.stop()


if __name__ == "__main__":
    import train  # here, so that nothing in this folder depends on the loop

    main(*sys.argv[1:], train)
