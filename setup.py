"""The native kernels: one shared library per instruction set. Everything else is in pyproject.toml.

Each is optional: without a C++ compiler, or with one that lacks the instruction set, installation
goes on and the node says at run time which engine it uses and why.
"""

import copy
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = "covey.node.kernels"
SOURCES = Path("node/kernels/src")
# Nothing is fused that does not say so: results are the same on every instruction set.
FLAGS = ("-std=c++17", "-O3", "-g0", "-DNDEBUG", "-fvisibility=hidden", "-ffp-contract=off",
         "-fno-math-errno", "-pthread", "-Wall", "-Wextra", "-Wno-psabi",
         # GCC 12 warns of its own intrinsics (bug 105593)
         "-Wno-maybe-uninitialized", "-Wno-uninitialized")  # fmt: skip
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni",
          "-mprefer-vector-width=512")  # fmt: skip
# Their names are those of isa.cpp. "portable" runs on every CPU of its kind; on ARM that has NEON.
ISAS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "portable": (),
        "avx2": AVX2,
        "avx2vnni": (*AVX2, "-mavxvnni"),
        "avx512vnni": AVX512,
    },
    "aarch64": {
        "portable": (),
        "neon_dotprod": ("-march=armv8.2-a+dotprod",),
        "neon_i8mm": ("-march=armv8.2-a+dotprod+i8mm",),
    },
}


class BuildKernels(build_ext):
    """Compiles each library in a folder of its own: they have their sources in common."""

    def build_extension(self, ext: Extension) -> None:
        """Called for several extensions at once."""
        own = copy.copy(self)
        own.build_temp = str(Path(self.build_temp) / ext.name)
        super(BuildKernels, own).build_extension(ext)


def extension(isa: str, flags: tuple[str, ...]) -> Extension:
    """The library `_<isa>`; sources are shared, only the flags differ."""
    return Extension(
        f"{PACKAGE}._{isa}",
        sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
        depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=["-pthread"],
        language="c++",
        optional=True,
    )


def isas() -> dict[str, tuple[str, ...]]:
    """Name and flags of every library that makes sense on this kind of machine."""
    machine = platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return ISAS.get(machine, {"portable": ()})


if __name__ == "__main__":
    setup(
        ext_modules=[extension(isa, flags) for isa, flags in isas().items()],
        cmdclass={"build_ext": BuildKernels},
        options={"build_ext": {"parallel": 2}},  # each takes 300 MB for a while
    )
