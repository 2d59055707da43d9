"""The demo itself, as `make demo` runs it, without a terminal."""

import re
import subprocess
import sys
from pathlib import Path

from examples.train_demo import RECIPES

ROOT = Path(__file__).resolve().parents[2]


def test_demo_serves_every_voice_in_one_batch_and_stops_cleanly() -> None:
    command = [sys.executable, "-m", "examples.demo", "--plain"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("base", *RECIPES):
        assert re.search(rf"^--- {name} \(.*, done\)$", done.stdout, re.MULTILINE), done.stdout
    assert "Once upon a time" in done.stdout and "Arr, matey!" in done.stdout
    counts = re.search(r"(\d+) tokens in (\d+) steps", done.stdout)
    assert counts, done.stdout
    # One request at a time would take a step per token.
    assert int(counts[1]) > 5 * int(counts[2])
    assert done.stdout.rstrip().endswith("stopped cleanly")
