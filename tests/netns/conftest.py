"""Tests that ask for `inside` run in network namespaces; all that were selected in one go there.

The first of them starts another pytest inside, with the same tests, and each then ends as it did
there. Where namespaces are not to be had they are skipped, and say why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from testbed import namespaces
from testbed.lab import TOOLS

ROOT = Path(__file__).parents[2]
REPORT = "COVEY_LAB_REPORT"  # where the pytest inside writes how each test ended
INSIDE_S = 300.0
ANY_MARK = "lab or not lab"  # they were selected outside
_OUTCOMES: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="session")
def inside() -> Path:
    """A folder in memory, of the namespaces that the test runs in."""
    return namespaces.prepare()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """In place of running a test here, say how it ended inside."""
    if not _belongs_inside(item) or namespaces.is_inside():
        return None
    if not _OUTCOMES:
        _OUTCOMES.update(_outcomes([it.nodeid for it in item.session.items if _belongs_inside(it)]))
    ended = _OUTCOMES[item.nodeid]
    is_skipped = ended["outcome"] == "skipped"
    report = pytest.TestReport(
        item.nodeid,
        item.location,
        dict.fromkeys(item.keywords, 1),
        ended["outcome"],  # type: ignore[arg-type]
        (str(item.path), 0, ended["said"]) if is_skipped else ended["said"] or None,
        "setup" if is_skipped else "call",
        duration=float(ended["duration_s"]),
    )
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # What the test before this one left for its neighbours; pytest does it in its own protocol.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Inside: write down how a test ended, for the pytest outside."""
    if REPORT in os.environ and (report.when == "call" or report.outcome != "passed"):
        said = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        facts = {
            "id": report.nodeid,
            "outcome": report.outcome,
            "said": said,
            "duration_s": report.duration,
        }
        with Path(os.environ[REPORT]).open("a") as lines:
            lines.write(json.dumps(facts) + "\n")


def _belongs_inside(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and "inside" in item.fixturenames


def _outcomes(chosen: list[str]) -> dict[str, dict[str, str]]:
    """How each of the chosen tests ended inside, by its id."""
    try:
        namespaces.check_available(TOOLS)
    except namespaces.LabUnavailable as error:
        skipped = {"outcome": "skipped", "said": str(error), "duration_s": "0"}
        return dict.fromkeys(chosen, skipped)
    with TemporaryDirectory() as folder:
        report = Path(folder, "report")
        report.touch()
        done = namespaces.run_inside(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", ANY_MARK, *chosen],
            environment={REPORT: str(report)},
            timeout_s=INSIDE_S,
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        ended = [json.loads(line) for line in report.read_text().splitlines()]
    never = {"outcome": "failed", "said": f"never ended inside:\n{done.stdout}", "duration_s": "0"}
    return {**dict.fromkeys(chosen, never), **{facts["id"]: facts for facts in ended}}
