"""Under torchrun: a few training steps on rollouts that were sampled before, the same for any number of ranks.

torchrun --nproc-per-node 2 tests/replay.py ROLLOUTS OUT [STEPS]
"""

import json
import pickle
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))


import rollout
import train
from node import ranks


class Replay:
    """Gives each problem the responses that were sampled for it."""

    def __init__(self, sampled):
        self.sampled = sampled

    def generate(self, prompts, n, max_tokens):
        return [self.sampled[p] for p in prompts]

    def sleep(self):
        pass

    def reload(self, model):
        pass


def main():
    problems, sampled = pickle.loads(Path(sys.argv[1]).read_bytes())
    device = ranks.start()
    args = train.Args(prompts=6, group=8, minibatches=3, micro_tokens=700, credit="coupled")
    model = ranks.shard(rollout.load_model("assets/tiny", "cpu")[0], device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.0, fused=True)
    generator, heads, records = torch.Generator().manual_seed(0), None, []
    for step in range(3):
        batch = problems[6 * step : 6 * step + 6]
        record, heads = train.train_step(args, model, optimizer, Replay(sampled), batch, heads, generator)
        records.append(record)
    whole = {name: p.clone() for name, p in ranks.named_weights(model)}
    if ranks.rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(records))
        torch.save(whole, sys.argv[2] + ".pt")
    ranks.stop()


if __name__ == "__main__":
    main()
