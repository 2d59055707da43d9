"""What is written down twice stays the same: options that `up` and compose hand on, files that the images copy, commands that
the Makefile and CI run."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from controlplane.cli import up, up_options
from controlplane.cli.main import build_parser

DOCKERFILES = ("deploy/Dockerfile.cpu", "deploy/Dockerfile.cuda")
COMPOSE_FILES = ("compose.yaml", "deploy/compose.cuda.yaml")


def known_options(repository: Path, module: str) -> set[str]:
    """The options that `python -m MODULE --help` shows."""
    command = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return set(re.findall(r"--[a-z][a-z-]*", result.stdout))


def options_of(command: list[str]) -> set[str]:
    return {part.split("=")[0] for part in command if part.startswith("--")}


@pytest.fixture(scope="module")
def compose(repository: Path) -> dict[str, Any]:
    loaded = yaml.safe_load((repository / "compose.yaml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("plane", ["dataplane", "controlplane"])
def test_every_option_handed_on_is_known_to_the_process(repository: Path, compose: dict[str, Any], plane: str) -> None:
    table = up_options.DATA_PLANE_OPTIONS if plane == "dataplane" else up_options.CONTROL_PLANE_OPTIONS
    args = build_parser().parse_args(
        ["up", "--model=m", "--adapter-root=r", *(f"{flag}=1" if metavar else flag for flag, metavar, _ in table)]
    )
    config = up_options.config_from(args, "127.0.0.1:50051")
    command = up.data_plane_command(config, "unix:/x") if plane == "dataplane" else up.control_plane_command(config, ["unix:/x"])
    handed_on = options_of(command) | options_of(compose["services"][plane]["command"])
    assert handed_on <= known_options(repository, plane)


@pytest.mark.parametrize("file", COMPOSE_FILES)
def test_compose_files_match_the_compose_schema(repository: Path, file: str) -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(repository / file)]
    result = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_container_has_a_health_check_and_named_volumes_are_declared(compose: dict[str, Any]) -> None:
    used = set()
    for name, service in compose["services"].items():
        assert service["healthcheck"]["test"], f"{name} has no health check"
        sources = [volume.split(":")[0] for volume in service["volumes"]]
        used |= {source for source in sources if re.fullmatch(r"[a-z]+", source)}
    assert used == set(compose["volumes"])


@pytest.mark.parametrize("file", DOCKERFILES)
def test_images_copy_every_package_and_what_they_copy_is_there(repository: Path, file: str) -> None:
    lines = (repository / file).read_text(encoding="utf-8").splitlines()
    copied = {part for line in lines if line.startswith("COPY ") and "--from" not in line for part in line.split()[1:-1]}
    pyproject = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {pattern.rstrip("*") for pattern in pyproject["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= copied
    admitted = {line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == admitted
    assert all((repository / path).exists() for path in copied)


def test_ci_runs_what_a_desk_runs(repository: Path) -> None:
    bash, make = shutil.which("bash"), shutil.which("make")
    if bash is None or make is None:
        pytest.skip("bash or make is not on PATH")
    for script in (".ci/run", ".ci/gpu-test"):
        assert subprocess.run([bash, "-n", script], cwd=repository, timeout=60).returncode == 0
    assert "make test" in (repository / ".ci" / "run").read_text(encoding="utf-8")
    for target in ("demo", "test", "lint", "protos", "gpu-test", "clean"):
        plan = subprocess.run([make, "--dry-run", target], cwd=repository, capture_output=True, text=True, timeout=60)
        assert plan.returncode == 0, plan.stderr


def test_kernels_of_every_launch_are_left_for_the_sanitizer(repository: Path) -> None:
    """The script selects by names of tests, which may change."""
    selection = re.search(r"^small='(.+)'$", (repository / ".ci" / "gpu-test").read_text(encoding="utf-8"), re.MULTILINE)
    assert selection is not None
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-k", selection[1], "tests/kernels"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(re.findall(r"test_lora_cuda\.py::.*small-mixed-torch\.bfloat16", result.stdout)) >= 3


def test_constraints_pin_every_direct_dependency(repository: Path) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines if line and not line.startswith("#")}
    assert all(str(pin.specifier).startswith("==") for pin in pins.values())
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        if requirement.name == "loraplane":
            continue
        pin = pins[canonicalize_name(requirement.name)]
        version = str(pin.specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"
