"""A restricted reader of pickles: a small machine of its own that can only build dead values.

Two passes. The first walks the opcodes and executes nothing: sizes, counts and memo indices are
capped and every opcode must be in the list. The second keeps a stack of plain containers and the
inert stand-ins of ``stand_ins``; REDUCE, NEWOBJ and BUILD act on those alone. Python's own unpickler
is never used, neither is torch's. This file knows no zip files and no layouts.
"""

import struct
from collections.abc import Iterator
from typing import Any, NoReturn

from tprt.checkpoint.stand_ins import (
    CONVERT_HINT,
    Global,
    Inert,
    OrderedStandIn,
    StoredTensor,
    rebuild_tensor,
    resolve,
    shown,
    storage_of,
)
from tprt.errors import CheckpointError

MAX_PICKLE_BYTES = 64 << 20
MAX_OPCODES = 1_000_000
MAX_MEMO = 1_000_000
MAX_STRING_BYTES = 4 << 20
MAX_LONG_BYTES = 1024
MAX_KEY_INT = 1 << 60  # larger ints share hashes and could make a dict quadratic

# opcode: (name, form of its argument); forms starting with "#" are a length that bytes follow
_OPCODES: dict[int, tuple[str, str]] = {
    0x80: ("PROTO", "<B"), 0x95: ("FRAME", "<Q"), ord("."): ("STOP", ""),
    ord("("): ("MARK", ""), ord("0"): ("POP", ""), ord("1"): ("POP_MARK", ""),
    ord("N"): ("NONE", ""), 0x88: ("NEWTRUE", ""), 0x89: ("NEWFALSE", ""),
    ord("J"): ("INT", "<i"), ord("K"): ("INT", "<B"), ord("M"): ("INT", "<H"),
    0x8A: ("LONG", "#<B"), 0x8B: ("LONG", "#<i"), ord("G"): ("FLOAT", ">d"),
    ord("T"): ("BYTES", "#<i"), ord("U"): ("BYTES", "#<B"),
    ord("B"): ("BYTES", "#<I"), ord("C"): ("BYTES", "#<B"), 0x8E: ("BYTES", "#<Q"),
    0x96: ("BYTES", "#<Q"),
    ord("X"): ("TEXT", "#<I"), 0x8C: ("TEXT", "#<B"), 0x8D: ("TEXT", "#<Q"),
    ord("]"): ("EMPTY_LIST", ""), ord("}"): ("EMPTY_DICT", ""), ord(")"): ("EMPTY_TUPLE", ""),
    0x8F: ("EMPTY_SET", ""), ord("a"): ("APPEND", ""), ord("e"): ("APPENDS", ""),
    ord("l"): ("LIST", ""), ord("d"): ("DICT", ""), ord("s"): ("SETITEM", ""),
    ord("u"): ("SETITEMS", ""), ord("t"): ("TUPLE", ""), 0x85: ("TUPLE1", ""),
    0x86: ("TUPLE2", ""), 0x87: ("TUPLE3", ""), 0x90: ("ADDITEMS", ""), 0x91: ("FROZENSET", ""),
    ord("h"): ("GET", "<B"), ord("j"): ("GET", "<I"), ord("q"): ("PUT", "<B"),
    ord("r"): ("PUT", "<I"), 0x94: ("MEMOIZE", ""), ord("c"): ("GLOBAL", "lines"),
    0x93: ("STACK_GLOBAL", ""), ord("R"): ("REDUCE", ""), 0x81: ("NEWOBJ", ""),
    0x92: ("NEWOBJ_EX", ""), ord("b"): ("BUILD", ""), ord("Q"): ("BINPERSID", ""),
}  # fmt: skip
_REFUSED_OPCODES = {
    ord("i"): "INST", ord("o"): "OBJ", ord("P"): "PERSID", ord("2"): "DUP", ord("I"): "INT (text)",
    ord("L"): "LONG (text)", ord("F"): "FLOAT (text)", ord("S"): "STRING (text)",
    ord("V"): "UNICODE (text)", ord("g"): "GET (text)", ord("p"): "PUT (text)", 0x82: "EXT1",
    0x83: "EXT2", 0x84: "EXT4", 0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER",
}  # fmt: skip


def load_pickle(data: bytes, where: str) -> object:
    """The value of the pickle ``data``, made of plain containers, stand-ins and descriptors.

    Raises:
        CheckpointError: the pickle is too large, malformed, uses an opcode or asks for a name that
            is not in the allow-list. Nothing of it has run then.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"the pickle has {len(data)} bytes; the limit is {MAX_PICKLE_BYTES}",
            where=where,
            hint=CONVERT_HINT,
        )
    for name, argument, _ in _walk(data, where):
        if name == "GLOBAL":
            resolve(argument[0], argument[1], where)
    machine = _Machine(where)
    try:
        for name, argument, position in _walk(data, where):
            machine.position = position
            getattr(machine, f"op_{name.lower()}")(argument)
        return machine.result()
    except (IndexError, KeyError):
        machine.malformed("its stack or memo runs empty")


def _walk(data: bytes, where: str) -> Iterator[tuple[str, Any, int]]:
    """Decodes opcodes: (name, argument, position). Caps are applied here, nothing is executed."""
    position, count = 0, 0

    def fail(what: str) -> NoReturn:
        raise CheckpointError(
            f"{what} at byte {position} of the pickle", where=where, hint=CONVERT_HINT
        )

    while position < len(data):
        code, start = data[position], position
        if code not in _OPCODES:
            name = _REFUSED_OPCODES.get(code, f"0x{code:02x}")
            if name == "INST":  # carries the class it wants
                names = data[start + 1 : start + 400].split(b"\n")[:2]
                name += f" of '{'.'.join(shown(_text(n)) for n in names)}'"
            fail(f"opcode {name} is not allowed")
        count += 1
        if count > MAX_OPCODES:
            fail(f"more than {MAX_OPCODES} opcodes")
        name, form = _OPCODES[code]
        argument: Any = None
        position += 1
        if form == "lines":
            first = data.find(b"\n", position, position + 1024)
            second = data.find(b"\n", first + 1, first + 1024)
            if first < 0 or second < 0:
                fail("a global without an end")
            argument = (_text(data[position:first]), _text(data[first + 1 : second]))
            position = second + 1
        elif form:
            packed = form.removeprefix("#")
            size = struct.calcsize(packed)
            if position + size > len(data):
                fail("cut off")
            (argument,) = struct.unpack_from(packed, data, position)
            position += size
            if form[0] == "#":
                limit = MAX_LONG_BYTES if name == "LONG" else MAX_STRING_BYTES
                if not 0 <= argument <= limit:
                    fail(f"{name} of {argument} bytes; the limit is {limit}")
                if position + argument > len(data):
                    fail("cut off")
                raw = data[position : position + argument]
                position += argument
                argument = _text(raw) if name == "TEXT" else raw
        if name in ("PUT", "GET") and argument > MAX_MEMO:
            fail(f"memo index {argument}; the limit is {MAX_MEMO}")
        if name == "PROTO" and (start != 0 or argument > 5):
            fail(f"protocol {argument}")
        yield name, argument, start
        if name == "STOP":
            if position != len(data):
                fail("bytes after the end")
            return
    fail("no end")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="surrogateescape")


class _Machine:
    """Stack, marks and memo. Every ``op_*`` method builds plain values or calls ``refuse``."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.stopped = False

    def malformed(self, why: str) -> NoReturn:
        raise CheckpointError(
            f"the pickle is malformed at byte {self.position}: {why}",
            where=self.where,
            hint="the file again from its source",
        )

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"refused at byte {self.position} of the pickle: {what}",
            where=self.where,
            hint=CONVERT_HINT,
        )

    def result(self) -> object:
        if self.marks or len(self.stack) != 1:
            self.malformed(f"{len(self.stack)} values are left at its end")
        return self.stack[0]

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    # Constants

    def op_proto(self, _: int) -> None:
        pass

    op_frame = op_proto

    def op_stop(self, _: None) -> None:
        pass

    def op_none(self, _: None) -> None:
        self.stack.append(None)

    def op_newtrue(self, _: None) -> None:
        self.stack.append(True)

    def op_newfalse(self, _: None) -> None:
        self.stack.append(False)

    def push(self, value: object) -> None:
        self.stack.append(value)

    op_int = op_float = op_bytes = op_text = push

    def op_long(self, raw: bytes) -> None:
        self.stack.append(int.from_bytes(raw, "little", signed=True))

    # Containers

    def op_mark(self, _: None) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def op_pop(self, _: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def op_pop_mark(self, _: None) -> None:
        self.pop_mark()

    def op_empty_list(self, _: None) -> None:
        self.stack.append([])

    def op_empty_dict(self, _: None) -> None:
        self.stack.append({})

    def op_empty_tuple(self, _: None) -> None:
        self.stack.append(())

    def op_empty_set(self, _: None) -> None:
        self.stack.append(Inert("builtins.set"))

    def op_additems(self, _: None) -> None:
        self.pop_mark()  # contents of sets are never looked at
        if not isinstance(self.stack[-1], Inert):
            self.refuse("items added to what is not a set")

    def op_frozenset(self, _: None) -> None:
        self.pop_mark()
        self.stack.append(Inert("builtins.frozenset"))

    def op_list(self, _: None) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def op_tuple(self, _: None) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def op_tuple1(self, _: None) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def op_tuple2(self, _: None) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def op_tuple3(self, _: None) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def op_dict(self, _: None) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)

    def op_append(self, _: None) -> None:
        value = self.stack.pop()
        self.extend([value])

    def op_appends(self, _: None) -> None:
        self.extend(self.pop_mark())

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            self.refuse("items appended to what is not a list")
        self.stack[-1].extend(items)

    def op_setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def op_setitems(self, _: None) -> None:
        self.set_items(self.pop_mark())

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            self.refuse("items set on what is not a dict")
        if len(items) % 2:
            self.malformed("a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.checked_key(key)] = value

    def checked_key(self, key: object) -> object:
        # Hashing a stranger's value may recurse or collide: plain short keys only.
        parts = key if isinstance(key, tuple) and len(key) <= 8 else (key,)
        for part in parts:
            small = isinstance(part, int) and abs(part) < MAX_KEY_INT
            if not (small or part is None or isinstance(part, (str, bytes))):
                self.refuse(f"a dict key of type {type(part).__name__}")
        return key

    # Memo

    def op_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def op_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def op_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    # Names and objects

    def op_global(self, names: tuple[str, str]) -> None:
        self.stack.append(resolve(*names, self.where))

    def op_stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            self.refuse("a global whose name is not text")
        self.stack.append(resolve(module, name, self.where))

    def op_binpersid(self, _: None) -> None:
        self.stack.append(storage_of(self.stack.pop(), self.where))

    def op_reduce(self, _: None) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self.make(function, args, "call"))

    def op_newobj(self, _: None) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.stack.append(self.make(cls, args, "instance"))

    def op_newobj_ex(self, _: None) -> None:
        _keywords, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(self.make(cls, args, "instance"))

    def make(self, function: object, args: object, what: str) -> object:
        if not isinstance(function, Global):
            self.refuse(f"a {what} of a {type(function).__name__}")
        if not isinstance(args, tuple):
            self.refuse(f"a {what} of '{function.full_name}' without a tuple of arguments")
        if function.kind == "object":
            return Inert(function.full_name, args)
        if function.kind == "ordered_dict" and len(args) <= 1:
            return self.ordered_dict(args[0] if args else [])
        if what == "call" and function.kind == "tensor":
            return rebuild_tensor(args, self.where)
        if what == "call" and function.kind == "parameter":
            if args and isinstance(args[0], StoredTensor):
                return args[0]
            self.refuse("a parameter that is no tensor")
        if function.kind == "size" and len(args) == 1 and isinstance(args[0], tuple):
            return args[0]
        self.refuse(f"a {what} of '{function.full_name}' with {len(args)} arguments")

    def ordered_dict(self, pairs: object) -> OrderedStandIn:
        made = OrderedStandIn()
        if not isinstance(pairs, list):
            self.refuse("an OrderedDict made from what is not a list of pairs")
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2:
                self.refuse("an OrderedDict made from what is not a list of pairs")
            made[self.checked_key(pair[0])] = pair[1]
        return made

    def op_build(self, _: None) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, OrderedStandIn) and isinstance(state, dict):
            return  # attributes such as a state dict's _metadata
        if not isinstance(target, Inert):
            kind = target.full_name if isinstance(target, Global) else type(target).__name__
            self.refuse(f"state built into '{kind}'")
        if target.type_name.startswith("numpy."):
            return  # an array's content is never made
        if not isinstance(state, dict):
            self.refuse(f"state of '{target.type_name}' that is not a dict")
        target.state.update(state)
