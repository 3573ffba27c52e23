"""Headers of GGUF files: as the format's own library writes them, and damaged in every part."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest

from model.errors import CheckpointError
from model.gguf.files import find_gguf, models_in, read_gguf
from model.gguf.header import Strings, is_gguf, read_header
from model.quantization.gguf_types import BY_NAME
from support.gguf_headers import ARRAY, BOOL, F32, I32, STRING, U32, U64, File, key, string, tensor


def two_tensors() -> File:
    return File(
        [
            key("general.architecture", STRING, "llama4"),
            key("tokenizer.ggml.tokens", ARRAY, (STRING, ["ab", "é", ""])),
            key("tokenizer.ggml.token_type", ARRAY, (I32, [1, 1, 3])),
        ],
        [tensor("a", (3, 2), 0), tensor("b", (5,), 32)],
        bytes(32 + 20),
    )


def test_all_types_of_values_and_tensors_that_the_library_writes(tmp_path: Path) -> None:
    file = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(file, "llama4")
    scalars = {
        "uint8": 7,
        "int8": -7,
        "uint16": 70,
        "int16": -70,
        "uint32": 7000,
        "int32": -7000,
        "uint64": 2**63,
        "int64": -(2**62),
        "float32": 0.5,
        "float64": 1e300,
        "bool": True,
    }
    for name, number in scalars.items():
        getattr(writer, f"add_{name}")(f"x.{name}", number)
    writer.add_string("x.string", "grün\n")
    writer.add_array("x.numbers", [3, -1, 2])
    writer.add_array("x.strings", ["a", "", "ß" * 100])
    writer.add_custom_alignment(64)
    shapes = {"F32": (3, 5), "BF16": (7,), "Q8_0": (2, 64), "Q4_K": (3, 2, 256), "IQ2_XXS": (1, 512)}
    for name, shape in shapes.items():
        kind = BY_NAME[name]
        as_bytes = (*shape[:-1], kind.row_bytes(shape[-1]))
        writer.add_tensor(name, numpy.zeros(as_bytes, numpy.uint8), raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_header(file)
    assert {name: header.metadata[f"x.{name}"] for name in scalars} == scalars
    assert header.metadata["x.string"] == "grün\n"
    assert header.metadata["x.numbers"] == (3, -1, 2)
    strings = header.metadata["x.strings"]
    assert isinstance(strings, Strings) and len(strings) == 3 and list(strings) == ["a", "", "ß" * 100]
    theirs = {t.name: (t.tensor_type.name, t.n_bytes, t.data_offset) for t in gguf.GGUFReader(file).tensors}
    assert {n: (t.kind.name, t.num_bytes, t.offset) for n, t in header.tensors.items()} == theirs
    assert {name: found.shape for name, found in header.tensors.items()} == shapes


def test_version_2_is_read(tmp_path: Path) -> None:
    file = two_tensors()
    file.version = 2
    header = read_header(file.write(tmp_path / "a.gguf"))
    assert [(t.name, t.shape, t.num_bytes) for t in header.tensors.values()] == [("a", (3, 2), 24), ("b", (5,), 20)]


def test_long_vocabularies_are_not_decoded_until_used(tmp_path: Path) -> None:
    words = [f"word{n}" for n in range(50_000)]
    file = File([key("tokenizer.ggml.tokens", ARRAY, (STRING, words))]).write(tmp_path / "a.gguf")
    tokens = read_header(file).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Strings) and len(tokens) == 50_000 and list(tokens) == words


Change = Callable[[File], object]


def put(name: str, content: Any) -> Change:
    return lambda file: setattr(file, name, content)


def added(*keys: bytes) -> Change:
    return lambda file: file.keys.extend(keys)


def tensors(*entries: bytes) -> Change:
    return lambda file: setattr(file, "tensors", list(entries))


DAMAGE: dict[str, tuple[Change, str]] = {
    "other magic": (put("magic", b"GGML"), "not a GGUF file"),
    "a pointer of LFS": (put("magic", b"version https://git-lfs"), "a Git LFS pointer"),
    "version 1": (put("version", 1), "version 1 of the format is not read"),
    "version 4": (put("version", 4), "version 4 of the format is not read"),
    "big-endian": (put("version", 3 << 24), "a big-endian file is not read"),
    "keys without end": (put("key_count", 2**61), r"damaged or cut short at byte 24, in [\d,]+ keys"),
    "tensors without end": (put("tensor_count", 2**60), r"damaged or cut short at byte \d+, in [\d,]+ tensors"),
    "a key more": (put("key_count", 4), "a tensor's name at byte"),
    "a key less": (put("key_count", 2), "tensor"),
    "a tensor more": (put("tensor_count", 3), "a tensor's name at byte"),
    "a key of 2**63 bytes": (
        added(struct.pack("<Q", 2**63)),
        "a metadata key at byte .* has 9,223,372,036,854,775,808",
    ),
    "an empty key": (added(key("", U32, 1)), "a metadata key at byte .* has 0 bytes"),
    "a key with a line end": (added(key("a\nb", U32, 1)), "a metadata key at byte .* is not a name"),
    "a key twice": (added(key("x", U32, 1), key("x", U32, 1)), "metadata key x appears twice"),
    "a type of no value": (added(string("x") + struct.pack("<I", 13)), "metadata key x: its type, number 13"),
    "a string without end": (added(string("x") + struct.pack("<IQ", STRING, 2**40)), "damaged or cut short .* in x"),
    "an array without end": (
        added(string("x") + struct.pack("<IIQ", ARRAY, U64, 2**62)),
        "metadata key x: 4,611,686,018,427,387,904 values are more than",
    ),
    "an array cut short": (added(string("x") + struct.pack("<IIQ", ARRAY, U64, 2**20)), "cut short .* in x"),
    "strings cut short": (
        added(string("x") + struct.pack("<IIQQ", ARRAY, STRING, 9, 2**62) + bytes(72)),
        "cut short .* in x",
    ),
    "arrays in an array": (added(string("x") + struct.pack("<IIQ", ARRAY, ARRAY, 1)), "key x: arrays of arrays"),
    "alignment 0": (added(key("general.alignment", U32, 0)), "general.alignment: 0 is not a power of two"),
    "alignment 48": (added(key("general.alignment", U32, 48)), "general.alignment: 48 is not a power of two"),
    "an alignment in words": (added(key("general.alignment", STRING, "32")), "general.alignment: '32' is not"),
    "alignment true": (added(key("general.alignment", BOOL, True)), "general.alignment: True is not"),
    "alignment 32.0": (added(key("general.alignment", F32, 32.0)), "general.alignment: 32.0 is not"),
    "another alignment": (added(key("general.alignment", U32, 4096)), "tensor b: its offset 32 is no multiple of 4096"),
    "a tensor twice": (tensors(tensor("a", (2,), 0), tensor("a", (2,), 32)), "tensor a appears twice"),
    "no dimensions": (tensors(tensor("a", (), 0)), "tensor a: 0 dimensions are not 1 to 4"),
    "five dimensions": (tensors(tensor("a", (1,) * 5, 0)), "tensor a: 5 dimensions are not 1 to 4"),
    "a size of 0": (tensors(tensor("a", (0, 2), 0)), r"tensor a: its shape \[0, 2\] has a size of 0"),
    "a removed type": (tensors(tensor("a", (1, 32), 0, 4)), "tensor a: its type, number 4, is not read"),
    "a type unheard of": (tensors(tensor("a", (1, 32), 0, 2**31)), "tensor a: its type, number 2147483648"),
    "half a block": (tensors(tensor("a", (1, 48), 0, 8)), "tensor a: rows of 48 weights are no whole number of Q8_0"),
    "an enormous tensor": (tensors(tensor("a", (2**40, 2**40), 0)), "truncated: tensor a ends at byte"),
    "sizes whose product overflows": (tensors(tensor("a", (2**33, 2**33), 0)), "truncated: tensor a ends at byte"),
    "an offset behind the file": (tensors(tensor("a", (2,), 2**40)), "truncated: tensor a ends at byte"),
    "an offset of 2**64 - 32": (tensors(tensor("a", (2,), 2**64 - 32)), "truncated: tensor a ends at byte"),
    "an odd offset": (tensors(tensor("a", (2,), 4)), "tensor a: its offset 4 is no multiple of 32"),
    "an overlap": (tensors(tensor("a", (9,), 0), tensor("b", (2,), 32)), "tensors a and b overlap"),
    "an overlap of the same place": (tensors(tensor("b", (2,), 32), tensor("a", (2,), 32)), "tensors b and a overlap"),
    "keys without number": (
        lambda file: (put("key_count", 2**16 + 1)(file), put("data", bytes(2**20))(file)),
        "65,537 keys are more than 65,536",
    ),
    "tensors without number": (
        lambda file: (put("tensor_count", 2**16 + 1)(file), put("data", bytes(2**21))(file)),
        "65,537 tensors are more than 65,536",
    ),
    "numbers without end": (
        added(*(string(f"x{n}") + struct.pack("<IIQ", ARRAY, 0, 2**20) + bytes(2**20) for n in range(5))),
        "metadata key x3: more than 4,194,304 numbers up to here",
    ),
    "no data": (put("data", b""), "truncated: tensor a ends at byte"),
    "a name of a megabyte": (tensors(tensor("a" * 2**20, (2,), 0)), "a tensor's name at byte .* has 1,048,576 bytes"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    change, message = DAMAGE[name]
    file = two_tensors()
    change(file)
    path = file.write(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole, file = two_tensors().content(), tmp_path / "a.gguf"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_header(file)


def test_every_changed_byte_is_read_or_refused(tmp_path: Path) -> None:
    whole, file = bytearray(two_tensors().content()), tmp_path / "a.gguf"
    messages = []
    for place in range(len(whole) - 52):
        for flipped in (0x01, 0x80, 0xFF):
            whole[place] ^= flipped
            file.write_bytes(whole)
            whole[place] ^= flipped
            try:
                read_header(file)
            except CheckpointError as error:
                messages.append(str(error))
    assert len(messages) > len(whole) and not any("\n" in message for message in messages)


def test_counts_are_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    """A sparse file of 64 GiB, whose header promises a string of half that length."""
    path = File([string("x") + struct.pack("<IQ", STRING, 2**35)]).write(tmp_path / "a.gguf")
    with path.open("r+b") as stream:
        stream.truncate(2**36)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="in x"):
        read_header(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def part(number: int, count: int, *entries: bytes, total: int = 2) -> File:
    keys = [
        key("split.no", 2, number),
        key("split.count", 2, count),
        key("split.tensors.count", I32, total),
    ]
    return File(keys, list(entries), bytes(32))


def parts(folder: Path) -> list[Path]:
    files = [folder / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    part(0, 3).write(files[0])  # tools can leave the first one without tensors
    part(1, 3, tensor("a", (3, 2), 0)).write(files[1])
    part(2, 3, tensor("b", (5,), 0)).write(files[2])
    return files


def test_a_model_in_parts_is_found_by_any_of_them_and_by_its_folder(tmp_path: Path) -> None:
    files = parts(tmp_path)
    (tmp_path / "mmproj-F16.gguf").write_bytes(b"GGUF")
    for path in (*files, tmp_path):
        found = find_gguf(path)
        assert found == files[0]
        model = read_gguf(found)
        assert {name: info.file for name, info in model.tensors.items()} == {"a": files[1], "b": files[2]}
        assert model.parts == tuple(files)


def test_several_models_or_other_weights_make_no_model_of_a_folder(tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None and find_gguf(tmp_path / "none") is None
    parts(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert find_gguf(tmp_path) is None
    (tmp_path / "model.safetensors").unlink()
    two_tensors().write(tmp_path / "other.gguf")
    assert find_gguf(tmp_path) is None
    assert [path.name for path in models_in(tmp_path)] == ["m-00001-of-00003.gguf", "other.gguf"]


def test_a_file_is_recognised_by_its_first_bytes(tmp_path: Path) -> None:
    blob = two_tensors().write(tmp_path / "sha256-3f")
    (tmp_path / "b.gguf").write_bytes(b"GGU")
    assert is_gguf(blob) and find_gguf(blob) == blob
    assert not is_gguf(tmp_path / "b.gguf") and not is_gguf(tmp_path)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = two_tensors().write(tmp_path / "a.gguf")
    assert set(read_gguf(path).tensors) == {"a", "b"}
    File([], [tensor("c", (2,), 0)], bytes(8)).write(path)
    assert set(read_gguf(path).tensors) == {"c"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files[1].unlink(), r"m-00002-of-00003.gguf: missing: part 2 of 3; download it again"),
        (lambda files: files[0].unlink(), r"m-00001-of-00003.gguf: missing: part 1 of 3; download it again"),
        (lambda files: part(2, 3, tensor("a", (2,), 0)).write(files[1]), "split.no is 2, but by its name it is 1"),
        (lambda files: part(1, 4, tensor("a", (2,), 0)).write(files[1]), "split.count is 4, but by its name it is 3"),
        (lambda files: part(1, 3, tensor("b", (2,), 0)).write(files[1]), "tensor b appears twice .also in m-00002-of"),
        (lambda files: part(0, 3, total=3).write(files[0]), "split.tensors.count is 3, but its parts hold 2 tensors"),
        (lambda files: two_tensors().write(files[2]), "split.count is 1, but by its name it is 3"),
    ],
)
def test_damaged_parts_are_named(tmp_path: Path, change: Callable[[list[Path]], object], message: str) -> None:
    files = parts(tmp_path)
    change(files)
    with pytest.raises(CheckpointError, match=message):
        read_gguf(files[0])


def test_a_part_under_another_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"one of 3 parts \(split.count\), but not named as one"):
        read_gguf(part(0, 3).write(tmp_path / "m.gguf"))
    with pytest.raises(CheckpointError, match="99999 parts are not 1 to 1000"):
        read_gguf(part(0, 3).write(tmp_path / "m-00001-of-99999.gguf"))


def test_merged_files_say_that_they_have_no_parts(tmp_path: Path) -> None:
    file = part(0, 0, tensor("a", (2,), 0), total=1).write(tmp_path / "m.gguf")
    assert set(read_gguf(file).tensors) == {"a"}
