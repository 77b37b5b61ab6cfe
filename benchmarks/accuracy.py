"""How far the native engine's logits are from fp32 on the same weights, teacher-forced."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from covey.node.model.checkpoint import open_checkpoint

from .lab import Lab

PROMPTS = (
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "List three uses of a paper clip.",
    "Explain gravity to a child.",
    "What is the capital of France, and what is it known for?",
)
N_TOKENS = 64
THREADS = 1  # torch's two wait for each other for ever on a busy machine


def accuracy(lab: Lab) -> None:
    """Mean divergence and agreement over what torch in fp32 would say."""
    import torch

    from covey.node.engine.head import load_head
    from covey.node.engine.torch_stage import load_stage
    from covey.node.kernels.library import Engine, load_library
    from covey.node.kernels.native_head import load_native_head
    from covey.node.kernels.native_stage import load_native_stage

    torch.set_num_threads(THREADS)
    divergences: list[float] = []
    agreements: list[bool] = []
    with open_checkpoint(lab.files[lab.shipped]) as checkpoint:
        span = (0, checkpoint.config.n_blocks)
        engine = Engine(load_library(), THREADS)
        exact = load_stage(checkpoint, span), load_head(checkpoint)
        fast = (
            load_native_stage(checkpoint, span, engine=engine),
            load_native_head(checkpoint, engine=engine),
        )
        tokenizer = checkpoint.tokenizer()
        for prompt in PROMPTS:
            feed = tokenizer.encode(
                f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
            )
            for stage, _ in (exact, fast):
                stage.open_session("s", len(feed) + N_TOKENS)
            at = 0
            for _ in range(N_TOKENS):
                p, q = (
                    _log_softmax(head.logits(stage.forward("s", at, head.embed(feed))[-1:])[0])
                    for stage, head in (exact, fast)
                )
                divergences.append(float((np.exp(p) * (p - q)).sum()))
                agreements.append(bool(p.argmax() == q.argmax()))
                at += len(feed)
                feed = [int(p.argmax())]
    figure = f"smollm2: {len(PROMPTS)} prompts x {N_TOKENS} against fp32, covey {lab.shipped}"
    lab.add(f"{figure}, mean KL", float(np.mean(divergences)), 5e-3)
    lab.add(f"{figure}, top-1", float(np.mean(agreements)), 0.975, "at least")


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - float(logits.max())
    exact: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return exact
