"""Open reports full of HTML from outside in a browser: no script may run, no element appear.

    python tools/check_reports.py [--browser chromium]

A tiny model, its text, its prompt and its folders have names that are HTML with scripts, and so is
every token of its tokenizer, of which all that it writes is made. `prune`, `finetune`, `compress`
and `compare` make their reports of it, and a browser without a window opens each. Checked is the
document as it stands after that: its elements are those of the templates, none has an attribute
that begins with "on", no script has marked it, and what came from outside is shown as text. First
of all the browser is tried with a page that does run such scripts. Prints one line a report; exits
1 if one fails, and 0 with a line that says so where there is no such browser.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEMPLATES = HERE.parent / "fastprune/report"
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
MARK = "ran"
RUN = f"document.documentElement.id='{MARK}'"
"""The script that all of them are: it marks the document."""
NAME = f'"><img src=x onerror="{RUN}"><svg onload="{RUN}">'
"""HTML in a name of a file, which can have no slash."""
WORDS = (
    f"\"'><script>{RUN}</script>",
    f'</title></style></textarea></pre><svg/onload="{RUN}">',
    f'<img/src="x"/onerror="{RUN}">',
    f"--><details/open/ontoggle={RUN}>{{{{7*7}}}}",
    f"<injected/{MARK}></injected>",
    f'<iframe/srcdoc="<script>parent.{RUN.replace(chr(39), "`")}</script>">',
)
"""HTML without blanks, as a token may be."""
BROWSER_ADDS = {"tbody"}
SECONDS = 300
"""For one page."""


@dataclass
class Document(HTMLParser):
    """What stands in a document that a browser has read, as it writes it down again."""

    elements: set[str] = field(default_factory=set)
    events: set[str] = field(default_factory=set)
    """attributes that begin with "on", and addresses that are scripts"""
    marked: bool = False
    """whether a script has run"""
    shown: int = 0
    """how often the script stands there as text"""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """As the parent class."""
        self.elements.add(tag)
        self.marked |= tag == "html" and ("id", MARK) in attrs
        for name, value in attrs:
            if name.startswith("on") or (value or "").strip().lower().startswith("javascript:"):
                self.events.add(name)

    def handle_data(self, data: str) -> None:
        """As the parent class."""
        self.shown += data.count(RUN)


def problems(dom: str, elements: set[str]) -> list[str]:
    """What is wrong with the document `dom`, which may have these `elements`; empty if nothing."""
    document = Document()
    document.feed(dom)
    document.close()
    found = [f"the element {name}" for name in sorted(document.elements - elements)]
    found += [f"the attribute {name}" for name in sorted(document.events)]
    found += ["a script that ran"] if document.marked else []
    return found + ([] if document.shown else ["nothing shown of what came from outside"])


def own_elements() -> set[str]:
    """The elements that the templates of reports are made of."""
    sources = [file.read_text(encoding="utf-8") for file in TEMPLATES.glob("*.j2")]
    return {name for text in sources for name in re.findall(r"<([a-z][a-z0-9]*)", text)}


def opened(browser: str, page: Path) -> str:
    """The document of `page` in `browser`, after its scripts have run. RuntimeError if it fails."""
    with tempfile.TemporaryDirectory(prefix="check-reports-") as profile:
        ran = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom",
                page.as_uri(),
            ],
            capture_output=True, timeout=SECONDS,
        )  # fmt: skip
    if ran.returncode or not ran.stdout:
        raise RuntimeError(f"{browser} ends with {ran.returncode}: {ran.stderr[-500:]!r}")
    return ran.stdout.decode()


def make_model(folder: Path) -> Path:
    """A tiny model in `folder` whose tokens are HTML."""
    from tiny import VOCABULARY, tiny_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [f"{number}{WORDS[number % len(WORDS)]}" for number in range(VOCABULARY - 1)]
    words = {token: number for number, token in enumerate(["<|end|>", *tokens])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tiny_model("llama", layers=2).save_pretrained(folder)
    end = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder)
    return folder


def reports(folder: Path) -> Iterator[tuple[str, Path]]:
    """Each command that writes a report, and the report, made in `folder`."""
    from fastprune import cli

    model, text = make_model(folder / f"model{NAME}"), folder / f"{NAME}.txt"
    words = [f"{number}{WORDS[number % len(WORDS)]}" for number in range(250)]
    text.write_text(f"{' '.join(words)}\n" * 40)
    windows = ["--eval-windows", "2", "--eval-seq-len", "16", "--eval", str(text)]
    calib = ["--calib", str(text), "--calib-samples", "2", "--calib-seq-len", "16"]
    pruning = [*calib, *windows, "--ratio", "0.2", "--effort", "fast"]
    steps = ["--data", str(text), "--max-steps", "2", "--seq-len", "16", "--keep-worse"]
    lines = {
        "prune": [str(model), *pruning],
        "finetune": [str(model), *steps, *windows, "--prompt", f"{NAME} {WORDS[0]}"],
        "compress": [str(model), *pruning, *steps, "--no-speed", "--eval-also", "none"],
    }
    made = []
    for command, line in lines.items():
        out = folder / f"{command}{NAME}"
        _run(cli, [command, *line, "--out", str(out)])
        made.append(str(out))
        yield command, out / "fastprune/report.html"
    _run(cli, ["compare", *made, "--out", str(folder / "compare.html")])
    yield "compare", folder / "compare.html"


def _run(cli, line: list[str]) -> None:
    status = cli.main([*line, "--threads", "1", "--quiet"])
    if status:
        raise RuntimeError(f"{line[0]} ends with exit status {status}")


def check(browser: str, folder: Path) -> Iterable[tuple[str, list[str]]]:
    """The name of each report, made in `folder`, and what is wrong with it."""
    elements = own_elements() | BROWSER_ADDS
    hostile = folder / "hostile.html"
    hostile.write_text(f"<!DOCTYPE html><title>a</title><p>{RUN}</p>{''.join(WORDS)}{NAME}")
    found = problems(opened(browser, hostile), elements)
    if "a script that ran" not in found or len(found) < 5:
        raise RuntimeError(f"{browser} does not run scripts, or they are not seen: {found}")
    for command, page in reports(folder):
        yield command, problems(opened(browser, page), elements)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--browser", default="chromium", help="of the family of Chromium")
    args = parser.parse_args()
    if shutil.which(args.browser) is None:
        print(f"reports are not checked: there is no {args.browser} (apt-get install chromium)")
        return 0
    failed = False
    with tempfile.TemporaryDirectory(prefix="check-reports-") as name:
        os.environ["XDG_CACHE_HOME"] = str(Path(name) / "cache")
        for command, wrong in check(args.browser, Path(name)):
            failed |= bool(wrong)
            print(f"{command}: {', '.join(wrong) or 'sound'}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
