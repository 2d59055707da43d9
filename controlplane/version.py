"""The version of loraplane that runs."""

import importlib.metadata


def running_version() -> str:
    """The installed version; a word for a checkout that is not installed."""
    try:
        return importlib.metadata.version("loraplane")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
