"""gRPC passes over options that it does not know, so a misspelt one goes unnoticed until a connection dies in production."""

import importlib.util
import re
from pathlib import Path

OPTION = re.compile(r'\(\s*"(grpc\.[a-z0-9_.]+)"\s*,')


def test_every_channel_option_is_one_that_grpc_knows(repository: Path) -> None:
    spec = importlib.util.find_spec("grpc._cython.cygrpc")
    assert spec is not None and spec.origin is not None
    library = Path(spec.origin).read_bytes()
    used: dict[str, str] = {}
    for package in ("controlplane", "dataplane", "benchmarks", "examples"):
        for source in sorted((repository / package).rglob("*.py")):
            used |= dict.fromkeys(OPTION.findall(source.read_text()), str(source.relative_to(repository)))
    assert len(used) > 5, "the pattern finds no options any more"
    unknown = {name: source for name, source in used.items() if name.encode() not in library}
    assert not unknown
