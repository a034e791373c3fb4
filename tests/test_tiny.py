"""What is shipped in assets/tiny: it loads, is what tiny.py describes, can do what the README says, and attends."""

import random
from pathlib import Path

import torch

import metrics
import tasks
from assets import tiny
from node.settings import load_model
from rollout import Rollout, TorchActor, pad_batch
from tasks import countdown


def test_the_shipped_model_is_the_described_one():
    model, tokenizer = load_model("assets/tiny")
    described = tiny.config().to_dict()
    shipped = model.config.to_dict()
    differing = {k for k in described if described[k] != shipped[k]}
    assert differing <= {"dtype", "architectures", "_name_or_path", "transformers_version"}
    assert tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert all(len(tokenizer(tag).input_ids) == 1 for tag in tiny.TAGS)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert sum(f.stat().st_size for f in Path("assets/tiny").iterdir()) < 6e6


def test_the_shipped_model_has_its_stated_skills():
    torch.manual_seed(0)
    skills = tiny.skills(TorchActor(*load_model("assets/tiny")), tasks.load("countdown-tiny", n=128))
    assert 0.22 < skills["success"] < 0.4, "README: about 31 %; 256 answers, standard error 3 points"
    assert skills["arithmetic"] > 0.975 and skills["judgement"] > 0.975


def test_traces_are_honest():
    rng = random.Random(0)
    solved = 0
    for _ in range(300):
        prompt, text = tiny.trace(rng)
        numbers, target = prompt.split("\n")[0].split(">")
        problem = tasks.Problem(prompt, (tuple(map(int, numbers.split())), int(target)))
        assert countdown.split_of(*problem.answer) == "train"
        assert ("y</think>" in text) == (tasks.get("countdown-tiny").reward(problem, text) == 1.0)
        assert tiny.tokenizer().unk_token_id not in tiny.tokenizer()(prompt + text).input_ids
        solved += tasks.get("countdown-tiny").reward(problem, text)
    assert 100 < solved < 250


def test_its_attention_has_structure():
    """Local heads look near, far heads far, and WAAD and FAI are uneven within a response."""
    model, tokenizer = load_model("assets/tiny", "cpu")
    rng, rollouts = random.Random(1), []
    while len(rollouts) < 64:
        prompt, text = tiny.trace(rng)
        ids = tokenizer(text).input_ids
        if len(ids) > 50:
            rollouts.append(Rollout(tokenizer(prompt).input_ids, ids, [0.0] * len(ids), text, False))
    ids, mask, _ = pad_batch(rollouts)
    s = metrics.observe(model, ids, mask)
    assert s.heads.layers == [4, 5, 6, 7, 8] and s.heads.spans.shape == (5, 4)
    near, far = s.heads.spans[s.heads.is_local].mean(), s.heads.spans[s.heads.is_global].mean()
    assert far > 2 * near, f"spans {near:.1f} and {far:.1f} tokens"
    waad, fai = s.waad[mask], s.fai[mask & (s.fai > 0)]
    assert waad.std() > 0.15 * waad.mean() and fai.std() > 0.5 * fai.mean()
