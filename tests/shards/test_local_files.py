"""`shards.local_files`: pipes, sockets and devices are refused, never opened."""

import os
import socket

import pytest

from shards.local_files import open_file, read_file, read_text, refuse_special_files
from shards.sample import DataError


@pytest.fixture(params=["pipe", "socket", "device", "link to a pipe", "link to a device"])
def special(request, tmp_path):
    kind, path = request.param, tmp_path / "a.png"
    target = tmp_path / "target" if kind.startswith("link") else path
    if kind.endswith("pipe"):
        os.mkfifo(target)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(target))
    else:
        target = "/dev/zero"
    if kind.startswith("link") or kind == "device":
        path.symlink_to(target)
    return path, kind.rpartition(" ")[2]


@pytest.mark.parametrize("read", [open_file, read_file, read_text])
def test_what_is_no_file_is_refused_in_one_line(special, read):
    path, kind = special
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == f"{path} is a {kind}, not a file; remove it"


def test_a_folder_with_one_is_refused(special):
    path, kind = special
    with pytest.raises(DataError, match=f"is a {kind}, not a file; remove it"):
        refuse_special_files(path.parent)


def test_files_are_read_and_errors_name_the_path(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_text(path) == "a\nb"
    with open_file(path) as file:
        assert file.read(4) == b"\xef\xbb\xbfa"
    with pytest.raises(FileNotFoundError) as caught:
        read_file(tmp_path / "missing")
    assert str(caught.value.filename) == str(tmp_path / "missing")
