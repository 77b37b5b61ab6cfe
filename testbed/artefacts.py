"""What a failed measurement leaves: logs and captures, in a folder that outlives the lab."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from types import TracebackType
from typing import Self

from .lab import Lab
from .namespaces import LabUnavailable

_BEGIN_S = 10.0
_CAPTURE = Path(__file__).with_name("capture.py")


class Artefacts:
    """A folder for one run, and in it one for each cell; what went well is thrown away."""

    def __init__(self, lab: str) -> None:
        """Make the folder.

        Args:
            lab: what is run; becomes part of its name.
        """
        self.root = Path(mkdtemp(prefix=f"covey-{lab}-"))

    @contextmanager
    def cell(self, name: str) -> Iterator[Cell]:
        """A folder for one cell; stays if the cell is marked as failed, or raises."""
        cell = Cell(self.root / name.replace(" ", "-"))
        cell.folder.mkdir()
        try:
            yield cell
        except BaseException:
            cell.has_failed = True
            raise
        finally:
            cell.stop()
            if not cell.has_failed:
                shutil.rmtree(cell.folder)

    def __enter__(self) -> Self:
        """As it is."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Name the folder if a cell of it has failed, else remove it."""
        if any(path.is_dir() for path in self.root.iterdir()):
            print(f"logs and captures of what failed: {self.root}")
        else:
            shutil.rmtree(self.root)


class Cell:
    """One folder of logs and captures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.has_failed = False
        self._captures: list[subprocess.Popen[bytes]] = []

    def log(self, name: str) -> Path:
        """Where the process of that name may log."""
        return self.folder / f"{name}.log"

    def capture(self, lab: Lab, names: Iterable[str]) -> None:
        """Record what machines send and receive on their cables, until the cell is over.

        Raises:
            LabUnavailable: a capture does not begin.
        """
        files = {name: self.folder / f"{name}.pcap" for name in names}
        for name, file in files.items():
            command = (sys.executable, "-I", "-S", str(_CAPTURE), lab.interface(name), str(file))
            log = self.log(f"{name}-capture")
            self._captures.append(lab.start(name, *command, log=log))
        deadline = time.monotonic() + _BEGIN_S
        for name, file in files.items():
            # It writes the file's head once it listens.
            while not file.exists() or not file.stat().st_size:
                if time.monotonic() > deadline:
                    raise LabUnavailable(f"the capture at {name} does not begin; see its log")
                time.sleep(0.01)

    def stop(self) -> None:
        """End the captures."""
        for capture in self._captures:
            capture.kill()
            capture.wait()
