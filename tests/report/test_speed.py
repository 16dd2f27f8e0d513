"""The table of speeds."""

from fastprune.report.speed import speed_rows


def rates(*triples):
    return [
        {"tokens": 128, "batch": b, "tokens_per_second": {"median": m, "low": low, "high": high}}
        for b, m, low, high in triples
    ]


def test_a_row_a_workload_and_how_many_times_as_fast():
    dense = {"prompt": rates((1, 1000.0, 900.0, 1100.0)), "decoding": rates((8, 40.0, 38.0, 41.0))}
    small = {"prompt": rates((1, 1500.0, 1450.0, 1600.0)), "decoding": rates((8, 50.0, 49.0, 52.5))}
    dense["peak_memory_bytes"], small["peak_memory_bytes"] = 2 * 1024**2, 1024**2
    assert speed_rows({"dense": dense, "small": small}) == [
        ("prompt of 128, tokens/s", "1,000 (900–1,100)", "1,500 (1,450–1,600) ×1.5"),
        ("decoding, batch 8, tokens/s", "40.0 (38.0–41.0)", "50.0 (49.0–52.5) ×1.25"),
        ("peak memory, reading and decoding", "2 MiB", "1 MiB"),
    ]
    assert speed_rows({"model": dense})[0] == ("prompt of 128, tokens/s", "1,000 (900–1,100)")
