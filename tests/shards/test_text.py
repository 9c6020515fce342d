"""`shards.text`: names, keys and URLs of others are printed as one harmless line."""

import pytest

from shards.text import escape_line, escape_text

HARMLESS = [
    "",
    "a b.png",
    "été/größe 图像.png",
    "a" * 2000,
    "m²\u00a0→",
    "s3://bucket/a@b.png",
    "a=b",
]


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_text_is_unchanged(text):
    assert escape_line(text) == text


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("\x1b[31mred\x1b]0;pwned\x07", "\\x1b[31mred\\x1b]0;pwned\\x07"),
        ("safe\rEVIL", "safe\\rEVIL"),
        ("a\nunet pack: all is well", "a\\nunet pack: all is well"),
        ("\u202egnp.exe\u2066", "\\u202egnp.exe\\u2066"),
        ("c1 \x9b31m \x85 \x7f", "c1 \\x9b31m \\x85 \\x7f"),
        ("\udcff\u2028\u2029\u200f\t", "\\udcff\\u2028\\u2029\\u200f\\t"),
    ],
)
def test_what_moves_the_cursor_or_reorders_text_is_escaped(text, printed):
    assert escape_line(text) == printed
    assert escape_line(printed) == printed


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("s3://user:pass@host/a.tar is truncated", "s3://***@host/a.tar is truncated"),
        ("https://token@host/a?b=1", "https://***@host/a?b=1"),
        (
            "https://h/a?X-Amz-Credential=AK/s3&X-Amz-Signature=ab12&x=1: no answer",
            "https://h/a?X-Amz-Credential=***&X-Amz-Signature=***&x=1: no answer",
        ),
        ("https://h/a?sv=2&sig=abc%3D; retry", "https://h/a?sv=2&sig=***; retry"),
        (
            "https://h/a?X-Goog-Signature=ab&access_token=cd",
            "https://h/a?X-Goog-Signature=***&access_token=***",
        ),
    ],
)
def test_credentials_of_urls_are_hidden(text, printed):
    assert escape_line(text) == printed


def test_long_lines_keep_their_start_and_end():
    line = escape_line("path " + "x" * 10**6 + "; remedy")
    assert len(line) <= 2000
    assert line.startswith("path xxx")
    assert " ... (1,000,013 characters) ... " in line
    assert line.endswith("xxx; remedy")


def test_the_lines_of_a_text_are_kept():
    assert escape_text("a\n  b\x1b\n") == "a\n  b\\x1b\n"
