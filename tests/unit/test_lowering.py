"""What a step of a stage runs, told from shapes alone: of every algorithm."""

import jax
import pytest

from rlhf_jax.algo_config import ALGORITHM_SECTIONS
from rlhf_jax.command_line import read_config
from rlhf_jax.lowering import stage_calls
from rlhf_jax.online_config import OnlineConfig
from rlhf_jax.shape_plan import shape_plans
from tests import tiny
from tests.conftest import ROOT

ONLINE = ["rollout_start", "rollout", "score", "advantages", "update"]
OFFLINE = ["evaluate", "update"]
GREEDY = ["greedy_rollout_start", "greedy_rollout", "greedy_score"]
FAST = ("remax", "sft")


@pytest.mark.parametrize(
    "name", [pytest.param(of, marks=() if of in FAST else pytest.mark.slow) for of in ALGORITHM_SECTIONS]
)
def test_every_program_takes_the_shapes_that_are_told(name: str):
    """By the algorithm's configuration in configs/smoke; advantages and update are traced, not compiled."""
    path = ROOT / "configs" / "smoke" / f"{name}.yaml"
    plans = shape_plans(read_config(["--config", str(path), "--run.dir", "unused"], runs=False))
    plan = next(plan for plan in plans if plan.stage.algorithm == name)
    of = stage_calls(plan, tiny.mesh())
    names = ONLINE if issubclass(ALGORITHM_SECTIONS[name], OnlineConfig) else OFFLINE
    more = {"remax": GREEDY, "distill": ["evaluate"]}
    assert set(of.calls) == {*names, *more.get(name, [])}
    for call in of.calls.values():
        call.program.eval_shape(*call.resident, *call.own)
    update = of.calls["update"]
    state, _ = update.program.eval_shape(*update.resident, *update.own)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), (of.state, state))
    assert shapes[0] == shapes[1]
