"""A checkpoint's `tokenizer.json`: template text and data to token ids, token ids to text, also as a stream.

Text that is data can never become a control token, whatever it contains, and is encoded in pieces cut where the
result is that of the whole. What is template and what is data, and how documents are wrapped, is left to
`l4ctx.prompt.builder`; which ids end an answer, to `l4ctx.engine.generate`.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from l4ctx.checkpoint.added_tokens import CutCheck, add_in_order, control_tokens
from l4ctx.errors import UnusableCheckpointError
from l4ctx.formatting import without_surrogates
from model.folder import UNREADABLE, read_json

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # read at the first batch; set, a later fork does not warn

PIECE_CHARACTERS = 4096  # a piece ends at the first safe cut after this many characters
BATCH_CHARACTERS = 1 << 16  # pieces encoded at once, by as many threads as there are cores: some 2 MB in all
LONGEST_PIECE = 1 << 17  # without a safe cut within this many characters a piece is cut by force

# The pattern of Llama 4's pre-tokenizer, with its groups of up to three digits or with single ones.
_LETTERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
)
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA4_PATTERNS = frozenset(_LETTERS + digits + _OTHERS for digits in (r"\p{N}{1,3}", r"\p{N}"))

# Where that pattern always splits, and neither side's split depends on the other (no alternative of the pattern
# holds a line end or a visible character before what is listed here; its one look-ahead, after white space, sees
# the same on either side): before what follows a line end, except white space and "/"; before a space that
# follows something visible; before ASCII punctuation, except "'", that follows an ASCII letter or digit.
_SAFE_CUT = re.compile(r"(?<=[\r\n])[^\s/]|(?<=\S) |(?<=[A-Za-z0-9])[!-&(-/:-@\[-`{-~]")


class TokenizerError(UnusableCheckpointError):
    """A tokenizer that is missing, broken or unfit, or a text it cannot encode: one line."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of a text, and the character offsets in it where it was cut by force (normally none)."""

    ids: array[int]
    forced_cuts: tuple[int, ...] = ()


class Tokenizer:
    """Encodes and decodes with the `tokenizers` library; made by `from_folder`."""

    def __init__(
        self,
        control: tokenizers.Tokenizer,
        bos_token: str | None = None,
        *,
        settings: Iterable[Mapping[str, Any]] = (),
        template: str = "",
        embeddings: int | None = None,
    ) -> None:
        """`control` recognises its added tokens; an encoder for data is made from its parts.

        That one recognises no control tokens, but words that were added as text; `settings` and `template` are as in
        `added_tokens.control_tokens`. `embeddings`: how many tokens the model has; an id beyond them is refused
        wherever it comes up.
        """
        control.no_truncation()
        control.no_padding()
        self._control = control
        self._data = tokenizers.Tokenizer(control.model)  # the same model, shared: no added tokens, nothing after it
        if control.normalizer is not None:
            self._data.normalizer = control.normalizer
        if control.pre_tokenizer is not None:
            self._data.pre_tokenizer = control.pre_tokenizer
        added = control.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        control_contents = control_tokens(added.values(), settings, template)
        self._controls = {token_id: content for token_id, content in self._added.items() if content in control_contents}
        self._cuts: CutCheck | None = None
        if len(self._controls) < len(self._added):
            if not add_in_order(self._data, added, control_contents):
                raise TokenizerError("the ids of the added tokens do not follow those of the vocabulary")
            self._cuts = CutCheck(self._added.values())
        self._has_safe_cuts = control.normalizer is None and _is_llama4(_state(control.pre_tokenizer))
        self.byte_level = _state(control.decoder).get("type") == "ByteLevel"
        self.vocab_size: int = control.get_vocab_size(with_added_tokens=True)
        self._embeddings = embeddings if embeddings is not None and self.vocab_size > embeddings else None
        self.bos_id = None if bos_token is None else self.special_id(bos_token)
        if self._has_safe_cuts:
            self._check_alphabet()

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str], embeddings: int | None = None) -> Tokenizer:
        """Load `tokenizer.json` of a checkpoint folder, for a model that has embeddings for so many tokens.

        Raises TokenizerError where it is missing or broken.
        """
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(f"{file}: no such file (a checkpoint's tokenizer is read from tokenizer.json)")
        with _as_tokenizer_error(f"{file}: cannot be loaded"):
            control = tokenizers.Tokenizer.from_file(os.fspath(file))
        config = read_settings(Path(path) / "tokenizer_config.json")
        bos_token = special_tokens(path).get("bos_token", "<|begin_of_text|>")
        return cls(
            control,
            None if config.get("add_bos_token") is False else bos_token,
            settings=(config, read_settings(Path(path) / "special_tokens_map.json")),
            template=_template_source(Path(path), config),
            embeddings=embeddings,
        )

    def special_id(self, content: str) -> int | None:
        """The id of the added token written `content`, if there is one."""
        return next((token_id for token_id, token in self._added.items() if token == content), None)

    def check_ids(self, ids: Iterable[int], user: str) -> None:
        """Raises TokenizerError where `user`, such as "the chat template", uses an id beyond the model's embeddings."""
        if self._embeddings is None or (largest := max(ids, default=-1)) < self._embeddings:
            return
        raise TokenizerError(
            f"{user} uses the token {self._control.id_to_token(largest)!r} (id {largest}), but the "
            f"model has {self._embeddings:,} embeddings: tokenizer and weights do not belong together"
        )

    def encode_control(self, text: str) -> list[int]:
        """Ids of template text: added tokens are recognised; nothing is added before or after."""
        with _as_tokenizer_error("the template's text cannot be encoded"):
            ids: list[int] = self._control.encode(without_surrogates(text), add_special_tokens=False).ids
        self.check_ids(ids, "the chat template")
        return ids

    def encode_data(
        self,
        text: str,
        *,
        prefix: str = "",
        suffix: str = "",
        into: array[int] | None = None,
        user: str = "a text",
        progress: Callable[[int], None] | None = None,
    ) -> Encoded:
        """Ids of `prefix + text + suffix` as plain text, whatever control tokens it spells, appended to `into`.

        Words that were added to the vocabulary as text get their own ids, as in transformers.

        Equal to encoding the whole at once, except at `forced_cuts`; with another pre-tokenizer than Llama 4's
        the whole is what is encoded. Peak memory beyond text and ids follows BATCH_CHARACTERS, not the length.
        `progress` is called with the number of characters done. Lone surrogates are encoded as U+FFFD. `user` is whose
        text it is, for errors.
        """
        ids = array("i") if into is None else into
        forced: list[int] = []
        is_clear = partial(self._cuts.is_clear, prefix=prefix, suffix=suffix) if self._cuts else None
        ends = _piece_ends(text, forced, is_clear) if self._has_safe_cuts else iter([len(text)])
        batch: list[str] = []
        start = size = 0
        for end in ends:
            piece = text[start:end] if start else prefix + text[:end]
            batch.append(piece + suffix if end == len(text) else piece)
            size += len(batch[-1])
            start = end
            if size >= BATCH_CHARACTERS or end == len(text):
                self._encode_batch(batch, ids, user)
                batch, size = [], 0
                if progress is not None:
                    progress(end)
        return Encoded(ids, tuple(forced))

    def _encode_batch(self, pieces: list[str], ids: array[int], user: str) -> None:
        clean = [without_surrogates(piece) for piece in pieces]
        with _as_tokenizer_error("a text cannot be encoded"):
            encodings = self._data.encode_batch_fast(clean, add_special_tokens=False)
        for encoding in encodings:
            piece_ids = encoding.ids
            if not self._controls.keys().isdisjoint(piece_ids):
                token = next(self._controls[token_id] for token_id in piece_ids if token_id in self._controls)
                raise TokenizerError(f"plain text was encoded as the control token {token!r}: the tokenizer is unfit")
            self.check_ids(piece_ids, user)
            ids.extend(piece_ids)

    def _check_alphabet(self) -> None:
        """Every byte of UTF-8 needs a token of its own, or text would be lost without a word."""
        missing = [_BYTES[character] for character in _BYTES if self._data.token_to_id(character) is None]
        missing = [byte for byte in missing if byte in _UTF8_BYTES]
        if missing:
            raise TokenizerError(f"the tokenizer has no token for {len(missing)} bytes (the first: {missing[0]:#04x})")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens left out; U+FFFD for bytes that are not UTF-8."""
        with _as_tokenizer_error("token ids cannot be decoded"):
            text: str = self._control.decode(list(ids), skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token of a byte-level tokenizer; none for control tokens and unknown ids."""
        token = None if token_id in self._special else self._control.id_to_token(token_id)
        if token is None:
            return b""
        values = [_BYTES.get(character) for character in token]
        known = [value for value in values if value is not None]
        return bytes(known) if len(known) == len(values) else token.encode()


class StreamDecoder:
    """Text of token ids as they come: never half a character; all pieces joined are `Tokenizer.decode` of all ids.

    The cost of a push does not depend on how many came before. With a decoder other than ByteLevel, a short
    window of the last tokens is decoded again at every push.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown: list[int] = []  # the window: tokens whose text is out, as context for
        self._held: list[int] = []  # tokens whose text is not

    def push(self, token_id: int) -> str:
        """The text that is complete now that `token_id` has come; often empty."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._held.append(token_id)
        text = self._held_text()
        if (text.endswith("\ufffd") and len(self._held) < 8) or not text:
            return ""
        self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that was never completed."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        text, self._held = self._held_text(), []
        return text

    def _held_text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint; empty where there is no such file."""
    try:
        content = read_json(file)
    except FileNotFoundError:
        return {}
    except UNREADABLE as error:
        raise TokenizerError(f"{file}: cannot be read as JSON: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{file}: holds no JSON object")
    return content


def special_tokens(path: str | os.PathLike[str]) -> dict[str, str]:
    """`bos_token`, `eos_token`, … of a checkpoint folder: `tokenizer_config.json`, then `special_tokens_map.json`."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_settings(Path(path) / name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
    return tokens


def _template_source(folder: Path, config: dict[str, Any]) -> str:
    """All that a checkpoint has as chat templates, to look for tokens in; what cannot be read is refused elsewhere."""
    sources = [config.get("chat_template"), read_settings(folder / "chat_template.json").get("chat_template")]
    with suppress(OSError):
        sources.append((folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace"))
    return "\n".join(
        source if isinstance(source, str) else json.dumps(source, ensure_ascii=False) for source in sources if source
    )


def _piece_ends(text: str, forced: list[int], is_clear: Callable[[str, int], bool] | None = None) -> Iterator[int]:
    """Ends of the pieces of `text`, the last being its length; forced ones are added to `forced`.

    `is_clear` has a say in the others.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + LONGEST_PIECE
        found = _SAFE_CUT.search(text, start + PIECE_CHARACTERS, limit)
        while found is not None and is_clear is not None and not is_clear(text, found.start()):
            found = _SAFE_CUT.search(text, found.start() + 1, limit)
        if found is not None:
            start = found.start()
        elif len(text) <= limit:
            break
        else:
            start = limit - (text[limit - 1 : limit + 1] == "\r\n")
            forced.append(start)
        yield start
    yield len(text)


def _is_llama4(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether the pre-tokenizer is Llama 4's: its pattern, each match isolated, then bytes."""
    parts = pre_tokenizer.get("pretokenizers", [])
    if pre_tokenizer.get("type") != "Sequence" or [part.get("type") for part in parts] != [
        "Split",
        "ByteLevel",
    ]:
        return False
    split, byte_level = parts
    return (
        split["pattern"].get("Regex") in _LLAMA4_PATTERNS
        and (split["behavior"], split["invert"]) == ("Isolated", False)
        and (byte_level["add_prefix_space"], byte_level["use_regex"]) == (False, False)
    )


def _state(component: Any) -> dict[str, Any]:
    """The JSON form of a pre-tokenizer or decoder; empty where there is none."""
    return {} if component is None else json.loads(component.__getstate__())


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's character for each byte: itself where printable in Latin-1, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()
_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1} - frozenset(range(0xF5, 0x100))


@contextmanager
def _as_tokenizer_error(what: str) -> Iterator[None]:
    """Errors of the `tokenizers` library, panics included (they are no `Exception`), become a TokenizerError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{what}: {_one_line(error)}") from None
        raise


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
