"""GGUF files in, byte by byte: every type of block as llama.cpp reads it, and files that lie about themselves."""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.interop import ggml

from sparing.base.config import UserError
from sparing.interop.gguf_reader import BLOCKS, ENTRIES, ITEMS, PLAIN, GgufFile

pytest.importorskip("gguf")

U32, U64 = "<I", "<Q"


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack(U64, len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack(U32, kind) + value


def listed(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """An entry of the list of tensors. shape: as GGUF counts, row length first."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(pairs: list[bytes], tensors: list[bytes], data: bytes = b"", version: int = 3, counts: tuple[int, int] | None = None) -> bytes:
    count, keys = counts or (len(tensors), len(pairs))
    header = b"GGUF" + struct.pack("<IQQ", version, count, keys) + b"".join(pairs) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


ARCHITECTURE = pair("general.architecture", 8, text("llama"))
SMALL = file_of(
    [
        ARCHITECTURE,
        pair("a.number", 4, struct.pack(U32, 7)),
        pair("a.flag", 7, b"\1"),
        pair("a.share", 6, struct.pack("<f", 0.5)),
        pair("names", 9, struct.pack("<IQ", 8, 3) + text("x") + text("naïve") + text("")),
        pair("kinds", 9, struct.pack("<IQ", 5, 3) + struct.pack("<3i", 1, -2, 3)),
    ],
    [listed("w", (32, 2), 8, 0), listed("n", (3,), 0, 96)],
    np.arange(68, dtype=np.uint8).tobytes() + b"\0" * 28 + struct.pack("<3f", 1, 2, 3),
)


@pytest.fixture
def opened(tmp_path):
    def open_(data: bytes) -> GgufFile:
        (tmp_path / "m.gguf").write_bytes(data)
        return GgufFile(tmp_path / "m.gguf")

    return open_


def test_metadata_and_tensors_are_read(opened):
    file = opened(SMALL)
    assert {key: file.metadata[key] for key in ("general.architecture", "a.number", "a.flag", "a.share")} == {
        "general.architecture": "llama", "a.number": 7, "a.flag": True, "a.share": 0.5
    }  # fmt: skip
    assert file.metadata["names"] == ["x", "naïve", ""] and file.metadata["kinds"].tolist() == [1, -2, 3]
    assert file.tensors["w"].shape == (2, 32) and file.tensors["w"].nbytes == 68 and file.nbytes == 80
    assert file.read("n").tolist() == [1, 2, 3] and file.read("w").shape == (2, 32)


@pytest.mark.parametrize("number", BLOCKS)
def test_blocks_are_the_floats_that_llama_cpp_makes_of_them(number, opened):
    pytest.importorskip("xllamacpp")
    kind, numbers, size = BLOCKS[number]
    generator = np.random.default_rng(number)
    values = generator.normal(size=(5, 512)).astype(np.float32)
    if kind in PLAIN:
        blocks = torch.from_numpy(values).to(PLAIN[kind]).view(torch.uint8).numpy()
        expected = torch.from_numpy(values).to(PLAIN[kind]).float().numpy()
    else:
        blocks = ggml.quantised(values, number, 512 // numbers * size)
        expected = ggml.dequantised(blocks, kind, values.size).reshape(values.shape)
    found = opened(file_of([ARCHITECTURE], [listed("w", (512, 5), number, 0)], blocks.tobytes())).read("w").float().numpy()
    assert np.array_equal(found, expected) and np.abs(found - values).max() < 1.2 and found.std() > 0.5


HOSTILE = {
    "nothing": (b"", "not a GGUF file"),
    "another file": (b"PK\3\4" + b"\0" * 100, "not a GGUF file"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "Git LFS pointer"),
    "magic alone": (b"GGUF", "truncated"),
    "version 1": (file_of([ARCHITECTURE], [], version=1), "version 1, supported: 2, 3"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "other byte order"),
    "billions of tensors": (file_of([ARCHITECTURE], [], counts=(3 << 30, 1)), r"says that it has 3,221,225,472 tensors"),
    "all tensors": (file_of([ARCHITECTURE], [], counts=(2**64 - 1, 1)), "tensors, which cannot be"),
    "billions of keys": (file_of([ARCHITECTURE], [], counts=(0, 2**63)), "keys, which cannot be"),
    "more keys than there are": (file_of([ARCHITECTURE], [], counts=(0, 2)), "key 2 is no name"),
    "a text of gigabytes": (file_of([text("a") + struct.pack("<IQ", 8, 8 << 30)], []), "a would have 8,589,934,592 bytes"),
    "a text without end": (file_of([text("a") + struct.pack("<IQ", 8, 2**64 - 1)], []), "a would have"),
    "a key without end": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**40), "key 1 would have"),
    "an array of billions": (file_of([pair("a", 9, struct.pack("<IQ", 0, 5 << 30))], []), "a would have 5,368,709,120 elements"),
    "an array whose size overflows": (file_of([pair("a", 9, struct.pack("<IQ", 10, 2**61))], []), "a would have"),
    "an array of arrays": (file_of([pair("a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 9, 1))], []), "array of the type 9"),
    "an unknown kind of value": (file_of([pair("a", 77, b"")], []), "unknown type 77"),
    "a key twice": (file_of([ARCHITECTURE, ARCHITECTURE], []), "the key general.architecture twice"),
    "a key that is no name": (file_of([pair("a\n", 7, b"\1")], []), "key 1 is no name"),
    "text that is no UTF-8": (file_of([pair("a", 8, text(b"\xff"))], []), "a is not UTF-8"),
    "a tensor twice": (file_of([], [listed("w", (1,), 0, 0), listed("w", (1,), 0, 32)], b"\0" * 64), "the tensor w twice"),
    "eight dimensions": (file_of([], [listed("w", (1,) * 8, 0, 0)], b"\0" * 64), "w has 8 dimensions"),
    "no dimension": (file_of([], [listed("w", (), 0, 0)], b"\0" * 64), "w has 0 dimensions"),
    "a row of nothing": (file_of([], [listed("w", (0,), 0, 0)]), "w has no numbers, its dimensions are 0"),
    "nothing, of a size that overflows": (file_of([], [listed("w", (32, 0, 2**63), 8, 0)]), "w has no numbers"),
    "a size that overflows": (file_of([], [listed("w", (2**33, 2**33), 0, 0)], b"\0" * 64), "w would end at byte"),
    "an offset past the end": (file_of([], [listed("w", (1,), 0, 2**40)], b"\0" * 64), "w would end at byte"),
    "an offset that overflows": (file_of([], [listed("w", (16,), 0, 2**64 - 32)], b"\0" * 64), "w would end at byte"),
    "an odd offset": (file_of([], [listed("w", (1,), 0, 3)], b"\0" * 64), "no multiple of 32"),
    "tensors over each other": (file_of([], [listed("w", (16,), 0, 0), listed("v", (16,), 0, 32)], b"\0" * 128), "over each other"),
    "rows that are no blocks": (file_of([], [listed("w", (33,), 8, 0)], b"\0" * 64), "rows of 33 numbers, Q8_0 wants a multiple of 32"),
    "an unknown type": (file_of([], [listed("w", (32,), 200, 0)], b"\0" * 64), "w is of type 200, read are F32"),
    "a type that is not read": (file_of([], [listed("w", (256,), 16, 0)], b"\0" * 128), "IQ2_XXS.*nearest"),
    "alignment of three": (file_of([pair("general.alignment", 4, struct.pack(U32, 3))], []), "general.alignment is 3"),
    "alignment of zero": (file_of([pair("general.alignment", 4, struct.pack(U32, 0))], []), "general.alignment is 0"),
    "alignment that is text": (file_of([pair("general.alignment", 8, text("x"))], []), "general.alignment is 'x'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_lies_is_one_line(name, opened):
    data, says = HOSTILE[name]
    with pytest.raises(UserError, match=says) as error:
        opened(data)
    assert "m.gguf" in str(error.value) and len(str(error.value)) < 500 and "\n" not in str(error.value)


@pytest.mark.parametrize("end", [5, 20, 40, 60, 100, 200, 250, len(SMALL) - 1])
def test_a_truncated_file_is_one_line(end, opened):
    with pytest.raises(UserError, match="truncated"):
        opened(SMALL[:end])


def test_numbers_that_are_not_finite_are_told(opened):
    data = file_of([], [listed("w", (2,), 0, 0)], struct.pack("<2f", 1, float("nan")))
    with pytest.raises(UserError, match="w has numbers that are not finite"):
        opened(data).read("w")
    with pytest.raises(UserError, match="not finite"):
        opened(file_of([], [listed("w", (32,), 8, 0)], b"\0\x7c" + b"\1" * 32)).read("w")  # a scale of infinity


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    for path, says in ((tmp_path / "no.gguf", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=says):
            GgufFile(path)


MEMORY = """
import sys
from sparing.base.config import UserError
from sparing.interop.gguf_reader import GgufFile
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
open("/proc/self/clear_refs", "w").write("5")  # a new process begins with its parent's peak
before = peak()
try:
    GgufFile(sys.argv[1])
except UserError as error:
    print(str(error)[:200])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("name", ["empty texts", "keys", "a hole"])
def test_what_a_large_header_costs_is_bounded(name, tmp_path):
    """The most that a file can make the reader do before it is refused: memory stays below a few times the header's limit."""
    path = tmp_path / "m.gguf"
    if name == "empty texts":
        path.write_bytes(file_of([pair("a", 9, struct.pack("<IQ", 8, ITEMS) + b"\0" * 8 * ITEMS)], []))
    elif name == "keys":
        path.write_bytes(file_of([pair(f"k{i}", 0, b"\0") for i in range(ENTRIES)], [], counts=(0, ENTRIES)))
    else:
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, ENTRIES, ENTRIES))
        with open(path, "r+b") as file:
            file.truncate(1 << 40)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True, timeout=100)
    assert float(done.stdout.splitlines()[-1]) < 300_000  # KiB; a reader that never ends meets the time-out
    assert (name == "a hole") == ("no name" in done.stdout or "twice" in done.stdout)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_bring_the_reader_down(tmp_path_factory, data):
    """A file with some bytes changed is read, or refused in one line."""
    changed = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        large = st.sampled_from([b"\xff" * 8, b"\0" * 8, struct.pack(U64, 1 << 40)])
        piece = data.draw(st.one_of(st.binary(min_size=1, max_size=8), large))
        changed[at : at + len(piece)] = piece
    changed = changed[: data.draw(st.integers(0, len(changed)))] if data.draw(st.booleans()) else changed
    path = tmp_path_factory.getbasetemp() / "mutant.gguf"
    path.write_bytes(changed)
    try:
        file = GgufFile(path)
        for name, stored in file.tensors.items():
            assert file.read(name).shape == stored.shape
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
