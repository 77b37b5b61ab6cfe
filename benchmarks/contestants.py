"""What runs in a contestant's process: one engine that waits for tasks and times them itself.

    python -m benchmarks.contestants '{"engine": ...}'

Tasks and answers are lines of JSON. The kinds of work are defined here, once for every engine:
a decode step is embedding, all blocks and the logits; a prefill ends with the last one's logits.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from covey.node.engine.errors import EngineError
from covey.node.engine.generate import prefill_chunks
from covey.node.engine.stage import Head, Stage, Step
from covey.node.model.checkpoint import Checkpoint, open_checkpoint

from .contest import Spec, Task
from .llama_cpp import LlamaCpp

WARM_UP_STEPS = 2  # of every decode turn, before its clock starts
READ_BYTES = 192 << 20
N_PASSES = 8


def token_ids(n: int, vocab_size: int, sequence: int = 0) -> list[int]:
    """Tokens of no meaning, the same for every engine, others for every sequence."""
    return [(7919 * i + 104729 * sequence + 11) % vocab_size for i in range(n)]


class Engine(Protocol):
    """One contestant."""

    facts: Mapping[str, Any]

    def run(self, task: Task) -> float:
        """Do a task; returns units per second."""
        ...


class Decoder(Protocol):
    """What an engine can do with a model, in the words of both sides."""

    vocab_size: int

    def forward(self, ids: Sequence[int], position: int, sequence: int, chunk: int) -> None:
        """Run `ids` at `position`, dropping what stood there and later; logits of the last."""
        ...

    def step(self, ids: Sequence[int], position: int) -> None:
        """One decode step of sequences 0, 1, ... at once, with all logits."""
        ...


class ModelEngine:
    """The kinds of work, on any `Decoder`."""

    def __init__(self, decoder: Decoder, facts: Mapping[str, Any]) -> None:
        self.facts = facts
        self._decoder = decoder
        self._lengths: dict[int, int] = {}  # positions filled, by sequence

    def run(self, task: Task) -> float:
        """See `Engine.run`."""
        return {"decode": self._decode, "prefill": self._prefill, "batch": self._batch}[task.kind](
            task
        )

    def _prefill(self, task: Task) -> float:
        ids = token_ids(task.n_tokens, self._decoder.vocab_size)
        began_at = time.perf_counter()
        self._decoder.forward(ids, 0, 0, task.chunk)
        elapsed_s = time.perf_counter() - began_at
        self._lengths[0] = len(ids)
        return len(ids) / elapsed_s

    def _decode(self, task: Task) -> float:
        self._fill(0, task.depth)
        ids = token_ids(WARM_UP_STEPS + task.n_tokens, self._decoder.vocab_size)
        began_at = 0.0
        for i, token in enumerate(ids):
            if i == WARM_UP_STEPS:
                began_at = time.perf_counter()
            self._decoder.forward([token], task.depth + i, 0, 0)
        elapsed_s = time.perf_counter() - began_at
        self._lengths[0] = task.depth + len(ids)
        return task.n_tokens / elapsed_s

    def _batch(self, task: Task) -> float:
        for sequence in range(task.n_sequences):
            self._fill(sequence, task.depth)
        n_steps = WARM_UP_STEPS + task.n_tokens
        ids = [
            token_ids(n_steps, self._decoder.vocab_size, sequence)
            for sequence in range(task.n_sequences)
        ]
        began_at = 0.0
        for i, step in enumerate(zip(*ids, strict=True)):
            if i == WARM_UP_STEPS:
                began_at = time.perf_counter()
            self._decoder.step(step, task.depth + i)
        elapsed_s = time.perf_counter() - began_at
        self._lengths |= dict.fromkeys(range(task.n_sequences), task.depth + n_steps)
        return task.n_sequences * task.n_tokens / elapsed_s

    def _fill(self, sequence: int, depth: int) -> None:
        """Have at least `depth` positions; whatever is there counts."""
        if self._lengths.get(sequence, 0) < depth:
            ids = token_ids(depth, self._decoder.vocab_size, sequence)
            self._decoder.forward(ids, 0, sequence, 0)
            self._lengths[sequence] = depth


class CoveyDecoder:
    """A stage and a head of ours."""

    def __init__(self, stage: Stage, head: Head, spec: Spec) -> None:
        self.vocab_size = head.vocab_size
        self._stage, self._head = stage, head
        for sequence in range(spec.n_sequences):
            stage.open_session(str(sequence), spec.n_tokens)

    def forward(self, ids: Sequence[int], position: int, sequence: int, chunk: int) -> None:
        """See `Decoder.forward`; a chunk of 0 is as the node does it."""
        end = position + len(ids)
        borders = prefill_chunks(end, start=position)
        if chunk:
            borders = iter([(at, min(at + chunk, end)) for at in range(position, end, chunk)])
        hidden = None
        for first, last in borders:
            rows = self._head.embed(ids[first - position : last - position])
            hidden = self._stage.forward(str(sequence), first, rows)
        if hidden is not None:
            self._head.logits(hidden[-1:])

    def step(self, ids: Sequence[int], position: int) -> None:
        """See `Decoder.step`."""
        rows = self._head.embed(ids)
        steps = [Step(str(i), position, rows[i : i + 1]) for i in range(len(ids))]
        outputs = []
        for result in self._stage.forward_batch(steps):
            if isinstance(result, EngineError):
                raise result
            outputs.append(result)
        self._head.logits(np.concatenate(outputs))


class LlamaDecoder:
    """llama.cpp."""

    def __init__(self, llama: LlamaCpp) -> None:
        self.vocab_size = llama.vocab_size
        self._llama = llama
        self.step = llama.step

    def forward(self, ids: Sequence[int], position: int, sequence: int, chunk: int) -> None:
        """See `Decoder.forward`; it cuts a prompt into its own micro-batches."""
        del chunk
        self._llama.forward(ids, position, sequence)


def weight_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the file that a decode step reads: all tensors, but one row of an embedding."""
    tensors, names = checkpoint.source.tensors, checkpoint.names
    total = sum(tensor.nbytes for tensor in tensors.values())
    return total if checkpoint.config.tied_embeddings else total - tensors[names.embedding].nbytes


def covey_engine(spec: Spec) -> Engine:
    """The native engine; the library in use is named by COVEY_KERNELS."""
    from covey.node.kernels.library import Engine as Threads
    from covey.node.kernels.library import load_library
    from covey.node.kernels.native_head import load_native_head
    from covey.node.kernels.native_stage import load_native_stage

    with open_checkpoint(Path(spec.path)) as checkpoint:
        threads = Threads(load_library(), spec.threads)
        stage = load_native_stage(checkpoint, (0, checkpoint.config.n_blocks), engine=threads)
        head = load_native_head(checkpoint, engine=threads)
        facts = {"weight_bytes": weight_bytes(checkpoint), "isa": load_library().isa}
    return ModelEngine(CoveyDecoder(stage, head, spec), facts)


def torch_engine(spec: Spec) -> Engine:
    """The reference engine in fp32."""
    import torch

    from covey.node.engine.head import load_head
    from covey.node.engine.torch_stage import load_stage

    torch.set_num_threads(spec.threads)
    with open_checkpoint(Path(spec.path)) as checkpoint:
        stage = load_stage(checkpoint, (0, checkpoint.config.n_blocks))
        return ModelEngine(CoveyDecoder(stage, load_head(checkpoint), spec), {})


def llama_engine(spec: Spec) -> Engine:
    """llama.cpp as built in `spec.library`."""
    llama = LlamaCpp(
        Path(spec.library),
        Path(spec.path),
        threads=spec.threads,
        n_tokens=spec.n_tokens,
        n_sequences=spec.n_sequences,
        flash=spec.flash,
        unified=spec.unified,
    )
    return ModelEngine(LlamaDecoder(llama), {"isa": llama.system_info})


class Reader:
    """The read test; see `read_bandwidth.cpp`. Its unit is the byte."""

    def __init__(self, spec: Spec) -> None:
        self.facts: Mapping[str, Any] = {}
        self._threads = spec.threads
        self._c: Any = ctypes.CDLL(spec.library)
        self._c.read_buffer_new.restype = ctypes.c_void_p
        self._c.read_buffer_new.argtypes = [ctypes.c_int64]
        self._c.read_buffer.restype = ctypes.c_uint64
        self._c.read_buffer.argtypes = [
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
        ]
        self._buffer = self._c.read_buffer_new(READ_BYTES)
        if not self._buffer:
            raise MemoryError("no memory for the read test")

    def run(self, task: Task) -> float:
        """See `Engine.run`; one pass warms up."""
        del task
        self._c.read_buffer(self._buffer, READ_BYTES, 1, self._threads)
        began_at = time.perf_counter()
        self._c.read_buffer(self._buffer, READ_BYTES, N_PASSES, self._threads)
        return N_PASSES * READ_BYTES / (time.perf_counter() - began_at)


class Burner:
    """Keeps a core busy from a `burn` until the next task."""

    def __init__(self, spec: Spec) -> None:
        del spec
        self.facts: Mapping[str, Any] = {}

    def run(self, task: Task) -> float:
        """Nothing to do here: the burning begins when the answer is out."""
        del task
        return 0.0

    @staticmethod
    def burn() -> None:
        """Return when there is another task."""
        while not select.select([sys.stdin], [], [], 0)[0]:
            for _ in range(100_000):
                pass


ENGINES = MappingProxyType(
    {
        "covey": covey_engine,
        "torch": torch_engine,
        "llama.cpp": llama_engine,
        "reader": Reader,
        "burner": Burner,
    }
)


def main() -> None:
    """Serve tasks until standard input ends."""
    spec = Spec(**json.loads(sys.argv[1]))
    if spec.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec.cpus)
    engine = ENGINES[spec.engine](spec)
    print(json.dumps(engine.facts), flush=True)
    # Not `for line in sys.stdin`, which would read ahead of the burner's look at it.
    while line := sys.stdin.readline():
        task = Task(**json.loads(line))
        print(json.dumps({"speed": engine.run(task)}), flush=True)
        if task.kind == "burn":
            Burner.burn()


if __name__ == "__main__":
    main()
