"""The setting `dropout` of the methods with a branch whose input is dropped."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from trimtab.nn.dropping import parts_of


def _representable(p: float) -> float:
    parts_of(p)
    return p


#: A probability below 1: 0, or one that the bits that are drawn for it can tell from 0 and from 1.
Dropout = Annotated[float, Field(ge=0.0, lt=1.0), AfterValidator(_representable)]
