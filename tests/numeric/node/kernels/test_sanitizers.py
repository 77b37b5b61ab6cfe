"""The kernels' own test under AddressSanitizer and UBSan.

Compiling takes most of a minute for each instruction set, so `make test-lab` does it; and only the
portable build and the best of this CPU, unless COVEY_ALL_ISAS is set, as CI does.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from covey.node.kernels.errors import KernelsUnavailable
from covey.node.kernels.library import load_library

ROOT = Path(__file__).parents[4]
BUILD = runpy.run_path(str(ROOT / "setup.py"))
SANITIZERS = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.lab
@pytest.mark.timeout(300)
@pytest.mark.parametrize("isa", BUILD["isas"]())
def test_the_kernels_stay_within_their_buffers(isa: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    try:
        library = load_library(isa)
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    if isa != library.best_isa and not os.environ.get("COVEY_ALL_ISAS"):
        pytest.skip("set COVEY_ALL_ISAS to test this one too")
    sources = ROOT / "node" / "kernels" / "src"
    flags = [flag for flag in BUILD["FLAGS"] if flag not in ("-O3", "-g0", "-DNDEBUG")]
    program = tmp_path / "selftest"
    subprocess.run(
        [
            *(compiler, *flags, *SANITIZERS, *BUILD["isas"]()[isa], "-I", str(sources)),
            *(str(path) for path in sorted(sources.glob("*.cpp"))),
            *(str(Path(__file__).parent / "selftest.cpp"), "-o", str(program)),
        ],
        check=True,
    )
    subprocess.run([program], check=True, timeout=200)
