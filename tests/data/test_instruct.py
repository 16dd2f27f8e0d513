"""Chat templates that come with a model are programs, and are not waited for without end."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny import tiny_tokenizer

from fastprune.data import instruct
from fastprune.data.instruct import prompt_text
from fastprune.errors import InputError


def test_a_template_that_does_not_end_is_refused_in_every_thread(monkeypatch):
    monkeypatch.setattr(instruct, "TEMPLATE_SECONDS", 0.1)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    asked = (tokenizer, [{"role": "user", "content": "Who built the dam?"}])
    with ThreadPoolExecutor(1) as pool:
        for refusal in (lambda: prompt_text(*asked), pool.submit(prompt_text, *asked).result):
            with pytest.raises(InputError, match="refuses this conversation: it takes too long"):
                refusal()
