"""The tables come from the committed records, and every interval in a text occurs in a record."""

import re
from pathlib import Path

import numpy as np
import pytest

from lab import decisive, report, stats

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


def run_of(arm, seed, area):
    return {"arm": arm, "seed": seed, "area": area, "step 10": 2 * area}


@pytest.mark.parametrize(
    "gain, control, says",
    [(1.0, 2.0, "Gains"), (-1.0, 2.0, "Loses"), (0.0, 2.0, "No gain of 0."), (1.0, 0.0, "Unable to see")],
)
def test_the_decisive_experiment_is_called_as_its_protocol_says(gain, control, says, monkeypatch):
    rng = np.random.default_rng(0)
    more = {"uniform": 0.0, "coupled": gain, "coupled, gamma 4, q 0.2": 0.0, "uniform, minibatches of 32": control}
    planned = {arm: (20, {}) for arm in more}
    runs = [run_of(arm, s, 40 + m + 0.3 * rng.normal()) for arm, m in more.items() for s in range(20)]
    monkeypatch.setattr(decisive, "ARMS", planned)
    monkeypatch.setattr(decisive, "read_runs", lambda: runs)
    assert decisive.report().startswith(says)
    monkeypatch.setattr(decisive, "read_runs", lambda: runs[:-1])
    assert decisive.report().startswith(f"UNFINISHED: 79 of 80 runs are there. As far as they go: {says}")
    monkeypatch.setattr(decisive, "read_runs", lambda: runs[:23])
    assert "Too few runs" in decisive.report()


def test_power_comes_from_the_recorded_noise():
    rows = {(row[0], row[2]): row for row in report.seeing()[1:]}
    sd, seeds = float(rows["countdown", "last quarter"][3]), int(rows["countdown", "last quarter"][1])
    assert 2 < sd < 4 and seeds == 5
    assert stats.smallest_seen(sd, seeds) == pytest.approx(float(rows["countdown", "last quarter"][5]), abs=0.2)
