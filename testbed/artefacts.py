"""What a failed measurement leaves: logs and captures, in a folder that outlives the lab."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from .lab import Lab

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

    def close(self) -> None:
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
        """Record what machines send and receive on their cables, until the cell is over."""
        for name in names:
            script = (sys.executable, "-I", "-S", str(_CAPTURE))
            target = (lab.interface(name), str(self.folder / f"{name}.pcap"))
            log = self.log(f"{name}-capture")
            self._captures.append(lab.start(name, *script, *target, log=log))

    def stop(self) -> None:
        """End the captures."""
        for capture in self._captures:
            capture.kill()
            capture.wait()
