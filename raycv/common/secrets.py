"""Masks passwords and tokens in texts that are printed, logged or written."""

import re

_SECRETS = (
    # A URL holds `user:password@` or `token@`. We mask up to the last @ before a slash, since a password may hold an @.
    # A path that was made from an address has one slash less.
    (re.compile(r"(:/{1,2})[^/\s]*@"), r"\1***@"),
    # Database drivers accept an unescaped slash in the password.
    (re.compile(r"(:/{1,2})[^/\s:@]+:[^\s@]*@"), r"\1***@"),
    # HTTP clients send an unescaped space in the password.
    (re.compile(r"(:/{1,2})[^/\s:@]*:[^/\n@]*@"), r"\1***@"),
    (re.compile(r"(?i)(authorization\W+\w+\s+|\bbearer\s+)[\w.~+/=-]{4,}"), r"\1***"),
    # A hub token has 34 letters. A folder may be named hf_something, so shorter names stay.
    (re.compile(r"(?<![\w/])hf_[A-Za-z0-9]{30,}"), "hf_***"),
    # Query strings, and connection strings of key=value.
    (
        re.compile(
            r"(?i)((?:token|passw(?:or)?d|pwd|secret|signature|credential|api.?key|access.?key)[\w-]*=)[^&;\s'\"]+"
        ),
        r"\1***",
    ),
)


def mask_secrets(text: str) -> str:
    """`text` with `***` for passwords in URLs, for tokens, and for signatures in query strings."""
    for pattern, masked in _SECRETS:
        text = pattern.sub(masked, text)
    return text
