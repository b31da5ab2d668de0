"""The launcher in a repository of its own, against the Google Cloud of fake_cloud.py."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fake_cloud import Cloud, script

ROOT = Path(__file__).resolve().parents[1]
CREATE = ("queued-resources", "create")
DELETE = ("queued-resources", "delete")
# Stands for Python and the trainer: the first process saves every 0.1 s, STEPS times. It fails at the steps
# that the lines of crash_at in the run directory name, each line once.
TRAINER = r"""
if [[ $1 == -c ]]; then echo "Python 3.12.0 jax 0.12 flax 0.12 libtpu None"; exit; fi
while (($#)); do
  case $1 in
    --run.dir) run=$2; shift ;;
    --steps) steps=$2; shift ;;
    --exit) code=$2; shift ;;
  esac
  shift
done
echo "token ${HF_TOKEN:-none} wandb ${WANDB_API_KEY:-none} cache ${CACHE:-none}"
echo "id ${RLHF_JAX_PROCESS_ID:-none}"
[[ -z ${code:-} ]] || exit "$code"
checkpoints=$run/sft/checkpoints
mkdir -p "$checkpoints"
trap 'echo "saved by a signal" >&2; exit 143' TERM
step=0
while :; do
  while [[ -e $checkpoints/$step ]]; do step=$((step + 1)); done
  if [[ -s $run/crash_at && $(head -n 1 "$run/crash_at") -eq $step ]]; then
    sed -i 1d "$run/crash_at"
    echo "crashes at $step" >&2
    exit 1
  fi
  if ((step >= steps)); then exit 0; fi
  if [[ $FAKE_HOST == *-w-0 ]]; then
    mkdir -p "$checkpoints/$step" && touch "$checkpoints/$step/manifest.json"
  fi
  /bin/sleep 0.1
done
"""


class Launch:
    """The launcher in a repository of its own, with settings and a cloud."""

    def __init__(self, directory: Path, **plot) -> None:
        self.directory = directory
        self.repository = directory / "repository"
        self.run_dir = directory / "shared" / "run"
        self.cloud = Cloud(directory / "cloud")
        self.settings = {
            "NAME": "tiny", "PROJECT": "my-project", "ZONE": "us-east5-b", "ACCELERATOR": "v5p-16",
            "POLL_SECONDS": "0.1", "RESTART_SECONDS": "0", "MAX_IDLE_RESTARTS": "2",
            "CONFIG": "configs/tiny.yaml", "RUN_DIR": self.run_dir, "VENV": directory / "venv",
            "TRAIN_FLAGS": "--steps 3",
        }  # fmt: skip
        workers = plot.pop("workers", 2)
        self.cloud.install(workers, directory / "bin", plot.pop("env", None), **plot)
        script(directory / "venv" / "bin" / "python", TRAINER)
        shutil.copytree(ROOT / "launch", self.repository / "launch")
        for name in ("requirements.txt", ".python-version"):
            shutil.copy(ROOT / name, self.repository)
        (self.repository / "configs").mkdir()
        (self.repository / "configs" / "tiny.yaml").write_text("{}\n")
        self.git("init", "-q")
        self.git("add", "-A")
        self.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "all")
        (self.repository / "untracked_secret").touch()

    def git(self, *words: str) -> None:
        subprocess.run(["git", "-C", self.repository, *words], check=True)

    def command(self, *words: str) -> list[str]:
        path = self.directory / "settings.env"
        path.write_text("".join(f"{name}={value}\n" for name, value in self.settings.items()))
        return ["bash", str(self.repository / "launch" / "tpu.sh"), "--settings", str(path), *words]

    def environment(self) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}"}

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.command(*words),
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *words: str, code: int = 0) -> str:
        """Returns what the command wrote; it has to end with the code."""
        done = self.start(*words)
        text, _ = done.communicate(timeout=120)
        assert done.returncode == code, text
        return text

    def log(self, host: str) -> str:
        return (self.cloud.hosts / host / "rlhf_jax" / "tiny" / "log").read_text()

    def steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.run_dir.glob("sft/checkpoints/*"))

    def until(self, condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def launches(directory: Path) -> Iterator[Any]:
    """Yields a function that makes a launch, of a cloud with this plot; its hosts end afterwards."""
    made = []

    def make(**plot: Any) -> Launch:
        made.append(Launch(directory, **plot))
        return made[-1]

    yield make
    for launch in made:
        launch.cloud.remove_all()
