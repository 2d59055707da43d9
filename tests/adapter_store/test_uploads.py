"""An upload arrives whole or not at all, is used once, and leaves nothing behind."""

import errno
import hashlib
from pathlib import Path

import pytest

from adapter_store.errors import SourceNotFoundError, StoreFullError, UploadError
from adapter_store.uploads import Upload, UploadArea

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class FakeClock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def area(tmp_path: Path, clock: FakeClock) -> UploadArea:
    """Room for two uploads of 100 bytes each."""
    return UploadArea(tmp_path / "uploads", max_bytes=100, max_uploads=2, ttl_s=60.0, clock=clock)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def send(upload: Upload, name: str, content: bytes) -> None:
    """One file, in chunks of 7 bytes."""
    upload.open_file(name, len(content), sha256(content))
    for start in range(0, len(content), 7):
        upload.write(content[start : start + 7])


def send_both(area: UploadArea) -> str:
    """A whole upload."""
    upload = area.begin()
    send(upload, CONFIG, b"{}")
    send(upload, WEIGHTS, b"0123456789" * 3)
    assert upload.size_bytes == 32
    return upload.finish()


def files(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "uploads").iterdir())


def test_a_disk_that_is_full_is_no_bug(area: UploadArea, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    upload = area.begin()
    with monkeypatch.context() as full:
        full.setattr(Path, "open", fail)
        full.setattr(Path, "mkdir", fail)
        with pytest.raises(StoreFullError, match=f"opening {CONFIG} failed: No space left on device"):
            upload.open_file(CONFIG, 2, sha256(b"{}"))
        with pytest.raises(StoreFullError, match="making a directory failed: No space left on device"):
            area.begin()
    upload.discard()
    send_both(area)
    send_both(area)


def test_a_finished_upload_can_be_taken_once_and_is_removed_after_use(area: UploadArea, tmp_path: Path) -> None:
    upload_id = send_both(area)
    with area.take(upload_id) as directory:
        assert (directory / CONFIG).read_bytes() == b"{}"
        assert (directory / WEIGHTS).read_bytes() == b"0123456789" * 3
        with pytest.raises(SourceNotFoundError), area.take(upload_id):
            pass
    assert files(tmp_path) == []
    with pytest.raises(SourceNotFoundError, match="used already or has expired"), area.take(upload_id):
        pass


def test_an_upload_is_removed_even_if_its_use_fails(area: UploadArea, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), area.take(send_both(area)):
        raise RuntimeError("import failed")
    assert files(tmp_path) == []


def test_an_upload_that_is_not_taken_expires(area: UploadArea, clock: FakeClock, tmp_path: Path) -> None:
    upload_id = send_both(area)
    clock.now += 59.9
    area.expire()
    assert len(files(tmp_path)) == 1
    clock.now += 0.1
    with pytest.raises(SourceNotFoundError), area.take(upload_id):
        pass
    assert files(tmp_path) == []


def test_an_upload_in_use_does_not_expire(area: UploadArea, clock: FakeClock) -> None:
    with area.take(send_both(area)) as directory:
        clock.now += 1000
        area.expire()
        assert (directory / CONFIG).exists()


def test_uploads_are_bounded_in_number_until_one_ends(area: UploadArea, clock: FakeClock) -> None:
    first = area.begin()
    send_both(area)
    with pytest.raises(StoreFullError, match="2 arrive or wait to be used; the limit is 2"):
        area.begin()
    first.discard()
    area.begin()
    clock.now += 60
    area.begin()


def test_a_discarded_upload_leaves_nothing_and_cannot_be_taken(area: UploadArea, tmp_path: Path) -> None:
    upload = area.begin()
    upload.open_file(CONFIG, 10, sha256(b"x" * 10))
    upload.write(b"x")
    upload.discard()
    upload.discard()
    assert files(tmp_path) == []


def test_an_upload_that_fails_within_its_context_is_discarded(area: UploadArea, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), area.begin() as upload:
        upload.open_file(CONFIG, 10, sha256(b"x" * 10))
        raise RuntimeError("the client went away")
    assert files(tmp_path) == []


def test_discarding_after_finish_keeps_the_upload(area: UploadArea) -> None:
    with area.begin() as upload:
        send(upload, CONFIG, b"{}")
        send(upload, WEIGHTS, b"x")
        upload_id = upload.finish()
    upload.discard()
    with area.take(upload_id):
        pass


def test_an_upload_that_still_arrives_cannot_be_taken(area: UploadArea, tmp_path: Path) -> None:
    area.begin()
    [directory] = files(tmp_path)
    with pytest.raises(SourceNotFoundError), area.take(directory.name):
        pass


@pytest.mark.parametrize("upload_id", ["", "..", "../uploads", "x" * 32])
def test_an_unknown_id_is_not_found(upload_id: str, area: UploadArea) -> None:
    with pytest.raises(SourceNotFoundError), area.take(upload_id):
        pass


def test_a_new_process_removes_what_the_last_one_left(area: UploadArea, tmp_path: Path) -> None:
    send_both(area)
    (tmp_path / "uploads" / "stray").touch()
    UploadArea(tmp_path / "uploads", max_bytes=100, max_uploads=2)
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["", "adapter_model.bin", "../adapter_config.json", "/etc/passwd", "a/adapter_config.json"])
def test_a_name_that_is_not_an_adapters_file_is_refused(name: str, area: UploadArea) -> None:
    with pytest.raises(UploadError, match=CONFIG) as caught:
        area.begin().open_file(name, 1, sha256(b"x"))
    assert caught.value.field == "file.name"


def test_the_same_file_twice_is_refused(area: UploadArea) -> None:
    upload = area.begin()
    send(upload, CONFIG, b"{}")
    with pytest.raises(UploadError, match="was sent already"):
        upload.open_file(CONFIG, 2, sha256(b"{}"))


@pytest.mark.parametrize("digest", ["", "abc", "g" * 64, "0" * 65])
def test_a_checksum_that_is_none_is_refused(digest: str, area: UploadArea) -> None:
    with pytest.raises(UploadError) as caught:
        area.begin().open_file(CONFIG, 1, digest)
    assert caught.value.field == "file.sha256"


def test_an_empty_file_is_refused(area: UploadArea) -> None:
    with pytest.raises(UploadError) as caught:
        area.begin().open_file(CONFIG, 0, sha256(b""))
    assert caught.value.field == "file.size_bytes"


def test_a_chunk_without_a_file_is_refused(area: UploadArea) -> None:
    with pytest.raises(UploadError, match="before the header of a file"):
        area.begin().write(b"x")


def test_a_file_longer_than_its_header_says_is_refused(area: UploadArea) -> None:
    with area.begin() as upload:
        upload.open_file(CONFIG, 3, sha256(b"abc"))
        upload.write(b"ab")
        with pytest.raises(UploadError, match="longer than the 3 bytes"):
            upload.write(b"cd")


@pytest.mark.parametrize("how", ["next file", "finish"])
def test_a_file_that_ends_early_is_refused(how: str, area: UploadArea) -> None:
    upload = area.begin()
    upload.open_file(CONFIG, 3, sha256(b"abc"))
    upload.write(b"ab")
    with pytest.raises(UploadError, match="ended after 2 of the 3 bytes"):
        upload.finish() if how == "finish" else upload.open_file(WEIGHTS, 1, sha256(b"x"))


def test_a_checksum_that_does_not_match_is_refused_with_both(area: UploadArea) -> None:
    upload = area.begin()
    upload.open_file(CONFIG, 3, sha256(b"abc"))
    upload.write(b"abd")
    with pytest.raises(UploadError, match=f"{sha256(b'abd')}, its header said {sha256(b'abc')}"):
        upload.finish()


@pytest.mark.parametrize(("sent", "missing"), [([], f"{CONFIG} and {WEIGHTS}"), ([CONFIG], WEIGHTS), ([WEIGHTS], CONFIG)])
def test_an_upload_without_both_files_is_refused(sent: list[str], missing: str, area: UploadArea) -> None:
    upload = area.begin()
    for name in sent:
        send(upload, name, b"{}")
    with pytest.raises(UploadError, match=f"{missing} was not sent"):
        upload.finish()


def test_the_size_limit_counts_all_files_before_a_byte_is_written(area: UploadArea) -> None:
    upload = area.begin()
    send(upload, CONFIG, b"x" * 60)
    with pytest.raises(StoreFullError, match="would make it 101 bytes; the limit is 100"):
        upload.open_file(WEIGHTS, 41, sha256(b"x" * 41))
