"""Imports point one way, and nothing is imported that the packaging does not declare."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Package: what else of ours it may import.
ALLOWED = {
    "protos": set(),
    "kernels": set(),
    "adapter_store": set(),
    "dataplane": {"adapter_store", "kernels", "protos"},
    "controlplane": {"adapter_store", "protos"},
}
NOT_OURS_TO_SHIP = {"benchmarks", "examples", "tests"}
# Import name: distribution, where the two differ.
DISTRIBUTIONS = {
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "grpc_status": "grpcio-status",
}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import in a file, in functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


def sources(repository: Path, package: str) -> list[Path]:
    found = sorted((repository / package).rglob("*.py"))
    assert found, f"no sources of {package}: the test looks in the wrong place"
    return [path for path in found if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))]


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(repository: Path, package: str) -> None:
    forbidden = (set(ALLOWED) | NOT_OURS_TO_SHIP) - ALLOWED[package] - {package}
    wrong = [
        f"{path.relative_to(repository)}:{line} imports {name}"
        for path in sources(repository, package)
        for line, name in imports_of(path)
        if name.split(".")[0] in forbidden
    ]
    assert not wrong, "\n".join(wrong)


def test_the_control_plane_never_sees_a_tensor(repository: Path) -> None:
    wrong = [
        f"{path.relative_to(repository)}:{line}"
        for path in sources(repository, "controlplane")
        for line, name in imports_of(path)
        if name.split(".")[0] in {"torch", "numpy", "cupy"}
    ]
    assert not wrong, f"torch or arrays in the control plane: {wrong}"


@pytest.mark.parametrize("package", ALLOWED)
def test_every_third_party_import_is_a_declared_dependency(repository: Path, package: str) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    declared |= {canonicalize_name(Requirement(text).name) for text in project["optional-dependencies"]["embedded"]}
    undeclared = set()
    for path in sources(repository, package):
        for line, name in imports_of(path):
            top = name.split(".")[0]
            distribution = "googleapis-common-protos" if name.startswith("google.rpc") else DISTRIBUTIONS.get(top, top)
            if top not in sys.stdlib_module_names and top not in ALLOWED and canonicalize_name(distribution) not in declared:
                undeclared.add(f"{path.relative_to(repository)}:{line} imports {name}")
    assert not undeclared, "\n".join(sorted(undeclared))


def test_init_files_do_no_work(repository: Path) -> None:
    for package in ALLOWED:
        for path in (repository / package).rglob("__init__.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
                assert is_docstring or is_all or isinstance(node, ast.ImportFrom), f"{path}: {ast.unparse(node)}"
