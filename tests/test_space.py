"""Room on disks: told before the work, and in one line where it runs out."""

import resource
import shutil

import pytest
import torch
from safetensors.torch import save_file

from fastprune.errors import GateError, InputError
from fastprune.space import check_space, disk_errors


def test_what_fits_is_not_spoken_of(tmp_path):
    check_space(tmp_path / "not" / "there" / "yet", 1000, "the result")


def test_what_does_not_fit_is_told_with_both_figures(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"the result takes about 3 GB, and 2 GB are free on") as e:
        check_space(tmp_path / "out", 3e9, "the result")
    assert str(tmp_path / "out") in str(e.value)


@pytest.mark.parametrize("code", [27, 28, 30, 122])
def test_a_disk_that_takes_no_more(tmp_path, code):
    said = rf"{tmp_path}: cannot be written: .*; make room"
    with pytest.raises(InputError, match=said), disk_errors(tmp_path):
        raise OSError(code, "said by the system")


def test_the_error_behind_another_one(tmp_path):
    with pytest.raises(InputError, match="No space left on device"), disk_errors(tmp_path):
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RuntimeError("a library's own words") from error


def test_a_library_written_in_rust(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match="File too large; make room"), disk_errors(tmp_path):
            save_file({"weight": torch.zeros(1000)}, tmp_path / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("error", [OSError(2, "No such file"), ValueError("28"), GateError("no")])
def test_other_errors_pass(tmp_path, error):
    with pytest.raises(type(error)) as raised, disk_errors(tmp_path):
        raise error
    assert raised.value is error
