"""Numbers for people."""

import math

import pytest

from fastprune.report import format


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format.count(576), "576"),
        (format.count(98_304), "98,304"),
        (format.count(134_515_008), "134.5 M"),
        (format.count(8_030_261_248), "8.03 B"),
        (format.size(512), "512 B"),
        (format.size(3 * 1024**2), "3 MiB"),
        (format.size(2_400_000_000), "2.24 GiB"),
        (format.duration(0.034), "34 ms"),
        (format.duration(14.21), "14.2 s"),
        (format.duration(75.2), "1 min 15 s"),
        (format.duration(3599.9), "1 h 0 min"),
        (format.percent(0.2), "20.0 %"),
        (format.perplexity(22.5534), "22.55"),
        (format.perplexity(3.2e7), "3.20e+07"),
        (format.perplexity(math.inf), "inf"),
        (format.perplexity(None), "—"),
        (format.milliseconds(19.4273), "19.4 ms"),
        (format.milliseconds(None), "—"),
        (format.budget("bytes", 3 * 1024**2), "3 MiB"),
        (format.budget("ratio", 0.2), "20.0 % of the block parameters"),
        (format.budget("parameters", 98_304), "98,304 parameters"),
        (format.budget("ms/token", None), "—"),
        (format.factor(20.0, 30.0), "×1.5"),
        (format.factor(None, 30.0), "—"),
    ],
)
def test_format(text, expected):
    assert text == expected
