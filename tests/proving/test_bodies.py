"""Bodies of the user's own: what could never be placed is named by its line before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reliamq.proving.bodies import copy_bodies
from reliamq.spi import ConfigurationError

WRONG = {
    "a body over the limit": (json.dumps({"text": "x" * 3_000_000}).encode(), "over the topic's limit"),
    "invalid UTF-8": (b'{"text": "\xff"}', "not valid UTF-8"),
    "broken JSON": (b"{broken", "not valid JSON"),
    "nesting without an end": (b"[" * 100_000, "not valid JSON"),
    "no object": (b"[1]", "must be a JSON object, not list"),
    "half a character": (b'{"text": "\\ud800"}', "can never be placed"),
    "half a character as its key": (b'{"key": "\\ud800"}', "can never be placed"),
    "a key that is too long": (json.dumps({"key": "k" * 201}).encode(), "201 characters"),
    "a NUL in its key": (b'{"key": "a\\u0000b"}', "NUL"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_line_that_could_never_be_placed_is_named(tmp_path: Path, what: str) -> None:
    line, said = WRONG[what]
    (tmp_path / "bodies").write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 3}\n')

    with pytest.raises(ConfigurationError, match="line 3: ") as caught:
        copy_bodies(tmp_path / "bodies", tmp_path / "copy", keys=10)

    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


def test_empty_lines_and_a_byte_order_mark_are_no_part_of_a_body(tmp_path: Path) -> None:
    (tmp_path / "bodies").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n \n{"a": 2}')

    assert copy_bodies(tmp_path / "bodies", tmp_path / "copy", keys=10) == 2
    assert (tmp_path / "copy").read_bytes() == b'{"a": 1}\n{"a": 2}\n'


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_a_body_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "bodies").write_text(content)

    with pytest.raises(ConfigurationError, match="holds no line"):
        copy_bodies(tmp_path / "bodies", tmp_path / "copy", keys=10)
