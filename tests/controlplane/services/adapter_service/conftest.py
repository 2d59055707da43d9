"""The way to run a scenario against a fresh adapter service."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.controlplane.services.adapter_service.served import Served, serving


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Runs a scenario against a service with an embedded Redis."""

    def run(scenario: Callable[[Served], Any], **options: Any) -> None:
        async def with_service() -> None:
            async with asyncio.timeout(60), serving(tmp_path, **options) as served:
                await scenario(served)

        asyncio.run(with_service())

    return run
