"""A whole model in this process and no swarm: the reference that every plan must equal."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from .catalog import LocalModel
from .engine.generate import FinishReason, generate_text
from .engine.stage import Stage
from .errors import PromptTooLong
from .model.sampling import SamplingParams


def load_alone(model: LocalModel, *, on_block: Callable[[int, int], None] | None = None) -> Stage:
    """Load every block; `on_block(done, total)` follows the progress."""
    return model.load_stage((0, model.checkpoint.config.n_blocks), on_block=on_block)


def generate_alone(
    model: LocalModel, stage: Stage, tokens: Sequence[int], params: SamplingParams
) -> Generator[str, None, FinishReason]:
    """Yield the text after `tokens`; raises PromptTooLong."""
    limit = model.checkpoint.config.context_length
    if len(tokens) + params.max_tokens > limit:
        raise PromptTooLong(len(tokens) + params.max_tokens, limit)
    return generate_text(stage, model.head, model.tokenizer, tokens, params)
