"""The configuration of a control plane process, built once from the command line and passed down."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_LISTEN = "127.0.0.1:50051"


@dataclass(frozen=True, slots=True)
class ControlPlaneConfig:
    """Everything a control plane is told. None: the embedded Redis, no credentials."""

    model_dir: Path
    data_planes: tuple[str, ...]
    state_dir: Path
    listen: tuple[str, ...] = (DEFAULT_LISTEN,)
    images_dir: Path | None = None
    redis_url: str | None = None
    key_prefix: str = "loraplane"
    adapter_roots: tuple[Path, ...] = ()
    allow_dummy_adapters: bool = False
    idle_prefetch: bool = True
    max_waiting: int = 1024
    credentials: Path | None = None
    drain_timeout_s: float = 30.0
    max_store_bytes: int | None = None
    max_upload_bytes: int = 2 << 30
    max_uploads: int = 8
    upload_ttl_s: float = 3600.0

    @property
    def store_dir(self) -> Path:
        """Adapter images: written here, read by the data planes."""
        return self.images_dir or self.state_dir / "images"

    @property
    def redis_dir(self) -> Path:
        """What the embedded Redis keeps."""
        return self.state_dir / "redis"

    @property
    def upload_dir(self) -> Path:
        """Uploads that are not registered yet."""
        return self.state_dir / "uploads"


def parse_config(argv: Sequence[str]) -> ControlPlaneConfig:
    """Reads the command line; ends the process with a message when it is not right."""
    args = _parser().parse_args(argv)
    return ControlPlaneConfig(
        model_dir=args.model,
        data_planes=tuple(args.data_plane),
        state_dir=args.state_dir,
        listen=tuple(args.listen or (DEFAULT_LISTEN,)),
        images_dir=args.store_dir,
        redis_url=args.redis_url,
        key_prefix=args.key_prefix,
        adapter_roots=tuple(args.adapter_root),
        allow_dummy_adapters=args.allow_dummy_adapters,
        idle_prefetch=not args.no_idle_prefetch,
        max_waiting=args.max_waiting,
        credentials=args.credentials,
        drain_timeout_s=args.drain_timeout,
        max_store_bytes=args.max_store_bytes,
        max_upload_bytes=args.max_upload_bytes,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m controlplane",
        description="The control plane: takes requests over gRPC, keeps the adapter registry, and drives data planes.",
    )
    add = parser.add_argument
    add("--model", required=True, type=_model_dir, metavar="DIR", help="the base model's directory, for its tokenizer")
    add("--data-plane", required=True, action="append", metavar="ADDRESS", help="host:port or unix:/path; repeatable")
    add("--listen", action="append", metavar="ADDRESS", help=f"host:port or unix:/path; repeatable ({DEFAULT_LISTEN})")
    add("--state-dir", required=True, type=Path, metavar="DIR", help="registry, uploads and, unless --store-dir, images")
    add("--store-dir", type=Path, metavar="DIR", help="adapter images, shared with the data planes (STATE_DIR/images)")
    add("--redis-url", metavar="URL", help="a running Redis for the registry (a private one in the state directory)")
    add("--key-prefix", default="loraplane", metavar="PREFIX", help="of all keys in Redis (loraplane)")
    add(
        "--adapter-root",
        action="append",
        default=[],
        type=_existing_dir,
        metavar="DIR",
        help="adapters may be registered by path from under it; repeatable (none: by upload only)",
    )
    add("--allow-dummy-adapters", action="store_true", help="adapters of random weights may be registered, for benchmarks")
    add(
        "--no-idle-prefetch", action="store_true", help="load an adapter only when a request needs it, not into idle pages before"
    )
    add("--max-waiting", type=_positive_int, default=1024, metavar="N", help="requests that may wait (1024)")
    add("--credentials", type=Path, metavar="FILE", help="JSON file of tokens and their tenants (none: everybody is admin)")
    add("--drain-timeout", type=_seconds, default=30.0, metavar="S", help="on SIGTERM, abort what still runs after this (30)")
    add("--max-store-bytes", type=_positive_int, metavar="N", help="bound of the adapter images (none)")
    add("--max-upload-bytes", type=_positive_int, default=2 << 30, metavar="N", help="bound of one upload (2 GiB)")
    return parser


def _existing_dir(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a directory")
    return path


def _model_dir(text: str) -> Path:
    path = _existing_dir(text)
    if not any((path / name).is_file() for name in ("tokenizer.json", "config.json")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a model directory: it has neither tokenizer.json nor config.json")
    return path


def _positive_int(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 3600")
    return value
