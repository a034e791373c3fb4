"""The arms' gradients against autograd through the loss itself; cosines against their definition; the whole command."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import grpo
from lab import alignment, truth, truth_tables
from node.settings import load_model
from tasks import countdown


def batch(rows=6, n=40):
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 28, (rows, n), generator=generator)
    ends = torch.randint(12, n, (rows, 1), generator=generator)
    mask = (torch.arange(n) >= 8) & (torch.arange(n) < ends)
    return input_ids, mask, torch.randn(rows, n, generator=generator)


def test_the_gradient_is_that_of_the_clipped_loss_at_ratio_one():
    model, _ = load_model("assets/tiny")
    input_ids, mask, shaped = batch()
    weights = shaped * mask / mask.sum(1, keepdim=True)
    got = alignment.gradient(model, input_ids, mask, weights, torch.arange(6), tokens=100)
    logprobs, _ = grpo.token_logprobs(model, input_ids, mask)
    grpo.clipped_loss(logprobs, logprobs.detach(), shaped, mask).backward()
    want = -6 * torch.cat([p.grad.flatten() for p in model.parameters()])  # a loss falls; it is a mean of 6
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
    model.zero_grad()


@pytest.fixture(params=[7, 2**22])
def slices(request, monkeypatch):
    monkeypatch.setattr(alignment, "SLICE", request.param)


def test_speeds_equal_their_definition_and_do_not_depend_on_a_factor(slices):
    rng = np.random.default_rng(0)
    gradients, target = rng.normal(size=(5, 30)), rng.normal(size=30)
    draws = rng.multinomial(5, np.full(5, 0.2), 4) / 5

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    rms = np.sqrt((gradients**2).mean(0))
    want = [
        [
            sum(w * cosine(g, target) for w, g in zip(draw, gradients)),
            cosine(draw @ gradients, target),
            sum(w * cosine(g / rms, target) for w, g in zip(draw, gradients)),
        ]
        for draw in draws
    ]
    for factor in (1, 1.19):
        got = alignment.speeds(*(torch.tensor(x).float() for x in (factor * gradients, target, draws)))
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_shares_equal_their_definition_and_add_up(slices):
    rng = np.random.default_rng(0)
    uniform, credited, target = rng.normal(size=(5, 30)), rng.normal(size=(5, 30)), rng.normal(size=30)
    draws = rng.multinomial(5, np.full(5, 0.2), 4) / 5
    want = []
    for draw in draws:
        g, c = draw @ uniform, draw @ credited
        noise = [
            sum(w * (x - m) @ (y - g) for w, x, y in zip(draw, z, uniform)) for z, m in ((credited, c), (uniform, g))
        ]
        want.append([c @ target / (g @ target), noise[0] / noise[1]])
    tensors = [torch.tensor(x).float() for x in (uniform, target, draws)]
    got = alignment.shares(torch.tensor(credited).float(), *tensors)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    rest = alignment.shares(torch.tensor(uniform - credited).float(), *tensors)
    np.testing.assert_allclose(got + rest, 1, rtol=1e-5)
    arm = torch.tensor(uniform + 0.5 * credited).float()  # as gamma 1.5 makes it
    np.testing.assert_allclose((alignment.shares(arm, *tensors) - 1) / 0.5, want, rtol=1e-4)


def test_with_the_truth_there_are_three_arms_more(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(truth_tables, "RESAMPLES", 20)
    monkeypatch.setattr(  # half of short ones succeed
        countdown.Countdown, "reward", lambda self, problem, text: text.count("1") % 2.0
    )
    folder, out = str(tmp_path / "truth"), tmp_path / "table.md"
    short = dict(max_tokens=24, engine="torch")
    truth.main(truth.Args(responses=32, continuations=4, out=folder, **short))
    args = alignment.Args(arms=["scaled"], truth=folder, problems=4, minibatch=2, out=str(out), **short)
    alignment.main(args)
    arms, kinds = (text.splitlines()[2:] for text in out.read_text().split("\n\n"))
    assert [line.split(" | ")[0] for line in arms] == [
        "| uniform", "| oracle", "| oracle, q 0.1", "| VinePPO", "| scaled"
    ]  # fmt: skip
    assert kinds[-1].startswith("| all others |")
    columns = np.array([[float(cell.split()[0]) for cell in line.split(" | ")[1:]] for line in kinds])
    assert np.abs(columns.sum(0) - 100).max() < len(kinds), "whatever there is is held by one token or another"
    assert "2 minibatches of 16" in capsys.readouterr().out
    for wrong, says in (({"minibatch": 3}, "--minibatch 3"), ({"group": 4}, "--group 4"), ({"truth": "no"}, "no:")):
        with pytest.raises(SystemExit, match=f"error:.*{says}"):
            alignment.main(replace(args, **wrong))
    values = tmp_path / "truth" / "values.jsonl"
    values.write_text("".join(values.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SystemExit, match=r"error:.*--resume"):
        alignment.main(args)


def test_the_command_shows_scaled_to_be_uniform(tmp_path, capsys, monkeypatch):
    """With gradients in bfloat16, as a large model's; and an arm without the first token's column."""
    monkeypatch.setattr(alignment, "LARGE", 0)
    out, out_of = tmp_path / "table.md", "coupled, first token out"
    arms = ["scaled", "random", out_of]
    alignment.main(alignment.Args(arms=arms, problems=16, minibatch=4, engine="torch", out=str(out)))
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in out.read_text().splitlines()}
    assert list(rows)[2:] == ["| uniform", *(f"| {arm}" for arm in arms)]
    assert "2 minibatches of 32" in capsys.readouterr().out
    assert all(cell.replace("-", "+").startswith("+0.0 ") for cell in rows["| scaled"][:3])
    assert not all(cell.replace("-", "+").startswith("+0.0 ") for cell in rows["| random"][:3])


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("arms", ["anchor"], "anchor"),
        ("arms", ["content"], "countdown-words, not countdown-tiny"),
        ("problems", 20, "20"),
        ("task", "poker", "poker"),
        ("group", 1, "--group 1"),
        ("minibatch", 0, "--minibatch 0"),
        ("out", "no/where.md", "no such folder"),
    ],
)
def test_bad_arguments_are_one_line(name, value, says):
    with pytest.raises(SystemExit, match=f"error:.*{says}"):
        alignment.main(alignment.Args(**{"engine": "torch", name: value}))
