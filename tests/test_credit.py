"""gamma against loops written from Eq. 14-19, and its corners."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import credit


def top(x, q, eligible):
    """TopQ over a list: ceil(q*len(x)) highest among the eligible, ties to the earlier."""
    ranked = sorted((i for i in range(len(x)) if eligible[i]), key=lambda i: (-x[i], i))
    return set(ranked[: math.ceil(q * len(x) - 1e-6)])


def reference(waad, fai, q, amp, alpha, k, lowest):
    """Local-chunk, global-anchor and coupled gamma of one response, as lists."""
    n, sign = len(waad), -1 if lowest else 1
    delta = [sign * abs(waad[t] - waad[t + 1]) for t in range(n - 1)] + [0.0]
    t_loc = top(delta, q, [True] * n)
    t_glob = top([sign * f for f in fai], q, [f > 0 for f in fai])
    tau_waad = sorted(waad)[(n - 1) // 2]
    tau_delta = min((delta[t] for t in t_loc), default=math.inf)
    dominated, intros = set(), set()
    for t in t_glob:
        before = range(max(0, t - k), t)
        if waad[t] <= tau_waad and before and max(delta[u] for u in before) >= tau_delta:
            dominated.add(t)
            intros.add(max(before, key=lambda u: (delta[u], u)))
    bonus = amp - 1
    local = [1 + bonus * (t in t_loc) for t in range(n)]
    anchor = [1 + bonus * (t in t_glob) for t in range(n)]
    coupled = [
        1 + bonus * (t in t_glob - dominated) + (1 - alpha) * bonus * (t in dominated) + alpha * bonus * (t in intros)
        for t in range(n)
    ]
    return local, anchor, coupled


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("q", [0.0, 0.2, 0.4, 1.0])
def test_gamma_equals_the_equations(q, lowest):
    g = torch.Generator().manual_seed(int(10 * q) + lowest)
    batch, n = 40, 33
    start = torch.randint(1, 8, (batch, 1), generator=g)
    length = torch.randint(1, n - 8, (batch, 1), generator=g)
    t = torch.arange(n)
    mask = (t >= start) & (t < start + length)
    # coarse values: plenty of ties; the last tokens of a response have no FAI
    waad = torch.randint(0, 6, (batch, n), generator=g) / 2 * mask
    fai = torch.randint(1, 9, (batch, n), generator=g) / 8 * (mask & (t < start + length - 4))
    for alpha, k, amp in ((0.5, 3, 1.5), (0.2, 1, 3.0), (1.0, 50, 1.5)):
        local = credit.local_chunk(waad, mask, q, amp, lowest)
        anchor = credit.global_anchor(fai, mask, q, amp, lowest)
        coupled = credit.coupled_rhythm(waad, fai, mask, q, amp, alpha, k, lowest)
        for b in range(batch):
            rows = mask[b]
            want = reference(waad[b, rows].tolist(), fai[b, rows].tolist(), q, amp, alpha, k, lowest)
            for got, expected in zip((local, anchor, coupled), want):
                torch.testing.assert_close(got[b, rows], torch.tensor(expected), atol=1e-6, rtol=0)
                assert (got[b, ~rows] == 1).all()


def response(*values):
    return torch.tensor([[0.0, *values]]), torch.tensor([[False, *[True] * len(values)]])


def test_an_anchor_that_is_also_an_intro_gets_both():
    # WAAD falls after token 1, an anchor in its own right (high WAAD: not dominated); token 2 is dominated, intro = 1
    waad, mask = response(9, 1, 1, 1, 1)
    fai, _ = response(0.9, 0.8, 0.1, 0.1, 0.1)
    gamma = credit.coupled_rhythm(waad, fai, mask, q=0.4)
    assert gamma[0].tolist() == [1, 1.75, 1.25, 1, 1, 1]


def test_a_shared_intro_is_credited_once():
    waad, mask = response(9, 1, 1, 1, 1)
    fai, _ = response(0.1, 0.8, 0.9, 0.1, 0.1)
    gamma = credit.coupled_rhythm(waad, fai, mask, q=0.4)
    assert gamma[0].tolist() == [1, 1.25, 1.25, 1.25, 1, 1]


def test_an_intro_tie_goes_to_the_nearest():
    waad, mask = response(5, 9, 5, 5, 5, 5)  # Delta: 4 4 0 0 0 0
    fai, _ = response(0.1, 0.1, 0.9, 0.1, 0.1, 0.1)
    gamma = credit.coupled_rhythm(waad, fai, mask, q=1 / 6)
    assert gamma[0].tolist() == [1, 1, 1.25, 1.25, 1, 1, 1]


def test_a_peak_before_the_response_is_no_intro():
    waad = torch.tensor([[0.0, 9.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[False, False, True, True, True]])
    gamma = credit.coupled_rhythm(waad, torch.tensor([[0, 0, 0.9, 0.1, 0.1]]), mask, q=0.3)
    assert gamma[0].tolist() == [1, 1, 1.5, 1, 1]


def test_one_token_and_empty_responses():
    mask = torch.tensor([[False, True], [False, False]])
    zero = torch.zeros(2, 2)
    assert (credit.coupled_rhythm(zero, zero, mask) == 1).all()
    assert (credit.global_anchor(zero, mask) == 1).all(), "nothing looks back at the only token: no anchor"
    assert credit.local_chunk(zero, mask).tolist() == [[1, 1.5], [1, 1]]


def test_an_empty_horizon_has_no_anchors():
    waad, mask = response(1, 2, 3)
    assert (credit.coupled_rhythm(waad, torch.zeros(1, 4), mask) == 1).all()


def test_controls_credit_the_right_number_of_tokens():
    mask = torch.zeros(3, 40, dtype=torch.bool)
    for b, n in enumerate((30, 7, 1)):
        mask[b, 5 : 5 + n] = True
    sizes = torch.tensor([3, 1, 1])  # ceil(0.1 n), with 0.1 * 30 not 4
    entropy = torch.rand(3, 40) * mask
    g = torch.Generator().manual_seed(0)
    for gamma in (credit.high_entropy(entropy, mask, 0.1), credit.random_tokens(mask, 0.1, generator=g)):
        assert ((gamma == 1.5).sum(1) == sizes).all() and (gamma[~mask] == 1).all()
    peak = credit.high_entropy(entropy, mask, 0.01)[0].argmax()
    assert peak == entropy[0].argmax()
    assert (credit.uniform(mask) == 1).all()
    drawn = torch.stack([credit.random_tokens(mask, 0.4, generator=g)[0] for _ in range(400)]).mean(0)[mask[0]]
    assert (drawn - 1.2).abs().max() < 0.08, "every token is as likely"


def test_bad_arguments_are_named():
    mask = torch.tensor([[False, True]])
    with pytest.raises(ValueError, match=r"q = 1\.5"):
        credit.random_tokens(mask, q=1.5)
    with pytest.raises(ValueError, match="k = 0"):
        credit.coupled_rhythm(torch.zeros(1, 2), torch.zeros(1, 2), mask, k=0)


def test_each_name_is_its_function_with_all_its_settings():
    g, mask = torch.Generator().manual_seed(0), (torch.arange(40) >= 4).expand(6, 40)
    signals = SimpleNamespace(**{n: torch.rand(6, 40, generator=g) * mask for n in ("waad", "fai", "entropy")})
    how = dict(q=0.2, amp=3.0, lowest=True)
    lowest = signals.entropy.masked_fill(~mask, 9).argsort(1).argsort(1) < 8  # ceil(0.2 * 36)
    want = {
        "local": credit.local_chunk(signals.waad, mask, **how),
        "global": credit.global_anchor(signals.fai, mask, **how),
        "entropy": 1 + 2.0 * lowest,
        "coupled": credit.coupled_rhythm(signals.waad, signals.fai, mask, alpha=0.1, k=5, **how),
    }
    want["scaled"] = credit.scaled(want["coupled"], mask)
    for name, gamma in want.items():
        assert torch.equal(credit.assign_credit(name, signals, mask, alpha=0.1, k=5, **how), gamma), name
        produced = credit.assign_credit(name, signals, mask, alpha=0.1, k=5, produced=True, **how)
        assert torch.equal(produced, credit.shift_to_produced(gamma, mask)), name
    drawn = credit.assign_credit("random", signals, mask, generator=g, **how)
    assert ((drawn == 3).sum(1) == 8).all()


def test_a_function_of_ones_own_is_called_with_everything_by_name():
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 5, dtype=torch.bool)
    ids, signals, seen = torch.randint(0, 9, (2, 5), generator=g), SimpleNamespace(logprobs=mask * -1.0), {}

    def own(**given):
        seen.update(given)
        return 1.0 + given["mask"] * (given["input_ids"] == ids[0, 0])

    gamma = credit.assign_credit(own, signals, mask, ids, q=0.3, amp=2.0, generator=g, model="the model")
    assert torch.equal(gamma, 1.0 + (ids == ids[0, 0]))
    assert set(seen) == {"signals", "mask", "input_ids", "q", "amp", "alpha", "k", "lowest", "generator", "model"}
    assert seen["signals"] is signals and (seen["q"], seen["amp"], seen["alpha"], seen["k"]) == (0.3, 2.0, 0.5, 3)
    shifted = credit.assign_credit(own, signals, mask, ids, produced=True)
    assert torch.equal(shifted, credit.shift_to_produced(gamma, mask))


def test_the_readmes_credit_of_surprise():
    """Highest -log p: the tokens that were least probable."""
    line = r'case "surprise":\n +(gamma = .*)'
    for file in ("README.md", "credit.py"):
        (found,) = re.findall(line, (Path(credit.__file__).parent / file).read_text())
        logprobs = torch.tensor([[-0.1, -3.0, -0.2, -2.0, 0.0]])
        names = {"amp": 1.5, "q": 0.4, "mask": torch.ones(1, 5, dtype=torch.bool), "top_q": credit.top_q}
        names["signals"] = SimpleNamespace(logprobs=logprobs)
        exec(found, names)
        assert names["gamma"].tolist() == [[1.0, 1.5, 1.0, 1.5, 1.0]]
