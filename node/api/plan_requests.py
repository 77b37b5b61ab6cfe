"""What is asked of a model's plans over HTTP: the query of a look, the bodies of a pin. Pure."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from covey.node.service import PlanQuery
from covey.partition.choose import Prefer

from .requests import ModelName, Strict

MAX_CHANGES = 16  # in one what-if


class PlanParams(BaseModel):
    """The query of GET /covey/plan; its values are texts, so types are not strict."""

    model_config = ConfigDict(frozen=True)

    model: ModelName
    prefer: Prefer | None = None
    max_ttft_s: Annotated[float, Field(gt=0, le=1e6)] | None = None
    min_throughput: Annotated[float, Field(gt=0, le=1e9)] | None = None
    prompt_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    sessions: Annotated[int, Field(ge=1, le=4096)] | None = None
    advice: bool = False
    why: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    what_if: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=MAX_CHANGES)
    ] = []

    def to_query(self) -> PlanQuery:
        """What the node is asked for."""
        return PlanQuery(
            model=self.model,
            prefer=self.prefer,
            max_ttft_s=self.max_ttft_s,
            min_throughput_tok_per_s=self.min_throughput,
            prompt_tokens=self.prompt_tokens,
            n_sessions=self.sessions,
            advice=self.advice,
            why=self.why,
            what_if=tuple(self.what_if),
        )


class ModelRequest(Strict):
    """The body of POST /covey/plan/unpin."""

    model: ModelName


class PinRequest(ModelRequest):
    """The body of POST /covey/plan/pin; the node checks the plan."""

    plan: dict[str, Any]
