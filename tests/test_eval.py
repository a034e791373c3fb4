"""Scores against enumeration and a second scoring; files that survive failures; vLLM on two checkpoints in one go."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import eval as evaluation
import rollout
import tasks
from node import settings

SMALL = ["--engine", "torch", "--problems", "8", "--samples", "3", "--max_tokens", "64"]


def run(*argv):
    evaluation.main(*HfArgumentParser(evaluation.Args).parse_args_into_dataclasses([*SMALL, *map(str, argv)]))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second checkpoint: the tiny model with slightly different weights."""
    folder = str(tmp_path_factory.mktemp("other"))
    model, tokenizer = settings.load_model("assets/tiny")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_near_temperature_zero_samples_are_the_greedy_response(tmp_path):
    run("--temperature", 1e-4, "--problems", 4, "--out", tmp_path / "r.json")
    (result,) = evaluation.read(tmp_path / "r.json")
    for row in result["responses"]:
        assert {x["text"] for x in row["sampled"]} == {row["greedy"]["text"]}


def test_pass_at_j_is_what_enumeration_gives():
    for n in range(1, 7):
        for c in range(n + 1):
            responses = [1.0] * c + [0.0] * (n - c)
            for j in range(1, n + 1):
                draws = [max(draw) for draw in itertools.combinations(responses, j)]
                got = evaluation.pass_at(j, torch.tensor([responses]))
                assert got.item() == pytest.approx(sum(draws) / len(draws))


def test_pass_at_j_is_unbiased():
    """Its mean over many sets of 16 responses is the chance 1 - (1-p)^j, which max() over those 16 would overstate."""
    torch.manual_seed(0)
    rewards = torch.bernoulli(torch.full((20_000, 16), 0.1))
    for j in evaluation.sizes(16):
        assert evaluation.pass_at(j, rewards).mean().item() == pytest.approx(1 - 0.9**j, abs=0.01)


def test_every_checkpoint_on_every_benchmark(other, tmp_path, capsys):
    out = tmp_path / "new" / "results.json"
    run("--model", "assets/tiny", other, "--task", "countdown-tiny", "countdown-tiny18", "--out", out)
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["args"]["model"] == ["assets/tiny", other] and content["args"]["seed"] == 0
    results = content["results"]
    pairs = itertools.product(["assets/tiny", other], ["countdown-tiny", "countdown-tiny18"])
    assert [(r["model"], r["task"]) for r in results] == list(pairs)
    for r in results:
        assert list(r["scores"]) == ["greedy pass@1", "avg@3", "pass@1", "pass@2", "pass@3"]
        assert len(r["responses"]) == r["problems"] == 8
        rewards = [[x["reward"] for x in row["sampled"]] for row in r["responses"]]
        for row, problem in zip(r["responses"], tasks.load(r["task"], "test", 8)):
            assert row["prompt"] == problem.prompt and len(row["sampled"]) == 3
            for response in (row["greedy"], *row["sampled"]):
                assert response["reward"] == tasks.get(r["task"]).reward(problem, response["text"])
        means = {name: score["mean"] for name, score in r["scores"].items()}
        assert means["avg@3"] == means["pass@1"] == pytest.approx(sum(map(sum, rewards)) / 24)
        assert means["pass@3"] == pytest.approx(sum(map(max, rewards)) / 8)
        assert means["greedy pass@1"] == pytest.approx(sum(x["greedy"]["reward"] for x in r["responses"]) / 8)
        cut = [x["truncated"] for row in r["responses"] for x in row["sampled"]]
        assert r["truncated"]["sampled"] == sum(cut) / 24 and any(cut) and not all(cut)
    assert results[0]["responses"] != results[2]["responses"], "two models, not one twice"

    table = out.with_suffix(".md").read_text()
    assert table in printed and len(table.splitlines()) == 4
    head, _, first, _ = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    assert head[1:3] == ["countdown-tiny greedy pass@1", "countdown-tiny avg@3"] and len(head) == len(first) == 5
    assert first[2] == evaluation.percent(results[0]["scores"]["avg@3"])
    last = printed.strip().splitlines()[-1]
    assert last.startswith("4 results") and str(out) in last and str(out.with_suffix(".md")) in last
    assert sorted(p.name for p in out.parent.iterdir()) == ["results.json", "results.md"]


def test_what_is_done_is_kept_and_not_done_again(other, tmp_path, monkeypatch, capsys):
    out, measure, models = tmp_path / "results.json", evaluation.measure, []
    short = ["--problems", 4, "--max_tokens", 24]
    both = ["--model", "assets/tiny", other, "--out", out, *short]

    def start(engine, name, *how, **more):
        models.append(name)
        return rollout.start_actor(engine, name, *how, **more)

    def break_at_second(*how):
        if len(models) == 2:
            raise RuntimeError("out of memory")
        return measure(*how)

    monkeypatch.setattr(evaluation, "start_actor", start)
    monkeypatch.setattr(evaluation, "measure", break_at_second)
    with pytest.raises(RuntimeError):
        run(*both)
    (first,) = json.loads(out.read_text())["results"]
    assert first["model"] == "assets/tiny" and len(first["responses"]) == 4

    monkeypatch.setattr(evaluation, "measure", measure)
    run(*both)
    assert models == ["assets/tiny", other, other], "only what was missing"
    results = json.loads(out.read_text())["results"]
    assert results[0] == first and results[1]["model"] == other
    assert f"already in {out}: assets/tiny" in capsys.readouterr().out

    run(*both)
    assert len(models) == 3 and json.loads(out.read_text())["results"] == results
    assert "2 results" in capsys.readouterr().out.splitlines()[-1]

    for i, change in enumerate((["--samples", 2], ["--temperature", 0.5], ["--seed", 1], ["--max_tokens", 23])):
        run("--out", out, *short, *change)
        assert len(models) == 4 + i, change
    assert len(json.loads(out.read_text())["results"]) == 6

    fresh = tmp_path / "fresh.json"
    run("--model", other, "--out", fresh, *short)
    assert json.loads(fresh.read_text())["results"] == [results[1]], "a score does not depend on what came before it"


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    out, args = tmp_path / "results.json", evaluation.Args()
    evaluation.write(out, args, [{"score": 1}])

    def interrupt(self, to):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluation.write(out, args, [{"score": 1}, {"score": 2}])
    assert evaluation.read(out) == [{"score": 1}]


def test_without_out_nothing_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "write", None)
    run()
    out = capsys.readouterr().out.strip().splitlines()
    assert out[0].startswith("defaults for the tiny model: --task ['countdown-tiny'] --max_model_len 512")
    assert "8 of countdown-tiny: greedy pass@1" in out[1] and "truncated" in out[1] and "not kept" in out[-1]


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def test_chat_uses_the_template_and_plain_text_does_not(tmp_path, monkeypatch, capsys):
    model, tokenizer = settings.load_model("assets/tiny")
    tokenizer.chat_template = TEMPLATE
    assert rollout.tokenize(tokenizer, ["1 2", "3"], rollout.Chat()) == tokenizer(["1 2>", "3>"]).input_ids
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    seen = []

    class Actor(rollout.TorchActor):
        def generate(self, prompts, *how, **more):
            seen.append(self.tokenizer.decode(rollout.encode(self.tokenizer, prompts, 1, 512, self.chat)[0]))
            return super().generate(prompts, *how, **more)

    monkeypatch.setattr(rollout, "TorchActor", Actor)
    first = tasks.load("countdown-tiny", "test", 8)[0].prompt
    run("--model", tmp_path / "model", "--chat")
    run("--model", tmp_path / "model")
    assert seen == [first + ">"] * 2 + [first] * 2
    for _ in range(2):
        run("--model", tmp_path / "model", "--chat", "--problems", 2, "--max_tokens", 4, "--out", tmp_path / "x.json")
    assert "already in" in capsys.readouterr().out, "what was evaluated with --chat is found again"
    given = ["--problems", 2, "--max_tokens", 4, "--out", tmp_path / "x.json"]
    for change in ([], ["--chat", "--system", "1"], ["--chat", "--thinking", "on"], ["--chat", "--stop", "y"]):
        run("--model", tmp_path / "model", *given, *change)
    assert len(evaluation.read(tmp_path / "x.json")) == 5, "none of these was found in the file"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model", "assets/tiny", "no/such/place"], "cannot load a model from 'no/such/place'"),
        (["--task", "countdown-tiny", "maths"], "unknown task 'maths'"),
        (["--samples", 0], "--samples 0"),
        (["--max_tokens", 0], "--max_tokens 0"),
        (["--temperature", 0], "--temperature 0"),
        (["--kv_cache_gib", 0], "--kv_cache_gib 0"),
        (["--reward_processes", 0], "--reward_processes 0"),
        (["--seed", -1], "--seed -1"),
        (["--problems", 1], "--problems 1"),
        (["--max_model_len", 70], "do not fit --max_model_len 70"),
        (["--max_model_len", 2000], "reads 512 tokens at most"),
        (["--chat"], "assets/tiny has no chat template"),
        (["--task", "countdown-tiny", "countdown", "--data", "x.jsonl"], "give one --task"),
        (["--out", "/proc/nothing/x.json"], "/proc/nothing"),
        (["--out", "results.txt"], "must end in .json"),
        (["--out", "assets/tiny/config.json"], "is not a result file of eval.py"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_starts(argv, message, monkeypatch):
    monkeypatch.setattr(evaluation, "start_actor", None)  # reaching the engine would be a TypeError
    with pytest.raises(SystemExit, match=f"error: .*{message}") as e:
        run(*argv)
    assert "\n" not in str(e.value)


def test_a_checkpoint_without_weights_is_one_line_and_loses_nothing(other, tmp_path):
    broken, out = tmp_path / "broken", tmp_path / "results.json"
    AutoTokenizer.from_pretrained(other).save_pretrained(broken)
    AutoModelForCausalLM.from_pretrained(other).config.save_pretrained(broken)
    with pytest.raises(SystemExit, match="error: ") as e:
        run("--model", "assets/tiny", broken, "--out", out)
    assert "\n" not in str(e.value) and len(evaluation.read(out)) == 1


def test_data_reaches_the_task_and_k_is_the_tasks_own(monkeypatch):
    seen, load = [], tasks.load

    def remember(name, split, n, seed, data):
        seen.append(data)
        return load(name, split, n, seed)

    monkeypatch.setattr(tasks, "load", remember)
    monkeypatch.setattr(tasks, "samples", lambda name: {"countdown": 5}[name])
    args = evaluation.Args(
        task=["countdown"], data="my.jsonl", problems=2, max_tokens=8, max_model_len=512, kv_cache_gib=0.5
    )
    ((settings, _),) = evaluation.plan(args)
    assert seen == ["my.jsonl"] and settings["k"] == 5 and settings["data"] == "my.jsonl"


@pytest.mark.vllm
def test_vllm_evaluates_two_checkpoints_one_after_the_other(other, tmp_path):
    """Greedy responses are those of transformers for either model: the second engine has the second's weights."""
    both = ["--model", "assets/tiny", other]
    run(*both, "--out", tmp_path / "torch.json")
    run(*both, "--out", tmp_path / "vllm.json", "--engine", "vllm")
    ours, theirs = (evaluation.read(tmp_path / f"{engine}.json") for engine in ("vllm", "torch"))
    for a, b in zip(ours, theirs):
        assert [x["greedy"] for x in a["responses"]] == [x["greedy"] for x in b["responses"]]
        assert 0 <= a["scores"]["avg@3"]["mean"] <= a["scores"]["pass@3"]["mean"] <= 1
    assert ours[0]["responses"] != ours[1]["responses"]
