"""The tables come from the committed records, and every interval in a text occurs in a record."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tasks
from lab import decisive, report, stats
from node.settings import TINY, load_model
from rollout import TorchActor

ROOT = Path(__file__).parents[2]
TEXTS = [ROOT / "lab" / "README.md", ROOT / "README.md", *sorted((ROOT / "lab" / "results").glob("*.md"))]
INTERVAL = re.compile(r"([+-]?[\d.,]+) ?%? ?\(([+-]?[\d.,]+) to ([+-]?[\d.,]+)\)")


def intervals(text: str) -> set[tuple[str, ...]]:
    """(value, low, high) of everything like +0.5 (-1.6 to +2.8), signs of a positive number apart."""
    found = INTERVAL.findall(" ".join(text.replace("−", "-").split()))
    return {tuple(x.strip("+,.") for x in one) for one in found}


@pytest.fixture(scope="module")
def printed():
    return {name: report.text_of(name) for name in ("decisive", *report.SECTIONS)}


def test_the_committed_tables_are_those_of_the_committed_records(printed):
    text = "\n\n".join(printed.values()) + "\n"
    assert text == (ROOT / "lab/records/report.md").read_text(), "run python -m lab.report"


def test_every_interval_in_a_text_occurs_in_a_record():
    known = set().union(*(intervals(p.read_text()) for p in (ROOT / "lab/records").rglob("*.md")))
    missing = {str(text.relative_to(ROOT)): sorted(intervals(text.read_text()) - known) for text in TEXTS}
    assert not {name: found for name, found in missing.items() if found}
    assert len(intervals((ROOT / "lab/README.md").read_text())) > 10, "the pattern finds what it is for"


def test_the_baseline_is_pooled_and_differences_are_what_was_planted(monkeypatch):
    rng = np.random.default_rng(0)

    def read(setting, last=None):
        for seed in range(5):
            for arm, more in {"uniform": 0, "scaled": 0, "entropy": 0, "coupled": 0.03, "local": 0}.items():
                curve = [(0, 0.3), (10, 0.4 + more + 0.1 * seed + 0.001 * rng.normal())]
                yield report.experiment.Run(arm, seed, np.array(curve), None)

    monkeypatch.setattr(report.experiment, "read", read)
    found = report.values(("countdown",), "last quarter")
    assert sum(v.arm == "baseline" for v in found) == 15
    e = report.fit_contrast(found, "coupled", "baseline")
    assert e.low < 3.0 < e.high and e.high - e.low < 0.5, "the seeds, which differ much more, are taken out"


def planted_runs(more: dict[str, float], early: float = 0.0) -> list[dict]:
    """Twenty runs of each of these arms, with so many points more in area and at the end.

    At half of the steps all arms are alike, but the loud one of 20 steps, which is `early` ahead.
    """
    rng, runs = np.random.default_rng(0), []
    for arm, gain in more.items():
        ahead = early if arm == f"{decisive.LOUD_ARM}, 20 steps" else 0.0
        for seed in range(20):
            area, half, end = 40 + np.array([gain, ahead, gain]) + 0.3 * rng.normal(size=3)
            runs.append({"arm": arm, "seed": seed, "area": area, "half": half, "end": end, "change": end - half})
            runs[-1]["grad_norm"] = [0.2, 1.2]
    return runs


@pytest.mark.parametrize(
    "gain, control, says",
    [(1.0, 2.0, "Gains"), (-1.0, 2.0, "Loses"), (0.0, 2.0, "No gain of 0."), (1.0, 0.0, "Unable to see")],
)
def test_the_decisive_experiment_is_called_as_its_protocol_says(gain, control, says, monkeypatch):
    arms = {"uniform": 0.0, "coupled": gain, decisive.LOUD_ARM: 0.0, "uniform, minibatches of 32": control}
    runs = planted_runs(arms)
    monkeypatch.setattr(decisive, "read_runs", lambda: runs)
    unfinished = "- Round decisive: UNFINISHED: 80 of 280 runs are there. As far as they go:"
    assert decisive.report().startswith(f"{unfinished} {says}")
    enough = {arm: decisive.Plan(20, plan.arm) for arm, plan in decisive.ROUNDS["decisive"].items()}
    monkeypatch.setitem(decisive.ROUNDS, "decisive", enough)
    assert decisive.report().startswith(f"- Round decisive: {says}")
    assert "- coupled: 20 of 20 runs; gradients of norm 0.70, above 1 in 50.0 % of the steps" in decisive.report()
    monkeypatch.setattr(decisive, "read_runs", lambda: runs[:23])
    assert "As far as they go: Too few runs" in decisive.report()


@pytest.mark.parametrize(
    "early, late, says",
    [(1.0, 1.0, "The gain lasts"), (2.0, 1.0, "lasts"), (1.0, -0.1, "is lost"), (-0.1, -0.1, "cannot be told")],
)
def test_a_gain_lasts_or_is_lost_as_the_protocol_says(early, late, says, monkeypatch):
    arms = {"uniform": 0.0, "coupled": 0.0, decisive.LOUD_ARM: 1.0, "uniform, minibatches of 32": -2.0}
    arms |= {"uniform, 20 steps": 0.0, f"{decisive.LOUD_ARM}, 20 steps": late, "random, gamma 4, q 0.2": 0.0}
    runs = planted_runs(arms, early)
    monkeypatch.setattr(decisive, "read_runs", lambda: runs)
    assert says in decisive.report()
    (row,) = [line for line in decisive.report().splitlines() if line.startswith(f"| {decisive.LOUD_ARM} − random")]
    assert float(row.split("|")[2].split()[0]) == pytest.approx(1.0, abs=0.3)


def test_a_run_of_every_kind_of_arm(monkeypatch):
    """Held-out success at the steps asked for; the model ends elsewhere than it began."""
    model, tokenizer = load_model(TINY)
    actor = TorchActor(model, tokenizer)
    short = replace(decisive.SETTING, prompts=4, minibatches=1, max_tokens=48, eval_samples=1)
    monkeypatch.setattr(decisive, "SETTING", short)
    test_set = tasks.load("countdown-tiny", "test", 2)
    weights, norms = {name: w.clone() for name, w in model.state_dict().items()}, []
    for arm in ("uniform", decisive.LOUD_ARM, "random, gamma 4, q 0.2", "coupled, gamma set once"):
        plan = decisive.Plan(1, decisive.PLANS[arm].arm, evaluate_at=(1, 2))
        result = decisive.train_run(model, actor, weights, plan, seed=3, test_set=test_set)
        assert list(result["success"]) == ["1", "2"] and len(result["reward"]) == 2
        assert any((model.state_dict()[name] != w).any() for name, w in weights.items()) == bool(result["grad_norm"])
        norms.append(tuple(result["grad_norm"]))
    assert any(norms) and len(set(norms)) == 4


def test_power_comes_from_the_recorded_noise():
    """A baseline of three arms and the residuals of seven see more than five pairs of seeds would."""
    rows = {(row[0], row[2]): row for row in report.seeing()[1:]}
    sd, seen = (float(x) for x in rows["countdown", "last quarter"][3:])
    assert 2 < sd < 4
    error = sd / 2**0.5 * (1 / 5 + 1 / 15) ** 0.5  # of five runs less fifteen
    assert seen == pytest.approx(2.9 * error, rel=0.1)  # 80 % power at 26 degrees of freedom
    assert seen < stats.smallest_seen(sd / 5**0.5, 4)
