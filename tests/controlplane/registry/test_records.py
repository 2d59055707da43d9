"""Records survive their JSON, and revisions their text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.registry.records import AdapterRecord, Revision, VersionRecord, record_from_json, record_to_json

versions = st.builds(
    VersionRecord,
    digest=st.text("0123456789abcdef", min_size=64, max_size=64),
    base_model=st.text(max_size=20),
    rank=st.integers(1, 512),
    alpha=st.floats(0, 1e6, allow_nan=False),
    rslora=st.booleans(),
    target_modules=st.lists(st.sampled_from(["q_proj", "down_proj"]), unique=True).map(tuple),
    size_bytes=st.integers(0, 1 << 50),
    num_pages=st.integers(1, 1 << 20),
    base_key=st.text(max_size=20),
    create_time_us=st.integers(0, 1 << 60),
)


@st.composite
def records(draw: st.DrawFn) -> AdapterRecord:
    """Any adapter."""
    owned = draw(st.lists(versions, min_size=1, max_size=3))
    return AdapterRecord(
        name=draw(st.text(min_size=1, max_size=20)),
        current=owned[0].digest,
        versions=tuple(owned),
        etag="e",
        create_time_us=draw(st.integers(0, 1 << 60)),
        update_time_us=draw(st.integers(0, 1 << 60)),
        aliases=draw(st.dictionaries(st.text(max_size=8), st.just(owned[0].digest), max_size=3)),
        labels=draw(st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)),
        tenant=draw(st.text(max_size=8)),
        pinned=draw(st.booleans()),
    )


@given(records())
@settings(max_examples=50)
def test_a_record_reads_back_as_it_was_written(record: AdapterRecord) -> None:
    assert record_from_json(record_to_json(record)) == record


@given(records())
@settings(max_examples=5)
def test_fields_of_a_newer_version_are_left_out(record: AdapterRecord) -> None:
    body = json.loads(record_to_json(record)) | {"mood": "good"}
    body["versions"][0]["mood"] = "better"
    assert record_from_json(json.dumps(body)) == record


@given(st.text("0123456789abcdef", min_size=1, max_size=8), st.integers(0, 10**17))
def test_a_revision_reads_back_as_it_was_written(registry_id: str, number: int) -> None:
    revision = Revision(registry_id, number)
    assert Revision.parse(str(revision)) == revision


@pytest.mark.parametrize("text", ["", "7", "-7", "xyz-1", "ab-", "ab--1", "ab-1\n", "ab-" + "9" * 30])
def test_what_is_no_revision_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(ValueError, match="is not a revision"):
        Revision.parse(text)
