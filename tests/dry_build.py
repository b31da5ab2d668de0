"""Builds what a configuration trains, without computing: `python -m tests.dry_build CONFIG [FLAG VALUE ...]`.

Models, tokenizer and data are read, every record is tokenised, the mesh is made, and each program is lowered
for the batches of the configuration. One that cannot start fails with the message that a run would give.
Prints a line of JSON: rows and length of each stage's first batch.
"""

from __future__ import annotations

import json
import sys

from rlhf_jax.command_line import read_config
from rlhf_jax.lowering import lower_stage
from rlhf_jax.train import prepare


def main(argv: list[str]) -> int:
    """Prints the figures of the stages of a configuration; returns the exit code."""
    try:
        plans, mesh = prepare(read_config(["--config", *argv]))
        shapes = {plan.stage.name: lower_stage(plan, mesh)[1] for plan in plans}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps({name: {"rows": rows, "length": length} for name, (rows, length) in shapes.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
