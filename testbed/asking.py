"""Asks the node of this machine for a text, and tells how it comes: `python -m testbed.asking`.

The arguments are a node's home, what to ask as JSON (keywords of `Client.generate`), and the name
of a member. It writes one JSON object a line; times are of the clock that all processes of a
machine share (`time.monotonic`). `testbed.running_text` is the other end.

    {"said": "piece", "at": ..., "text": ...}
    {"said": "path", "at": ..., "kind": ...}   what carries the link to the member, if it changed
    {"said": "end", "at": ..., "n_tokens": ..., "why": ...}   `why` is empty if the text is whole
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from covey.client import Client, ClientError, NotReady

LOOK_S = 0.1
READY_S = 30.0
_saying = threading.Lock()


def say(what: str, **facts: object) -> None:
    """Tell the lab."""
    line = json.dumps({"said": what, "at": time.monotonic(), **facts})
    with _saying:
        print(line, flush=True)


def watch(client: Client, member: str, ended: threading.Event) -> None:
    """Look again and again at what carries the link to a member."""
    last: str | None = None
    while not ended.wait(LOOK_S):
        try:
            members = client.status()["members"]
        except ClientError:
            continue  # the text's own connection tells more of it
        links = [it["link"] for it in members if it["name"] == member]
        kind = links[0]["kind"] if links and links[0] is not None else "none"
        if kind != last:
            last = kind
            say("path", kind=kind)


def ask(client: Client, wish: dict[str, Any]) -> None:
    """Take the text piece by piece."""
    give_up_at = time.monotonic() + READY_S
    n_tokens, why = 0, ""
    while True:
        try:
            with client.generate(**wish, stream=True) as stream:
                for piece in stream:
                    say("piece", text=piece.text)
                n_tokens = stream.result.usage.completion_tokens
        except NotReady as error:
            if time.monotonic() < give_up_at:
                time.sleep(error.retry_after_s)
                continue
            why = str(error)
        except ClientError as error:
            why = str(error)
        break
    say("end", n_tokens=n_tokens, why=why)


def main(home: str, wish: str, member: str) -> None:
    """Ask, and watch meanwhile."""
    ended = threading.Event()
    with Client(home=Path(home)) as client:
        watching = threading.Thread(target=watch, args=(client, member, ended))
        watching.start()
        try:
            ask(client, json.loads(wish))
        finally:
            ended.set()
            watching.join()


if __name__ == "__main__":
    main(*sys.argv[1:4])
