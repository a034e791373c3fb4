"""The bench prints what the README shows."""

import pytest

from examples import bench


def test_one_layer(capsys):
    bench.main(bench.Args(table="layer", lengths=[300, 600], repeats=1, maps_to=400))
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-2].startswith("| 300 |") and lines[-1].endswith("| not run |")


def test_too_short():
    with pytest.raises(SystemExit, match="--lengths"):
        bench.main(bench.Args(lengths=[8]))
