"""What the figures of the engine have in common: the files, the builds, the children, the rows."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .contest import Child, Contest, Spec, Turn, hold
from .installs import CannotBuild, cache_folder
from .llama_cpp import ensure_build
from .rows import Row

THREADS = (1, 2)
MEMORY = "memory"  # the name of the read test among contestants


def threads_text(threads: int) -> str:
    """As figures are named."""
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


def covey(kind: str) -> str:
    """Name of our engine on a file."""
    return f"covey {kind}"


def llama(kind: str, flash: int) -> str:
    """Name of llama.cpp on a file."""
    return f"llama.cpp {kind}, flash {('off', 'on')[flash]}"


def llamas(kinds: Iterable[str]) -> list[str]:
    """Every llama.cpp on these files: flash attention is tried both ways everywhere."""
    return [llama(kind, flash) for kind in kinds for flash in (0, 1)]


@dataclass(slots=True)
class Lab:
    """One run of the benchmark.

    Rows that could not be measured are in `failures`, by name, with the reason.
    """

    model: str  # as a figure is named
    files: Mapping[str, Path]  # by format; the first is the model as users get it
    rounds: int
    steps: int  # of a decode turn
    console: Console
    rows: list[Row] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)

    @property
    def shipped(self) -> str:
        """The format of the model as users get it."""
        return next(iter(self.files))

    def hold(
        self,
        title: str,
        turns: Mapping[str, Turn],
        rounds: int | None = None,
        *,
        candidates: Sequence[Sequence[str]] = (),
        screening: int = 2,
        unit: str = "tok/s",
    ) -> Contest:
        """A contest with a progress display, and its speeds printed when it is over."""
        rounds = self.rounds if rounds is None else rounds
        progress = Progress(
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TextColumn("{task.fields[who]}"),),
            console=self.console,
            auto_refresh=False,  # its thread would take time from a contestant
            transient=True,
        )
        with progress:
            task = progress.add_task(title, total=(rounds + 1) * len(turns), who="")

            def show(who: str) -> None:
                progress.update(task, advance=1, who=who, refresh=True)

            contest = hold(turns, rounds, candidates=candidates, screening=screening, on_turn=show)
        self._print(title, contest, unit)
        return contest

    def _print(self, title: str, contest: Contest, unit: str) -> None:
        self.console.print(f"\n[bold]{title}[/bold]")
        for name in contest.speeds:
            speed = contest.speed(name)
            text = f"{speed / 1e9:10.2f} GB/s" if name == MEMORY else f"{speed:10.1f} {unit}"
            self.console.print(f"  {name:38} {text}", highlight=False)
        for name, speed in contest.left.items():
            self.console.print(f"  {name:38} {speed:10.1f} {unit}, far behind: left", style="dim")
        for name, why in contest.failures.items():
            self.console.print(f"  {name:38} {why}", style="red", markup=False, soft_wrap=True)

    def ratio(
        self,
        contest: Contest,
        figure: str,
        name: str,
        others: Sequence[str],
        target: float | None = None,
        *,
        scale: float = 1.0,
    ) -> None:
        """Add the row of `name` over the best of `others`, times `scale`."""
        value = contest.ratio(name, others)
        if value is None:
            known = [contest.failures[who] for who in (name, *others) if who in contest.failures]
            self.failures.append((figure, known[0] if known else "no contestant"))
        else:
            self.rows.append(Row(figure, scale * value, target, "at least"))

    def add(
        self,
        figure: str,
        value: float,
        target: float | None = None,
        direction: Literal["at most", "at least"] = "at most",
    ) -> None:
        """Add a row that is no ratio of speeds."""
        self.rows.append(Row(figure, value, target, direction))

    @contextmanager
    def children(self, specs: Mapping[str, Spec]) -> Iterator[dict[str, Child]]:
        """Contestants' processes, by name; gone at the end."""
        with ExitStack() as stack:
            yield {name: stack.enter_context(Child(spec)) for name, spec in specs.items()}

    def covey_specs(
        self, kinds: Iterable[str], threads: int, n_tokens: int, isa: str = ""
    ) -> dict[str, Spec]:
        """Our engine on each of these files."""
        return {
            covey(kind): Spec(
                engine="covey",
                path=str(self.files[kind]),
                threads=threads,
                n_tokens=n_tokens,
                isa=isa,
            )
            for kind in kinds
        }

    def llama_specs(
        self, kinds: Iterable[str], threads: int, n_tokens: int, variant: str = "native"
    ) -> dict[str, Spec]:
        """llama.cpp on each of these files, with flash attention off and on."""
        site = self.build(variant)
        return {
            llama(kind, flash): Spec(
                engine="llama.cpp",
                path=str(self.files[kind]),
                threads=threads,
                n_tokens=n_tokens,
                library=str(site),
                flash=flash,
            )
            for kind in kinds
            for flash in (0, 1)
        }

    def build(self, variant: str) -> Path:
        """A build of llama.cpp; see `ensure_build`."""
        return ensure_build(variant, self.console.print)


def build_reader() -> Path:
    """Compile the read test for this CPU; raises CannotBuild."""
    source, library = Path(__file__).with_name("read_bandwidth.cpp"), cache_folder() / "reader.so"
    named = os.environ.get("CXX")
    compiler = named or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise CannotBuild("no C++ compiler for the read test")
    flags = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread")
    done = subprocess.run(
        [compiler, *flags, str(source), "-o", str(library)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotBuild(f"cannot compile the read test: {done.stderr.strip()[:200]}")
    return library
