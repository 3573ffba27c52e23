"""Writes the corpus on which perplexity is measured: the README files of a Debian system, as one text file.

    python -m samples.evaluation.debian_corpus corpus.txt

Takes every regular file below /usr/share/doc (no links) whose name begins with README, decompressed where it ends in
.gz, in the order of their paths. Leaves out what is not UTF-8 and what repeats an earlier file byte for byte, and joins
the rest with a line end between them. Prints the text's SHA-256, since the files differ from system to system.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path


def texts(folder: Path) -> Iterator[str]:
    seen: set[bytes] = set()
    for file in sorted(folder.rglob("README*")):
        if file.is_symlink() or not file.is_file():
            continue
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            continue
        seen.add(digest)
        try:
            yield content.decode("utf-8")
        except UnicodeDecodeError:
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="FILE")
    parser.add_argument("--folder", type=Path, default=Path("/usr/share/doc"))
    args = parser.parse_args()
    parts = list(texts(args.folder))
    corpus = "\n".join(parts).encode("utf-8")
    args.output.write_bytes(corpus)
    digest = hashlib.sha256(corpus).hexdigest()
    print(f"{args.output}: {len(parts)} files, {len(corpus):,} bytes, SHA-256 {digest}")


if __name__ == "__main__":
    main()
