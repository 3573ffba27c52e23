"""What a file is, by its first bytes: text, an image, a PDF, or some other kind with a name. Suffixes do not count."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import NamedTuple


class Kind(NamedTuple):
    """The kind of a file that is neither text nor an image nor a PDF.

    `name` has its article; `remedy`, if there is one, says what to do, with {file} where the file's name stands.
    `office` is what `l4ctx.documents.office` calls a format that it reads.
    """

    name: str
    remedy: str = ""
    office: str = ""


_UNPACK = "unpack it and name the folder: "
_TRANSCRIBE = "only text, images and PDF are read: transcribe it first"
_TO_PNG = "convert it to PNG or JPEG, with an image program or: "
_TO_PDF = "save it as PDF or text, or: soffice --headless --convert-to pdf {file}"
_TO_CSV = "save each sheet as CSV, or: soffice --headless --convert-to csv {file}"
_BY_PANDOC = "save it as PDF or text, or: pandoc -t plain {file} -o {file}.txt"
_MODEL = "weights of a model are no document"

RTF = Kind("an RTF document", "save it as PDF or text, or: pandoc -f rtf -t plain {file} -o {file}.txt", "rtf")
ZIP = Kind("a ZIP archive", _UNPACK + "unzip -d unpacked {file}")
_PYTORCH = Kind("a PyTorch file", _MODEL)
_OLD_OFFICE = Kind("an old Office document (DOC, XLS or PPT)", _TO_PDF)

_ZIP, _GZIP, _BZIP2, _XZ = b"PK\3\4", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"
_ZSTANDARD, _7ZIP, _RAR = b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07"
_STARTS = {  # of files of which nothing else has to be looked at
    _GZIP: Kind("gzip-compressed data", "unpack it: gunzip -k {file}"),
    b"\x1f\x9d": Kind("compressed data (compress)", "unpack it: uncompress {file}"),
    _BZIP2: Kind("bzip2-compressed data", "unpack it: bunzip2 -k {file}"),
    _XZ: Kind("xz-compressed data", "unpack it: unxz -k {file}"),
    _ZSTANDARD: Kind("Zstandard-compressed data", "unpack it: zstd -d {file}"),
    b"\x04\x22\x4d\x18": Kind("LZ4-compressed data", "unpack it: lz4 -d {file}"),
    _7ZIP: Kind("a 7-Zip archive", _UNPACK + "7z x -ounpacked {file}"),
    _RAR: Kind("a RAR archive", _UNPACK + "unrar x {file} unpacked/"),
    b"MSCF\0\0": Kind("a CAB archive", _UNPACK + "cabextract -d unpacked {file}"),
    b"!<arch>\n": Kind("an archive of object files or a Debian package"),
    b"\xed\xab\xee\xdb": Kind("an RPM package"),
    b"\xff\x0a": Kind("a JPEG XL image", _TO_PNG + "djxl {file} {file}.png"),
    b"\0\0\0\x0cJXL \r\n\x87\n": Kind("a JPEG XL image", _TO_PNG + "djxl {file} {file}.png"),
    b"\0\0\0\x0cjP  \r\n\x87\n": Kind("a JPEG 2000 image", _TO_PNG + "magick {file} {file}.png"),
    b"8BPS\0": Kind("a Photoshop image", _TO_PNG + "magick {file}[0] {file}.png"),
    b"\0\0\1\0": Kind("an icon (ICO)", _TO_PNG + "magick {file} {file}.png"),
    b"AT&TFORM": Kind("a DjVu document", "convert it: ddjvu -format=pdf {file} {file}.pdf"),
    b"fLaC\0": Kind("FLAC audio", _TRANSCRIBE), b"OggS\0": Kind("Ogg audio or video", _TRANSCRIBE),
    b"ID3": Kind("MP3 audio", _TRANSCRIBE), b"MThd\0\0": Kind("MIDI music"),
    b"#!AMR": Kind("AMR audio", _TRANSCRIBE), b"FLV\1": Kind("FLV video", _TRANSCRIBE),
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": Kind("Windows Media audio or video", _TRANSCRIBE),
    b"\0\0\1\xba": Kind("MPEG video", _TRANSCRIBE), b"\0\0\1\xb3": Kind("MPEG video", _TRANSCRIBE),
    b"GGUF": Kind("a GGUF model", _MODEL), b"\x89HDF\r\n\x1a\n": Kind("an HDF5 file"),
    b"\x93NUMPY": Kind("a NumPy array"),
    b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19": _PYTORCH,
    b"SQLite format 3\0": Kind("an SQLite database", "write it as text: sqlite3 {file} .dump > {file}.sql"),
    b"PAR1": Kind("a Parquet table", "export it as CSV or JSON"), b"ORC": Kind("an ORC table", "export it as CSV"),
    b"ARROW1\0\0": Kind("an Arrow table", "export it as CSV or JSON"),
    b"\x7fELF": Kind("a program or library (ELF)"), b"\0asm": Kind("a WebAssembly module"),
    b"dex\n": Kind("Android bytecode"),
    **dict.fromkeys((b"\xfe\xed\xfa\xce", b"\xfe\xed\xfa\xcf", b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe"),
                    Kind("a program or library (Mach-O)")),
    **dict.fromkeys((b"\0\1\0\0\0", b"true\0", b"OTTO\0", b"ttcf\0", b"wOFF\0", b"wOF2\0", b"wOFFOTTO", b"wOF2OTTO",
                     b"wOFFtrue"), Kind("a font")),
    b"bplist00": Kind("a binary property list", "convert it: plutil -convert xml1 {file}"),
    b"PACK\0": Kind("a Git pack"), b"DIRC\0": Kind("a Git index"),
}  # fmt: skip
_BRANDS = {  # of ISO base media files, in their order of precedence
    "a HEIC image": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "an AVIF image": (b"avif", b"avis"),
    "a HEIF image": (b"mif1", b"msf1", b"miaf"), "a raw photograph (CR3)": (b"crx ",),
    "M4A audio": (b"M4A ", b"M4B "), "a QuickTime video (MOV)": (b"qt  ",),
}  # fmt: skip
_RIFF = {b"WAVE": "WAV audio", b"AVI ": "an AVI video", b"AIFF": "AIFF audio", b"AIFC": "AIFF audio"}
_OFFICE_FOLDERS = {  # of a ZIP archive
    "word/": Kind("a Word document (DOCX)", _BY_PANDOC, "docx"),
    "xl/": Kind("an Excel workbook (XLSX)", _TO_CSV, "xlsx"),
    "ppt/": Kind("a PowerPoint presentation (PPTX)", _TO_PDF, "pptx"),
    "visio/": Kind("a Visio drawing (VSDX)", _TO_PDF),
}  # fmt: skip
_MIME_TYPES = {  # the beginnings; of what a ZIP archive's first entry says
    b"application/epub+zip": Kind("an EPUB book", _BY_PANDOC, "epub"),
    b"application/vnd.oasis.opendocument.text": Kind("an OpenDocument text (ODT)", _BY_PANDOC, "odt"),
    b"application/vnd.oasis.opendocument.spreadsheet": Kind("an OpenDocument spreadsheet (ODS)", _TO_CSV),
    b"application/vnd.oasis.opendocument.presentation": Kind("an OpenDocument presentation (ODP)", _TO_PDF),
    b"application/vnd.oasis.opendocument": Kind("an OpenDocument file", _TO_PDF),
}  # fmt: skip
_STREAMS = {  # of an OLE2 compound file
    "WordDocument": Kind("an old Word document (DOC)", _TO_PDF),
    "Workbook": Kind("an old Excel workbook (XLS)", _TO_CSV),
    "PowerPoint Document": Kind("an old PowerPoint presentation (PPT)", _TO_PDF),
    "__properties_version1.0": Kind("an Outlook message (MSG)", "save it as text or .eml"),
    "EncryptedPackage": Kind("an encrypted Office document", "save it without a password"),
    "Book": Kind("an old Excel workbook (XLS)", _TO_CSV),
}  # fmt: skip


def binary_kind(sample: bytes) -> Kind | None:
    """The kind of a file that begins with `sample` and is known not to be text; None if it is none of those known."""
    for prefix, kind in _STARTS.items():
        if sample.startswith(prefix):
            return kind
    return next((found for look in _LOOKS if (found := look(sample)) is not None), None)


def is_archive(sample: bytes) -> bool:
    """Whether these first bytes are those of an archive, or of one compressed file, as checkpoints are packed in."""
    return sample.startswith((_ZIP, _GZIP, _BZIP2, _XZ, _ZSTANDARD, _7ZIP, _RAR)) or _is_tar(sample)


def is_rtf(sample: bytes) -> bool:
    """Whether this text is the source of an RTF document."""
    return re.match(rb"\{\\rtf[0-9]*[\\{ \r\n]", sample) is not None


def _zip(sample: bytes) -> Kind | None:
    if not sample.startswith((_ZIP, b"PK\5\6", b"PK\7\x08")):
        return None
    entries = list(_zip_entries(sample))
    names = [name for name, _ in entries]
    for name, content in entries:
        if name == "mimetype":
            for start, kind in _MIME_TYPES.items():
                if content.startswith(start):
                    return kind
    if "META-INF/container.xml" in names:
        return _MIME_TYPES[b"application/epub+zip"]
    if "content.xml" in names and ("mimetype" in names or "META-INF/manifest.xml" in names):
        return Kind("an OpenDocument file", _TO_PDF, "odt")
    if "AndroidManifest.xml" in names or "classes.dex" in names:
        return Kind("an Android app (APK)")
    if "[Content_Types].xml" in names or "_rels/.rels" in names:
        for folder, kind in _OFFICE_FOLDERS.items():
            if any(name.startswith(folder) for name in names):
                return kind
        return Kind("an Office document (DOCX, XLSX or PPTX)", _TO_PDF, "ooxml")
    if any(name.startswith("META-INF/MANIFEST.MF") or name.endswith(".class") for name in names):
        return Kind("a Java archive (JAR)")
    if any(name.endswith("/data.pkl") for name in names):
        return _PYTORCH
    if names and all(name.endswith(".npy") for name in names):
        return Kind("NumPy arrays (NPZ)")
    return ZIP


def _zip_entries(sample: bytes) -> list[tuple[str, bytes]]:
    """File names in the sample, in order, each with the bytes that follow it."""
    found = []
    at = sample.find(_ZIP)
    while 0 <= at <= len(sample) - 30:
        name_bytes, extra_bytes = struct.unpack_from("<HH", sample, at + 26)
        begin = at + 30 + name_bytes
        if name_bytes and begin <= len(sample):
            name = sample[at + 30 : begin].decode("utf-8", "replace")
            found.append((name, sample[begin + extra_bytes : begin + extra_bytes + 100]))
        at = sample.find(_ZIP, at + 4)
    return found


def _compound(sample: bytes) -> Kind | None:
    """Microsoft's OLE2; its directory is often within the sample."""
    if not sample.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):
        return None
    for name, kind in _STREAMS.items():
        if name.encode("utf-16-le") + b"\0\0" in sample:
            return kind
    return _OLD_OFFICE


def _iso_media(sample: bytes) -> Kind | None:
    """HEIC, AVIF, MP4 and their like: a box `ftyp` with brands."""
    if sample[4:8] in (b"moov", b"mdat", b"wide", b"free") and sample[:2] == b"\0\0":
        return Kind("a QuickTime video (MOV)", _TRANSCRIBE)
    if sample[4:8] != b"ftyp":
        return None
    box = sample[8 : min(int.from_bytes(sample[:4], "big"), 256)]
    brands = [box[:4], *(box[at : at + 4] for at in range(8, len(box), 4))]
    for brand in brands:
        for name, members in _BRANDS.items():
            if brand in members:
                tool = "magick" if "raw" in name else "heif-convert"
                is_image = "image" in name or "raw" in name
                return Kind(name, f"{_TO_PNG}{tool} {{file}} {{file}}.png" if is_image else _TRANSCRIBE)
    return Kind("an MP4 video", _TRANSCRIBE)


def _container(sample: bytes) -> Kind | None:
    if sample.startswith((b"RIFF", b"FORM")):
        return Kind(_RIFF.get(sample[8:12], "RIFF media"), _TRANSCRIBE)
    if sample.startswith(b"\x1aE\xdf\xa3"):
        return Kind("a WebM video" if b"webm" in sample[:64] else "a Matroska video (MKV)", _TRANSCRIBE)
    if len(sample) > 564 and sample[0] == sample[188] == sample[376] == sample[564] == 0x47:
        return Kind("MPEG video (transport stream)", _TRANSCRIBE)
    if len(sample) > 2 and sample[0] == 0xFF and sample[1] & 0xE6 == 0xE2 and sample[2] & 0xF0 not in (0, 0xF0):
        return Kind("MP3 audio", _TRANSCRIBE)
    return None


def _tar(sample: bytes) -> Kind | None:
    return Kind("a tar archive", _UNPACK + "tar -xf {file}") if _is_tar(sample) else None


def _is_tar(sample: bytes) -> bool:
    return sample[257:262] == b"ustar"


def _model(sample: bytes) -> Kind | None:
    if sample[8:10] == b'{"' and 2 <= int.from_bytes(sample[:8], "little") < 1 << 28:
        return Kind("a safetensors file", _MODEL)
    producer = re.match(rb"\x08[\x01-\x20]\x12([\x01-\x40])([\x20-\x7e]+)", sample)  # ir_version, producer_name
    if producer and producer.group(1)[0] <= len(producer.group(2)):
        return Kind("an ONNX model", _MODEL)
    if re.match(rb"\x80[\x02\x03][\x28\x5d\x7d\x63\x58\x8a\x4b]|\x80[\x04\x05]\x95", sample):
        return Kind("a Python pickle")
    return None


def _program(sample: bytes) -> Kind | None:
    if sample.startswith(b"\xca\xfe\xba\xbe"):
        is_class = int.from_bytes(sample[4:8], "big") >= 45  # the version; else the number of architectures
        return Kind("a Java class" if is_class else "a program or library (Mach-O)")
    if sample[2:4] == b"\r\n" and 2000 <= int.from_bytes(sample[:2], "little") < 4500 and b"\0" in sample[:16]:
        return Kind("Python bytecode (.pyc)")
    if sample.startswith(b"MZ"):
        at = int.from_bytes(sample[60:64], "little")
        return Kind("a Windows program or library (PE)" if sample[at : at + 4] == b"PE\0\0" else "a DOS program")
    return None


_LOOKS: tuple[Callable[[bytes], Kind | None], ...] = (_zip, _compound, _iso_media, _container, _tar, _model, _program)
