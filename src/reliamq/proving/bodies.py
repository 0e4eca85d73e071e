"""The user's own bodies: read once, each checked by all that could keep an order from being placed, and kept.

The processes read the copy, so a pipe will do, and nobody can change the file under them.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from reliamq.proving.scenario import MAX_ACCOUNT_CHARACTERS, Order, account_of, order_topic
from reliamq.spi import ConfigurationError, DeliveryError, PublishError

__all__ = ["copy_bodies"]

STDIN = Path("-")
A_LARGE_NUMBER = 9_999_999  # of an order, as far as its size goes


def copy_bodies(source: Path, copy: Path, *, keys: int) -> int:
    """Copy the lines that are not empty; how many.  Raises ConfigurationError naming the first line that is wrong."""
    count = 0
    try:
        with _open(source) as lines, copy.open("wb") as out:
            for number, line in _lines(lines):
                try:
                    _check(count, line, keys)
                except ValueError as error:
                    raise ConfigurationError(f"--input {source}, line {number}: {error}") from error
                out.write(line.rstrip(b"\r\n") + b"\n")
                count += 1
    except OSError as error:
        raise ConfigurationError(f"--input {source}: cannot be read: {error.strerror or error}") from error
    if not count:
        raise ConfigurationError(f"--input {source}: holds no line")
    return count


def _open(source: Path) -> AbstractContextManager[BinaryIO]:
    return nullcontext(sys.stdin.buffer) if source == STDIN else source.open("rb")


def _lines(lines: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if text.strip():
            yield number, text


def _check(order: int, line: bytes, keys: int) -> None:
    """Make the order and its message and read it again.  Raises ValueError."""
    body = _body(line)
    account = account_of(order, body, keys)
    if len(account) > MAX_ACCOUNT_CHARACTERS:
        raise ValueError(f"its key has {len(account)} characters, at most {MAX_ACCOUNT_CHARACTERS} can be stored")
    if "\0" in account:
        raise ValueError("its key holds a NUL character, which a database does not store")
    topic = order_topic("prove")
    try:
        topic.decode(topic.message(Order(order=order, account=account, amount=1, number=A_LARGE_NUMBER, body=body)))
    except (PublishError, DeliveryError) as error:
        raise ValueError(f"can never be placed: {error.detail}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"can never be placed: {error}") from error


def _body(line: bytes) -> dict[str, Any]:
    try:
        body = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8: {error.reason} at byte {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"must be a JSON object, not {type(body).__name__}")
    return body
