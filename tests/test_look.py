"""What a run leaves to look at: samples.jsonl, evaluations.jsonl, the page of node.look, --report, and its warning.

The page's script runs in a real browser: without Chromium those tests are skipped."""

import html
import io
import json
import locale
import math
import re
import shutil
import statistics
import sys
import types
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import HfArgumentParser, PreTrainedTokenizerFast

import eval as evaluation
import train
from node import look, samples, settings
from node import run as node_run
from rollout import Rollout
from tasks import countdown
from tests.browser import in_browser, report_of, with_script

ROOT = Path(train.__file__).parent
SMALL = ["--engine", "torch", "--steps", "3", "--prompts", "4", "--group", "4", "--minibatches", "2",
         "--eval_problems", "6", "--max_tokens", "48", "--eval_every", "2", "--save_every", "2"]  # fmt: skip
HOSTILE = ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "<!--", "\x00\x1b[2J", "'&amp;",
           "\n", "", "🎯", "\u202e", "\u2028", "`", "{{data}}", "\ud800", "a" * 300]  # fmt: skip


def run(*argv):
    train.main(*HfArgumentParser(train.Args).parse_args_into_dataclasses([*map(str, argv)]))


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two runs of three steps: plain GRPO with the credit, and without."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("uniform", "coupled"):
        run(*SMALL, "--credit", name, "--out", folder / name)
    return folder / "uniform", folder / "coupled"


# ---- samples.jsonl and evaluations.jsonl ----


def test_each_step_leaves_one_group_with_its_numbers(pair):
    tokenizer = settings.load_tokenizer(settings.TINY, 512)
    problems = {p.prompt: p for p in train.tasks.load("countdown-tiny", "train")}
    lines, steps = read(pair[1] / "samples.jsonl"), [r for r in read(pair[1] / "metrics.jsonl") if "reward" in r]
    assert [x["step"] for x in lines] == [1, 2, 3] and len(json.dumps(lines)) < 30_000
    values = set()
    for line, record in zip(lines, steps):
        responses = line["responses"]
        rewards = [r["reward"] for r in responses]
        assert len(responses) == 4 and (len(set(rewards)) > 1) == (record["unequal_groups"] > 0)
        for r in responses:
            text = "".join(r["tokens"])
            assert len(r["tokens"]) == len(r["gamma"]) <= 48 and r["left_out"] == 0
            assert r["truncated"] == ("<eos>" not in text) and len(tokenizer(text).input_ids) == len(r["tokens"])
            judge = train.tasks.get("countdown-tiny").reward
            assert r["reward"] == judge(problems[line["prompt"]], text.removesuffix("<eos>"))
            std = statistics.stdev(rewards)
            want = (r["reward"] - statistics.mean(rewards)) / std if std else 0.0
            assert r["advantage"] == pytest.approx(want, abs=1e-3)
            values |= set(r["gamma"])
    assert values == {1.0, 1.25, 1.5, 1.75}
    assert {g for x in read(pair[0] / "samples.jsonl") for r in x["responses"] for g in r["gamma"]} == {1.0}


def test_the_first_group_of_unequal_reward_is_chosen_else_the_first():
    rollouts = [Rollout([7, b], [b] * (b + 1), [0.0] * (b + 1), "", b == 4) for b in range(6)]
    mask = torch.arange(8) < torch.tensor([[len(r.ids)] for r in rollouts])
    gamma = torch.arange(48.0).view(6, 8)
    for rewards, first in (([[1, 1], [0, 1], [1, 0]], 2), ([[0, 0], [1, 1], [0, 0]], 0)):
        sample = samples.choose_sample(rollouts, torch.tensor(rewards).float(), torch.arange(6.0), gamma, mask)
        assert sample["prompt_ids"] == [7, first]
        for b, r in enumerate(sample["responses"], first):
            assert (r["ids"], r["advantage"], r["truncated"]) == (rollouts[b].ids, b, b == 4)
            assert r["reward"] == rewards[b // 2][b % 2] and r["gamma"] == gamma[b, : b + 1].tolist()


def test_a_long_response_is_cut_and_what_is_left_out_is_counted(monkeypatch):
    monkeypatch.setattr(samples, "MOST_TOKENS", 5)
    tokenizer = settings.load_tokenizer(settings.TINY, 512)
    ids = tokenizer("1+2+3+4").input_ids
    rollouts, mask = [Rollout(ids, ids, [0.0] * 7, "", False)] * 2, torch.ones(2, 7, dtype=torch.bool)
    rewards = torch.tensor([[0.0, 1.0]])
    sample = samples.spell_sample(samples.choose_sample(rollouts, rewards, rewards[0], mask * 1.0, mask), tokenizer)
    assert sample["prompt"] == "2+3+4" and sample["prompt_left_out"] == 2
    for r in sample["responses"]:
        assert r["tokens"] == list("1+2+3") and len(r["gamma"]) == 5 and r["left_out"] == 2


def bytes_tokenizer():
    """A token for each byte, so that é has two and 🎯 has four."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def words_tokenizer():
    """A token for each word and its space, which decode drops at the beginning of a text (as Llama 2's does)."""
    tokenizer = Tokenizer(models.WordLevel({"▁so": 0, "▁it": 1, "▁is": 2}, unk_token="▁so"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "tokenizer, text, pieces",
    [
        (bytes_tokenizer(), "é 🎯!", ["", "é", " ", "", "", "", "🎯", "!"]),
        (words_tokenizer(), "so it is", ["so", " it", " is"]),
    ],
)
def test_the_texts_of_the_tokens_join_to_the_text_of_all(tokenizer, text, pieces):
    assert samples.split_text(tokenizer(text).input_ids, tokenizer) == pieces and "".join(pieces) == text


def test_bytes_that_never_make_a_character_end_nothing():
    tokenizer = bytes_tokenizer()
    first_byte = tokenizer("🎯").input_ids[:1]
    pieces = samples.split_text(first_byte * 9 + tokenizer("ok").input_ids + first_byte, tokenizer)
    assert len(pieces) == 12 and "".join(pieces).count("ok") == 1 and pieces[-1] == samples.UNFINISHED


def test_a_resumed_run_drops_what_came_after_its_checkpoint(pair, tmp_path):
    folder = shutil.copytree(pair[1], tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-3")
    before = {name: (folder / name).read_text() for name in ("samples.jsonl", "evaluations.jsonl")}
    for name in before:
        with open(folder / name, "a") as f:
            f.write('{"step": 9, "success": []}\n{"step": 1')
    run("--resume", folder)
    assert {name: (folder / name).read_text() for name in before} == before, "to the bit"


def test_evaluations_hold_the_success_of_each_problem(pair):
    for folder in pair:
        lines, log = read(folder / "evaluations.jsonl"), [r for r in read(folder / "metrics.jsonl") if "success" in r]
        assert [x["step"] for x in lines] == [r["step"] for r in log] == [0, 2, 3]
        for line, record in zip(lines, log):
            assert len(line["success"]) == 6 and statistics.mean(line["success"]) == pytest.approx(record["success"])
    problems = train.tasks.load("countdown-tiny", "test", 6)
    assert {x["problems"] for folder in pair for x in read(folder / "evaluations.jsonl")} == {
        node_run.fingerprint(problems)
    }
    assert node_run.fingerprint(problems) != node_run.fingerprint(problems[:5])


def test_the_log_has_the_learning_rate_and_how_far_the_model_moved(pair):
    steps = [r for r in read(pair[1] / "metrics.jsonl") if "reward" in r]
    assert [r["lr"] for r in steps] == pytest.approx([4e-5, 8e-5, 1.2e-4])
    for r in steps:
        assert 0 <= r["clip_fraction"] < 0.2 and r["responses"] == 16 and "sample" not in r
        assert 0 <= r["kl"] < 0.1 and (r["kl"] == 0 or r["unequal_groups"] > 0)
        assert r["zero_reward"] == round(16 * (1 - r["reward"]))
    assert any(r["kl"] > 1e-7 for r in steps)


def test_the_readme_lists_every_field_of_the_log(pair):
    table = (ROOT / "README.md").read_text().split("| field |")[1].split("\n\n")[0]
    first_cells = [row.split("|")[1] for row in table.splitlines()]
    listed = set(re.findall(r"`(\w+)`", " ".join(first_cells)))
    assert listed == {name for r in read(pair[1] / "metrics.jsonl") for name in r}


# ---- the page ----


def make_page(*argv):
    look.main([*map(str, argv)])


def numbers(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def compared(pair):
    """The page of both runs."""
    make_page(*pair)
    return (pair[0] / "look.html").read_text()


def test_the_page_has_the_numbers_of_the_files(pair, compared):
    found = numbers(compared)
    assert [r["name"] for r in found["runs"]] == ["uniform", "coupled"]
    for folder, seen in zip(pair, found["runs"]):
        log = read(folder / "metrics.jsonl")
        steps = [r for r in log if "reward" in r]
        curves = dict(zip([c["field"] for c in found["charts"]], seen["curves"]))
        for name, of, factor in (("kl", None, 1), ("clip_fraction", None, 100), ("truncated", "responses", 100),
                                 ("equal_groups", "problems", 100)):  # fmt: skip
            want = [[r["step"], factor * r[name] / (r[of] if of else 1)] for r in steps]
            assert curves[name] == [pytest.approx(point, rel=1e-5) for point in want]
        assert [x[0] for x in seen["success"]] == [0, 2, 3] and set(seen["seconds"]) == set(steps[0]["seconds"])
        assert [x["step"] for x in seen["samples"]] == [1, 2, 3] and seen["step"] == 3


def test_the_difference_is_paired_by_problem_with_its_interval(pair, compared):
    a, b = (read(folder / "evaluations.jsonl")[-1]["success"] for folder in pair)
    differences = [100 * (y - x) for x, y in zip(a, b)]
    said = numbers(compared)["runs"][1]["comparison"]
    assert said["difference"] == pytest.approx(statistics.mean(differences), abs=1e-3)
    assert said["half"] == pytest.approx(1.96 * statistics.stdev(differences) / math.sqrt(6), abs=1e-3)
    one, other = (look.read_run(folder, folder.name) for folder in pair)
    changed = [x | {"problems": "others"} for x in other.per_problem]
    assert "different held-out problems" in look.compare(one, other._replace(per_problem=changed))["why_not"]
    assert "coupled has no evaluations.jsonl" in look.compare(one, other._replace(per_problem=[]))["why_not"]
    assert "after 0 steps" in look.compare(one, other._replace(per_problem=other.per_problem[:1]))["note"]


WALK = """
const seen = [];
const look = () => seen.push([$("controls").textContent, [...document.querySelectorAll("article")].map(a => [
  a.querySelector("b").textContent,
  [...a.querySelectorAll("span")].map(s => [s.textContent, s.style.background !== ""])])]);
chooseRun(1);
look();
const [previous, next] = document.querySelectorAll("#controls button");
previous.click(); look();
previous.click(); previous.click(); look();
next.click(); look();
slider.value = 2; slider.dispatchEvent(new Event("input")); look();
const curve = document.querySelector("#curves svg"), box = curve.getBoundingClientRect();
curve.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right, clientY: box.top + 9 }));
report({ seen, read: curve.parentNode.querySelector("output").textContent, text: document.body.innerText,
  curves: [...document.querySelectorAll("#curves figure")].map(f => f.querySelectorAll("path.curve").length) });
"""


def test_one_walks_through_the_steps_and_reads_the_curves(pair, compared, tmp_path):
    (tmp_path / "look.html").write_text(with_script(compared, WALK))
    found = report_of(in_browser(tmp_path / "look.html", tmp_path))
    lines = read(pair[1] / "samples.jsonl")
    for (controls, articles), step in zip(found["seen"], (3, 2, 1, 2, 3), strict=True):
        assert controls.endswith(f"step {step}")
        for (title, tokens), r in zip(articles, lines[step - 1]["responses"], strict=True):
            assert f"reward {r['reward']:g}, advantage" in title and f"{abs(r['advantage']):.2f}" in title
            assert [t.replace("↵", "") for t, _ in tokens] == r["tokens"]
            assert [is_coloured for _, is_coloured in tokens] == [gamma > 1 for gamma in r["gamma"]]
    assert found["curves"] == [2] * (1 + len(look.CHARTS)), "every curve, one over the other"
    a, b = (100 * statistics.mean(read(folder / "evaluations.jsonl")[-1]["success"]) for folder in pair)
    read_off = re.fullmatch(r"step 3: uniform ([\d.]+) ± [\d.]+, coupled ([\d.]+) ± [\d.]+", found["read"])
    assert [float(x) for x in read_off.groups()] == pytest.approx([a, b], abs=0.1)
    said = f"coupled: {'−' if b < a else '+'}{abs(b - a):.1f} points (95 % interval"
    assert said in found["text"]
    assert all(chart.meaning in found["text"].replace("\n", " ") for chart in look.CHARTS)


@pytest.fixture(scope="module")
def hostile(pair, tmp_path_factory):
    """A run whose model and whose settings wrote the worst, and whose numbers are not finite."""
    folder = shutil.copytree(pair[1], tmp_path_factory.mktemp("hostile") / 'a"><script>x')
    lines = read(folder / "samples.jsonl")
    for line in lines:
        line["prompt"] = "".join(HOSTILE)
        for r in line["responses"]:
            r["tokens"], r["gamma"], r["left_out"] = HOSTILE, [0.5, 3.0] * 7, 7
    log = read(folder / "metrics.jsonl")
    for record in log:
        record |= {"entropy": math.nan, "kl": math.inf} if "reward" in record else {"half_width_95": math.inf}
    args = json.loads((folder / "args.json").read_text()) | {"model": HOSTILE[0], "task": HOSTILE[1]}
    for name, content in (("samples.jsonl", lines), ("metrics.jsonl", log)):
        (folder / name).write_text("".join(json.dumps(x) + "\n" for x in content))
    (folder / "args.json").write_text(json.dumps(args))
    make_page(folder, "--out", folder.parent / "look.html")
    return (folder.parent / "look.html").read_text()


TAGS = """
report({ scripts: document.querySelectorAll("script").length, images: document.querySelectorAll("img").length,
  texts: [...document.querySelectorAll("article span")].map(s => s.textContent), prompt: $("prompt").textContent });
"""


def test_hostile_text_stays_text(hostile, tmp_path):
    (tmp_path / "look.html").write_text(with_script(hostile, TAGS))
    found = report_of(in_browser(tmp_path / "look.html", tmp_path))
    assert found["scripts"] == 3 and found["images"] == 0, "the page's two, and the test's"
    shown = [look.visible(text) for text in HOSTILE]
    assert found["texts"] == 4 * shown and found["prompt"] == "Prompt: " + "".join(shown)
    assert shown[0] == HOSTILE[0] and shown[8:10] == ["\\u202e", "\\u2028"], "what cannot be seen is spelled"


FRAMES = """
addEventListener("load", () => {
  report([...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const ends = [...page.querySelectorAll("svg, article, article span, #controls *, figcaption")].map(node =>
      node.getBoundingClientRect().right);
    const labels = [...page.querySelectorAll("svg text")].filter(text => {
      const at = text.getBoundingClientRect(), box = text.ownerSVGElement.getBoundingClientRect();
      return at.left < box.left - 0.5 || at.right > box.right + 0.5;
    }).length;
    return { ready: root.dataset.ready, error: root.dataset.error ?? null, wide: root.scrollWidth,
      end: Math.max(...ends), labels };
  }));
  document.documentElement.dataset.ready = "yes";
});
"""


@pytest.mark.parametrize("which", ["compared", "hostile"])
def test_the_page_fits_into_1280_and_390_pixels(which, request, tmp_path):
    page = html.escape(request.getfixturevalue(which))
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe>' for width in (1280, 390)
    )
    (tmp_path / "frames.html").write_text(
        with_script(f"<!doctype html><html><head></head><body>{frames}</body></html>", FRAMES)
    )
    for width, seen in zip((1280, 390), report_of(in_browser(tmp_path / "frames.html", tmp_path)), strict=True):
        assert seen["ready"] == "yes" and seen["error"] is None
        assert seen["wide"] <= width and seen["end"] <= width and seen["labels"] == 0


def test_a_run_that_was_killed_or_goes_on_is_shown_and_left_as_it_is(pair, tmp_path, capsys):
    folder = shutil.copytree(pair[1], tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
        text = (folder / name).read_text()
        (folder / name).write_text(text[: len(text) - 20])  # the last line is half there
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    make_page(folder)
    assert capsys.readouterr().out == f"a page of 1 run with 3 steps: {folder}/look.html (open it in a browser)\n"
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before | {
        "look.html": (folder / "look.html").read_bytes()
    }
    found = numbers((folder / "look.html").read_text())["runs"][0]
    assert len(found["samples"]) == 2 and [x[0] for x in found["success"]] == [0, 2]
    # An older run has fewer files and fields.
    for name in ("samples.jsonl", "evaluations.jsonl"):
        (folder / name).unlink()
    old = [{k: v for k, v in r.items() if k not in ("kl", "responses")} for r in read(pair[0] / "metrics.jsonl")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old[:1]))
    make_page(folder, pair[0])
    in_browser(folder / "look.html", tmp_path)


def test_what_is_no_run_is_said_in_one_line(pair, tmp_path):
    (tmp_path / "empty").mkdir()
    begun = shutil.copytree(pair[0], tmp_path / "begun")
    (begun / "metrics.jsonl").write_text("")
    broken = shutil.copytree(pair[0], tmp_path / "broken")
    (broken / "samples.jsonl").write_text('{"step": 1}\nnothing\n{"step": 2}\n')
    for argv, message in (
        ([tmp_path / "none"], "none: no such folder. Give the folder of a run"),
        ([tmp_path / "empty"], "empty: not a run, because it has no metrics.jsonl and args.json"),
        ([pair[0], begun], "begun: this run has not logged anything yet"),
        ([broken], "broken/samples.jsonl line 2: .*Remove this line"),
        ([pair[0], "--out", "/proc/nothing/look.html"], "/proc/nothing"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}") as e:
            make_page(*argv)
        assert "\n" not in str(e.value)


def test_runs_of_the_same_name_are_told_apart():
    assert look.name_runs([Path("a/run-1"), Path("b/run-1"), Path("b/run-2")]) == ["a/run-1", "b/run-1", "run-2"]


# ---- --report ----


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_without_the_package_report_says_what_to_install_before_anything_starts(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, node_run.REPORTS[name], None)  # importing it is an ImportError
    monkeypatch.setattr(train, "start_actor", None)
    with pytest.raises(SystemExit, match=f"error: --report {name}: .* not installed. Run: pip install {name}$"):
        run("--report", name, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Recorder(types.ModuleType):
    """Takes the calls of both packages."""

    def __init__(self):
        super().__init__("recorder")
        self.sent = {}

    def init(self, **settings):
        self.settings = settings
        return self

    def SummaryWriter(self, folder):
        self.settings = {"dir": folder}
        return self

    def log(self, numbers, step):
        self.sent[step] = self.sent.get(step, {}) | numbers

    def add_scalar(self, name, value, step):
        self.log({name: value}, step)

    def flush(self):
        self.sent["flushed"] = self.sent.get("flushed", 0) + 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_report_sends_every_record(name, pair, tmp_path, monkeypatch):
    module = Recorder()
    monkeypatch.setitem(sys.modules, node_run.REPORTS[name], module)
    args = settings.fill_defaults(train.Args(report=name), train.DEFAULTS, settings.TINY)[0]
    log = node_run.Log(tmp_path, None, args)
    records = read(pair[1] / "metrics.jsonl")
    for record in records:
        log(record)
    assert log.records == records == read(tmp_path / "metrics.jsonl") and module.settings["dir"] == tmp_path
    assert module.sent.pop("flushed", len(records)) == len(records) and set(module.sent) == {0, 1, 2, 3}
    assert set(module.sent[0]) == {"success", "half_width_95"}
    last = next(r for r in records if r["step"] == 3 and "reward" in r)
    assert module.sent[3]["kl"] == last["kl"] and module.sent[3]["seconds/score"] == last["seconds"]["score"]
    assert not {"step", "stale_weight"} & set(module.sent[3])


# ---- a run that learns nothing ----


def step_record(**changes):
    return dict(problems=4, equal_groups=4, responses=16, empty=0, truncated=0, zero_reward=16) | changes


def test_equal_groups_are_described_with_what_to_do():
    say = node_run.describe_equal_groups
    equal = step_record()
    assert say([]) is None and say([equal] * 4 + [step_record(equal_groups=3)]) is None
    assert say([step_record(equal_groups=3)] + [equal] * 5) == say([equal] * 9)
    older = {name: value for name, value in equal.items() if name not in ("zero_reward", "responses")}
    assert say([older] + [equal] * 4) is None and "in the last 2 steps" in say([equal] * 2)
    assert "choose an easier --task" in say([equal] * 5) and "100% had reward 0" in say([equal] * 5)
    assert "raise --max_tokens" in say([step_record(truncated=12, empty=4)] * 5)
    assert "25% were empty, 75% were cut off" in say([step_record(truncated=12, empty=4)] * 5)
    assert "choose a harder --task" in say([step_record(zero_reward=0)] * 5)


def test_a_run_that_learns_nothing_says_so_once_in_a_while(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(countdown.Countdown, "reward", lambda self, problem, text: 0.0)
    monkeypatch.setattr(node_run, "SAY_AGAIN", 3)
    run("--engine", "torch", "--steps", 9, "--prompts", 2, "--group", 2, "--minibatches", 1, "--eval_problems", 2,
        "--eval_every", 0, "--save_every", 9, "--max_tokens", 4, "--out", tmp_path / "run")  # fmt: skip
    said = [line for line in capsys.readouterr().out.splitlines() if "nothing was learned" in line]
    assert [line.split(":")[0] for line in said] == ["step 5", "step 8", "step 9"], "after five steps, and at the end"
    assert all(line.endswith(f"python -m node.look {tmp_path}/run") and "--max_tokens" in line for line in said)


# ---- other locales ----


def test_in_an_ascii_locale_the_page_is_written_and_everything_is_printed(pair, tmp_path, monkeypatch):
    before, printed = locale.setlocale(locale.LC_CTYPE), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    try:
        locale.setlocale(locale.LC_CTYPE, "C")
        look.main([str(pair[0]), "--out", str(tmp_path / "look.html")])
        monkeypatch.setattr(sys, "argv", ["eval.py"])
        settings.parse_args(evaluation.Args)
        print("25.0 ± 3.8", flush=True)
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert b"25.0 ? 3.8" in printed.getvalue()
    assert "γ" in (tmp_path / "look.html").read_text(encoding="utf-8")
