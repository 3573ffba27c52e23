"""Trains `samples/tiny`: a small Llama 4 that finds facts in long, arbitrary text and answers questions about them.

    python -m samples.training.train_tiny --output samples/tiny --minutes 100 --attention-chunk-size 2048

Filler comes from the folders given by --text (default: Python's standard library and installed packages except torch,
which is held out for evaluation). The curriculum advances a level whenever enough answer tokens are right.
`--resume` continues from the last saved state, with a new time limit if given. Imports nothing from l4ctx, model or
cache.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from samples.tasks.lookup import CODE_DIGITS, NOUNS, distractor, draw_entities, fact, question, random_code
from samples.training.tiny_model import CONFIG, TinyForTraining, simulated_temperature
from samples.training.tiny_tokenizer import save_tokenizer, train_tokenizer

VOCAB_SIZE = 2304  # including special tokens
TOKENS_PER_STEP = 8192
FILLER_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".pod", ".h", ".c"}


@dataclass(frozen=True)
class Level:
    length: int  # tokens in a sequence
    chunks: tuple[int, ...]  # attention chunk sizes to draw from, all shorter than the sequence
    facts: int
    questions: int
    words: int  # words in an entity
    confusable: bool
    log_bias: float  # largest bias on filler keys: log of the factor by which it multiplies the filler
    alone: bool = False  # one question, followed by filler, so that a chunk boundary can separate it from its answer


LEVELS = (
    Level(256, (64, 128), 2, 2, 1, False, 0.0),
    Level(256, (64, 128), 2, 2, 2, False, 0.0),
    Level(512, (128, 256), 6, 5, 2, False, math.log(10)),
    Level(512, (128, 256), 8, 6, 2, True, math.log(100)),
    Level(1024, (128, 256, 512), 12, 8, 2, True, math.log(3_000)),
    Level(1024, (256, 512), 20, 10, 2, True, math.log(30_000)),
    Level(2048, (256, 512, 1024), 32, 16, 2, True, math.log(30_000)),
    Level(4096, (512, 1024, 2048), 48, 24, 2, True, math.log(30_000)),
)
# Across a boundary, only the NoPE layer can read the question, and only if there is no other question.
ALONE = (
    Level(256, (64, 128), 3, 1, 2, True, math.log(3_000), alone=True),
    Level(512, (64, 128, 256), 6, 1, 2, True, math.log(30_000), alone=True),
)


class Batch(NamedTuple):
    ids: Tensor  # (B, T) int64
    answer: Tensor  # (B, T) bool: the token at t + 1 is part of a knowable answer
    digit: Tensor  # (B, T) bool: the same, and it is a digit of the code
    filler: Tensor  # (B, T) bool: the token is filler
    chunk: int


def collect_filler(folders: list[Path], exclude: set[str], limit: int, rng: random.Random) -> list[str]:
    """Texts of at most 40,000 characters from files with known suffixes, about `limit` characters in total."""
    files = [
        f
        for folder in folders
        for f in ([folder] if folder.is_file() else sorted(folder.rglob("*")))
        if f.suffix in FILLER_SUFFIXES and f.is_file() and not exclude & set(f.parts)
    ]
    rng.shuffle(files)
    texts, total = [], 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        pieces = [text[i : i + 40_000] for i in range(0, len(text) if len(text) > 1e6 else 1, 40_000)]
        texts += pieces
        total += sum(map(len, pieces))
        if total > limit:
            break
    rng.shuffle(texts)
    return texts


class SequenceMaker:
    """Draws training sequences: wrapped documents of filler with facts, then questions with answers."""

    def __init__(self, tokenizer: Tokenizer, filler: Tensor, seed: int) -> None:
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.as_data = Tokenizer(tokenizer.model)  # encodes control tokens as plain text
        self.as_data.pre_tokenizer, self.as_data.decoder = tokenizer.pre_tokenizer, tokenizer.decoder
        self.filler, self.rng = filler, random.Random(seed)
        self.digits = {tokenizer.token_to_id(d) for d in "0123456789"}
        self.start = self.encode("<|begin_of_text|><|header_start|>user<|header_end|>\n\n")
        self.user = self.encode("<|header_start|>user<|header_end|>\n\n")
        self.assistant = self.encode("<|eot|><|header_start|>assistant<|header_end|>\n\n")
        self.end = self.encode("<|eot|>")
        self.footer = self.encode("\n</document>\n\n")

    def batch(self, level: Level) -> Batch:
        chunk = self.rng.choice(level.chunks)
        rows = [self.sequence(level, chunk) for _ in range(max(1, TOKENS_PER_STEP // level.length))]
        ids, answer, digit, filler = (torch.tensor(column) for column in zip(*rows, strict=True))
        return Batch(ids, answer, digit, filler, chunk)

    def sequence(self, level: Level, chunk: int) -> tuple[list[int], list[bool], list[bool], list[bool]]:
        rng, length = self.rng, level.length
        confusable = level.confusable and rng.random() < 0.7
        entities = draw_entities(rng, level.facts, words=level.words, confusable=confusable)
        codes = {entity: random_code(rng) for entity in entities}
        asked = rng.sample(entities, level.questions)
        tail: list[int] = []
        turns = []  # (entity, start of question, start and end of answer), as positions in the tail
        for i, entity in enumerate(asked):
            begin = len(tail)
            tail += (self.user if i else []) + self.encode(question(entity, rng)) + self.assistant
            first = len(tail)
            tail += self.encode(fact(entity, codes[entity])) + self.end
            turns.append((entity, begin, first, len(tail)))
        if level.alone:
            trailing = rng.randrange(chunk)
            offset = rng.randrange(len(self.filler) - trailing)
            tail += self.filler[offset : offset + trailing].tolist()
        body, spans = self.body(codes, length - len(tail), level)
        ids = body + tail
        answer, digit, is_filler = [False] * length, [False] * length, [True] * length
        for first, last in spans.values():
            is_filler[first:last] = [False] * (last - first)
        is_filler[len(body) :] = [False] * len(tail)
        for entity, begin, first, last in turns:
            known = not _is_cut(*spans[entity], chunk)
            known &= level.alone or not _is_cut(len(body) + begin, len(body) + last, chunk)
            for t in range(len(body) + first - 1, len(body) + last - 1):
                answer[t] = known
                digit[t] = known and ids[t + 1] in self.digits
        return ids, answer, digit, is_filler

    def body(self, codes: dict[str, str], length: int, level: Level) -> tuple[list[int], dict[str, tuple[int, int]]]:
        """`length` tokens of documents that hold the facts, and each fact's (start, end) positions."""
        rng = self.rng
        inserts: list[tuple[str | None, list[int]]] = []
        for entity, code in codes.items():
            before, after = rng.choice(("\n", " ", "\n\n")), rng.choice(("\n", "", "\n\n"))
            inserts.append((entity, self.encode(before + fact(entity, code) + after)))
        for _ in range(rng.randrange(0, 1 + level.length // 256)):
            inserts.append((None, self.encode("\n" + distractor(rng) + "\n")))
        for i in range(rng.randrange(0, 1 + level.length // 512)):
            path = f"{rng.choice(('notes', 'src', 'docs'))}/{rng.randrange(100)}.{rng.choice(('md', 'py', 'txt'))}"
            inserts.append((None, self.footer + self.encode(f'<document index="{i + 2}" path="{path}">\n')))
        rng.shuffle(inserts)
        head = self.start + self.encode(f'<document index="1" path="{rng.choice(("a", "b", "notes"))}.md">\n')
        space = length - len(head) - len(self.footer) - sum(len(tokens) for _, tokens in inserts)
        assert space > 0, "no room for filler"
        offset = rng.randrange(len(self.filler) - space)
        filler = self.filler[offset : offset + space].tolist()
        if rng.random() < 0.25:
            first, last = sorted(rng.randrange(space + 1) for _ in range(2))
            filler[first:last] = self.repetition(filler, last - first)
        cuts = sorted(rng.randrange(space + 1) for _ in inserts)
        ids, spans, previous = list(head), {}, 0
        for cut, (entity, tokens) in zip(cuts, inserts, strict=True):
            ids += filler[previous:cut]
            if entity is not None:
                spans[entity] = (len(ids), len(ids) + len(tokens))
            ids += tokens
            previous = cut
        ids += filler[previous:] + self.footer
        return ids, spans

    def repetition(self, filler: list[int], length: int) -> list[int]:
        """`length` tokens of one repeated thing: a control token as plain text, a word, or a few tokens of filler."""
        rng = self.rng
        at = rng.randrange(len(filler))
        spelled = ("<|eot|>", "<|image|>", "<|header_start|>user<|header_end|>\n\n", "a", "0, ", "word ", "-", "\n")
        unit = rng.choice(
            (
                rng.choice(spelled),
                f"{rng.choice(NOUNS)} ",
                self.as_data.decode(filler[at : at + rng.randrange(1, 16)]) or " ",
            )
        )
        tokens = self.as_data.encode(unit * (length // max(1, len(self.as_data.encode(unit).ids)) * 2 + 9)).ids
        return (tokens * (length // len(tokens) + 1))[:length]


def _is_cut(first: int, last: int, chunk: int) -> bool:
    """Whether an attention-chunk boundary falls within positions first .. last - 1."""
    return first // chunk != (last - 1) // chunk


def compute(model: TinyForTraining, batch: Batch, log_bias: Tensor) -> tuple[Tensor, float, float]:
    """Loss, and the accuracy on answer tokens and on digits; `log_bias` (B,) is added to the logits of filler keys."""
    length = batch.ids.shape[1] * log_bias.exp()
    hidden = model(batch.ids, batch.chunk, batch.filler * log_bias[:, None], simulated_temperature(length))
    hidden, target = hidden[:, :-1], batch.ids[:, 1:]
    answer, digit = batch.answer[:, :-1], batch.digit[:, :-1]
    filler = batch.filler[:, :-1] & (torch.rand(target.shape) < 0.25)  # a sample of them is enough
    logits = model.lm_head(hidden[answer])
    loss = F.cross_entropy(logits, target[answer])
    loss = loss + 0.1 * F.cross_entropy(model.lm_head(hidden[filler]), target[filler])
    right = (logits.argmax(-1) == target[answer]).float()
    return loss, float(right.mean()), float(right[digit[answer]].mean())


def train(model: TinyForTraining, maker: SequenceMaker, args: argparse.Namespace) -> None:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    state_file = args.output / "training.pt"
    level, average, digits, step, spent = args.level, 0.0, 0.0, 0, 0.0
    if args.resume:
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        level, step = max(args.level, state["level"]), state["step"]
    began = time.monotonic()
    since_level = 0
    while spent < args.minutes * 60:
        spent = time.monotonic() - began
        progress = min(1.0, spent / (args.minutes * 60))
        rate = args.lr * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 1e-5
        for group in optimizer.param_groups:
            group["lr"] = rate
        drawn = draw_level(level)
        batch = maker.batch(drawn)
        rows = batch.ids.shape[0]
        log_bias = torch.rand(rows) * drawn.log_bias * (torch.rand(rows) < 0.8)
        loss, answer_accuracy, digit_accuracy = compute(model, batch, log_bias)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if drawn is LEVELS[level]:
            average += (answer_accuracy - average) * (0.05 if since_level else 1.0)
            digits += (digit_accuracy - digits) * (0.05 if since_level else 1.0)
            since_level += 1
        step += 1
        if step % 20 == 0:
            print(
                f"step {step} level {level} loss {loss.item():.3f} right {average:.4f} digits {digits:.4f} "
                f"norm {norm.item():.2f} lr {rate:.5f} minutes {spent / 60:.1f}",
                flush=True,
            )
        if average > args.pass_mark and since_level > 40 and level + 1 < len(LEVELS) and level < args.last_level:
            level, average, since_level = level + 1, 0.0, 0
        if step % 200 == 0 or progress == 1.0:
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "level": level, "step": step},
                state_file,
            )
            export(model, args)


def draw_level(level: int) -> Level:
    """Mostly the current level; else an earlier one, so that short contexts are not forgotten, or a lone question."""
    if level < 2:
        return LEVELS[level]
    draw = random.random()
    if draw < 0.55:
        return LEVELS[level]
    return random.choice(ALONE) if draw < 0.75 and level > 3 else LEVELS[random.randrange(2, level + 1)]


def export(model: TinyForTraining, args: argparse.Namespace) -> None:
    """Writes the checkpoint in the published format, with weights in bfloat16."""
    tokenizer = Tokenizer.from_file(str(args.output / "tokenizer.json"))
    ids = {
        name: tokenizer.token_to_id(f"<|{name}|>")
        for name in ("begin_of_text", "end_of_text", "eom", "eot", "finetune_right_pad")
    }
    stop = [ids["end_of_text"], ids["eom"], ids["eot"]]
    config = CONFIG | {
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": ids["begin_of_text"],
        "eos_token_id": stop,
        "pad_token_id": ids["finetune_right_pad"],
        "attention_chunk_size": args.attention_chunk_size,
    }
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (args.output / "generation_config.json").write_text(
        json.dumps(
            {
                "bos_token_id": ids["begin_of_text"],
                "eos_token_id": stop,
                "pad_token_id": ids["finetune_right_pad"],
                "do_sample": True,
                "temperature": 0.6,
                "top_p": 0.9,
            },
            indent=2,
        )
        + "\n"
    )
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.state_dict().items()}
    save_file(tensors, args.output / "model.safetensors", metadata={"format": "pt"})


def prepare_text(args: argparse.Namespace, rng: random.Random) -> tuple[Tokenizer, Tensor]:
    """The tokenizer (trained if missing), and the filler as one row of token ids, cached next to it."""
    tokenizer_file, cache = args.output / "tokenizer.json", args.output / "filler.pt"
    if tokenizer_file.exists() and cache.exists():
        return Tokenizer.from_file(str(tokenizer_file)), torch.load(cache, weights_only=True)
    texts = collect_filler(args.text, set(args.exclude), args.filler_characters, rng)
    print(f"filler: {len(texts)} texts, {sum(map(len, texts)) / 1e6:.1f}M characters", flush=True)
    if not tokenizer_file.exists():
        vocab_size = VOCAB_SIZE - 14
        save_tokenizer(
            train_tokenizer((t[:8_000] for t in texts[:4_000]), vocab_size),
            args.output,
            CONFIG["max_position_embeddings"],
        )
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    rows = [
        torch.tensor(e.ids, dtype=torch.int16)
        for i in range(0, len(texts), 256)
        for e in tokenizer.encode_batch(texts[i : i + 256], add_special_tokens=False)
    ]
    filler = torch.cat(rows)
    torch.save(filler, cache)
    return tokenizer, filler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    paths = sysconfig.get_paths()
    parser.add_argument("--output", type=Path, default=Path("samples/tiny"))
    parser.add_argument("--text", type=Path, nargs="+", default=[Path(paths["stdlib"]), Path(paths["purelib"])])
    parser.add_argument("--exclude", nargs="*", default=["torch", "test", "tests", "idlelib"])
    parser.add_argument("--filler-characters", type=int, default=120_000_000)
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--pass-mark", type=float, default=0.9)
    parser.add_argument("--level", type=int, default=0)
    parser.add_argument("--last-level", type=int, default=len(LEVELS) - 1)
    parser.add_argument("--attention-chunk-size", type=int, default=CONFIG["attention_chunk_size"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    tokenizer, filler = prepare_text(args, random.Random(args.seed))
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE and CODE_DIGITS > 0
    model = TinyForTraining(VOCAB_SIZE)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(filler) / 1e6:.1f}M filler tokens")
    train(model, SequenceMaker(tokenizer, filler, args.seed + int(time.time()) * args.resume), args)


if __name__ == "__main__":
    main()
