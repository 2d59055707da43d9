"""Percentiles, taken in the same way by every benchmark. Knows nothing of what was measured."""

import numpy as np
import numpy.typing as npt


def percentiles(values: npt.ArrayLike, *percents: float) -> tuple[float, ...]:
    """The values that so many percent of them do not exceed, between two of them in proportion. There must be a value."""
    return tuple(np.percentile(np.asarray(values, dtype=np.float64), percents).tolist())
