"""A verifier of arithmetic: 1 where a completion's final number is the one of the reference, else 0."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

# What says that an answer follows; then its sign and currency, in either order, and the number.
_FORMS = re.compile(
    r"(?:####|^[ \t]*A:|\\boxed\{|\banswer is:?)[ \t]*(?P<sign>[-+]?(?:\\?\$|[£€])?[ \t]*[-+]?)"
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\d)",
    re.IGNORECASE | re.MULTILINE,
)


def exact_answer(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    r"""Returns 1.0 for each completion whose final answer equals the reference's as a number, else 0.0.

    The last of these counts: `#### N`, `A: N` at the beginning of a line, `\boxed{N}`, `the answer is N`;
    thousands may have commas, and 3.0 is 3. A completion without any has no answer, and so 0.

    Args:
        prompts: not read; reward functions are given them.
        completions: of the policy.
        answer: the records' column of GSM8K, reference solutions with their answer in one of these forms.

    Raises:
        ValueError: a reference without an answer.
    """
    scores = []
    for number, (completion, reference) in enumerate(zip(completions, answer, strict=True)):
        truth = final_number(reference)
        if truth is None:
            raise ValueError(f"row {number}: the reference has no answer such as `#### 72`: {reference!r}")
        scores.append(float(final_number(completion) == truth))
    return scores


def no_answer(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Returns 1.0 for each completion without a final answer in any form that `exact_answer` reads, else 0.0.

    With weight 0 it counts them and is no part of the score.

    Args:
        prompts: not read; reward functions are given them.
        completions: of the policy.
    """
    return [float(final_number(completion) is None) for completion in completions]


def final_number(text: str) -> Decimal | None:
    """Returns the number of the last answer in a text; None where it has none."""
    found = list(_FORMS.finditer(text))
    if not found:
        return None
    number = Decimal(found[-1]["number"].replace(",", ""))
    return -number if "-" in found[-1]["sign"] else number
