"""Leaves out the long part of the architecture tests unless it is asked for."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `-m` (or an explicit test id) only the sample of architectures runs."""
    if config.getoption("markexpr") or any("::" in argument for argument in config.args):
        return
    long = [item for item in items if item.get_closest_marker("architectures")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in set(long)]
