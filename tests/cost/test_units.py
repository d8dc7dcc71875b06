from __future__ import annotations

import pytest

from fast_prompt_tuning.cost.units import human_flops, human_seconds


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        (0, "0 FLOPs"),
        (999, "999 FLOPs"),
        (1_234, "1230 FLOPs"),
        (1.234e6, "1.23 MFLOPs"),
        (5e9, "5 GFLOPs"),
        (1.5e12, "1.5 TFLOPs"),
        (9.994e14, "999 TFLOPs"),
        (9.996e14, "1 PFLOPs"),
        (1e15, "1 PFLOPs"),
        (2e18, "2 EFLOPs"),
        (3.21e21, "3210 EFLOPs"),
    ],
)
def test_human_flops(flops, text):
    assert human_flops(flops) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.97, "10 s"),
        (43.4, "43 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (3725, "1 h 02 min"),
    ],
)
def test_human_seconds(seconds, text):
    assert human_seconds(seconds) == text
