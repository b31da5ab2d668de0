"""Metrics: each step exactly once in the file, standard JSON, one transfer from the device."""

import io
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batch import Mean
from rlhf_jax.metrics import MetricWriter, Progress, format_number, to_host, write_samples


def records(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps(run_dir, stage):
    return [record["step"] for record in records(run_dir) if record["stage"] == stage]


def write(run_dir, stage, start, stop):
    with MetricWriter(run_dir, stage, tensorboard=False) as writer:
        writer.resume(start)
        for step in range(start, stop):
            writer.write(step, {"policy/kl": float(step)})


def test_to_host_divides_means_and_fetches_once(monkeypatch):
    transfers = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: transfers.append(tree) or device_get(tree))
    metrics = {
        "loss/total": Mean(jnp.float32(3.0), jnp.float32(4.0)),
        "loss/unseen": Mean(jnp.float32(0.0), jnp.float32(0.0)),
        "optim/grad_norm": jnp.float32(0.5),
        "perf/tokens_per_s": 1200.0,
    }
    found = to_host(metrics)
    assert np.isnan(found.pop("loss/unseen"))  # nothing was counted: 0 would look like a figure
    assert found == {
        "loss/total": 0.75,
        "optim/grad_norm": 0.5,
        "perf/tokens_per_s": 1200.0,
    }
    assert len(transfers) == 1


def test_a_line_has_stage_step_time_and_the_metrics(tmp_path):
    write(tmp_path, "ppo", 0, 2)
    first = records(tmp_path)[0]
    assert first.pop("time") > 1.7e9
    assert first == {"stage": "ppo", "step": 0, "policy/kl": 0.0}


def test_a_line_is_in_the_file_before_the_writer_is_closed(tmp_path):
    writer = MetricWriter(tmp_path, "sft", tensorboard=False)
    writer.resume(0)
    writer.write(0, {})
    assert steps(tmp_path, "sft") == [0]
    writer.close()


def test_a_step_is_written_once(tmp_path):
    with MetricWriter(tmp_path, "sft", tensorboard=False) as writer:
        writer.resume(3)
        writer.write(3, {})
        writer.write(5, {})
        for repeated in (5, 4, 2):
            with pytest.raises(ValueError, match=f"metrics of step {repeated} come after those of step 5"):
                writer.write(repeated, {})
    assert steps(tmp_path, "sft") == [3, 5]


def test_resume_drops_later_lines_of_this_stage_only(tmp_path):
    write(tmp_path, "sft", 0, 4)
    write(tmp_path, "ppo", 0, 4)
    write(tmp_path, "ppo", 2, 5)
    assert steps(tmp_path, "sft") == [0, 1, 2, 3]
    assert steps(tmp_path, "ppo") == [0, 1, 2, 3, 4]


def test_a_line_torn_by_a_kill_is_dropped(tmp_path, caplog):
    write(tmp_path, "sft", 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-12])
    with caplog.at_level(logging.WARNING, "rlhf_jax"):
        write(tmp_path, "sft", 2, 4)
    assert "metrics.jsonl:3: dropped" in caplog.text
    assert steps(tmp_path, "sft") == [0, 1, 2, 3]


def test_a_line_torn_just_before_its_line_break_is_whole(tmp_path):
    write(tmp_path, "sft", 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-1])
    write(tmp_path, "sft", 3, 5)
    assert steps(tmp_path, "sft") == [0, 1, 2, 3, 4]


def test_not_finite_is_null_and_said_once(tmp_path, caplog):
    with (
        MetricWriter(tmp_path, "ppo", tensorboard=False) as writer,
        caplog.at_level(logging.WARNING, "rlhf_jax"),
    ):
        writer.resume(0)
        writer.write(0, {"policy/kl": float("nan"), "loss/value": float("-inf"), "reward/score": 1.0})
        writer.write(1, {"policy/kl": float("inf")})
    first, second = records(tmp_path)
    assert (first["policy/kl"], first["loss/value"], first["reward/score"]) == (None, None, 1.0)
    assert second["policy/kl"] is None
    assert len(caplog.records) == 2
    assert "policy/kl is nan at step 0 of ppo" in caplog.text


def test_tensorboard_files_are_written_on_request(tmp_path):
    with MetricWriter(tmp_path, "sft", tensorboard=True) as writer:
        writer.resume(0)
        writer.write(0, {"loss/total": 1.0})
    (events,) = (tmp_path / "tensorboard" / "sft").iterdir()
    assert b"loss/total" in events.read_bytes()


def test_tensorboard_without_its_package_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ValueError, match="pip install tensorboardX"):
        MetricWriter(tmp_path, "sft", tensorboard=True)


def test_samples_are_replaced_on_resume(tmp_path):
    row = {"prompt": "Ä\n", "completion": "b", "score": np.float32(0.5)}
    write_samples(tmp_path, "ppo", 12, [row, row])
    path = write_samples(tmp_path, "ppo", 12, [row | {"score": float("nan")}])
    assert path == tmp_path / "samples" / "ppo-000012.jsonl"
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {"stage": "ppo", "step": 12, "prompt": "Ä\n", "completion": "b", "score": None}
    assert [file.name for file in path.parent.iterdir()] == ["ppo-000012.jsonl"]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_plain_progress_lines_leave_out_the_first_step_from_the_rate(monkeypatch):
    now = Clock()
    monkeypatch.setattr("rlhf_jax.metrics.time.monotonic", now)
    file = io.StringIO()
    with Progress("ppo", total=100, start=17, log_every=10, file=file) as progress:
        now.now += 60.0  # compilation
        for step in range(18, 101):
            progress.update(step, {"reward/score": 1.324, "kl": 3.1, "state": "ok"})
            now.now += 1.5
    lines = file.getvalue().splitlines()
    assert lines[0] == "[ppo 18/100] score 1.32  kl 3.1  state ok"
    assert lines[1] == "[ppo 20/100] score 1.32  kl 3.1  state ok  1.5 s/step  2:00 left"
    assert lines[-1].startswith("[ppo 100/100]") and lines[-1].endswith("0:00 left")
    assert len(lines) == 1 + 9


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    file = Terminal()
    with Progress("ppo", total=4, start=1, log_every=1, file=file) as progress:
        progress.update(2, {"score": 1.5})
    assert "2/4" in file.getvalue() and "score 1.5" in file.getvalue()
    assert "[ppo" not in file.getvalue()


@pytest.mark.parametrize(
    "value, text",
    [
        (1.324, "1.32"),
        (0.98, "0.98"),
        (3.0, "3"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (2e-6, "2e-06"),
        ("x", "x"),
    ],
)
def test_format_number(value, text):
    assert format_number(value) == text


def test_figures_that_come_late_join_their_line(tmp_path):
    """The judge of the last step's evaluation failed, and the command was repeated."""
    write(tmp_path, "sft", 0, 4)
    with MetricWriter(tmp_path, "sft", tensorboard=False) as writer:
        writer.resume(4)
        writer.amend(3, {"eval/gold": 2.0})
        writer.write(4, {})
    assert steps(tmp_path, "sft") == [0, 1, 2, 3, 4]
    line = records(tmp_path)[3]
    assert (line["policy/kl"], line["eval/gold"]) == (3.0, 2.0)
    assert "eval/gold" not in records(tmp_path)[2]


def test_a_line_that_is_amended_is_never_gone(tmp_path, monkeypatch):
    write(tmp_path, "sft", 0, 4)
    with MetricWriter(tmp_path, "sft", tensorboard=False) as writer:
        writer.resume(4)
        monkeypatch.setattr(writer, "resume", lambda step: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # killed as soon as the file is replaced
            writer.amend(3, {"eval/gold": 2.0})
    assert (records(tmp_path)[3]["policy/kl"], records(tmp_path)[3]["eval/gold"]) == (3.0, 2.0)
