"""The picture of the layers in a report, as an SVG file of its own.

    python tools/layer_picture.py DIR PICTURE.svg

DIR is what `fastprune prune` wrote. The colours are those of the report on a light page.
"""

import re
import sys
from pathlib import Path

STYLE = (
    "<style>text { fill: #6b6560; font: 11px system-ui, sans-serif; }"
    " .kept { fill: #0f766e; } .gone { fill: #e4e2df; }</style>"
)


def picture(report: str) -> str:
    """The first figure of the HTML text `report`, complete in itself."""
    figure = re.search(r"<svg (.*?>)(.*?</svg>)", report, re.S)
    if not figure:
        sys.exit("layer_picture: the report has no figure; give the folder that prune wrote")
    return f'<svg xmlns="http://www.w3.org/2000/svg" {figure[1]}{STYLE}{figure[2]}\n'


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python tools/layer_picture.py DIR PICTURE.svg")
    report = Path(sys.argv[1], "fastprune", "report.html").read_text(encoding="utf-8")
    Path(sys.argv[2]).write_text(picture(report), encoding="utf-8")


if __name__ == "__main__":
    main()
