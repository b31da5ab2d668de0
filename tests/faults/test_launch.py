"""A rehearsal: the launcher's own scripts run a real training in two processes, one of which is preempted."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.fake_cloud import Cloud
from tests.smoke.test_quickstart import SHORT

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def cloud(tmp_path):
    """Returns one whose slices have two hosts, both on this machine, with one CPU device each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cloud = Cloud(tmp_path / "cloud")
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "HF_HUB_OFFLINE")
    env = {name: os.environ[name] for name in names if name in os.environ} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "RLHF_JAX_COORDINATOR": f"localhost:{port}",
        "RLHF_JAX_NUM_PROCESSES": "2",
        "RLHF_JAX_PROCESS_ID": "{index}",
    }
    cloud.install(2, tmp_path / "bin", env)
    yield cloud
    cloud.remove_all()


def repository(directory):
    """Returns a repository with this code, and the quickstart cut short as a configuration."""
    for part in ("rlhf_jax", "launch", "requirements.txt", ".python-version"):
        subprocess.run(["cp", "-R", ROOT / part, directory], check=True)
    config = directory / "configs" / "short.yaml"
    config.parent.mkdir()
    config.write_text(SHORT.format(dir="unused"))
    (directory / ".gitignore").write_text("__pycache__\n")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        git = ["git", "-C", directory, "-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run([*git, *words], check=True)
    return directory


def test_a_run_survives_that_one_of_its_hosts_is_taken_away(tmp_path, cloud):
    """In the reward stage: what its SFT stage was is not trained again, and each step is logged once."""
    (tmp_path / "repository").mkdir()
    root = repository(tmp_path / "repository")
    run = tmp_path / "shared" / "run"
    settings = {
        "NAME": "rehearsal", "PROJECT": "my-project", "ZONE": "us-east5-b", "ACCELERATOR": "v5p-16",
        "CONFIG": "configs/short.yaml", "RUN_DIR": run, "VENV": sys.prefix,
        "TRAIN_FLAGS": "--checkpoint.every 1 --reward_model.num_steps 25 --distributed.heartbeat_timeout 20",
        "POLL_SECONDS": "1", "RESTART_SECONDS": "1", "TEARDOWN_WHEN_DONE": "yes",
    }  # fmt: skip
    path = tmp_path / "settings.env"
    path.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        watching = subprocess.Popen(
            ["bash", root / "launch" / "tpu.sh", "--settings", path, "watch"],
            env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    manifests = run / "reward" / "checkpoints"
    wait_until(lambda: len(list(manifests.glob("*/manifest.json"))) >= 1, watching, output, cloud)
    assert len(cloud.processes("rehearsal-w-1")) >= 2  # supervisor and trainer
    sft_done = (run / "sft" / "result.json").stat().st_mtime_ns
    cloud.preempt("rehearsal", worker=1)
    wait_until(lambda: watching.poll() is not None, None, output, cloud)
    text = output.read_text()
    assert watching.returncode == 0, told(output, cloud)

    assert "not running: queued resource ACTIVE, rehearsal PREEMPTED" in text
    verbs = [call[3] for call in cloud.calls("queued-resources") if call[3] in ("create", "delete")]
    assert verbs == ["create", "delete", "create", "delete"]
    assert (run / "sft" / "result.json").stat().st_mtime_ns == sft_done
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counts = Counter((line["stage"], line["step"]) for line in lines)
    assert counts == Counter(
        {("sft", s) for s in range(7)} | {("reward", s) for s in range(26)} | {("ppo", s) for s in range(5)}
    )
    logs = "".join(log.read_text() for log in (tmp_path / "shared" / "run.logs").glob("*.log"))
    assert re.search(r"\[reward\] goes on after step \d+\n", logs)
    assert (run / "summary.json").is_file() and (run / "export").is_dir()


def wait_until(condition, process, output, cloud):
    deadline = time.monotonic() + 500
    while not condition():
        assert process is None or process.poll() is None, told(output, cloud)
        assert time.monotonic() < deadline, told(output, cloud)
        time.sleep(0.1)


def told(output, cloud):
    logs = "".join(f"--- {log}\n{log.read_text()[-4000:]}" for log in cloud.hosts.glob("*/rlhf_jax/*/log"))
    return output.read_text()[-6000:] + logs
