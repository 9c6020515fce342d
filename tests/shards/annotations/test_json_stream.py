"""`annotations.json_stream`.

JSON files are read element by element, whatever the size of the window.
"""

import json

import pytest

from shards.annotations import json_stream
from shards.annotations.json_stream import read_elements
from shards.sample import DataError

PLAIN = {
    "info": {"year": 2020, "é": [1, 2]},
    "images": [{"id": n, "file_name": f"ö ä/{n} 圖\U0001f600.jpg"} for n in range(40)],
    "empty": [],
    "annotations": [{"id": n, "s": [[0.5, -1e-7, n]], "t": 'a"]}{\\'} for n in range(40)],
    "last": 12345,
}


@pytest.fixture
def write(tmp_path):
    def save(data):
        path = tmp_path / "file.json"
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return save


@pytest.mark.parametrize("window", [1, 7, 64, 2**20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_elements_and_their_bytes_are_those_of_the_file(
    write, monkeypatch, window, indent, ascii_only
):
    monkeypatch.setattr(json_stream, "WINDOW", window)
    data = json.dumps(PLAIN, indent=indent, ensure_ascii=ascii_only).encode()
    found = list(read_elements(write(data)))
    for key in ("images", "annotations"):
        assert [e.value for e in found if e.key == key and e.in_array] == PLAIN[key]
    assert {e.key: e.value for e in found if not e.in_array} == {
        key: PLAIN[key] for key in ("info", "empty", "last")
    }
    for element in found:
        if element.in_array:
            assert json.loads(data[element.start : element.stop]) == element.value


def test_arrays_at_the_top_and_byte_order_marks_are_read(write):
    data = b"\xef\xbb\xbf [1, 23, {}] \n"
    found = list(read_elements(write(data)))
    assert [(e.value, data[e.start : e.stop]) for e in found] == [
        (1, b"1"),
        (23, b"23"),
        ({}, b"{}"),
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "is empty; export it again"),
        ('{"images": [{"id": 1', "ends in the middle of its JSON, after 20 bytes; it was cut off"),
        ('{"images": [{"id": 1}', "ends in the middle of its JSON"),
        ('{"images": [{"id": "ab', "ends in the middle of its JSON"),
        ('{"images": [1, ' + "x" * 100 + "]}", "is not valid JSON at byte 15: 'xxxxxxxxxxxx'"),
        ('{"a": 1} {', "is not valid JSON at byte 9"),
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ("hello", "is not valid JSON at byte 0: 'hello'"),
        ('{"a" 1}', "is not valid JSON at byte 5"),
        ("{1: 2}", "is not valid JSON at byte 1"),
        ("[" + "[" * 100_000 + "]" * 100_000 + "]", "is nested too deeply"),
        (b'{"a": "\xff"}', "is not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text"),
    ],
)
def test_damaged_files_are_refused_by_name(write, data, message):
    with pytest.raises(DataError, match=message) as caught:
        list(read_elements(write(data)))
    assert "file.json" in str(caught.value)
    assert "\n" not in str(caught.value)
