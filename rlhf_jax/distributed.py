"""Several processes, one program: how they find each other.

On TPU pods they do without being told anything. Elsewhere the environment says it: RLHF_JAX_COORDINATOR
(host:port of process 0), RLHF_JAX_NUM_PROCESSES and RLHF_JAX_PROCESS_ID; or RLHF_JAX_DISTRIBUTED=auto where
JAX knows the launcher (Slurm, Open MPI, Kubernetes). RLHF_JAX_DISTRIBUTED=off keeps a TPU host by itself.

What is not public in JAX is read here alone.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed as _jax_distributed

from rlhf_jax.config import DistributedConfig
from rlhf_jax.failures import Lifeline, tell

COORDINATOR = "RLHF_JAX_COORDINATOR"
NUM_PROCESSES = "RLHF_JAX_NUM_PROCESSES"
PROCESS_ID = "RLHF_JAX_PROCESS_ID"
DETECTION = "RLHF_JAX_DISTRIBUTED"

MARGIN = 15
"""Seconds after which JAX aborts a process that finds no other one, or loses one, if we have not ended it."""
PATIENCE = 10.0
"""Seconds of waiting for the other processes that are not mentioned."""
WEEK = 7 * 24 * 3600
OF_ONE_HOST = ("rlhf_jax.data.token_cache", "rlhf_jax.stop_signals")
"""Modules whose warnings are not those that process 0 gives as well."""

_lifeline: Lifeline | None = None


def initialize(cfg: DistributedConfig, idle: Callable[[], float] = lambda: 0.0) -> None:
    """Connects this process with the others of the run, if there are any; a second call does nothing.

    Must come before any device is touched. From then on a failure of one process ends all of them, and what
    all would warn of, process 0 does.

    Args:
        cfg: reads the timeouts of the beginning, the end and the signs of life.
        idle: returns for how many seconds this process has made no progress.
    Raises:
        ValueError: the environment is wrong, or JAX does not find the others.
    """
    if jax.distributed.is_initialized():
        return
    _connect(cfg)
    if _lifeline is None:
        return
    _lifeline.idle = idle
    if not is_first():
        logging.getLogger("rlhf_jax").setLevel(logging.ERROR)
        for name in OF_ONE_HOST:
            logging.getLogger(name).setLevel(logging.WARNING)
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is no line of ours, such as gloo's words on connections, is no result
    jax.devices()  # are made by all processes together: none may wait for another before


def fail(text: str, code: int, *, may_follow: bool = False, is_told: bool = False) -> None:
    """Ends every process of the run, if there are several; returns where this one is alone.

    Where they are not yet connected, they are now: else the others would wait for this one, and hear of no
    reason. See `Lifeline.fail` for the arguments.
    """
    if not jax.distributed.is_initialized():
        try:
            _connect(DistributedConfig())
        except ValueError as error:  # wrong, or nobody is there to be told
            print(f"rlhf_jax: the other processes are not told: {error}", file=sys.stderr)
    if _lifeline is not None:
        _lifeline.fail(text, code, may_follow=may_follow, is_told=is_told)


def _connect(cfg: DistributedConfig) -> None:
    """Connects with the other processes, if there are any, but touches no device. Raises ValueError."""
    global _lifeline
    arguments = _of_environment()
    if arguments is None:
        return
    told = ", ".join(f"{name} {value}" for name, value in arguments.items()) or "found by JAX"
    timeout = cfg.initialization_timeout
    timers = [
        threading.Timer(PATIENCE, _tell_of_waiting, [told, timeout]),
        threading.Timer(timeout, _give_up, [told, timeout]),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would have the handler of SIGTERM
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=timeout + MARGIN,
            heartbeat_timeout_seconds=cfg.heartbeat_timeout + MARGIN,
            shutdown_timeout_seconds=cfg.shutdown_timeout,
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the processes of the run did not find each other ({told}): {error}") from error
    finally:
        for timer in timers:
            timer.cancel()
    if num_processes() > 1:
        _lifeline = Lifeline(_client(), process_id(), num_processes(), cfg.heartbeat_timeout)
        _lifeline.start()


def lifeline() -> Lifeline | None:
    """Returns what ties this process to the others of the run; None where it is alone."""
    return _lifeline


def process_id() -> int:
    """Returns the rank of this process; touches no device."""
    return _jax_distributed.global_state.process_id


def num_processes() -> int:
    """Returns the number of processes of the run; touches no device."""
    return _jax_distributed.global_state.num_processes


def is_first() -> bool:
    """Returns whether this process is the one that writes and tells; touches no device."""
    return process_id() == 0


def wait_for_all(name: str) -> None:
    """Returns when every process of the run has come here; each name may be used once."""
    if num_processes() > 1:
        _client().wait_at_barrier(f"rlhf_jax/{name}", WEEK * 1000)


def _client() -> Any:
    client = _jax_distributed.global_state.client
    assert client is not None
    return client


def _tell_of_waiting(told: str, timeout: int) -> None:
    print(
        f"rlhf_jax: waiting for the other processes of the run ({told}) up to {timeout} s "
        "(distributed.initialization_timeout)",
        file=sys.stderr,
    )


def _give_up(told: str, timeout: int) -> None:
    """Ends the process, which waits where no exception would reach it."""
    try:
        tell(
            f"rlhf_jax: the processes of the run did not find each other ({told}) within {timeout} s "
            "(distributed.initialization_timeout). Look whether all were started, each with a process_id of "
            "its own; at what the others' logs end with; and whether the coordinator's port, which process 0 "
            "listens on, can be reached from this host"
        )
    finally:
        os._exit(2)


def _of_environment() -> dict[str, Any] | None:
    """Returns the arguments of jax.distributed.initialize, none where JAX finds them; None: one process."""
    given = {name: os.environ.get(name, "") for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)}
    if missing := [name for name, value in given.items() if not value]:
        if len(missing) < len(given):
            raise ValueError(
                f"{', '.join(given.keys() - missing)} is set, but not {', '.join(missing)}; set all three of "
                f"{', '.join(given)}, or none"
            )
        detection = os.environ.get(DETECTION, "")
        if detection not in ("", "auto", "off"):
            raise ValueError(f"{DETECTION}: expected 'auto' or 'off', got {detection!r}")
        return {} if detection == "auto" or (not detection and _is_on_tpu_pod()) else None
    count, rank = _integer(NUM_PROCESSES, given), _integer(PROCESS_ID, given)
    if not 0 <= rank < count:
        raise ValueError(f"{PROCESS_ID}: expected 0 to {NUM_PROCESSES} - 1 = {count - 1}, got {rank}")
    host, _, port = given[COORDINATOR].rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{COORDINATOR}: expected host:port of process 0, got {given[COORDINATOR]!r}")
    return {"coordinator_address": given[COORDINATOR], "num_processes": count, "process_id": rank}


def _integer(name: str, given: dict[str, str]) -> int:
    try:
        return int(given[name])
    except ValueError:
        raise ValueError(f"{name}: expected an integer, got {given[name]!r}") from None


def _platforms() -> str | None:
    return jax.config.jax_platforms


def _is_on_tpu_pod() -> bool:
    """Returns whether JAX is going to use the TPU of this host, and knows the other hosts of its slice."""
    from jax._src.clusters import ClusterEnv

    platforms = _platforms()
    if platforms and "tpu" not in platforms.split(","):
        return False
    # Both are absent where there is no TPU; one of them asks the machine's metadata.
    return any(env.name in ("gcetpu", "gketpu") and env.is_env_present() for env in ClusterEnv._cluster_types)
