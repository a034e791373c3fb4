"""RhythmGRPOTrainer against TRL's GRPOTrainer and against gamma from eager maps; README.md's step as a user runs it."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import GPT2Config, GPT2LMHeadModel

import credit
from examples import trl_rhythm
from grpo import clipped_loss
from metrics import Signals
from node import settings
from tests.small_trl import TRL, GRPOTrainer, Rhythm, eager_gammas, scored, trained, trainer, weights

ROOT = Path(trl_rhythm.__file__).parents[1]


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def apart(a, b):
    """The largest difference of any weight."""
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def plain():
    """TRL's own trainer after four steps."""
    return trained(TRL, steps=4)


def test_uniform_is_trl_to_the_bit(plain):
    uniform, coupled = trained(credit="uniform", steps=4), trained(steps=4)
    assert equal(weights(uniform.model), weights(plain.model))
    assert not equal(weights(coupled.model), weights(plain.model))
    first, ours = plain.batches_seen[0], coupled.batches_seen[0]
    assert torch.equal(ours["completion_ids"], first["completion_ids"])
    torch.testing.assert_close(ours["advantages"], first["advantages"][:, None] * ours["gamma"])
    assert [b["passes"] for b in plain.batches_seen] == [2, 2]
    # Before the first step two to see what padding does, three for the check of the model and two for the head split;
    # never twice for pi_old.
    assert [b["passes"] for b in coupled.batches_seen] == [9, 2]


@pytest.mark.parametrize("changes", [dict(), dict(gradient_accumulation_steps=2, steps=1)])
def test_gamma_is_that_of_eager_maps_on_the_left_padded_batch(changes):
    made = trained(heads_every=1, **{"steps": 4} | changes)
    assert (made.batches_seen[0]["prompt_mask"][:, 0] == 0).any(), "prompts differ in length"
    for batch in made.batches_seen:
        assert ("old_per_token_logps" in batch) == (not changes), "with and without TRL's own scoring pass"
        gamma = batch["gamma"]
        torch.testing.assert_close(gamma, eager_gammas([batch])[0], rtol=0, atol=1e-5)
        assert {1, 1.25, 1.5} <= set(gamma.unique().tolist()) and (gamma[batch["completion_mask"] == 0] == 1).all()


@pytest.mark.parametrize("changes", [dict(), dict(temperature=0.7), dict(bf16=True, gradient_checkpointing=True)])
def test_pi_old_is_trls_own(changes):
    a, b = (trained(kind, steps=1, **changes).batches_seen[0] for kind in (TRL, Rhythm))
    assert torch.equal(a["completion_ids"], b["completion_ids"]) and a["old_per_token_logps"].std() > 0.1
    close = dict(rtol=0, atol=0.1 if "bf16" in changes else 1e-4)
    torch.testing.assert_close(b["old_per_token_logps"], a["old_per_token_logps"] * a["completion_mask"], **close)


def test_a_model_to_which_padding_counts_as_text_is_refused(tmp_path):
    """GPT-2 without positions numbers the padding too, and TRL gives none: pi_old would not be what the loss has."""
    config = GPT2Config(vocab_size=30, n_positions=512, n_embd=32, n_layer=4, n_head=4, eos_token_id=1, pad_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    settings.load_tokenizer(settings.TINY).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel counts padding .* credit 'coupled' cannot follow") as e:
        trained(steps=1, path=str(tmp_path))
    assert "\n" not in str(e.value)


def test_gradient_accumulation_changes_nothing():
    sgd = dict(optim="sgd", learning_rate=0.1, steps=1)
    whole = trained(per_device_train_batch_size=16, steps_per_generation=1, **sgd)
    parts = trained(per_device_train_batch_size=4, steps_per_generation=4, gradient_accumulation_steps=4, **sgd)
    assert torch.equal(whole.batches_seen[0]["gamma"], parts.batches_seen[0]["gamma"])
    assert [x["advantages"].shape[0] for x in parts.inputs_seen] == [4] * 4
    moved = apart(weights(whole.model), whole.batches_seen[0]["weights"])
    assert moved > 1e-3 and apart(weights(whole.model), weights(parts.model)) < 1e-3 * moved


def test_a_second_iteration_keeps_gamma_and_clipping_is_logged_by_credit():
    made = trained(num_iterations=2, steps_per_generation=1, steps=4, learning_rate=3e-3)
    assert len(made.batches_seen) == 2
    for first, second in (made.inputs_seen[:2], made.inputs_seen[2:]):
        assert torch.equal(first["gamma"], second["gamma"])
    clipped = 0
    for inputs, log in zip(made.inputs_seen, made.state.log_history):
        mask, credited = inputs["completion_mask"].bool(), inputs["gamma"] > 1
        shares = log["credit/clipped_inside"], log["credit/clipped_outside"]
        both = shares[0] * credited.sum() + shares[1] * (mask & ~credited).sum()
        assert both.item() == pytest.approx(log["clip_ratio/region_mean"] * mask.sum().item(), abs=1e-3)
        clipped += both > 0
        if "credit/gamma" in log:
            assert log["credit/gamma"] == pytest.approx(inputs["gamma"][mask].mean().item(), abs=1e-5)
    assert clipped == 2, "the second iteration of each batch"


def test_lora_with_a_reference_model():
    """With an adapter, the reference model is the policy without it, so TRL scores the same module twice.

    The adapter's dropout is on in TRL's loss, and must not reach the signals.
    """
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapter = LoraConfig(target_modules=targets, r=8, lora_alpha=64, lora_dropout=0.1)
    for steps, changes in ((4, {}), (2, dict(gradient_accumulation_steps=2))):  # with and without a pass for pi_old
        made = trained(steps=steps, peft=adapter, beta=0.05, learning_rate=1e-2, heads_every=1, **changes)
        first, second = made.batches_seen
        assert apart(first["weights"], second["weights"]) > 0.01 and "ref_per_token_logps" in second
        torch.testing.assert_close(second["gamma"], eager_gammas([second])[0], rtol=0, atol=1e-5)
        without = eager_gammas([second | {"weights": first["weights"]}])[0]
        assert (second["gamma"] - without).abs().max() > 0.1, "the adapter shows in gamma"


def test_the_head_split_does_not_depend_on_masked_rows():
    """TRL masks truncated responses. If these come first, the split is measured on others, and never lost."""
    made = trained(steps=1)
    batch = made.batches_seen[0]
    ids, attention = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
    keep = batch["completion_ids"].shape[1]

    def split_of(masked):
        made.batches, seen = 0, attention.clone()
        seen[:masked, -keep:] = 0
        made._observe(ids, seen, keep)
        return made.heads.spans

    assert made.model.training
    whole, half = split_of(0), split_of(len(ids) // 2)
    assert half.isfinite().all() and not torch.equal(whole, half)
    assert torch.equal(split_of(len(ids)), half), "without any response the last one stays"
    assert made.model.training


def test_every_loss_takes_an_advantage_for_each_token():
    made = trained(steps=1)
    inputs = dict(made.inputs_seen[0])
    one = inputs["advantages"][:, 0]
    for loss_type in trl_rhythm.LOSSES:
        made.loss_type, losses = loss_type, []
        for advantages in (one, one[:, None].expand_as(inputs["advantages"]), inputs["advantages"]):
            losses.append(GRPOTrainer._compute_loss(made, made.model, {**inputs, "advantages": advantages}).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), loss_type
        assert losses[0] != pytest.approx(losses[2], rel=1e-3), loss_type


def test_the_token_level_loss_is_trls_dapo_and_the_other_its_grpo():
    made = trained(steps=1)
    inputs = dict(made.inputs_seen[0])
    mask, t = inputs["completion_mask"].bool(), inputs["completion_ids"].shape[1]
    inputs["num_items_in_batch"] = mask.sum()
    made.model.eval()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    real = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        new, *_ = made._get_per_token_logps_and_entropies(made.model, ids, real, t)
        old = new - 0.3 * torch.randn(new.shape, generator=torch.Generator().manual_seed(0))
        inputs["old_per_token_logps"] = old
        for loss_type, tokens in (("dapo", int(mask.sum())), ("grpo", None)):
            made.loss_type = loss_type
            theirs = GRPOTrainer._compute_loss(made, made.model, inputs).item()
            ours = clipped_loss(new, old, inputs["advantages"], mask, tokens=tokens).item()
            assert abs(theirs) > 1e-3 and ours == pytest.approx(theirs, rel=1e-5)


def test_evaluation_is_trls_own():
    a, b = (trainer(kind, per_device_eval_batch_size=4).evaluate() for kind in (TRL, Rhythm))
    assert a["eval_loss"] == b["eval_loss"] and not any("credit" in name for name in b)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (dict(importance_sampling_level="sequence"), "importance_sampling_level 'sequence'"),
        (dict(loss_type="unheard-of"), "loss_type 'unheard-of'"),
        (dict(use_liger_kernel=True), "use_liger_kernel"),
        (dict(peft=PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")), "adapters that add tokens"),
        (dict(credit="loud"), "unknown credit 'loud'"),
        (dict(sign="up"), "unknown sign 'up'"),
    ],
)
def test_what_cannot_be_followed_is_named(changes, error):
    with pytest.raises(ValueError, match=error):
        trainer(**changes)
    if "credit" not in changes and "sign" not in changes:
        trainer(credit="uniform", **changes)


def test_each_setting_reaches_the_advantages():
    made = trainer(credit="local", amp=3.0, q=0.2, lowest=True, sign="negative")
    mask = torch.ones(2, 20, dtype=torch.bool)
    signals = Signals(*torch.rand(4, 2, 20, generator=torch.Generator().manual_seed(0)), None)
    shaped, gamma = made._shape(torch.tensor([1.0, -1.0]), signals, mask)
    assert torch.equal(gamma, credit.local_chunk(signals.waad, mask, 0.2, 3.0, lowest=True))
    assert torch.equal(shaped, torch.stack([torch.ones(20), -gamma[1]]))


def test_without_trl_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit, match=r"^error: .*pip install trl==1\.16\.0$"):
        runpy.run_path(trl_rhythm.__file__, run_name="__main__")


def test_the_command_trains_and_ends_with_what_it_reached(capsys, monkeypatch):
    monkeypatch.setattr(trl_rhythm, "PROMPTS", 4)
    monkeypatch.setattr(trl_rhythm, "MAX_TOKENS", 24)
    trl_rhythm.main(trl_rhythm.Args(batches=1, problems=2))
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert re.match(r"held-out success \d+\.\d % -> \d+\.\d % with credit coupled, .*, 1 batches, \d+ s$", last)


OWN_STEP = """
make_update, ended = update, []
def update(model, optimizer, ids, mask, **more):
    for row, at in zip(ids, mask):
        found = torch.isin(row[at], ENDS)
        assert not found[:-1].any(), "what follows an end is padding"
        ended.append(found[-1].item())
    return make_update(model, optimizer, ids, mask, **more)

torch.manual_seed(0)
before = [p.detach().clone() for p in model.parameters()]
questions = ["3 7 5>38\\n<think>", "10 12 5>27\\n<think>"]
done = [training_step(questions, lambda question, text: text.count(question[0])) for _ in range(2)]
assert all(d["grad_norm"] > 0 and d["skipped"] == 0 for d in done), done
assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters()))
assert any(ended) and len(ENDS) == 2
import sys
print(*{name.split(".")[0] for name in sys.modules})
"""


def test_the_readmes_step_runs_in_a_folder_with_the_five_files(tmp_path):
    (step,) = re.findall(r"```python\n(.*?)```", (ROOT / "examples" / "README.md").read_text(), re.DOTALL)
    name, tokens = '"Qwen/Qwen3-0.6B"', "max_new_tokens=256"
    assert name in step and tokens in step
    model, tokenizer = settings.load_model(str(ROOT / settings.TINY))
    line_break = tokenizer("\n").input_ids[0]  # ends a response and pads it, as one of the ends of Qwen3 does
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, line_break]
    model.generation_config.pad_token_id = line_break
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    step = step.replace(name, repr(str(tmp_path / "model"))).replace(tokens, "max_new_tokens=24")
    for module in ("attention", "heads", "metrics", "credit", "grpo"):
        (tmp_path / f"{module}.py").write_text((ROOT / f"{module}.py").read_text())
    (tmp_path / "own.py").write_text(step + OWN_STEP)
    done = subprocess.run([sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"tasks", "rollout", "node", "examples", "trl", "peft"} & set(done.stdout.split())


def test_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
               "tests/small_trl.py", str(tmp_path)]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-10000:]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert equal(one["weights"], two["weights"]) and apart(one["weights"], one["batches"][0]["weights"]) > 1e-4
    batches = [seen["batches"][0] for seen in (one, two)]
    assert not torch.equal(batches[0]["prompt_ids"], batches[1]["prompt_ids"]), "each has problems of its own"
    for batch, gamma in zip(batches, eager_gammas(batches)):
        torch.testing.assert_close(batch["gamma"], gamma, rtol=0, atol=1e-5)
    tokens = torch.stack([b["completion_mask"].sum() for b in batches])
    means = torch.stack([b["gamma"][b["completion_mask"].bool()].mean() for b in batches])
    assert one["log"][0]["credit/gamma"] == pytest.approx(((means * tokens).sum() / tokens.sum()).item(), abs=1e-5)

    want = scored(settings.load_model(settings.TINY, "cpu")[0])
    for wrapper in ("DDP", "FSDP2"):
        got = two[wrapper]
        torch.testing.assert_close(got["logprobs"], want["logprobs"], rtol=0, atol=1e-4)
        for there, here in zip(got["signals"], want["signals"]):
            torch.testing.assert_close(there, here, rtol=0, atol=1e-4)
        for name, gradient in want["gradients"].items():
            torch.testing.assert_close(got["gradients"][name], gradient, rtol=1e-3, atol=1e-3)
