"""The arms' gradients against autograd through the loss itself; the record against its definitions; the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import grpo
from lab import alignment, truth
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


@pytest.mark.parametrize("size", [7, 2**22])
def test_a_record_says_what_the_gradients_say(size, monkeypatch):
    """Cosines, shares and covariances from the kept inner products, against their definitions on the gradients."""
    monkeypatch.setattr(alignment, "SLICE", size)
    rng = np.random.default_rng(0)
    mean = rng.normal(size=40)
    target, uniform, part = mean + rng.normal(size=(6, 40)), mean + rng.normal(size=(50, 40)), rng.normal(size=(50, 40))
    part += 0.5 * uniform
    arms = {"uniform": (uniform, None), "half more": (uniform + 0.5 * part, 1.5)}
    tensors = {name: (torch.tensor(g).float(), amp) for name, (g, amp) in arms.items()}
    parts = torch.tensor(target).float()
    found = {name: alignment.measure(g, tensors["uniform"][0], parts, 4, amp) for name, (g, amp) in tensors.items()}

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    whole, whole_part = target.mean(0), part.mean(0)
    one = [np.mean([cosine(g, whole) for g in gs]) for gs, _ in arms.values()]
    got = alignment.compare(found["half more"], found["uniform"])
    assert got["one minibatch"].value == pytest.approx(100 * (one[1] / one[0] - 1), rel=1e-3)
    assert got["signal"].value == pytest.approx(100 * whole_part @ whole / (uniform.mean(0) @ whole), rel=1e-3)
    covariance = ((part - whole_part) * (uniform - uniform.mean(0))).sum() / ((uniform - uniform.mean(0)) ** 2).sum()
    assert got["noise"].value == pytest.approx(100 * covariance, rel=1e-3)
    gram = uniform @ uniform.T
    square = (gram.sum() - np.trace(gram)) / (50 * 49)
    assert alignment.norms(found["uniform"])[-1] == pytest.approx(square**0.5, rel=1e-4)
    assert all(e.low < e.value < e.high for e in got.values())
    more = torch.tensor(uniform + 3 * part).float()
    louder = alignment.measure(more, tensors["uniform"][0], parts, 4, 4.0) | {"adamw": []}
    direct = alignment.compare(louder, found["uniform"])
    derived = alignment.compare(alignment.at_gamma(found["half more"], found["uniform"], 4.0), found["uniform"])
    assert direct.keys() == derived.keys() and derived["AdamW"] is None
    for column in ("one minibatch", "all minibatches", "signal", "noise"):
        assert derived[column] == pytest.approx(direct[column], rel=1e-2, abs=1e-2, nan_ok=True)
    scaled = alignment.measure(1.19 * tensors["uniform"][0], tensors["uniform"][0], parts, 4, 1.5)
    same = alignment.compare(scaled, found["uniform"])
    assert abs(same["one minibatch"].value) < 1e-3 and abs(same["all minibatches"].value) < 1e-3


def test_adamw_updates_are_those_of_the_optimizer_that_trains():
    """The state is warm, the gradient is clipped, and a factor that stays above the clip changes nothing."""
    gradients = 5 * torch.randn(15, 6, generator=torch.Generator().manual_seed(0))
    flat = torch.nn.Parameter(torch.zeros(6))
    optimizer, want = torch.optim.AdamW([flat], lr=0.1, weight_decay=0.0), []
    for g in gradients:
        before = flat.detach().clone()
        (flat @ (-g / 2)).backward()
        torch.nn.utils.clip_grad_norm_([flat], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        want.append((flat.detach() - before) / 0.1)
    got = [u.clone() for u in alignment.adamw_updates(gradients, rows=2)]
    torch.testing.assert_close(torch.stack(got), torch.stack(want[alignment.WARM :]), rtol=1e-4, atol=1e-5)
    louder = [u.clone() for u in alignment.adamw_updates(3 * gradients, rows=2)]
    torch.testing.assert_close(torch.stack(louder), torch.stack(got))


def test_with_the_truth_there_are_three_arms_more(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(  # half of short ones succeed
        countdown.Countdown, "reward", lambda self, problem, text: text.count("1") % 2.0
    )
    folder, out = str(tmp_path / "truth"), tmp_path / "directions.json"
    short = dict(max_tokens=24, engine="torch")
    truth.main(truth.Args(responses=48, continuations=4, out=folder, **short))
    args = alignment.Args(arms=["scaled"], truth=folder, problems=4, parts=4, minibatch=2, out=str(out), **short)
    alignment.main(args)
    record = json.loads(out.read_text())
    assert [row[0] for row in alignment.table(record)[2:]] == ["oracle", "oracle, q 0.1", "VinePPO", "scaled"]
    rows = alignment.token_table(record)[1:]
    assert rows[-1][0] == "all others"
    columns = np.array([[float(cell.split()[0]) for cell in row[1:]] for row in rows])
    assert np.abs(columns.sum(0) - 100).max() < len(rows), "whatever there is is held by one token or another"
    assert "3 minibatches of 16" in capsys.readouterr().out
    for wrong, says in (({"minibatch": 4}, "--minibatch 4"), ({"group": 4}, "--group 4"), ({"truth": "no"}, "no:")):
        with pytest.raises(SystemExit, match=f"error:.*{says}"):
            alignment.main(replace(args, **wrong))
    values = tmp_path / "truth" / "values.jsonl"
    values.write_text("".join(values.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SystemExit, match=r"error:.*--resume"):
        alignment.main(args)


def test_the_command_shows_scaled_to_be_uniform(tmp_path, capsys, monkeypatch):
    """With gradients in bfloat16, as a large model's; and an arm without the first token's column."""
    monkeypatch.setattr(alignment, "LARGE", 0)
    out, names = tmp_path / "directions.json", ["scaled", "random", "coupled, no first token"]
    alignment.main(
        alignment.Args(
            arms=names, problems=12, parts=4, minibatch=4, minibatches=3, max_tokens=64, engine="torch", out=str(out)
        )
    )
    record = json.loads(out.read_text())
    assert list(record["arms"]) == ["uniform", *names] and "3 minibatches of 32" in capsys.readouterr().out
    base = record["arms"]["uniform"]
    gains = {name: alignment.compare(record["arms"][name], base)["one minibatch"].value for name in names}
    assert abs(gains["scaled"]) < 0.05 < min(abs(gains["random"]), abs(gains["coupled, no first token"]))


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("arms", ["anchor"], "anchor"),
        ("arms", ["content"], "countdown-words, not countdown-tiny"),
        ("problems", 20, "20"),
        ("parts", 1, "--parts 1"),
        ("task", "poker", "poker"),
        ("group", 1, "--group 1"),
        ("minibatch", 0, "--minibatch 0"),
        ("minibatches", 2, "--minibatches 2"),
        ("out", "no/where.md", "no such folder"),
    ],
)
def test_bad_arguments_are_one_line(name, value, says):
    with pytest.raises(SystemExit, match=f"error:.*{says}"):
        alignment.main(alignment.Args(**{"engine": "torch", name: value}))
