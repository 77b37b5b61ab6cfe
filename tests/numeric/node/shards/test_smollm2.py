"""The real model, its three KV heads over two and three members, beside one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from covey.node.engine.head import load_head
from covey.node.engine.stage import Head
from covey.node.engine.torch_shard import load_shard
from covey.node.engine.torch_stage import load_stage
from covey.node.kernels.library import Engine, load_library
from covey.node.kernels.native_head import load_native_head
from covey.node.kernels.native_shard import load_native_shard
from covey.node.model.checkpoint import Checkpoint
from support.shard_group import ShardGroup, slices

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

SPAN = (0, 30)
N_TOKENS = 64
PROMPT = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
TWO = slices((2, 1024), (1, 512))
THREE = slices((1, 480), (1, 800), (1, 256))
WITH_SPOKE = slices((0, 704), (2, 320), (1, 512))


@dataclass(frozen=True)
class Reply:
    """Greedy tokens of one process in fp32, and the logits [N_TOKENS, V] that they came of."""

    prompt: list[int]
    tokens: list[int]
    logits: Any


@pytest.fixture(scope="module")
def head(checkpoint: Checkpoint) -> Head:
    return load_head(checkpoint)


@pytest.fixture(scope="module")
def reply(checkpoint: Checkpoint, head: Head) -> Reply:
    ids = checkpoint.tokenizer().encode(PROMPT)
    return Reply(ids, *greedy(load_stage(checkpoint, SPAN), head, ids))


def greedy(stage: Any, head: Head, ids: list[int]) -> tuple[list[int], Any]:
    """N_TOKENS after the prompt, one by one, and the logits of all of them."""
    stage.open_session("s", len(ids) + N_TOKENS)
    feed, position = ids, 0
    tokens: list[int] = []
    logits = []
    while len(tokens) < N_TOKENS:
        logits.append(head.logits(stage.forward("s", position, head.embed(feed))[-1:])[0])
        position += len(feed)
        tokens.append(int(logits[-1].argmax()))
        feed = tokens[-1:]
    return tokens, np.stack(logits)


def forced(stage: Any, head: Head, reply: Reply) -> Any:
    """The logits of the reply's tokens when they are given; it takes a fraction of the time."""
    ids = [*reply.prompt, *reply.tokens[:-1]]
    n_prompt = len(reply.prompt)
    stage.open_session("s", len(ids))
    hidden = [stage.forward("s", 0, head.embed(ids[:n_prompt]))[-1:]]
    hidden.append(stage.forward("s", n_prompt, head.embed(ids[n_prompt:])))
    return head.logits(np.concatenate(hidden))


def test_the_text_of_two_members_is_that_of_one_process(
    checkpoint: Checkpoint, head: Head, reply: Reply
) -> None:
    group = ShardGroup([load_shard(checkpoint, SPAN, cut) for cut in TWO])
    tokens, logits = greedy(group, head, reply.prompt)
    assert tokens == reply.tokens
    assert np.abs(logits - reply.logits).max() < 1e-3  # 4e-5 seen


def test_so_is_that_of_three(checkpoint: Checkpoint, head: Head, reply: Reply) -> None:
    group = ShardGroup([load_shard(checkpoint, SPAN, cut) for cut in THREE])
    logits = forced(group, head, reply)
    assert logits.argmax(-1).tolist() == reply.tokens  # each behind those before
    assert np.abs(logits - reply.logits).max() < 1e-3


@pytest.mark.parametrize("cuts", [TWO, THREE, WITH_SPOKE], ids=["two", "three", "with spoke"])
def test_a_native_group_is_as_close_to_fp32_as_one_native_process(
    checkpoint: Checkpoint, reply: Reply, cuts: Any
) -> None:
    engine = Engine(load_library(), 1)
    group = ShardGroup([load_native_shard(checkpoint, SPAN, cut, engine=engine) for cut in cuts])
    logits = forced(group, load_native_head(checkpoint, engine=engine), reply)
    p, q = (log_softmax(each) for each in (reply.logits, logits))
    assert float((np.exp(p) * (p - q)).sum(-1).mean()) < 5e-3
    assert float((p.argmax(-1) == q.argmax(-1)).mean()) >= 0.95


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
