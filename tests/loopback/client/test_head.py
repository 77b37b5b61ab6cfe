"""A head-only node as a child: a small program stands in for `covey join`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from covey.client import AsyncClient, Client, NoLocalNode
from covey.client.head import HeadOnlyNode

pytestmark = pytest.mark.network

STATUS = r"""
import http.server, json, os, signal, sys
from pathlib import Path

home = Path(sys.argv[sys.argv.index("--home") + 1])
signal.signal(signal.SIGTERM, {on_term})

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        facts = {{"argv": sys.argv[1:], "key": self.headers["Authorization"], "pid": os.getpid()}}
        body = json.dumps(facts).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
facts = {{"url": f"http://127.0.0.1:{{server.server_port}}", "key": "k", "pid": os.getpid()}}
(home / "new").write_text(json.dumps(facts))
(home / "new").rename(home / "api.json")
server.serve_forever()
"""
POLITE = STATUS.format(on_term="lambda *_: sys.exit()")
STUBBORN = STATUS.format(on_term="signal.SIG_IGN")


@pytest.fixture(autouse=True)
def temporary_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the heads' homes are made, to see that they are gone."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let `program` run where Python would; it gets the same arguments."""
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable} -S\n{program}")
    path.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(path))


def is_empty(folder: Path) -> bool:
    return not list(folder.iterdir())


def test_an_invite_starts_a_head_that_ends_with_the_client(
    tmp_path: Path, temporary_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, POLITE)
    with Client("covey1abc") as client:
        facts = client.status()
        (home,) = temporary_folders.glob("covey-head-*")
        assert home.stat().st_mode & 0o077 == 0
    assert facts["key"] == "Bearer k"
    assert facts["argv"][:4] == ["-m", "covey.cli", "join", "covey1abc"]
    assert facts["argv"][facts["argv"].index("--home") + 1] == str(home)
    assert not psutil.pid_exists(facts["pid"])
    assert is_empty(temporary_folders)


def test_a_saved_swarm_starts_a_head_in_its_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, POLITE)
    (tmp_path / "swarm.json").write_text("{}")
    with Client(home=tmp_path) as client:
        facts = client.status()
    assert facts["argv"][2:6] == ["join", "--max-blocks", "0", "--home"]
    assert not psutil.pid_exists(facts["pid"])
    assert (tmp_path / "swarm.json").exists()


async def test_the_async_client_starts_one_too(
    tmp_path: Path, temporary_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, POLITE)
    client = AsyncClient("covey1abc")
    first, second = await asyncio.gather(client.status(), client.status())
    assert first["pid"] == second["pid"]  # one child, not two
    await client.aclose()
    assert not psutil.pid_exists(first["pid"])
    assert is_empty(temporary_folders)


def test_a_head_that_does_not_start_says_why_in_its_last_line(
    tmp_path: Path, temporary_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import sys; sys.exit('noise\\nthis invite has \\x1b[31mexpired\\n\\n')"
    stand_in(tmp_path, monkeypatch, program)
    with pytest.raises(NoLocalNode, match=r"could not start: this invite has \[31mexpired$"):
        Client("covey1abc")
    assert is_empty(temporary_folders)


def test_a_head_that_is_not_ready_in_time_is_stopped(
    tmp_path: Path, temporary_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, "import signal; signal.pause()")
    monkeypatch.setattr("covey.client.sync_client.START_TIMEOUT_S", 0.1)
    with pytest.raises(NoLocalNode, match=r"not ready within 0.1 s: it said nothing"):
        Client("covey1abc")
    assert is_empty(temporary_folders)


async def test_cancelling_the_start_stops_the_head(
    tmp_path: Path, temporary_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch, "import signal; signal.pause()")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await AsyncClient("covey1abc").status()
    assert is_empty(temporary_folders)


def test_a_head_that_does_not_listen_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("covey.client.head.STOP_GRACE_S", 0.1)
    stand_in(tmp_path, monkeypatch, STUBBORN)
    with Client("covey1abc") as client:
        pid = client.status()["pid"]
    assert not psutil.pid_exists(pid)


def test_a_head_ends_with_a_program_that_forgets_to_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = sys.executable
    stand_in(tmp_path, monkeypatch, POLITE)
    forgetful = f"""
        import sys
        sys.executable = {sys.executable!r}
        from covey.client import Client
        client = Client("covey1abc")
        print(client.status()["pid"])
        """
    done = subprocess.run(
        [interpreter, "-c", textwrap.dedent(forgetful)], capture_output=True, check=True, timeout=30
    )
    assert not psutil.pid_exists(int(done.stdout))


def test_closing_twice_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, POLITE)
    head = HeadOnlyNode(invite="covey1abc", home=None)
    head.close()
    head.close()
