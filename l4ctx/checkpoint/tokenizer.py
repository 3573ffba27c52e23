"""A checkpoint's `tokenizer.json`: encodes template text and data, and decodes token ids, also as a stream.

Data never encodes to a control token, whatever it contains. It is encoded in pieces, see `l4ctx.checkpoint.pieces`.
"""

from __future__ import annotations

import codecs
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers

from l4ctx.checkpoint.added_tokens import CutCheck, add_in_order, control_tokens
from l4ctx.checkpoint.aside import Aside, quiet
from l4ctx.checkpoint.growth import normalized_growth
from l4ctx.checkpoint.known import is_known_tokenizer
from l4ctx.checkpoint.pieces import PIECE_CHARACTERS, piece_ends, splits_as_llama4
from l4ctx.checkpoint.tokenizer_trial import why_unfit
from l4ctx.errors import UnusableCheckpointError
from l4ctx.formatting import without_surrogates
from model.checkpoint_files import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, CheckpointFiles, checkpoint_files
from model.folder import UNREADABLE, reason_of

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # read at the first batch; setting it silences fork warnings

BATCH_CHARACTERS = 1 << 16  # characters encoded at once, on all cores: some 2 MB in all
USUAL_GROWTH = 16.0  # by a normalizer, in bytes; beyond it, texts are measured before they are encoded
GROWTH_ALLOWANCE = 1 << 16  # bytes, for short texts
_SHOWN_IDS = 1 << 13  # decoded at a time
MOST_IDS = 1 << 31  # what is kept of ids has 32 bits
MOST_TEMPLATE = 1 << 17  # characters; Llama 4's has 6,000


class TokenizerError(UnusableCheckpointError):
    """A tokenizer that is missing, broken or unsuitable, or a text that it cannot encode."""


@dataclass(frozen=True)
class Encoded:
    """A text's token ids, and the character offsets where it was cut by force (normally none)."""

    ids: array[int]
    forced_cuts: tuple[int, ...] = ()


class Tokenizer:
    """Encodes and decodes with the `tokenizers` library; create it with `from_folder`."""

    def __init__(
        self,
        control: tokenizers.Tokenizer,
        bos_token: str | None = None,
        *,
        settings: Iterable[Mapping[str, Any]] = (),
        template: str = "",
        embeddings: int | None = None,
        is_known: bool = False,
    ) -> None:
        """`control` recognises its added tokens; a second encoder, for data, is built from its parts.

        The second one recognises no control tokens, only words that were added as text. `settings` and `template` are
        as in `added_tokens.control_tokens`. `embeddings` is the model's vocabulary size; ids beyond it raise
        TokenizerError wherever they occur. The ids of one that `is_known` have no gaps.
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
        self._normalized_growth = normalized_growth(_state(control.normalizer))
        self._aside = Aside()
        self._has_safe_cuts = control.normalizer is None and splits_as_llama4(_state(control.pre_tokenizer))
        self.byte_level = _state(control.decoder).get("type") == "ByteLevel"
        self.vocab_size: int = control.get_vocab_size(with_added_tokens=True)
        most = MOST_IDS if embeddings is None else min(embeddings, MOST_IDS)
        self._embeddings = None if is_known and self.vocab_size <= most else most
        self.bos_id = None if bos_token is None else self.special_id(bos_token)
        if self._has_safe_cuts:
            self._check_alphabet()

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str], embeddings: int | None = None) -> Tokenizer:
        """Loads `tokenizer.json`, or a GGUF file's tokenizer, for a model with this number of embeddings.

        One that is not known is tried first, see `l4ctx.checkpoint.tokenizer_trial`. Raises TokenizerError if it is
        missing, broken or makes too much of a text, and CheckpointError for that of a GGUF file.
        """
        files = checkpoint_files(Path(path))
        content = tokenizer_content(files)
        is_known = is_known_tokenizer(content)
        if not is_known and (reason := why_unfit(content)) is not None:
            raise TokenizerError(f"{files.place(TOKENIZER)}: {reason}")
        with _as_tokenizer_error(f"{files.place(TOKENIZER)}: cannot be loaded"):
            control = tokenizers.Tokenizer.from_buffer(content)
        config = read_settings(files, TOKENIZER_CONFIG)
        bos_token = special_tokens(files).get("bos_token", "<|begin_of_text|>")
        return cls(
            control,
            None if config.get("add_bos_token") is False else bos_token,
            settings=(config, read_settings(files, "special_tokens_map.json")),
            template=_template_source(files, config),
            embeddings=embeddings,
            is_known=is_known,
        )

    @property
    def longest_token(self) -> int | None:
        """The most bytes of UTF-8 that a token stands for; None where a normalizer or a pre-tokenizer other than
        Llama 4's may shorten the text before.
        """
        if not self._has_safe_cuts:
            return None
        of_vocabulary = self._data.get_vocab(with_added_tokens=False)  # a character for each byte
        return max(max(map(len, of_vocabulary)), max((len(text.encode()) for text in self._added.values()), default=0))

    def special_id(self, content: str) -> int | None:
        """The id of the added token `content`; None if there is none."""
        return next((token_id for token_id, token in self._added.items() if token == content), None)

    def check_ids(self, ids: Iterable[int], user: str) -> None:
        """Raises TokenizerError if `user`, such as "the chat template", uses an id beyond the model's embeddings."""
        if self._embeddings is None or (largest := max(ids, default=-1)) < self._embeddings:
            return
        raise TokenizerError(
            f"{user} uses the token {self._control.id_to_token(largest)!r} (id {largest}), but the "
            f"model has {self._embeddings:,} embeddings: tokenizer and weights do not belong together"
        )

    def encode_control(self, text: str) -> list[int]:
        """Encodes template text: added tokens are recognised; nothing is prepended or appended."""
        with _as_tokenizer_error("the template's text cannot be encoded"):
            (encoding,) = self._encoded(self._control, [without_surrogates(text)], "the chat template")
        ids: list[int] = encoding.ids
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
        """Encodes `prefix + text + suffix` as plain text, even where it spells control tokens; appends to `into`.

        Words that were added to the vocabulary as text get their own ids, as in transformers.

        Equal to encoding the whole at once, except at `forced_cuts`; with a pre-tokenizer other than Llama 4's, the
        whole is encoded at once. Peak memory beyond text and ids depends on BATCH_CHARACTERS, not on the length.
        `progress` is called with the number of characters done. Lone surrogates are encoded as U+FFFD. `user` names the
        text in errors. Raises TokenizerError.
        """
        ids = array("i") if into is None else into
        forced: list[int] = []
        is_clear = partial(self._cuts.is_clear, prefix=prefix, suffix=suffix) if self._cuts else None
        ends = piece_ends(text, forced, is_clear) if self._has_safe_cuts else iter([len(text)])
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
            encodings = self._encoded(self._data, clean, user)
        for encoding in encodings:
            piece_ids = encoding.ids
            if not self._controls.keys().isdisjoint(piece_ids):
                token = next(self._controls[token_id] for token_id in piece_ids if token_id in self._controls)
                raise TokenizerError(f"plain text was encoded as the control token {token!r}: the tokenizer is unfit")
            self.check_ids(piece_ids, user)
            ids.extend(piece_ids)

    def _encoded(self, encoder: tokenizers.Tokenizer, texts: list[str], user: str) -> list[tokenizers.Encoding]:
        """What is not cut into pieces may take minutes: Ctrl-C comes through, and a panic prints nothing."""
        encode = partial(encoder.encode_batch_fast, texts, add_special_tokens=False)
        if self._has_safe_cuts:
            return encode()
        for text in texts:
            self._check_growth(text, user)
        with quiet():
            return self._aside(encode)

    def _check_growth(self, text: str, user: str) -> None:
        """Raises TokenizerError where the normalizer makes a text many times as long; in pieces, which stay small."""
        if self._normalized_growth <= USUAL_GROWTH:
            return
        left = GROWTH_ALLOWANCE + USUAL_GROWTH * len(text.encode())
        with quiet():
            for start in range(0, len(text), PIECE_CHARACTERS):
                left -= len(self._control.normalizer.normalize_str(text[start : start + PIECE_CHARACTERS]).encode())
                if left < 0:
                    raise TokenizerError(
                        f"{user} would be more than {USUAL_GROWTH:g} times as long after the tokenizer's normalizer"
                    )

    def _check_alphabet(self) -> None:
        """Every byte that occurs in UTF-8 needs its own token, or text would be dropped silently."""
        missing = [_BYTES[character] for character in _BYTES if self._data.token_to_id(character) is None]
        missing = [byte for byte in missing if byte in _UTF8_BYTES]
        if missing:
            raise TokenizerError(f"the tokenizer has no token for {len(missing)} bytes (the first: {missing[0]:#04x})")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` without special tokens; U+FFFD for bytes that are not UTF-8."""
        with _as_tokenizer_error("token ids cannot be decoded"):
            text: str = self._control.decode(list(ids), skip_special_tokens=True)
        return text

    def exact_text(self, ids: Sequence[int]) -> Iterator[str]:
        """The text of `ids` in pieces, with every token as it is spelled, control tokens too."""
        if not self.byte_level:
            with _as_tokenizer_error("token ids cannot be decoded"):
                yield self._control.decode(list(ids), skip_special_tokens=False)
            return
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        added = {token_id: content.encode() for token_id, content in self._added.items()}
        for start in range(0, len(ids), _SHOWN_IDS):
            piece = ids[start : start + _SHOWN_IDS]
            yield utf8.decode(b"".join(added[each] if each in added else self.token_bytes(each) for each in piece))
        yield utf8.decode(b"", final=True)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token of a byte-level tokenizer; empty for special tokens and unknown ids."""
        token = None if token_id in self._special else self._control.id_to_token(token_id)
        if token is None:
            return b""
        values = [_BYTES.get(character) for character in token]
        known = [value for value in values if value is not None]
        return bytes(known) if len(known) == len(values) else token.encode()


class StreamDecoder:
    """Incremental decoding: never emits a partial character; all pieces joined equal `Tokenizer.decode` of all ids.

    The cost of a push does not depend on the number of earlier tokens. With a decoder other than ByteLevel, each push
    decodes a short window of recent tokens again.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown: list[int] = []  # tokens whose text was emitted last, as context for decoding
        self._held: list[int] = []  # tokens whose text was not emitted yet

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; often empty."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._held.append(token_id)
        text = self._held_text()
        if (text.endswith("\ufffd") and len(self._held) < 8) or not text:
            return ""
        self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        """The remaining text: U+FFFD for a character that was never completed."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        text, self._held = self._held_text(), []
        return text

    def _held_text(self) -> str:
        before = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(before) :]


def tokenizer_content(files: CheckpointFiles) -> bytes:
    """The content of `tokenizer.json`. Raises TokenizerError, and CheckpointError for that of a GGUF file."""
    file = files.place(TOKENIZER)
    if not file.is_file():
        raise TokenizerError(f"{file}: no such file (a checkpoint's tokenizer is read from {TOKENIZER})")
    try:
        return files.content(TOKENIZER)
    except OSError as error:
        raise TokenizerError(f"{file}: cannot be read ({error.strerror})") from None


def read_settings(files: CheckpointFiles, name: str) -> dict[str, Any]:
    """A JSON object from one of the checkpoint's files; empty if there is no such file. Raises TokenizerError."""
    try:
        content = files.json(name)
    except FileNotFoundError:
        return {}
    except UNREADABLE as error:
        raise TokenizerError(f"{files.place(name)}: cannot be read as JSON: {reason_of(error)}") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{files.place(name)}: holds no JSON object")
    return content


def special_tokens(files: CheckpointFiles) -> dict[str, str]:
    """`bos_token`, `eos_token`, … from `tokenizer_config.json`, or else from `special_tokens_map.json`."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        for key, value in read_settings(files, name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
    return tokens


def _template_source(files: CheckpointFiles, config: dict[str, Any]) -> str:
    """All of a checkpoint's chat templates, to search for tokens; unreadable ones are reported elsewhere."""
    sources = [config.get("chat_template"), read_settings(files, "chat_template.json").get("chat_template")]
    with suppress(OSError):
        sources.append(files.content(CHAT_TEMPLATE).decode("utf-8", "replace"))
    texts = (
        source if isinstance(source, str) else json.dumps(source, ensure_ascii=False) for source in sources if source
    )
    return "\n".join(texts)[: 2 * MOST_TEMPLATE]  # one that is longer is refused


def _state(component: Any) -> dict[str, Any]:
    """The JSON form of a pre-tokenizer or decoder; empty if there is none."""
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
    """Converts errors of the `tokenizers` library, including panics (not `Exception`s), into TokenizerError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, TokenizerError):
            raise
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{what}: {_one_line(error)}") from None
        raise


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
