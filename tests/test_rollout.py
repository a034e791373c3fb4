"""Real vLLM against transformers: the same tokens, the same log-probs, and still so after the weights have changed."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

import grpo
from assets import tiny
from node.settings import load_model
from node.stale import find_stale_weight, try_reload
from rollout import TorchActor, VLLMActor, pad_batch, read_text
from tasks import Problem
from tests.machine import GAP

PROMPTS = ["3 7 5>38\n<think>", "1 2 3>10\n<think>", "12 15 9>36\n<think>"]


ENDS = {0, 1, 7, 8}  # of the model below: by generation_config.json 0 and 8, by its tokenizer 1, by config.json 7
# What generation_config.json may say about sampling. None of it may reach a sampler.
FOREIGN = {
    "temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.2, "epsilon_cutoff": 0.5,
    "repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "suppress_tokens": [0, 1, 7, 8, 9, 10], "num_beams": 2,
    "begin_suppress_tokens": [11], "min_new_tokens": 8, "min_length": 300, "forced_eos_token_id": 3, "max_length": 5,
    "max_time": 0.0001, "sequence_bias": [[[9], -50.0]], "bad_words_ids": [[10]], "guidance_scale": 3.0,
    "stop_strings": ["1"], "renormalize_logits": True, "output_scores": True,
    "return_dict_in_generate": False, "use_cache": False, "prompt_lookup_num_tokens": 2, "do_sample": False,
}  # fmt: skip


def checkpoint(folder, tied):
    """A fresh model with sharp preferences, saved for vLLM to load.

    Its tags are special tokens. It has several ends, and a generation config that asks for another distribution.
    """
    config = tiny.config()
    config.num_hidden_layers, config.tie_word_embeddings = 3, tied
    config.layer_types = config.layer_types[:3]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    shake(model, 1.0)
    model.config.eos_token_id = 7
    model.save_pretrained(folder)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": tiny.TAGS})
    tokenizer.save_pretrained(folder)
    assert tokenizer.decode(tokenizer("<think>").input_ids, skip_special_tokens=True) == ""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 8]} | FOREIGN))
    return load_model(str(folder))


def shake(model, size):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * size * p.std().nan_to_num(0.1))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request, tmp_path_factory):
    """A trainer's model, vLLM on the same checkpoint, and transformers' sampler on the model."""
    folder = tmp_path_factory.mktemp("model")
    model, tokenizer = checkpoint(folder, request.param)
    actor = VLLMActor(str(folder), max_model_len=384, kv_cache_gib=0.0625)
    yield model, actor, TorchActor(model, tokenizer, max_model_len=384)
    actor.close()


def gap(model, groups):
    """Largest difference between the sampler's log-probs and the trainer's."""
    ids, mask, sampled = pad_batch([r for group in groups for r in group])
    with torch.no_grad():
        return (grpo.token_logprobs(model, ids, mask)[0] - sampled).abs().max().item()


@pytest.mark.vllm
def test_greedy_equals_transformers_before_and_after_reloads(pair):
    model, actor, torch_actor = pair
    for step in range(3):
        ours = actor.generate(PROMPTS, n=1, max_tokens=32, temperature=0.0)
        theirs = torch_actor.generate(PROMPTS, n=1, max_tokens=32, temperature=0.0)
        assert [g[0].ids for g in ours] == [g[0].ids for g in theirs], f"after {step} reloads"
        assert [g[0].text for g in ours] == [g[0].text for g in theirs]
        sampled = actor.generate(PROMPTS, n=4, max_tokens=32)
        assert gap(model, sampled) < GAP and gap(model, torch_actor.generate(PROMPTS, n=4, max_tokens=32)) < GAP
        assert len({tuple(r.ids) for r in sampled[0]}) > 1, "samples differ"
        texts = [r.text for group in sampled for r in group]
        assert any(tag in text for tag in tiny.TAGS for text in texts), "special tokens are part of what was written"
        shake(model, 0.3)
        assert gap(model, sampled) > 0.05, "the weights changed enough for a missed reload to show"
        actor.reload(model)


@pytest.mark.vllm
def test_reload_forgets_the_prefix_cache(pair):
    model, actor, _ = pair
    prompt = ["3 7 5>38\n<think>" + "7-3=4,5*4=20n\n" * 20]  # 290 tokens: two whole blocks of the CPU build's 128
    actor.generate(prompt, n=2, max_tokens=4)
    shake(model, 0.5)
    actor.reload(model)
    assert gap(model, actor.generate(prompt, n=2, max_tokens=16)) < GAP


@pytest.mark.vllm
def test_a_prefix_cache_that_is_not_cleared_ends_the_run(pair, monkeypatch):
    model, actor, _ = pair
    monkeypatch.setattr(actor.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(SystemExit, match="error: vLLM has not cleared its prefix cache") as e:
        actor.reload(model)
    assert "\n" not in str(e.value)


@pytest.mark.vllm
def test_a_trial_leaves_trainer_and_sampler_as_they_were(pair):
    model, actor, _ = pair
    actor.reload(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    problems = [Problem(prompt) for prompt in PROMPTS]
    assert "27 of its 27 tensors" in try_reload(actor, model, problems, 16, "float32")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert find_stale_weight(actor, model, torch.Generator().manual_seed(0), 10**6) is None


@pytest.mark.vllm
def test_responses_are_bounded_and_say_so(pair):
    model, actor, torch_actor = pair
    with torch.no_grad():  # make <eos> likely enough to be seen
        model.lm_head.weight[1] += 0.5 * model.lm_head.weight.norm(dim=1).mean() * torch.randn(96).sign() / 96**0.5
    actor.reload(model)
    for sampler in (actor, torch_actor):
        for r in (r for group in sampler.generate(PROMPTS, n=24, max_tokens=12) for r in group):
            assert 1 <= len(r.ids) == len(r.logprobs) <= 12
            assert r.truncated == (r.ids[-1] not in ENDS) and not ENDS & {*r.ids[:-1]} and "<eos>" not in r.text
        with pytest.raises(ValueError, match="do not fit --max_model_len 384"):
            sampler.generate(["1" * 376], max_tokens=12)
        with pytest.raises(ValueError, match="empty"):
            sampler.generate([""], max_tokens=12)


def test_nothing_of_a_generation_config_reaches_the_torch_sampler(tmp_path):
    """One field at a time, because several together may hide each other."""
    model, tokenizer = load_model("assets/tiny", "cpu")
    actor = TorchActor(model, tokenizer)

    def sample():
        torch.manual_seed(0)
        return actor.generate(PROMPTS[:1], n=4, max_tokens=10)

    plain = sample()
    for field, value in FOREIGN.items():
        model.generation_config = config = GenerationConfig.from_dict({"eos_token_id": 1, field: value})
        assert sample() == plain, field
        assert model.generation_config is config, "it is saved with the model"


def test_the_torch_sampler_draws_from_all_of_the_vocabulary():
    """transformers leaves out all but 50 tokens, if it is not told otherwise."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=200, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=1, eos_token_id=1)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    ids = [r.ids[0] for r in TorchActor(model, tiny.tokenizer(), batch=4000).generate([[5, 6]], 4000, max_tokens=1)[0]]
    drawn = torch.tensor(ids).bincount(minlength=200) / 4000
    expected = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(0)
    assert 0.5 * (drawn - expected).abs().sum() < 0.12  # 0.08 is usual for so many draws


def test_text_is_what_the_model_wrote():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": tiny.TAGS})
    tokenizer.clean_up_tokenization_spaces = True  # would write "1 ," as "1,"
    assert tokenizer.decode([3, 9], skip_special_tokens=True) == "2"
    assert read_text(tokenizer, [*tokenizer("<think>1 , 2</think>").input_ids, 1, 0, 0], [1]) == "<think>1 , 2</think>"
    assert read_text(tokenizer, [9, 0, 10], [1]) == "2<pad>3" and read_text(tokenizer, [1], [1]) == ""


@pytest.mark.vllm
def test_a_cache_that_is_too_small_is_said_in_our_own_argument(monkeypatch):
    from vllm.distributed import cleanup_dist_env_and_memory

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    for gib, message in ((1e-3, r"--kv_cache_gib 0.001 is too small .* --max_model_len 512: give 0.01 or more$"),
                         (1e-5, r"--kv_cache_gib 1e-05 is too small .* --max_model_len 512$")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            VLLMActor("assets/tiny", kv_cache_gib=gib)
        cleanup_dist_env_and_memory()  # of the engine that has not started
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "the engine has to be in this process"


def test_pad_batch():
    from rollout import Rollout

    rollouts = [Rollout([5, 6], [7, 8, 1], [-1.0, -2.0, -3.0], "", False), Rollout([5], [9], [-4.0], "", True)]
    ids, mask, logprobs = pad_batch(rollouts)
    assert ids.tolist() == [[5, 6, 7, 8, 1], [5, 9, 0, 0, 0]]
    assert mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert logprobs.tolist() == [[0, 0, -1, -2, -3], [0, -4, 0, 0, 0]]


def test_a_missing_model_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot load a model from") as e:
        load_model(str(tmp_path / "nowhere"))
    assert "\n" not in str(e.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such"}))
    with pytest.raises(ValueError, match="cannot load a model from"):
        load_model(str(tmp_path))
