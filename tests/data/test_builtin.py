"""The texts inside the package, and the script that makes them."""

import importlib.util
import re
from pathlib import Path

import pytest

from fastprune.data.builtin import BUILTIN, FOLDER
from fastprune.data.records import read_source
from fastprune.data.text import load_documents
from fastprune.inspect.perplexity import EvalConfig
from fastprune.pruning.config import PruneConfig
from fastprune.recover.config import FinetuneConfig

TOOL = Path(__file__).parents[2] / "tools" / "builtin_texts.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("builtin_texts", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "documents", "characters", "beginning"),
    [
        ("builtin:c4", 2000, 4_440_000, "Beginners BBQ Class Taking Place in Missoula!\n"),
        ("builtin:wikitext2", 1, 1_280_000, " = Robert Boulter = \n Robert Boulter is an"),
        ("builtin:pydocs", 79, 460_000, 'The "assert" statement\n'),
    ],
)
def test_texts_are_the_known_ones(name, documents, characters, beginning):
    texts = load_documents(name)
    assert len(texts) == documents
    assert texts[0].startswith(beginning)
    assert characters < sum(map(len, texts)) < 1.02 * characters
    assert "\r" not in "".join(texts)
    assert next(read_source(name)).where == f"{name}: document 1"


@pytest.mark.parametrize("name", BUILTIN)
def test_texts_hold_no_addresses_and_telephone_numbers(name, tool):
    text = "\n".join(load_documents(name))
    assert tool.without_contacts(text) == text
    assert not re.search(r"\w@\w+\.(com|org|net|edu|uk)\b", text)
    assert not re.search(r"\(\d{3}\) \d{3}-\d{4}", text)


def test_files_stay_small_and_say_where_they_come_from():
    sizes = [file.stat().st_size for file in FOLDER.glob("*.xz")]
    assert max(sizes) < 2**20
    assert sum(sizes) < 2.5e6
    about = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in about for name in BUILTIN)


def test_commands_use_them_where_no_text_is_named():
    assert PruneConfig().calib == FinetuneConfig().data == "builtin:c4"
    assert PruneConfig().eval == FinetuneConfig().eval == "builtin:wikitext2"
    assert EvalConfig(model="").text == "builtin:wikitext2"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Write to jo.doe+x@mail.example.org.", "Write to [email]."),
        ("office [at] example [dot] org", "[email]"),
        ("Ring (555) 296-4865 or 555-677-4075.", "Ring [phone] or [phone]."),
        ("+60-6-2881100, 021 433 0967", "[phone], [phone]"),
        ("call 3030633 now", "call [phone] now"),
        ("Follow @somebody; 1 @-@ 2", "Follow @somebody; 1 @-@ 2"),
        ("1943-1945, 2019-04-02 14:18, 18 000, 0.75", "1943-1945, 2019-04-02 14:18, 18 000, 0.75"),
        ("call 42 of 100", "call 42 of 100"),
    ],
)
def test_contacts_are_replaced_and_nothing_else(tool, text, cleaned):
    assert tool.without_contacts(text) == cleaned
