"""Tables of benchmark results: python bench/table.py RESULTS.json [...]

Reads what pytest-benchmark writes (--benchmark-json) and prints, per group, each provider's median,
GB/s of the bytes that must move, how many times as fast fastprune is, and fastprune's share of the
limit (a plain read or copy of as many bytes). Ratios are to fastprune's time in alternating rounds
where a suite measures that (extra_info "beside"), else to its median in the same run.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

OURS, LIMIT = "fastprune", "limit"


def groups(paths: list[Path]) -> dict[str, dict[str, dict]]:
    """group -> provider -> pytest-benchmark's record."""
    found: dict[str, dict[str, dict]] = defaultdict(dict)
    for path in paths:
        for record in json.loads(path.read_text())["benchmarks"]:
            found[record["group"]][provider_name(record)] = record
    return found


def provider_name(record: dict) -> str:
    """The first part of the test id, where the suites put it."""
    return record["param"].split("-")[0]


def ratio(record: dict, ours: dict | None) -> float | None:
    """How many times as long as fastprune."""
    beside = record["extra_info"].get("beside") or (ours and ours["stats"]["median"])
    return record["stats"]["median"] / beside if beside else None


def rows(records: dict[str, dict]) -> list[tuple[str, ...]]:
    table = []
    for name, record in sorted(records.items(), key=lambda item: item[1]["stats"]["median"]):
        seconds = record["stats"]["median"]
        times = ratio(record, records.get(OURS))
        share = ratio(records[LIMIT], record) if name == OURS and LIMIT in records else None
        table.append(
            (
                name,
                f"{1e3 * seconds:.3f}",
                f"{record['extra_info']['bytes'] / seconds / 1e9:.1f}",
                f"{times:.2f}" if times else "",
                f"{100 * share:.0f} %" if share else "",
            )
        )
    return table


def markdown(found: dict[str, dict[str, dict]]) -> str:
    lines = []
    for group, records in found.items():
        lines += [f"### {group}", "", "| provider | ms | GB/s | fastprune is × | of limit |"]
        lines.append("| --- | ---: | ---: | ---: | ---: |")
        lines += ["| " + " | ".join(row) + " |" for row in rows(records)]
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    print(markdown(groups([Path(a) for a in arguments])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
