"""Every numbered promise has code and a test, and the index in the docs says where.

``make promises`` writes the index anew; these tests fail when it names what is gone or a promise has lost its test.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
INDEX = ROOT / "docs" / "promises.md"
KIT = ROOT / "src" / "reliamq" / "testing"
NUMBERS = re.compile(r"\b([PSCOI])(\d{1,2})(?:\s*[–-]\s*(?:[PSCOI])?(\d{1,2}))?\b")  # C1, O2–O5

PROMISES = {
    "P1": "A confirmation means: stored to the durability that the topic declares.",
    "P2": "Each message of a batch has its own outcome, in order: confirmation, rejection, in doubt.",
    "P3": "A message that no group would receive is rejected as unroutable.",
    "P4": "Every message has an id, a type, a time and a source; a retry carries the same id.",
    "P5": "Messages of one key, published one after another, are stored in that order.",
    "P6": "What is in flight is bounded; a message over the limit is rejected before it is sent.",
    "P7": "Closing waits for outstanding confirms and reports what stayed unconfirmed.",
    "S1": "`declare` is idempotent, creates what is missing, never weakens and never deletes.",
    "S2": "`audit` reads the live values: found, required, why, how to fix.",
    "S3": "An application does not start on a broker that falls short of the required durability.",
    "C1": "Nothing is acknowledged before its handler finished and what it did is durable.",
    "C2": "What was delivered and not acknowledged is delivered again.",
    "C3": "Messages of one key are handled one after another in order; other keys are not held up.",
    "C4": "Attempts are counted across crashes; a message that kills its process ends as a dead letter.",
    "C5": "A dead letter is confirmed before the original is acknowledged, and keeps all of it.",
    "C6": "Retrying later is durable and blocks nobody else; a key keeps its order or gives way.",
    "C7": "A slow handler keeps its message, up to its own timeout.",
    "C8": "Stopping finishes, acknowledges, and releases the rest at once, without an attempt.",
    "C9": "A declared group gets every message published after its declaration; a new one starts at the earliest.",
    "C10": "Deliveries held in memory are bounded, in messages and bytes.",
    "C11": "What cannot be decoded is dead-lettered at once with its bytes.",
    "C12": "Acknowledging is idempotent; a late one changes nothing for the new owner.",
    "O1": "The row commits or rolls back with the business change.",
    "O2": "A row leaves the table only after its confirm.",
    "O3": "Order per key holds with any number of relays; they share the work and replace a dead one.",
    "O4": "A crash at any point sends the same message again with the same id.",
    "O5": "A rejected row is parked after its attempts; an outage burns none.",
    "O7": "Sent rows can be kept for a window; replaying it brings every effect to exactly one.",
    "O8": "Time is the database's.",
    "I1": "One id takes effect once for each group and handler.",
    "I2": "The processed id is written in the handler's own transaction.",
    "I3": "Effects outside a database: leases, fencing tokens, kept results.",
    "I4": "A version conflict is retried at once; a lock hands out a fencing token.",
    "I5": "Ids are kept for a stated window; one too short is refused.",
}
LATER = {
    "O6": "Throughput and memory do not depend on the backlog: a later version.",
}


def numbers_in(text: str) -> Iterator[str]:
    """All promises that a text names, ranges spelt out."""
    for letter, first, last in NUMBERS.findall(text):
        for number in range(int(first), int(last or first) + 1):
            yield f"{letter}{number}"


def code_by_promise() -> dict[str, list[str]]:
    """By promise, the files of the package that name it, tests aside."""
    named = defaultdict[str, list[str]](list)
    for path in sorted((ROOT / "src").rglob("*.py")):
        if KIT not in path.parents:
            for promise in set(numbers_in(path.read_text("utf-8"))):
                named[promise].append(str(path.relative_to(ROOT)))
    return named


def checks_by_promise() -> dict[str, list[str]]:
    """By promise, the tests that name it: a function by its docstring or marker, a module by its docstring."""
    named = defaultdict[str, list[str]](list)
    for path in sorted([*(ROOT / "tests").rglob("test_*.py"), *(KIT / "conformance").glob("*.py")]):
        if path != Path(__file__):
            for promise, places in _tests_in(path).items():
                named[promise] += places
    return named


def _tests_in(path: Path) -> dict[str, list[str]]:
    tree = ast.parse(path.read_text("utf-8"))
    where = str(path.relative_to(ROOT))
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    named = defaultdict[str, list[str]](list)
    for node in functions:
        for promise in set(numbers_in(_says(node))):
            named[promise].append(f"{where} · {node.name}")
    whole = {promise: [where] for promise in numbers_in(ast.get_docstring(tree) or "")} if functions else {}
    return {**whole, **named}


def _says(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return " ".join([ast.get_docstring(node) or "", *map(ast.unparse, node.decorator_list)])


def render() -> str:
    """The index."""
    lines = ["# Promises", "", "Written by `make promises`; a test keeps it true.", ""]
    written_in, checked_by = code_by_promise(), checks_by_promise()
    for number, text in PROMISES.items():
        lines += [f"## {number}", "", text, "", "Code:", ""]
        lines += [f"- `{place}`" for place in written_in[number]]
        lines += ["", "Tests:", ""]
        lines += [f"- `{place}`" for place in checked_by[number]]
        lines.append("")
    lines += ["## Not yet", "", *[f"- {number}: {text}" for number, text in LATER.items()], ""]
    return "\n".join(lines)


def test_every_promise_has_code_and_a_test() -> None:
    written_in, checked_by = code_by_promise(), checks_by_promise()

    assert [number for number in PROMISES if not written_in[number] or not checked_by[number]] == []


def test_the_index_has_every_promise_and_names_only_files_that_exist() -> None:
    index = INDEX.read_text("utf-8")
    files = {line[3:].split("`")[0].split(" · ")[0] for line in index.splitlines() if line.startswith("- `")}

    assert re.findall(r"^## (\w+)$", index, re.MULTILINE) == list(PROMISES)
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []


if __name__ == "__main__":
    INDEX.write_text(render(), encoding="utf-8")
    sys.stdout.write(f"{INDEX.relative_to(ROOT)}\n")
