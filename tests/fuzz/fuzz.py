"""Coverage-guided fuzzing of the three decoders that read hostile bytes.

    python tests/fuzz/fuzz.py frame|envelope|gguf [-max_total_time=60] [CORPUS_FOLDER]

Needs `pip install atheris`. A crash is any exception that is not one of Covey's own; atheris
leaves the input in the current folder. Not part of `make test`: the property tests are.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["covey"]):
    from covey.node.model.errors import ModelError
    from covey.node.model.gguf import GgufFile
    from covey.store import envelope
    from covey.store.errors import UpdateRejected
    from covey.transport.codec import decode_frame
    from covey.transport.errors import ProtocolViolation
    from covey.transport.framing import FrameDecoder

_GGUF = Path(tempfile.mkdtemp(prefix="covey-fuzz-")) / "input.gguf"


def fuzz_frame(data: bytes) -> None:
    """Any bytes of a link, in two pieces."""
    decoder = FrameDecoder()
    cut = len(data) // 3
    try:
        for piece in (data[:cut], data[cut:]):
            for raw in decoder.feed(piece):
                decode_frame(raw.header, raw.body)
    except ProtocolViolation:
        return


def fuzz_envelope(data: bytes) -> None:
    """Any bytes as one envelope of the store."""
    try:
        envelope.decode(data)
    except UpdateRejected:
        return


def fuzz_gguf(data: bytes) -> None:
    """Any bytes behind the magic of a GGUF file."""
    _GGUF.write_bytes(b"GGUF" + data)
    try:
        GgufFile(_GGUF).close()
    except ModelError:
        return


TARGETS: dict[str, Callable[[bytes], None]] = {
    "frame": fuzz_frame,
    "envelope": fuzz_envelope,
    "gguf": fuzz_gguf,
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(TARGETS)} [libFuzzer options]")
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()
