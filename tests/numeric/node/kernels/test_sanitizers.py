"""The kernels' own test under AddressSanitizer and UBSan, for every instruction set of this CPU."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from covey.node.kernels.errors import KernelsUnavailable
from covey.node.kernels.library import load_library

ROOT = Path(__file__).parents[4]
BUILD = runpy.run_path(str(ROOT / "setup.py"))
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("isa", BUILD["isas"]())
def test_the_kernels_stay_within_their_buffers(isa: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    try:
        load_library(isa)
    except KernelsUnavailable as error:
        pytest.skip(str(error))
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
