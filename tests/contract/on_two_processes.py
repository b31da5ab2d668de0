"""What single parts do where there are two processes; test_processes.py starts it on two devices each."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rlhf_jax.agreement import check_alike, exchanged, on_first, together
from rlhf_jax.checkpoint import Checkpointer
from rlhf_jax.config import DistributedConfig, MeshConfig
from rlhf_jax.data.collate import Row
from rlhf_jax.data.examples import Examples
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.records import PromptOnly
from rlhf_jax.data.token_rows import token_rows
from rlhf_jax.distributed import initialize, process_id
from rlhf_jax.models import hf, tensor_files
from rlhf_jax.programs import reward_program
from rlhf_jax.rewards.external import ExternalReward, RewardReader
from rlhf_jax.rewards.functions import RewardError, RewardFunction
from rlhf_jax.rewards.once import scored_once
from rlhf_jax.sharding import gathered, make_mesh, param_shardings, place_rows, row_holders
from tests import tiny


def check_what_processes_tell_each_other():
    rank = process_id()
    assert exchanged({"rank": rank, "text": rank * 1000 * "x"}) == [
        {"rank": 0, "text": ""},
        {"rank": 1, "text": 1000 * "x"},
    ]
    assert on_first(process_id) == 0
    assert together(process_id) == rank

    def fail(*ranks):
        if rank in ranks:
            raise ValueError(f"{rank} says no")

    with pytest.raises(ValueError, match="0 says no"):
        on_first(lambda: fail(0))
    for ranks in ((0,), (1,), (0, 1)):
        with pytest.raises(ValueError, match=f"{ranks[0]} says no"):
            together(lambda ranks=ranks: fail(*ranks))
    on_first(lambda: fail(1))
    check_alike("these", lambda: {"a": 1})
    with pytest.raises(ValueError, match="these are not the same on process 0 and on 1"):
        check_alike("these", process_id)
    with pytest.raises(ValueError, match=r"these are not .* on 1: b \(0, 1\), c \(missing, 3\); give all"):
        check_alike("these", lambda: {"a": 0, "b": rank} | ({"c": 3} if rank else {}))


def check_batches():
    """Each process has the tokens of its rows; together they are the batch of one process."""
    rng = np.random.default_rng(0)
    rows = [Row(rng.integers(1, 60, size=rng.integers(2, 9)).tolist(), 1) for _ in range(40)]
    rows[7] = rows[7]._replace(excluded=((1, 2),))
    common = {"formats": (), "length": 8, "pad_id": 0, "num_dropped": 0, "num_cut": 0}
    common |= {"longest_row": 8, "longest_prompt": 1, "rows": token_rows(rows)}
    mesh = make_mesh(MeshConfig(data=4))
    pairs = Examples(kind="preference", records=[PromptOnly("")] * 20, **common)  # type: ignore[arg-type]
    texts = Examples(kind="prompt_completion", records=[PromptOnly("")] * 40, **common)  # type: ignore[arg-type]
    for of in (pairs, texts, texts.packed(16)):
        whole, own = Loader(of, 8, 3).batch(8)[0], Loader(of, 8, 3, mesh).batch(8)[0]
        is_held = row_holders(mesh, len(whole.tokens))[process_id()]
        assert is_held.sum() == len(whole.tokens) // 2
        np.testing.assert_array_equal(own.tokens[is_held], whole.tokens[is_held])
        assert not own.tokens[~is_held].any() and whole.tokens[~is_held].any()
        placed = gathered(place_rows(mesh, own))
        for found, expected in zip(jax.tree.leaves(placed), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(found, expected)


def check_holders():
    expected = {
        (2, 1, 2): [[1, 1, 0, 0], [0, 0, 1, 1]],
        (1, 2, 2): [[1, 1, 0, 0], [0, 0, 1, 1]],
        (1, 1, 4): [[1, 1, 1, 1], [1, 1, 1, 1]],
    }
    for (data, fsdp, tensor), rows in expected.items():
        mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
        np.testing.assert_array_equal(row_holders(mesh, 4), np.array(rows, bool))


def check_scores():
    """Every process gets all scores, filling rows aside; the first message of those that fail is raised."""
    rank, called = process_id(), []
    holders = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], bool)
    records = [PromptOnly(f"prompt {row}") for row in range(4)]

    def digits(prompts, completions, refused=()):
        called.append(completions)
        assert not set(refused) & set(completions), f"refused by {rank}"
        return [float(text) + 0.1 for text in completions]

    found = scored_once(RewardFunction("digits", digits), holders)(records, ["0", "1", "2", "3"])
    np.testing.assert_array_equal(found, np.float32([0.1, 1.1, 2.1, 3.1]))
    assert called == [[["0", "1", "2"], ["3"]][rank]]
    few = scored_once(RewardFunction("digits", digits), holders)(records[:2], ["0", "1"])
    np.testing.assert_array_equal(few, np.float32([0.1, 1.1]))
    assert len(called) == (2 if rank == 0 else 1)  # the other one had no row to score
    for refused, by in ((["3"], 1), (["0", "3"], 0)):
        refusing = RewardFunction(
            "digits", lambda prompts, completions, r=refused: digits(prompts, completions, r)
        )
        with pytest.raises(RewardError, match=f"refused by {by}"):
            scored_once(refusing, holders)(records, ["0", "1", "2", "3"])


def check_reward_model_of_its_own():
    """It is given the rows of all processes; its scores are those of one device."""
    mesh, alone = make_mesh(MeshConfig(data=4)), make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    rows = jax.device_get(tiny.rows(8))
    texts, records = [""] * 7, [PromptOnly("")] * 7
    reader = RewardReader(tokenizer=None, joins=False, bos_id=None, pad_id=None, context_length=48)
    scores = []
    for on in (mesh, alone):
        external = ExternalReward(reader, reward_program(tiny.model(), on), tiny.weights("reward", on), on)
        found, told = external(rows, records, texts, np.ones(7, bool))
        scores.append(gathered(found) if on is mesh else np.asarray(found))
        assert float(told["reward/cut_rate"].value) == 0
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-5)
    assert np.std(scores[0]) > 0


def check_saves(directory):
    """What one process cannot save, none has saved; what all have saved, the first has written about."""
    mesh = make_mesh(MeshConfig(fsdp=4))

    class Full(Checkpointer):
        def _finish(self, *args):
            step = super()._finish(*args)
            if process_id() == 1:
                raise OSError(28, "No space left on device")
            return step

    state = {"weights": tiny.weights("policy", mesh)}
    with Full(directory / "full", keep=2) as full:
        full.save(1, state, {})
        with pytest.raises(OSError, match="No space left"):
            full.wait()
    with Checkpointer(directory / "good", keep=1) as good:
        for step in (1, 2):
            good.save(step, state, {"step": step})
        assert good.latest() == 2 and good.info(2) == {"step": 2}
        with pytest.raises(ValueError, match="step 2 is already saved"):
            good.save(2, state, {})
        restored = good.restore(2, state)
    for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(gathered(found), gathered(expected))
    assert sorted(path.name for path in (directory / "good").iterdir()) == ["2"]


def check_model_files(directory):
    """A policy is written whole by the first process; each reads the bytes of its devices, and no others."""
    mesh = make_mesh(MeshConfig(fsdp=4))
    params = tiny.weights("policy", mesh)
    hf.save_policy(directory, tiny.ARCHITECTURE, params)
    on_first(lambda: None)  # all wait until it is written
    num_read, copy = [], tensor_files.copy_in_blocks

    def counting(out, values, release):
        num_read.append(values.nbytes)
        copy(out, values, release)

    tensor_files.copy_in_blocks = counting
    model = tiny.model()
    shardings = param_shardings(mesh, model.policy_axes, model.policy_shapes)
    loaded = hf.load_policy(directory, tiny.ARCHITECTURE, shardings)
    sharded = [leaf.nbytes for leaf in jax.tree.leaves(params) if not leaf.is_fully_replicated]
    whole = [leaf.nbytes for leaf in jax.tree.leaves(params) if leaf.is_fully_replicated]
    assert sum(num_read) == sum(sharded) // 2 + sum(whole) and sum(sharded) > 10 * sum(whole)
    for found, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(gathered(found), gathered(expected))


def main(directory: Path):
    initialize(DistributedConfig())
    check_what_processes_tell_each_other()
    check_holders()
    check_batches()
    check_scores()
    check_reward_model_of_its_own()
    check_saves(directory / "saves")
    check_model_files(directory / "model")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
