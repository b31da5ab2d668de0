"""Stages planned without data: rows of the greatest lengths that the options allow."""

import contextlib
import json
from pathlib import Path

import jax
import pytest

from rlhf_jax.command_line import read_config
from rlhf_jax.data.loader import Loader
from rlhf_jax.mesh_checks import check_mesh
from rlhf_jax.programs import rows_per_unit
from rlhf_jax.shape_plan import shape_plans
from tests import tiny, tiny_hub
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs" / "smoke").glob("*.yaml"))


def plans_of(path: Path, *flags: str):
    return shape_plans(read_config(["--config", str(path), "--run.dir", "unused", *flags], runs=False))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_batches_have_the_rows_and_lengths_of_the_options(path: Path):
    for plan in plans_of(path):
        stage = plan.stage
        batch, _ = Loader(plan.train, stage.settings.batch_size, 0).batch(0)
        rows, length = jax.tree.leaves(batch)[0].shape
        assert rows == stage.settings.batch_size * rows_per_unit(stage, plan.algorithm)
        per_row = plan.train.rows_together if stage.data.packing else 1
        assert length == (
            stage.data.max_prompt_length if stage.is_online else per_row * stage.data.max_length
        )
        assert plan.row_counts()["batch_size"] == rows


def test_of_a_model_its_configuration_is_enough(tmp_path: Path):
    """No weights and no tokenizer lie there; the stages share the architecture."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_hub.SMALL | tiny_hub.LLAMA | {"vocab_size": 777}))
    path = ROOT / "configs" / "ppo_pythia-1b_tldr.yaml"
    plans = plans_of(path, "--model.path", str(tmp_path), "--tokenizer.path", str(tmp_path))
    assert {plan.architecture.vocab_size for plan in plans} == {777}
    assert [plan.train.length for plan in plans] == [
        plan.stage.data.max_prompt_length if plan.stage.is_online else plan.stage.data.max_length
        for plan in plans
    ]


@pytest.mark.parametrize("batch_size", [8, 16])
def test_packed_rows_of_what_is_only_scored_divide_over_the_mesh_as_well(batch_size: int):
    """Of 24 samples 16 are learned: 8 packed rows, but 12 are scored."""
    sizes = {"batch_size": batch_size, "group_size": 3, "num_kept": 2, "sequences_per_row": 2}
    flags = [text for name, size in sizes.items() for text in (f"--raft.{name}", str(size))]
    plans = plans_of(ROOT / "configs" / "smoke" / "raft.yaml", "--mesh.data", "-1", *flags)
    told = r"^raft\.batch_size \* group_size / sequences_per_row is 12; it must be a multiple of 8"
    with pytest.raises(ValueError, match=told) if batch_size == 8 else contextlib.nullcontext():
        check_mesh(plans, tiny.mesh(data=8))


def test_rows_that_do_not_fit_a_model_are_told(tmp_path: Path):
    path = ROOT / "configs" / "ppo_qwen2.5-1.5b_gsm8k.yaml"
    flags = ("--model.path", str(tmp_path), "--tokenizer.path", str(tmp_path))
    short = tiny_hub.SMALL | tiny_hub.QWEN | {"max_position_embeddings": 300}
    (tmp_path / "config.json").write_text(json.dumps(short))
    with pytest.raises(ValueError, match=r"^stage sft: rows of up to 512 tokens do not fit"):
        plans_of(path, *flags)
