"""Keeps other libraries' messages off the console; ours say what the user needs to know."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence transformers' log lines, warnings and progress bars inside the block.

    Raises RuntimeError for a panic of a library written in Rust, such as tokenizers, which would
    pass every `except Exception`.
    """
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(library.CRITICAL)
    library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3 gives it no name to import it by
            raise
        raise RuntimeError(str(error)) from error
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
