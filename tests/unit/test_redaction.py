from __future__ import annotations

import base64
import html
import json
import time
from urllib.parse import quote, quote_plus

import pytest

from asyncpool_creds.providers._redaction import redact

SECRET = "p&'\"w<ö/ +1=Correct.Horse_Battery-Staple%x"
BYTES = SECRET.encode()

QUOTED = {
    "as it is": SECRET,
    "in capitals": SECRET.upper(),
    "percent": quote(SECRET, safe=""),
    "percent in small letters": quote(SECRET, safe="").lower(),
    "form": quote_plus(SECRET),
    "every character percent": "".join(f"%{byte:02X}" for byte in BYTES),
    "percent twice": quote(quote(SECRET, safe=""), safe=""),
    "HTML": html.escape(SECRET),
    "HTML in decimal": "".join(f"&#{ord(character)};" for character in SECRET),
    "HTML of percent": html.escape(quote(SECRET)),
    "JSON": json.dumps(SECRET),
    "JSON in UTF-8": json.dumps(SECRET, ensure_ascii=False),
    "every character in JSON": "".join(f"\\u{ord(character):04x}" for character in SECRET),
    "repr": repr(SECRET),
    "base64": base64.b64encode(BYTES).decode(),
    "base64 for URLs": base64.urlsafe_b64encode(BYTES).decode(),
    **{
        f"Basic header of {user}": base64.b64encode(f"{user}:{quoted}".encode()).decode()
        for user in ("a", "ap", "app")
        for quoted in (SECRET, quote_plus(SECRET))
    },
    "hex": BYTES.hex(),
    "the first characters": SECRET[:18],
    "the last characters": SECRET[-18:],
    "some in the middle": SECRET[9:29],
}


@pytest.mark.parametrize("quoted", QUOTED.values(), ids=QUOTED)
def test_a_secret_is_taken_out_in_whatever_form_it_is_quoted(quoted):
    said = redact(f"bad credential ({quoted}) for app", [SECRET], longest=1000)

    assert "[redacted]" in said
    for piece in (SECRET[start : start + 6] for start in range(len(SECRET) - 5)):
        assert piece.lower() not in said.lower()
    assert base64.b64encode(BYTES).decode()[4:-4] not in said
    assert BYTES.hex()[:12] not in said


def test_what_is_no_secret_stays():
    text = "AADSTS50034: the user 'ann' does not exist in tenant 7f; see https://example.com/help?code=50034&lang=en"

    assert redact(text, [SECRET, "other"], longest=1000) == text


def test_a_json_web_token_is_taken_out_whoever_it_belongs_to():
    assert redact("got eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0.c2ln, sorry", [], longest=100) == "got [redacted], sorry"


def test_words_are_taken_out_as_they_are():
    assert redact("the pin 4711 is wrong", [], words=["4711"], longest=100) == "the pin [redacted] is wrong"


def test_what_is_said_is_one_line_of_what_can_be_printed():
    assert redact("one\r\n\ttwo\x1b[31m\0\u202ethree", [], longest=100) == "one two [31m three"


def test_a_long_text_is_cut_at_either_end():
    assert redact("abcdef" * 100, [], longest=6) == "abcdef..."
    assert redact("abcdef" * 100, [], longest=6, is_end_shown=True) == "...abcdef"


@pytest.mark.parametrize("is_end_shown", [False, True])
def test_no_piece_of_a_secret_is_left_where_a_very_long_text_is_cut(is_end_shown):
    # All but the secret is taken out before, so that what stands at the cut is shown.
    token = "eyJ" + "x" * 50 + ".y.z "
    for shift in range(len(SECRET) + 1):
        text = token * 30 + " " * shift + SECRET + " " * (len(SECRET) - shift) + token * 30
        said = redact(text[: 1024 + shift], [SECRET], longest=2000, is_end_shown=is_end_shown)

        assert SECRET[:8] not in said
        assert SECRET[-8:] not in said


def test_the_longest_secret_and_text_take_no_noticeable_time():
    secrets = [f"{number}" + "abcdefgh" * 8000 for number in range(2)]
    started = time.process_time()

    redact("abcdefgh" * 100_000, secrets, longest=300)

    assert time.process_time() - started < 1.0
