"""The types of options: their ranges are part of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

LARGEST_INT = 2**31 - 1
"""The bound of all integers but the seed: they meet int32 on the device."""
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INT)]
Count = Annotated[int, Field(ge=0, le=LARGEST_INT)]
AxisSize = Annotated[int, Field(le=LARGEST_INT)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""JAX takes the lowest 32 bits of a seed: any above would give the keys of a smaller one."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
AdapterTarget = Literal["q", "k", "v", "o", "gate", "up", "down"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
Kind = Literal[
    "prompt_completion",
    "preference",
    "preference_with_margin",
    "prompt_only",
    "unpaired",
    "ranking",
    "ranking_with_margin",
    "ranking_with_best",
    "ranking_with_ties",
    "rating",
]
"""What an algorithm learns from."""
RANKINGS: tuple[Kind, ...] = ("ranking", "ranking_with_margin", "ranking_with_best", "ranking_with_ties")
"""Several completions of a prompt each: their pairs, by how much one of them is better, the best one among
those that it is better than, or their order with ties."""
COMPARISONS: tuple[Kind, ...] = ("preference", "preference_with_margin", *RANKINGS)
"""The kinds that tell which of two completions is better."""
