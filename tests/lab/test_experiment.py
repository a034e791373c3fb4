"""The experiment's table: what is known of made-up records is what it says; and the arms are runs that could start."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import HfArgumentParser

import train
from lab import experiment, variants
from node import prepare
from node.settings import TINY, fill_defaults


def write(folder, arm, seed, curve):
    args = experiment.Args(folder=str(folder))
    path = experiment.record_of(args, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"step": 3 * i, "success": s} for i, s in enumerate(curve)] + [{"step": 1, "reward": 0.3}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return args


def test_differences_are_paired_by_seed(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for seed in range(5):
        base = 0.3 + 0.3 * rng.random(5)  # seeds differ much more than arms do
        for arm, more in (("uniform", 0.0), ("scaled", 0.0), ("coupled", 0.03 + 0.002 * (seed - 2))):
            args = write(tmp_path, arm, seed, base + more)
    found = experiment.curves(args)
    gap, seeds = experiment.difference(found["coupled"], found["uniform"])
    assert seeds == 5 and gap[0, 0] == pytest.approx(3.0) and 2.5 < gap[0, 1] < 3 < gap[0, 2] < 3.5
    assert (experiment.difference(found["scaled"], found["uniform"])[0][:, :3] == 0).all()
    args.report = True
    experiment.main(args)
    first = (tmp_path / "countdown.md").read_bytes()
    experiment.main(args)
    assert first == (tmp_path / "countdown.md").read_bytes() and (tmp_path / "countdown.png").exists()
    row = next(line for line in first.decode().splitlines() if line.startswith("| coupled"))
    assert "+3.0 (+2.8 to +3.2)*" in row and "15 runs" in capsys.readouterr().out


def test_every_arm_is_a_run_that_could_start_and_differs_in_gamma_alone():
    parser = HfArgumentParser((variants.Args, train.Args))
    allowed = {"variant", "credit", "lowest", "q", "sign", "all_heads", "on_produced"}
    for setting, (shared, arms, _) in experiment.SETTINGS.items():
        plain = parser.parse_args_into_dataclasses(shared.split())
        for arm, flags in arms.items():
            both = parser.parse_args_into_dataclasses([*shared.split(), *flags])
            prepare.check_args(fill_defaults(both[1], train.DEFAULTS, TINY)[0])
            changed = {
                name for a, b in zip(both, plain) for name, value in vars(a).items() if value != getattr(b, name)
            }
            assert changed <= allowed | ({"lr"} if "study" in setting else set())
            assert ("--variant" in flags) == (arm in experiment.VARIANTS), "these are runs of lab.variants"
        paths = {experiment.record_of(experiment.Args(setting), arm, 0) for arm in arms}
        assert len(paths) == len(arms)


def test_the_committed_tables_come_from_the_committed_records():
    """Byte for byte, and every arm has the seeds that the protocol asks for."""
    for setting, (_, arms, seeds) in experiment.SETTINGS.items():
        found, rewards = (experiment.curves(experiment.Args(setting), what) for what in ("success", "reward"))
        assert experiment.table(found, rewards) + "\n" == Path(f"lab/records/{setting}.md").read_text()
        if "study" not in setting:
            assert {a: list(found[a]) for a in arms} == {a: list(range(seeds)) for a in arms}


def test_bad_arguments_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="--arms anchor: choose from uniform"):
        experiment.main(experiment.Args(arms=["anchor"]))
    with pytest.raises(SystemExit, match="no records are there"):
        experiment.main(experiment.Args(folder=str(tmp_path), report=True))
