"""One-process generation: the reference for what any plan of the same model must produce.

Everything that a distributed session must repeat to get identical text is here: the chunking of
the prompt, the order of forward calls, and when a generation ends. No torch, no threads.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Literal

from covey.node.model.sampling import SampledToken, Sampler, SamplingParams, StopMatcher
from covey.node.model.tokenizer import Tokenizer

from .stage import Head, Stage

PREFILL_CHUNK = 128  # positions of the prompt per forward call, in one process or many

FinishReason = Literal["stop", "length"]


def prefill_chunks(n_tokens: int, *, start: int = 0) -> Iterator[tuple[int, int]]:
    """The positions [begin, end) of each forward call that covers [start, n_tokens).

    Chunks end at multiples of PREFILL_CHUNK wherever they start, so a session that continues
    from a known prefix meets the same borders as one that computes it.
    """
    while start < n_tokens:
        end = min((start // PREFILL_CHUNK + 1) * PREFILL_CHUNK, n_tokens)
        yield start, end
        start = end


def generate(
    stage: Stage,
    head: Head,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    eos_ids: frozenset[int] = frozenset(),
    session: str = "local",
) -> Generator[SampledToken, None, FinishReason]:
    """Yield the tokens after `prompt`; returns why it ended.

    Args:
        stage: one that covers every block.
        head: of the same model and dtype.
        prompt: at least one token.
        params: `stop` is not looked at here, see `generate_text`.
        eos_ids: tokens that end the text; they are not yielded.
        session: name of the session on `stage`; closed at the end, whatever the end is.

    Raises:
        CacheOverflow: prompt and `max_tokens` exceed the context.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens")
    sampler = Sampler(params, head.vocab_size)
    tokens = list(prompt)
    # The last token is never fed back, so its position needs no room.
    stage.open_session(session, len(tokens) + params.max_tokens - 1)
    try:
        hidden = None
        for begin, end in prefill_chunks(len(tokens)):
            hidden = stage.forward(session, begin, head.embed(tokens[begin:end]))
        for _ in range(params.max_tokens):
            if hidden is None:
                hidden = stage.forward(session, len(tokens) - 1, head.embed(tokens[-1:]))
            sampled = sampler.sample(head.logits(hidden[-1:])[0], tokens)
            if sampled.id in eos_ids:
                return "stop"
            yield sampled
            tokens.append(sampled.id)
            hidden = None
        return "length"
    finally:
        stage.close_session(session)


def generate_text(
    stage: Stage, head: Head, tokenizer: Tokenizer, prompt: Sequence[int], params: SamplingParams
) -> Generator[str, None, FinishReason]:
    """Yield the text after `prompt` in pieces, up to the first stop text; returns why it ended."""
    decoder, matcher = tokenizer.stream(), StopMatcher(params.stop)
    tokens = generate(stage, head, prompt, params, eos_ids=tokenizer.eos_ids)
    reason: FinishReason = "stop"
    stopped = False
    while not stopped:
        try:
            text = decoder.push(next(tokens).id)
        except StopIteration as ended:
            reason = ended.value
            break
        piece, stopped = matcher.push(text)
        if piece:
            yield piece
    tokens.close()
    if not stopped:
        piece, stopped = matcher.push(decoder.flush())
        tail = piece + ("" if stopped else matcher.flush())
        if tail:
            yield tail
    return "stop" if stopped else reason
