"""Finds the directory that a caller named, and lets nobody read outside the allowed roots."""

import os
from collections.abc import Sequence
from pathlib import Path

from adapter_store.errors import SourceForbiddenError, SourceNotFoundError
from adapter_store.peft_import import ADAPTER_FILES
from adapter_store.uploads import Upload, UploadArea

__all__ = ["Upload", "UploadArea", "resolve_path"]


def resolve_path(path: str, allowed_roots: Sequence[Path]) -> Path:
    """The directory, free of symbolic links. A relative path is looked up under each root in turn.

    Raises:
        SourceForbiddenError: it, or an adapter file in it, lies outside the roots. Whether it exists is not told.
        SourceNotFoundError: it is not a directory.
    """
    if not path or "\0" in path:
        raise SourceNotFoundError(path, "is not a path")
    roots = [root.resolve() for root in allowed_roots]
    candidates = [_resolve(path, root) for root in roots]
    allowed = [found for found in candidates if _is_under(found, roots)]
    if not allowed:
        described = "no root is allowed here" if not roots else "lies outside the allowed roots"
        raise SourceForbiddenError(path, f"{described}; see --adapter-root, or upload the adapter")
    # os.path.isdir, unlike Path.is_dir, takes a name that is too long for one that is not there.
    directory = next((found for found in allowed if os.path.isdir(found)), None)
    if directory is None:
        raise SourceNotFoundError(path, "is not a directory")
    for name in ADAPTER_FILES:
        # A directory under a root may still hold a link that leads out of it.
        if not _is_under(_resolve(name, directory), roots):
            raise SourceForbiddenError(f"{path}/{name}", "is a link that leads outside the allowed roots")
    return directory


def _resolve(path: str, root: Path) -> Path:
    """`path` from `root` (an absolute path stands for itself), free of symbolic links."""
    try:
        return (root / path).resolve()
    except (OSError, RuntimeError):
        raise SourceNotFoundError(path, "cannot be resolved: links in a circle, or a name that is too long") from None


def _is_under(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)
