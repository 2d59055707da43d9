"""What the tests of this folder have in common: a served model of theirs, and the fixtures of the modules beside this one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from controlplane.app import serve
from controlplane.config import ControlPlaneConfig
from dataplane.config import DataPlaneConfig
from tests.e2e.data_plane import RunningDataPlane, Steering
from tests.e2e.models import Prompt, TinyModel, build_model, save_adapter
from tests.e2e.reference import reference_greedy, reference_logits, reference_model
from tests.e2e.service import Answer, Service

__all__ = [
    "Answer",
    "Prompt",
    "Service",
    "TinyModel",
    "build_model",
    "reference_greedy",
    "reference_logits",
    "reference_model",
    "run_service",
    "save_adapter",
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def run_service(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., None]:
    """run(model, scenario, **data_plane_options) serves the model, awaits scenario(service), and checks every pool at the end.

    extra_step_s: added to every step; those of a tiny model are shorter than a message takes, those of a real one are not.
    runs_ahead: whether a step is launched before the one before it is waited for, on a CPU too.
    """
    device: str = request.param

    def run(
        model: TinyModel,
        scenario: Callable[[Service], Coroutine[Any, Any, None]],
        *,
        num_data_planes: int = 1,
        control_plane: dict[str, Any] | None = None,
        extra_step_s: float = 0.0,
        runs_ahead: bool = False,
        **options: Any,
    ) -> None:
        async def main() -> None:
            options.setdefault("device", device)
            steering = Steering(extra_step_s, runs_ahead)
            async with _serve(tmp_path, model, num_data_planes, control_plane or {}, steering, options) as service:
                await scenario(service)
                await service.wait_idle()

        asyncio.run(main())

    return run


@asynccontextmanager
async def _serve(
    root: Path,
    model: TinyModel,
    num_data_planes: int,
    control_plane: dict[str, Any],
    steering: Steering,
    options: dict[str, Any],
) -> AsyncIterator[Service]:
    """Both planes over Unix sockets. The engines check their integrity when they end, and their failure fails the test."""
    store_dir = root / "state" / "images"
    store_dir.mkdir(parents=True, exist_ok=True)
    default = DataPlaneConfig(model.base, store_dir, (), dtype="float32", num_pages=256, max_num_seqs=64)
    async with AsyncExitStack() as stack:
        data_planes, addresses = [], []
        for number in range(num_data_planes):
            address = f"unix:{root}/dp{number}"
            data_plane = RunningDataPlane(replace(default, listen=(address,), **options), steering)
            await data_plane.start()
            stack.push_async_callback(data_plane.stop)
            data_planes.append(data_plane)
            addresses.append(address)
        config = ControlPlaneConfig(
            model_dir=model.base,
            data_planes=tuple(addresses),
            state_dir=root / "state",
            listen=(f"unix:{root}/cp",),
            adapter_roots=tuple({path.parent for path in model.adapters.values()}) or (root,),
        )
        app = await stack.enter_async_context(serve(replace(config, **control_plane)))
        assert await app.dispatcher.wait_connected(30), "no data plane connected"
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(app.address))
        yield Service(app, data_planes, channel, model, store_dir)
