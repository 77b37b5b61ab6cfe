"""llama.cpp, the baseline: builds of it in the user's cache, its quantiser, and its C functions.

Nothing of Covey needs it. It is built from source by pip, once per set of flags and, for the
native build, per CPU. `LlamaCpp` runs in a process of its own; see `contest.py` for why.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .installs import CannotBuild, cache_folder, install

VERSION = "0.3.36"
_COMMON = "-DGGML_NATIVE={native} -DLLAVA_BUILD=OFF"
FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "native": _COMMON.format(native="ON"),
        "avx2": _COMMON.format(native="OFF")
        + " -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_BMI2=ON -DGGML_FMA=ON -DGGML_F16C=ON"
        " -DGGML_AVX512=OFF",
    }
)
FORMATS: Mapping[str, int] = MappingProxyType({"Q8_0": 7, "F16": 1, "Q4_0": 2, "Q4_K_M": 15})
_MICRO_BATCH = 512  # tokens that llama.cpp computes at once; its default


def build_folder(variant: str) -> Path:
    """Where the build `variant` of FLAGS is, or will be."""
    machine = f"-{_cpu()}" if variant == "native" else ""
    return cache_folder() / f"llama-cpp-{VERSION}-{variant}{machine}"


def ensure_build(variant: str, say: Callable[[str], None]) -> Path:
    """The folder to put on sys.path for a build of llama.cpp; made at first use.

    Raises:
        CannotBuild: no compiler, no network, or pip failed.
    """
    folder = build_folder(variant)
    if folder.is_dir():
        return folder
    say(f"building llama.cpp ({variant}) once, 4 to 10 minutes: {folder}")
    install(
        folder,
        [
            # A wheel in pip's cache was built with flags that nobody knows any more.
            *("--no-cache-dir", "--no-binary", "llama-cpp-python"),
            *(f"llama-cpp-python=={VERSION}", "diskcache==5.6.3"),
        ],
        {"CMAKE_ARGS": FLAGS[variant]},
    )
    return folder


def _cpu() -> str:
    """A few letters that change with the instructions of this CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next(
        (line for line in lines if line.startswith(("flags", "Features"))), platform.processor()
    )
    return hashlib.sha256(features.encode()).hexdigest()[:8]


def requantized(source: Path, kind: str, site: Path) -> Path:
    """`source` in another format of FORMATS, by llama.cpp's own quantiser; kept in the cache.

    Raises:
        CannotBuild: the quantiser failed.
    """
    state = source.stat()
    stamp = f"{source.resolve()} {state.st_size} {state.st_mtime_ns}"
    name = f"{source.stem}-{hashlib.sha256(stamp.encode()).hexdigest()[:8]}.{kind}.gguf"
    path = cache_folder() / name
    if not path.exists():
        # Another process, as the library must not be loaded in this one.
        arguments = [str(site), str(source), str(path), str(FORMATS[kind])]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.llama_cpp", *arguments],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise CannotBuild(f"llama.cpp cannot make {kind} of {source.name}")
    return path


def _load(site: Path) -> Any:
    """llama.cpp's C functions, silent."""
    sys.path.insert(0, str(site))
    c: Any = importlib.import_module("llama_cpp")
    c.llama_backend_init()
    c.llama_log_set(_quiet(c), ctypes.c_void_p(0))
    return c


@cache  # it must live as long as the library
def _quiet(c: Any) -> Any:
    return c.llama_log_callback(lambda *_: None)


def _quantize(site: Path, source: Path, target: Path, ftype: int) -> int:
    c = _load(site)
    params = c.llama_model_quantize_default_params()
    params.ftype = ftype
    params.allow_requantize = True
    params.nthread = 1
    unfinished = target.with_suffix(".unfinished")
    status: int = c.llama_model_quantize(
        str(source).encode(), str(unfinished).encode(), ctypes.byref(params)
    )
    if status == 0:
        unfinished.rename(target)
    return status


class LlamaCpp:
    """One model in one context of llama.cpp, with an f16 KV cache."""

    def __init__(
        self,
        site: Path,
        path: Path,
        *,
        threads: int,
        n_tokens: int,
        n_sequences: int = 1,
        flash: int = -1,
        unified: bool = True,
    ) -> None:
        """Load; `n_tokens` is the room of one sequence. Raises RuntimeError."""
        self._c = c = _load(site)
        self._model = c.llama_model_load_from_file(
            str(path).encode(), c.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path.name}")
        self.vocab_size: int = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        params = c.llama_context_default_params()
        params.n_ctx = n_sequences * -(-n_tokens // 256) * 256
        params.n_batch, params.n_ubatch = max(n_tokens, _MICRO_BATCH), _MICRO_BATCH
        params.n_seq_max, params.kv_unified = n_sequences, unified
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        self._memory = c.llama_get_memory(self._context)
        self._batch = c.llama_batch_init(params.n_batch, 0, 1)

    @property
    def system_info(self) -> str:
        """The instruction sets it was built for."""
        info: bytes = self._c.llama_print_system_info()
        return info.decode()

    def forward(self, ids: Sequence[int], position: int, sequence: int = 0) -> None:
        """Cut a sequence back to `position`, run `ids`, and compute the last one's logits."""
        rows = [(token, position + i, sequence) for i, token in enumerate(ids)]
        self._c.llama_memory_seq_rm(self._memory, sequence, position, -1)
        self._decode(rows, is_wanted=[False] * (len(rows) - 1) + [True])

    def step(self, ids: Sequence[int], position: int) -> None:
        """One decode step of sequences 0, 1, ... at once, with every one's logits."""
        for sequence in range(len(ids)):
            self._c.llama_memory_seq_rm(self._memory, sequence, position, -1)
        rows = [(token, position, sequence) for sequence, token in enumerate(ids)]
        self._decode(rows, is_wanted=[True] * len(rows))

    def _decode(self, rows: Sequence[tuple[int, int, int]], is_wanted: Sequence[bool]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = is_wanted[i]
        if self._c.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        # Waits until they are computed.
        self._c.llama_get_logits_ith(self._context, len(rows) - 1)


if __name__ == "__main__":
    sys.exit(_quantize(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
