"""Advantages, token log-probs and the loss against loops written from Eq. 5-6 and 12-13."""

import math
import statistics

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import grpo
from examples.bench import peak_mib


def test_group_advantages_equal_the_equation():
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    got = grpo.group_advantages(rewards)
    for row, want in zip(got.tolist(), rewards.tolist()):
        mean, std = statistics.mean(want), statistics.stdev(want)
        assert row == pytest.approx([(r - mean) / std for r in want], rel=1e-4)


def test_equal_groups_have_no_advantage_and_a_group_needs_two():
    assert (grpo.group_advantages(torch.full((3, 7), 0.1)) == 0).all()  # 0.1 * 7 / 7 != 0.1 in float32
    with pytest.raises(ValueError, match="group size 1"):
        grpo.group_advantages(torch.ones(4, 1))


def random_batch(seed=0, b=6, n=12):
    g = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, b, n, generator=g) * 0.4
    shaped = torch.randn(b, n, generator=g)
    mask = torch.rand(b, n, generator=g) > 0.4
    mask[2] = False  # an empty response
    return new, old, shaped, mask


def reference_loss(new, old, shaped, mask, epsilon):
    total = 0.0
    for b in range(len(mask)):
        tokens = [t for t in range(mask.shape[1]) if mask[b, t]]
        terms = []
        for t in tokens:
            ratio = math.exp(new[b, t] - old[b, t])
            clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
            terms.append(min(ratio * shaped[b, t].item(), clipped * shaped[b, t].item()))
        total += sum(terms) / len(terms) if terms else 0.0
    return -total / len(mask)


def test_clipped_loss_equals_the_equation():
    for seed in range(5):
        new, old, shaped, mask = random_batch(seed)
        got = grpo.clipped_loss(new, old, shaped, mask, 0.2)
        assert got.item() == pytest.approx(reference_loss(new, old, shaped, mask, 0.2), abs=1e-6)


def test_only_response_tokens_count():
    new, old, shaped, mask = random_batch()
    want = grpo.clipped_loss(new, old, shaped, mask)
    junk = torch.where(mask, 0.0, torch.full_like(new, torch.nan))
    new_junk = (new + junk).requires_grad_()
    got = grpo.clipped_loss(new_junk, old + junk, shaped + junk, mask)
    torch.testing.assert_close(got, want)
    got.backward()
    assert torch.isfinite(new_junk.grad).all() and (new_junk.grad[~mask] == 0).all()


def test_parts_of_a_batch_add_up_and_zero_rows_may_be_left_out():
    new, old, shaped, mask = random_batch()
    shaped[4] = 0
    whole = grpo.clipped_loss(new, old, shaped, mask)
    parts = [[0, 1], [3], [5, 2]]
    added = sum(grpo.clipped_loss(new[p], old[p], shaped[p], mask[p], responses=6) for p in parts)
    torch.testing.assert_close(added, whole)


def test_the_token_level_loss_is_the_mean_over_all_tokens():
    new, old, shaped, mask = random_batch()
    ratio = (new - old).exp()
    objective = torch.min(ratio * shaped, ratio.clamp(0.8, 1.2) * shaped)
    whole = grpo.clipped_loss(new, old, shaped, mask, tokens=int(mask.sum()))
    torch.testing.assert_close(whole, -objective[mask].mean())
    parts = [[0, 1], [3, 4], [5, 2]]
    added = sum(grpo.clipped_loss(new[p], old[p], shaped[p], mask[p], tokens=int(mask.sum())) for p in parts)
    torch.testing.assert_close(added, whole)


def test_sign():
    a, gamma = torch.tensor([1.0, -1.0]), torch.tensor([[2.0], [2.0]])
    shaped = {
        sign: grpo.shape_advantages(a, gamma, sign).flatten().tolist() for sign in ("both", "positive", "negative")
    }
    assert shaped == {"both": [2, -2], "positive": [2, -1], "negative": [1, -2]}
    with pytest.raises(ValueError, match="unknown sign"):
        grpo.shape_advantages(a, gamma, "up")


def small_model(config_class=Qwen3Config, model_class=Qwen3ForCausalLM, **extra):
    torch.manual_seed(0)
    shape = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    model = model_class(config_class(**shape, num_key_value_heads=1, **extra))
    model.get_output_embeddings().weight.data *= 20  # sharp, so that a cap or a scale would show
    return model


@pytest.mark.parametrize("entropy", [True, False])
def test_chunks_change_neither_values_nor_gradients(entropy, monkeypatch):
    model = small_model(head_dim=16)
    ids, mask = torch.randint(0, 40, (3, 20)), torch.arange(20).expand(3, -1) > 4
    outcomes = []
    for size in (2**26, 40 * 7):
        monkeypatch.setattr(grpo, "CHUNK", size)
        logprobs, uncertainty = grpo.token_logprobs(model, ids, mask, entropy)
        loss = logprobs.square().sum() + (uncertainty.square().sum() if entropy else 0)
        outcomes.append([logprobs, *torch.autograd.grad(loss, model.parameters())])
    for a, b in zip(*outcomes):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_logits_of_a_large_vocabulary_are_never_held_at_once():
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=151936, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                    num_key_value_heads=1, head_dim=16)
    )  # fmt: skip
    ids, mask = torch.randint(0, 151936, (1, 2049)), torch.arange(2049)[None] > 0

    def forward_and_backward():
        grpo.token_logprobs(model, ids, mask, entropy=True)[0].sum().backward()

    once = 2048 * 151936 * 4 / 2**20  # MiB of float32 logits
    assert peak_mib(forward_and_backward) < 0.7 * once


def test_models_that_change_their_logits_are_followed():
    gemma = small_model(Gemma2Config, Gemma2ForCausalLM, head_dim=16, final_logit_softcapping=3.0)
    grpo.check_logits(gemma)
    gemma.config.final_logit_softcapping = None
    uncapped = grpo.token_logprobs(gemma, torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, True]]))[0]
    gemma.config.final_logit_softcapping = 3.0
    capped = grpo.token_logprobs(gemma, torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, True]]))[0]
    assert (uncapped - capped).abs().max() > 0.1
    grpo.check_logits(small_model(GraniteConfig, GraniteForCausalLM, logits_scaling=8.0))


def test_a_model_whose_log_probs_are_others_than_those_of_its_logits_is_refused(monkeypatch):
    model = small_model(GraniteConfig, GraniteForCausalLM, logits_scaling=8.0)
    monkeypatch.setattr(grpo, "logits_of_states", lambda model, decoder, states: model.lm_head(states))
    with pytest.raises(ValueError, match=r"Granite.*own logits"):
        grpo.check_logits(model)


def test_micro_batches_hold_every_row_once_within_the_budget():
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (64, 1), generator=g)
    mask = (torch.arange(60) < lengths + 3) & (torch.arange(60) >= 3)
    rows = torch.randperm(64, generator=g)[:50]
    groups = grpo.micro_batches(mask, rows, tokens=200)
    assert sorted(torch.cat([r for r, _ in groups]).tolist()) == sorted(rows.tolist())
    for index, n in groups:
        assert len(index) * n <= 200 and n == int(lengths[index].max()) + 3
    assert [len(r) for r, _ in grpo.micro_batches(mask, rows[:3], tokens=1)] == [1, 1, 1]
    assert grpo.micro_batches(mask, rows[:0], tokens=9) == []
    empty_first = torch.cat([torch.zeros_like(mask[:1]), mask])
    found = grpo.micro_batches(empty_first, torch.arange(2), tokens=1)
    assert [(r.tolist(), n > 0) for r, n in found] == [([1], True)], "a row without a response needs no pass"


def test_update_does_not_depend_on_the_micro_batches():
    ids, (t, n) = torch.randint(0, 40, (12, 20)), (torch.arange(20), torch.randint(1, 17, (12, 1)))
    mask = (t >= 3) & (t < 3 + n)
    shaped = torch.randn(12, 1).round(decimals=0) * mask  # some rows are zero
    weights = []
    for tokens in (10**6, 50):
        model = small_model(head_dim=16)
        old = grpo.token_logprobs(model, ids, mask)[0].detach()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        done = grpo.update(model, optimizer, ids, mask, old, shaped, list(torch.arange(12).split(4)), tokens)
        assert done["grad_norm"] > 0
        weights.append([p.detach() for p in model.parameters()])
    for a, b in zip(*weights):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_update_takes_the_gradient_of_the_equations_on_each_minibatch():
    """Far from ratio 1, with clipping on both sides, rows that teach nothing, and gradients longer than 1."""
    g, t = torch.Generator().manual_seed(1), torch.arange(20)
    ids, mask = torch.randint(0, 40, (6, 20), generator=g), (t >= 3) & (t < torch.randint(9, 20, (6, 1), generator=g))
    ours, theirs = small_model(head_dim=16), small_model(head_dim=16)
    old = grpo.token_logprobs(ours, ids, mask)[0].detach() + 0.3 * torch.randn(6, 20, generator=g)
    shaped = mask * torch.tensor([40.0, -20, 0, 20, -40, 0])[:, None]
    parts, norms = [torch.tensor([4, 0, 2]), torch.tensor([1, 5, 3])], []
    done = grpo.update(ours, torch.optim.SGD(ours.parameters(), 0.05), ids, mask, old, shaped, parts, 30, 0.1, 0.3)
    for rows in parts:
        logp = theirs(ids[rows]).logits[:, :-1].log_softmax(-1).gather(2, ids[rows, 1:, None])[..., 0]
        ratio, a, at = (logp - old[rows, 1:]).exp(), shaped[rows, 1:], mask[rows, 1:]
        objective = ((torch.min(ratio * a, ratio.clamp(0.9, 1.3) * a) * at).sum(1) / at.sum(1)).mean()
        gradients = torch.autograd.grad(objective, list(theirs.parameters()))
        norms.append(sum(x.square().sum() for x in gradients).sqrt().item())
        with torch.no_grad():
            for p, x in zip(theirs.parameters(), gradients):
                p += 0.05 * x / max(1.0, norms[-1])
    assert min(norms) > 1 and done["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-3)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_token_level_update_divides_by_all_tokens_of_the_minibatch():
    g, t = torch.Generator().manual_seed(1), torch.arange(20)
    ids, mask = torch.randint(0, 40, (6, 20), generator=g), (t >= 3) & (t < torch.randint(5, 20, (6, 1), generator=g))
    shaped, model = mask * torch.tensor([4.0, -2, 0, 2, -4, 0])[:, None], small_model(head_dim=16)
    old = grpo.token_logprobs(model, ids, mask)[0].detach()
    want = grpo.clipped_loss(grpo.token_logprobs(model, ids, mask)[0], old, shaped, mask, tokens=int(mask.sum()))
    norm = sum(x.square().sum() for x in torch.autograd.grad(want, list(model.parameters()))).sqrt().item()
    sgd, whole = torch.optim.SGD(model.parameters(), 0.1), [torch.arange(6)]
    done = grpo.update(model, sgd, ids, mask, old, shaped, whole, micro_tokens=30, token_level=True)
    assert done["loss"] == pytest.approx(want.item(), abs=1e-5) and done["grad_norm"] == pytest.approx(norm, rel=1e-3)


def slow_measures(new, old, advantages, tokens, low, high):
    """Share of clipped tokens, and mean of rho - 1 - log rho, over a list of (row, position), from the definitions."""
    clipped, kl = 0, 0.0
    for b, t in tokens:
        ratio, a = math.exp(new[b, t] - old[b, t]), advantages[b, t].item()
        clipped += (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
        kl += ratio - 1 - math.log(ratio)
    return clipped / len(tokens), kl / len(tokens)


@pytest.mark.parametrize("high", [None, 0.4])
def test_clipped_tokens_and_kl_equal_their_definitions(high):
    for seed in range(5):
        new, old, shaped, mask = random_batch(seed)
        new = torch.where(mask, new, torch.nan)  # only response tokens count
        tokens = mask.nonzero().tolist()
        share, kl = slow_measures(new, old, shaped, tokens, 0.2, high or 0.2)
        clipped, estimates = grpo.find_clipped(new, old, shaped, mask, 0.2, high), grpo.estimate_kl(new, old, mask)
        assert not clipped[~mask].any() and not estimates[~mask].any() and (estimates >= 0).all()
        assert 0.1 < clipped.sum().item() / len(tokens) == pytest.approx(share)
        assert estimates.sum().item() / len(tokens) == pytest.approx(kl, rel=1e-4)


def test_a_clipped_token_is_one_without_gradient():
    new, old, shaped, mask = random_batch()
    new.requires_grad_()
    grpo.clipped_loss(new, old, shaped, mask, 0.1, 0.3).backward()
    assert torch.equal(grpo.find_clipped(new.detach(), old, shaped, mask, 0.1, 0.3), mask & (new.grad == 0))


@pytest.mark.parametrize("world", [1, 2])
def test_update_measures_each_token_before_its_own_step_and_ranks_sum_to_the_whole(world):
    g, t = torch.Generator().manual_seed(2), torch.arange(20)
    ids, mask = torch.randint(0, 40, (7, 20), generator=g), (t >= 3) & (t < torch.randint(5, 20, (7, 1), generator=g))
    shaped = mask * torch.tensor([1.0, -2, 0, 3, -1, 0, 2])[:, None]  # rows 2 and 5 are not computed
    parts = [torch.tensor([4, 0, 2]), torch.tensor([1, 5, 3, 6])]
    old = grpo.token_logprobs(small_model(head_dim=16), ids, mask)[0].detach() + 0.3 * torch.randn(7, 20, generator=g)

    def measure(rank):
        model = small_model(head_dim=16)
        frozen = torch.optim.SGD(model.parameters(), 0.0)  # so that all ranks see the same model in each minibatch
        return grpo.update(model, frozen, ids, mask, old, shaped, parts, 40, 0.2, 0.3, rank=rank, world=world)

    done = [measure(rank) for rank in range(world)]
    new = grpo.token_logprobs(small_model(head_dim=16), ids, mask)[0].detach()
    tokens = [(b, i) for b, i in mask.nonzero().tolist() if shaped[b, i] != 0]
    share, kl = slow_measures(new, old, shaped, tokens, 0.2, 0.3)
    assert share > 0.1 and sum(d["clip_fraction"] for d in done) == pytest.approx(share)
    assert sum(d["kl"] for d in done) == pytest.approx(kl, rel=1e-3)


def test_the_second_minibatch_is_measured_after_the_step_on_the_first_and_none_is_zero():
    ids, mask = batch_of()
    old = grpo.token_logprobs(small_model(head_dim=16), ids, mask)[0].detach()

    def measure(shaped, parts):
        model = small_model(head_dim=16)
        return grpo.update(model, torch.optim.SGD(model.parameters(), 0.3), ids, mask, old, shaped, parts)

    rows = torch.arange(3)
    first, both, none = measure(1.0 * mask, [rows]), measure(1.0 * mask, [rows, rows]), measure(0.0 * mask, [rows])
    assert first["clip_fraction"] == 0 and first["kl"] < 1e-8 and both["kl"] > 1e-4
    assert none["clip_fraction"] == none["kl"] == none["grad_norm"] == 0


def test_token_logprobs_are_those_of_the_unpadded_sequence():
    torch.manual_seed(0)
    model = small_model(head_dim=16)
    lengths = [(3, 5), (6, 1), (4, 9), (5, 0)]  # prompt, response
    ids = torch.randint(0, 40, (4, 13))
    t = torch.arange(13)
    mask = torch.stack([(t >= p) & (t < p + r) for p, r in lengths])
    logprobs, entropy = grpo.token_logprobs(model, ids, mask, entropy=True)
    assert (logprobs[~mask] == 0).all() and (entropy[~mask] == 0).all()
    for b, (p, r) in enumerate(lengths):
        with torch.no_grad():
            logits = model(ids[b : b + 1, : p + r]).logits[0].double()
        for i in range(p, p + r):
            dist = torch.distributions.Categorical(logits=logits[i - 1])
            assert logprobs[b, i].item() == pytest.approx(dist.log_prob(ids[b, i]).item(), abs=1e-4)
            assert entropy[b, i].item() == pytest.approx(dist.entropy().item(), abs=1e-4)
    assert (grpo.token_logprobs(model, ids, torch.zeros_like(mask), entropy=True)[1] == 0).all()
    with pytest.raises(ValueError, match="token 0"):
        grpo.token_logprobs(model, ids, t.expand(4, -1) >= 0)


def batch_of(rows=3, n=20):
    ids = torch.randint(0, 40, (rows, n), generator=torch.Generator().manual_seed(0))
    return ids, torch.arange(n).expand(rows, -1) > 4


def test_a_lora_model_is_scored_with_its_adapters_and_trains_them_alone():
    model = get_peft_model(small_model(head_dim=16), LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(0))  # fresh ones are 0 and change nothing
    batch = batch_of()
    logprobs = grpo.token_logprobs(model, *batch)[0]
    logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert (grpo.token_logprobs(model, *batch)[0] - logprobs).abs().max() > 0.1
    merged = model.merge_and_unload()
    torch.testing.assert_close(grpo.token_logprobs(merged, *batch)[0], logprobs, rtol=1e-4, atol=1e-4)


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one state for the process, which other tests may have set."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_that_accelerate_prepared_keeps_its_forward(fresh_accelerate):
    plain, batch = small_model(head_dim=16), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        want = grpo.token_logprobs(plain, *batch)[0]
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(small_model(head_dim=16))
    own = model.__dict__["forward"]
    with accelerator.autocast():
        got = grpo.token_logprobs(model, *batch)[0]
    assert model.__dict__["forward"] is own and torch.equal(got, want)
    assert not torch.equal(got, grpo.token_logprobs(plain, *batch)[0]), "bfloat16 shows"
    assert model(input_ids=batch[0]).logits.dtype == torch.float32, "accelerate's wrapper still runs"


def test_the_upper_clip_may_be_higher():
    mask, one = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1)
    for ratio, advantage, high, expected in ((1.5, 1, None, 1.2), (1.5, 1, 0.28, 1.28), (0.5, -1, 0.28, -0.8)):
        loss = grpo.clipped_loss(one * math.log(ratio), 0 * one, advantage * one, mask, 0.2, high)
        assert loss.item() == pytest.approx(-expected, abs=1e-5)
