"""Do anchors steer what follows? The paper's Table 1: force another token, go on greedily, see how much changes.

At a position of a response each of the top-k other tokens is forced and continued greedily; so is the token that stood
there. How much of the original is kept is the Jaccard similarity of the two continuations' content words. If tokens of
high FAI steer the rest, less is kept there. Special tokens are never forced: an end of text has no continuation.

The paper compares the tokens of highest FAI with those of lowest. But these could just be earlier (more is left to
change) or less certain (the alternatives are better). So a second comparison pairs each high token with one from the
lower half, of any response, as close as can be in position and entropy (the best one-to-one assignment). And since
separators may be anchors or artefacts, a third and a fourth look at punctuation and at all else by themselves.
"""

import json
import re
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor
from tqdm import tqdm

from grpo import micro_batches
from lab.linkage import Response
from lab.stats import Clusters
from node import precision
from node.output import read_lines
from rollout import Rollout

STOP_WORDS = frozenset(
    "a an and are as at be been but by can do does for from had has have he her his i if in into is it its let me my "
    "no not of on or our she so such than that the their them then there these they this those to us was we were "
    "what when which who will with would you your".split()
)

CALL = 512  # continuations that go to the sampler at once
Place = tuple[int, int]  # (response, token of the response)


def content_words(text: str) -> frozenset[str]:
    """Words, numbers and equations, without tags, stop words and closing marks.

    >>> sorted(content_words("The answer is 3*4=12.</think>"))
    ['3*4=12', 'answer']
    """
    words = re.findall(r"[\w+*/=^.'-]+", re.sub(r"</?\w+>", " ", text.lower()))
    return frozenset(w for w in (w.strip(".'-") for w in words) if w and w not in STOP_WORDS)


def jaccard(a: frozenset, b: frozenset) -> float:
    """Shared members over all members; two empty sets are alike."""
    return len(a & b) / len(a | b) if a | b else 1.0


def is_separator(text: str) -> bool:
    """A token without letter, digit or sign of arithmetic; or a tag.

    >>> [is_separator(t) for t in (",", ".\\n", "</think>", "+", " so", "7")]
    [True, True, True, False, False, False]
    """
    return bool(re.fullmatch(r"</?\w+>", text)) or not any(c.isalnum() or c in "+-*/=^×÷−" for c in text)


def extremes(response: Response, count: int, where: np.ndarray | None = None) -> tuple[list[int], list[int]]:
    """The tokens of highest and of lowest FAI, `count` each and disjoint, among those that have any (and `where`)."""
    able = ~np.isnan(response["FAI"]) & (True if where is None else where)
    order = np.flatnonzero(able)[np.argsort(response["FAI"][able], kind="stable")].tolist()
    count = min(count, len(order) // 2)
    return order[len(order) - count :], order[:count]


def matched(responses: list[Response], high: list[Place]) -> list[Place]:
    """For each high place one from the lower half of a response's FAI, close in relative position and in entropy."""

    def features(places: list[Place]) -> np.ndarray:
        return np.array([(t / len(responses[i]["FAI"]), responses[i]["entropy"][t]) for i, t in places]).reshape(-1, 2)

    taken = set(high)
    low = [
        (i, int(t))
        for i, r in enumerate(responses)
        if not np.isnan(r["FAI"]).all()
        for t in np.flatnonzero(r["FAI"] <= np.nanmedian(r["FAI"]))
        if (i, int(t)) not in taken
    ]
    scale = features(low + high).std(0) + 1e-9
    _, column = linear_sum_assignment(cdist(features(high) / scale, features(low) / scale))
    return [low[c] for c in column]


@torch.no_grad()
def alternatives(model, input_ids: Tensor, mask: Tensor, places: list[Place], k: int, banned: list[int]) -> list:
    """For each place the k most likely tokens but the one that stands there, most likely first, none banned."""
    found, first = {}, mask.int().argmax(1)
    by_row = {i: [t for j, t in places if j == i] for i, _ in places}
    for index, n in micro_batches(mask, torch.tensor(sorted(by_row), device=mask.device), 2048):
        with precision.autocast_for(model):
            states = model.get_decoder()(input_ids=input_ids[index, :n]).last_hidden_state.float()
        for b, i in enumerate(index.tolist()):
            at = first[i] + torch.tensor(by_row[i], device=mask.device)
            logits = model.get_output_embeddings()(states[b, at - 1]).float()  # the row before produced the token
            logits[:, banned] = -torch.inf
            logits.scatter_(1, input_ids[i, at][:, None], -torch.inf)
            found |= {(i, t): row for t, row in zip(by_row[i], logits.topk(k).indices.tolist())}
    return [found[place] for place in places]


def perturb(
    actor, rollouts: list[Rollout], places: list[Place], others: list, max_tokens: int, file: Path
) -> dict[Place, float]:
    """Continue greedily from each place, with its own token and with each alternative.

    Returns the similarity of the continuations with an alternative to the one with its own token, mean over
    alternatives. The continuations are appended to the file, call by call; those that it has are not made again.
    """
    starts = [(i, t, token) for (i, t), row in zip(places, others) for token in (rollouts[i].ids[t], *row)]
    prompts = [[*rollouts[i].prompt_ids, *rollouts[i].ids[:t], token] for i, t, token in starts]
    done = len(read_lines(file))  # mends a last line that a kill cut off, so it comes before the file is opened
    with file.open("a") as out:
        for at in tqdm(range(done, len(prompts), CALL), desc="continuations"):
            groups = actor.generate(prompts[at : at + CALL], 1, max_tokens, 0.0)
            out.write("".join(json.dumps(r[0].text) + "\n" for r in groups))
            out.flush()
    words = [content_words(rest) for rest in read_lines(file)]
    kept, at = {}, 0
    for place, row in zip(places, others):
        kept[place] = float(np.mean([jaccard(words[at], words[at + 1 + j]) for j in range(len(row))]))
        at += 1 + len(row)
    return kept


def compare(kept: dict[Place, float], high: list[Place], low: list[Place], paired: bool = False) -> dict:
    """One column of Table 1; a trial is a problem, the mean of its high places against the mean of its low ones.

    paired: low[j] is the control of high[j] and counts in the trial of high[j]'s problem, whatever its own.
    Each figure is [value, low, high] with a 95 % bootstrap interval over problems. In "less kept at high" a tie counts
    one half.
    """
    owner_high = [i for i, _ in high]
    owner_low = owner_high if paired else [i for i, _ in low]
    problems = sorted(set(owner_high) & set(owner_low))
    if len(problems) < 2:
        return {"problems": len(problems)}

    def means(places: list[Place], owners: list[int]) -> np.ndarray:
        return np.array([np.mean([kept[p] for p, o in zip(places, owners) if o == problem]) for problem in problems])

    at_high, at_low = means(high, owner_high), means(low, owner_low)
    columns = {
        "kept at high": at_high,
        "kept at low": at_low,
        "kept less at high by": at_low - at_high,
        "less kept at high, share of problems": np.where(np.isclose(at_high, at_low), 0.5, at_high < at_low),
    }
    draws = Clusters(np.arange(len(problems)), 2000)
    return {"problems": len(problems)} | {name: [*draws.mean(x)[:3]] for name, x in columns.items()}


def table(actor, model, tokenizer, rollouts, responses, input_ids, mask, max_tokens, file, count=3, k=3) -> dict:
    """Table 1 in four columns: as the paper has it, matched, at separators, at other tokens; file as in perturb().

    responses: each rollout's series (linkage.responses_of); count places of each kind in a response, k alternatives.
    """
    separator = [np.array([is_separator(tokenizer.decode([t])) for t in r.ids]) for r in rollouts]
    arms = {}
    for name, where in (
        ("as the paper", [None] * len(rollouts)),
        ("separators only", separator),
        ("other tokens only", [~s for s in separator]),
    ):
        ends = [extremes(r, count, w) for r, w in zip(responses, where)]
        arms[name] = tuple([(i, t) for i, both in enumerate(ends) for t in both[side]] for side in (0, 1))
    arms["matched"] = arms["as the paper"][0], matched(responses, arms["as the paper"][0])
    places = sorted({p for both in arms.values() for side in both for p in side})
    others = alternatives(model, input_ids, mask, places, k, tokenizer.all_special_ids)
    kept = perturb(actor, rollouts, places, others, max_tokens, file)
    out = {}
    for name in ("as the paper", "matched", "separators only", "other tokens only"):
        out[name] = compare(kept, *arms[name], paired=name == "matched")
        for side, side_places in zip(("high", "low"), arms[name]):  # how well the two sides are balanced
            at = [(t / len(rollouts[i].ids), responses[i]["entropy"][t]) for i, t in side_places]
            balance = np.mean(at, 0).tolist() if at else [float("nan")] * 2
            out[name] |= dict(zip((f"position at {side}", f"entropy at {side}"), balance))
    return out
