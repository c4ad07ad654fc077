"""Hostile files by the dozen: every way into code execution or memory that we know of.

Each case is (name, bytes of a .pt file, what the refusal must say). Pickles are assembled by hand, so
that writing them runs nothing; CANARY stands for the path a successful attack would create.
"""

import io
import pickle
import struct
import tarfile
import zipfile


def text(s):
    raw = s.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def glob(module, name):
    return f"c{module}\n{name}\n".encode()


def stack_glob(module, name):
    return text(module) + text(name) + b"\x93"


def call(function, *args):
    return function + b"(" + b"".join(args) + b"tR"


def pkl(body, proto=2):
    return bytes([0x80, proto]) + body + b"."


def entry(key, value):
    """A dict with one entry."""
    return b"}" + text(key) + value + b"s"


def zipped(data, members=(), top="archive", compress=zipfile.ZIP_STORED, name="data.pkl"):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as z:
        z.writestr(f"{top}/{name}", data)
        z.writestr(f"{top}/byteorder", "little")
        z.writestr(f"{top}/version", "3\n")
        for member, content in members:
            z.writestr(member, content)
    return out.getvalue()


FLOATS = glob("torch", "FloatStorage")


def storage(kind=FLOATS, key=None, location=None, numel=b"K\x04", tag=None):
    return (
        b"(" + (tag or text("storage")) + kind + (key or text("0")) + (location or text("cpu"))
        + numel + b"tQ"
    )  # fmt: skip


def ints(*values):
    return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"


def tensor(store=None, offset=b"K\x00", shape=None, stride=None, tail=b""):
    return call(
        glob("torch._utils", "_rebuild_tensor_v2"), store or storage(), offset, shape or ints(4),
        stride or ints(1), b"\x89", call(glob("collections", "OrderedDict")), tail,
    )  # fmt: skip


def cases(canary):
    system = call(glob("posix", "system"), text(f"touch {canary}"))
    touch = text(f"open({str(canary)!r}, 'w')")
    namespace = glob("argparse", "Namespace") + b")\x81"

    # 1. Calls of foreign functions, in the places where a checkpoint has objects
    yield "system at the top", zipped(pkl(system)), "posix.system"
    yield (
        "system in args",
        zipped(pkl(entry("args", namespace + entry("x", system) + b"b"))),
        "posix.system",
    )
    yield (
        "system in rng_state",
        zipped(pkl(entry("rng_state", b"]" + system + b"a"))),
        "posix.system",
    )
    yield (
        "system in optimizer",
        zipped(pkl(entry("optimizer", entry("state", system)))),
        "posix.system",
    )
    yield "system as storage key", zipped(pkl(tensor(storage(key=system)))), "posix.system"
    yield "system as storage type", zipped(pkl(tensor(storage(kind=system)))), "posix.system"
    yield "system as location", zipped(pkl(tensor(storage(location=system)))), "posix.system"
    yield "system as dict key", zipped(pkl(b"}" + system + b"Ns")), "posix.system"
    yield "system popped away", zipped(pkl(system + b"0N")), "posix.system"
    yield "never called", zipped(pkl(glob("os", "system"))), "os.system"
    functions = [
        ("builtins", "eval"), ("builtins", "exec"), ("builtins", "compile"), ("builtins", "open"),
        ("builtins", "getattr"), ("builtins", "__import__"), ("builtins", "globals"),
        ("__builtin__", "eval"), ("__builtin__", "apply"), ("builtins", "map"),
        ("builtins", "print"), ("builtins", "type"), ("os", "system"), ("nt", "system"),
        ("subprocess", "Popen"), ("subprocess", "check_output"), ("runpy", "run_path"),
        ("importlib", "import_module"), ("pickle", "loads"), ("marshal", "loads"),
        ("types", "FunctionType"), ("types", "CodeType"), ("functools", "partial"),
        ("operator", "attrgetter"), ("operator", "methodcaller"), ("shutil", "rmtree"),
        ("webbrowser", "open"), ("ctypes", "CDLL"), ("socket", "socket"), ("code", "interact"),
        ("bdb", "Bdb"), ("pdb", "run"), ("timeit", "timeit"), ("cProfile", "run"),
        ("torch", "load"), ("torch.serialization", "load"), ("torch.storage", "_load_from_bytes"),
        ("torch.hub", "load"), ("torch.jit", "load"), ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._utils", "_rebuild_wrapper_subclass"), ("torch._tensor", "_rebuild_from_type_v2"),
        ("torch.utils.data.datapipes.utils.decoder", "basichandlers"),
        ("torch._dynamo.guards.GuardBuilder", "get"), ("torch._inductor.codecache", "compile_file"),
        ("numpy", "load"), ("numpy.testing._private.utils", "runstring"),
        ("numpy.f2py.crackfortran", "getlincoef"), ("numpy", "fromfile"), ("copyreg", "__newobj__"),
        ("copyreg", "_reconstructor"), ("_io", "BytesIO"), ("_io", "FileIO"), ("io", "open"),
        ("codecs", "open"), ("logging.config", "dictConfig"), ("argparse", "FileType"),
        ("collections", "namedtuple"), ("types", "SimpleNamespace.__init__"), ("sys", "exit"),
        ("megatronx", "run"), ("xmegatron.model", "run"), ("", "system"), ("torch", "os.system"),
    ]  # fmt: skip
    for module, name in functions:
        full = f"{module}.{name}"
        yield f"reduce {full}", zipped(pkl(call(glob(module, name), touch))), full
    for module, name in (("torch", "storage._load_from_bytes"), ("os", "system"), ("megatron", "")):
        if module == "megatron":
            continue
        body = call(stack_glob(module, name), touch)
        yield f"stack global {module}.{name}", zipped(pkl(body, 4)), f"{module}.{name}"
    yield "memoized name", zipped(pkl(
        text("os") + b"\x940" + text("system") + b"\x940h\x00h\x01\x93" + touch + b"\x85R", 4
    )), "os.system"  # fmt: skip

    # 2. Other opcodes that make objects
    yield "INST", zipped(pkl(b"(" + touch + b"ios\nsystem\n")), "INST of 'os.system'"
    yield "OBJ", zipped(pkl(b"(" + glob("argparse", "Namespace") + touch + b"o")), "OBJ"
    for code, raw in (
        ("EXT1", b"\x82\x01"),
        ("EXT2", b"\x83\x01\x00"),
        ("EXT4", b"\x84\x01\0\0\0"),
    ):
        yield code, zipped(pkl(raw)), code
    yield "PERSID", zipped(pkl(b"P../../etc/passwd\n")), "PERSID"
    yield "NEXT_BUFFER", zipped(pkl(b"\x97", 5)), "NEXT_BUFFER"
    yield "unknown opcode", zipped(pkl(b"\xff")), "0xff"
    yield "persistent id of text", zipped(pkl(text("x") + b"Q")), "persistent id"
    yield "persistent id with a path", zipped(pkl(storage(key=text("../../x")))), "persistent id"
    yield "persistent id of another kind", zipped(pkl(storage(tag=text("module")))), "persistent id"
    yield (
        "persistent id without a count",
        zipped(pkl(storage(numel=b"J\xff\xff\xff\xff"))),
        "persistent id",
    )
    stub = glob("megatron.model.enums", "ModelType")
    yield "newobj of a value", zipped(pkl(text("os.system") + b")\x81")), "instance of a str"
    yield (
        "newobj of a function",
        zipped(pkl(glob("torch._utils", "_rebuild_tensor_v2") + b")\x81")),
        "_rebuild_tensor_v2",
    )
    yield "reduce of an instance", zipped(pkl(call(namespace, touch))), "call of a Inert"
    yield "reduce of a dtype", zipped(pkl(call(glob("torch", "float32"), touch))), "torch.float32"
    yield "reduce without a tuple", zipped(pkl(stub + b"NR")), "without a tuple"
    # 3. State and items built into what must not change
    yield (
        "build into a class",
        zipped(pkl(stub + entry("__call__", touch) + b"b")),
        "megatron.model.enums.ModelType",
    )
    yield "build into a list", zipped(pkl(b"]" + entry("a", b"N") + b"b")), "built into 'list'"
    yield "build into a dict", zipped(pkl(b"}" + entry("a", b"N") + b"b")), "built into 'dict'"
    yield (
        "build into a tensor",
        zipped(pkl(tensor() + entry("__class__", b"N") + b"b"), [("archive/data/0", bytes(16))]),
        "StoredTensor",
    )
    yield "build a tuple", zipped(pkl(namespace + b"N" + entry("x", b"N") + b"\x86b")), "not a dict"
    yield "setitem on an instance", zipped(pkl(namespace + b"NNs")), "not a dict"
    yield (
        "setitem on a tensor",
        zipped(pkl(tensor() + b"K\x00K\x00s"), [("archive/data/0", bytes(16))]),
        "not a dict",
    )
    yield "append to an instance", zipped(pkl(namespace + b"Na")), "not a list"
    yield "unhashable key", zipped(pkl(b"}]Ns")), "dict key"
    yield "deep key", zipped(pkl(b"}N" + b"\x85" * 100_000 + b"Ns")), "dict key"

    # 4. Tensors that are not what they say
    data = [("archive/data/0", bytes(16))]
    yield "past its storage", zipped(pkl(tensor(shape=ints(5))), data), "past its storage"
    yield "offset past its storage", zipped(pkl(tensor(offset=b"K\x01")), data), "past its storage"
    yield "negative offset", zipped(pkl(tensor(offset=b"J\xff\xff\xff\xff")), data), "malformed"
    yield "negative stride", zipped(pkl(tensor(stride=ints(-1))), data), "malformed"
    yield (
        "expanded a billion times",
        zipped(pkl(tensor(shape=ints(2**30), stride=ints(0))), data),
        "not dense",
    )
    yield "overlapping", zipped(pkl(tensor(shape=ints(3, 2), stride=ints(1, 1))), data), "not dense"
    yield "hooks", zipped(pkl(tensor(tail=entry("conj", b"\x88"))), data), "hooks or metadata"
    yield (
        "complex storage",
        zipped(pkl(tensor(storage(glob("torch", "ComplexFloatStorage")))), data),
        "ComplexFloatStorage",
    )
    yield (
        "parameter of no tensor",
        zipped(pkl(call(glob("torch._utils", "_rebuild_parameter"), stub))),
        "no tensor",
    )

    # 5. Bombs and damage
    yield "memo bomb", zipped(pkl(b"Nr\xff\xff\xff\x7f")), "memo index"
    yield "memo bomb, get", zipped(pkl(b"j\xff\xff\xff\x7f")), "memo index"
    yield "string bomb", zipped(pkl(b"\x8d" + struct.pack("<Q", 1 << 60), 4)), "limit"
    yield "bytearray bomb", zipped(pkl(b"\x96" + struct.pack("<Q", 1 << 60), 5)), "limit"
    yield "negative length", zipped(pkl(b"T\xff\xff\xff\xff")), "limit"
    yield "long bomb", zipped(pkl(b"\x8b" + struct.pack("<i", 1 << 20) + bytes(1 << 20))), "limit"
    yield "opcode bomb", zipped(pkl(b"N0" * 600_000 + b"N")), "opcodes"
    yield "stack empty", zipped(pkl(b"R")), "runs empty"
    yield "memo empty", zipped(pkl(b"h\x05")), "runs empty"
    yield "no end", zipped(b"\x80\x02N"), "no end"
    yield "two values", zipped(pkl(b"NN")), "2 values"
    yield "bytes after the end", zipped(pkl(b"N") + system), "after the end"
    yield (
        "nested pickle",
        zipped(
            pkl(call(glob("pickle", "loads"), b"B" + struct.pack("<I", 4) + pickle.dumps(1)[:4]))
        ),
        "pickle.loads",
    )

    # 6. Zip tricks
    good = pkl(b"}")
    yield "compressed", zipped(good, compress=zipfile.ZIP_DEFLATED), "compressed"
    yield "path traversal", zipped(good, [("archive/../../x", b"x")]), "leaves the file"
    yield "absolute", zipped(good, [("/archive/x", b"x")]), "absolute"
    yield "backslash", zipped(good, [("archive\\..\\x", b"x")]), "absolute"
    yield "duplicate member", duplicate(good), "twice"
    yield "two top folders", zipped(good, [("other/data.pkl", b"x")]), "2 top folders"
    yield "no top folder", zipped(good, [("data.pkl", b"x")]), "top folder"
    yield "no pickle", zipped(good, name="other.pkl"), "no 'archive/data.pkl'"
    yield "TorchScript constants", zipped(good, [("archive/constants.pkl", b"x")]), "TorchScript"
    yield "TorchScript code", zipped(good, [("archive/code/a.py", b"x")]), "TorchScript"
    yield "big-endian", zipped(good).replace(b"little", b"biggie"), "big-endian"
    yield "comment", zipped(good)[:-2] + b"\x01\x00x", "cut off"
    yield "pickle in front", pkl(system) + zipped(good), "bare pickle"
    yield "other bytes in front", b"junk" * 20 + zipped(good), "not a file of torch.save"
    yield (
        "renamed header",
        zipped(good).replace(b"archive/version", b"archive/VERSION", 1),
        "header of another",
    )
    yield "overlapping members", overlapping(good), "member"

    # 7. Other formats
    yield "bare pickle", pkl(system), "bare pickle"
    yield (
        "legacy magic",
        pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2),
        "before 1.6",
    )
    yield "legacy tar", legacy_tar(), "tar"
    yield "empty", b"", "empty"
    yield "text", b"version https://git-lfs.github.com/spec/v1\n" * 3, "not a file of torch.save"


def duplicate(good):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("archive/data.pkl", good)
        z.writestr("archive/datb.pkl", pkl(b"N"))
    return out.getvalue().replace(b"datb.pkl", b"data.pkl")


def overlapping(good):
    """The directory's last entry points at the first member's header."""
    raw = bytearray(zipped(good))
    last = raw.rindex(b"PK\x01\x02")
    raw[last + 42 : last + 46] = struct.pack("<I", 0)
    return bytes(raw)


def legacy_tar():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as t:
        info = tarfile.TarInfo("pickle")
        info.size = 4
        t.addfile(info, io.BytesIO(b"\x80\x02N."))
    return out.getvalue()
