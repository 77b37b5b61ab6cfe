"""A node's state folder: who it is, which swarm it is in, and how to find it while it runs.

One node per home, held by a lock that dies with the process. Files that hold a secret have mode
0600 and are replaced as a whole, so a crash leaves the old one or the new one.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from .errors import ConfigError

API_FILE = "api.json"
MAX_STATE_BYTES = 1 << 20  # of any JSON file here; ours take a few KiB


class Home:
    """One home, locked for as long as the context lasts.

    Raises:
        ConfigError: it cannot be written, or another node runs in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = FileLock(path / "lock", timeout=0)
            self._lock.acquire()
            self.remove(API_FILE)  # of a node that was killed; its address and key mean nothing now
        except Timeout as error:
            raise ConfigError(
                f"a node runs in {path} already: stop it with `covey stop`, or give this one "
                "another --home"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"cannot write the state folder {path} ({error.strerror}): choose another --home"
            ) from error

    @property
    def identity(self) -> Path:
        """The node's key."""
        return self.path / "identity.key"

    @property
    def store(self) -> Path:
        """The replica's database."""
        return self.path / "store.sqlite"

    @property
    def profile(self) -> Path:
        """What this device was measured to do."""
        return self.path / "profile.json"

    def load(self, name: str) -> dict[str, Any] | None:
        """A JSON state file; None if there is none.

        Raises:
            ConfigError: it is not what `save` wrote.
        """
        return read_state(self.path / name)

    def save(self, name: str, value: dict[str, Any]) -> None:
        """Replace a JSON state file, mode 0600; raises ConfigError."""
        path = self.path / name
        try:
            descriptor, temporary = tempfile.mkstemp(dir=self.path, prefix=f".{name}.")
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(value, file)
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).replace(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ConfigError(f"cannot write {path} ({error.strerror}): free some space") from error

    def remove(self, name: str) -> None:
        """Remove a state file; nothing happens if there is none."""
        (self.path / name).unlink(missing_ok=True)

    def publish_api(self, url: str, control_key: str) -> None:
        """Write `api.json`, by which commands on this machine find the node and may control it."""
        self.save(API_FILE, {"url": url, "key": control_key, "pid": os.getpid()})

    def close(self) -> None:
        """Unlock."""
        try:
            self.remove(API_FILE)
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_state(path: Path) -> dict[str, Any] | None:
    """A JSON object of at most a megabyte, or None if there is no file; raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_STATE_BYTES + 1)
        value = json.loads(data) if len(data) <= MAX_STATE_BYTES else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}): check who owns it") from error
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is damaged: remove it, then join the swarm again")
    return value
