"""examples/step.py: the page shows the numbers of the functions that train, computes the same γ, holds whatever a model
writes. Its script runs in a real browser: without Chromium these tests are skipped."""

import base64
import contextlib
import copy
import html
import io
import json
import math
import random
import re
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
from examples import step, step_page
from grpo import group_advantages, shape_advantages, token_logprobs, update
from metrics import observe
from node.settings import TINY, load_model
from rollout import Rollout, pad_batch
from tasks import countdown
from tests.browser import in_browser, report_of, with_script

FIGURES = Path(__file__).parents[1] / "examples" / "figures"
HOSTILE = ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "<!--", "\x00\x1b[2J", "'&amp;",
           "\n", "", "🎯", "\u202e", "\u2028", "`", "{{numbers}}"]  # fmt: skip


def run(*argv):
    step.main(*HfArgumentParser(step.Args).parse_args_into_dataclasses([*map(str, argv)]))


def numbers(page):
    return json.loads(re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page as the command writes it: (page, picture, printed text, what describe() was given)."""
    folder, printed, given = tmp_path_factory.mktemp("step"), io.StringIO(), []
    describe = step.describe
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(step, "describe", lambda *args: given.append(args) or describe(*args))
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
    same("certain", signals.logprobs.exp() > 0.99)
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
    assert (
        rewards[0].tolist() == [tasks.get("countdown-tiny").reward(problem, t) for t in text] and 0 < rewards.mean() < 1
    )
    advantages = group_advantages(rewards)[0]
    torch.testing.assert_close(torch.tensor([r["advantage"] for r in found["responses"]]), advantages)
    same("token_advantage", shape_advantages(advantages, gamma))
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
    gamma = made[3][0].gamma["coupled"].cpu()
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
        assert x["clipped"] == (x["ratios"][1] > 1.2 if x["token_advantage"] > 0 else x["ratios"][1] < 0.8)
    assert any(x["clipped"] for x in found["tokens"]), "the page is to show what clipping does"
    assert found["handed"]["after"] == 0 < found["handed"]["before"]


def test_the_page_says_at_how_many_tokens_gamma_acts(made):
    found = numbers(made[0])
    credited = [x for x in found["tokens"] if x["coupled"] > 1]
    certain = [x for x in credited if x["old_logprob"] > math.log(0.99)]
    assert (len(credited), len(certain)) == (22, 15) and max(x["entropy"] for x in certain) < 0.01
    lesson = found["says"]["lesson"]
    assert "15 of the 22 credited tokens" in lesson and "at the other 7 tokens" in lesson and lesson in made[2]
    for x in found["tokens"]:
        almost = re.search(r"but π_old is (\d\.\d+) here, so that gradient is almost 0", x["clip"])
        assert bool(almost) == (x["old_logprob"] > math.log(0.99) and not x["clipped"])
        assert not almost or float(almost[1]) == pytest.approx(math.exp(x["old_logprob"]), abs=5e-4)


def test_five_tokens_of_highest_entropy_are_shown(made):
    found, taken = numbers(made[0]), made[3][0]
    highest = taken.signals.entropy[taken.mask].sort(descending=True).values[:5]
    assert [x["entropy"] for x in found["five"]] == pytest.approx(highest.tolist())
    assert all(max(abs(p - x["logprobs"][0]) for p in x["logprobs"]) > 0.1 for x in found["five"]), "they move"


def test_the_example_of_a_jump_is_true(made):
    """Δ belongs to the token before the jump: the page names one, and the token after it that gets nothing."""
    found = numbers(made[0])
    said = re.search(
        r"from ([\d.]+) at “(.+?)” \(token (\d+)\) to ([\d.]+) at “(.+?)” \(token (\d+)\)", found["says"]["jump"]
    )
    assert said and found["says"]["jump"] in made[2]
    here, after = found["tokens"][int(said[3]) - 1], found["tokens"][int(said[6]) - 1]
    assert int(said[6]) == int(said[3]) + 1 and (said[2], said[5]) == (here["text"], after["text"])
    assert (said[1], said[4]) == (f"{here['waad']:.2f}", f"{after['waad']:.2f}")
    assert here["local"] == 1.5 and after["local"] == 1 and after["waad"] > here["waad"]
    low = sum(x["t_loc"] and x["waad"] <= found["tau_waad"] for x in found["tokens"])
    assert f"{low} of the 20 tokens of T_loc" in found["says"]["jump"]


class Text(HTMLParser):
    """The text of a page, scripts and styles left out."""

    def __init__(self, page):
        super().__init__()
        self.text, self.hidden = "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.hidden = tag in ("script", "style")

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        if not self.hidden:
            self.text += data


def test_every_word_is_defined_and_steps_are_told_apart(made, tmp_path):
    (tmp_path / "step.html").write_text(made[0])
    text = re.sub(r"\s+", " ", Text(in_browser(tmp_path / "step.html", tmp_path)).text)
    for told in (text, made[2]):
        assert "windowed average attention distance" in told and "future attention influence" in told
        assert re.findall(r"(?<!radient )\bstep \d", told) == []
        assert all(line in told for line in numbers(made[0])["says"]["departures"])
    assert "the tiny model" in text and "embedded" not in text
    assert all(text.index(word) < text.index("1 · Sample G") for word in ("preplan token", "anchor", "gradient step"))
    rules = text.index("Δ belongs to the token before the jump")
    assert text.index("8 · γ: which tokens") < rules < text.index("γ coupled"), "the rules stand before the strip"
    assert text.index("4 · Local and global heads (") < text.index("5 · One forward pass without gradient O")
    assert f"{sum(x['coupled'] > 1 for x in numbers(made[0])['tokens'])} of the 49 tokens have γ > 1" in text


def test_the_printed_text_says_the_same(made):
    page, _, printed, _ = made
    found, lines = numbers(page), printed.strip().splitlines()
    assert [n for n in range(1, 11) if f"\n{n}  " not in "\n" + printed] == []
    assert re.match(
        r"one training step on 8 responses, \d of them right; response \d token by token\. .*step\.html", lines[-1]
    )
    assert found["says"]["row"] in printed and found["says"]["verdict"] in printed
    header = next(line for line in lines if "ρ_after" in line)
    table = lines[lines.index(header) + 1 :][: len(found["tokens"])]
    for t, (row, x) in enumerate(zip(table, found["tokens"]), 1):
        assert row.split()[:2] == [str(t), x["text"]] and f"{x['waad']:.3f}" in row and f"{x['ratios'][1]:.3f}" in row


def test_a_disagreement_with_full_maps_is_said_in_red(made, monkeypatch, tmp_path):
    maps = step.attention_maps
    monkeypatch.setattr(step, "attention_maps", lambda layer: maps(layer) * 1.001)
    found = step.describe(*made[3]) | {"model": "m", "task": "t", "prompt": "p", "command": "c"}
    assert not found["identity"]["agrees"] and "DISAGREEMENT" in step_page.text(found)
    page = step_page.page(found)
    assert numbers(page)["says"]["verdict"].startswith("DISAGREEMENT")
    monkeypatch.setattr(step, "describe", lambda *args: found)
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
    return step.describe(taken, Tokenizer(), args) | names | {"prompt": step.visible("".join(HOSTILE))}


def test_the_page_and_the_picture_hold_whatever_a_model_writes(made, tmp_path):
    found = hostile(made)
    page = step_page.page(found)
    assert Tags(page).tags == Tags(made[0]).tags, "no text adds a tag or an attribute"
    assert all(c not in page for c in "\x00\x1b\u202e\u2028") and page.count("</script>") == 3
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
    credited = sum(x["coupled"] > 1 for x in numbers(made[0])["tokens"])
    assert len(drawn.findall("{http://www.w3.org/2000/svg}rect")) == 1 + credited + len(step_page.MEANINGS)
    assert float(drawn.get("width")) <= 900


def test_the_legend_of_the_picture_is_true(made):
    tokens = numbers(made[0])["tokens"]
    intros = {x["intro"] for x in tokens if x["dominated"]}
    for t, x in enumerate(tokens):
        keeps_all, is_intro = x["t_glob"] and not x["dominated"], t in intros
        true_of = {
            "gives or receives a share": x["dominated"] != is_intro and not keeps_all,
            "anchor, or dominated anchor and intro (1.25 + 0.25)": (keeps_all and not is_intro)
            or (x["dominated"] and is_intro),
            "anchor and intro": keeps_all and is_intro,
            "all other tokens": not x["t_glob"] and not is_intro,
        }
        assert true_of[step_page.MEANINGS[x["coupled"]]] and sum(true_of.values()) == 1


def test_the_maps_are_those_of_the_two_extreme_heads(made):
    found = numbers(made[0])
    size = found["prompt_tokens"] + len(found["tokens"])
    for shown, head in zip(found["maps"], (found["heads"][0], found["heads"][-1])):
        assert (shown["layer"], shown["head"], shown["group"]) == (head["layer"], head["head"], head["group"])
        alpha = torch.tensor(matplotlib.image.imread(io.BytesIO(base64.b64decode(shown["png"])))[..., 3])
        layer = step.take_response(made[3][0].recorded[shown["layer"]], found["followed"])
        attention = step.attention_maps(layer)[0, shown["head"], :size, :size].cpu()
        torch.testing.assert_close(alpha, attention**0.4, atol=0.5 / 255 + 1e-6, rtol=0)


def test_a_group_of_equal_rewards_teaches_nothing_and_is_shown_all_the_same(made, monkeypatch):
    monkeypatch.setattr(countdown.Countdown, "reward", lambda self, problem, text: 0.0)
    model, tokenizer = load_model(TINY, "cpu")
    torch.manual_seed(0)
    args = replace(made[3][2], max_tokens=8, group=2)
    found = step.describe(step.take_step(model, tokenizer, tasks.load("countdown-tiny", n=1)[0], args), tokenizer, args)
    assert "this group has no gradient" in found["says"]["formula"] and found["handed"]["changed"] == 0
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


KEYS = """
const first = document.querySelector("#strip-8 .hit");
first.focus();
first.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
const second = document.activeElement;
report([second.dataset.t, $("panel").hidden, $("panel").textContent, ruleOf(1)]);
"""


def test_the_page_draws_itself_and_works_from_the_keyboard(made, tmp_path):
    found = numbers(made[0])
    (tmp_path / "step.html").write_text(with_script(made[0], KEYS))
    dom = in_browser(tmp_path / "step.html", tmp_path)
    assert dom.count('class="hit"') == 5 * len(found["tokens"]) and 'role="alert"' not in dom
    arrows = re.findall(r'class="arrow" data-from="(\d+)"', dom)
    assert {int(t) for t in arrows} == {t for t, x in enumerate(found["tokens"]) if x["dominated"]}
    for x in found["tokens"]:
        assert f">{x['waad']:.2f}</text>" in dom and f">{x['coupled']:.2f}</text>" in dom
    t, hidden, panel, rule = report_of(dom)
    assert t == "1" and not hidden and rule in panel and "token 2 of" in panel and found["tokens"][1]["clip"] in panel


FRAMES = """
addEventListener("load", () => {
  report([...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const ends = [...page.querySelectorAll(".line")].map(line => line.getBoundingClientRect().right);
    const cut = [...page.querySelectorAll(".line svg")].filter(drawing => drawing.getBoundingClientRect().width
      > drawing.parentNode.lastChild.getBoundingClientRect().width + 0.5 || drawing.getBoundingClientRect().right
      > drawing.parentNode.getBoundingClientRect().right).length;
    return { ready: root.dataset.ready, error: root.dataset.error ?? null, wide: root.scrollWidth, cut,
      end: Math.max(...ends), lines: page.querySelectorAll("#strip-8 .line").length,
      shown: new Set([...page.querySelectorAll("#strip-8 .hit")].map(hit => hit.dataset.t)).size };
  }));
  document.documentElement.dataset.ready = "yes";
});
"""


@pytest.mark.parametrize("which", ["made now", "hostile"])
def test_the_page_fits_into_1280_and_390_pixels(made, which, tmp_path):
    page = made[0] if which == "made now" else step_page.page(hostile(made))
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
        for width in (1280, 390)
    )
    (tmp_path / "frames.html").write_text(
        with_script(f"<!doctype html><html><head></head><body>{frames}</body></html>", FRAMES)
    )
    for width, seen in zip((1280, 390), report_of(in_browser(tmp_path / "frames.html", tmp_path))):
        assert seen["ready"] == "yes" and seen["error"] is None
        assert seen["wide"] <= width and seen["end"] <= width and seen["cut"] == 0
        assert seen["shown"] == len(numbers(page)["tokens"]), "every token is on some line"
        assert seen["lines"] > (3 if width == 390 else 1)


# ---- the page's own γ ----

PURE = re.search(r'<script id="credit">(.*?)</script>', step_page.TEMPLATE.read_text(), re.DOTALL)[1]
MUTATIONS = {  # errors that one could make in creditOf: what stands there, and what would stand there
    "Δ in float64": ("Math.abs(Math.fround(waad[t] - waad[t + 1]))", "Math.abs(waad[t] - waad[t + 1])"),
    "Δ keeps its sign": ("Math.abs(Math.fround(waad[t] - waad[t + 1]))", "Math.fround(waad[t] - waad[t + 1])"),
    "Δ belongs to the token after": ("? Math.abs(Math.fround(waad[t] - waad[t + 1])) : 0", "&& t > 0 ? Math.abs("
                                     "Math.fround(waad[t] - waad[t - 1])) : 0"),
    "the last token has a Δ": ("waad[t + 1])) : 0)", "waad[t + 1])) : waad[t])"),
    "0.55 * 100 is rounded up to 56": ("Math.ceil(q * n - 1e-6)", "Math.ceil(q * n)"),
    "q * n is rounded down": ("Math.ceil(q * n - 1e-6)", "Math.floor(q * n)"),
    "a tie in TopQ goes to the later token": ("[...eligible].sort(", "[...eligible].reverse().sort("),
    "the lowest q": ("x[t] - x[s]", "x[s] - x[t]"),
    "an anchor may have FAI 0": ("fai[t] > 0", "fai[t] >= 0"),
    "the upper median": ("Math.floor((n - 1) / 2)", "Math.floor(n / 2)"),
    "dominated below the median alone": ("waad[t] > tauWaad", "waad[t] >= tauWaad"),
    "WAAD does not count": ("waad[t] > tauWaad", "false"),
    "τ_Δ is the largest": ("Math.min(...delta.filter", "Math.max(...delta.filter"),
    "Δ must be above τ_Δ": ("delta[largest] >= tauDelta", "delta[largest] > tauDelta"),
    "every anchor has an intro": ("delta[largest] >= tauDelta", "true"),
    "k - 1 tokens before": ("Math.max(0, t - k)", "Math.max(0, t - k + 1)"),
    "k + 1 tokens before": ("Math.max(0, t - k)", "Math.max(0, t - k - 1)"),
    "a tie of intros goes to the farther": ("delta[s] > delta[largest]", "delta[s] >= delta[largest]"),
    "an intro is paid for every anchor": ("(isIntro[t] ? alpha * bonus : 0)",
                                          "intro.filter(s => s === t).length * alpha * bonus"),
    "a dominated anchor keeps α": ("(dominated[t] ? alpha * bonus : 0)", "(dominated[t] ? (1 - alpha) * bonus : 0)"),
    "an intro gets 1 − α": ("(isIntro[t] ? alpha * bonus : 0)", "(isIntro[t] ? (1 - alpha) * bonus : 0)"),
}  # fmt: skip


def float32s(values) -> list[float]:
    return torch.tensor(values, dtype=torch.float32).tolist()


def random_signals(rng: random.Random) -> tuple[list[float], list[float]]:
    """WAAD and FAI of a response of 1 to 50 tokens: all different, with ties, or with ties in float32 alone."""
    n, kind = rng.randint(1, 50), rng.choice(["different", "ties", "ties of float32"])
    if kind == "different":
        waad, fai = [rng.uniform(0, 10) for _ in range(n)], [rng.random() ** 3 for _ in range(n)]
    elif kind == "ties":
        waad, fai = [rng.randint(0, 6) / 2 for _ in range(n)], [rng.randint(0, 4) / 8 for _ in range(n)]
    else:  # in float64 the jumps between 9 and nearly 0 differ
        waad = [9.0 if t % 2 else rng.randint(1, 9) * 1e-8 for t in range(n)]
        fai = [rng.random() for _ in range(n)]
    unseen = rng.choice([0, min(n, 10)])  # the last tokens have FAI 0
    return float32s(waad), float32s(fai[: n - unseen] + [0.0] * unseen)


def cases(found) -> list[dict]:
    """Inputs of creditOf: the response of the page, and random ones, at many settings of the sliders."""
    shares = [i / 20 for i in range(21)]
    own = [x["waad"] for x in found["tokens"]], [x["fai"] for x in found["tokens"]]
    made = []
    for q in shares:
        for k in range(1, 7):
            made.append((*own, {"q": q, "amp": 1 + (k - 1) * 0.6, "alpha": shares[(7 * k + 3) % 21], "k": k}))
    rng = random.Random(0)
    for _ in range(400):
        at = {"q": rng.choice(shares), "amp": rng.choice([1, 1.5, 2.3, 4]), "alpha": rng.choice(shares)}
        made.append((*random_signals(rng), at | {"k": rng.randint(1, 6)}))
    hundred = float32s([rng.uniform(0, 10) for _ in range(100)])  # 0.55 * 100 is more than 55 in floating point
    made.append((hundred, hundred[::-1], {"q": 0.55, "amp": 1.5, "alpha": 0.5, "k": 3}))
    return [{"waad": waad, "fai": fai, "at": at} for waad, fai, at in made]


def expected(case) -> dict[str, list]:
    """What credit.py makes of a case."""
    waad, fai, at = torch.tensor([case["waad"]]), torch.tensor([case["fai"]]), case["at"]
    mask = torch.ones_like(waad, dtype=torch.bool)
    # credit.py works on rows that begin with a prompt; here it is one token.
    waad, fai, mask = (torch.nn.functional.pad(x, (1, 0)) for x in (waad, fai, mask))
    parts = credit.coupled_parts(waad, fai, mask, at["q"], at["k"])
    values = {
        "coupled": credit.coupled_rhythm(waad, fai, mask, at["q"], at["amp"], at["alpha"], at["k"]),
        "local": credit.local_chunk(waad, mask, at["q"], at["amp"]),
        "global": credit.global_anchor(fai, mask, at["q"], at["amp"]),
        "delta": parts.delta, "tLoc": parts.t_loc, "tGlob": parts.t_glob, "dominated": parts.dominated,
        "intro": torch.where(parts.dominated, parts.intro - 1, -1),
    }  # fmt: skip
    taus = {"tauWaad": parts.tau_waad.item(), "tauDelta": parts.tau_delta.item()}
    return {name: x[0, 1:].tolist() for name, x in values.items()} | taus


def differences(found: dict, right: dict) -> list[str]:
    """The names of what differs: sets and thresholds exactly, γ by more than float32's rounding."""
    wrong = []
    for name, values in right.items():
        seen = found[name]
        if name == "tauDelta" and seen is None:  # JSON has no infinity
            seen = math.inf
        close = name in ("coupled", "local", "global")
        if not (seen == pytest.approx(values, abs=2e-6) if close else seen == values):
            wrong.append(name)
    return wrong


def test_the_gamma_of_the_page_is_that_of_credit_py_and_the_test_would_see_errors(made, tmp_path):
    inputs, versions = cases(numbers(made[0])), {"as it is": PURE}
    for name, (there, wrong) in MUTATIONS.items():
        assert PURE.count(there) == 1, name
        versions[name] = PURE.replace(there, wrong)
    functions = ",".join(
        f"{json.dumps(name)}: (() => {{{code}; return creditOf; }})()" for name, code in versions.items()
    )
    script = f"""
    const versions = {{{functions}}}, cases = {json.dumps(inputs)}, results = {{}};
    for (const [name, creditOf] of Object.entries(versions))
      results[name] = cases.map(({{ waad, fai, at }}) => creditOf(waad, fai, at));
    report(results);
    document.documentElement.dataset.ready = "yes";
    """
    (tmp_path / "credit.html").write_text(with_script("<!doctype html><html><head></head><body></body></html>", script))
    results, right = report_of(in_browser(tmp_path / "credit.html", tmp_path)), [expected(case) for case in inputs]
    for case, found, should in zip(inputs, results.pop("as it is"), right):
        assert differences(found, should) == [], case
    unseen = [name for name, found in results.items() if not any(map(differences, found, right))]
    assert unseen == [], "mutations that no case shows"
    assert any(x["tauDelta"] == math.inf for x in right) and any(len(x["delta"]) == 1 for x in right)
    assert sum(any(x["dominated"]) for x in right) > 200


SLIDERS = """
const seen = [];
choose(15);  // the open panel follows
for (const at of SETTINGS) {
  for (const [name, value] of Object.entries(at)) {
    const slider = document.querySelector(`#settings input[name=${name}]`);
    slider.value = value;
    slider.dispatchEvent(new Event("input", { bubbles: true }));
  }
  const shown = strips["strip-8"].hits.map(hit => hit.getAttribute("aria-label"));
  const cells = [...document.querySelectorAll("#strip-8 text")].map(text => text.textContent);
  seen.push({ rules: tokens.map((_, t) => ruleOf(t)), shown, cells, panel: $("panel").textContent,
    colours: [...$("result").children].map(span => span.className), listed: $("dominated").textContent,
    arrows: [...new Set([...document.querySelectorAll("#strip-8 .arrow")].map(arrow => +arrow.dataset.from))],
    hatched: document.querySelectorAll("#strip-8 .hatch").length, counts: $("counts").textContent,
    summary: $("summary").textContent, fixed: $("strip-9").textContent });
}
document.querySelector("#settings button").click();
report({ seen, after: settings, counts: $("counts").textContent });
"""
TRIED = [{"q": 0.4, "amp": 1.5, "alpha": 0.5, "k": 3}, {"q": 0.6, "amp": 2.5, "alpha": 0.3, "k": 6},
         {"q": 0.1, "amp": 4, "alpha": 1, "k": 1}, {"q": 1, "amp": 1.2, "alpha": 0, "k": 2},
         {"q": 0, "amp": 1.5, "alpha": 0.5, "k": 3}, {"q": 0.4, "amp": 1, "alpha": 0.5, "k": 3}]  # fmt: skip


def test_the_sliders_change_gamma_its_colours_and_every_rule_in_words(made, tmp_path):
    found = numbers(made[0])
    tokens, certain = found["tokens"], [x["old_logprob"] > math.log(0.99) for x in found["tokens"]]
    page = with_script(made[0], SLIDERS.replace("SETTINGS", json.dumps(TRIED)))
    (tmp_path / "step.html").write_text(page)
    reported = report_of(in_browser(tmp_path / "step.html", tmp_path))
    for at, seen in zip(TRIED, reported["seen"]):
        case = {"waad": [x["waad"] for x in tokens], "fai": [x["fai"] for x in tokens], "at": at}
        right = expected(case)
        gamma = right["coupled"]
        # The strip, the colours of the text, the arrows, the hatching.
        for t, label in enumerate(seen["shown"]):
            assert f": γ {gamma[t]:.2f}" in label or abs(100 * gamma[t] % 1 - 0.5) < 0.01
        assert [bool(colour.replace("picked", "").strip()) for colour in seen["colours"]] == [g > 1 for g in gamma]
        assert ["certain" in colour for colour in seen["colours"]] == [g > 1 and c for g, c in zip(gamma, certain)]
        assert sorted(seen["arrows"]) == [t for t, is_dominated in enumerate(right["dominated"]) if is_dominated]
        rows = (right["local"], right["global"], gamma)
        assert seen["hatched"] == sum(g > 1 and c for row in rows for g, c in zip(row, certain))
        credited, sure = sum(g > 1 for g in gamma), sum(g > 1 and c for g, c in zip(gamma, certain))
        assert f"{credited} of the 49 tokens have γ > 1" in seen["summary"]
        assert f"γ acts at {credited - sure} tokens" in seen["summary"]
        assert f"T_loc has {sum(right['tLoc'])} tokens, T_glob has {sum(right['tGlob'])}" in seen["counts"]
        assert seen["fixed"] == reported["seen"][0]["fixed"], "section 9 stays"
        # The words: each bonus is accounted for, and the panel and the list say the same.
        assert seen["rules"][15] in seen["panel"] and "token 16 of" in seen["panel"]
        for t, (rule, x) in enumerate(zip(seen["rules"], tokens)):
            kept = re.search(r"keeps (?:its bonus )?([\d.]*\d)", rule)
            got = re.search(r"gets ([\d.]*\d)", rule)
            assert 1 + sum(float(m[1]) for m in (kept, got) if m) == pytest.approx(gamma[t], abs=2e-4)
            assert float(re.search(r"γ = ([\d.]*\d)\.$", rule)[1]) == pytest.approx(gamma[t], abs=1e-4)
            assert rule.startswith("Not an anchor") != right["tGlob"][t]
            assert (rule in seen["listed"]) or not right["dominated"][t]
            assert rule.startswith("Dominated anchor") == right["dominated"][t]
            assert ("It is the intro of" in rule) == (t in right["intro"]) == bool(got)
            if right["dominated"][t]:
                s = right["intro"][t]
                assert f"“{tokens[s]['text']}” (token {s + 1}," in rule and 1 <= t - s <= at["k"]
                assert x["waad"] <= right["tauWaad"] and right["delta"][s] >= right["tauDelta"]
                assert f"(token {t + 1}," in seen["rules"][s].split("It is the intro of")[1]
    assert reported["after"] == TRIED[0] and reported["counts"].startswith("These are the settings of the run.")
