"""Measures a service under the load of the S-LoRA paper: throughput, latencies, attainment; its own or one that runs already.

    python -m benchmarks.serve --setting S1 --adapters 5,100,1000,2000 --base-only --rates 50%,80%,95% --duration 60
    python -m benchmarks.serve --setting S1 --fixed 64x128x256,32x128x256:32 --repeat 3
    python -m benchmarks.serve --target 127.0.0.1:50051 --adapters 20 --rates 4
    python -m benchmarks.serve --openai http://127.0.0.1:8000 --base-model llama-7b --adapters 32 --system vllm

The load is open loop: a request is sent at its time, whatever became of those before, and its latencies count from that time.
Rates in percent are of the lowest saturated rate with adapters. `make report` writes docs/performance.md from the results.
Another plane stands in with --data-plane or --control-plane, whose value may hold options: --data-plane "dataplane --no-overlap".
"""

import asyncio
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from benchmarks.model_shapes import write_config
from benchmarks.process import ProcessFailedError
from benchmarks.result_file import cpu_name, write_result
from benchmarks.screen import say
from benchmarks.serving import screen
from benchmarks.serving.adapters import check_count, host_cache_bytes, provide_adapters
from benchmarks.serving.bench import Bench, BenchError, Server
from benchmarks.serving.clients import ClientFailedError, Clients
from benchmarks.serving.commands import with_options
from benchmarks.serving.driver import Target
from benchmarks.serving.grpc_driver import GrpcTarget
from benchmarks.serving.load_samples import LoadSampler
from benchmarks.serving.metrics import SLO_S
from benchmarks.serving.options import Options, parse_options
from benchmarks.serving.service import RunningService, ServiceOptions, running_service

PACKAGES = ("torch", "cupy-cuda13x", "flashinfer-python", "grpcio", "numpy")


@dataclass(frozen=True, slots=True)
class Measured:
    """A server that is ready, how its clients reach it, and what the result says of it."""

    server: Server
    target: Target
    device: str | None
    about: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Makes all runs and writes the result file after each, so that what is measured is not lost. 1 if one could not be made."""
    options = parse_options(argv, __doc__)
    try:
        with ExitStack() as stack:
            service = _start_service(options, stack)
            return asyncio.run(_measure_watched(options, service))
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call), "a failed call of a stub is a Call"
        say(f"{error.code().name}: {error.details()}")
        return 1
    except (BenchError, ClientFailedError, ProcessFailedError, ValueError, OSError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def _start_service(options: Options, stack: ExitStack) -> RunningService | None:
    if options.target or options.openai:
        return None
    model_dir, data_plane, control_plane = options.model_dir, options.data_plane, options.control_plane
    if options.adapters.ranks:
        control_plane = with_options(control_plane, {"--allow-dummy-adapters": ""})
    if model_dir is None:
        assert options.setting is not None, "without a model there is a setting"
        model_dir = Path(stack.enter_context(tempfile.TemporaryDirectory())) / options.setting.shape.name
        write_config(options.setting.shape, model_dir)
        cache_bytes = host_cache_bytes(options.setting.shape, options.adapters)
        data_plane = with_options(data_plane, {"--host-cache-bytes": str(cache_bytes)})
    say(f"starting {data_plane}; {control_plane}")
    service = ServiceOptions(model_dir, options.state_dir, options.adapters.directory, data_plane, control_plane)
    return stack.enter_context(running_service(service))


async def _measure_watched(options: Options, service: RunningService | None) -> int:
    """Ends when a plane of our own ends, and does not wait for answers that nobody will give."""
    work = asyncio.create_task(_measure(options, service))
    tasks: list[asyncio.Task[Any]] = [work] if service is None else [work, asyncio.create_task(service.watch())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return max([int(await task) for task in done])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _measure(options: Options, service: RunningService | None) -> int:
    async with AsyncExitStack() as stack:
        measured = await stack.enter_async_context(_ready(options, service))
        clients = stack.enter_context(Clients(measured.target, options.num_clients))
        bench = Bench(measured.server, clients, options.workload, options.slo_s or SLO_S)
        if options.num_warm_up:
            await bench.warm_up(options.num_warm_up)
        runs: list[dict[str, Any]] = []
        failed: dict[str, str] = {}
        for i, plan in enumerate(options.runs):
            try:
                with screen.run_progress(plan) as on_progress:
                    run = await bench.run(plan, on_progress)
            except (BenchError, TimeoutError) as error:
                failed[screen.name_of(plan)] = f"{type(error).__name__}: {error}"
                say(f"{screen.name_of(plan)}: {error}")
            else:
                screen.show_run(plan, run)
                runs.append(run)
            if runs:
                # Should this be the last that is written, it says what is missing. A run may be there twice, and have failed.
                not_reached = {screen.name_of(later): "not reached" for later in options.runs[i + 1 :]}
                _write(options, measured, runs, not_reached | failed)
        if runs:
            say(f"written to {options.out}")
        return 1 if failed else 0


@asynccontextmanager
async def _ready(options: Options, service: RunningService | None) -> AsyncIterator[Measured]:
    """The server with its adapters."""
    if options.openai is not None:
        yield _openai(options)
        return
    address = service.address if service is not None else options.target
    assert address is not None, "a service is started or named"
    target = GrpcTarget(address, options.token, options.timeout_s, options.with_text, options.slo_s)
    async with target.channel() as channel:
        sampler = LoadSampler(target, channel)
        info = await sampler.info()
        if not info.data_planes:
            raise BenchError(f"{address} has no data plane connected")
        names, registration = await provide_adapters(target, channel, options.adapters)
        check_count(names, options.num_adapters)
        if registration:
            say(f"{registration['count']} adapters registered, {registration['per_s']:.0f} a second")
        plane = info.data_planes[0]
        about = {
            "data_plane": options.data_plane if service is not None else None,
            "control_plane": options.control_plane if service is not None else None,
            "idle_prefetch": options.idle_prefetch if service is not None else None,
            "model": info.base_model,
            "dtype": plane.dtype,
            "pool": {"num_pages": plane.num_pages, "page_tokens": plane.page_tokens, "page_bytes": plane.page_bytes},
            "registration": registration,
            "startup_s": service.startup_s if service is not None else None,
        }
        server = Server(names, info.limits.vocab_size, sampler, service.pids if service is not None else {})
        yield Measured(server, target, cpu_name() if plane.device.startswith("cpu") else plane.device, about)


def _openai(options: Options) -> Measured:
    # Here and not above: httpx is of the extra `bench`, and nobody else needs it.
    from benchmarks.serving.openai_driver import OpenAiTarget

    assert options.openai is not None
    peer = options.openai
    names = [peer.name_template.format(i=i) for i in range(options.num_adapters)]
    target = OpenAiTarget(peer.url, peer.base_model, options.token, options.timeout_s, peer.extra)
    return Measured(Server(names, options.vocab_size), target, None, {"model": peer.base_model})


def _write(options: Options, measured: Measured, runs: list[dict[str, Any]], failed: dict[str, str]) -> None:
    about = {
        "system": options.system,
        "setting": options.setting_name,
        "ranks": list(options.adapters.ranks),
        "modules": list(options.adapters.modules) if options.adapters.ranks else [],
        "num_clients": options.num_clients,
        "sent_slo_s": options.slo_s,
        **measured.about,
    }
    device = options.device_name or measured.device
    told = {"failed": failed} if failed else {}
    write_result(options.out, {**about, "runs": runs, **told}, PACKAGES, device=device, commit=options.commit)


if __name__ == "__main__":
    # As Ctrl-C: nothing that was started stays behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
