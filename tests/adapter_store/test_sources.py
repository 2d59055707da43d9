"""Nobody reads outside the allowed roots, however the path is written."""

from pathlib import Path

import pytest

from adapter_store.errors import SourceForbiddenError, SourceNotFoundError
from adapter_store.sources import resolve_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed root with one adapter directory, and a forbidden neighbour."""
    (tmp_path / "allowed" / "pirate").mkdir(parents=True)
    (tmp_path / "secret" / "adapter").mkdir(parents=True)
    return tmp_path / "allowed"


def test_a_directory_under_a_root_is_found_absolute_or_relative(root: Path) -> None:
    other = root.parent / "other"
    other.mkdir()
    assert resolve_path(str(root / "pirate"), [other, root]) == root / "pirate"
    assert resolve_path("pirate", [other, root]) == root / "pirate"
    assert resolve_path(str(root / "pirate" / ".." / "pirate"), [root]) == root / "pirate"


@pytest.mark.parametrize("path", ["../secret/adapter", "pirate/../../secret", "/", "/etc", "../allowed_not", "../missing"])
def test_a_path_that_leads_out_is_forbidden_whether_it_exists_or_not(path: str, root: Path) -> None:
    with pytest.raises(SourceForbiddenError, match="outside the allowed roots"):
        resolve_path(path, [root])


def test_a_name_that_merely_begins_like_a_root_is_outside(root: Path) -> None:
    neighbour = root.parent / "allowed-too"
    neighbour.mkdir()
    with pytest.raises(SourceForbiddenError):
        resolve_path(str(neighbour), [root])


def test_links_are_followed_before_they_are_judged(root: Path) -> None:
    (root / "out").symlink_to(root.parent / "secret" / "adapter")
    (root / "in").symlink_to(root / "pirate")
    with pytest.raises(SourceForbiddenError):
        resolve_path("out", [root])
    assert resolve_path("in", [root]) == root / "pirate"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_a_link_out_of_the_root_is_forbidden(name: str, root: Path) -> None:
    target = root.parent / "secret" / "passwords"
    target.write_text("secret")
    (root / "pirate" / name).symlink_to(target)
    with pytest.raises(SourceForbiddenError, match=name):
        resolve_path("pirate", [root])


def test_a_link_as_a_root_stands_for_where_it_leads(root: Path) -> None:
    alias = root.parent / "alias"
    alias.symlink_to(root)
    assert resolve_path(str(alias / "pirate"), [alias]) == root / "pirate"


@pytest.mark.parametrize("path", ["missing", "", "a\0b", "x" * 300, "x" * 5000, "file"])
def test_what_is_not_a_directory_is_not_found(path: str, root: Path) -> None:
    (root / "file").touch()
    with pytest.raises(SourceNotFoundError):
        resolve_path(path, [root])


def test_a_circle_of_links_is_refused(root: Path) -> None:
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")
    with pytest.raises((SourceNotFoundError, SourceForbiddenError)):
        resolve_path("a", [root])


def test_without_roots_every_path_is_forbidden(root: Path) -> None:
    with pytest.raises(SourceForbiddenError, match="no root is allowed here; see --adapter-root"):
        resolve_path(str(root / "pirate"), [])
