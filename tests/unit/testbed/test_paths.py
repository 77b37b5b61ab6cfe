"""What is read off a text that came while its link moved."""

from __future__ import annotations

from testbed.labs.paths import CASES, Case, rows
from testbed.running_text import Path, Story

KILLED = next(case for case in CASES if case.name == "relay killed")
UPGRADE = next(case for case in CASES if case.name == "upgrade")


def story(text: str = "ab", *, pause_s: float = 0.1, kinds: tuple[str, ...] = ()) -> Story:
    paths = [Path(20.0 + number, kind) for number, kind in enumerate(kinds)]
    return Story(
        text=text, came_at=[10.0, 10.1, 10.1 + pause_s], paths=paths, n_tokens=3, is_over=True
    )


def missed(case: Case, story: Story) -> set[str]:
    return {row.figure for row in rows(case, story, "ab", 15.0) if row.met is False}


def test_the_same_text_with_a_short_pause_misses_nothing() -> None:
    assert not missed(KILLED, story())
    assert not missed(UPGRADE, story(kinds=("relayed", "punched")))


def test_another_text_and_a_long_pause_are_missed() -> None:
    assert missed(KILLED, story("abb")) == {"relay killed: same text as one process"}
    assert missed(KILLED, story(pause_s=3.5)) == {
        "relay killed: longest pause between two tokens, s"
    }


def test_a_link_that_did_not_move_is_missed() -> None:
    assert missed(UPGRADE, story(kinds=("relayed",))) == {"upgrade: the link moved"}


def test_a_text_that_broke_off_has_no_pause() -> None:
    broken = Story(text="a", came_at=[10.0], why="the peer was lost", is_over=True)
    assert [row.figure for row in rows(KILLED, broken, "ab", 15.0)] == [
        "relay killed: same text as one process"
    ]
