"""Text from others, such as file names, keys and URLs, made harmless for terminals and logs."""

import re
import unicodedata

MAX_LINE = 2000
"""Characters of a line on stderr: several paths, the problem and the remedy."""
URL_SECRETS = re.compile(
    r"(?P<user>[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#@]*@"
    r"|(?P<key>[?&;](?:[\w.-]*(?:signature|credential|security-token|token|secret|password)|sig|"
    r"AWSAccessKeyId|GoogleAccessId|access_?key\w*|api_?key)=)[^\s&;'\"]+",
    re.IGNORECASE,
)
"""User names and passwords in URLs, and the signatures of presigned ones."""
KEPT_CATEGORIES = {"Zs"}
"""Of Unicode's categories C and Z, those that are printed: spaces, but no control characters, marks
of direction, lone surrogates or line separators."""


def escape_line(text: str, limit: int | None = MAX_LINE) -> str:
    """Return text as one harmless line.

    Control characters, line breaks, marks of direction and lone surrogates are written as in
    Python's `repr`, credentials in URLs as `***`. The middle of a longer line is left out.
    """
    if not text.isprintable():
        text = "".join(map(escape_character, text))
    if "=" in text or "@" in text:
        text = URL_SECRETS.sub(hide_secret, text)
    if limit is None or len(text) <= limit:
        return text
    half = limit // 2 - 20
    return f"{text[:half]} ... ({len(text):,} characters) ... {text[-half:]}"


def escape_text(text: str, limit: int | None = MAX_LINE) -> str:
    """Apply `escape_line` to each line of a text."""
    return "\n".join(escape_line(line, limit) for line in text.split("\n"))


def escape_character(character: str) -> str:
    """Escape one character, unless it is harmless."""
    category = unicodedata.category(character)
    if category[0] not in "CZ" or category in KEPT_CATEGORIES or category == "Co":
        return character
    return repr(character)[1:-1]


def hide_secret(match: re.Match[str]) -> str:
    """Return the replacement of a match of URL_SECRETS."""
    return f"{match['user']}***@" if match["user"] else f"{match['key']}***"
