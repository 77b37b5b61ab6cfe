"""Kinds of computers, as data, and how a process is held to one.

Speed is a share of this machine's, kept by the engine's own pacer (`covey ... --speed`): a limit on
CPU time would let a stage that waits for others save up, and then compute at full speed. Memory is
held by a control group where this process may make one, else by a limit on the address space. Each
node reads a copy of the weights of its own: a file that another has read already is in memory, and
charged to nobody else.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

GB = 1 << 30
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A kind of computer; speeds are beside a two-core cloud machine's, so arbitrary elsewhere."""

    name: str
    speed: float  # share of this machine's
    memory_bytes: int

    @property
    def options(self) -> tuple[str, ...]:
        """What `covey up` and `covey join` are told."""
        return () if self.speed == 1.0 else ("--speed", f"{self.speed:g}")


# Decoding a small model is bound by memory: a Pi 4 reads about 4 GB/s, a Pi 5 10, laptops 30 and
# more. The shares follow these, not clock rates.
DEVICES = MappingProxyType(
    {
        device.name: device
        for device in (
            Device(name="pi4", speed=0.15, memory_bytes=4 * GB),
            Device(name="pi5", speed=0.35, memory_bytes=8 * GB),
            Device(name="laptop", speed=0.8, memory_bytes=16 * GB),
            Device(name="desktop", speed=1.0, memory_bytes=32 * GB),
        )
    }
)


class MemoryLimit(StrEnum):
    """What holds a process to its memory."""

    CGROUP_V2 = "cgroup v2"
    CGROUP_V1 = "cgroup v1"
    ADDRESS_SPACE = "RLIMIT_AS"


@contextmanager
def memory_limit(
    name: str, nbytes: int, *, root: Path = _CGROUPS
) -> Iterator[tuple[MemoryLimit, Callable[[], None]]]:
    """A limit that processes join by calling what this yields, in the child before it starts.

    Args:
        name: of the group; one of that name must not exist.
        nbytes: what all who join may have together; each its own with RLIMIT_AS, which also counts
            what is mapped and never touched.
        root: where control groups are mounted.

    Yields:
        What is used, and the function to call (`preexec_fn`).
    """
    for kind, group, setting in (
        (MemoryLimit.CGROUP_V2, root / name, "memory.max"),
        (MemoryLimit.CGROUP_V1, root / "memory" / name, "memory.limit_in_bytes"),
    ):
        if _make_group(group, setting, nbytes):
            try:
                yield kind, lambda group=group: _join(group)  # type: ignore[misc]
            finally:
                with suppress(OSError):  # somebody is still in it: it goes with the lab
                    group.rmdir()
            return
    yield (
        MemoryLimit.ADDRESS_SPACE,
        lambda: resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes)),
    )


def own_copy(weights: Path, folder: Path) -> Path:
    """A copy of the weights that nobody has read: written out, and dropped from memory."""
    copy = folder / weights.name
    shutil.copyfile(weights, copy)
    descriptor = os.open(copy, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return copy


def _make_group(group: Path, setting: str, nbytes: int) -> bool:
    """Whether there is a group now with that setting, which says that memory is its business."""
    if not group.parent.is_dir():
        return False
    try:
        group.mkdir()
    except OSError:
        return False
    try:
        if (group / setting).exists():
            (group / setting).write_text(f"{nbytes}\n")
            return True
    except OSError:
        pass
    group.rmdir()
    return False


def _join(group: Path) -> None:
    (group / "cgroup.procs").write_text(f"{os.getpid()}\n")
