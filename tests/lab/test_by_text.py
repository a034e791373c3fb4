"""Credit by the text: gamma lies on the tokens of the kind asked for, in train.py's own loop."""

import json

import pytest
import torch
from transformers import HfArgumentParser

import train
from lab import by_text, wording


def run(*argv):
    by_text.main(*HfArgumentParser((by_text.Args, train.Args)).parse_args_into_dataclasses([*map(str, argv)]))


SMALL = ["--task", "countdown-words", "--engine", "torch", "--steps", 1, "--prompts", 1, "--group", 8, "--minibatches",
         1, "--eval_problems", 2, "--max_tokens", 64]  # fmt: skip


def test_gamma_lies_on_the_kind(tmp_path, monkeypatch):
    """One problem, so that no response is left out of the mean that is logged."""
    shares, marked, gamma = {}, wording.marked, {}

    def looked_at(tokenizer, rollouts, mask):
        found = marked(tokenizer, rollouts, mask)
        shares.update({kind: (found[i].sum() / mask.sum()).item() for i, kind in enumerate(wording.KINDS)})
        return found

    monkeypatch.setattr(wording, "marked", looked_at)
    for kind in wording.KINDS:
        run("--by", kind, "--gamma_amp", 3, "--out", tmp_path / kind, *SMALL)
        records = map(json.loads, (tmp_path / kind / "metrics.jsonl").read_text().splitlines())
        (gamma[kind],) = (r["gamma"] for r in records if "gamma" in r)
        assert 0 < shares[kind] < 1 and gamma[kind] == pytest.approx(1 + 2 * shares[kind], abs=1e-5)
    assert gamma["content"] != gamma["wording"]
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert (train.assign_credit("uniform", None, mask) == 1).all(), "train.py is as it was"


@pytest.mark.parametrize(
    "argv, match", [(["--task", "countdown-tiny"], "only countdown-words tells"), (["--resume", "runs/x"], "--resume")]
)
def test_what_cannot_be_is_one_line(argv, match):
    with pytest.raises(SystemExit, match=match):
        run(*argv)
