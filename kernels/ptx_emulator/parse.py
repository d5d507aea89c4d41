"""PTX text to instructions: operands, labels, guards and the source line of each.

Names declared within braces (inline assembly) are made unique; comments and debug sections are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Guard", "Instruction", "Operand", "ParseError", "Program", "parse"]

WIDTHS = {"pred": 0, "b8": 8, "b16": 16, "b32": 32, "b64": 64}


class ParseError(ValueError):
    """Text that is not the PTX of one kernel."""


class Operand(NamedTuple):
    """One operand.

    Attributes:
        kind: "register", "immediate", "address", "vector" or "name" (labels, symbols and special registers).
        text: as written; of a register its unique name.
        base: of an address, its register or name.
        offset: of an address, in bytes.
        items: of a vector.
        negated: whether "!" precedes a predicate.
    """

    kind: str
    text: str
    base: Operand | None = None
    offset: int = 0
    items: tuple[Operand, ...] = ()
    negated: bool = False


class Guard(NamedTuple):
    """The predicate `@%p` or `@!%p` of an instruction."""

    register: str
    negated: bool


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        number: position in the program.
        line: line of the PTX, from 1.
        parts: opcode and modifiers, split at dots; "::" stays.
        operands: in order.
        guard: its predicate, or None.
        source: "file:line" in the kernel's source, with the lines that inlined it; "" where unknown.
        text: as written, shortened.
    """

    number: int
    line: int
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Guard | None
    source: str
    text: str


class Program(NamedTuple):
    """One kernel.

    Attributes:
        name: of the kernel.
        threads: a CTA has.
        parameters: (name, type) in order.
        registers: bits of each register, by unique name; 0 for predicates.
        labels: index of the instruction that follows.
        instructions: in order.
        shared: names of the dynamic shared memory.
    """

    name: str
    threads: int
    parameters: tuple[tuple[str, str], ...]
    registers: dict[str, int]
    labels: dict[str, int]
    instructions: tuple[Instruction, ...]
    shared: tuple[str, ...]


def parse(ptx: str) -> Program:
    """Parse the only kernel of a PTX module.

    Raises:
        ParseError: no kernel or several, no number of threads, or text that is no PTX.
    """
    entries = re.findall(r"^\s*(?:\.visible\s+)?\.entry\s+([\w$]+)", ptx, re.MULTILINE)
    if len(entries) != 1:
        raise ParseError(f"expected PTX with one kernel (.entry), got {len(entries)}: {', '.join(entries) or 'none'}")
    start = ptx.index(".entry")
    body = ptx.index("{", start)
    head = _without_comments(ptx[start:body])
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*1\s*,\s*1)?\s*(?![\d,])", head)
    if threads is None:
        raise ParseError("expected .reqntid or .maxntid with the threads of a CTA along x alone, got neither")
    parameters = re.findall(r"\.param\s+\.(\w+)\s+[^,()]*?([\w$]+)\s*(?=[,)\n])", head)
    shared = re.findall(r"^\.extern\s+\.shared\s+[^;]*?([\w$]+)\s*\[\s*\]\s*;", ptx[:start], re.MULTILINE)
    reader = _Body(ptx, body, _files(ptx))
    return Program(
        entries[0],
        int(threads[1]),
        tuple((name, kind) for kind, name in parameters),
        reader.registers,
        reader.labels,
        tuple(reader.instructions),
        tuple(shared),
    )


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", text)


def _files(ptx: str) -> dict[int, str]:
    return {
        int(number): path.rpartition("/")[2]
        for number, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, re.MULTILINE)
    }


class _Body:
    """Reads a kernel's body, statement by statement."""

    def __init__(self, ptx: str, start: int, files: dict[int, str]) -> None:
        self.registers: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        self._files = files
        self._scopes: list[dict[str, tuple[str, int]]] = []
        self._families: dict[str, int] = {}
        self._scope_count = 0
        self._source = ""
        self._read(ptx, start)

    def _read(self, ptx: str, start: int) -> None:
        position, line = start, ptx.count("\n", 0, start) + 1
        skip = re.compile(r"\s+|//[^\n]*")
        location = re.compile(r"\.loc\b[^\n]*")
        label = re.compile(r"([\w$%]+):(?!:)")
        while True:
            if position >= len(ptx):
                raise ParseError("expected a closing brace at the end of the kernel, got the end of the text")
            if found := skip.match(ptx, position):
                pass
            elif found := location.match(ptx, position):
                self._source = self._located(found[0])
            elif found := label.match(ptx, position):
                self.labels[found[1]] = len(self.instructions)
            elif ptx[position] == "{":
                self._scope_count += 1
                self._scopes.append({})
                position += 1
                continue
            elif ptx[position] == "}":
                self._scopes.pop()
                position += 1
                if not self._scopes:
                    return
                continue
            else:
                end = ptx.find(";", position)
                if end < 0:
                    raise ParseError(f"line {line} of the PTX: expected ';' after {ptx[position : position + 60]!r}")
                text = _without_comments(ptx[position:end])
                self._statement(" ".join(text.split()), line)
                line += ptx.count("\n", position, end)
                position = end + 1
                continue
            line += ptx.count("\n", position, found.end())
            position = found.end()

    def _located(self, directive: str) -> str:
        """The source of a `.loc`, whose comment by LLVM lists the lines that inlined it."""
        number, line = (int(word) for word in directive.split()[1:3])
        if line == 0:
            return self._source
        _, marker, comment = directive.partition("//")
        chain = re.findall(r"([^\s:@\[\]]+):(\d+):\d+", comment) if marker else []
        chain = chain or [(self._files.get(number, f"file {number}"), str(line))]
        return ", called at ".join(f"{file}:{at}" for file, at in chain)

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._declare(text, line)
            return
        if text.startswith("."):
            if not text.startswith((".pragma", ".local", ".shared")):
                raise ParseError(f"line {line} of the PTX: unknown directive: {text[:80]!r}")
            return
        guard = None
        if text.startswith("@"):
            found = re.match(r"@(!?)\s*([%\w$]+)\s+", text)
            if found is None:
                raise ParseError(f"line {line} of the PTX: expected a predicate after '@', got {text[:80]!r}")
            guard = Guard(self._register(found[2]) or found[2], bool(found[1]))
            text = text[found.end() :]
        opcode, _, rest = text.partition(" ")
        parts = tuple(opcode.replace("::", "\0").split("."))
        parts = tuple(part.replace("\0", "::") for part in parts)
        operands = tuple(self._operand(word) for word in _split(rest))
        shown = text if len(text) <= 70 else text[:67] + "..."
        number = len(self.instructions)
        self.instructions.append(Instruction(number, line, parts, operands, guard, self._source, shown))

    def _declare(self, text: str, line: int) -> None:
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text)
        kind = found[1] if found else ""
        width = WIDTHS.get(kind, WIDTHS.get("b" + kind[1:]))
        if found is None or width is None:
            raise ParseError(f"line {line} of the PTX: expected registers of 1 to 64 bits, got {text[:80]!r}")
        for word in found[2].split(","):
            name = word.strip()
            family = re.match(r"([%\w$]+)<\d+>$", name)
            if family:
                self._families[family[1]] = width
                continue
            unique = name if len(self._scopes) == 1 else f"{name}#{self._scope_count}"
            self._scopes[-1][name] = (unique, width)
            self.registers[unique] = width

    def _register(self, name: str) -> str | None:
        """The unique name of a declared register, else None."""
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name][0]
        if name in self.registers:
            return name
        width = self._families.get(name.rstrip("0123456789"))
        if width is None:
            return None
        self.registers[name] = width
        return name

    def _operand(self, word: str) -> Operand:
        if word.startswith("{"):
            return Operand("vector", word, items=tuple(self._operand(item) for item in _split(word[1:-1])))
        if word.startswith("["):
            found = re.match(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]$", word)
            if found is None:
                raise ParseError(f"expected an address [register + offset], got {word!r}")
            return Operand("address", word, self._operand(found[1]), int(found[2] or "0", 0))
        if word.startswith("!"):
            return self._operand(word[1:].strip())._replace(negated=True)
        if "|" in word:
            return Operand("vector", word, items=tuple(self._operand(item.strip()) for item in word.split("|")))
        name = self._register(word)
        if name is not None:
            return Operand("register", name)
        return Operand("immediate" if re.match(r"[-+\d]", word) else "name", word)


def _split(text: str) -> Iterator[str]:
    """Words between commas outside of braces and brackets."""
    depth, word = 0, ""
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            yield word.strip()
            word = ""
        else:
            word += letter
    if word.strip():
        yield word.strip()
