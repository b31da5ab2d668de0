"""Trains with another library, a step whenever it is told to; a script for the Python that has it.

It imports nothing of rlhf_jax. The first line of stdin is the job as JSON; each further one lets the
library's own trainer make one more step, which is answered with a line `peer: done`. All in float32, tied
embeddings, AdamW with clipping at 1, no recomputation of activations, random tokens. Completions of
different lengths are forced: what a rollout has made, which goes on until the longest row of the batch ends,
is cut to the rows' lengths, with a stop token at their ends; of each batch, one row has the most tokens.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def main() -> None:
    """Reads the job and trains; ends when there are no further lines."""
    job = json.loads(sys.stdin.readline())
    importlib.import_module(f"peer_{sys.argv[1]}").train(job)


if __name__ == "__main__":
    main()
