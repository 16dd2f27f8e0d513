"""Malformed texts and training data, in every form that is read."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from case import EITHER, ESCAPES, Base, Case, broken_texts, damaged, written

RECORDS = [{"prompt": f"Who built dam {n}?", "response": "Nobody knows it."} for n in range(6)]

USABLE = ("long fraction", "two", "huge exponent", "trailing", "string")
"""Broken texts that hold data nevertheless."""


def cases(base: Base, rng: random.Random) -> Iterator[Case]:
    """All malformed data."""
    for name, content in _files(base, rng).items():
        wrong = content is None or name.startswith("!")
        uses = ("text", "calib", "data") if wrong else (rng.choice(["text", "calib", "data"]),)
        for use in uses:

            def build(place: Path, name: str = name, content: Any = content, use: str = use
                      ) -> list[str]:  # fmt: skip
                file = place / name.lstrip("!").rpartition("|")[2]
                if content is None:
                    file.mkdir()
                else:
                    written(file, content)
                more = ["--samples", "2"] if use == "data" else []
                return {
                    "text": lambda: base.evaluate(base.sound, "--text", str(file)),
                    "calib": lambda: base.prune(base.sound, place, "--calib", str(file)),
                    "data": lambda: base.finetune(base.sound, place, "--data", str(file), *more),
                }[use]()  # fmt: skip

            yield Case(f"{use}: {name.lstrip('!')}", build, (2,) if wrong else EITHER)


def _files(base: Base, rng: random.Random) -> dict[str, bytes | str | Any]:
    """Contents by what is wrong and the name of the file, joined by |; ! where none may pass."""
    text = Path(base.text).read_text()
    found: dict[str, Any] = {
        "!empty|a.txt": b"", "!blank|a.txt": b" \n\n", "!zeros|a.txt": b"a\0b" * 500,
        "!not UTF-8|a.txt": text.encode() + b"\xff", "!utf-16|a.txt": text.encode("utf-16"),
        "short|a.txt": b"a", "!unknown|a.docx": b"x", "!folder|a.d": None,
        "!not gzip|a.txt.gz": text.encode(),
        "!cut gzip|a.txt.gz": gzip.compress(text.encode())[:-9],
        "!damaged gzip|a.txt.gz": damaged(gzip.compress(text.encode()), rng)[:40],
        "escapes|a.txt": (text + ESCAPES).encode(), "!packed parquet|a.parquet.gz": b"x",
    }  # fmt: skip
    for form in ("json", "jsonl"):
        sound = RECORDS[0]
        for what, data in broken_texts(json.dumps(sound)).items():
            usable = what in USABLE or (form, what) == ("jsonl", "comment")
            found[f"{'' if usable else '!'}{what}|a.{form}"] = data
        lines = [json.dumps(record) for record in RECORDS]
        for what, value in {
            "number": 3, "null": None, "half pair": {"prompt": "\ud800", "response": "x"},
            "wrong fields": {"x": 1}, "numbers": {"prompt": 1, "response": 2},
            "nested": {"messages": [[[]]]}, "no role": {"messages": [{"content": "x"}]},
            "no turns": {"messages": []}, "turns of text": {"messages": "x"},
            "role": {"messages": [{"role": ESCAPES, "content": "x"}]},
            "escapes": {"prompt": ESCAPES, "response": ESCAPES}, "infinite": {"text": float("inf")},
        }.items():  # fmt: skip
            sign = "" if what == "escapes" else "!"
            found[f"{sign}every record {what}|a.{form}"] = "\n".join([json.dumps(value)] * 3)
            found[f"a record {what}|a.{form}"] = "\n".join([*lines, json.dumps(value)])
        for number in range(40):
            joined = "\n".join(lines) if form == "jsonl" else json.dumps(RECORDS)
            found[f"damaged {number}|a.{form}"] = damaged(joined.encode(), rng)
    table = "prompt,response\n" + "\n".join("Who?,Nobody." for _ in range(6))
    for form in ("csv", "tsv"):
        for what, content in {
            "no header": "\n\n", "quotes": 'a,b\n"x', "one column": "a\n1\n2",
            "ragged": "a,b\n1,2,3",
            "zeros": "a,b\n\0,1", "twice": "text,text\na,b", "empty names": ",,\na,b,c",
        }.items():  # fmt: skip
            found[f"{what}|a.{form}"] = content
        for number in range(20):
            found[f"damaged {number}|a.{form}"] = damaged(table.encode(), rng)
    return found | _arrow(rng) | _tokens(rng)


def _arrow(rng: random.Random) -> dict[str, bytes]:
    """Parquet and Arrow files, damaged and with strings that are not UTF-8."""
    import pyarrow
    from pyarrow import ipc, parquet

    sound = pyarrow.Table.from_pylist(RECORDS)
    raw = pyarrow.array([b"\xff\xfe Who?"] * 3, pyarrow.binary()).view(pyarrow.string())
    wrong = pyarrow.table({"prompt": raw, "response": raw})
    numbers = pyarrow.table({"text": [1, 2, 3]})

    def packed(table: Any, form: str) -> bytes:
        file = io.BytesIO()
        if form == "parquet":
            parquet.write_table(table, file)
        else:
            with ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        return file.getvalue()

    found = {}
    for form in ("parquet", "arrow"):
        data = packed(sound, form)
        found |= {
            f"!empty|a.{form}": b"",
            f"!text|a.{form}": b"Who?" * 50,
            f"!cut|a.{form}": data[: len(data) // 3],
            f"!not UTF-8|a.{form}": packed(wrong, form),
            f"!numbers|a.{form}": packed(numbers, form),
        }
        for number in range(60):
            found[f"damaged {number}|a.{form}"] = damaged(data, rng)
    return found


def _tokens(rng: random.Random) -> dict[str, bytes]:
    """Files of token ids: of wrong kinds, beyond the vocabulary, damaged."""

    def saved(values: Any) -> bytes:
        file = io.BytesIO()
        np.save(file, values, allow_pickle=True)
        return file.getvalue()

    ids = rng.choices(range(300), k=400)
    found = {
        "beyond|a.npy": saved(np.array([*ids, 70_000], dtype=np.uint32)),
        "!negative|a.npy": saved(np.array([-1] * 100, dtype=np.int64)),
        "!fractions|a.npy": saved(np.array([0.5] * 100)),
        "!objects|a.npy": saved(np.array([{}, []], dtype=object)),
        "!text|a.npy": saved(np.array(["a"] * 100)),
        "!empty|a.npy": saved(np.array([], dtype=np.uint16)),
        "!no file|a.npy": b"",
        "!beyond|a.bin": np.array([60_000] * 200, dtype=np.uint16).tobytes(),
        "!empty|a.bin": b"",
        "!magic|a.npy": b"\x93NUMPY\xff\xff" + b"x" * 100,
        "huge shape|a.npy": saved(np.array(ids, dtype=np.uint16)).replace(b"(400,)", b"(4e9,)"),
    }
    data = saved(np.array(ids, dtype=np.uint16))
    for number in range(40):
        found[f"damaged {number}|a.npy"] = damaged(data, rng)
    return found
