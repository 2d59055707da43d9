"""Why a package here may be called `kernels`, which is also the name of a package that `transformers` looks for.

Each law below keeps `transformers` from taking ours for the other one; docs/architecture.md has the list.
"""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version


@pytest.fixture(scope="module")
def pyproject(repository: Path) -> dict[str, object]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_other_kernels_is_not_installed_beside_ours() -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("kernels")


def test_importing_kernels_loads_nothing_heavy_and_shows_no_version(repository: Path) -> None:
    code = """
import sys, kernels
heavy = {"torch", "cupy", "numpy", "transformers"} & set(sys.modules)
assert not heavy, f"import kernels loaded {heavy}"
assert not hasattr(kernels, "__version__"), "kernels must define no __version__"
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_version_stays_below_0_9(pyproject: dict[str, dict[str, str]]) -> None:
    # transformers takes the version of the distribution that installed `kernels` and compares it with 0.9 and above.
    assert Version(pyproject["project"]["version"]) < Version("0.9")


def test_setuptools_builds_the_project(pyproject: dict[str, dict[str, str]]) -> None:
    assert pyproject["build-system"]["build-backend"] == "setuptools.build_meta"


def test_transformers_is_new_enough_and_does_not_take_ours_for_its_own() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is only needed for tests of the model")
    assert Version(transformers.__version__) >= Version("5.13")
    from transformers.utils.import_utils import is_kernels_available

    assert not is_kernels_available()


def test_no_package_under_tests_is_called_kernels(repository: Path, pytestconfig: pytest.Config) -> None:
    assert not list((repository / "tests").rglob("kernels/__init__.py"))
    assert pytestconfig.getoption("importmode") == "importlib"
