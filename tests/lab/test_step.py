"""lab.step: the page shows the numbers of the functions that train, holds whatever a model writes, and loads."""

import base64
import contextlib
import copy
import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import pytest
import torch
from transformers import HfArgumentParser

import credit
import tasks
from grpo import group_advantages, shape_advantages, token_logprobs, update
from lab import step, step_page
from metrics import observe
from node.settings import TINY, load_model
from rollout import Rollout, pad_batch

FIGURES = Path(__file__).parents[2] / "lab" / "figures"
HOSTILE = ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "<!--", "\x00\x1b[2J", "'&amp;",
           "\n", "", "🎯", "\u202e", "\u2028", "`", "{{numbers}}"]  # fmt: skip


def run(*argv):
    step.main(*HfArgumentParser(step.Args).parse_args_into_dataclasses([*map(str, argv)]))


def numbers(page):
    return json.loads(re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page as the command writes it: (page, picture, printed text, what described() was given)."""
    folder, printed, given = tmp_path_factory.mktemp("step"), io.StringIO(), []
    described = step.described
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(step, "described", lambda *args: given.append(args) or described(*args))
        patch.setattr(sys, "argv", ["step.py"])
        run("--out", folder)
    return (folder / "step.html").read_text(), (folder / "gamma.svg").read_text(), printed.getvalue(), given[0]


def batch_of(found):
    """The group's batch, from the token numbers on the page."""
    return pad_batch([Rollout(found["prompt_ids"], r["ids"], [0.0] * len(r["ids"]), "", False)
                      for r in found["responses"]])[:2]  # fmt: skip


def column(found, name):
    return torch.tensor([x[name] for x in found["tokens"]])


@pytest.mark.parametrize("which", ["made now", "committed"])
def test_the_numbers_of_the_page_are_those_of_the_functions(made, which):
    found = numbers(made[0] if which == "made now" else (FIGURES / "step.html").read_text())
    model, tokenizer = load_model(TINY, "cpu")
    input_ids, mask = batch_of(found)
    signals, b = observe(model, input_ids, mask), found["followed"]
    at = mask[b]

    def same(name, values):
        torch.testing.assert_close(column(found, name), values[b][at], rtol=1e-4, atol=1e-5, check_dtype=False)

    same("old_logprob", signals.logprobs)
    same("entropy", signals.entropy)
    same("waad", signals.waad)
    same("fai", signals.fai)
    same("delta", credit.waad_change(signals.waad, mask))
    gamma = credit.coupled_rhythm(signals.waad, signals.fai, mask)
    same("coupled", gamma)
    same("local", credit.local_chunk(signals.waad, mask))
    same("global", credit.global_anchor(signals.fai, mask))
    assert [(x["local"] > 1, x["global"] > 1) for x in found["tokens"]] == [
        (x["t_loc"], x["t_glob"]) for x in found["tokens"]
    ]
    problem = tasks.load(found["task"], "train")[step.Args().problem]
    assert found["prompt"] == step.visible(problem.prompt)
    rewards = torch.tensor([[r["reward"] for r in found["responses"]]])
    text = [tokenizer.decode(r["ids"], skip_special_tokens=True) for r in found["responses"]]
    assert rewards[0].tolist() == [tasks.reward(problem, t) for t in text] and 0 < rewards.mean() < 1
    advantages = group_advantages(rewards)[0]
    torch.testing.assert_close(torch.tensor([r["advantage"] for r in found["responses"]]), advantages)
    same("shaped", shape_advantages(advantages, gamma))
    spans = {(h["layer"], h["head"]): h for h in found["heads"]}
    for i, layer in enumerate(signals.heads.layers):
        for head in range(signals.heads.spans.shape[1]):
            shown = spans[layer, head]
            assert shown["span"] == pytest.approx(signals.heads.spans[i, head].item(), rel=1e-4)
            assert (shown["group"] == "local") == signals.heads.is_local[i, head]
            assert (shown["group"] == "global") == signals.heads.is_global[i, head]
    assert found["identity"]["agrees"] and found["identity"]["waad"] == pytest.approx(
        signals.waad[b][at][found["identity"]["token"]].item(), abs=1e-5
    )


def test_the_update_of_the_page_is_that_of_the_functions(made):
    found, args = numbers(made[0]), made[3][2]
    trained = copy.deepcopy(load_model(TINY, "cpu")[0])
    input_ids, mask = batch_of(found)
    old, b = observe(trained, input_ids, mask).logprobs, found["followed"]
    gamma = made[3][0].gamma["coupled"]
    shaped = shape_advantages(torch.tensor([r["advantage"] for r in found["responses"]]), gamma)
    optimizer = torch.optim.AdamW(trained.parameters(), args.lr, weight_decay=0.0)
    done = update(trained, optimizer, input_ids, mask, old, shaped, [torch.arange(len(mask))], micro_tokens=10_000)
    assert found["updates"][0]["grad_norm"] == pytest.approx(done["grad_norm"], rel=1e-3)
    assert found["updates"][0]["loss"] == pytest.approx(done["loss"], abs=1e-5)
    assert found["losses"][0] == pytest.approx(done["loss"], abs=1e-5)
    assert sum(r["losses"][0] for r in found["responses"]) / len(mask) == pytest.approx(done["loss"], abs=1e-5)
    with torch.no_grad():
        ratio = (token_logprobs(trained, input_ids, mask)[0] - old).exp()[b][mask[b]]
    assert column(found, "ratios")[:, 0].tolist() == [1] * len(ratio)
    torch.testing.assert_close(column(found, "ratios")[:, 1], ratio, rtol=0.02, atol=0)  # Adam magnifies rounding
    for x in found["tokens"]:
        assert x["clipped"] == (x["ratios"][1] > 1.2 if x["shaped"] > 0 else x["ratios"][1] < 0.8)
    assert any(x["clipped"] for x in found["tokens"]), "the page is to show what clipping does"
    assert found["handed"]["after"] == 0 < found["handed"]["before"]


def test_the_rule_in_words_says_where_every_bonus_comes_from(made):
    found = numbers(made[0])
    tokens = found["tokens"]
    assert {x["coupled"] for x in tokens} == {1, 1.25, 1.5, 1.75} and sum(x["dominated"] for x in tokens) >= 3
    for t, x in enumerate(tokens):
        kept, got = re.search(r"keeps (?:its )?([\d.]*\d)", x["rule"]), re.search(r"gets ([\d.]*\d)", x["rule"])
        assert 1 + sum(float(m[1]) for m in (kept, got) if m) == pytest.approx(x["coupled"])
        assert x["rule"].startswith("anchor") == x["t_glob"] and x["rule"].endswith(f"γ = {x['coupled']:g}")
        if x["dominated"]:
            intro = tokens[x["intro"]]
            assert f"“{intro['text']}” (token {x['intro'] + 1}," in x["rule"] and 1 <= t - x["intro"] <= 3
            assert x["waad"] <= found["tau_waad"] and intro["delta"] >= found["tau_delta"]
            assert intro["delta"] == max(o["delta"] for o in tokens[max(0, t - 3) : t])
            assert f"(token {t + 1}," in intro["rule"].split("introduces")[1]


def test_the_printed_text_says_the_same(made):
    page, _, printed, _ = made
    found, lines = numbers(page), printed.strip().splitlines()
    assert [n for n in range(1, 11) if f"\n{n}  " not in "\n" + printed] == []
    assert re.match(r"one step on 8 responses, \d of them right; response \d token by token\. .*step\.html", lines[-1])
    assert all(x["rule"] in printed for x in found["tokens"] if x["coupled"] > 1)
    assert found["says"]["row"] in printed and found["says"]["verdict"] in printed
    header = next(line for line in lines if "ρ after" in line)
    table = lines[lines.index(header) + 1 :][: len(found["tokens"])]
    for t, (row, x) in enumerate(zip(table, found["tokens"]), 1):
        assert row.split()[:2] == [str(t), x["text"]] and f"{x['waad']:.3f}" in row and f"{x['ratios'][1]:.3f}" in row


def test_a_disagreement_with_full_maps_is_said_in_red(made, monkeypatch, tmp_path):
    maps = step.attention_maps
    monkeypatch.setattr(step, "attention_maps", lambda layer: maps(layer) * 1.001)
    found = step.described(*made[3]) | {"model": "m", "task": "t", "prompt": "p", "command": "c"}
    assert not found["identity"]["agrees"] and "DISAGREEMENT" in step_page.text(found)
    page = step_page.page(found)
    assert numbers(page)["says"]["verdict"].startswith("DISAGREEMENT")
    monkeypatch.setattr(step, "described", lambda *args: found)
    monkeypatch.setattr(step, "take_step", lambda *args: None)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run("--out", tmp_path)
    assert "DISAGREES" in printed.getvalue().splitlines()[-1]
    dom = in_browser(tmp_path / "step.html", tmp_path)
    assert '<p class="bad" role="alert">DISAGREEMENT' in dom


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, attributes))


def hostile(made):
    """The page's numbers, had the model written the worst."""

    class Tokenizer:
        def decode(self, ids):
            return HOSTILE[int(ids[0]) % len(HOSTILE)]

    taken, _, args = made[3]
    taken = taken._replace(rollouts=[r._replace(text="".join(HOSTILE)) for r in taken.rollouts])
    names = dict.fromkeys(("model", "task", "command"), HOSTILE[0])
    return step.described(taken, Tokenizer(), args) | names | {"prompt": step.visible("".join(HOSTILE))}


def test_the_page_and_the_picture_hold_whatever_a_model_writes(made, tmp_path):
    found = hostile(made)
    page = step_page.page(found)
    assert Tags(page).tags == Tags(made[0]).tags, "no text adds a tag or an attribute"
    assert all(c not in page for c in "\x00\x1b\u202e\u2028") and page.count("</script>") == 2
    assert [x["text"] for x in numbers(page)["tokens"]] == [x["text"] for x in found["tokens"]]
    drawn = ElementTree.fromstring(step_page.picture(found))
    texts = [x.text or "" for x in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert HOSTILE[0] in texts and drawn.find(".//{http://www.w3.org/2000/svg}script") is None
    assert "\x1b" not in step_page.text(found)
    (tmp_path / "hostile.html").write_text(page)
    dom = in_browser(tmp_path / "hostile.html", tmp_path)
    assert "&lt;script&gt;alert(1)" in dom and "<img src=x" not in dom and '<img src="x"' not in dom


@pytest.mark.parametrize("which", ["made now", "committed"])
def test_the_page_is_one_small_file_without_network(made, which):
    page = made[0] if which == "made now" else (FIGURES / "step.html").read_text()
    assert len(page.encode()) < 400_000
    assert re.findall(r"https?://[^\"' ]*", page) in (["http://www.w3.org/2000/svg"], [])
    assert "default-src 'none'" in page and "url(" not in page
    ids = {dict(attributes).get("id") for _, attributes in Tags(page).tags}
    assert {f"step-{n}" for n in range(1, 11)} <= ids
    form, filled = ((re.sub(r'(id="numbers">).*?(</script>)', r"\1\2", p, flags=re.DOTALL))
                    for p in (step_page.TEMPLATE.read_text(), page))  # fmt: skip
    assert filled == form, "made by another version of step_page.html"


def test_the_committed_picture_is_the_committed_page_s(made):
    found = numbers((FIGURES / "step.html").read_text())
    assert (FIGURES / "gamma.svg").read_text() == step_page.picture(found)
    drawn = ElementTree.fromstring(made[1])
    assert len(drawn.findall("{http://www.w3.org/2000/svg}rect")) == 1 + 3 + sum(
        x["coupled"] > 1 for x in numbers(made[0])["tokens"]
    )


def test_the_maps_are_those_of_the_two_extreme_heads(made):
    found = numbers(made[0])
    size = found["prompt_tokens"] + len(found["tokens"])
    for shown, head in zip(found["maps"], (found["heads"][0], found["heads"][-1])):
        assert (shown["layer"], shown["head"], shown["group"]) == (head["layer"], head["head"], head["group"])
        alpha = torch.tensor(matplotlib.image.imread(io.BytesIO(base64.b64decode(shown["png"])))[..., 3])
        layer = step.of_response(made[3][0].recorded[shown["layer"]], found["followed"])
        attention = step.attention_maps(layer)[0, shown["head"], :size, :size]
        torch.testing.assert_close(alpha, attention**0.4, atol=0.5 / 255 + 1e-6, rtol=0)


def test_a_group_of_equal_rewards_teaches_nothing_and_is_shown_all_the_same(made, monkeypatch):
    monkeypatch.setattr(tasks, "reward", lambda problem, text: 0.0)
    model, tokenizer = load_model(TINY, "cpu")
    torch.manual_seed(0)
    args = replace(made[3][2], max_tokens=8, group=2)
    found = step.described(
        step.take_step(model, tokenizer, tasks.load("countdown-tiny", n=1)[0], args), tokenizer, args
    )
    assert "teaches nothing" in found["says"]["formula"] and found["handed"]["changed"] == 0
    assert {x["coupled"] for x in found["tokens"]} == {1}, "too short for an anchor"
    assert "Â is 0" in found["tokens"][0]["clip"] and found["identity"]["agrees"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--problem", "-1"], "--problem -1: countdown-tiny has problems 0 to 3999"),
        (["--problem", "4000"], "--problem 4000: countdown-tiny has problems 0 to 3999"),
        (["--seed", "-1"], "--seed -1"),
        (["--task", "sums"], "unknown task 'sums'"),
        (["--model", "no/such/place"], "cannot load a model from 'no/such/place'"),
        (["--out", "/proc/nothing/x"], "/proc/nothing"),
    ],
)
def test_bad_arguments_are_one_line(argv, message, monkeypatch):
    monkeypatch.setattr(step, "take_step", None)
    with pytest.raises(SystemExit, match=f"error: .*{message}") as e:
        run(*argv)
    assert "\n" not in str(e.value)


def in_browser(path: Path, tmp_path: Path) -> str:
    """The page's DOM after its script, without whose end the test fails; the test is skipped where no Chromium is."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here: the page's script was not run")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={tmp_path}/browser", "--dump-dom", path.as_uri()],
        capture_output=True, text=True,
    )  # fmt: skip
    assert 'data-ready="yes"' in done.stdout and "data-error" not in done.stdout.split("<head>")[0], done.stderr
    return done.stdout


KEYS = """<script>
const first = document.querySelector("#strip-8 .hit");
first.focus();
first.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
const second = document.activeElement;
const report = document.createElement("pre");
report.id = "report";
report.textContent = JSON.stringify([second.dataset.t, $("panel").hidden, $("panel").textContent]);
document.body.append(report);
</script></html>"""


def test_the_page_draws_itself_and_works_from_the_keyboard(made, tmp_path):
    found = numbers(made[0])
    (tmp_path / "step.html").write_text(made[0].replace("</html>", KEYS))
    dom = in_browser(tmp_path / "step.html", tmp_path)
    assert dom.count('class="hit"') == 5 * len(found["tokens"]) and 'role="alert"' not in dom
    assert dom.count('class="arrow"') == sum(x["dominated"] for x in found["tokens"])
    for x in found["tokens"]:
        assert f">{x['waad']:.2f}</text>" in dom and f">{x['coupled']:.2f}</text>" in dom
    t, hidden, panel = json.loads(re.search(r'<pre id="report">(.*?)</pre>', dom)[1])
    assert t == "1" and not hidden and found["tokens"][1]["rule"] in panel and "token 2 of" in panel
