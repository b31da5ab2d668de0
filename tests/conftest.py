"""What every test stands on: 8 virtual CPU devices, a compilation cache, test data, the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Also for the programs that tests start. Set before JAX is imported, which reads them then.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("HF_DATASETS_CACHE", str(ROOT / ".cache" / "datasets"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test reads or writes what the user has cached.
_CACHE = tempfile.TemporaryDirectory(prefix="rlhf_jax_cache_")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

QUICK_TO_COMPILE = "--xla_backend_optimization_level=0"
RunTrain = Callable[..., "subprocess.CompletedProcess[str]"]
GIB = 2**30
MOST_MAPPINGS = 30_000


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Returns the workers of `-n auto`: two at most, and one where there is no memory for a second."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(2, os.cpu_count() or 1, memory // (5 * GIB)))


def pytest_configure(config: pytest.Config) -> None:
    """Lets LLVM leave the tests' programs as they are: they compile for longer than they run.

    What XLA makes of a program is the same. Training that `run_train` starts is compiled as users' programs
    are where it is asked for.
    """
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_TO_COMPILE}".strip()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With RLHF_JAX_NO_SKIP=1, as in CI with its data, a skipped test fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if (
        os.environ.get("RLHF_JAX_NO_SKIP") != "1"
        or reporter is None
        or hasattr(session.config, "workerinput")
    ):
        return
    skipped = reporter.stats.get("skipped", [])
    if skipped:
        reporter.write_line("")
        reporter.write_line(f"RLHF_JAX_NO_SKIP=1, and {len(skipped)} tests were skipped", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _programs_are_dropped():
    """Drops compiled programs behind a test where they take much of what a process may map.

    On a CPU a program has many mappings; beyond Linux's limit of 65530 XLA would end by a segmentation fault.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Returns the directory of the real checkpoints and texts that some tests read."""
    directory = os.environ.get("RLHF_JAX_TEST_DATA", "")
    if not directory:
        pytest.skip("RLHF_JAX_TEST_DATA is not set")
    return Path(directory)


@pytest.fixture(scope="session")
def one_device_mesh() -> jax.sharding.Mesh:
    """Returns the mesh of one device on which tests run unless they are about meshes."""
    from rlhf_jax.config import MeshConfig
    from rlhf_jax.sharding import make_mesh

    return make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def run_train() -> RunTrain:
    """Returns a function that runs `python -m rlhf_jax.train` in a process of its own, on one CPU device.

    run_train(args, env={}, cwd=the repository, timeout=600, optimized=False) -> CompletedProcess; stdout and
    stderr are text. A variable of `env` that is None is unset. JAX_NUM_CPU_DEVICES=8 in `env` gives eight
    devices. With `optimized` its programs are compiled as users' are.
    """

    def run(
        args: Sequence[str | Path],
        env: Mapping[str, str | None] | None = None,
        cwd: Path = ROOT,
        timeout: float = 600,
        *,
        optimized: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        flags = os.environ.get("XLA_FLAGS", "")
        if optimized:
            flags = flags.replace(QUICK_TO_COMPILE, "").strip()
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "XLA_FLAGS": flags}
        variables |= dict(env or {})
        return subprocess.run(
            [sys.executable, "-m", "rlhf_jax.train", *map(str, args)],
            env={name: value for name, value in variables.items() if value is not None},
            cwd=cwd,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    return run
