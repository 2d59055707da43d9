"""What `make demo` shows: one small model, eleven adapters, one batch, twelve voices.

Starts the service, registers the adapters and sends one mixed batch, all through the public gRPC API; draws what comes back.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from examples.demo_screen import Phase, PoolView, StreamView, draw_grid, draw_pool
from examples.demo_service import DEMO_DIR, Service, ServiceFailedError, running_service
from protos.loraplane.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2, inference_pb2_grpc, system_pb2, system_pb2_grpc

PROMPT = "Tell me about a fox and a lantern."
# Room for the whole mixed batch and little more, so that the bar shows KV and adapters side by side in one pool.
NUM_PAGES = 176
MAX_MODEL_LEN = 512
MAX_TOKENS = 160
RPC_TIMEOUT_S = 60.0
FRAME_S = 0.1
EXIT_INTERRUPTED = 130
# Lines of the live screen that are not panels.
HEADER_HEIGHT, POOL_HEIGHT = 2, 3


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    prompt: str
    num_pages: int
    temperature: float
    plain: bool
    stay: bool


class Demo:
    """Owns the channel to the service and the views that the screen draws."""

    def __init__(self, channel: grpc.aio.Channel, page_bytes: int, console: Console, options: Options) -> None:
        self._adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        self._inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self._system = system_pb2_grpc.SystemServiceStub(channel)
        self._page_bytes = page_bytes
        self._console = console
        self._options = options
        self._streams = [StreamView("base", "no adapter")]

    async def run(self) -> bool:
        """The whole show; whether every stream ended well."""
        await self._register_adapters(sorted(path.parent for path in (DEMO_DIR / "adapters").glob("*/adapter_config.json")))
        before, started = await self.fetch_pool(), time.monotonic()
        fullest = await self._show_streams(before)
        self._print_summary(before, fullest, await self.fetch_pool(), time.monotonic() - started)
        return all(view.phase is Phase.DONE for view in self._streams)

    async def _register_adapters(self, paths: Sequence[Path]) -> None:
        table = Table(title="adapters registered", title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in ("name", "rank", "modules", "scaling", "pages", "KiB"):
            table.add_column(column, justify="right" if column in ("rank", "pages", "KiB") else "left", no_wrap=column == "name")
        for path in paths:
            source = adapter_pb2.AdapterSource(path=str(path))
            request = adapter_pb2.RegisterAdapterRequest(name=path.name, source=source)
            answer = await self._adapters.RegisterAdapter(request, timeout=RPC_TIMEOUT_S)
            version = answer.adapter.current
            modules = " ".join(module.removesuffix("_proj") for module in version.target_modules)
            self._streams.append(StreamView(path.name, f"rank {version.rank}"))
            kind = f"{version.alpha:g}/√r" if version.rslora else f"{version.alpha:g}/r"
            table.add_row(path.name, str(version.rank), modules, kind, str(version.num_pages), str(version.size_bytes // 1024))
        self._console.print(table, "")

    async def _stream(self, view: StreamView) -> None:
        """One request, from the prompt to its end, into one view."""
        chat = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content=self._options.prompt)])
        sampling = inference_pb2.SamplingParams(temperature=self._options.temperature, max_tokens=MAX_TOKENS)
        adapter = "" if view.name == "base" else view.name
        request = inference_pb2.GenerateRequest(chat=chat, adapter=adapter, sampling=sampling)
        try:
            async for response in self._inference.Generate(request, timeout=RPC_TIMEOUT_S):
                view.phase = Phase.RUNNING
                if response.HasField("chunk"):
                    view.text += response.chunk.text
                    view.num_tokens += len(response.chunk.token_ids)
            view.phase = Phase.DONE
        except grpc.aio.AioRpcError as error:
            view.phase = Phase.FAILED
            view.text += f"[{error.code().name}] {error.details()}"

    async def fetch_pool(self) -> PoolView:
        """The pool and the batch as of the latest step."""
        load = await self._system.GetLoad(system_pb2.GetLoadRequest(), timeout=RPC_TIMEOUT_S)
        if not load.data_planes:
            raise ServiceFailedError("No data plane is connected any more.")
        plane, pool = load.data_planes[0], load.data_planes[0].pool
        return PoolView(
            num_pages=pool.num_pages,
            page_bytes=self._page_bytes,
            kv_pages=pool.kv_pages,
            adapter_pages=pool.adapter_pages,
            idle_adapter_pages=pool.idle_adapter_pages,
            free_pages=pool.free_pages,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_steps=plane.num_steps,
            resident=tuple(sorted(name for adapter in plane.adapters for name in adapter.names)),
        )

    async def _show_streams(self, pool: PoolView) -> PoolView:
        """Sends all requests at once and draws until the last has ended, then prints the whole texts.

        Returns the pool as it was when it held the most.
        """
        fullest = pool
        requests = asyncio.gather(*(self._stream(view) for view in self._streams))
        screen = nullcontext() if self._options.plain else Live(console=self._console, auto_refresh=False, transient=True)
        with screen as live:
            try:
                while not requests.done():
                    pool = await self.fetch_pool()
                    fullest = min(pool, fullest, key=lambda view: view.free_pages)
                    if live:
                        live.update(self._draw(pool), refresh=True)
                    await asyncio.wait([requests], timeout=FRAME_S)
            finally:
                requests.cancel()
                with suppress(asyncio.CancelledError):
                    await requests
        self._print_streams()
        return fullest

    def _draw_header(self) -> Text:
        return Text.assemble(("one prompt, one batch, twelve voices: ", "bold"), (f"“{self._options.prompt}”", "italic"), "\n")

    def _draw(self, pool: PoolView) -> Group:
        width, height = self._console.size
        grid = draw_grid(self._streams, width, height - HEADER_HEIGHT - POOL_HEIGHT - 1)
        return Group(self._draw_header(), grid, draw_pool(pool, width))

    def _print_streams(self) -> None:
        self._console.print(self._draw_header())
        if not self._options.plain:
            self._console.print(draw_grid(self._streams, self._console.width))
            return
        for view in self._streams:
            self._console.print(f"--- {view.name} ({view.detail}, {view.num_tokens} tokens, {view.phase.value})", highlight=False)
            self._console.print(view.text, markup=False, highlight=False)

    def _print_summary(self, before: PoolView, fullest: PoolView, after: PoolView, wall_s: float) -> None:
        num_tokens, num_steps = sum(view.num_tokens for view in self._streams), after.num_steps - before.num_steps
        width = self._console.width
        self._console.print("\n[bold]the page pool[/] at its fullest")
        self._console.print(draw_pool(fullest, width))
        self._console.print("\n[bold]the page pool[/] now")
        self._console.print(draw_pool(after, width))
        self._console.print(
            f"\n{len(self._streams)} requests, {num_tokens} tokens in {num_steps} steps, {wall_s:.1f} s. "
            f"Still on the device: {', '.join(after.resident) or 'no adapter'}.",
            highlight=False,
        )


def parse_options() -> Options:
    """The command line as data."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--prompt", default=PROMPT, help="what every voice is asked (default: %(default)s)")
    parser.add_argument("--num-pages", type=int, default=NUM_PAGES, help="pages of the pool (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    parser.add_argument("--plain", action="store_true", help="no live screen; also chosen when the output is no terminal")
    parser.add_argument("--stay", action="store_true", help="keep the service up afterwards, until Ctrl-C")
    args = parser.parse_args()
    return Options(args.prompt, args.num_pages, args.temperature, args.plain or not sys.stdout.isatty(), args.stay)


async def show(service: Service, console: Console, options: Options) -> bool:
    """Runs the demo against a service."""
    async with grpc.aio.insecure_channel(service.address) as channel:
        return await Demo(channel, service.page_bytes, console, options).run()


def main() -> int:
    """Starts the service, runs the show, stops the service."""
    options, console = parse_options(), Console()
    with tempfile.TemporaryDirectory(prefix="loraplane-demo-") as state_dir:
        try:
            console.print("starting control plane, data plane and registry …", style="dim")
            with running_service(Path(state_dir), options.num_pages, MAX_MODEL_LEN) as service:
                ok = asyncio.run(show(service, console, options))
                if options.stay:
                    console.print(f"\nthe service stays at {service.address}; Ctrl-C stops it", highlight=False)
                    _wait_for_interrupt()
        except KeyboardInterrupt:
            console.print("interrupted; stopped cleanly", style="dim")
            return EXIT_INTERRUPTED
        except (ServiceFailedError, grpc.RpcError) as error:
            console.print(str(error), style="red", markup=False, highlight=False)
            return 1
    console.print("stopped cleanly" if ok else "some requests failed", style="dim")
    return 0 if ok else 1


def _wait_for_interrupt() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    sys.exit(main())
