"""Damaged files of every format are refused, or read as what they say now: no other error, no hang."""

import pickletools
import shutil
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cubn.health.files import UnreadableFile, read
from cubn.health.layer import Layer
from tests.health.files.making import BY_PACKAGES, IN_PROCESS, made, network
from tests.health.files.test_hostile import FIVE, layer, opcodes, storage, tensor, zipped


def read_or_refused(path):
    """Whether the file is read; every other end is an error of the test."""
    refusal = ""
    try:
        assert all(isinstance(found, Layer) for found in read(path))
    except UnreadableFile as error:
        refusal = str(error)
        assert_one_line(refusal)
    return not refusal


def assert_one_line(text):
    assert text and text.isprintable()


def damaged(data, random):
    """One to three bytes changed, a stretch left out, a stretch repeated, or zeros."""
    data, at = bytearray(data), int(random.integers(len(data)))
    length = int(random.integers(1, 40))
    match random.integers(6):
        case 0:
            del data[at : at + length]
        case 1:
            data[at:at] = data[at : at + length]
        case 2:
            data[at : at + length] = bytes(min(length, len(data) - at))
        case _:
            for i in random.integers(len(data), size=random.integers(1, 4)):
                data[i] = random.integers(256) if random.integers(2) else data[i] ^ 1 << random.integers(8)
    return bytes(data)


def check_cut(path, places):
    data = path.read_bytes()
    for place in places:
        path.write_bytes(data[:place])
        assert not read_or_refused(path), f"cut at byte {place} of {len(data)}, it is still read"
    path.write_bytes(data)


def check_damaged(path, seeds):
    data = path.read_bytes()
    for seed in seeds:
        path.write_bytes(damaged(data, np.random.default_rng(seed)))
        read_or_refused(path)
    path.write_bytes(data)


@pytest.mark.parametrize("format", IN_PROCESS)
def test_a_file_that_was_cut_is_refused(format, tmp_path):
    path = made(format, tmp_path, network())
    size = path.stat().st_size
    check_cut(path, {*range(24), *np.linspace(24, size - 1, 60, dtype=int).tolist()})


@pytest.mark.parametrize("format", IN_PROCESS)
def test_a_damaged_file_ends_in_a_report_or_a_refusal(format, tmp_path):
    check_damaged(made(format, tmp_path, network()), range(150))


@pytest.mark.slow
@pytest.mark.parametrize("format", IN_PROCESS)
def test_many_damaged_files_end_in_reports_or_refusals(format, tmp_path):
    path = made(format, tmp_path, network())
    check_cut(path, range(path.stat().st_size))
    check_damaged(path, range(20_000))


def files(path):
    """What a checkpoint consists of."""
    return sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size) if path.is_dir() else [path]


def check_by_a_package(path, copy, seeds):
    for seed in seeds:
        random = np.random.default_rng(seed)
        if path.is_dir():
            shutil.copytree(path, copy)
        else:
            shutil.copy(path, copy)
        victim = random.choice(files(copy))
        data = victim.read_bytes()
        victim.write_bytes(data[: random.integers(len(data))] if random.integers(2) else damaged(data, random))
        read_or_refused(copy)
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()


@pytest.mark.parametrize("format", ["keras_zip", "orbax"])
def test_a_damaged_file_of_a_package_ends_in_a_report_or_a_refusal(format, tmp_path):
    (tmp_path / "whole").mkdir()
    check_by_a_package(made(format, tmp_path / "whole", network()), tmp_path / "copy", range(2))


@pytest.mark.slow
@pytest.mark.parametrize("format", BY_PACKAGES)
def test_many_damaged_files_of_a_package_end_in_reports_or_refusals(format, tmp_path):
    (tmp_path / "whole").mkdir()
    check_by_a_package(made(format, tmp_path / "whole", network()), tmp_path / "copy", range(400))


PARTS = st.one_of(
    st.sampled_from([opcode.name for opcode in pickletools.opcodes]),
    st.binary(max_size=6),
    st.sampled_from(
        [
            storage(),
            tensor(),
            b"\x8c\x0fbn.running_mean",
            b"ccollections\nOrderedDict\n)R",
            b"ctorch._tensor\n_rebuild_from_type_v2\n",
            b"ctorch._utils\n_rebuild_tensor_v3\n",
            b"ctorch._utils\n_rebuild_parameter\n",
        ]
    ),
)


@given(st.lists(PARTS, max_size=40))
@settings(max_examples=150)
def test_any_opcodes_end_in_a_report_or_a_refusal(tmp_path_factory, parts):
    folder = tmp_path_factory.getbasetemp()
    read_or_refused(zipped(folder / "opcodes.pt", opcodes(*parts, "STOP"), **{"data/0": FIVE}))


@given(st.integers(0, 10**9))
@settings(max_examples=150)
def test_a_damaged_pickle_in_a_whole_zip_file_ends(tmp_path_factory, seed):
    folder = tmp_path_factory.getbasetemp()
    read_or_refused(zipped(folder / "damaged.pt", damaged(layer(), np.random.default_rng(seed)), **{"data/0": FIVE}))


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"PK\3\4", b"\x80\x02", b"\x82", b"\x08\x08", b"\x20" + bytes(7) + b"{"]),
)
@settings(max_examples=200)
def test_any_bytes_end_in_a_refusal(tmp_path_factory, data, begin):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(begin + data)
    read_or_refused(path)


def test_a_torch_file_without_a_storage_is_refused(tmp_path):
    path = made("torch_zip", tmp_path, network())
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(tmp_path / "less", "w") as less:
        names = [name for name in file.namelist() if not name.endswith("data/5")]
        for name in names:
            less.writestr(name, file.read(name))
    assert len(names) and not read_or_refused(tmp_path / "less")
