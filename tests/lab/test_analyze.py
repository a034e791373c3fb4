"""analyze.py as users run it; and the page, which must hold whatever text a model writes."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from transformers import HfArgumentParser

from lab import analyze, linkage, pictures, sinks
from node import settings


def run(*argv):
    analyze.main(*HfArgumentParser(analyze.Args).parse_args_into_dataclasses([*map(str, argv)]))


class Page(HTMLParser):
    """Collects tags, and the token spans' text and tips."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.spans, self.tips, self.inside, self.outside = [], [], [], False, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "span":
            self.inside = True
            self.spans.append("")
            self.tips.append(dict(attributes)["data-tip"])

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "span"

    def handle_data(self, data):
        if self.inside:
            self.spans[-1] += data


@pytest.mark.vllm
def test_the_whole_analysis_with_vllm(tmp_path, capsys):
    out = tmp_path / "evidence"
    run("--problems", 12, "--out", out)
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1].startswith("lifts over random:") and printed[-1].endswith(f"{out}/index.html")
    assert (out / "maps.png").read_bytes()[:4] == b"\x89PNG"

    found = json.loads((out / "analysis.json").read_text())
    assert list(found["other ways"]) == [
        "bottom layers", "middle layers", "top layers", "split 20%", "split 40%", "split 50%", "FAI × ‖W_O v‖",
    ]  # fmt: skip
    for table in (found["table 2"], found["floor"], *found["other ways"].values()):
        for link in (table[name] for name in linkage.LINKS):
            assert (
                0 < link["p"] <= 1
                and 0 < link["p shifted"] <= 1
                and link["lift"][1] <= link["lift"][0] <= link["lift"][2]
            )
    for column in found["table 1"].values():
        assert 0 <= column["kept at high"][1] <= column["kept at high"][0] <= column["kept at high"][2] <= 1
    high, control = (found["table 1"][name]["kept at high"] for name in ("as the paper", "matched"))
    assert high == control, "the same high places in both columns"
    assert abs(found["table 1"]["matched"]["entropy at high"] - found["table 1"]["matched"]["entropy at low"]) < 0.1
    assert found["other ways"]["middle layers"] == found["table 2"]

    page = Page((out / "index.html").read_text())
    assert not [a for _, a in page.tags for name in ("src", "href") if not a.get(name, "data:").startswith("data:")]
    assert len(page.spans) > 100 and sum(tag == "img" for tag, _ in page.tags) == 1
    assert all(word in page.tips[0] for word in ("position 0", "WAAD", "Δ", "FAI", "entropy", "γ coupled"))
    assert "| Table 1 |" in (out / "tables.md").read_text()

    with pytest.raises(SystemExit, match="already holds"):
        run("--problems", 12, "--out", out)


def test_without_the_first_token_and_without_table_1(tmp_path):
    out = tmp_path / "evidence"
    run("--problems", 10, "--engine", "torch", "--drop_first", "--positions", 0, "--max_tokens", 60, "--out", out)
    found = json.loads((out / "analysis.json").read_text())
    assert "table 1" not in found
    assert "left on the first token" in (out / "tables.md").read_text()
    span, other, share, by_norm = found["first token"]["global heads"]
    assert 0 < by_norm < 1
    assert span < other and 0 < share < 1, "the first column is the farthest; the other way has it"


def test_a_model_without_values_of_their_own_has_no_column_by_norm(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks, "can_weigh", lambda model, layers: False)
    out = tmp_path / "evidence"
    run("--problems", 10, "--engine", "torch", "--positions", 0, "--max_tokens", 48, "--out", out)
    found = json.loads((out / "analysis.json").read_text())
    assert len(found["first token"]["global heads"]) == 3 and "‖" not in "".join(found["other ways"])


def test_an_analysis_that_was_stopped_goes_on(tmp_path):
    out = tmp_path / "evidence"
    few = ("--max_tokens", 48, "--positions", 1, "--top_k", 1)
    run("--problems", 10, "--engine", "torch", *few, "--out", out)
    tables, rests = ((out / name).read_text() for name in ("tables.md", "continuations.jsonl"))
    (out / "continuations.jsonl").write_text(rests[: len(rests) // 2])  # a kill within a line
    (out / "tables.md").unlink()
    run("--resume", out)
    assert (out / "tables.md").read_text() == tables and (out / "continuations.jsonl").read_text() == rests
    with pytest.raises(SystemExit, match=r"error: --resume .*Remove --problems"):
        run("--resume", out, "--problems", 20)
    with pytest.raises(SystemExit, match=r"error: .*has no args.json that this can read"):
        run("--resume", tmp_path)


def test_the_page_escapes_whatever_a_model_writes():
    hostile = [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "\x00\x1b[2J",
        "'&amp;",
        "\n",
        "",
        "🎯",
        "\u202e",
    ]
    n = len(hostile)
    found_page = pictures.token_spans(
        hostile, np.linspace(0, 1, n), [f"{pictures.visible(t)}\nWAAD 1" for t in hostile]
    )
    page = Page(found_page)
    assert {tag for tag, _ in page.tags} == {"span", "br"} and len(page.spans) == n
    assert page.spans[0] == hostile[0] and page.spans[1] == hostile[1] and page.spans[3] == hostile[3]
    assert "\x00" not in found_page and "\u202e" not in found_page
    assert page.tips[0] == f"{hostile[0]}\nWAAD 1"
    assert "nan" not in pictures.token_spans(["a"], np.array([np.nan]), [""])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--problems", "3"], "--problems 3: must be 10 or more"),
        (["--top_k", "50"], "--top_k 50: there are 2. other"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--task", "sums"], "unknown task 'sums'"),
        (["--chat"], "assets/tiny has no chat template"),
        (["--model", "no/such/place"], "cannot load a model from 'no/such/place'"),
        (["--max_tokens", "400"], "--max_tokens 400.*assets/tiny reads 512"),
        (["--out", "/proc/nothing/x"], "cannot write there"),
    ],
)
def test_bad_arguments_are_one_line(argv, message, monkeypatch):
    monkeypatch.setattr(analyze, "start_actor", None)
    with pytest.raises(SystemExit, match=f"error: .*{message}") as e:
        run(*argv)
    assert "\n" not in str(e.value)


def test_responses_too_short_to_say_anything(tmp_path):
    model, tokenizer = settings.load_model("assets/tiny")
    model.generation_config.eos_token_id = list(range(len(tokenizer)))  # whatever it writes ends it
    model.save_pretrained(tmp_path / "mute")
    tokenizer.save_pretrained(tmp_path / "mute")
    with pytest.raises(SystemExit, match="0 of 12 responses are longer than 20 tokens"):
        run("--problems", 12, "--engine", "torch", "--model", tmp_path / "mute", "--out", tmp_path / "out")
