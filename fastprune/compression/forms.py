"""What `--format` adds to `prune` and `compress`: the result in other forms, in OUT/exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastprune.errors import InputError
from fastprune.exporting.config import ExportConfig
from fastprune.exporting.formats import check, find
from fastprune.exporting.pipeline import export
from fastprune.progress import log as progress_log
from fastprune.pruning import pipeline
from fastprune.pruning.config import PruneConfig
from fastprune.pruning.pipeline import PruneResult

EXPORTED = "exported"


@dataclass(frozen=True)
class Forms:
    """The forms that `config.format` names, beside the checkpoint."""

    config: PruneConfig

    def check_settings(self) -> None:
        """InputError for a form that does not exist, and where there will be none to export."""
        for name in self.config.format:
            self._settings(name, Path()).formats()
        if self.config.format and self.config.stream:
            raise InputError(
                "--format does not go with --stream; export the result afterwards, with "
                "fastprune export"
            )

    def check(self, model: nn.Module) -> None:
        """InputError when `model` cannot have one of the forms."""
        for name in self.config.format:
            check(name, model, self._settings(name, Path()))

    def write(self, model: nn.Module, tokenizer: Any, directory: Path) -> None:
        """Write every form into `directory`/exported, with what the records there say of the
        dense model. Raises InputError as `check`."""
        for name in self.config.format:
            place = directory / EXPORTED / find(name).entry(name)
            place.parent.mkdir(exist_ok=True)
            export(model, tokenizer, self._settings(name, place), source=directory)
            progress_log.info("exported: %s", place.relative_to(directory))

    def _settings(self, name: str, place: Path) -> ExportConfig:
        config = self.config
        return ExportConfig(
            model=str(config.out),
            format=(name,),
            out=place,
            quant=config.quant,
            pad=config.pad,
            read_back=config.read_back,
            device=config.device,
        )


def run_prune(config: PruneConfig) -> PruneResult:
    """The `prune` command: `fastprune.pruning.pipeline.run_prune`, and the forms of `--format`."""
    forms = Forms(config)
    forms.check_settings()
    return pipeline.run_prune(config, beside=forms)
