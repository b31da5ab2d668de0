"""Several processes, one program: how they find each other.

On TPU pods they do without being told anything. Elsewhere the environment says it: RLHF_JAX_COORDINATOR
(host:port of process 0), RLHF_JAX_NUM_PROCESSES and RLHF_JAX_PROCESS_ID; or RLHF_JAX_DISTRIBUTED=auto where
JAX knows the launcher (Slurm, Open MPI, Kubernetes). RLHF_JAX_DISTRIBUTED=off keeps a TPU host by itself.

What is not public in JAX is read here alone.
"""

from __future__ import annotations

import os
from typing import Any

import jax
from jax._src import distributed as _jax_distributed

from rlhf_jax.config import DistributedConfig

COORDINATOR = "RLHF_JAX_COORDINATOR"
NUM_PROCESSES = "RLHF_JAX_NUM_PROCESSES"
PROCESS_ID = "RLHF_JAX_PROCESS_ID"
DETECTION = "RLHF_JAX_DISTRIBUTED"


def initialize(cfg: DistributedConfig) -> None:
    """Connects this process with the others of the run, if there are any; a second call does nothing.

    Must come before any device is touched.

    Args:
        cfg: reads the timeouts.
    Raises:
        ValueError: the environment is wrong, or the processes do not find each other.
    """
    if jax.distributed.is_initialized():
        return
    arguments = _of_environment()
    if arguments is None:
        return
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=cfg.initialization_timeout,
            heartbeat_timeout_seconds=cfg.heartbeat_timeout,
            shutdown_timeout_seconds=cfg.shutdown_timeout,
        )
    except (RuntimeError, ValueError) as error:
        told = ", ".join(f"{name} {value}" for name, value in arguments.items()) or "found by JAX"
        raise ValueError(f"the processes of the run did not find each other ({told}): {error}") from error


def process_id() -> int:
    """Returns the rank of this process; touches no device."""
    return _jax_distributed.global_state.process_id


def num_processes() -> int:
    """Returns the number of processes of the run; touches no device."""
    return _jax_distributed.global_state.num_processes


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
