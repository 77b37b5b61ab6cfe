"""The figures that are contests between engines: decode, depth, prefill, batches, a busy core."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

from .contest import Child, Contest, Spec, Turn
from .lab import MEMORY, THREADS, Lab, build_reader, covey, llama, llamas, threads_text

PROMPT = 512
DEPTHS = (4096, 512)  # in this order, so that the filled caches serve both
N_SESSIONS, SESSION_DEPTH = 8, 64
SPARE = 64  # positions beyond a depth, for the steps measured there
SAME_FILE_TARGETS = {"Q4_K": 1.3, "Q4_K_M": 1.3, "Q8_0": 1.3, "F16": 1.05}
TORCH = "torch fp32"


def decode(lab: Lab) -> None:
    """Decode at depth 0: over the same file, over the best format, over the memory."""
    for threads in THREADS:
        same = [lab.shipped, *(kind for kind in lab.files if kind in SAME_FILE_TARGETS)]
        same = list(dict.fromkeys(same))
        specs = lab.covey_specs(same, threads, SPARE)
        specs |= lab.llama_specs(lab.files, threads, SPARE)
        if lab.model == "smollm2":
            path = str(lab.files[lab.shipped])
            specs[TORCH] = Spec(engine="torch", path=path, threads=threads, n_tokens=SPARE)
        specs[MEMORY] = Spec(engine="reader", library=str(build_reader()), threads=threads)
        with lab.children(specs) as children:
            turns = _turns(children, kind="decode", n_tokens=lab.steps)
            turns[MEMORY] = children[MEMORY].turn(kind="read")
            contest = lab.hold(f"{lab.model}: decode at depth 0, {threads_text(threads)}", turns)
            read = {kind: children[covey(kind)].weight_bytes for kind in same}
        _decode_rows(lab, contest, threads, read)


def _decode_rows(lab: Lab, contest: Contest, threads: int, read: dict[str, int]) -> None:
    text, ours = threads_text(threads), covey(lab.shipped)
    figure = f"{lab.model}: decode at depth 0, {text}, "
    for kind in read:
        target = 2.1 if kind == "Q4_1" else SAME_FILE_TARGETS.get(kind)
        name = f"{figure}{covey(kind)} over llama.cpp {kind}"
        lab.ratio(contest, name, covey(kind), llamas([kind]), target)
    best_target = 2.0 if lab.model == "smollm2" else None
    best = f"{figure}{ours} over llama.cpp's best format"
    lab.ratio(contest, best, ours, llamas(lab.files), best_target)
    for kind, n_bytes in read.items():
        name = f"{lab.model}: weights read in decode, {text}, {covey(kind)} over read bandwidth"
        is_target = kind == lab.shipped or lab.model != "smollm2"
        lab.ratio(contest, name, covey(kind), [MEMORY], 0.9 if is_target else None, scale=n_bytes)
    for name in (ours, TORCH):
        if name in contest.speeds:
            lab.add(f"{figure}{name}, tok/s", contest.speed(name))
    if MEMORY in contest.speeds:
        lab.add(f"read bandwidth, {text}, GB/s", contest.speed(MEMORY) / 1e9)


def depth(lab: Lab) -> None:
    """Decode behind a long context."""
    kinds, ours = [lab.shipped], covey(lab.shipped)
    for threads in THREADS:
        room = max(DEPTHS) + SPARE
        specs = lab.covey_specs(kinds, threads, room) | lab.llama_specs(kinds, threads, room)
        with lab.children(specs) as children:
            for at in DEPTHS:
                figure = f"{lab.model}: decode at depth {at}, {threads_text(threads)}"
                turns = _turns(children, kind="decode", n_tokens=lab.steps, depth=at)
                contest = lab.hold(figure, turns)
                name = f"{figure}, {ours} over llama.cpp {lab.shipped}"
                lab.ratio(contest, name, ours, llamas(kinds), 2.1)


def prefill(lab: Lab) -> None:
    """A prompt of 512, and then one of 4096 against the two formats that did best."""
    ours, whole = covey(lab.shipped), f"{covey(lab.shipped)}, one chunk"
    others = [kind for kind in lab.files if kind != lab.shipped]
    for threads in THREADS:
        figure = f"{lab.model}: prefill of {PROMPT}, {threads_text(threads)}"
        specs = lab.covey_specs([lab.shipped], threads, PROMPT)
        specs |= lab.llama_specs(lab.files, threads, PROMPT)
        with lab.children(specs) as children:
            turns = _turns(children, kind="prefill", n_tokens=PROMPT)
            turns[whole] = children[ours].turn(kind="prefill", n_tokens=PROMPT, chunk=PROMPT)
            contest = lab.hold(
                figure,
                turns,
                -(-lab.rounds // 2),
                candidates=[llamas([lab.shipped]), llamas(others)],
            )
        same_target = 5.5 if lab.shipped == "Q4_1" else None
        for name in (ours, whole):
            same = f"{figure}, {name} over llama.cpp {lab.shipped}"
            lab.ratio(contest, same, name, llamas([lab.shipped]), same_target)
            best = f"{figure}, {name} over llama.cpp's best format"
            lab.ratio(contest, best, name, llamas(lab.files), 2.1)
        if lab.model == "smollm2":
            _long_prefill(lab, threads, _two_best(contest, lab.files))


def _two_best(contest: Contest, kinds: Iterable[str]) -> list[str]:
    """The formats with which llama.cpp was fastest."""
    fastest = {
        kind: max(contest.speed(name) for name in llamas([kind]) if name in contest.speeds)
        for kind in kinds
        if any(name in contest.speeds for name in llamas([kind]))
    }
    return sorted(fastest, key=lambda kind: fastest[kind], reverse=True)[:2]


def _long_prefill(lab: Lab, threads: int, kinds: Sequence[str]) -> None:
    n_tokens, ours = max(DEPTHS), covey(lab.shipped)
    figure = f"{lab.model}: prefill of {n_tokens}, {threads_text(threads)}"
    specs = lab.covey_specs([lab.shipped], threads, n_tokens)
    specs |= lab.llama_specs(kinds, threads, n_tokens)
    with lab.children(specs) as children:
        turns = _turns(children, kind="prefill", n_tokens=n_tokens)
        rounds = -(-lab.rounds // 3)
        contest = lab.hold(figure, turns, rounds, candidates=[llamas(kinds)], screening=0)
    name = f"{figure}, {ours} over llama.cpp's best format"
    lab.ratio(contest, name, ours, llamas(kinds), 2.1)


def batch(lab: Lab) -> None:
    """Eight sessions' decode steps in one pass over the weights."""
    threads, kind = 2, lab.shipped
    ours, alone = f"{covey(kind)}, {N_SESSIONS} sessions", f"{covey(kind)}, one session"
    room = SESSION_DEPTH + SPARE
    single = lab.covey_specs([kind], threads, room)[covey(kind)]
    specs = {ours: replace(single, n_sequences=N_SESSIONS)}
    peers = {
        f"{name}, {text} KV": replace(spec, n_sequences=N_SESSIONS, unified=unified)
        for name, spec in lab.llama_specs([kind], threads, room).items()
        for text, unified in (("split", False), ("unified", True))
    }
    specs |= peers
    figure = f"{lab.model}: {N_SESSIONS} sessions at depth {SESSION_DEPTH}, {threads_text(threads)}"
    with lab.children(specs) as children:
        task = {"n_tokens": lab.steps, "depth": SESSION_DEPTH}
        turns = _turns(children, kind="batch", n_sequences=N_SESSIONS, **task)
        turns[alone] = children[ours].turn(kind="decode", **task)
        contest = lab.hold(figure, turns)
    lab.ratio(contest, f"{figure}, covey over one session alone", ours, [alone], 3.5)
    lab.ratio(contest, f"{figure}, covey over llama.cpp {kind}", ours, list(peers), 2.0)


def avx2(lab: Lab) -> None:
    """Both engines held to AVX2."""
    kinds, ours = [lab.shipped], covey(lab.shipped)
    for threads in THREADS:
        specs = lab.covey_specs(kinds, threads, SPARE, isa="avx2")
        specs |= lab.llama_specs(kinds, threads, SPARE, variant="avx2")
        figure = f"{lab.model}: decode at depth 0, AVX2 only, {threads_text(threads)}"
        with lab.children(specs) as children:
            contest = lab.hold(figure, _turns(children, kind="decode", n_tokens=lab.steps))
        name = f"{figure}, {ours} over llama.cpp {lab.shipped}"
        lab.ratio(contest, name, ours, llamas(kinds), 1.2)


def burner(lab: Lab) -> None:
    """Another process keeps one of the two cores busy."""
    cpus = tuple(sorted(os.sched_getaffinity(0))[:2])
    kind = lab.shipped
    every = lab.covey_specs([kind], 2, SPARE) | lab.llama_specs([kind], 2, SPARE)
    specs = {name: replace(every[name], cpus=cpus) for name in (covey(kind), llama(kind, 1))}
    peer = llama(kind, 1)
    figure = f"{lab.model}: decode, 2 threads, one of two cores busy"
    specs["burner"] = Spec(engine="burner", cpus=cpus[-1:])
    with lab.children(specs) as children:
        idle = {name: child for name, child in children.items() if name != "burner"}
        turns = _turns(idle, kind="decode", n_tokens=lab.steps)
        for name, turn in list(turns.items()):
            turns[f"{name}, beside"] = _beside(children["burner"], turn)
        contest = lab.hold(figure, turns)
    for name, target in ((covey(kind), 35.0), (peer, None)):
        kept = contest.ratio(f"{name}, beside", [name])
        if kept is None:
            lab.failures.append((figure, contest.failures.get(name, "no contestant")))
        else:
            lab.add(f"{figure}, {name} loses, %", 100 * (1 - kept), target)


def _beside(busy: Child, turn: Turn) -> Turn:
    """The same turn while `busy` burns."""

    def run() -> float:
        busy.turn(kind="burn")()
        try:
            return turn()
        finally:
            busy.turn(kind="rest")()

    return run


def _turns(children: dict[str, Child], **task: object) -> dict[str, Turn]:
    """The same task for every child."""
    return {name: child.turn(**task) for name, child in children.items()}
