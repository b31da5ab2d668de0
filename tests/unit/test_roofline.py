"""The least time of a step: operations and bytes against counts by hand."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest

from rlhf_jax import config, offline_config, online_config
from rlhf_jax.algos.registry import ALGORITHMS
from rlhf_jax.bench.harness import make_architecture, make_stage
from rlhf_jax.chips import CHIPS
from rlhf_jax.hlo import Collective
from rlhf_jax.models.row_attention import FLASH_LENGTH
from rlhf_jax.origins import Origins
from rlhf_jax.plan import Plan
from rlhf_jax.reward_origin import External
from rlhf_jax.rewards.external import RewardReader
from rlhf_jax.roofline import ModelOnChip, Work, layer_shapes, phase_works, phases_of
from rlhf_jax.shape_plan import blank_examples

ONE = dict.fromkeys(config.MeshConfig().sizes, 1)
TINY = make_architecture("tiny", 64)  # width 32, 2 layers, 4 heads of 8, 2 of keys, mlp 64, 512 words
BLOCKS = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)
HEAD = 32 * 512
ROWS, LENGTH = 8, 64


def sft(**options):
    return make_stage(
        "sft",
        settings=offline_config.SFTConfig(batch_size=ROWS),
        data=config.DataConfig(max_length=LENGTH),
        model=config.ModelConfig(**options),
    )


def planned(stage, architecture=TINY, *, has_reward=True):
    """Returns a plan whose reward model is like the policy."""
    return Plan(
        stage=stage,
        number=0,
        algorithm=ALGORITHMS[stage.algorithm],
        architecture=architecture,
        tokenizer=cast(Any, None),
        text={},
        train=blank_examples(stage),
        held_out=blank_examples(stage),
        demonstrations=None,
        functions={},
        gold=None,
        origins=Origins(None, Path("judge") if has_reward else None),
    )


def flops(stage, sizes=ONE, architecture=TINY):
    works = phase_works(planned(stage, architecture), ONE | dict(sizes), 0.0)
    return {name: work.flops for name, work in works.items()}


def attention(rows, length):
    """Returns the operations of the products with queries and scores, of which half are masked."""
    return 2 * rows * 2 * length * length * 32


def test_a_training_step_is_six_operations_for_each_weight_and_token():
    tokens = ROWS * LENGTH
    expected = 3 * (2 * (BLOCKS + HEAD) * tokens + attention(ROWS, LENGTH))
    assert flops(sft())["update"] == pytest.approx(expected)
    assert flops(sft(remat="full"))["update"] == pytest.approx(expected * 4 / 3)


def test_weights_that_are_frozen_have_no_gradient():
    """But queries, keys and values have theirs."""
    stage = dataclasses.replace(sft(), lora=config.LoraConfig(rank=4))
    expected = 2 * 2 * (BLOCKS + HEAD) * ROWS * LENGTH + 3 * attention(ROWS, LENGTH)
    assert flops(stage)["update"] == pytest.approx(expected)


@pytest.mark.parametrize("axis", ["data", "fsdp", "sequence", "tensor"])
def test_every_axis_divides_the_work(axis):
    assert flops(sft(), {axis: 2})["update"] == pytest.approx(flops(sft())["update"] / 2)


def test_a_step_of_ppo():
    """Each prompt once and each token by itself; four models judge; two learn, four times."""
    settings = online_config.PPOConfig(batch_size=ROWS, num_epochs=4, num_minibatches=2)
    stage = make_stage(
        "ppo",
        settings=settings,
        data=config.DataConfig(max_prompt_length=16),
        rollout=config.RolloutConfig(max_new_tokens=48),
    )
    found = flops(stage)
    trunk = 2 * BLOCKS * ROWS * 64 + attention(ROWS, 64)
    head = 2 * HEAD * ROWS * 48
    assert found["score"] == pytest.approx(4 * trunk + 2 * head)
    assert found["update"] == pytest.approx(4 * 3 * (2 * trunk + head))
    decoded = ROWS * 48 * (2 * (BLOCKS + HEAD) + 2 * 4 * (16 + 24) * 32)
    assert found["rollout"] == pytest.approx(decoded + 2 * BLOCKS * ROWS * 16 + attention(ROWS, 16))


def ppo_and_trpo(**data):
    sections = {"data": config.DataConfig(**data), "rollout": config.RolloutConfig(max_new_tokens=48)}
    options: dict[str, Any] = {"batch_size": ROWS, "num_epochs": 4, "num_minibatches": 2}
    settings = online_config.PPOConfig(**options), online_config.TRPOConfig(**options)
    return [
        make_stage(name, settings=of, **sections) for name, of in zip(("ppo", "trpo"), settings, strict=True)
    ]


def test_a_step_of_trpo():
    """The value model as in PPO; the policy once: 3 passes of a gradient, 5 of a product, 3 for the length of
    the step, and of two policies that are compared one each.
    """
    ppo, trpo = map(flops, ppo_and_trpo(max_prompt_length=16))
    trunk = 2 * BLOCKS * ROWS * 64 + attention(ROWS, 64)
    head = 2 * HEAD * ROWS * 48
    assert trpo["update"] == pytest.approx(4 * 3 * trunk + (3 + 5 + 3 + 2) * (trunk + head))
    assert trpo | {"update": ppo["update"]} == ppo


def test_no_kernel_has_the_derivatives_of_trpo():
    """So that the scores of all pairs of tokens are written, however long the rows."""
    sizes = {"max_prompt_length": FLASH_LENGTH}
    ppo, trpo = (phase_works(planned(of), ONE, 0.0) for of in ppo_and_trpo(**sizes))
    length = FLASH_LENGTH + 48
    written = 4 * 2 * 4 * 4 * ROWS * length * length * 4  # models, layers, bytes and times, pairs, heads
    assert trpo["score"].bytes - ppo["score"].bytes == pytest.approx(written)


def test_greedy_completions_are_one_of_each_prompt():
    """And no model but that of the reward looks at them."""
    settings = online_config.ReMaxConfig(batch_size=ROWS, group_size=4)
    rollout = config.RolloutConfig(max_new_tokens=48)
    stage = make_stage(
        "remax", settings=settings, data=config.DataConfig(max_prompt_length=16), rollout=rollout
    )
    found = flops(stage)
    trunk = 2 * BLOCKS * ROWS * 64 + attention(ROWS, 64)
    assert found["greedy_score"] == pytest.approx(trunk)
    decoded = ROWS * 48 * (2 * (BLOCKS + HEAD) + 2 * 4 * (16 + 24) * 32)
    assert found["rollout"] - found["greedy_rollout"] == pytest.approx(3 * decoded)


def grpo(kl_coef=0.0, new=48, **sections):
    return make_stage(
        "grpo",
        settings=online_config.GRPOConfig(batch_size=ROWS, group_size=4, kl_coef=kl_coef, tracks_kl=False),
        data=config.DataConfig(max_prompt_length=16),
        rollout=config.RolloutConfig(max_new_tokens=new),
        **sections,
    )


def score_of(plan):
    return phase_works(plan, ONE, 0.0)["score"].flops


def test_models_that_are_not_there_score_nothing():
    """GRPO with a reward function alone needs its policy; it keeps track of no KL."""
    trunk = 2 * BLOCKS * 4 * ROWS * 64 + attention(4 * ROWS, 64)
    policy = trunk + 2 * HEAD * 4 * ROWS * 48
    assert score_of(planned(grpo(), has_reward=False)) == pytest.approx(policy)
    assert score_of(planned(grpo())) == pytest.approx(policy + trunk)


def test_a_reward_model_of_another_kind_counts_as_it_is():
    """With 6 layers, and rows of 16 + 52 tokens that it is given in 128."""
    alone = planned(grpo(new=52), has_reward=False)
    reader = RewardReader(None, False, None, None, 1024)
    external = External(Path("judge"), dataclasses.replace(TINY, num_layers=6), reader)
    trunk = 3 * (2 * BLOCKS * 4 * ROWS * 128 + attention(4 * ROWS, 128))
    assert score_of(alone._replace(external=external)) - score_of(alone) == pytest.approx(trunk)


def test_a_base_scores_as_the_reference_whether_or_not_that_is_read():
    lora = {"lora": config.LoraConfig(rank=4), "model": config.ModelConfig(sharing="hydra")}
    whole = score_of(planned(grpo(kl_coef=0.1), has_reward=False))
    assert score_of(planned(grpo(**lora), has_reward=False)) == pytest.approx(whole)


def test_a_packed_row_of_pairs_has_the_tokens_of_both():
    """But each sees its own sequence alone."""
    settings = offline_config.DPOConfig(batch_size=ROWS)
    packed, plain = (
        make_stage("dpo", settings=settings, data=config.DataConfig(max_length=LENGTH, packing=packing))
        for packing in (True, False)
    )
    assert flops(packed)["update"] == pytest.approx(flops(plain)["update"])


def test_a_group_reads_the_keys_and_values_of_its_prompt_once():
    """Eight rows at a time: greedy ones in 48 steps, 4 of each prompt in 4 times as many that read less."""
    stage = make_stage(
        "remax",
        settings=online_config.ReMaxConfig(batch_size=ROWS, group_size=4),
        data=config.DataConfig(max_prompt_length=16),
        rollout=config.RolloutConfig(max_new_tokens=48, slots=ROWS),
    )
    works = phase_works(planned(stage), ONE, 0.0)
    prompts = ModelOnChip(TINY, 1, 4, holds_scores=True).trunk(ROWS * 16, 16)
    grouped, greedy = (works[name].bytes - prompts.bytes for name in ("rollout", "greedy_rollout"))
    cached = 2 * 2 * 4 * 16 * 16  # layers, keys and values, bytes, width, prompt
    assert 4 * greedy - grouped == pytest.approx(4 * 48 * cached * (ROWS - ROWS / 4))


def test_matrices_of_experts_are_those_that_a_token_meets():
    experts = dataclasses.replace(TINY, num_experts=8, experts_per_token=2)
    assert len(layer_shapes(experts)) == 4 + 2 * 3


def test_rows_that_are_decoded_together_read_the_experts_of_all():
    """Of 8 experts one row reads 2, three rows 6 at most, and five all; operations are each token's own."""
    of = ModelOnChip(dataclasses.replace(TINY, num_experts=8, experts_per_token=2), 1, 4, holds_scores=False)
    dense = of._replace(architecture=dataclasses.replace(of.architecture, num_experts=2))
    of_expert = 2 * 4 * 3 * 32 * 64  # layers, bytes, matrices
    for rows, others in ((1, 0), (3, 4), (5, 6)):
        found, least = (model.decode_step(rows, 12, 12, 1) for model in (of, dense))
        assert found.bytes - least.bytes == others * of_expert
        assert found.flops == least.flops
    divided = of._replace(expert=4).decode_step(5, 12, 12, 1)
    assert of.decode_step(5, 12, 12, 1).bytes - divided.bytes == 6 * of_expert


def test_what_a_window_hides_is_not_counted():
    """One of two layers sees 16 tokens at most: of 64 in a row the first 16 half of them, the others 16."""
    of = ModelOnChip(dataclasses.replace(TINY, windows=(16, 0)), 1, 4, holds_scores=False)
    whole = of._replace(architecture=TINY)
    seen = (16 * 8 + 48 * 16) / 64
    assert whole.trunk(64, 64).flops - of.trunk(64, 64).flops == 4 * 64 * (32 - seen) * 32
    assert of.trunk(64, 16) == whole.trunk(64, 16)
    found, full = (model.decode_step(4, 40, 10, 2) for model in (of, whole))
    assert full.flops - found.flops == 4 * 4 * (50 - 16) * 32
    # Of the prompt, which two rows share, 6 are seen.
    assert full.bytes - found.bytes == 2 * 4 * 4 * (40 - 6) / 2 * 16


def test_decoding_a_row_is_bound_by_memory_and_much_training_by_products():
    chip = CHIPS["v5e"]
    architecture = make_architecture("1b", 2048)
    one = make_stage(
        "grpo",
        settings=online_config.GRPOConfig(batch_size=8, group_size=8, kl_coef=0.04),
        model=config.ModelConfig(dtype="bfloat16", attention="flash"),
        data=config.DataConfig(max_prompt_length=512),
        rollout=config.RolloutConfig(max_new_tokens=512),
    )
    works = phase_works(planned(one, architecture), ONE, 0.0)
    phases = phases_of(works, chip, {}, one)
    assert (phases["rollout"].bound, phases["update"].bound) == ("memory", "matrix")


def test_what_is_sent_takes_its_time_by_axis_and_loop():
    """Within a slice two links, between slices the network; a decode loop goes round for each token.

    Eight greedy completions are sampled at once, the sixteen others in two halves; a loop of another kind, as
    that of conjugate gradients, goes round once at least.
    """
    stage = make_stage(
        "remax",
        settings=online_config.ReMaxConfig(batch_size=8, group_size=2),
        rollout=config.RolloutConfig(max_new_tokens=10, slots=8),
    )
    chip = CHIPS["v5e"]
    near = Collective("all-reduce", ("fsdp",), 2, 1000, 1)
    far = near._replace(axes=("slice", "data"))
    collectives = {
        "update": [near, far],
        "rollout": [near._replace(loop="tokens"), near._replace(size=5000, loop="prompts")],
        "score": [near._replace(loop="products")],
    }
    collectives["greedy_rollout"] = collectives["rollout"]
    found = phases_of(dict.fromkeys(collectives, Work()), chip, collectives, stage)
    assert found["update"].network == pytest.approx(1000 / (2 * 50e9) + 1000 / 3.125e9)
    assert found["rollout"].sent == 2 * 10 * 1000 + 5000
    assert found["greedy_rollout"].sent == 10 * 1000 + 5000
    assert found["score"].sent == 1000


def test_every_program_of_a_phase_sends_in_its_time():
    """And what JAX sees of a chip has its part of the links, as of all else."""
    one = Collective("all-gather", ("fsdp",), 2, 2000, 1)
    programs = ("rollout_start", "rollout", "score", "reward", "advantages", "update")
    collectives = {name: [one] for name in programs}
    phases = {name: Work(1e6, 1e6) for name in ("rollout", "score", "update")}
    halves, whole = (phases_of(phases, CHIPS[name], collectives, grpo()) for name in ("tpu7x", "v5p"))
    for found, rate in ((halves, 100e9 / 2), (whole, 100e9)):
        assert {name: of.sent for name, of in found.items()} == {
            "rollout": 2000,
            "score": 3000,
            "update": 1000,
        }
        assert found["score"].network == pytest.approx(3000 / (2 * rate))
    assert halves["update"].matrix == pytest.approx(1e6 / (2307e12 / 2))
