"""The control plane put together: registry, dispatcher, tokenizer, services and server, started and stopped in order."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc

from adapter_store.image_store import ImageStore
from adapter_store.sources import UploadArea
from controlplane.config import ControlPlaneConfig
from controlplane.dispatch.dispatcher import Dispatcher, DispatcherConfig
from controlplane.messages import DrainResult
from controlplane.registry.directory import AdapterDirectory
from controlplane.registry.registry import AdapterRegistry, RegistryConfig
from controlplane.scheduling import MakeScheduler, Scheduler
from controlplane.services.adapter_service import AdapterService
from controlplane.services.auth import Authenticator
from controlplane.services.health import HealthService
from controlplane.services.inference_service import InferenceService
from controlplane.services.server import SERVICE_NAMES, Servicers, build_server, listen
from controlplane.services.system_service import SystemService
from controlplane.text.tokenizer import Tokenizer
from controlplane.version import running_version

log = logging.getLogger(__name__)

# Calls that still run once everything unfinished has been told so: time for their last message.
STOP_GRACE_S = 2.0


class ControlPlane:
    """A running control plane."""

    def __init__(
        self, addresses: tuple[str, ...], dispatcher: Dispatcher, directory: AdapterDirectory, drainer: "Drainer"
    ) -> None:
        self.addresses = addresses
        self.dispatcher = dispatcher
        self.directory = directory
        self._drainer = drainer

    @property
    def address(self) -> str:
        """The first address that it listens on."""
        return self.addresses[0]

    async def drain(self, timeout_s: float) -> DrainResult:
        """Stops taking requests and waits for those that run; aborts what is left at the timeout."""
        return await self._drainer.drain(timeout_s)


class Drainer:
    """Keeps health in step with what the dispatcher can do: serving while a data plane is connected, until a drain begins."""

    def __init__(self, dispatcher: Dispatcher, health: HealthService) -> None:
        self._dispatcher = dispatcher
        self._health = health
        self._is_draining = False
        dispatcher.on_connection_change(self._on_connection_change)

    async def drain(self, timeout_s: float) -> DrainResult:
        """Health turns first, so that clients go elsewhere before they are refused."""
        log.info("draining: timeout_s=%g", timeout_s)
        self._is_draining = True
        self._health.set_serving(False)
        result = await self._dispatcher.drain(timeout_s)
        log.info("drained: finished=%d aborted=%d", result.num_finished, result.num_aborted)
        return result

    def _on_connection_change(self, is_connected: bool) -> None:
        self._health.set_serving(is_connected and not self._is_draining)


@asynccontextmanager
async def serve(config: ControlPlaneConfig, make_scheduler: MakeScheduler = Scheduler) -> AsyncIterator[ControlPlane]:
    """Serves while the context is open. Data planes connect in the background: wait for health, or for the dispatcher.

    make_scheduler: another one than the real, for a comparison.

    Raises:
        TokenizerError, CredentialsError: the model directory or the credentials file is not usable.
        ListenError: an address cannot be listened on.
        EmbeddedRedisError, RegistryMismatchError, UnavailableError: the registry cannot be opened.
    """
    authenticator = Authenticator.from_file(config.credentials)
    tokenizer = await asyncio.to_thread(Tokenizer.load, config.model_dir)
    store = await asyncio.to_thread(ImageStore, config.store_dir, config.max_store_bytes)
    dispatching = DispatcherConfig(config.max_waiting, idle_prefetch=config.idle_prefetch)
    dispatcher = Dispatcher(config.data_planes, dispatching, make_scheduler=make_scheduler)
    health = HealthService(SERVICE_NAMES)
    drainer = Drainer(dispatcher, health)
    async with AsyncExitStack() as stack:
        registry_config = RegistryConfig(config.redis_dir, config.redis_url, config.key_prefix)
        registry = await stack.enter_async_context(AdapterRegistry(registry_config, store, dispatcher))
        # After the registry, which refuses a state directory that has another owner: opening the area empties it.
        uploads = await asyncio.to_thread(
            UploadArea, config.upload_dir, config.max_upload_bytes, config.max_uploads, config.upload_ttl_s
        )
        adapters = AdapterService(registry, dispatcher, uploads, config.adapter_roots, allow_dummies=config.allow_dummy_adapters)
        stack.push_async_callback(asyncio.to_thread, adapters.close)
        servicers = Servicers(
            inference=InferenceService(dispatcher, registry.directory, tokenizer, config.max_waiting),
            adapters=adapters,
            system=SystemService(
                dispatcher,
                registry.directory.names_of,
                drainer.drain,
                version=running_version(),
                max_waiting=config.max_waiting,
                max_upload_bytes=config.max_upload_bytes,
            ),
            health=health,
        )
        server = build_server(servicers, authenticator)
        addresses = listen(server, config.listen)
        stack.push_async_callback(_stop, server, dispatcher, health)
        await dispatcher.start()
        await server.start()
        log.info("listening: addresses=%s data_planes=%s", ",".join(addresses), ",".join(config.data_planes))
        yield ControlPlane(addresses, dispatcher, registry.directory, drainer)


async def _stop(server: grpc.aio.Server, dispatcher: Dispatcher, health: HealthService) -> None:
    """Takes no new calls, tells every running request that the service stops, and lets their last messages out."""
    health.set_serving(False)
    stopping = asyncio.create_task(server.stop(STOP_GRACE_S), name="stop server")
    await dispatcher.close()
    await stopping
