"""Files and directories are whole or absent; JSON is what every reader accepts."""

import pytest

from rlhf_jax.files import new_directory, to_json


def test_a_directory_appears_when_it_is_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "run" / "made") as unfinished:
        (unfinished / "half").write_text("")
        raise KeyboardInterrupt
    assert not (tmp_path / "run" / "made").exists()
    with new_directory(tmp_path / "run" / "made") as unfinished:
        assert not any(unfinished.iterdir())
        (unfinished / "whole").write_text("")
        assert not (tmp_path / "run" / "made").exists()
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["made", "whole"]


def test_numbers_that_are_not_finite_are_null():
    assert to_json({"a": float("nan"), "b": [float("inf"), 1.5]}) == '{"a": null, "b": [null, 1.5]}'
