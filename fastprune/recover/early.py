"""What a finetuning run is refused for before weights are read."""

from __future__ import annotations

from fastprune.data.records import check_data
from fastprune.data.text import check_text
from fastprune.models.load import check_source
from fastprune.recover.config import FinetuneConfig


def check_inputs(config: FinetuneConfig) -> None:
    """InputError where data, texts or the teacher that `config` names are missing, unreadable or
    empty, as far as the beginnings of their files tell."""
    for data in (config.data, config.val_data, config.test_data):
        if data is not None:
            check_data(data)
    if config.eval_windows:
        check_text(config.eval)
    if config.teacher is not None:
        check_source(config.teacher, config.trust_remote_code)
