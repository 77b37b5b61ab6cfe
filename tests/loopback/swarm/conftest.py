"""One swarm of three real nodes for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from covey.node.alone import generate_alone, load_alone
from covey.node.catalog import open_model
from covey.node.engines import Engines
from covey.node.model.sampling import SamplingParams
from covey.node.prompt import chat_tokens
from support.swarm import MODEL, Swarm, running_swarm

#: The answer of one process to one message.
Alone = Callable[[str, SamplingParams], str]


@pytest.fixture(scope="session")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Three nodes of at most 11 of the 30 blocks, so that all are needed."""
    with running_swarm(tmp_path_factory.mktemp("swarm"), (11, 11, 11)) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Two nodes of at most 20 blocks; see `pair`."""
    with running_swarm(tmp_path_factory.mktemp("pair"), (20, 20)) as swarm:
        yield swarm


@pytest.fixture
def pair(breakable: Swarm) -> Swarm:
    """Two nodes to be damaged: what an earlier test did to them is mended first."""
    breakable.mend()
    return breakable


@pytest.fixture(scope="session")
def alone() -> Alone:
    """The whole model in this process: what every swarm must equal."""
    model = open_model(MODEL, Engines())
    stage = load_alone(model)

    def answer(content: str, params: SamplingParams) -> str:
        tokens = chat_tokens(model.tokenizer, [{"role": "user", "content": content}])
        return "".join(generate_alone(model, stage, tokens, params))

    return answer
