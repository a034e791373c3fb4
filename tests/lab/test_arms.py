"""Credits that the reference does not have: gamma lies where the variant says, in train.py's own loop."""

import json

import pytest
import torch
from transformers import HfArgumentParser

import credit
import metrics
import train
from lab import arms, signals, wording


def run(*argv):
    arms.main(*HfArgumentParser((arms.Args, train.Args)).parse_args_into_dataclasses([*map(str, argv)]))


def gamma_of(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    (gamma,) = (r["gamma"] for r in records if "gamma" in r)
    return gamma


SMALL = ["--engine", "torch", "--steps", 1, "--group", 8, "--minibatches", 1, "--eval_problems", 2, "--max_tokens",
         64]  # fmt: skip


def test_gamma_by_the_text_lies_on_the_kind(tmp_path, monkeypatch):
    """One problem, so that no response is left out of the mean that is logged."""
    shares, marked, gamma = {}, wording.marked, {}

    def looked_at(tokenizer, input_ids, mask):
        found = marked(tokenizer, input_ids, mask)
        shares.update({kind: (found[i].sum() / mask.sum()).item() for i, kind in enumerate(wording.KINDS)})
        return found

    monkeypatch.setattr(wording, "marked", looked_at)
    for kind in wording.KINDS:
        out = tmp_path / kind
        run("--arm", kind, "--task", "countdown-words", "--prompts", 1, "--gamma_amp", 3, "--out", out, *SMALL)
        gamma[kind] = gamma_of(out)
        assert 0 < shares[kind] < 1 and gamma[kind] == pytest.approx(1 + 2 * shares[kind], abs=1e-5)
    assert gamma["content"] != gamma["wording"]


def test_other_readings_of_eq_18_give_what_they_say():
    """A small peak of Delta before an anchor counts for the median; an intro that is an anchor has no sum."""
    mask = torch.tensor([[False, True, True, True, True, True, True]])
    waad = torch.tensor([[0.0, 9.0, 4.0, 2.0, 2.0, 8.0, 3.0]])  # Delta: 5 2 0 6 5 0; T_loc of q 0.4: 1, 4, 5
    fai = torch.tensor([[0.0, 0.1, 0.9, 0.0, 0.8, 0.7, 0.0]])  # anchors: 2, 4, 5; the median WAAD is 3
    seen = metrics.Signals(logprobs=waad, entropy=waad, waad=waad, fai=fai, heads=None)
    settings = dict(signals=seen, mask=mask, q=0.4, amp=3.0, alpha=0.5, k=2)
    paper = credit.coupled_rhythm(waad, fai, mask, q=0.4, amp=3.0, k=2)
    median = arms.read_otherwise("median", None)(**settings)
    once = arms.read_otherwise("set once", None)(**settings)
    # 4 has a low WAAD and Delta 2 before it: not of T_loc (at least 5), but the median Delta is 2.
    assert paper.tolist() == [[1, 1, 3, 1, 3, 3, 1]]
    assert median.tolist() == [[1, 1, 4, 1, 2, 3, 1]]
    assert once.tolist() == paper.tolist(), "no anchor is dominated, so there is no intro"
    # With k = 3 token 4 has the peak of token 1 before it, and 1 is an intro; with fai there it is an anchor as well.
    fai[0, 1] = 1.0
    paper = credit.coupled_rhythm(waad, fai, mask, q=0.4, amp=3.0, k=3)
    once = arms.read_otherwise("set once", None)(**settings | {"k": 3})
    assert paper.tolist() == [[1, 4, 3, 1, 2, 1, 1]] and once.tolist() == [[1, 2, 3, 1, 2, 1, 1]]


def test_gamma_without_the_first_token_is_that_of_such_signals(tmp_path, monkeypatch):
    """Of the teaching rows in whatever order, back in their places; and the pass for pi_old stays what it is."""
    given, assign, score, seen = [], credit.assign_credit, train.score, []

    def noted(name, signals, mask, *others, **settings):
        given.append((signals, mask))
        return assign(name, signals, mask, *others, **settings)

    def noted_score(args, model, input_ids, mask, rows, heads):
        seen.append((model, input_ids, mask, rows, found := score(args, model, input_ids, mask, rows, heads)))
        return found

    monkeypatch.setattr(credit, "assign_credit", noted)
    monkeypatch.setattr(train, "score", noted_score)
    nothing = {"loss": 0.0, "clip_fraction": 0.0, "kl": 0.0, "grad_norm": 1.0, "skipped": 0}
    monkeypatch.setattr(train, "update", lambda *args, **more: nothing)
    run(
        "--arm",
        "coupled, no first token",
        "--task",
        "countdown-tiny",
        "--prompts",
        8,
        "--seed",
        1,
        "--out",
        tmp_path / "run",
        *SMALL,
    )
    ((given_signals, scored),), ((model, input_ids, mask, rows, plain),) = given, seen
    assert 8 <= len(rows) < 64 and (rows[1:] < rows[:-1]).any(), "some groups differ, and their rows are shuffled"
    part = plain._replace(**{name: getattr(plain, name)[rows] for name in plain._fields[:4]})
    want = signals.without_first(part, model, input_ids[rows], mask[rows])
    for name in ("waad", "fai", "logprobs", "entropy"):
        torch.testing.assert_close(getattr(given_signals, name)[rows], getattr(want, name))
    assert (given_signals.waad - plain.waad)[scored].abs().max() > 1e-3
    want = credit.coupled_rhythm(given_signals.waad, given_signals.fai, scored)[scored].mean().item()
    assert gamma_of(tmp_path / "run") == pytest.approx(want)


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--task", "countdown-tiny"], "only countdown-words tells"),
        (["--resume", "runs/x"], "--resume"),
    ],
)
def test_what_cannot_be_is_one_line(argv, match):
    with pytest.raises(SystemExit, match=match):
        run(*argv)
