"""Configuration files for tests, and what is said of them."""

from __future__ import annotations

import pytest

from rlhf_jax.command_line import ConfigError, read_config


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes a configuration file with RUN replaced, and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text.replace("RUN", str(tmp_path / "run")))
        return str(path)

    return write


@pytest.fixture
def problems(write):
    """Returns a function that gives the problems of a file's text and flags; none for a good one."""

    def problems(text: str, *flags: str) -> list[str]:
        try:
            read_config(["--config", write(text), *flags])
        except ConfigError as error:
            return error.problems
        return []

    return problems
