"""A reward function that records, by process, which rows it is given, and fails where it is told to."""

import itertools
import json
import os
from pathlib import Path

from rlhf_jax.distributed import process_id

RECORDS = "TEST_RECORDS"  # directory: PROCESS.jsonl gets a line per call, a list of [prompt, completion]
FAILS = "TEST_FAILS"  # PROCESS:CALL, counted from 1
MESSAGE = "the judge has left"

calls = itertools.count(1)


def vowels(prompts, completions):
    """Returns the share of vowels in each completion."""
    with (Path(os.environ[RECORDS]) / f"{process_id()}.jsonl").open("a") as file:
        file.write(json.dumps(list(zip(prompts, completions, strict=True))) + "\n")
    if os.environ.get(FAILS) == f"{process_id()}:{next(calls)}":
        raise RuntimeError(MESSAGE)
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]
