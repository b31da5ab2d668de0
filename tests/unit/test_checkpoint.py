"""Checkpoints: what is saved comes back, what is broken is passed over, what does not fit is explained."""

import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.errors import JaxRuntimeError
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint.experimental.v1._src.context import context

from rlhf_jax import checkpoint
from rlhf_jax.batch import TrainState
from rlhf_jax.checkpoint import (
    Checkpointer,
    CheckpointReader,
    load_aux,
    load_info,
    load_params,
    read_result,
    write_result,
)


def make_mesh(num_devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:num_devices]), ("fsdp",), axis_types=(AxisType.Auto,))


def make_state(mesh: Mesh, seed: int = 0) -> TrainState:
    key_kernel, key_head = jax.random.split(jax.random.key(seed))
    params = {
        "policy": {"trunk": {"layers": {"kernel": jax.random.normal(key_kernel, (16, 4))}}},
        "value": {"score_head": {"kernel": jax.random.normal(key_head, (8,)), "bias": jnp.zeros(())}},
    }
    optimizer = optax.adamw(optax.constant_schedule(1e-3), mu_dtype=jnp.float32)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        position=jnp.full((), 7, jnp.int32),
        params=params,
        opt_state={role: optimizer.init(tree) for role, tree in params.items()},
        aux={"kl_coef": jnp.full((), 0.05, jnp.float32), "mean": jnp.array([1.5, -2.0], jnp.float32)},
    )
    return jax.device_put(state, shardings(state, mesh))


def shardings(state: TrainState, mesh: Mesh) -> TrainState:
    def spec(leaf: jax.Array) -> NamedSharding:
        return NamedSharding(
            mesh, PartitionSpec("fsdp") if leaf.ndim and leaf.shape[0] % 8 == 0 else PartitionSpec()
        )

    return jax.tree.map(spec, state)


def abstract(state: TrainState, mesh: Mesh) -> TrainState:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(state, mesh),
    )


def assert_equal(actual: object, expected: object) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def save(directory: Path, *steps: int, keep: int = 9) -> TrainState:
    state = make_state(make_mesh(1))
    with Checkpointer(directory, keep=keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, state._replace(step=state.step + step), {"step": step})
    return state


def data_file(checkpoint: Path) -> Path:
    return max(
        (file for file in checkpoint.rglob("d/*") if file.is_file()), key=lambda file: file.stat().st_size
    )


@pytest.mark.parametrize("num_devices", [8, 1])
def test_a_state_saved_on_eight_devices_comes_back_on_either_mesh(tmp_path, num_devices):
    saved = make_state(make_mesh(8))
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        checkpointer.save(3, saved, {"seed": 1})
        assert checkpointer.latest() == 3
        target = abstract(saved, make_mesh(num_devices))
        restored = checkpointer.restore(3, target)
        assert checkpointer.info(3) == {"seed": 1}
    assert isinstance(restored, TrainState)
    assert_equal(restored, saved)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == wanted.sharding
        assert not leaf.weak_type


def test_buffers_may_be_donated_while_the_save_goes_on(tmp_path):
    state = make_state(make_mesh(1))
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, state, {})
        target = abstract(state, make_mesh(1))
        overwrite(state)
        assert_equal(checkpointer.restore(checkpointer.latest(), target), expected)


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 10, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "3"]


def test_no_checkpoint_is_none(tmp_path):
    assert CheckpointReader(tmp_path / "absent").latest() is None
    with pytest.raises(ValueError, match="no usable checkpoint of step 4"):
        CheckpointReader(tmp_path).info(4)


def flip_bit(checkpoint: Path) -> None:
    file = data_file(checkpoint)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "empty directory": lambda path: (shutil.rmtree(path), path.mkdir()),
    "killed before the manifest": lambda path: (path / "manifest.json").unlink(),
    "torn manifest": lambda path: os.truncate(path / "manifest.json", 40),
    "state gone": lambda path: shutil.rmtree(path / "state"),
    "truncated data": lambda path: os.truncate(data_file(path), 100),
    "missing data": lambda path: data_file(path).unlink(),
    "flipped bit": flip_bit,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_passed_over_loudly_and_can_be_saved_again(tmp_path, damage, caplog):
    state = save(tmp_path, 5, 6)
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()  # a save that was killed
    (tmp_path / "notes").mkdir()
    damage(tmp_path / "6")
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        with caplog.at_level(logging.WARNING, "rlhf_jax"):
            assert checkpointer.latest() == 5
        assert "CHECKPOINT NOT USABLE" in caplog.text and str(tmp_path / "6") in caplog.text
        checkpointer.save(6, state._replace(position=state.position + 1), {})
        assert checkpointer.latest() == 6
        assert checkpointer.restore(6, abstract(state, make_mesh(1))).position == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "6", "notes"]


def test_a_good_checkpoint_is_not_overwritten(tmp_path):
    state = save(tmp_path, 5)
    with (
        Checkpointer(tmp_path, keep=2) as checkpointer,
        pytest.raises(ValueError, match="step 5 is already saved"),
    ):
        checkpointer.save(5, state, {})


def test_an_error_in_the_background_reaches_the_caller(tmp_path, monkeypatch):
    state = make_state(make_mesh(1))
    checkpointer = Checkpointer(tmp_path, keep=2)

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("rlhf_jax.checkpoint.replace_file", full_disk)
    checkpointer.save(1, state, {})
    with pytest.raises(OSError, match="no space left"):
        checkpointer.save(2, state, {})
    checkpointer.close()


def test_a_save_may_take_as_long_as_was_asked_for(tmp_path, monkeypatch):
    """Orbax is given the time, also for processes that wait for each other, which it keeps in two places."""
    modules = (checkpoint.orbax_multihost, checkpoint.orbax_multihost_v1)
    for module in modules:
        assert module.coordination_timeout() == module._DEFAULT_BARRIER_TIMEOUT
        monkeypatch.setattr(module, "_DEFAULT_BARRIER_TIMEOUT", module._DEFAULT_BARRIER_TIMEOUT)
    seen, real = [], checkpoint.ocp.save_async

    def save_async(*args):
        seen.append(context.get_context().async_options.timeout_secs)
        return real(*args)

    monkeypatch.setattr(checkpoint.ocp, "save_async", save_async)
    with Checkpointer(tmp_path, keep=1, timeout=77) as checkpointer:
        checkpointer.save(1, make_state(make_mesh(1)), {})
    assert seen == [77] and [module.coordination_timeout() for module in modules] == [77, 77]


@pytest.mark.parametrize(
    "error", [TimeoutError("Overall save timeout exceeded."), JaxRuntimeError("DEADLINE_EXCEEDED: barrier")]
)
def test_a_save_that_takes_too_long_fails_and_names_the_option(tmp_path, monkeypatch, error):
    def result():
        raise error

    late = SimpleNamespace(result=result)
    monkeypatch.setattr(checkpoint.ocp, "save_async", lambda *args: late)
    checkpointer = Checkpointer(tmp_path, keep=1, timeout=1200)
    checkpointer.save(1, make_state(make_mesh(1)), {})
    with pytest.raises(OSError, match="not saved after 1200 s .distributed.save_timeout.*/1'"):
        checkpointer.close()


def test_a_mismatch_is_a_table_of_leaf_checkpoint_and_run(tmp_path):
    state = save(tmp_path, 1)
    target = abstract(state, make_mesh(1))
    kernel = target.params["policy"]["trunk"]["layers"]["kernel"]
    head = target.params["value"]["score_head"]
    other = {
        "policy": {"trunk": {"layers": {"kernel": kernel.update(shape=(16, 6))}}},
        "value": {"score_head": {"kernel": head["kernel"].update(dtype=jnp.bfloat16)}},
        "reward": {"bias": head["bias"]},
    }
    with pytest.raises(ValueError) as error:
        CheckpointReader(tmp_path).restore_subtree(1, "params", other)
    title, columns, *rows = str(error.value).splitlines()
    assert str(tmp_path / "1") in title
    assert [tuple(re.split("  +", row.strip())) for row in (columns, *rows)] == [
        ("leaf", "in the checkpoint", "in this run"),
        ("params/policy/trunk/layers/kernel", "float32[16, 4]", "float32[16, 6]"),
        ("params/reward/bias", "missing", "float32[]"),
        ("params/value/score_head/bias", "float32[]", "missing"),
        ("params/value/score_head/kernel", "float32[8]", "bfloat16[8]"),
    ]


def test_a_long_table_is_cut(tmp_path):
    mesh = make_mesh(1)
    tree = {f"leaf{index:02d}": jnp.zeros(()) for index in range(23)}
    tree = jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, {"a": tree}, {})
        checkpointer.wait()
        with pytest.raises(ValueError, match="and 3 more"):
            checkpointer.restore(1, {"a": {}})


def test_a_later_stage_reads_one_role_and_the_aux_arrays(tmp_path):
    state = save(tmp_path / "checkpoints", 1, 2)
    mesh = make_mesh(8)
    target = abstract(state, mesh).params["policy"]
    restored = load_params(tmp_path, "policy", target)
    assert_equal(restored, state.params["policy"])
    assert restored["trunk"]["layers"]["kernel"].sharding == NamedSharding(mesh, PartitionSpec("fsdp"))
    assert {name: value.tolist() for name, value in load_aux(tmp_path).items()} == {
        "kl_coef": pytest.approx(0.05),
        "mean": [1.5, -2.0],
    }
    assert load_info(tmp_path) == {"step": 2}
    with pytest.raises(ValueError, match="no parameters of role 'reward'; it has policy, value"):
        load_params(tmp_path, "reward", target)
    with pytest.raises(ValueError, match="run that stage first"):
        load_params(tmp_path / "other", "policy", target)


def test_a_single_leaf_is_a_subtree(tmp_path):
    state = save(tmp_path, 4)
    reader = CheckpointReader(tmp_path)
    assert reader.restore_subtree(4, "step", abstract(state, make_mesh(1)).step) == 4


SAVE_AND_REPORT = """
import sys, jax, jax.numpy as jnp
from rlhf_jax.checkpoint import Checkpointer
state = {"w": jax.random.normal(jax.random.key(0), (64, 1024, 1024))}  # 256 MB of noise: seconds to write
state = jax.device_put(state, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
checkpointer = Checkpointer(sys.argv[1], keep=1)
checkpointer.save(1, {"w": state["w"][0]}, {})
checkpointer.wait()
checkpointer.save(2, state, {})
print("saving", flush=True)
checkpointer.close()
print("saved", flush=True)
"""


def test_killed_during_a_save(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-c", SAVE_AND_REPORT, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout.readline() == "saving\n"
        while not any(tmp_path.glob("2.orbax-checkpoint-tmp/**/d/*")):  # until array data is being written
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        assert "saved" not in process.stdout.read()
    assert not (tmp_path / "2").exists()
    assert CheckpointReader(tmp_path).latest() == 1
    state = make_state(make_mesh(1))
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(2, state, {})
        assert checkpointer.latest() == 2
        assert_equal(checkpointer.restore(2, abstract(state, make_mesh(1))), state)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_result_marks_a_stage_as_done(tmp_path):
    assert read_result(tmp_path / "sft") is None
    write_result(tmp_path / "sft", 40, {"eval_perplexity_after": 3.5, "kl": float("nan")})
    assert read_result(tmp_path / "sft") == (40, {"eval_perplexity_after": 3.5, "kl": None})
    assert [path.name for path in (tmp_path / "sft").iterdir()] == ["result.json"]
    for text in ('{"a": ', "[]", '{"step": 1}'):
        (tmp_path / "sft" / "result.json").write_text(text)
        with pytest.raises(ValueError, match="result.json is no stage's result.*remove it"):
            read_result(tmp_path / "sft")


def test_an_older_checkpoint_is_not_taken_for_the_result(tmp_path):
    """It would be a model of less training, a reward model without its normaliser."""
    with Checkpointer(tmp_path / "reward" / "checkpoints", keep=2) as checkpointer:
        for step in (4, 5):
            checkpointer.save(step, {"aux": {"normalizer_mean": jnp.float32(step)}}, {})
    write_result(tmp_path / "reward", 5, {})
    assert load_aux(tmp_path / "reward") == {"normalizer_mean": 5}
    (tmp_path / "reward" / "checkpoints" / "5" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="last checkpoint of .*reward, step 5, is not usable.*step 4"):
        load_aux(tmp_path / "reward")
