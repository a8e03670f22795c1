"""Files made to harm: nothing in them runs, nothing outside them is read, time and memory stay small."""

import contextlib
import io
import json
import os
import pickle
import pickletools
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from cubn.health.files import UnreadableFile, read
from tests.health.files.making import network, npz, onnx_model, safetensors, state_dict


class Call:
    """Pickled, it calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Built:
    """Pickled, it is given a state when it is loaded."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return (Built, (None,), self.state)


def zipped(path, data, **others):
    """A zip file as torch makes it, around a pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        for name, content in others.items():
            file.writestr(f"archive/{name}", content)
    return path


CALLS = {
    "os.system": lambda canary: Call(os.system, f"touch {canary}"),
    "eval": lambda canary: Call(eval, f"__import__('os').mkdir({str(canary)!r})"),
    "exec": lambda canary: Call(exec, f"import os; os.mkdir({str(canary)!r})"),
    "os.mkdir": lambda canary: Call(os.mkdir, str(canary)),
    "getattr": lambda canary: Call(getattr, Call(__import__, "os"), "system"),
    "a harmless name": lambda canary: Call(np.savetxt, str(canary), [1.0]),
}
PLACES = {
    "the whole": lambda call: call,
    "a value": lambda call: {"state_dict": {"bn.running_mean": call, "bn.running_var": call}},
    "a list": lambda call: {"optimizer": [1, (call, [call])]},
    "a key": lambda call: {(1, "key"): call, "epoch": 3},
    "a state": lambda call: {"model": Built({"_modules": {"bn": call}, "_buffers": call})},
    "an argument": lambda call: {"model": Call(dict, [("running_mean", call)])},
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("call", CALLS)
def test_no_call_in_a_pickle_is_made(call, place, protocol, tmp_path):
    canary = tmp_path / "canary"
    data = pickle.dumps(PLACES[place](CALLS[call](canary)), protocol)
    (tmp_path / "plain").write_bytes(data)
    for path in (zipped(tmp_path / "zip", data), tmp_path / "plain"):
        if call == "a harmless name" and place not in ("the whole", "a value"):
            assert read(path) == []
        else:
            with pytest.raises(
                UnreadableFile, match=r"nothing was run|is not understood|as numpy.savetxt, which is not"
            ):
                read(path)
    assert not canary.exists()
    if call != "getattr":  # which only fetches
        with contextlib.suppress(Exception):
            pickle.loads(data)
        assert canary.exists()  # so the pickle is one that calls


def opcodes(*parts):
    """A pickle written by hand: names of opcodes, and the bytes behind them."""
    codes = {opcode.name: opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
    return b"\x80\x02" + b"".join(codes.get(part, part) if isinstance(part, str) else part for part in parts)


def storage(key="0", kind=b"ctorch\nFloatStorage\n", word="storage"):
    """A persistent id of torch."""
    texts = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (word, key, "cpu")]
    return b"(" + texts[0] + kind + texts[1] + texts[2] + b"K\x05tQ"


def tensor(shape=b"K\x05\x85", strides=b"K\x01\x85", offset=b"K\x00", key="0"):
    """A call of torch's that makes a tensor."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(key) + offset + shape + strides + b"\x89NtR"


def layer(**of_mean):
    mean, var = tensor(**of_mean), tensor()
    return opcodes(
        "EMPTY_DICT", b"\x8c\x0fbn.running_mean", mean, "SETITEM", b"\x8c\x0ebn.running_var", var, "SETITEM", "STOP"
    )


FIVE = np.arange(5, dtype=np.float32).tobytes()
BIG = b"\x8a\x08" + (1 << 60).to_bytes(8, "little")
NEGATIVE = b"J" + struct.pack("<i", -1)
LONGEST = b"\x8b" + struct.pack("<i", 1 << 30) + b"\1"

PICKLES = {
    "a tensor beyond its storage": layer(offset=b"K\x01"),
    "a huge offset": layer(offset=BIG),
    "a negative offset": layer(offset=NEGATIVE),
    "a negative size": layer(shape=NEGATIVE + b"\x85"),
    "a huge size": layer(shape=BIG + b"\x85"),
    "a huge stride": layer(strides=BIG + b"\x85"),
    "a negative stride": layer(strides=NEGATIVE + b"\x85"),
    "more strides than axes": layer(strides=b"K\x01K\x01\x86"),
    "a shape of text": layer(shape=b"\x8c\x01a\x85"),
    "a storage that is not there": layer(key="../0"),
    "a storage without its word": opcodes(storage(word="system"), "STOP"),
    "a storage of a call": opcodes(b"cos\nsystem\n\x8c\x04true\x85RQ", "STOP"),
    "an integer of a gigabyte": opcodes(LONGEST, "STOP"),
    "an integer of 256 bytes": opcodes(b"\x8b" + struct.pack("<i", 256) + b"\1" * 256, "STOP"),
    "an integer of many digits": opcodes(b"I" + b"9" * 10000 + b"\n", "STOP"),
    "text of a gigabyte": opcodes(b"X" + struct.pack("<I", 1 << 30), "STOP"),
    "a memo of what is not there": opcodes(b"j" + struct.pack("<I", 1 << 31), "STOP"),
    "an empty stack": opcodes("APPEND", "STOP"),
    "no mark": opcodes("NONE", "TUPLE", "STOP"),
    "a mark taken for a value": opcodes("MARK", "STOP"),
    "an extension of the registry": opcodes(b"\x82\x01", "STOP"),
    "an opcode that there is not": opcodes(b"\xff", "STOP"),
    "no end": opcodes("EMPTY_LIST"),
    "a name without an end": opcodes(b"ctorch\nFloat"),
    "a mapping copied again and again": opcodes(
        "EMPTY_LIST",
        "MEMOIZE",
        "MARK",
        b"K\x01K\x02\x86" * 20000,
        "APPENDS",
        "POP",
        b"ccollections\nOrderedDict\nh\x00\x85R0" * 20000,
        "NONE",
        "STOP",
    ),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_made_to_harm_is_refused(name, tmp_path):
    path = zipped(tmp_path / "a.pt", PICKLES[name], **{"data/0": FIVE})
    if name == "a mark taken for a value":
        assert read(path) == []
    else:
        with pytest.raises(UnreadableFile):
            read(path)


def test_the_pickle_that_others_are_changed_from_is_read(tmp_path):
    (found,) = read(zipped(tmp_path / "a.pt", layer(), **{"data/0": FIVE}))
    assert np.array_equal(found.running_mean, np.arange(5))


NESTED = 100_000
LOOPS = {
    "a list in itself": opcodes("EMPTY_LIST", "MEMOIZE", b"h\x00", "APPEND", "STOP"),
    "a mapping in itself": opcodes("EMPTY_DICT", "MEMOIZE", b"\x8c\x01ah\x00", "SETITEM", "STOP"),
    "lists in lists": opcodes(b"]" * NESTED + b"a" * (NESTED - 1), "STOP"),
    "tuples in tuples": opcodes(b")" + b"\x85" * NESTED, "STOP"),
    "a key of tuples in tuples": opcodes(b"}" + b")" + b"\x85" * NESTED + b"Ns", "STOP"),
    "a billion laughs": opcodes("EMPTY_LIST", b"2\x86" * 60, "STOP"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_what_contains_itself_or_is_nested_ends(name, tmp_path):
    assert read(zipped(tmp_path / "a.pt", LOOPS[name])) == []


def test_long_names_do_not_multiply(tmp_path):
    long = b"X" + struct.pack("<I", 1 << 20) + b"n" * (1 << 20)
    many = b"".join(b"X\4\0\0\0%04d}\x8c\1w" % i + tensor() + b"ss" for i in range(200))
    path = zipped(tmp_path / "a.pt", opcodes("EMPTY_DICT", long, "EMPTY_DICT", many, "SETITEM", "STOP"))
    assert _peak(lambda: read(path)) < 50e6


def _peak(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_zeros_packed_small_are_not_unpacked(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (9 << 20,)})
    data = header.getvalue() + bytes(72 << 20)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bn.running_mean.npy", data)

    def refused():
        with pytest.raises(UnreadableFile):
            read(tmp_path / "a.npz")

    assert (tmp_path / "a.npz").stat().st_size < 1e6 and _peak(refused) < 20e6


def test_one_vector_under_many_names_is_not_read_for_each(tmp_path):
    shape = b"J" + struct.pack("<i", 1 << 22) + b"\x85"
    still = tensor(shape=shape, strides=b"K\x00\x85")
    entries = b"".join(b"\x8c\x10%03d.running_mean" % i + still + b"s" for i in range(20))
    path = zipped(tmp_path / "a.pt", opcodes("EMPTY_DICT", entries, "STOP"), **{"data/0": FIVE})
    with pytest.raises(UnreadableFile, match="values in all"):
        read(path)


def changed(path, change):
    """A safetensors file with another header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    text = json.dumps(header if text is None else text).encode() if not isinstance(text, bytes) else text
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


def _about(**others):
    return lambda header: header["head.bn.running_var"].update(others)


HEADERS = {
    "beyond the end": _about(data_offsets=[1 << 40, (1 << 40) + 32]),
    "beyond the end, of another layer": lambda header: header["body.conv.bias"].update(
        data_offsets=[1 << 40, 16 + (1 << 40)]
    ),
    "backwards": _about(data_offsets=[32, 0]),
    "negative": _about(data_offsets=[-32, 0]),
    "fractions": _about(data_offsets=[0.0, 32.0]),
    "overlapping": _about(data_offsets=[0, 32]),
    "another length": _about(data_offsets=[0, 16]),
    "a negative shape": _about(shape=[-8]),
    "a huge shape": _about(shape=[1 << 62, 4]),
    "a shape of text": _about(shape=["8"]),
    "many axes": _about(shape=[1] * 1000),
    "no shape": lambda header: header["head.bn.running_var"].pop("shape") and None,
    "a list": lambda header: [],
    "a number for a tensor": lambda header: header | {"head.bn.weight": 3},
    "nested deep": lambda header: b'{"a":' + b"[" * 100_000,
    "no JSON": lambda header: b"{{{{",
    "nothing": lambda header: b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_of_safetensors_that_lies_is_refused(name, tmp_path):
    with pytest.raises(UnreadableFile):
        read(changed(safetensors(tmp_path, network()), HEADERS[name]))


def test_a_header_longer_than_the_file_is_refused_unread(tmp_path):
    (tmp_path / "a").write_bytes((1 << 62).to_bytes(8, "little") + b"{" + b" " * 100)
    with pytest.raises(UnreadableFile, match="header of 4611686018427387904 bytes"):
        read(tmp_path / "a")


OUTSIDE = ["../secret", "/etc/passwd", "..", ".", "", "a/../../b", "a\\b", "C:evil", "nul\0", "x" * 300]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_reaches_nothing_but_files_beside_it(name, tmp_path):
    folder = tmp_path / "inner"
    folder.mkdir()
    np.savez(tmp_path / "secret.npz", **state_dict(network()))
    (tmp_path / "secret.npz").rename(tmp_path / "secret")
    (folder / "a.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UnreadableFile, match="not one beside it"):
        read(folder / "a.index.json")


@pytest.mark.parametrize("name", OUTSIDE)
def test_tensors_outside_an_onnx_file_are_beside_it(name, tmp_path):
    onnx, model = onnx_model(network())
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", "0"), ("length", "32")):
            tensor.external_data.add(key=key, value=value)
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnreadableFile, match="not one beside it"):
        read(tmp_path / "a.onnx")


def test_an_onnx_file_without_the_versions_that_come_last_is_refused(tmp_path):
    _, model = onnx_model(network())
    del model.opset_import[:]
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnreadableFile):
        read(tmp_path / "a.onnx")


INDICES = ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}', '{"a": ' + "[" * 100_000, "{"]


@pytest.mark.parametrize("text", INDICES, ids=range(len(INDICES)))
def test_json_that_is_no_index_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UnreadableFile):
        read(tmp_path / "a.json")


def test_an_index_that_names_itself_ends(tmp_path):
    (tmp_path / "a.json").write_text('{"weight_map": {"a": "a.json"}}')
    with pytest.raises(UnreadableFile):
        read(tmp_path / "a.json")


ZIPS = {
    "another size": (24, struct.pack("<I", 1 << 20)),
    "more bytes than there are": (20, struct.pack("<II", 1 << 31, 1 << 31)),
    "another place": (42, struct.pack("<I", 1 << 30)),
    "an unknown way of packing": (10, struct.pack("<H", 99)),
    "encrypted": (8, struct.pack("<H", 1)),
    "another checksum": (16, struct.pack("<I", 1)),
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_directory_of_a_zip_file_that_lies_is_refused(name, tmp_path):
    path = npz(tmp_path, network())
    data = bytearray(path.read_bytes())
    offset, value = ZIPS[name]
    at = data.rfind(b"bn.running_var.npy") - 46 - len("head.")
    assert data[at : at + 4] == b"PK\1\2"
    data[at + offset : at + offset + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(UnreadableFile):
        read(path)


def test_members_without_end_are_refused_before_they_are_read(tmp_path):
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, 46, 4, 0)
    (tmp_path / "a").write_bytes(b"PK\3\4" + bytes(100) + end)
    with pytest.raises(UnreadableFile, match="65535 members"):
        read(tmp_path / "a")


NAMES = {
    "a long header": b"\x93NUMPY\2\0" + struct.pack("<I", 1 << 30),
    "code": b"{'descr': __import__('os').system('true'), 'fortran_order': False, 'shape': (3,), }",
    "many parentheses": b"{'descr': " + b"(" * 60000,
    "a negative shape": b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3,), }",
    "a huge shape": b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904,), }",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_header_of_an_array_that_lies_is_refused_or_passed_over(name, tmp_path):
    header = NAMES[name]
    if not header.startswith(b"\x93"):
        header = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("bn.running_mean.npy", header + bytes(12))
    try:
        assert read(tmp_path / "a.npz") == []
    except UnreadableFile:
        assert name in ("a long header", "a huge shape")


FLAX = {
    "nested deep": b"\x81\xa1a" * 100_000,
    "lists in lists": b"\x81\xa1a" + b"\x91" * 100_000,
    "a list of four billions": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "a mapping of four billions": b"\xdf\xff\xff\xff\xff",
    "bytes without end": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "a byte that is not used": b"\x81\xa1a\xc1",
    "a key that is no name": b"\x81\x90\x01",
    "an array that is none": b"\x81\xa1a\xc7\x03\x01abc",
    "an array of a negative shape": b"\x81\xa1a\xc7\x0c\x01\x93\x91\xff\xa7float32\xc4\x00",
    "more behind its end": b"\x81\xa1a\x01\x01",
}


@pytest.mark.parametrize("name", FLAX)
def test_messagepack_made_to_harm_is_refused(name, tmp_path):
    (tmp_path / "a").write_bytes(FLAX[name])
    with pytest.raises(UnreadableFile):
        read(tmp_path / "a")


OTHERS = {
    "nothing": b"",
    "one byte": b"\x80",
    "text": b"hello, this is no checkpoint",
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "zeros": bytes(1000),
    "a number without end": b"\x08" + b"\xff" * 100,
    "a field longer than the file": b"\x08\x08\x3a\xff\xff\xff\xff\x0f",
    "a zip file of other things": None,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_checkpoint_is_refused(name, tmp_path):
    if OTHERS[name] is None:
        with zipfile.ZipFile(tmp_path / "a", "w") as file:
            file.writestr("readme.txt", "hello")
    else:
        (tmp_path / "a").write_bytes(OTHERS[name])
    with pytest.raises(UnreadableFile):
        read(tmp_path / "a")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path / "pipe", tmp_path):
        with pytest.raises(UnreadableFile):
            read(path)


def test_hdf5_that_refers_to_other_files_gives_nothing_of_them(tmp_path):
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(np.full(4, 7, np.float32).tobytes())
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["bn/moving_mean"] = np.ones(4, np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        outside = [(str(tmp_path / "secret"), 0, 16)]
        file.create_dataset("bn/moving_mean", (4,), "f4", external=outside)
        file.create_dataset("bn/moving_variance", (4,), "f4", external=outside)
        file["linked"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "bn")
        file["loop"] = h5py.SoftLink("/")
        file["again"] = file["/"]
    assert read(tmp_path / "a.h5") == []
