"""The arms are runs that could start; the measures; and every arm has the runs that the protocol asks for."""

import json

import numpy as np
import pytest
from transformers import HfArgumentParser

import train
from lab import arms, experiment
from node import prepare
from node.settings import TINY, fill_defaults


def test_every_arm_is_a_run_that_could_start_and_differs_in_gamma_alone():
    allowed = {"credit", "lowest", "q", "sign", "all_heads", "on_produced"}
    for setting, (shared, names, _) in experiment.SETTINGS.items():
        (plain,) = HfArgumentParser(train.Args).parse_args_into_dataclasses(shared.split())
        for name in names:
            settings = arms.ARMS[name].settings
            prepare.check_args(fill_defaults(train.Args(**{**vars(plain), **settings}), train.DEFAULTS, TINY)[0])
            assert settings.keys() <= allowed | ({"lr"} if "study" in setting else set())
        paths = {experiment.record_of("lab/records", setting, name, 0) for name in names}
        assert len(paths) == len(names)


def test_every_arm_has_the_seeds_that_the_protocol_asks_for():
    there = {(setting, run.arm, run.seed) for setting in experiment.SETTINGS for run in experiment.read(setting)}
    asked = {(s, arm, seed) for s, (_, names, n) in experiment.SETTINGS.items() for arm in names for seed in range(n)}
    assert asked - there == experiment.MISSING and there <= asked


def test_a_run_is_read_as_it_was_written(tmp_path):
    file = experiment.record_of(str(tmp_path), "countdown", "coupled, q 0.2", 3)
    file.parent.mkdir()
    lines = [{"step": 0, "success": 0.2}, {"step": 1, "reward": 0.3}, {"step": 4, "reward": 0.4, "success": 0.6}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = experiment.read("countdown", str(tmp_path))
    assert run[:2] == ("coupled, q 0.2", 3) and run.success.tolist() == [[0, 0.2], [4, 0.6]]
    assert experiment.area(run.success) == pytest.approx(40.0) and experiment.last_quarter(run.success) == 60.0
    (early,) = experiment.read("countdown", str(tmp_path), last=2)
    assert early.reward.tolist() == [[1, 0.3]] and len(early.success) == 1
    assert np.isclose(experiment.area(np.array([(0, 0.2), (10, 0.4)])), 30)
