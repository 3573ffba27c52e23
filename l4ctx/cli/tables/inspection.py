"""The report of `l4ctx inspect` as plain, aligned lines."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from l4ctx.cli.tables.layout import INDENT, NARROWEST_TEXT
from l4ctx.cli.wrapping import cells, wrapped
from l4ctx.contexts.folder import RECREATE
from l4ctx.formatting import as_one_line, counted, human_bytes
from l4ctx.inspection.report import Report

SHOWN_LINES = 20
LABEL_COLUMNS = 17


def listing(report: Report, width: int | None = None) -> str:
    """The report as plain, aligned lines; with a `width`, wrapped at words to fit into so many columns."""
    kind, lines = ("a checkpoint", _model_lines) if report["kind"] == "model" else ("a saved context", _context_lines)
    version = f", version {report['version']} of the format" if report.get("version") else ""
    text = [f"{report['path']}: {kind}{version}"]
    for label, value in [*lines(report), *_damage_lines(report)]:
        line = f"{label:{LABEL_COLUMNS}}{value}"
        text += [line] if width is None or cells(_clean(line)) <= width else _narrow(label, value, width)
    return "".join(f"{_clean(line)}\n" for line in text)


def _narrow(label: str, value: str, width: int) -> Iterator[str]:
    """The value beside its label if there is enough room, else below it."""
    if width < LABEL_COLUMNS + NARROWEST_TEXT:
        yield from [label] if label else []
        yield from wrapped(_clean(value), width, INDENT)
        return
    for number, line in enumerate(wrapped(_clean(value), width, LABEL_COLUMNS)):
        yield f"{label:{LABEL_COLUMNS}}{line.lstrip()}" if number == 0 else line


def _clean(line: str) -> str:
    return as_one_line(line).replace("\t", " ").rstrip()


Line = tuple[str, str]


def _model_lines(report: Report) -> Iterator[Line]:
    config, weights, vision = report.get("config"), report.get("weights"), report.get("vision")
    if report.get("architecture"):
        yield "architecture", report["architecture"]
    if config:
        stored = f", {weights['parameters']:,} are stored" if weights and weights["shards"] else ""
        yield "parameters", f"{config['parameters']:,} by the configuration{stored}"
    if weights and not weights["shards"]:
        yield "weights", "no weights there"
    elif weights:
        dtypes = "".join(f", {count:,} tensors in {dtype}" for dtype, count in weights["dtypes"].items())
        shards = counted(weights["shards"], "shard")
        if weights["readable_shards"] < weights["shards"]:
            shards = f"{weights['readable_shards']:,} of {shards}"
        yield "weights", f"{human_bytes(weights['bytes'])} in {shards}{dtypes}"
        for owner, name in (("vision", "vision"), ("ignored", "not used")):
            if weights[f"{owner}_tensors"]:
                yield "", f"{name}: {weights[f'{owner}_tensors']:,} tensors, {human_bytes(weights[f'{owner}_bytes'])}"
        if vision and vision["has_tensors"] is False:
            yield "", "vision: described in config.json, but no tensors are there; --no-images reads the text alone"
        if weights["not_read"]:
            yield "", weights["not_read"]
        yield from _stored_lines(weights)
    if config:
        yield from _config_lines(config)
    for number, text in enumerate(report.get("assumed", ())):
        yield "" if number else "assumed", text + " (not in the file: as llama.cpp computes)" * (number == 0)
    if vision and vision["has_tensors"] is not False:
        yield (
            "images",
            (
                f"tiles of {vision['image_size']} x {vision['image_size']} pixels, "
                f"{vision['tokens_per_tile']} tokens each"
            ),
        )
    if report.get("tokenizer_vocabulary"):
        over = max(0, report["tokenizer_vocabulary"] - config["vocab_size"]) if config else 0
        yield (
            "tokenizer",
            f"{report['tokenizer_vocabulary']:,} tokens"
            + (f", {over:,} more than the model has embeddings for: a text that uses one is refused" if over else ""),
        )
    if "chat_template" in report:
        yield "chat template", {True: "yes", False: "no", None: "cannot be read"}[report["chat_template"]]
    if "confinement" in report:  # of templates and tokenizers that are not known
        means = report["confinement"] or {"no process can be started": True}
        yield "confinement", ", ".join(name if holds else f"no {name}" for name, holds in means.items())
    if report.get("stop_tokens") is not None:
        yield "stop tokens", ", ".join(map(str, report["stop_tokens"])) or "none"


def _stored_lines(weights: Report) -> Iterator[Line]:
    if weights["stored_as"]:
        yield "stored as", weights["stored_as"]
    shares = weights["by_owner"]
    widths = [max(map(len, column)) for column in zip(*map(_share_cells, shares), strict=True)]
    for number, share in enumerate(shares):
        owner, parameters, size = _share_cells(share)
        line = f"{owner:{widths[0]}}  {parameters:>{widths[1]}}  {size:>{widths[2]}}  {share['stored']}"
        yield "by owner" if number == 0 else "", line


def _share_cells(share: Report) -> tuple[str, str, str]:
    return share["owner"], f"{share['parameters']:,} weights", human_bytes(share["bytes"])


def _config_lines(config: Report) -> Iterator[Line]:
    total, rope, nope = config["num_hidden_layers"], config["num_rope_layers"], config["num_nope_layers"]
    moe = len(config["moe_layers"])
    yield "layers", f"{total}: {rope} RoPE, {nope} NoPE; {moe} with experts (MoE)"
    if moe:
        yield "experts", f"{config['num_local_experts']} in each MoE layer, {config['num_experts_per_tok']} a token"
    yield "hidden size", f"{config['hidden_size']:,}"
    yield (
        "heads",
        (
            f"{config['num_attention_heads']} of size {config['head_dim']}; "
            f"{config['num_key_value_heads']} for keys and values"
        ),
    )
    yield (
        "attention",
        (
            f"chunks of {config['attention_chunk_size']:,} tokens; "
            f"{config['max_position_embeddings']:,} positions; temperature tuning "
            f"{'on' if config['attn_temperature_tuning'] else 'off'}"
        ),
    )
    yield "rope", f"{config['rope_parameters']['rope_type']}, theta {config['rope_parameters']['rope_theta']:,.0f}"
    yield "vocabulary", f"{config['vocab_size']:,}"
    yield (
        "keys and values",
        (
            f"{human_bytes(config['kv_bytes_per_token_bf16'])} a token in bfloat16, and windows of "
            f"{human_bytes(config['window_bytes_bf16'])}"
        ),
    )


def _context_lines(report: Report) -> Iterator[Line]:
    from l4ctx.checkpoint.fingerprint import FIELDS

    made, sizes = report.get("made_with"), report.get("bytes")
    if made:
        yield (
            "made with",
            (
                f"{made['dtype']}, blocks in {made['kv_dtype']}, attention {made['attention']}, prefill "
                f"chunks of {made['prefill_chunk_size']:,}"
            ),
        )
        yield "", f"blocks of {made['block_tokens']:,} tokens in segments of {made['segment_tokens']:,}"
        yield "date", made["date"]
        if report.get("checkpoint"):
            yield "checkpoint", report["checkpoint"]
        yield (
            "" if report.get("checkpoint") else "checkpoint",
            ", ".join(f"{name} {made[name][:12]}" for name in FIELDS),
        )
    if sizes:
        parts = ", ".join(f"{name.replace('_', ' ')} {human_bytes(count)}" for name, count in sizes.items())
        yield "on disk", f"{human_bytes(sum(sizes.values()))}: {parts}"
    elif made and "bytes" in report and report.get("states"):
        yield "on disk", "unknown: the folder cannot be listed"
    if "." in report.get("others_have_rights_on", ()):  # else nobody gets to the files
        yield "permissions", "others may enter the folder; the next l4ctx prefill into it makes it yours alone"
    is_written = bool(report.get("is_being_written"))
    for state in report.get("states", ()):
        yield from _state_lines(state, is_written=is_written)
    if made and not report["states"] and not report["damage"]:
        yield (
            "documents",
            "none yet: "
            + (
                "a writer has just begun"
                if is_written
                else "the l4ctx prefill command that made the context resumes it"
            ),
        )


def _state_lines(state: Report, *, is_written: bool) -> Iterator[Line]:
    documents, images, tokens = state["documents"], state["images"], f"{state['tokens']:,} tokens"
    done = (
        f"{tokens}, complete"
        if state["is_complete"]
        else (
            f"still being read, {state['kept_tokens']:,} of {tokens} so far"
            if is_written and state["is_newest"]
            else f"interrupted after {state['kept_tokens']:,} of {tokens}: the same l4ctx prefill command resumes it"
        )
    )
    blocks = f"{'a system prompt, ' * state['has_system_prompt']}{state['sealed_blocks']:,} sealed blocks"
    yield "documents" if state["is_newest"] else "before that", f"{done} ({blocks})"
    for document in (documents or ())[:SHOWN_LINES]:
        yield "", f"{document['tokens']:>11,} tokens  {document['sha256'][:12]:12}  {document['path']}"
    if documents and len(documents) > SHOWN_LINES:
        yield "", f"and {len(documents) - SHOWN_LINES:,} more (--json lists them all)"
    if documents is None:
        yield "", "which documents these are cannot be read"
    if images:
        yield "images", f"{len(images):,}, {sum(image['tokens'] for image in images):,} tokens"
    elif images is None and documents is not None:
        yield "images", "which these are cannot be read"


def _damage_lines(report: Report) -> Iterator[Line]:
    damage = [entry["what"] for entry in report["damage"]]
    if not damage:
        yield (
            "damage",
            "none, every byte was read"
            if report["verified"]
            else ("none in headers and lengths (--verify reads every byte)"),
        )
    for number, what in enumerate(damage[:SHOWN_LINES]):
        yield "damage" if number == 0 else "", what
    if len(damage) > SHOWN_LINES:
        yield "", f"and {len(damage) - SHOWN_LINES:,} more (--json lists them all)"
    if any(what.endswith(RECREATE) for what in damage):
        yield "to keep", "nothing can be kept"
    for state in report.get("states", ()):
        if state["damaged"]:
            tokens = state["can_keep_tokens"]
            kept = f"the first {tokens:,} tokens" if tokens else "no tokens"
            yield (
                "to keep" if state["is_newest"] else "before that",
                (
                    f"{kept} can be kept: l4ctx prefill --verify with the same documents and "
                    f"-o {shlex.quote(report['path'])} reads the rest again"
                ),
            )
