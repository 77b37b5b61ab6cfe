"""Accelerate's disk offload, the rival, in a process of its own that may be held to some memory.

    python -m benchmarks.accelerate_offload ACCELERATE MODEL OFFLOADED RESIDENT THREADS

ACCELERATE is a folder with the package, MODEL one of Hugging Face's, OFFLOADED an empty one for its
own use, RESIDENT how many bytes of weights may stay in memory: the rest is read for each token. It
says `null` when it is loaded, then reads commands and answers each, one JSON object a line:

    {"prompt": 8, "tokens": 4}       make so many tokens behind a new prompt of so many, greedily
    {"s": [...], "peak_bytes": ...}  seconds of each; the first has the prompt in it
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

from .installs import cache_folder, install

VERSION = "1.15.0"
FIRST_TOKEN = 100  # any will do


def ensure_installed() -> Path:
    """The folder to put on sys.path; filled at first use. Torch and transformers are ours.

    Raises:
        CannotBuild: no network.
    """
    folder = cache_folder() / f"accelerate-{VERSION}"
    if not folder.is_dir():
        install(folder, ["--only-binary", ":all:", f"accelerate=={VERSION}"])
    return folder


def main(package: str, model_path: str, offloaded: str, resident: str, threads: str) -> None:
    """Load, then make tokens as told."""
    sys.path.append(package)
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(
        model_path,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": int(resident)},
        offload_folder=offloaded,
    )
    print("null", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        with torch.inference_mode():
            taken = _generate(model, command["prompt"], command["tokens"])
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"s": taken, "peak_bytes": peak_bytes}), flush=True)


def _generate(model: Any, n_prompt: int, n_tokens: int) -> list[float]:
    """Seconds of each token."""
    import torch

    feed = torch.arange(FIRST_TOKEN, FIRST_TOKEN + n_prompt)[None]
    cache: Any = None
    taken: list[float] = []
    for _ in range(n_tokens):
        began_at = time.perf_counter()
        out = model(input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        feed = out.logits[:, -1].argmax(-1)[:, None]
        taken.append(time.perf_counter() - began_at)
    return taken


if __name__ == "__main__":
    main(*sys.argv[1:])
