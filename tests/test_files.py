"""Single files, and folders whose files are known by size and digest."""

import os

import pytest

from fastprune.errors import InputError
from fastprune.files import SEAL, check_file, is_result, is_sealed, seal, write_file, write_whole


def test_an_interrupt_leaves_the_earlier_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    file.write_text("old")
    real = os.replace
    for before in (True, False):

        def replace(source, target, before=before):
            if not before:
                real(source, target)
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            write_whole(file, "new")
        assert file.read_text() == ("old" if before else "new")
        assert list(tmp_path.iterdir()) == [file]


@pytest.fixture
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_permissions_stay(tmp_path, usual_umask):
    file = tmp_path / "a.json"
    write_whole(file, "one")
    assert file.stat().st_mode & 0o777 == 0o644
    file.chmod(0o600)
    write_whole(file, "two")
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        ('{"fastprune": "0.1", "a": 1}', True),
        ('{\n "fastprune": "0.1"', True),
        ('{"a": 1, "fastprune": "0.1"}', False),
        ('{"fastprune": {"a": 1}}', False),
        ('["fastprune"]', False),
        ("fastprune", False),
    ],
)
def test_a_result_begins_with_the_mark(tmp_path, content, ours):
    file = tmp_path / "a.json"
    file.write_text(content)
    assert is_result(file) is ours


def test_a_descriptor_that_is_not_open():
    with pytest.raises(InputError, match="cannot be written"):
        check_file("--json", "/dev/fd/987", is_result, "a result")
    with pytest.raises(InputError, match="cannot be written: Bad file descriptor"):
        write_file("--json", "/dev/fd/987", "text")


class TestSeal:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "deep").mkdir()
        (tmp_path / "a.bin").write_bytes(b"12345678")
        (tmp_path / "deep" / "b.bin").write_bytes(b"abcd")
        seal(tmp_path)
        return tmp_path

    def test_holds(self, folder):
        assert is_sealed(folder)
        (folder / "more").write_text("is none of it")
        assert is_sealed(folder)

    def test_sizes_and_digests(self, folder):
        (folder / "deep" / "b.bin").write_bytes(b"abce")
        assert is_sealed(folder, digests=False)
        assert not is_sealed(folder)
        (folder / "deep" / "b.bin").write_bytes(b"abc")
        assert not is_sealed(folder, digests=False)

    @pytest.mark.parametrize("name", ["a.bin", SEAL])
    def test_a_missing_file(self, folder, name):
        (folder / name).unlink()
        assert not is_sealed(folder, digests=False)

    @pytest.mark.parametrize("content", ["", "[]", "{", '{"a.bin": 3}', '{"a.bin": [8]}', "null"])
    def test_a_broken_seal(self, folder, content):
        (folder / SEAL).write_text(content)
        assert not is_sealed(folder)
