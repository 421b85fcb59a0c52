"""The tasks that a recipe can name."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from hfcompress.data.fill_mask import FillMask
from hfcompress.data.sequence import Regression, TextClassification
from hfcompress.data.spans import QuestionAnswering
from hfcompress.data.tokens import TokenClassification

AnyTask = Annotated[
    TextClassification | Regression | TokenClassification | QuestionAnswering | FillMask, Field(discriminator="type")
]
