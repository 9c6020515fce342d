"""Sample keys that fit and are reversible, and paths that stay inside a folder."""

import os
import re
import string
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from shards.sample import encode_key, is_safe_path

SAFE = set(string.ascii_letters + string.digits + "_-/%")

UNUSUAL = "azAZ09_-.~%+ !#&'()[]{}*?\\\n\t\x7f\xa0é\u0301ßд中\u202e🙂"

# What a file system can return: any bytes except / and NUL, undecodable ones as surrogates.
names = st.one_of(
    st.text(st.sampled_from(UNUSUAL), min_size=1, max_size=40),
    st.binary(min_size=1).map(lambda b: os.fsdecode(b.replace(b"/", b"_").replace(b"\0", b"_"))),
    st.text(st.sampled_from("ab.%~ 2E"), min_size=1, max_size=40),
).filter(lambda name: name not in (".", ".."))
stems = st.lists(names, min_size=1, max_size=3).map("/".join)


def decode_key(key):
    """Return the path that a key was made of; None if it is a hash."""
    return None if key.startswith("%sha256-") else unquote(key, errors="surrogateescape")


def key_of(stem):
    return encode_key(stem + ".png")


# ---------------------------------------------------------------------------------------- keys


@given(stems)
@example("img_0.5um")
@example("a%2Eb")
@example("ä" * 40)
@example("x" * 91)
def test_a_key_has_only_safe_characters_and_fits_into_a_tar_name(stem):
    key = key_of(stem)
    assert len(key.encode("ascii")) <= 90
    assert set(key) <= SAFE
    assert len(f"{key}.mask.png") <= 100


@given(stems)
@example("a.b")
@example("a%2Eb")
@example("%sha256-0")
@example("~.%/. ")
def test_a_key_is_reversible_unless_it_is_a_hash(stem):
    key = key_of(stem)
    if key.startswith("%sha256-"):
        assert decode_key(key) is None
    else:
        assert decode_key(key) == stem


@given(stems, stems)
@example("a.b", "a%2Eb")
@example("img_0.5um", "img_0.7um")
@example("x" * 91, "x" * 92)
def test_two_paths_never_share_a_key(one, other):
    assert (key_of(one) == key_of(other)) == (one == other)


@given(stems, st.sampled_from(["mask.png", "json", "jpg"]))
def test_a_key_survives_webdatasets_split_at_the_first_dot(stem, extension):
    key = key_of(stem)
    assert base_plus_ext(f"{key}.{extension}") == (key, extension)


def test_keys_are_pinned():
    assert encode_key("a/b c.d.JPG") == "a/b%20c%2Ed"
    assert encode_key("x~1.png") == "x%7E1"
    assert encode_key("é.png") == "%C3%A9"
    assert encode_key("x" * 90 + ".png") == "x" * 90
    assert encode_key("x" * 91 + ".png") == (
        "%sha256-87b88e4e14bba7c4429183a1b7e80dbd146a5ca0278c3b7da0403e941f60373b"
    )


# ---------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("path", ["a.png", "a/b c/d.png", "a/..b/c", "a/b..", "./a", "a\\..\\b"])
def test_paths_inside_the_folder_are_safe(path):
    assert is_safe_path(path)


@pytest.mark.parametrize(
    "path", ["", ".", "/", "/etc/passwd", "..", "../a", "a/../../b", "a/..", "a\0b"]
)
def test_paths_that_could_leave_the_folder_are_not_safe(path):
    assert not is_safe_path(path)


@given(st.text(st.sampled_from("ab. /\\\0~%"), max_size=12))
def test_a_safe_path_joined_to_a_folder_stays_inside(path):
    if is_safe_path(path):
        joined = os.path.normpath(os.path.join("/data/out", path))
        assert re.match(r"/data/out/.", joined)
