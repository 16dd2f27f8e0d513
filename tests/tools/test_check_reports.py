"""tools/check_reports.py finds what a browser makes of HTML that was not escaped."""

import sys

import pytest
from programs import program

from fastprune.report.html import environment

check_reports = program("check_reports.py")
NAME, RUN, WORDS = check_reports.NAME, check_reports.RUN, check_reports.WORDS
own_elements, problems = check_reports.own_elements, check_reports.problems
PAGE = "<html><head><title>{title}</title></head><body><p>{text}</p></body></html>"


@pytest.mark.parametrize("text", [NAME, *WORDS])
def test_what_comes_from_outside_is_text_in_a_template(text):
    page = environment.from_string('<p title="{{ text }}">{{ text }}</p>').render(text=text)
    assert problems(page + f"<p>{RUN}</p>", own_elements()) == []


@pytest.mark.parametrize(
    ("page", "found"),
    [
        (PAGE.format(title="a", text=f"{RUN}<img>"), "the element img"),
        (PAGE.format(title="a", text=f"{RUN}<b onclick=x>b</b>"), "the attribute onclick"),
        (PAGE.format(title="a", text=f"{RUN}<p href='javascript:x'>"), "the attribute href"),
        (f'<html id="ran"><p>{RUN}</p></html>', "a script that ran"),
        (PAGE.format(title="a", text="b"), "nothing shown of what came from outside"),
    ],
)
def test_what_was_not_escaped_is_found(page, found):
    assert problems(page, own_elements()) == [found]


def test_a_machine_without_a_browser_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_reports.py", "--browser", "no-such-browser"])
    assert check_reports.main() == 0
    assert "reports are not checked: there is no no-such-browser" in capsys.readouterr().out
