"""Secrets are taken out of what somebody else says, in the forms in which servers and programs quote what they got."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import quote, quote_plus, unquote

__all__ = ["redact"]

_REDACTED: Final = "[redacted]"
# Stands for it until the end, so that no secret is looked for in the word itself.
_HOLE: Final = "\0"
_JWT: Final = re.compile(r"eyJ[\w-]+\.[\w-]*\.?[\w-]*")
_UNICODE_ESCAPE: Final = re.compile(r"\\u([0-9a-fA-F]{4})")
# So many characters in a row are not the same by accident: a server may quote the beginning of what it got, or its end.
_PIECE: Final = 16
# In a secret longer than that, pieces are looked for that are twice as long: it takes a sixteenth of the time.
_LONG: Final = 1024
# In characters: as much of what somebody says is looked at; callers show less.
_LONGEST_LOOK: Final = 1024
# Escapes of escapes, as proxies and log collectors make them.
_DEEPEST: Final = 3
# A shorter form in the middle of base64 is there by accident.
_SHORTEST_MIDDLE: Final = 6


def redact(
    text: str, secrets: Iterable[str], *, longest: int, words: Iterable[str] = (), is_end_shown: bool = False
) -> str:
    """Return `text` on one line without any of `secrets`, and no longer than `longest` characters.

    A secret is found as it is; with percent, HTML or JSON escapes; in base64 (a Basic header), or as hex digits; in
    letters of either case; and where only a piece of it is quoted, so long that it is no accident. What looks like a
    JSON Web Token is taken out as well. Where a secret shows in another form still, nothing of `text` is left.

    Args:
        text: What somebody says.
        secrets: What nobody is to read.
        longest: In characters; what is longer is cut.
        words: More of that, which is only quoted as it is.
        is_end_shown: Cut the beginning of a long text, and not its end.
    """
    secrets = [secret for secret in secrets if secret]
    is_cut = len(text) > _LONGEST_LOOK
    text = (text[-_LONGEST_LOOK:] if is_end_shown else text[:_LONGEST_LOOK]).replace(_HOLE, " ")
    forms = {_lower(form) for secret in secrets for form in _forms(secret)}
    lower = _lower(text)
    whole = [span for form in forms.union(map(_lower, words)) for span in _places_of(form, lower)]
    pieces = [span for form in forms for span in _places_of_pieces(form, lower)]
    for plain in _unescaped(_without(text, whole)):
        if any(_places_of_pieces(_lower(secret), _lower(plain)) for secret in secrets):
            return _REDACTED
    text = _JWT.sub(_HOLE, _without(text, whole + pieces))
    if is_cut:
        # What is left at the cut may be a piece of a secret that is too short to be known for one.
        text = text[_PIECE:] if is_end_shown else text[:-_PIECE]
    text = "".join(one if one.isprintable() or one == _HOLE else " " for one in text)
    text = " ".join(text.replace(_HOLE, _REDACTED).split())
    if len(text) <= longest:
        return text
    return f"...{text[-longest:]}" if is_end_shown else f"{text[:longest]}..."


def _forms(secret: str) -> Iterator[str]:
    """Yield `secret` as it may be quoted, in letters of any case."""
    data = secret.encode(errors="surrogatepass")
    yield secret
    yield quote(data, safe="")
    yield quote_plus(data)
    yield html.escape(secret)  # with &#x27; for an apostrophe; others write it in decimal
    yield html.escape(secret).replace("&#x27;", "&#39;")
    yield html.escape(secret, quote=False)
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield repr(secret)[1:-1]
    yield data.hex()
    for plain in (data, quote_plus(data).encode()):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(plain).decode().rstrip("=")
            # Behind something else, as in a Basic header; the outer characters have bits of the neighbours.
            for offset in range(3):
                middle = encode(bytes(offset) + plain).decode()[-(-offset * 8 // 6) : (offset + len(plain)) * 8 // 6]
                if len(middle) >= _SHORTEST_MIDDLE:
                    yield middle


def _lower(text: str) -> str:
    """Return `text` in lower case, each character in its place."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(small if len(small := one.lower()) == 1 else one for one in text)


def _unescaped(text: str) -> Iterator[str]:
    """Yield what `text` says to those who undo its escapes."""
    for _ in range(_DEEPEST):
        plain = _UNICODE_ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), html.unescape(unquote(text)))
        if plain == text:
            return
        text = plain
        yield text
        yield text.replace("+", " ")


def _places_of(form: str, text: str) -> list[tuple[int, int]]:
    """Return where in `text` all of `form` is; both are in lower case."""
    found: list[tuple[int, int]] = []
    at = text.find(form)
    while at >= 0:
        found.append((at, at + len(form)))
        at = text.find(form, at + len(form))
    return found


def _places_of_pieces(form: str, text: str) -> list[tuple[int, int]]:
    """Return where in `text` a longer piece of `form` is; both are in lower case."""
    size = min(len(form), _PIECE)
    step = 1 if len(form) <= _LONG else _PIECE
    pieces = {form[place : place + size]: place for place in range(0, len(form) - size + 1, step)}
    found: list[tuple[int, int]] = []
    at = 0
    while at <= len(text) - size:
        place = pieces.get(text[at : at + size])
        if place is None:
            at += 1
            continue
        start, end, before, after = at, at + size, place, place + size
        while start > 0 and before > 0 and text[start - 1] == form[before - 1]:
            start, before = start - 1, before - 1
        while end < len(text) and after < len(form) and text[end] == form[after]:
            end, after = end + 1, after + 1
        found.append((start, end))
        at = end
    return found


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    """Return `text` with holes in the place of `spans`, which may overlap."""
    kept: list[str] = []
    done = 0
    for start, end in sorted(spans):
        if start >= done:
            kept += (text[done:start], _HOLE)
        done = max(done, end)
    return "".join((*kept, text[done:]))
