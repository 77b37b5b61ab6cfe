"""The lab's first scenario, as `make lab` runs it: two hosts, one invite, one text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from testbed.namespaces import LabUnavailable, check_available

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(180)]


def test_a_machine_that_pastes_the_invite_shares_the_model() -> None:
    try:
        check_available()
    except LabUnavailable as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-m", "testbed", "--mdns", "off"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
        # The lab is not installed: it is found in the checkout, which pytest's runs keep off.
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["missed"] == 0, report
    assert sum(row["met"] is True for row in report["rows"]) == 7
