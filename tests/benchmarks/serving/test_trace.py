"""A trace on disk is the trace, and a line that is none is named."""

import json
from pathlib import Path

import pytest

from benchmarks.serving.trace import TraceError, TraceRequest, read_trace, write_trace
from benchmarks.workload import Popularity, open_loop_trace

GOOD = {"at_s": 1.5, "adapter": "pirate", "input_tokens": 12, "output_tokens": 3}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    trace = (
        *open_loop_trace(Popularity(5), rate=3, duration_s=10),
        TraceRequest(100.0, "pirate", 3, 8, (5, 0, 7)),
        TraceRequest(100.0, None, 9, 1),
    )
    write_trace(tmp_path / "trace.jsonl", trace)
    assert read_trace(tmp_path / "trace.jsonl") == trace


def test_empty_lines_are_skipped_and_the_base_model_need_not_be_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('\n{"at_s": 0, "prompt_token_ids": [1, 2], "output_tokens": 4}\n\n')
    assert read_trace(path) == (TraceRequest(0.0, None, 2, 4, (1, 2)),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at_s": -1}, "at_s is -1; it must be a number of seconds, 0 or more"),
        ({"at_s": "now"}, 'at_s is "now"; it must be'),
        ({"at_s": float("nan")}, "at_s is NaN"),
        ({"at_s": 0.5}, "at_s is 0.5, earlier than the 1.5 of the request before"),
        ({"adapter": ""}, 'adapter is ""; it must be a name, a number from 0, or null'),
        ({"adapter": -1}, "adapter is -1"),
        ({"adapter": 1.5}, "adapter is 1.5"),
        ({"adapter": True}, "adapter is true"),
        ({"input_tokens": 0}, "input_tokens is 0; it must be a whole number, 1 or more"),
        ({"input_tokens": 2.5}, "input_tokens is 2.5"),
        ({"output_tokens": None}, "output_tokens is null"),
        ({"prompt_token_ids": [1]}, "exactly one of input_tokens and prompt_token_ids"),
        ({"input_tokens": ...}, "exactly one of input_tokens and prompt_token_ids"),
        ({"input_tokens": ..., "prompt_token_ids": []}, "prompt_token_ids is \\[\\]; it must be a list of at least one token id"),
        ({"input_tokens": ..., "prompt_token_ids": [1, -1]}, "prompt_token_ids is \\[1, -1\\]"),
        ({"ouput_tokens": 3}, "unknown field 'ouput_tokens'; a request has at_s, adapter"),
    ],
)
def test_a_wrong_line_is_named_with_what_is_wrong(tmp_path: Path, change: dict[str, object], message: str) -> None:
    wrong = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(wrong) + "\n")
    with pytest.raises(TraceError, match=f"trace.jsonl, line 2: {message}"):
        read_trace(path)


@pytest.mark.parametrize(("text", "message"), [("[1]", "a request is a JSON object"), ("{", "not JSON"), ("", "has no requests")])
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(path)
