"""verl's engine with the credit, in one process: its numbers against verl's own, and against the algorithm's files."""

from functools import partial

import parts
import pytest
import torch
import verl_rhythm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from verl.utils import tensordict_utils as tu
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.padding import no_padding_2_padding

from credit import coupled_rhythm
from metrics import measure_heads, observe


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """A folder with a small Llama with random weights and the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
    config = LlamaConfig(vocab_size=30, num_key_value_heads=2, eos_token_id=1, pad_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((parts.ROOT / "assets/tiny" / name).read_text())
    return str(folder)


def score(worker, batch, **settings) -> dict[str, torch.Tensor]:
    """What infer_batch gives for the response tokens, [B,T] each; with credit if there are settings."""
    batch = batch.clone()
    if settings:
        tu.assign_non_tensor(batch, rhythm=settings)
    output = worker.infer_batch(batch.clone())
    names = {"log_probs", "entropy", verl_rhythm.SCORED_GAMMA} & set(output.keys())
    return {name: no_padding_2_padding(output[name].float(), batch) for name in names}


def check_against_verl_and_the_files(worker, batch, model, tolerance: float) -> None:
    plain, ours = score(worker, batch), score(worker, batch, credit="coupled")
    mask = batch["response_mask"].to_padded_tensor(0).bool()
    for name in ("log_probs", "entropy"):  # of all response tokens, the tool's too
        assert (plain[name] - ours[name]).abs().max() < tolerance, name

    # gamma, from the algorithm's files alone, with the engine's split.
    ids, _, is_response, own = verl_rhythm.pad_rows(batch)
    signals = observe(model, ids, own, worker.engine.heads)
    gamma = coupled_rhythm(signals.waad, signals.fai, own)
    rows = [row[places] for row, places in zip(gamma, is_response)]
    for row, expected, marks in zip(ours[verl_rhythm.SCORED_GAMMA], rows, mask):
        n = len(expected)
        assert torch.equal(row[:n][marks[:n]], expected[marks[:n]])
        assert (row[:n][~marks[:n]] == 1).all()  # a tool's tokens
    assert set(gamma[own].unique().tolist()) >= {1.0, 1.25, 1.5}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_scores_are_verls_and_gamma_is_the_files(name, packed, llama):
    path = parts.TINY if name == "qwen3" else llama
    worker = parts.start_worker(path, f"actor_rollout_ref.model.use_remove_padding={packed}")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    batch = parts.make_batch()
    check_against_verl_and_the_files(worker, batch, model, tolerance=1e-4)

    # The split is measured on rows of the whole batch, each token counting once, however the rows are divided.
    ids, _, _, own = verl_rhythm.pad_rows(batch)
    expected = measure_heads(model, ids, own)
    torch.testing.assert_close(worker.engine.heads.spans, expected.spans, rtol=1e-4, atol=1e-4)
    assert torch.equal(worker.engine.heads.is_local, expected.is_local)

    # At another temperature, and in passes of two rows.
    batch = parts.make_batch(seed=1)
    tu.assign_non_tensor(batch, temperature=0.7, use_dynamic_bsz=False, micro_batch_size_per_gpu=2)
    check_against_verl_and_the_files(worker, batch, model, tolerance=1e-4)


def test_lora():
    worker = parts.start_worker(parts.TINY, "actor_rollout_ref.model.lora_rank=8")
    torch.manual_seed(0)
    for name, weight in worker.engine.module.named_parameters():
        if "lora_B" in name:  # 0 at first, where LoRA changes nothing
            weight.data.normal_(std=0.1)
    check_against_verl_and_the_files(worker, parts.make_batch(), worker.engine.module, tolerance=1e-4)


def test_bfloat16():
    worker = parts.start_worker(
        parts.TINY, "actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:bf16,reduce_dtype:fp32}"
    )
    batch = parts.make_batch()
    plain, ours = score(worker, batch), score(worker, batch, credit="coupled")
    mask = batch["response_mask"].to_padded_tensor(0).bool()
    assert (plain["log_probs"] - ours["log_probs"])[mask].abs().max() < 0.5
    assert (plain["log_probs"] - ours["log_probs"])[mask].abs().mean() < 0.03
    gamma = ours[verl_rhythm.SCORED_GAMMA][mask]
    assert set(gamma.unique().tolist()) == {1.0, 1.25, 1.5, 1.75}


def test_training_counts_clipped_tokens_and_changes_nothing_else():
    batch = parts.make_batch()
    worker = parts.start_worker(parts.TINY)
    scored = score(worker, batch)["log_probs"]
    sizes = batch["responses"].offsets().diff()
    generator = torch.Generator().manual_seed(3)
    moved = [0.4 * torch.randn(int(n), generator=generator) for n in sizes]  # so that many ratios are clipped
    old = [row[: len(m)] + m for row, m in zip(scored, moved)]
    advantages = [torch.full((len(m),), 1.0 if b % 2 else -1.0) for b, m in enumerate(moved)]
    gamma = [1 + 0.5 * (torch.rand(len(m), generator=generator) < 0.4) for m in moved]
    batch["old_log_probs"], batch["advantages"] = parts.jagged(old), parts.jagged(advantages)
    tu.assign_non_tensor(batch, calculate_entropy=False, mini_batch_size=12, global_batch_size=12, compute_loss=True)

    def train(**fields) -> dict:
        """One update of a fresh worker."""
        worker, data = parts.start_worker(parts.TINY), batch.clone()
        for name, tensor in fields.items():
            data[name] = tensor
        return tu.get(worker.train_mini_batch(data), "metrics")

    plain, ours = train(), train(**{verl_rhythm.GAMMA: parts.jagged(gamma)})
    for name in ("grad_norm", "actor/pg_loss", "actor/pg_clipfrac"):
        assert parts.values(plain[name]) == parts.values(ours[name]), name  # to the bit

    mask = [marks.bool() for marks in batch["response_mask"].unbind()]
    clipped = [
        torch.where(a > 0, (-m).exp() > 1.2, (-m).exp() < 0.8) for a, m in zip(advantages, moved)
    ]  # the ratio is exp(-m)
    for kind, has in (("credited", True), ("others", False)):
        chosen = [marks & ((g != 1) == has) for marks, g in zip(mask, gamma)]
        assert parts.values(ours[f"rhythm/tokens_{kind}"]) == [sum(int(c.sum()) for c in chosen)]
        count = sum(int((c & x).sum()) for c, x in zip(chosen, clipped))
        assert parts.values(ours[f"rhythm/clipped_{kind}"]) == [count] and count > 5


def test_without_settings_it_is_verls_engine_to_the_bit(monkeypatch):
    batch = parts.make_batch()
    old = [torch.zeros(int(n)) for n in batch["responses"].offsets().diff()]
    batch["old_log_probs"], batch["advantages"] = parts.jagged(old), parts.jagged([x + 1 for x in old])

    def numbers(engine: type) -> list:
        monkeypatch.setitem(EngineRegistry._engines["language_model"]["fsdp2"], "cpu", engine)
        worker, data = parts.start_worker(parts.TINY), batch.clone()
        assert type(worker.engine) is engine
        scores = score(worker, batch)
        tu.assign_non_tensor(data, mini_batch_size=4, global_batch_size=4, compute_loss=True)
        trained = tu.get(worker.train_mini_batch(data), "metrics")
        weights = [weight.full_tensor() for weight in worker.engine.module.parameters()]
        return [*scores.values(), torch.tensor(parts.values(trained["grad_norm"])), *weights]

    for verls, ours in zip(numbers(FSDPEngineWithLMHead), numbers(verl_rhythm.RhythmEngine)):
        assert torch.equal(verls, ours)


def test_the_split_is_kept_for_heads_every_batches():
    worker = parts.start_worker(parts.TINY)
    score(worker, parts.make_batch(seed=0), credit="coupled", heads_every=2)
    first = worker.engine.heads
    score(worker, parts.make_batch(seed=1), credit="coupled", heads_every=2)
    assert worker.engine.heads is first
    score(worker, parts.make_batch(seed=2), credit="coupled", heads_every=2)
    assert worker.engine.heads is not first


@pytest.mark.parametrize("credit", ["local", "global", "entropy", "forking", "random", "scaled"])
def test_every_credit_by_name(credit):
    worker = parts.start_worker(parts.TINY)
    gamma = score(worker, parts.make_batch(), credit=credit)[verl_rhythm.SCORED_GAMMA]
    assert gamma.unique().numel() >= 2


def test_shaping_follows_the_sign():
    advantages, gamma = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.5, 1.5]])
    shape = partial(verl_rhythm.shape_tokens, advantages, gamma)
    assert shape("both").tolist() == [[1.5, -1.5]]
    assert shape("positive").tolist() == [[1.5, -1.0]]
    assert shape("negative").tolist() == [[1.0, -1.5]]
