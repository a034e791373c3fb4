"""examples/minimal.py computes what the modules compute, and its command runs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import credit
import grpo
import heads
import metrics
import tasks
from examples import minimal


@pytest.fixture(scope="module")
def tiny():
    """The tiny model, its tokenizer, and a left-padded batch of 8 responses to each of 3 problems."""
    model = AutoModelForCausalLM.from_pretrained(minimal.MODEL, dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(minimal.MODEL, padding_side="left")
    torch.manual_seed(0)
    problems = tasks.load(minimal.TASK, "train")
    lengths = [len(p.prompt) for p in problems]
    shortest, longest = (problems[lengths.index(n)] for n in (min(lengths), max(lengths)))
    chosen = [longest, problems[0], shortest]
    return model, tokenizer, chosen, minimal.sample(model, tokenizer, chosen, n=8)


def assert_same_gamma(rule, got, waad, fai, mask, **options):
    if rule == "coupled":
        want = credit.coupled_rhythm(waad, fai, mask, **options)
    else:
        options = {name: options[name] for name in ("q", "amp")}
        want = (
            credit.local_chunk(waad, mask, **options) if rule == "local" else credit.global_anchor(fai, mask, **options)
        )
    torch.testing.assert_close(torch.tensor(got), want[mask], atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", ["local", "global", "coupled"])
def test_gamma_is_that_of_credit(rule):
    for seed in range(300):
        g = torch.Generator().manual_seed(seed)
        length = 1 + seed % 40
        steps = [2, 8, 1 << 20][seed % 3]  # few different values, so many ties; or none
        mask = torch.zeros(1, length + 5, dtype=torch.bool)
        mask[0, 3 : 3 + length] = True
        waad = torch.randint(0, steps, mask.shape, generator=g) / steps * 8 * mask
        fai = torch.randint(0, steps, mask.shape, generator=g) / steps * mask  # some are 0: no anchors
        waad_list, fai_list = waad[mask].tolist(), fai[mask].tolist()
        for q, amp, alpha, k in (
            (0.4, 1.5, 0.5, 3),
            (0.1, 3.0, 0.2, 1),
            (0.6, 1.5, 0.9, 2),
            (1.0, 2.0, 0.5, 50),
            (0, 2.0, 0.5, 3),
        ):
            got = minimal.assign_credit(rule, waad_list, fai_list, q=q, gamma_amp=amp, alpha=alpha, k=k)
            assert_same_gamma(rule, got, waad, fai, mask, q=q, amp=amp, alpha=alpha, k=k)
        assert_same_gamma(rule, minimal.assign_credit(rule, waad_list, fai_list), waad, fai, mask, q=0.4, amp=1.5)


def test_uniform_is_one_everywhere():
    assert minimal.assign_credit("uniform", [5.0, 0.0, 5.0, 1.0], [0.5, 0.1, 0.0, 0.0]) == [1.0] * 4


def test_top_q_takes_the_size_that_was_meant():
    # 0.07 * 100 is 7.000000000000001 in floats, so its ceiling is 8
    assert minimal.top_q([float(x) for x in range(100)], q=0.07) == set(range(93, 100))


def test_the_split_is_that_of_heads_and_the_metrics_are_those_of_metrics():
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        n = 20 + 5 * seed
        mask = torch.zeros(3, n, dtype=torch.bool)
        for row in mask:
            begin = int(torch.randint(1, n - 4, (), generator=g))
            row[begin : int(torch.randint(begin + 1, n + 1, (), generator=g))] = True
        count = 2 + seed  # of heads; each has another span
        sharpness = torch.linspace(0, 0.5, count)[torch.randperm(count, generator=g)]
        back = (torch.arange(n)[:, None] - torch.arange(n)).float()
        scores = torch.randn(3, count, n, n, generator=g) - sharpness[:, None, None] * back
        maps = scores.masked_fill(back < 0, -torch.inf).softmax(-1)

        is_local, is_global = heads.split_heads(heads.head_spans(maps, mask))
        h_loc, h_glob = minimal.split_heads(maps, mask)
        assert sorted(h_loc.tolist()) == is_local.nonzero()[:, 0].tolist()
        assert sorted(h_glob.tolist()) == is_global.nonzero()[:, 0].tolist()
        waad, fai = minimal.waad_and_fai(maps, mask, h_loc, h_glob)
        torch.testing.assert_close(waad, metrics.waad(maps[:, is_local].mean(1), mask), atol=1e-5, rtol=0)
        torch.testing.assert_close(fai, metrics.fai(maps[:, is_global].mean(1), mask), atol=1e-6, rtol=0)


def test_the_signals_of_a_left_padded_batch_are_those_of_observe(tiny):
    model, _, _, (ids, real, response, _) = tiny
    assert not real[:, 0].all() and real[:, 0].any() and not real[:, -1].all()  # padded on both sides
    want = metrics.observe(model, ids, response, attention_mask=real)
    maps, old_logprobs = minimal.attention_maps(model, ids, real)
    h_loc, h_glob = minimal.split_heads(maps, response)
    assert want.heads.layers == heads.middle_layers(12)
    assert sorted(h_loc.tolist()) == want.heads.is_local.flatten().nonzero()[:, 0].tolist()
    assert sorted(h_glob.tolist()) == want.heads.is_global.flatten().nonzero()[:, 0].tolist()
    torch.testing.assert_close(
        heads.head_spans(maps, response), want.heads.spans.flatten(), atol=1e-4, rtol=0
    )  # the maps are of the same layers, in the same order
    waad, fai = minimal.waad_and_fai(maps, response, h_loc, h_glob)
    torch.testing.assert_close(waad, want.waad, atol=1e-4, rtol=0)
    torch.testing.assert_close(fai, want.fai, atol=1e-5, rtol=0)
    torch.testing.assert_close(old_logprobs * response, want.logprobs, atol=1e-4, rtol=0)
    assert (waad[response] > 0).all() and (fai > 0).any()


@pytest.mark.parametrize("layers", [12, 24, 28, 36, 40, 61, 80])
def test_the_layers_are_those_of_heads(layers):
    class Model:
        def __call__(self, input_ids, attention_mask, output_attentions):
            self.attentions = [torch.full((1, 2, 3, 3), float(i)) for i in range(layers)]
            self.logits = torch.zeros(1, 3, 5)
            return self

    maps, _ = minimal.attention_maps(Model(), torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3))
    assert maps[0, ::2, 0, 0].tolist() == heads.middle_layers(layers)


def test_group_advantages_are_those_of_grpo():
    rewards = torch.randint(0, 2, (200, 4), generator=torch.Generator().manual_seed(0)).float()
    assert (rewards == rewards[:, :1]).all(1).any()
    torch.testing.assert_close(minimal.group_advantages(rewards), grpo.group_advantages(rewards), atol=1e-6, rtol=0)


def test_loss_and_gradient_are_those_of_grpo():
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        old, change, shaped = torch.randn(3, 5, 12, generator=g)
        mask = torch.rand(5, 12, generator=g) < 0.6
        mask[:, 4] = True
        logprobs = (old + 0.3 * change).requires_grad_()
        got, want = minimal.clipped_loss(logprobs, old, shaped, mask), grpo.clipped_loss(logprobs, old, shaped, mask)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logprobs)[0] for loss in (got, want)))


def test_sample_marks_prompt_response_and_reward(tiny):
    _, tokenizer, problems, (ids, real, response, rewards) = tiny
    assert rewards.shape == (3, 8) and 0 < rewards.sum() < 24
    for b in range(24):
        problem = problems[b // 8]
        assert tokenizer.decode(ids[b, real[b] & ~response[b]]) == problem.prompt
        text = tokenizer.decode(ids[b, response[b]])
        assert text.count("<eos>") == text.endswith("<eos>")  # one at most, and it is the last token
        assert text.endswith("<eos>") or response[b].sum() == minimal.MAX_NEW_TOKENS
        assert rewards.flatten()[b] == tasks.get(minimal.TASK).reward(problem, text.removesuffix("<eos>"))
    first = response.int().argmax(1)
    assert (first == first[0]).all()


def test_sample_draws_from_the_whole_distribution_and_knows_all_end_tokens(tiny, monkeypatch):
    model, tokenizer, problems, _ = tiny
    asked = {}

    def generate(input_ids, attention_mask, **options):
        asked.update(options)
        new = torch.tensor([[5, 1, 0, 0], [5, 6, 7, 8], [2, 1, 1, 5]])
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [1, 2])
    _, real, response, _ = minimal.sample(model, tokenizer, problems, n=1)
    assert asked["do_sample"] and asked["num_return_sequences"] == 1
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (1.0, 1.0, 0)
    want = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    assert torch.equal(real[:, -4:], want) and torch.equal(response[:, -4:], want)


@pytest.mark.parametrize("scale", [1, 100])  # 100: the gradient is longer than 1, so it is clipped
def test_a_step_is_grpo_with_that_gamma(scale, tiny, monkeypatch):
    """One step of the file and one written with the modules leave the same weights."""
    _, tokenizer, problems, batch = tiny
    ids, real, response, rewards = batch
    monkeypatch.setattr(minimal, "MINIBATCHES", 1)
    monkeypatch.setattr(minimal, "sample", lambda *arguments, n: batch)
    monkeypatch.setattr(minimal, "group_advantages", lambda rewards: scale * grpo.group_advantages(rewards))
    weights = []
    for ours in (True, False):
        model = AutoModelForCausalLM.from_pretrained(minimal.MODEL, dtype=torch.float32, attn_implementation="eager")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)  # Adam would blow up rounding errors
        if ours:
            reward, gamma_mean = minimal.train_step(model, tokenizer, optimizer, problems=problems, rule="coupled")
            assert all(w.grad is None for w in model.parameters())  # nothing is left for the next step
        else:
            signals = metrics.observe(model, ids, response, attention_mask=real)
            gamma = credit.coupled_rhythm(signals.waad, signals.fai, response)
            shaped = grpo.shape_advantages(scale * grpo.group_advantages(rewards).flatten(), gamma)
            logits = model(input_ids=ids, attention_mask=real).logits[:, :-1].log_softmax(-1)
            logprobs = torch.nn.functional.pad(logits.gather(-1, ids[:, 1:, None])[..., 0], (1, 0))
            grpo.clipped_loss(logprobs, signals.logprobs, shaped, response).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            assert (norm > 1) == (scale == 100)
            optimizer.step()
        weights.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
    start = torch.cat([w.detach().flatten() for w in tiny[0].parameters()])
    torch.testing.assert_close(weights[0] - start, weights[1] - start, atol=1e-6, rtol=0)
    assert (weights[1] - start).abs().max() > 1e-4
    assert reward == pytest.approx(rewards.mean().item())
    assert gamma_mean == pytest.approx(gamma[response].mean().item())


@pytest.mark.parametrize("rule", ["coupled", "uniform"])
def test_the_command_runs_and_says_what_came_out(rule, tmp_path, monkeypatch, capsys):
    for name, value in dict(PROBLEMS=4, G=3, MINIBATCHES=2, TEST_PROBLEMS=5, MAX_NEW_TOKENS=24).items():
        monkeypatch.setattr(minimal, name, value)
    monkeypatch.chdir(tmp_path)
    minimal.main(["--credit", rule, "--steps", "2", "--seed", "7"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-2:]] == [["step", "1/2"], ["step", "2/2"]]
    assert ("mean gamma 1.000" in lines[-1]) == (rule == "uniform")
    assert last.startswith(f"{rule}: held-out success ") and "points (95 % interval)" in last
    picture = Path(f"runs/minimal-{rule}-7.png")
    assert last.endswith(f"Learning curve: {picture}") and picture.read_bytes().startswith(b"\x89PNG")


def test_the_file_needs_of_ours_nothing_but_the_task():
    names = set()
    for node in ast.walk(ast.parse(Path(minimal.__file__).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    root = Path(minimal.__file__).parents[1]
    ours = {path.stem for path in root.glob("*.py")} | {path.name for path in root.iterdir() if path.is_dir()}
    assert {name.split(".")[0] for name in names} & ours == {"tasks"}


def test_the_command_starts_from_any_folder(tmp_path):
    command = [sys.executable, str(Path(minimal.__file__).resolve()), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--credit {coupled,local,global,uniform}" in done.stdout
