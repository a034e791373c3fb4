"""Token values against a policy whose true values are known; the tables against choices that know them; the command."""

import itertools
import json
import math

import pytest
import torch

from lab import truth, truth_tables
from lab.stats import Clusters
from metrics import Signals
from node.output import read_lines
from rollout import Rollout, pad_batch

CHANCE = (0.5, 1.0, 0.5, 0.3, 0.9, 0.5)  # of token 1 rather than 2 at each place; the second place is sure


def right(ids) -> float:
    """Four ones or more, or some others: places matter more or less, the last of all sometimes not."""
    return float(sum(i == 1 for i in ids) >= 4 or (ids[0] == 2 and ids[4] == ids[5] == 1))


def true_value(start: tuple[int, ...]) -> float:
    """V of a beginning by its definition: over every way to go on."""
    rest = CHANCE[len(start) :]
    return sum(
        math.prod(p if i == 1 else 1 - p for p, i in zip(rest, ids)) * right((*start, *ids))
        for ids in itertools.product((1, 2), repeat=len(rest))
    )


class Chain:
    """The policy: responses of six tokens, each drawn by itself."""

    def __init__(self):
        self.generator, self.calls = torch.Generator().manual_seed(0), []

    def generate(self, prompts, n=1, max_tokens=6, temperature=1.0, progress=False):
        self.calls.append(len(prompts))
        out = []
        for prompt in prompts:
            done = len(prompt) - 1
            p = torch.tensor(CHANCE)[done : done + max_tokens]
            ones = torch.rand(n, len(p), generator=self.generator) < p
            logprobs = torch.where(ones, p, 1 - p).log()
            ids = torch.where(ones, 1, 2)
            out.append([Rollout(prompt, i, lp, "", True) for i, lp in zip(ids.tolist(), logprobs.tolist())])
        return out


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """300 responses valued with 24 continuations, and what is true: rollouts, rewards, values, true dV [B,N]."""
    actor, file = Chain(), tmp_path_factory.mktemp("truth") / "values.jsonl"
    rollouts = [Rollout([0], r.ids, r.logprobs, "", True) for r in actor.generate([[0]], 300)[0]]
    rewards = torch.tensor([right(r.ids) for r in rollouts])
    # A prompt of its own for each response, so that every estimate is drawn anew.
    apart = [r._replace(prompt_ids=[-b - 1]) for b, r in enumerate(rollouts)]
    truth.continue_all(actor, lambda b, ids: right(ids), apart, 24, 6, file)
    mask = pad_batch(rollouts)[1]
    values = truth.token_values(apart, rewards, read_lines(file), 24, mask.shape)
    exact = torch.zeros(mask.shape)
    for b, r in enumerate(rollouts):
        v = [true_value(tuple(r.ids[:t])) for t in range(7)]
        exact[b, 1:] = torch.tensor(v).diff()
    return rollouts, mask, values, exact


def test_values_are_without_bias(chain):
    rollouts, mask, values, exact = chain
    for estimates, want, k in ((values.delta, exact, 0), (values.square, exact**2, 0), (values.square, exact**2, 1)):
        gap = (estimates[k] - want)[mask].double()
        assert abs(gap.mean()) < 3 * gap.std() / len(gap) ** 0.5, (estimates[k][mask].mean(), want[mask].mean())
    plain = (values.delta[0] ** 2 - exact**2)[mask]
    assert plain.mean() > 5 * plain.std() / len(plain) ** 0.5  # the square of an estimate is not
    for b, r in enumerate(rollouts[:20]):  # the end is the verdict, so V and dV add up to it
        assert values.before[0, b, -1] + values.delta[0, b, -1] == right(r.ids)
    assert (values.square[:, :, 2] == 0).all()  # the sure token: nothing is sampled for it


def test_what_tokens_are_worth_adds_up_to_the_variance_of_the_outcome(chain):
    rollouts, _, values, _ = chain
    v0 = true_value(())
    each = values.square[0].sum(1).double()
    assert abs(each.mean() - v0 * (1 - v0)) < 3 * each.std() / len(each) ** 0.5
    args = truth.Args(group=300, responses=300)
    verdicts = torch.tensor([right(r.ids) for r in rollouts])
    found = truth.outcome_variance(truth.Measured(args, [], rollouts, verdicts, values))
    assert found == pytest.approx([v0 * (1 - v0)] * 3, abs=0.06)


def test_a_signal_that_knows_the_truth_scores_the_ceiling_and_a_random_one_its_share(chain):
    _, mask, values, exact = chain
    bootstrap, zero = Clusters(torch.arange(len(mask))), torch.zeros(mask.shape)
    for q in (0.2, 0.4):
        signals = Signals(zero, zero, zero, exact.abs() + 1e-9, None)
        knows = truth_tables.held(truth_tables.chosen("FAI", signals, mask, q), values.square[0], mask, bootstrap)
        size = math.ceil(6 * q - 1e-6)
        want = (exact[mask].view(-1, 6) ** 2).sort(1).values[:, -size:].sum() / (exact**2).sum()
        assert knows[1] < want < knows[2]
        best = truth_tables.ceiling(values, mask, q, bootstrap)
        assert 0.8 * want < best[0] <= knows[2]  # twelve continuations choose worse than the truth; they do not flatter
        chance = truth_tables.held(truth_tables.chosen("random", signals, mask, q), values.square[0], mask, bootstrap)
        assert chance[0] == pytest.approx(size / 6, abs=1e-5)


def test_what_chooses_by_its_own_noise_is_not_flattered(chain):
    """Chosen and measured by the same half, the share is too large; the ceiling takes the other half."""
    _, mask, values, _ = chain
    bootstrap = Clusters(torch.arange(len(mask)))
    top = truth_tables.credit.top_q(values.delta[1] ** 2, mask, 0.2).float()
    flattered = truth_tables.held(top, values.square[1], mask, bootstrap)[0]
    assert flattered > truth_tables.ceiling(values, mask, 0.2, bootstrap)[2]


def test_a_kill_costs_the_call_that_was_under_way(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(truth, "CALL", 1)  # a call for each length
    rollouts = chain[0][:12]
    actor, file = Chain(), tmp_path / "values.jsonl"
    truth.continue_all(actor, lambda b, ids: right(ids), rollouts, 4, 6, file)
    whole = file.read_text().splitlines(keepends=True)
    assert [json.loads(line)["t"] for line in whole] == [0, 2, 3, 4, 5]  # 1 has the value of 2
    assert actor.calls[0] == 1  # all begin alike: one estimate for the twelve
    file.write_text("".join(whole[:3]) + whole[3][:20])
    again = Chain()
    truth.continue_all(again, lambda b, ids: right(ids), rollouts, 4, 6, file)
    assert len(again.calls) == 2 and file.read_text().startswith("".join(whole[:3]))
    assert {line["t"] for line in read_lines(file)} == {0, 2, 3, 4, 5}


def test_the_command_and_its_resume(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "truth"
    args = truth.Args(responses=16, group=4, continuations=4, max_tokens=40, engine="torch", sure=0.05, out=str(folder))
    truth.main(args)
    rollouts = truth.read(folder).rollouts
    assert sum(map(len, truth.plan(rollouts, 0.05).values())) < sum(map(len, truth.plan(rollouts).values()))
    text = (folder / "tables.md").read_text()
    assert "| ceiling |" in text and "| random |" in text and text.count("###") == 4
    total, start, verdicts = truth.outcome_variance(truth.read(folder))
    assert 0 <= start <= 0.35 and 0 <= verdicts <= 0.34 and abs(total) < 0.5
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "args.json").write_text((folder / "args.json").read_text())
    with pytest.raises(ValueError, match="has no responses yet"):
        truth.read(tmp_path / "begun")
    lines = (folder / "values.jsonl").read_text().splitlines(keepends=True)
    (folder / "values.jsonl").write_text("".join(lines[:-1]))
    truth.main(truth.Args(resume=str(folder)))
    assert len((folder / "values.jsonl").read_text().splitlines()) == len(lines)
    monkeypatch.setattr(truth, "start_actor", None)  # nothing is left to sample
    before = (folder / "values.jsonl").read_text()
    truth.main(truth.Args(resume=str(folder)))
    assert (folder / "values.jsonl").read_text() == before
    assert f"{folder}/tables.md" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("continuations", 7, "--continuations 7"),
        ("continuations", 2, "--continuations 2"),
        ("responses", 20, "--responses 20"),
        ("task", "poker", "poker"),
        ("model", "no/such/place", "no/such/place"),
        ("max_tokens", 5000, "--max_tokens 5000"),
        ("resume", "no/where", "no/where"),
    ],
)
def test_bad_arguments_are_one_line(name, value, says):
    with pytest.raises(SystemExit, match=f"error:.*{says}"):
        truth.main(truth.Args(**{"engine": "torch", name: value}))
