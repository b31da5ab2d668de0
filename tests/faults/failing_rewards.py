"""A reward function that fails in its third call, as FAULT says, in the process FAULTY."""

import os
import sys
import time

calls = 0


def score(prompts, completions):
    global calls
    calls += 1
    if calls == 3 and os.environ["RLHF_JAX_PROCESS_ID"] == os.environ["FAULTY"]:
        print("fault at", time.monotonic(), file=sys.stderr)
        if os.environ["FAULT"] == "hang":
            time.sleep(1000)
        raise KeyError("deliberate")
    return [float(len(completion)) for completion in completions]
