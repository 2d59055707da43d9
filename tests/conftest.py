"""What every test may use: where the repository is, how property tests are run, and what a test marked `gpu` needs.

Knows nothing of any one package; their fixtures live in the conftest.py beside their tests.
"""

import os
from pathlib import Path

# Before torch is imported: many small tests on few cores run faster, and the same every time, on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# gRPC logs to stderr about forks and closed sockets that tests cause on purpose.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import hypothesis
import pytest

hypothesis.settings.register_profile("loraplane", deadline=None, print_blob=True)
# CI shows the same result for the same commit; at a desk every run looks elsewhere.
hypothesis.settings.register_profile("ci", hypothesis.settings.get_profile("loraplane"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "loraplane")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked gpu, with the reason, on a machine without a CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch  # a second of start-up that a run without GPU tests does not pay

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent
