"""The same chain on one and eight devices: every logged figure of SFT, reward and PPO's first iterations."""

import json

import pytest

from tests.smoke.test_quickstart import SHORT

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4


def figures(run, stage):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keep = lambda name: not name.startswith("perf/") and name not in ("time", "stage")  # noqa: E731
    return [{name: x for name, x in row.items() if keep(name)} for row in rows if row["stage"] == stage]


def assert_close(found, expected):
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert a[name] == pytest.approx(value, abs=TOLERANCE * max(1, abs(value))), (name, b["step"])


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_one_device_and_eight(run_train, tmp_path, mesh):
    config = tmp_path / "short.yaml"
    config.write_text(SHORT.format(dir=tmp_path / "one").replace("num_kv_heads: 1", "num_kv_heads: 2"))
    flags = [flag for axis, size in mesh.items() for flag in (f"--mesh.{axis}", str(size))]
    one = run_train(["--config", config])
    assert one.returncode == 0, one.stderr
    eight = run_train(
        ["--config", config, "--run.dir", tmp_path / "eight", *flags], env={"JAX_NUM_CPU_DEVICES": "8"}
    )
    assert eight.returncode == 0, eight.stderr
    for stage in ("sft", "reward"):
        assert_close(figures(tmp_path / "eight", stage), figures(tmp_path / "one", stage))


def test_ppo_from_the_same_models(run_train, tmp_path):
    config = tmp_path / "short.yaml"
    config.write_text(SHORT.format(dir=tmp_path / "chain"))
    chain = run_train(["--config", config])
    assert chain.returncode == 0, chain.stderr
    lines = SHORT.splitlines(keepends=True)
    sft, reward = tmp_path / "chain" / "sft", tmp_path / "chain" / "reward"
    start = f"  - {{{{name: ppo, algorithm: ppo, from: {sft}, reward_from: {reward}}}}}\n"
    own = ("model:", "tokenizer:", "sft:", "reward_model:", "  - {{name: sft", "  - {{name: reward")
    text = "".join(start if "name: ppo" in line else line for line in lines if not line.startswith(own))
    text = text.replace("max_length: 96, ", "")  # of sft and reward training alone
    for name, devices in (("one", "1"), ("eight", "8")):
        (tmp_path / f"{name}.yaml").write_text(text.format(dir=tmp_path / name))
        flags = ["--config", tmp_path / f"{name}.yaml", "--ppo.num_iterations", "3"]
        done = run_train(flags, env={"JAX_NUM_CPU_DEVICES": devices})
        assert done.returncode == 0, done.stderr
    assert_close(figures(tmp_path / "eight", "ppo"), figures(tmp_path / "one", "ppo"))
