"""The perturbation experiment: alternatives, controls and comparisons, each against what they should be."""

import numpy as np
import pytest
import torch

import rollout
import tasks
from heads import middle_layers
from lab import linkage, perturb
from node import settings


@pytest.fixture(scope="module")
def sampled():
    model, tokenizer = settings.load_model("assets/tiny")
    torch.manual_seed(0)
    actor = rollout.TorchActor(model, tokenizer)
    problems = tasks.load("countdown-tiny", "test", 6)
    rollouts = [r[0] for r in actor.generate([p.prompt for p in problems], 1, 96)]
    ids, mask, _ = rollout.pad_batch(rollouts)
    responses, _ = linkage.responses_of(linkage.per_head(model, ids, mask, middle_layers(12)))
    return model, tokenizer, actor, problems, rollouts, ids, mask, responses


def test_alternatives_are_the_likeliest_other_tokens(sampled):
    model, tokenizer, _, _, rollouts, ids, mask, _ = sampled
    banned = tokenizer.all_special_ids
    places = [(0, 0), (0, 5), (3, 11), (5, len(rollouts[5].ids) - 1)]
    got = perturb.alternatives(model, ids, mask, places, 3, banned)
    for (i, t), row in zip(places, got):
        r = rollouts[i]
        logits = model(torch.tensor([r.prompt_ids + r.ids[:t]])).logits[0, -1]
        order = [x for x in logits.argsort(descending=True).tolist() if x != r.ids[t] and x not in banned]
        assert row == order[:3]


def test_the_same_token_changes_nothing_and_another_changes_the_rest(sampled, tmp_path):
    *_, actor, _, rollouts, _, _, _ = sampled
    places = [(i, t) for i in range(6) for t in (2, 9)]
    own = [[rollouts[i].ids[t]] * 2 for i, t in places]
    same = perturb.perturb(actor, rollouts, places, own, 96, tmp_path / "same")
    assert set(same.values()) == {1.0} and list(same) == places
    lines = (tmp_path / "same").read_text()
    assert perturb.perturb(None, rollouts, places, own, 96, tmp_path / "same") == same, "nothing is made again"
    assert (tmp_path / "same").read_text() == lines

    other = [[own_token + 1 if own_token < 20 else own_token - 1] for own_token, _ in own]
    changed = perturb.perturb(actor, rollouts, places, other, 96, tmp_path / "other")
    assert all(0 <= kept <= 1 for kept in changed.values()) and min(changed.values()) < 1


def test_controls_are_close_in_position_and_entropy():
    rng = np.random.default_rng(0)
    responses = []
    for _ in range(8):  # high FAI comes late and is uncertain
        t = np.arange(60) / 60
        responses.append({"FAI": t + 0.3 * rng.random(60), "entropy": 0.5 * t + rng.random(60)})
        responses[-1]["FAI"][-10:] = np.nan
    high = [(i, t) for i, r in enumerate(responses) for t in perturb.extremes(r, 3)[0]]
    low = [(i, t) for i, r in enumerate(responses) for t in perturb.extremes(r, 3)[1]]
    control = perturb.matched(responses, high)
    assert len(control) == len(high) == len(set(control)) and not set(control) & set(high)
    assert all(responses[i]["FAI"][t] <= np.nanmedian(responses[i]["FAI"]) for i, t in control)

    def mean(places, what):
        return np.mean([t / 60 if what == "position" else responses[i]["entropy"][t] for i, t in places])

    for what in ("position", "entropy"):
        assert abs(mean(high, what) - mean(control, what)) < 0.75 * abs(mean(high, what) - mean(low, what))


def test_extremes_are_disjoint_and_within_their_kind():
    response = {"FAI": np.array([0.5, 0.1, 0.9, 0.3, 0.2, np.nan])}
    assert perturb.extremes(response, 2) == ([0, 2], [1, 4])
    assert perturb.extremes(response, 9) == ([0, 2], [1, 4])
    assert perturb.extremes(response, 1, np.array([1, 1, 0, 1, 0, 1], dtype=bool)) == ([0], [1])
    assert perturb.extremes({"FAI": np.full(3, np.nan)}, 2) == ([], [])


def test_comparison_counts_problems():
    kept = {
        (0, 1): 0.2, (0, 2): 0.4, (0, 7): 0.5,
        (1, 3): 0.9, (1, 8): 0.1,
        (2, 3): 0.6, (2, 5): 0.6,
    }  # fmt: skip
    got = perturb.compare(kept, [(0, 1), (0, 2), (1, 3), (2, 3)], [(0, 7), (1, 8), (2, 5)])
    assert got["problems"] == 3
    assert got["kept at high"][0] == pytest.approx((0.3 + 0.9 + 0.6) / 3)
    assert got["kept at low"][0] == pytest.approx((0.5 + 0.1 + 0.6) / 3)
    assert got["less kept at high, share of problems"][0] == pytest.approx(0.5)  # one, and half for the tie
    paired = perturb.compare(kept, [(0, 1), (1, 3)], [(1, 8), (0, 7)], paired=True)
    assert paired["kept less at high by"][0] == pytest.approx(((0.1 - 0.2) + (0.5 - 0.9)) / 2)
    assert perturb.compare(kept, [(0, 1)], [(1, 3)]) == {"problems": 0}


def test_words_and_separators():
    assert perturb.content_words("7*5=35,35+3=38y</think><answer>(7*5)+3</answer>") == {
        "7*5=35", "35+3=38y", "7*5", "+3",
    }  # fmt: skip
    assert perturb.content_words("So we are the 3 of \\boxed{12}!") == {"3", "boxed", "12"}
    assert perturb.jaccard(frozenset(), frozenset()) == 1.0
    assert perturb.jaccard(frozenset("ab"), frozenset("bc")) == pytest.approx(1 / 3)
    assert perturb.is_separator("<answer>") and perturb.is_separator("\n") and not perturb.is_separator("n")
