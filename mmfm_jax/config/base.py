"""What every configuration is: frozen, typed data that refuses unknown keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 2**31 - 1
"""Of whole numbers: no count of a run is larger, and arrays of such a size can be made nowhere."""

PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Bytes = Annotated[int, Field(ge=0, le=2**63 - 1)]


@dataclass(frozen=True)
class Order:
    """What the entries of a list are, one after the other, for help and errors."""

    entries: str


ZYX = Order("z y x")
LOW_HIGH = Order("low and high")
Extent = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], ZYX]


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, docstrings become help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
