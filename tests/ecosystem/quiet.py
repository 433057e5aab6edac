"""What Lightning says of its own calls, which the tests do not judge."""

from __future__ import annotations

import logging

import pytest

# It warns of how it was called, and of its own calls of PyTorch.
QUIET_LIGHTNING = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in (
        "DeprecationWarning",
        "FutureWarning",
        "lightning.fabric.utilities.warnings.PossibleUserWarning",
        "lightning.fabric.utilities.rank_zero.LightningDeprecationWarning",
    )
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
