"""The configuration of a data plane process, built once from the command line and passed down."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from adapter_store.geometry import DTYPE_BYTES

# A year. The system cannot wait for times that are much longer.
MAX_WAIT_S = 365 * 86400.0


class LoadFormat(Enum):
    """Where the weights come from."""

    AUTO = "auto"
    DUMMY = "dummy"


@dataclass(frozen=True, slots=True)
class DataPlaneConfig:
    """Everything a data plane is told. None: found out at start (from the model, the device, the memory that is free).

    At most one of num_pages, pool_bytes and gpu_memory_utilization sizes the pool.
    """

    model_dir: Path
    store_dir: Path
    listen: tuple[str, ...]
    device: str = "auto"
    dtype: str = "auto"
    num_pages: int | None = None
    pool_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 256
    token_budget: int = 2048
    max_model_len: int | None = None
    max_lora_rank: int = 64
    host_cache_bytes: int = 4 << 30
    load_format: LoadFormat = LoadFormat.AUTO
    cuda_graphs: bool = True
    overlap: bool = True
    orphan_grace_s: float = 30.0
    stop_timeout_s: float = 10.0
    json_progress: bool = False

    @property
    def model_name(self) -> str:
        """The base model's name: that of its directory."""
        return self.model_dir.resolve().name


def parse_config(argv: Sequence[str]) -> DataPlaneConfig:
    """Reads the command line; ends the process with a message when it is not right."""
    args = _parser().parse_args(argv)
    return DataPlaneConfig(
        model_dir=args.model,
        store_dir=args.store_dir,
        listen=tuple(args.listen),
        device=args.device,
        dtype=args.dtype,
        num_pages=args.num_pages,
        pool_bytes=args.pool_bytes,
        gpu_memory_utilization=args.gpu_memory_utilization,
        max_num_seqs=args.max_num_seqs,
        token_budget=args.token_budget,
        max_model_len=args.max_model_len,
        max_lora_rank=args.max_lora_rank,
        host_cache_bytes=args.host_cache_bytes,
        load_format=LoadFormat(args.load_format),
        cuda_graphs=args.cuda_graphs,
        overlap=args.overlap,
        orphan_grace_s=args.orphan_grace_s,
        stop_timeout_s=args.stop_timeout_s,
        json_progress=args.progress == "json",
    )


def _parser() -> argparse.ArgumentParser:
    default = DataPlaneConfig(Path(), Path(), ())
    parser = argparse.ArgumentParser(prog="python -m dataplane", description="Serves one base model to control planes.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the base model, in Hugging Face layout")
    parser.add_argument("--store-dir", type=Path, required=True, metavar="DIR", help="adapter images, shared with control planes")
    parser.add_argument("--listen", action="append", required=True, metavar="ADDRESS", help="HOST:PORT or unix:PATH; repeatable")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default=default.device)
    parser.add_argument("--dtype", choices=("auto", *DTYPE_BYTES), default=default.dtype, help="auto: that of the checkpoint")
    pool = parser.add_mutually_exclusive_group()
    pool.add_argument("--num-pages", type=_positive_int, metavar="N", help="pages of the pool")
    pool.add_argument("--pool-bytes", type=_positive_int, metavar="N", help="or bytes of the pool")
    pool.add_argument("--gpu-memory-utilization", type=_share, default=default.gpu_memory_utilization, metavar="SHARE")
    parser.add_argument(
        "--max-num-seqs", type=_positive_int, default=default.max_num_seqs, metavar="N", help="requests in a batch"
    )
    parser.add_argument("--token-budget", type=_positive_int, default=default.token_budget, metavar="N", help="tokens in a step")
    parser.add_argument("--max-model-len", type=_positive_int, metavar="N", help="prompt plus output of one request")
    parser.add_argument("--max-lora-rank", type=_positive_int, default=default.max_lora_rank, metavar="N")
    parser.add_argument("--host-cache-bytes", type=_positive_int, default=default.host_cache_bytes, metavar="N")
    parser.add_argument("--load-format", choices=[f.value for f in LoadFormat], default=default.load_format.value)
    parser.add_argument(
        "--no-cuda-graphs", dest="cuda_graphs", action="store_false", help="launch every kernel of every step, as on the CPU"
    )
    parser.add_argument(
        "--no-overlap", dest="overlap", action="store_false", help="prepare a step only when the one before has been computed"
    )
    parser.add_argument("--orphan-grace-s", type=_seconds, default=default.orphan_grace_s, metavar="SECONDS")
    parser.add_argument("--stop-timeout-s", type=_seconds, default=default.stop_timeout_s, metavar="SECONDS")
    parser.add_argument("--progress", choices=("none", "json"), default="none", help="json: events on stderr while loading")
    return parser


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= MAX_WAIT_S:
        raise argparse.ArgumentTypeError(f"{text} is not a time in seconds, 0 to {MAX_WAIT_S:.0f}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0, at most 1")
    return value
