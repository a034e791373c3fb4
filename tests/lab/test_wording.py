"""Choices of words against choices that matter: the kinds of a trace's tokens, the AUC, and another task."""

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoTokenizer

from lab import wording
from lab.stats import Clusters
from node.settings import TINY
from rollout import Rollout, pad_batch

LINES = (
    "What| about| |1|4| -| |7| =| |7|,| then| |1|3| +| |7| =| |2|0|?| That| gives| |2|0|,| not| |8|5|.|\n|"
    "Maybe| |1|4| *| |7| =| |9|8|.| Yes|,| |9|8|!|</|think|><|answer|>|1|4|*|7"
)


def test_kinds_of_a_trace():
    tokens = LINES.split("|")
    found = dict(content=[], wording=[])
    for token, kind in zip(tokens, wording.kinds(tokens), strict=True):
        if kind:
            found[kind].append(token.strip(" "))
    assert found["content"] == [*"14-7", *"13+7", "\n", *"14*7", "</"]
    assert found["wording"] == [
        "What", "about", ",", "then", "?", "That", "gives", ",", "not", ".", "Maybe", ".", "Yes", ",", "!"
    ]  # fmt: skip


def test_marks_lie_on_the_responses_own_tokens():
    tok = AutoTokenizer.from_pretrained(TINY)
    texts = (("3>", "y7-"), ("3", " n7=7"))
    rollouts = [Rollout(*(tok(text).input_ids for text in pair), [], "", False) for pair in texts]
    input_ids, mask, _ = pad_batch([r._replace(logprobs=[0.0] * len(r.ids)) for r in rollouts])
    content, words = wording.marked(tok, input_ids, mask)
    assert content.nonzero().tolist() == [[0, 3], [0, 4], [1, 3]]
    assert words.nonzero().tolist() == [[0, 2], [1, 2]]


def test_auc_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    x, content = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.4
    want = stats.mannwhitneyu(x[content], x[~content]).statistic / (content.sum() * (~content).sum())
    assert wording.auc(x, content) == pytest.approx(want)
    assert np.isnan(wording.auc(x, np.ones(40, dtype=bool)))


def test_what_the_credited_content_is_worth():
    """Two responses of five content tokens and two words: of each three are chosen, both words and one content."""
    content = torch.tensor([[1, 1, 1, 1, 1, 0, 0]] * 2).bool()
    x = torch.tensor([[5.0, 4, 3, 2, 1, 9, 9], [1, 2, 3, 4, 5, 9, 9]])
    square = torch.tensor([[1.0, 2, 3, 4, 5, 50, 50], [1, 1, 1, 1, 1, 50, 50]])
    mask, draws = torch.ones_like(content), Clusters(torch.arange(2))
    head, row = wording.table({"FAI": x}, content, ~content, mask, square, draws)
    assert row[head.index("worth of that content")].startswith("0.50 ")  # (1 + 1) / 2 over (15 + 5) / 10


def test_shares_of_the_outcome_are_by_the_text():
    tok = AutoTokenizer.from_pretrained(TINY)
    ids = torch.tensor([tok("y7-5").input_ids, tok("n8*6").input_ids])
    square = torch.tensor([[1.0, 1, 2, 0], [0, 2, 4, 0]])
    head, *rows = wording.decided(tok, ids, torch.ones(2, 4, dtype=torch.bool), square, Clusters(torch.arange(2)))
    found = {row[0]: (row[1], row[2].split(" (")[0]) for row in rows}
    assert found["content"] == ("6", "90 %") and found["wording"] == ("2", "10 %")
    assert found["operators"] == ("2", "60 %") and found["numbers"] == ("4", "30 %") and len(head) == 3


def test_another_task_has_no_choice_of_words():
    with pytest.raises(SystemExit, match=r"error: .*countdown-tiny, which has no choice of words"):
        wording.main(wording.Args(truth="lab/records/truth"))
