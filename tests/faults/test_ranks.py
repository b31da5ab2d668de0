"""One of two processes is killed, hangs, raises or is asked to stop: the other one ends too, and says why."""

import json
import re
import signal
import time

import pytest
import yaml

from rlhf_jax.checkpoint import CheckpointReader
from tests.ranks import TRAIN, Ranks, kill_all, launch
from tests.smoke.test_quickstart import SHORT

pytestmark = pytest.mark.slow

MINUTE = 60
# A training whose third step, in the process FAULTY, does what is put for ACT; STEP seconds for a step.
WRAPPED = """
import os, sys, time
from rlhf_jax import checkpoint, keys, train, watchdog

def at_iteration(root, iteration, real=keys.at_iteration):
    time.sleep(STEP)
    if iteration == 2 and os.environ["RLHF_JAX_PROCESS_ID"] == "FAULTY":
        print("fault at", time.monotonic(), file=sys.stderr)
        ACT
    return real(root, iteration)

keys.at_iteration = at_iteration
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    kill_all()


def wrapped(act="pass", faulty=1, step=0.0):
    return ["-c", WRAPPED.replace("ACT", act).replace("FAULTY", str(faulty)).replace("STEP", str(step))]


def config(directory, algorithm="sft"):
    """Returns a configuration of one short stage that saves only at its end, from scratch."""
    tree = yaml.safe_load(SHORT.format(dir=directory / "run"))
    wanted = {"sft": ["sft"], "ppo": ["ppo", "rollout", "rewards"]}[algorithm]
    for section in {"sft", "reward_model", "ppo", "rollout", "rewards"} - set(wanted):
        del tree[section]
    tree["stages"] = [{"name": algorithm, "algorithm": algorithm}]
    tree["checkpoint"] = {"every": 100}
    if algorithm == "ppo":
        del tree["data"]["max_length"]
        tree["rewards"] = {"function": "tests.faults.failing_rewards:score"}
    path = directory / "short.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def fault_at(results):
    return float(re.search(r"fault at ([\d.]+)", "".join(result.stderr for result in results)).group(1))


def assert_ended_together(ranks, results, code, since):
    assert [result.returncode for result in results] == [code, code]
    assert max(result.seconds for result in results) + ranks.started - since < MINUTE


def logged(directory):
    path = directory / "run" / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_steps(ranks, directory, count):
    deadline = time.monotonic() + 300
    while len(logged(directory)) < count:
        assert all(process.poll() is None for process in ranks.processes), ranks.said(0) + ranks.said(1)
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("faulty", [0, 1])
def test_an_exception_ends_both_with_its_traceback_last(tmp_path, faulty):
    act = "raise RuntimeError('deliberate')"
    ranks = Ranks(2, [*wrapped(act, faulty), "--config", config(tmp_path)], devices=1)
    results = ranks.wait()
    assert_ended_together(ranks, results, 1, fault_at(results))
    traceback = re.search(r"^Traceback.*", results[faulty].stderr, re.S | re.M).group()
    assert traceback.endswith("in at_iteration\nRuntimeError: deliberate\n")
    assert re.search(rf"rlhf_jax: process {faulty} \(.+\) failed:\n", results[1 - faulty].stderr)
    assert results[1 - faulty].stderr.endswith(traceback)


@pytest.mark.parametrize(
    "fault, code, last", [("raise", 1, "KeyError: 'deliberate'"), ("hang", 87, "in score\n")]
)
def test_a_reward_function_that_fails_on_one_host(tmp_path, fault, code, last):
    arguments = ["--config", config(tmp_path, "ppo"), "--distributed.step_timeout", "6"]
    env = {"FAULT": fault, "FAULTY": "1"}
    ranks = Ranks(2, [*TRAIN, *arguments], devices=1, env=env)
    results = ranks.wait()
    assert_ended_together(ranks, results, code, fault_at(results))
    said = re.search(r"fault at [\d.]+\n(.*)", results[1].stderr, re.S).group(1)
    assert last in said
    assert re.search(r"rlhf_jax: process 1 \(.+\) failed:\n", results[0].stderr)
    assert results[0].stderr.endswith(said)


@pytest.mark.parametrize(
    "victim, named",
    [
        (0, "the leader task was preempted/died"),  # JAX ends the others at once, in its own words
        (
            1,
            r"rlhf_jax: process 1 \(.+\) has given no sign of life for \d+ s: it was killed.*\n\Z",
        ),
    ],
)
def test_a_killed_process_is_missed_and_named(tmp_path, victim, named):
    arguments = [
        "--config",
        config(tmp_path),
        "--sft.num_steps",
        "100",
        "--distributed.heartbeat_timeout",
        "20",
    ]
    ranks = Ranks(2, [*wrapped(step=0.3), *arguments], devices=1)
    wait_for_steps(ranks, tmp_path, 3)
    ranks.processes[victim].kill()
    killed_at = time.monotonic()
    survivor = ranks.wait()[1 - victim]
    assert survivor.returncode not in (0, None)
    assert survivor.seconds + ranks.started - killed_at < MINUTE
    assert re.search(named, survivor.stderr)


def test_one_process_may_compile_or_save_for_long(tmp_path):
    """Longer than step_timeout, while the other one waits for it; compiling is told from its files."""
    act = "exec(compile('time.sleep(12)', watchdog.COMPILERS[0], 'exec'))"
    slow_save = """
real_save = checkpoint.Checkpointer._save
def save(*args):
    if os.environ["RLHF_JAX_PROCESS_ID"] == "0":
        time.sleep(12)
    return real_save(*args)
checkpoint.Checkpointer._save = save
"""
    flag, code = wrapped(act)
    code = code.replace("keys.at_iteration =", slow_save + "keys.at_iteration =")
    cold = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    arguments = ["--config", config(tmp_path), "--checkpoint.every", "2", "--distributed.step_timeout", "5"]
    results = launch(2, [flag, code, *arguments], devices=1, env=cold)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr + results[1].stderr
    assert "fault at" in results[1].stderr


def metrics(directory):
    lines = map(json.loads, logged(directory))
    return [
        {name: value for name, value in line.items() if name != "time" and not name.startswith("perf/")}
        for line in lines
    ]


def test_sigterm_to_one_stops_both_at_one_step_and_the_same_command_goes_on(tmp_path):
    command = [*wrapped(step=0.2), "--config", config(tmp_path), "--sft.num_steps", "40"]
    ranks = Ranks(2, command, devices=1)
    wait_for_steps(ranks, tmp_path, 4)
    ranks.processes[1].send_signal(signal.SIGTERM)
    results = ranks.wait()
    assert [result.returncode for result in results] == [143, 143], results[0].stderr + results[1].stderr
    (saved,) = (int(path.name) for path in (tmp_path / "run/sft/checkpoints").iterdir())
    assert 3 <= saved < 40 and len(logged(tmp_path)) == saved + 1

    again = launch(2, command, devices=1)
    assert [result.returncode for result in again] == [0, 0], again[0].stderr + again[1].stderr
    assert f"[sft] goes on after step {saved}\n" in again[0].stderr
    assert "goes on" not in again[1].stderr

    unbroken = tmp_path / "unbroken"
    launch(2, [*command, "--run.dir", unbroken / "run"], devices=1)
    assert metrics(tmp_path) == metrics(unbroken)


@pytest.mark.parametrize("name", ["absent.jsonl", "bad.jsonl"])
def test_what_is_wrong_with_the_data_is_told_by_all(tmp_path, name):
    """Of an absent file before the processes know of each other, of one without known columns after it."""
    (tmp_path / "bad.jsonl").write_text('{"nothing": 1}\n')
    arguments = [
        "--config",
        config(tmp_path),
        "--data.train",
        tmp_path / name,
        "--data.eval",
        tmp_path / name,
    ]
    for result in launch(2, [*TRAIN, *arguments], devices=1):
        assert result.returncode == 2
        assert name in result.stderr


# A training whose process 1 does what is put for ACT as soon as it comes to the function NAME of MODULE.
HELD = """
import os, sys, time
from rlhf_jax import MODULE, train

def held(*args, real=MODULE.NAME, **kwargs):
    if os.environ["RLHF_JAX_PROCESS_ID"] == "1":
        print("fault at", time.monotonic(), file=sys.stderr, flush=True)
        time.sleep(1000)
    found = real(*args, **kwargs)
    print("through", file=sys.stderr, flush=True)
    return found

MODULE.NAME = held
sys.exit(train.main(sys.argv[1:]))
"""


def held_at(module, name):
    return ["-c", HELD.replace("MODULE", module).replace("NAME", name)]


def test_a_process_that_hangs_before_its_first_step_ends_both(tmp_path):
    """The other one has loaded its models, and waits to hear which checkpoint they go on from."""
    program = held_at("stage", "load_roles")
    ranks = Ranks(2, [*program, "--config", config(tmp_path), "--distributed.step_timeout", "6"], devices=1)
    results = ranks.wait()
    assert_ended_together(ranks, results, 87, fault_at(results))
    assert "in held\n" in results[1].stderr
    assert all("no step made progress in 6 s" in result.stderr for result in results)


@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_before_the_training_ends_both_at_once(tmp_path, victim):
    """Process 1 sleeps while it plans, where Python can be interrupted; process 0 waits for it in JAX."""
    ranks = Ranks(2, [*held_at("plan", "plan_stages"), "--config", config(tmp_path)], devices=1)
    deadline = time.monotonic() + MINUTE
    while "fault at" not in ranks.said(1) or "through" not in ranks.said(0):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2)
    ranks.processes[victim].send_signal(signal.SIGTERM)
    sent_at = time.monotonic()
    results = ranks.wait()
    assert [result.returncode for result in results] == [143, 143], results
    assert max(result.seconds for result in results) + ranks.started - sent_at < MINUTE / 2
    said = "stopped at once by SIGTERM" if victim == 0 else "stopped by SIGTERM; nothing was trained yet"
    assert all(said in result.stderr for result in results), results
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--sft.num_steps", "the configurations are not the same on process 0 and on 1"),
        ("--sft.num_stepz", "--sft.num_stepz: no such option"),  # told to process 0, which waits for this one
    ],
)
def test_a_configuration_of_its_own_is_refused_by_all(tmp_path, flag, said):
    results = launch(
        2, [*TRAIN, "--config", config(tmp_path)], devices=1, flags=[[], [flag, "7"]], timeout=MINUTE
    )
    assert [result.returncode for result in results] == [2, 2]
    assert all(said in result.stderr for result in results), results
    assert not (tmp_path / "run").exists()


def test_other_code_on_one_host_is_refused_by_all(tmp_path):
    program = """
import os, sys
from rlhf_jax import machine, train
if os.environ["RLHF_JAX_PROCESS_ID"] == "1":
    sums = machine.code_sums()
    machine.code_sums = lambda: sums | {"step.py": "other"}
sys.exit(train.main())
"""
    results = launch(2, ["-c", program, "--config", config(tmp_path)], devices=1, timeout=MINUTE)
    assert [result.returncode for result in results] == [2, 2]
    said = r"the files of rlhf_jax are not the same on process 0 and on 1: step.py \(\w{16}, other\); give"
    assert all(re.search(said, result.stderr) for result in results), results
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_does_not_find_the_others_says_where_it_looked(tmp_path, rank):
    arguments = ["--config", config(tmp_path), "--distributed.initialization_timeout", "3"]
    alone = {"RLHF_JAX_NUM_PROCESSES": "2", "RLHF_JAX_PROCESS_ID": str(rank)}
    (result,) = launch(1, [*TRAIN, *arguments], env=alone, timeout=MINUTE)
    assert result.returncode == 2
    said = (
        rf"did not find each other \(coordinator_address localhost:\d+, num_processes 2, process_id {rank}\)"
    )
    assert re.search(rf"rlhf_jax: .*{said} within 3 s .distributed.initialization_timeout.", result.stderr)
    assert result.stderr.endswith("can be reached from this host\n")


def test_a_failure_while_a_checkpoint_is_being_saved_is_told_and_the_same_command_goes_on(tmp_path):
    """Process 1 fails in its third step. It waits for its own part of the save, and for no other one's."""
    slow_save = """
real_finish = checkpoint.Checkpointer._finish
def finish(*args):
    time.sleep(float(os.environ["SECONDS"]))
    return real_finish(*args)
checkpoint.Checkpointer._finish = finish
"""
    flag, code = wrapped("raise RuntimeError('deliberate')")
    code = code.replace("keys.at_iteration =", slow_save + "keys.at_iteration =")
    arguments = ["--config", config(tmp_path), "--checkpoint.every", "2"]
    for seconds, saved in ((("1000", "0"), None), (("0", "8"), 2)):
        env = [{"SECONDS": each} for each in seconds]
        ranks = Ranks(2, [flag, code, *arguments], devices=1, env=env)
        results = ranks.wait()
        assert_ended_together(ranks, results, 1, fault_at(results))
        assert all(result.stderr.endswith("RuntimeError: deliberate\n") for result in results)
        assert CheckpointReader(tmp_path / "run/sft/checkpoints").latest() == saved
    again = launch(2, [*TRAIN, *arguments], devices=1)
    assert [result.returncode for result in again] == [0, 0], again[0].stderr + again[1].stderr
    assert "[sft] goes on after step 2\n" in again[0].stderr
    assert [line["step"] for line in metrics(tmp_path)] == list(range(7))
