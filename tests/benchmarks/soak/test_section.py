"""The soak's part of the report claims no more than was seen."""

import json

from benchmarks.result_file import RESULTS
from benchmarks.soak.section import soak_section


def test_how_full_the_pool_was_is_said_in_numbers() -> None:
    soak = json.loads((RESULTS / "churn.json").read_text())["soaks"][0]
    soak |= {
        "mean_share_kv": 0.3,
        "mean_share_adapters_in_use": 0.6,
        "mean_share_adapters_idle": 0.05,
        "share_no_page_free": 0.021,
    }
    text = " ".join("\n".join(soak_section({"soaks": [soak]})).split())
    assert "95% were taken in the mean, 30% by KV" in text and "in 2.1% of the time not one was free" in text
    assert f"{soak['base_only']['equal']} of {soak['base_only']['pairs']} have the same tokens" in text
