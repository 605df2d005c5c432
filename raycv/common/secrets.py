"""Masks passwords and tokens in whatever is printed, logged or written."""

import re

_SECRETS = (
    # user:password@ and token@ of a URL, up to the last @ before a slash: passwords may hold one
    # (a path made of an address has one slash less)
    (re.compile(r"(:/{1,2})[^/\s]*@"), r"\1***@"),
    # the same with an unescaped slash in the password, which database drivers accept
    (re.compile(r"(:/{1,2})[^/\s:@]+:[^\s@]*@"), r"\1***@"),
    # and with an unescaped space, which HTTP clients send
    (re.compile(r"(:/{1,2})[^/\s:@]*:[^/\n@]*@"), r"\1***@"),
    (re.compile(r"(?i)(authorization\W+\w+\s+|\bbearer\s+)[\w.~+/=-]{4,}"), r"\1***"),
    # a hub token has 34 letters; a folder may well be called hf_something
    (re.compile(r"(?<![\w/])hf_[A-Za-z0-9]{30,}"), "hf_***"),
    # query strings and key=value connection strings
    (
        re.compile(
            r"(?i)((?:token|passw(?:or)?d|pwd|secret|signature|credential|api.?key|access.?key)[\w-]*=)[^&;\s'\"]+"
        ),
        r"\1***",
    ),
)


def mask_secrets(text: str) -> str:
    """`text` with `***` for passwords in URLs, tokens, and signatures in query strings."""
    for pattern, masked in _SECRETS:
        text = pattern.sub(masked, text)
    return text
