"""Laws of the stop string matcher, against a search over the whole text."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.text.stop_strings import StopMatcher

SMALL_TEXT = st.text(alphabet="abc", max_size=24)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), min_size=1, max_size=4)


def expected(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The first stop to be complete wins; of those that end together the longest."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return (text[:end] if include_stop else text[: end - len(stop)]), stop


def run(matcher: StopMatcher, pieces: list[str]) -> tuple[str, str | None]:
    shown = ""
    for piece in pieces:
        scan = matcher.feed(piece)
        shown += scan.text
        if scan.matched is not None:
            return shown, scan.matched
    return shown + matcher.flush(), None


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


@settings(deadline=None, max_examples=300)
@given(SMALL_TEXT, STOPS, st.lists(st.integers(0, 100), max_size=6), st.booleans())
def test_result_is_that_of_a_search_over_the_whole_text_however_it_is_cut(
    text: str, stops: list[str], places: list[int], include_stop: bool
) -> None:
    assert run(StopMatcher(stops, include_stop), cut(text, places)) == expected(text, stops, include_stop)


@settings(deadline=None, max_examples=200)
@given(SMALL_TEXT, STOPS)
def test_held_text_is_the_longest_end_that_may_still_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    scan = matcher.feed(text)
    if scan.matched is not None:
        return
    beginnings = {stop[:size] for stop in stops for size in range(len(stop))}
    longest = max(size for size in range(len(text) + 1) if text[len(text) - size :] in beginnings)
    assert scan.text == text[: len(text) - longest]


def test_a_stop_completed_while_unarmed_is_ordinary_text() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.feed("xab", armed=False).text == "xab"
    scan = matcher.feed("yab")
    assert (scan.text, scan.matched) == ("y", "ab")


def test_a_stop_begun_while_unarmed_counts_when_it_is_completed_armed() -> None:
    matcher = StopMatcher(["ab"])
    assert matcher.feed("xa", armed=False).text == "x"
    scan = matcher.feed("b")
    assert (scan.text, scan.matched) == ("", "ab")


def test_without_stops_text_passes_at_once() -> None:
    matcher = StopMatcher([])
    assert matcher.feed("anything").text == "anything"
    assert matcher.flush() == ""
