"""Make the texts that the package carries (fastprune/data/texts/) from their public sources.

    python tools/builtin_texts.py c4 c4-train.00000-of-01024.json.gz
    python tools/builtin_texts.py wikitext2 wiki.test.txt
    python tools/builtin_texts.py pydocs

c4 takes the first DOCUMENTS documents of the first English training shard of allenai/c4
(`.json.gz`, or the same lines unpacked); wikitext2 the WikiText-2 raw test split as one text file;
pydocs the reference topics of the Python that runs this script (3.11 for those in the package).
E-mail addresses and telephone numbers are replaced by [email] and [phone], line ends by plain ones.
Every file is xz, a document a line as a JSON string, PART_DOCUMENTS of them in a file.
"""

import gzip
import itertools
import json
import lzma
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "fastprune" / "data" / "texts"
DOCUMENTS = 2000
PART_DOCUMENTS = 1000

EMAIL = re.compile(
    r"[\w.+-]+(?:@| ?(?:\(at\)|\[at\]) ?)[\w-]+(?:(?:\.| ?(?:\(dot\)|\[dot\]) ?)[A-Za-z][\w-]*)+"
)
# Separators are part of what tells a telephone number from years, prices and scores.
NUMBERS = (
    r"\+[1-9]\d{0,2}[ -](?:\(\d{1,4}\)[ -]?)?\d{1,5}(?:[ -]?\d{2,5}){1,4}",  # international
    r"(?:1[ .-]?)?(?:\(\d{3}\)[ .-]{0,3}|\d{3}[ .-])\d{2,3}[ .-]\d{4}",  # North America
    r"(?:\(0[1-9]\d{0,3}\)|0[1-9]\d{0,3})[ -]?\d{3,4}[ -]?\d{3,4}",  # a trunk prefix 0
)
LABELLED = re.compile(
    r"\b((?:tele)?phone|tel|fax|call|mobile|cell|whatsapp)([\s:.@-]{0,3}(?:us|at|on|is)?[\s:.-]{0,3})"
    r"\+?\(?\d[\d().-]*(?:[ /-]?[\d().-]+){0,5}\d{2}(?!\w)",
    re.IGNORECASE,
)
PHONE = re.compile(rf"(?<![\w.,/$-])(?:{'|'.join(NUMBERS)})(?![\w-]|[.,]\d)")
LEAST_DIGITS = 7  # of a number that only the word before it makes one of a telephone


def main() -> int:
    name, *files = sys.argv[1:]
    if name == "c4":
        documents = list(itertools.islice(_c4(Path(files[0])), DOCUMENTS))
    elif name == "wikitext2":
        documents = [Path(files[0]).read_text(encoding="utf-8")]  # with plain line ends
    else:
        documents = list(_pydocs())
    cleaned = [without_contacts(document) for document in documents]
    changed = sum(before != after for before, after in zip(documents, cleaned))
    parts = [cleaned[i : i + PART_DOCUMENTS] for i in range(0, len(cleaned), PART_DOCUMENTS)]
    for number, part in enumerate(parts, start=1):
        file = FOLDER / f"{name}-{number}.jsonl.xz"
        file.write_bytes(_packed(part))
        print(f"{file.name}: {len(part)} documents, {file.stat().st_size:,} bytes")
    print(f"{changed} documents had an e-mail address or a telephone number")
    return 0


def without_contacts(text: str) -> str:
    """`text` with e-mail addresses as [email] and telephone numbers as [phone]."""
    return LABELLED.sub(_labelled, PHONE.sub("[phone]", EMAIL.sub("[email]", text)))


def _labelled(match: re.Match[str]) -> str:
    digits = sum(character.isdigit() for character in match.group())
    return f"{match.group(1)}{match.group(2)}[phone]" if digits >= LEAST_DIGITS else match.group()


def _c4(file: Path) -> Iterator[str]:
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _pydocs() -> Iterator[str]:
    from pydoc_data.topics import topics

    return (topics[name] for name in sorted(topics))


def _packed(documents: Iterable[str]) -> bytes:
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    # the same options on every machine, so that the same texts are the same bytes
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "pb": 0}]
    return lzma.compress(lines.encode(), format=lzma.FORMAT_XZ, filters=filters)


if __name__ == "__main__":
    sys.exit(main())
