"""Whether a directory is a run's of this configuration: what may differ, and what is told of the rest."""

import pytest

from rlhf_jax.command_line import read_config
from rlhf_jax.config_file import dump_config
from tests.configurations import CHAIN


def test_a_run_directory_belongs_to_one_configuration(write, problems, tmp_path):
    cfg = read_config(["--config", write(CHAIN)])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_config(cfg))
    assert problems(CHAIN) == []
    may_differ = [
        "--mesh.fsdp=2",
        "--checkpoint.every=7",
        "--stages.ppo.checkpoint.keep=9",
        "--run.log_every=1",
        "--run.profile_steps=1-2",
        "--run.compilation_cache=cache",
        "--model.remat=full",
        "--model.unroll=2",
        "--model.attention=xla",
        "--model.logprob_chunk=64",
        "--ppo.sequences_per_row=2",
        "--ppo.length_buckets=2",
        "--ppo.microbatch_size=4",
        "--rollout.slots=8",
        "--rollout.refill_size=2",
        "--rollout.steps_per_call=4",
    ]
    assert problems(CHAIN, *may_differ, "--run.tensorboard=true", "--run.num_samples=0") == []
    with pytest.raises(SystemExit):  # what only shows a configuration runs into no directory
        read_config(["--config", write(CHAIN), "--ppo.clip_eps=0.1", "--print_config"])
    (found,) = problems(CHAIN, "--ppo.clip_eps", "0.1", "--run.seed=4")
    assert found == (
        f"run.dir: {str(tmp_path / 'run')!r} belongs to a run of another configuration: run.seed was 0, "
        "is 4; stages.ppo.ppo.clip_eps was 0.2, is 0.1; choose another run.dir, or the configuration that "
        "it was started with to resume it"
    )
    (found,) = problems(CHAIN, "--stages.sft.data.length_buckets=4")  # which reorders records
    assert "another configuration: stages.sft.data.length_buckets was 1, is 4; choose" in found
    fewer = CHAIN.replace("  - {name: ppo, algorithm: ppo, from: sft, reward_from: reward}\n", "")
    assert "stages.ppo.from was 'sft', is null" in problems(fewer)[0]
    saved = tmp_path / "run" / "config.yaml"
    older = saved.read_text().replace("    devices: 0\n", "").replace("    sequences_per_row: 1\n", "")
    assert older != saved.read_text()
    saved.write_text(older)  # of a run that began before there were these options
    assert problems(CHAIN) == []
    assert "stages.ppo.rollout.devices was 0, is 2" in problems(CHAIN, "--rollout.devices=2")[0]
    saved.write_text("a: 1\na: 2\n")
    assert problems(CHAIN)[0].endswith("config.yaml:2: key 'a' is given twice; choose another run.dir")


@pytest.mark.parametrize("content", [b"hello\n", b"[a, b]\n", b"", b"\xff\xfe", b"run: 5\n", b"a: {b: 1}\n"])
def test_a_run_directory_whose_file_is_no_runs_configuration(problems, tmp_path, content):
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "config.yaml"
    file.write_bytes(content)
    assert problems(CHAIN) == [f"run.dir: {str(file)!r} is no run's configuration; choose another run.dir"]


def test_a_run_directory_that_is_a_file(problems, tmp_path):
    (tmp_path / "run").touch()
    assert problems(CHAIN) == [f"run.dir: {str(tmp_path / 'run')!r} is not a directory"]
