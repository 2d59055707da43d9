"""The command line of the data plane."""

from pathlib import Path

import pytest

from dataplane.config import DataPlaneConfig, LoadFormat, parse_config

REQUIRED = ["--model", "m/tiny", "--store-dir", "s", "--listen", "unix:/x"]


def test_what_is_not_given_has_the_defaults_of_the_dataclass() -> None:
    assert parse_config(REQUIRED) == DataPlaneConfig(Path("m/tiny"), Path("s"), ("unix:/x",))
    assert parse_config(REQUIRED).model_name == "tiny"


def test_every_option_arrives() -> None:
    options = "--device cpu --dtype float16 --num-pages 9 --max-num-seqs 3 --token-budget 44 --max-model-len 77 --max-lora-rank 8"
    more = "--host-cache-bytes 123 --load-format dummy --orphan-grace-s 1.5 --stop-timeout-s 2 --progress json --listen [::]:1"
    switches = "--no-cuda-graphs --no-overlap"
    assert parse_config([*REQUIRED, *options.split(), *more.split(), *switches.split()]) == DataPlaneConfig(
        model_dir=Path("m/tiny"),
        store_dir=Path("s"),
        listen=("unix:/x", "[::]:1"),
        device="cpu",
        dtype="float16",
        num_pages=9,
        max_num_seqs=3,
        token_budget=44,
        max_model_len=77,
        max_lora_rank=8,
        host_cache_bytes=123,
        load_format=LoadFormat.DUMMY,
        cuda_graphs=False,
        overlap=False,
        orphan_grace_s=1.5,
        stop_timeout_s=2.0,
        json_progress=True,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-pages", "0"], "0 is below 1"),
        (["--num-pages", "4", "--pool-bytes", "4"], "not allowed with"),
        (["--gpu-memory-utilization", "1.5"], "1.5 is not a share"),
        (["--orphan-grace-s", "nan"], "nan is not a time"),
        (["--orphan-grace-s", "1e10"], "1e10 is not a time in seconds, 0 to 31536000"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_what_is_wrong_is_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse_config([*REQUIRED, *options])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
