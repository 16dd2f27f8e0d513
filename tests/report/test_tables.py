"""What the commands print on the terminal."""

from fastprune.report.tables import show_eval, show_info, show_prune


def layer(index, kv_heads, channels):
    return {
        "index": index,
        "query_heads": 3 * kv_heads,
        "kv_heads": kv_heads,
        "channels": channels,
        "query_heads_before": 9,
        "kv_heads_before": 3,
        "channels_before": 1536,
    }


def test_prune(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    show_prune(
        {
            "params": {"before": 2000, "after": 1800, "block_before": 1000, "block_after": 800},
            "perplexity": [
                {"text": "[a].txt", "seq_len": 128, "windows": 64, "before": 20.0, "after": 30.0}
            ],
            "layers": [layer(0, 2, 1400), layer(1, 2, 1400), layer(2, 0, 0)],
            "out": "runs/x",
        }
    )
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "0–1 9 : 3 → 6 : 2 3 : 1 1536 → 1400" in lines
    assert "2 9 : 3 → 0 : 0 — 1536 → 0" in lines
    assert "GQA ratio: all layers kept 3:1" in lines
    assert "parameters 2,000 1,800 −10.0 %" in lines
    assert "in the blocks 1,000 800 −20.0 %" in lines
    assert "perplexity, [a].txt, 64 × 128 20.00 30.00 ×1.5" in lines
    assert "report runs/x/fastprune/report.html" in lines


def test_prune_with_a_budget(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    result = {
        "params": {"before": 2000, "after": 1800, "block_before": 1000, "block_after": 800},
        "bytes": {"before": 2 * 1024**2, "after": 1024**2},
        "latency": {"before": 20.0, "predicted": 15.5, "after": 15.0},
        "budget": {"unit": "ms/token", "requested": 16.0, "achieved": 15.0},
        "perplexity": [],
        "layers": [layer(0, 2, 1400)],
    }
    show_prune(result)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "weights as saved 2 MiB 1 MiB −50.0 %" in lines
    assert "decoding a token 20 ms 15 ms −25.0 %" in lines
    assert "budget: 15 ms a token (requested 16 ms a token), 15.5 ms predicted" in lines
    result["latency"]["after"] = result["budget"]["achieved"] = None
    show_prune(result)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "decoding a token 20 ms — —" in lines
    assert "budget: — (requested 16 ms a token), 15.5 ms predicted" in lines


def test_eval(capsys):
    show_eval(
        {
            "perplexity": 22.5534,
            "tokens": 16368,
            "seq_len": 1024,
            "windows": 16,
            "seconds": 30.0,
            "tokens_per_second": 545.6,
            "peak_memory_bytes": 3 * 1024**3,
            "bits_per_byte": 1.04554,
            "tasks": {},
            "speed": {},
        }
    )
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "perplexity 22.55" in lines
    assert "bits per byte 1.0455" in lines
    assert "windows 16 × 1024 tokens" in lines
    assert "peak memory 3 GiB" in lines


def test_info_shows_long_reasons_whole(capsys):
    path = "/a/very" + "/deep" * 30 + "/_C.so"
    show_info(
        {
            "versions": {"torch": "2.13.0"},
            "system": {"platform": "Linux-6.1-x86_64", "cores": 8, "memory_bytes": 64 * 1024**3},
            "threads": 2,
            "kernels": [
                {"name": "cpu", "usable": True, "detail": "level v4", "reason": ""},
                {"name": "cuda", "usable": False, "detail": "", "reason": f"{path}: no driver"},
            ],
            "devices": [
                {"index": 0, "name": "H200", "memory_bytes": 139 * 1024**3, "capability": "9.0"}
            ],
        }
    )
    text = "".join(capsys.readouterr().out.split())
    assert "platformLinux-6.1-x86_64cores8memory64GiB" in text
    assert "cpukernelson;levelv4" in text
    assert f"cudakernelsoff;{path}:nodriver" in text
    assert "cuda:0H200,139GiB,computecapability9.0" in text
