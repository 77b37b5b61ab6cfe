"""What benchmarks measure against, installed by pip once and kept in the user's cache.

Nothing of Covey needs it, so it never goes into Covey's own environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import platformdirs


class CannotBuild(Exception):
    """A package could not be built or fetched; the text says where the output is."""


def cache_folder() -> Path:
    """Where builds, requantised files and synthetic models are kept between runs."""
    folder = Path(platformdirs.user_cache_dir("covey")) / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def install(
    folder: Path, arguments: Sequence[str], environ: Mapping[str, str] | None = None
) -> None:
    """Have pip fill a new `folder`, to be put on sys.path; without dependencies.

    Raises:
        CannotBuild: no compiler, no network, or pip failed.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    log_path = folder.with_name(f"{folder.name}.log")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [*(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(unfinished))]
    with log_path.open("w") as log:
        done = subprocess.run(
            [*command, *arguments],
            env={**os.environ, **(environ or {})},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise CannotBuild(f"cannot install {folder.name}: see {log_path}")
    unfinished.rename(folder)
