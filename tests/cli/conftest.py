"""main() sets up logging for a whole process; a test must not leave that behind."""

import logging

import pytest

from fastprune import cli


@pytest.fixture(autouse=True)
def restored_logging(monkeypatch):
    monkeypatch.setattr(cli.console, "quiet", False)
    log, warnings = logging.getLogger("fastprune"), logging.getLogger("py.warnings")
    before = log.handlers[:], log.level, log.propagate, warnings.handlers[:]
    yield
    log.handlers, log.level, log.propagate, warnings.handlers = before
    logging.captureWarnings(False)
