"""The two READMEs say the same, are short, and every local link in the documents has a target.

The site has every page of `docs`, and its pages link to no file outside of `docs`.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
GENERATED = "commands.md"
"""The page that tools/command_reference.py makes when the site is built."""
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def test_both_languages_have_the_same_headings_code_and_figures():
    english, chinese = (file.read_text(encoding="utf-8") for file in READMES)
    for pattern in (r"^#+(?= )", r"^```\w*\n.*?^```$", r"\]\((?!README)(.*?)\)", r"\d+\.\d+"):
        found = [re.findall(pattern, text, re.M | re.S) for text in (english, chinese)]
        assert found[0], pattern
        assert found[0] == found[1]


@pytest.mark.parametrize("file", READMES, ids=lambda file: file.name)
def test_a_readme_is_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", text)
    missing = [t for t in targets if Path(t).name != GENERATED and not (page.parent / t).exists()]
    assert missing == []
    if page.is_relative_to(DOCS):
        outside = [t for t in targets if not (page.parent / t).resolve().is_relative_to(DOCS)]
        assert outside == []


def test_the_site_has_every_page():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r"[\w/-]+\.md$", nav, re.M)
    assert len(named) == len(set(named))
    there = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert set(named) == there | {f"reference/{GENERATED}"}
