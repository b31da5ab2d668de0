"""Runs a configuration with several seeds and prints what each gained: `python -m rlhf_jax.bench.seeds`.

A JSON line per seed: gold reward before and after, KL, reward accuracy and its ceiling, seconds, peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time


def main() -> None:
    """Runs the seeds one after the other, each in a process and a run directory of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dir", default="runs/seeds", help="each seed writes to DIR/SEED")
    args = parser.parse_args()
    for seed in args.seeds:
        flags = ["--run.dir", f"{args.dir}/{seed}", "--run.seed", str(seed), "--json"]
        command = [sys.executable, "-m", "rlhf_jax.train", "--config", args.config, *flags]
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        wall = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of the largest child so far
        figures = {
            f"{stage}/{name}": round(value, 4)
            for stage, result in json.loads(done.stdout)["summary"].items()
            for name, value in result.items()
        }
        print(
            json.dumps(
                {"bench": "seeds", "seed": seed, "wall_s": round(wall), "peak_rss_mib": round(peak)} | figures
            )
        )


if __name__ == "__main__":
    main()
