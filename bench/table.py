"""Tables of benchmark results: python bench/table.py RESULTS.json [...]

Reads what pytest-benchmark writes (--benchmark-json) and prints, per group, each provider's median,
GB/s of the bytes that must move, the speed of fastprune relative to it, and its share of the limit
(a plain read or copy of as many bytes) measured in the same run.
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


def rows(records: dict[str, dict]) -> list[tuple[str, ...]]:
    medians = {name: r["stats"]["median"] for name, r in records.items()}
    table = []
    for name, record in sorted(records.items(), key=lambda item: medians[item[0]]):
        seconds = medians[name]
        table.append(
            (
                name,
                f"{1e3 * seconds:.3f}",
                f"{record['extra_info']['bytes'] / seconds / 1e9:.1f}",
                f"{seconds / medians[OURS]:.2f}" if OURS in medians else "",
                f"{100 * medians[LIMIT] / seconds:.0f} %" if LIMIT in medians else "",
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
