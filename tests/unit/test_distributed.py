"""How a process learns that it is one of several."""

import logging
from types import SimpleNamespace

import pytest

from rlhf_jax import distributed
from rlhf_jax.config import DistributedConfig

THREE = {
    "RLHF_JAX_COORDINATOR": "host:1234",
    "RLHF_JAX_NUM_PROCESSES": "2",
    "RLHF_JAX_PROCESS_ID": "1",
}


@pytest.fixture
def calls(monkeypatch):
    """Returns the list of what jax.distributed.initialize was called with; the environment is empty."""
    for name in (*THREE, "RLHF_JAX_DISTRIBUTED"):
        monkeypatch.delenv(name, raising=False)
    found = []
    monkeypatch.setattr(
        distributed.jax.distributed, "initialize", lambda **arguments: found.append(arguments)
    )
    return found


def initialize(monkeypatch, variables, cfg=DistributedConfig()):  # noqa: B008
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    distributed.initialize(cfg)


def test_one_process_stays_alone(monkeypatch, calls):
    initialize(monkeypatch, {})
    assert calls == []
    assert (distributed.process_id(), distributed.num_processes()) == (0, 1)


def test_the_environment_names_the_others(monkeypatch, calls):
    cfg = DistributedConfig(initialization_timeout=1, heartbeat_timeout=17, shutdown_timeout=3)
    initialize(monkeypatch, THREE, cfg)
    assert calls == [
        {
            "coordinator_address": "host:1234",
            "num_processes": 2,
            "process_id": 1,
            "initialization_timeout": 1 + distributed.MARGIN,
            "heartbeat_timeout_seconds": 17 + distributed.MARGIN,
            "shutdown_timeout_seconds": 3,
        }
    ]


@pytest.mark.parametrize(
    "variables, found_by_jax",
    [
        ({"RLHF_JAX_DISTRIBUTED": "auto"}, True),
        ({"RLHF_JAX_DISTRIBUTED": "off", "TPU_WORKER_HOSTNAMES": "a,b"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "tpu,cpu"}, True),
    ],
)
def test_jax_finds_the_others_on_a_pod(monkeypatch, calls, variables, found_by_jax):
    """A TPU host of GKE is imitated: JAX has seen chips, and the hosts' names are in the environment."""
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    platforms = variables.get("JAX_PLATFORMS")
    monkeypatch.setattr(distributed, "_platforms", lambda: platforms)
    initialize(monkeypatch, variables)
    assert [call.keys() & {"coordinator_address", "num_processes"} for call in calls] == [
        set()
    ] * found_by_jax


@pytest.mark.parametrize(
    "change, message",
    [
        ({"RLHF_JAX_PROCESS_ID": ""}, "is set, but not RLHF_JAX_PROCESS_ID; set all three of"),
        ({"RLHF_JAX_NUM_PROCESSES": "two"}, "RLHF_JAX_NUM_PROCESSES: expected an integer, got 'two'"),
        (
            {"RLHF_JAX_PROCESS_ID": "2"},
            "RLHF_JAX_PROCESS_ID: expected 0 to RLHF_JAX_NUM_PROCESSES - 1 = 1, got 2",
        ),
        (
            {"RLHF_JAX_COORDINATOR": "host"},
            "RLHF_JAX_COORDINATOR: expected host:port of process 0, got 'host'",
        ),
    ],
)
def test_a_wrong_environment_is_told(monkeypatch, calls, change, message):
    with pytest.raises(ValueError, match=message):
        initialize(monkeypatch, THREE | change)


def test_what_jax_says_of_the_others_is_told_with_where_it_looked(monkeypatch, calls):
    def refuse(**arguments):
        raise RuntimeError("the port is in use")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", refuse)
    told = "coordinator_address host:1234, num_processes 2, process_id 1"
    with pytest.raises(ValueError, match=f"did not find each other \\({told}\\): the port is in use"):
        initialize(monkeypatch, THREE)


def test_a_failure_before_the_processes_are_connected_is_told_to_the_others(monkeypatch, calls):
    told = []

    class Told:
        def __init__(self, client, rank, num_processes, heartbeat_timeout):
            assert (rank, num_processes) == (1, 2)

        def start(self):
            pass

        def fail(self, text, code, *, may_follow, is_told):
            told.append((text, code, may_follow, is_told))

    monkeypatch.setattr(distributed, "_lifeline", None)
    distributed.fail("of one process", 2)
    monkeypatch.setattr(distributed, "Lifeline", Told)
    monkeypatch.setattr(distributed, "_client", lambda: None)
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    monkeypatch.setattr(distributed, "process_id", lambda: 1)
    for name, value in THREE.items():
        monkeypatch.setenv(name, value)
    distributed.fail("data.train: there is no such file", 2, is_told=True)
    assert told == [("data.train: there is no such file", 2, False, True)]


def test_what_all_would_warn_of_process_0_warns_of(monkeypatch, calls, caplog):
    monkeypatch.setattr(distributed, "_lifeline", None)
    monkeypatch.setattr(
        distributed, "_connect", lambda cfg: setattr(distributed, "_lifeline", SimpleNamespace())
    )
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    monkeypatch.setattr(distributed.os, "dup2", lambda *files: None)
    monkeypatch.setattr(distributed.sys, "stdout", distributed.sys.stdout)
    loggers = [logging.getLogger(name) for name in ("rlhf_jax", "rlhf_jax.trainer", *distributed.OF_ONE_HOST)]
    levels = [logger.level for logger in loggers]
    try:
        initialize(monkeypatch, {})
        for logger in loggers:
            logger.warning("of %s", logger.name)
        loggers[1].error("an error")
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert [record.getMessage() for record in caplog.records] == [
        *(f"of {name}" for name in distributed.OF_ONE_HOST),
        "an error",
    ]


def test_a_wrong_word_for_detection_is_told(monkeypatch, calls):
    with pytest.raises(ValueError, match="RLHF_JAX_DISTRIBUTED: expected 'auto' or 'off', got 'yes'"):
        initialize(monkeypatch, {"RLHF_JAX_DISTRIBUTED": "yes"})
