"""`python -m cubn diagnose`: what it prints, its exit status, and what it reads and imports."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from cubn.__main__ import main
from cubn.health.files import read
from cubn.health.files.source import Source
from tests.health.files.making import (
    FORMATS,
    IN_PROCESS,
    LAYERS,
    NEGATIVE,
    NOT_FINITE,
    made,
    network,
    state_dict,
    tensors,
)


def healthy(folder):
    np.savez(folder / "healthy.npz", **state_dict(network()))
    return str(folder / "healthy.npz")


def faulty(folder):
    np.savez(folder / "faulty.npz", **state_dict(network(faults=True)))
    return str(folder / "faulty.npz")


@pytest.mark.parametrize("format", FORMATS)
def test_planted_faults_are_found_and_named_in_every_format(format, tmp_path, capsys):
    path = made(format, tmp_path, network(faults=True))
    assert main(["diagnose", str(path), "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["files"]
    errors = {(f["layer"], *f["channels"]) for f in row["report"]["findings"] if f["severity"] == "error"}
    assert row["file"] == str(path) and errors == {NEGATIVE, NOT_FINITE}


def test_the_table_has_the_files_name_and_the_layers(tmp_path, capsys):
    assert main(["diagnose", healthy(tmp_path), faulty(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert out.index("healthy.npz") < out.index("faulty.npz") < out.index(NEGATIVE[0]) and "negative-variance" in out


def test_healthy_files_end_with_0(tmp_path, capsys):
    assert main(["diagnose", healthy(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


def test_a_file_without_batch_norms_says_so(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", weight=np.ones(3))
    assert main(["diagnose", str(tmp_path / "a.npz")]) == 0
    assert "no batch norms" in capsys.readouterr().out


def test_of_several_files_the_worst_status_counts_and_the_others_are_reported(tmp_path, capsys):
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4")
    files = [faulty(tmp_path), str(tmp_path / "cut.npz"), str(tmp_path / "missing"), healthy(tmp_path)]
    assert main(["diagnose", *files, "--json"]) == 2
    out, err = capsys.readouterr()
    assert [line.split(": ")[1] for line in err.splitlines()] == files[1:3]
    assert [("report" in row, row["file"]) for row in json.loads(out)["files"]] == [
        (file not in files[1:3], file) for file in files
    ]


def test_statistics_of_a_type_that_is_not_read_are_not_called_healthy(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    eighth = {name: tensor.to(torch.float8_e5m2) for name, tensor in tensors(network()).items()}
    torch.save(eighth, tmp_path / "a.pt")
    assert main(["diagnose", str(tmp_path / "a.pt")]) == 2
    assert "running_mean of body.bn0 is stored as float8_e5m2" in capsys.readouterr().err


def test_what_files_and_their_names_say_is_no_command_to_a_terminal(tmp_path, capsys):
    """A name of a file, of a class in a pickle, and of a type of numbers."""
    escape = "\x1b[31m\n\r\u202e"
    storage = (
        b"\x80\x02}U\x0fbn.running_mean"
        + b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nA\x1b[31mStorage\n"
    )
    storage += b"U\x010U\x03cpuK\x01tQK\x00K\x01\x85K\x01\x85\x89}tRs."
    contents = {escape: b"?", "class": b"\x80\x02cfoo\nbar\x1b[31m\n)R."}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "type", "w") as file:
        file.writestr("a/data.pkl", storage)
    assert main(["diagnose", *(str(tmp_path / name) for name in [*contents, "type"])]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 3 and "bar\\x1b[31m" in err and "stored as a\\x1b[31m" in err
    assert (out + err).replace("\n", "").isprintable()


PRINTED = {"ascii": "b\\xe9ta\\u4e2d", "utf-8": "b\xe9ta\u4e2d"}


@pytest.mark.parametrize("encoding", PRINTED)
def test_names_are_printed_in_any_encoding(encoding, tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez(path, **{"b\xe9ta\u4e2d.running_mean": np.zeros(2), "b\xe9ta\u4e2d.running_var": -np.ones(2)})
    with (tmp_path / "out").open("w", encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["diagnose", str(path)]) == 1
    assert PRINTED[encoding] in (tmp_path / "out").read_text(encoding)


def test_a_file_name_of_any_bytes_is_printed(tmp_path, capsys):
    name = os.fsdecode(bytes(tmp_path) + b"/\x1b[2J\xff.npz")
    os.rename(healthy(tmp_path), name)
    assert main(["diagnose", name]) == 0
    assert "\\x1b[2J\\udcff.npz" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="of pipes")
def test_a_reader_that_has_enough_is_no_error(tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["diagnose", faulty(tmp_path)]) == 1


def test_a_page_is_written_whose_text_is_escaped(tmp_path):
    entries = state_dict(network(faults=True))
    np.savez(tmp_path / "a.npz", **{name.replace(NEGATIVE[0], "<script>"): array for name, array in entries.items()})
    assert main(["diagnose", str(tmp_path / "a.npz"), "--html", str(tmp_path / "a.html")]) == 1
    page = (tmp_path / "a.html").read_text()
    assert "negative-variance" in page and "&lt;script&gt;" in page and "<script>" not in page


def test_a_page_that_cannot_be_written_is_said(tmp_path, capsys):
    assert main(["diagnose", healthy(tmp_path), "--html", str(tmp_path / "missing" / "a.html")]) == 2
    assert "missing" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--html", "--figure"])
def test_what_is_made_of_one_file_is_refused_for_two(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["diagnose", healthy(tmp_path), faulty(tmp_path), option, str(tmp_path / "a")])
    assert ended.value.code == 2 and f"{option} is of one file; got 2" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


WITHOUT = """
import sys
for name in ("torch", "jax", "h5py", "safetensors", "onnx", "msgpack", "flax", "tensorstore", "numba", "llvmlite"):
    sys.modules[name] = None
from cubn.__main__ import main
sys.exit(main(["diagnose", *sys.argv[1:]]))
"""


def test_no_package_is_imported_for_what_cubn_reads_itself(tmp_path):
    paths = [str(made(format, tmp_path, network())) for format in IN_PROCESS]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *paths], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def large(format, folder):
    """A checkpoint with 32 MB beside the batch norms."""
    weights = {"body.large.weight": np.zeros((1 << 23,), np.float32)}
    if format == "npz":
        np.savez(folder / "a", **state_dict(network()), **weights)
        return folder / "a.npz"
    if format == "safetensors":
        pytest.importorskip("safetensors.numpy").save_file(state_dict(network()) | weights, folder / "a")
    else:
        torch = pytest.importorskip("torch")
        saved = tensors(network()) | {name: torch.tensor(array) for name, array in weights.items()}
        torch.save(saved, folder / "a", _use_new_zipfile_serialization=format == "torch_zip")
    return folder / "a"


@pytest.mark.parametrize("format", ["torch_zip", "torch_pickles", "safetensors", "npz"])
def test_only_batch_norms_are_read(format, tmp_path, monkeypatch):
    path, lengths, read_piece = large(format, tmp_path), [], Source.read

    def counted(self, offset, length):
        lengths.append(length)
        return read_piece(self, offset, length)

    monkeypatch.setattr(Source, "read", counted)
    assert len(read(path)) == len(LAYERS)
    assert 0 < sum(lengths) < 1e6 < path.stat().st_size


def test_a_packed_member_is_unpacked_as_far_as_it_is_needed(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in (state_dict(network()) | {"large": np.zeros(1 << 20, np.float32)}).items():
            with file.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)
    assert len(read(tmp_path / "a.npz")) == len(LAYERS)


def test_a_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["diagnose", healthy(tmp_path), "--figure", str(tmp_path / "a.svg")]) == 0
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_a_figure_without_matplotlib_is_refused_with_a_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cubn.health.figures", None)
    assert main(["diagnose", healthy(tmp_path), "--figure", str(tmp_path / "a.svg")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_reader_of_another_command_that_has_read_enough_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "cubn", "info"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
