"""Triton kernels of a decoder layer for a few tokens: each reads weights, or keys and values, at memory bandwidth.

Rows of one call do not change each other's results, however many there are: tiles always have ROWS rows. `position` is
the absolute position of the first token, in device memory, so that a recorded graph serves every step. Products round
their inputs to 16 bits as PyTorch's do, and sum in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLAIN, INT4_WORDS, CODES = tl.constexpr(0), tl.constexpr(4), tl.constexpr(8)
"""How a matrix is stored: in 16 bits; as 32-bit words of 4-bit codes along K, the first in the low bits, to which 8 is
added; as int8 or float8_e4m3fn codes."""


@triton.jit
def of_words(words, FIRST: tl.constexpr, dtype: tl.constexpr):
    """Codes FIRST and FIRST + 4 of each word (W, N), less 8 -> (2 * W, N) in 16 bits.

    A code becomes the low bits of a number's mantissa, two of them at a time: with the exponent of 128 in bfloat16, or
    of 1024 in float16, that is the number plus the code, exactly. Converting integers takes twice the instructions.
    """
    both = ((words >> (4 * FIRST)) & 0x000F000F) | (0x43004300 if dtype == tl.bfloat16 else 0x64006400)
    low, high = both.to(tl.int16).to(dtype, bitcast=True), (both >> 16).to(tl.int16).to(dtype, bitcast=True)
    codes = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (2 * words.shape[0], words.shape[1]))
    return codes - (136.0 if dtype == tl.bfloat16 else 1032.0)


@triton.jit
def product(
    acc, x, rows, known, x_row, w, scale, columns, n, w_n, w_k, scale_n, scale_k, first, last,
    KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc (R, N) + x (R, first .. last) @ w (N, first .. last).T.

    Of codes each GROUP along K, 32 or a multiple, has a scale, at scale_n and scale_k; a block lies within one. For
    INT4_WORDS BLOCK_K is at least 64, w_n counts bytes, and the words of a row follow one another.
    """
    inside = columns < n
    STEP: tl.constexpr = GROUP if GROUP < BLOCK_K else BLOCK_K
    for start in range(first, last, STEP):
        inner = start + tl.arange(0, BLOCK_K)
        stop = tl.minimum(last, start + STEP)
        seen = inner < stop
        a = tl.load(x + rows[:, None] * x_row + inner[None, :], known[:, None] & seen[None, :], other=0.0)
        if KIND == INT4_WORDS:
            word = tl.multiple_of(start // 8, 4) + tl.arange(0, BLOCK_K // 8)
            there = (word < tl.multiple_of(stop // 8, 4))[:, None] & inside[None, :]
            at = w.to(tl.pointer_type(tl.int32)) + word[:, None] + columns[None, :] * (w_n // 4)
            words = tl.load(at, there, other=0)
            fours = tl.permute(tl.reshape(a, (a.shape[0], BLOCK_K // 4, 2, 2)), (0, 1, 3, 2))
            front, back = tl.split(fours)
            a0, a1 = tl.split(front)
            a2, a3 = tl.split(back)
            part = tl.dot(a0, of_words(words, 0, a.dtype))
            part = tl.dot(a1, of_words(words, 1, a.dtype), part)
            part = tl.dot(a2, of_words(words, 2, a.dtype), part)
            part = tl.dot(a3, of_words(words, 3, a.dtype), part)
        else:
            there = seen[:, None] & inside[None, :]
            b = tl.load(w + inner[:, None] * w_k + columns[None, :] * w_n, there, other=0.0)
            if KIND == PLAIN:
                acc = tl.dot(a, b, acc)
            else:
                part = tl.dot(a, b.to(a.dtype))
        if KIND != PLAIN:
            factor = tl.load(scale + columns * scale_n + start // GROUP * scale_k, inside, other=0.0)
            acc += part * factor.to(tl.float32)[None, :]
    return acc


@triton.jit
def address(at, like, ALIGNED: tl.constexpr):
    """A pointer of the same type as `like` from an address in memory."""
    found = tl.load(at).to(like.dtype)
    if ALIGNED:  # what is known of addresses decides how wide loads are
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def linear_kernel(
    x, w0, w1, w2, scale0, scale1, scale2, out, t, n0, n1, n2, k, w_n, w_k, scale_n, scale_k,
    KIND: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x (T, K) times up to three matrices (N_i, K), stored alike -> (T, N_0 + N_1 + N_2) float32."""
    block = tl.program_id(0)
    blocks0, blocks1 = tl.cdiv(n0, BLOCK_N), tl.cdiv(n1, BLOCK_N)
    is_first, is_second = block < blocks0, block < blocks0 + blocks1
    n = tl.where(is_first, n0, tl.where(is_second, n1, n2))
    before = tl.where(is_first, 0, tl.where(is_second, n0, n0 + n1))
    block -= tl.where(is_first, 0, tl.where(is_second, blocks0, blocks0 + blocks1))
    columns = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, ROWS)
    known = rows < t
    acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
    if is_first:
        acc = product(
            acc, x, rows, known, k, w0, scale0, columns, n, w_n, w_k, scale_n, scale_k, 0, k, KIND, GROUP, BLOCK_K
        )
    elif is_second:
        acc = product(
            acc, x, rows, known, k, w1, scale1, columns, n, w_n, w_k, scale_n, scale_k, 0, k, KIND, GROUP, BLOCK_K
        )
    else:
        acc = product(
            acc, x, rows, known, k, w2, scale2, columns, n, w_n, w_k, scale_n, scale_k, 0, k, KIND, GROUP, BLOCK_K
        )
    at = out + rows[:, None] * (n0 + n1 + n2) + before + columns[None, :]
    tl.store(at, acc, known[:, None] & (columns < n)[None, :])


@triton.jit
def heads_kernel(
    projected, position, phases, table, q, t, page_tokens, eps, attn_scale, floor_scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """Sums (T, (H + 2 * H_kv) * D) -> rotated and normed queries (T, H, D); keys and values go to their pages.

    CHUNK is 0 in NoPE layers. phases (attention chunk, D) float32: cosine and sine by pair. A program has one head of
    one token.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    here = tl.load(position) + token
    pair = tl.arange(0, PAIRS)
    there = 2 * pair < D
    at = projected + (token * (HEADS + 2 * KV_HEADS) + head) * D + 2 * pair
    dtype = q.dtype.element_ty
    even = tl.load(at, there, other=0.0).to(dtype).to(tl.float32)
    odd = tl.load(at + 1, there, other=0.0).to(dtype).to(tl.float32)
    place = here
    if CHUNK > 0:
        place = here % CHUNK
    if head < HEADS + KV_HEADS:
        if CHUNK > 0:
            cosine = tl.load(phases + place * D + 2 * pair, there, other=0.0)
            sine = tl.load(phases + place * D + 2 * pair + 1, there, other=0.0)
            turned = (even * cosine - odd * sine).to(dtype).to(tl.float32)
            odd = (even * sine + odd * cosine).to(dtype).to(tl.float32)
            even = turned
        if HAS_NORM:
            scale = 1.0 / tl.sqrt((tl.sum(even * even) + tl.sum(odd * odd)) / D + eps)
            even, odd = (even * scale).to(dtype).to(tl.float32), (odd * scale).to(dtype).to(tl.float32)
    if head < HEADS:
        if HAS_TEMPERATURE:
            temperature = tl.log(1.0 + ((here + 1) // floor_scale).to(tl.float32)) * attn_scale + 1.0
            even, odd = even * temperature, odd * temperature
        into = q + (token * HEADS + head) * D
    else:
        entry = table + 3 * (place // page_tokens)
        kv_head, is_value = (head - HEADS) % KV_HEADS, (head - HEADS) // KV_HEADS
        stride = tl.load(entry + 2)
        into = tl.load(entry + is_value).to(q.dtype) + kv_head * stride + (place % page_tokens) * D
    tl.store(into + 2 * pair, even.to(dtype), there)
    tl.store(into + 2 * pair + 1, odd.to(dtype), there)


@triton.jit
def attention_kernel(
    q, position, table, out, lse, t, page_tokens, split_tokens, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Queries (T, H, D) -> attention to a part of the keys by each program: out (splits, T, H, D), lse (splits, T, H).

    A program has `split_tokens` keys, which lie in one page, of one KV head, and as many tokens' groups of query heads
    as ROWS has room for. Programs whose keys lie behind the last token do nothing.
    """
    split, kv_head = tl.program_id(0), tl.program_id(1)
    first = tl.load(position)
    if CHUNK > 0:
        first = first % CHUNK
    start = split * split_tokens
    if start >= first + t:
        return
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOKENS: tl.constexpr = ROWS // GROUP
    row = tl.arange(0, ROWS)
    token, head = tl.program_id(2) * TOKENS + row // GROUP, kv_head * GROUP + row % GROUP
    known = (token < t) & (row < TOKENS * GROUP)
    column = tl.arange(0, WIDTH)
    inside = column < D
    at = (token * HEADS + head)[:, None] * D + column[None, :]
    queries = tl.load(q + at, known[:, None] & inside[None, :], other=0.0)
    entry = table + 3 * (start // page_tokens)
    offset = kv_head * tl.load(entry + 2) + start % page_tokens * D
    keys = tl.load(entry).to(q.dtype) + offset
    values = tl.load(entry + 1).to(q.dtype) + offset
    if D % 8 == 0:  # what is known of addresses decides how wide loads are
        keys, values = tl.multiple_of(keys, 16), tl.multiple_of(values, 16)
    last = tl.minimum(split_tokens, first + t - start)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    for begin in range(0, last, KEYS):
        key = begin + tl.arange(0, KEYS)
        there = (key < last)[:, None] & inside[None, :]
        place = key[:, None] * D + column[None, :]
        k = tl.load(keys + place, there, other=0.0)
        scores = tl.dot(queries, tl.trans(k)) * scale
        seen = (start + key)[None, :] <= (first + token)[:, None]
        scores = tl.where(seen & (key < last)[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(values + place, there, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
        largest = new
    base = tl.where(largest == float("-inf"), 0.0, largest)
    some = tl.where(total > 0.0, total, 1.0)
    tl.store(out + split * t * HEADS * D + at, acc / some[:, None], known[:, None] & inside[None, :])
    where = tl.where(total > 0.0, base + tl.log2(some), float("-inf"))
    tl.store(lse + split * t * HEADS + token * HEADS + head, where, known)


@triton.jit
def combine_kernel(
    out, lse, position, attended, t, split_tokens,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merges the parts that `attention_kernel` leaves -> (T, H, D). A program has one head of one token."""
    token, head = tl.program_id(0), tl.program_id(1)
    first = tl.load(position)
    if CHUNK > 0:
        first = first % CHUNK
    count = tl.cdiv(first + t, split_tokens)
    column = tl.arange(0, WIDTH)
    inside = column < D
    row = token * HEADS + head
    largest = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((WIDTH,), tl.float32)
    for begin in range(0, count, SPLITS):
        split = begin + tl.arange(0, SPLITS)
        there = split < count
        part = tl.load(lse + split * t * HEADS + row, there, other=float("-inf"))
        new = tl.maximum(largest, tl.max(part, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(part - base)
        shrink = tl.exp2(largest - base)
        at = (split * t * HEADS + row).to(tl.int64)[:, None] * D + column[None, :]
        seen = (part > float("-inf"))[:, None] & inside[None, :]
        acc = acc * shrink + tl.sum(weights[:, None] * tl.load(out + at, seen, other=0.0), 0)
        total = total * shrink + tl.sum(weights, 0)
        largest = new
    tl.store(attended + row * D + column, (acc / total).to(attended.dtype.element_ty), inside)


@triton.jit
def residual_kernel(
    residual, all_parts, pair_parts, norm, normed, c, t, eps,
    PARTS: tl.constexpr, PAIR_PARTS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """residual (T, C) float32 += sums of `all_parts` (PARTS, T, C) and of each token's pairs in `pair_parts`
    (PAIR_PARTS, T * TOP_K, C); `normed` (T, C) is its RMS norm. A program has one token."""
    token = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < c
    x = tl.load(residual + token * c + column, inside, other=0.0)
    for part in tl.static_range(PARTS):
        x += tl.load(all_parts + (part * t + token) * c + column, inside, other=0.0)
    for part in tl.static_range(PAIR_PARTS):
        for slot in tl.static_range(TOP_K):
            x += tl.load(pair_parts + ((part * t + token) * TOP_K + slot) * c + column, inside, other=0.0)
    tl.store(residual + token * c + column, x, inside)
    scale = 1.0 / tl.sqrt(tl.sum(x * x) / c + eps)
    weight = tl.load(norm + column, inside, other=0.0).to(tl.float32)
    tl.store(normed + token * c + column, (x * scale * weight).to(normed.dtype.element_ty), inside)


@triton.jit
def router_kernel(x, w, logits, c, experts, BLOCK: tl.constexpr):
    """x (T, C) and w (experts, C) -> logits (T, experts) float32, rounded as PyTorch's product is. One a program."""
    token, expert = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < c
    a = tl.load(x + token * c + column, inside, other=0.0).to(tl.float32)
    b = tl.load(w + expert * c + column, inside, other=0.0).to(tl.float32)
    tl.store(logits + token * experts + expert, tl.sum(a * b).to(x.dtype.element_ty).to(tl.float32))


@triton.jit
def chosen(logits, experts, slot, WIDTH: tl.constexpr):
    """The expert with the `slot`-th largest logit, and that logit's sigmoid."""
    number = tl.arange(0, WIDTH)
    found = tl.load(logits + number, number < experts, other=float("-inf"))
    for _ in range(slot):
        found = tl.where(number == tl.argmax(found, 0), float("-inf"), found)
    return tl.argmax(found, 0), 1.0 / (1.0 + tl.exp(-tl.max(found, 0)))


@triton.jit
def gate_up_kernel(
    x, gated_all, gated_pairs, logits, table, dense_like, dense_scale, routed_like, routed_scale, t, c, size,
    routed_size, experts, dense_n, dense_k, dense_scale_n, dense_scale_k, routed_n, routed_k, routed_scale_n,
    routed_scale_k,
    DENSE_KIND: tl.constexpr, DENSE_GROUP: tl.constexpr, ROUTED_KIND: tl.constexpr, ROUTED_GROUP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """silu(x @ gate) * (x @ up): of all tokens with the dense or shared expert, and of each token-expert pair with the
    expert that it is routed to, whose input is scaled.

    table (experts + 1, 6) int64: addresses of gate, up and down matrices, each with its scales; the dense one is last.
    """
    columns, which = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    rows = tl.arange(0, ROWS)
    gate = tl.zeros((ROWS, BLOCK_N), tl.float32)
    up = tl.zeros((ROWS, BLOCK_N), tl.float32)
    if which == 0:
        known = rows < t
        entry = table + experts * 6
        gate = product(
            gate, x, rows, known, c, address(entry, dense_like, ALIGNED), address(entry + 1, dense_scale, False),
            columns, size, dense_n, dense_k, dense_scale_n, dense_scale_k, 0, c, DENSE_KIND, DENSE_GROUP, BLOCK_K,
        )  # fmt: skip
        up = product(
            up, x, rows, known, c, address(entry + 2, dense_like, ALIGNED), address(entry + 3, dense_scale, False),
            columns, size, dense_n, dense_k, dense_scale_n, dense_scale_k, 0, c, DENSE_KIND, DENSE_GROUP, BLOCK_K,
        )  # fmt: skip
        at = gated_all + rows[:, None] * size + columns[None, :]
        there = known[:, None] & (columns < size)[None, :]
    else:
        pair = which - 1
        token = pair // TOP_K
        known = rows < 1
        expert, score = chosen(logits + token * experts, experts, pair % TOP_K, WIDTH)
        entry = table + expert * 6
        gate = product(
            gate, x + token * c, rows, known, 0, address(entry, routed_like, ALIGNED),
            address(entry + 1, routed_scale, False), columns, routed_size, routed_n, routed_k, routed_scale_n,
            routed_scale_k, 0, c, ROUTED_KIND, ROUTED_GROUP, BLOCK_K,
        )  # fmt: skip
        up = product(
            up, x + token * c, rows, known, 0, address(entry + 2, routed_like, ALIGNED),
            address(entry + 3, routed_scale, False), columns, routed_size, routed_n, routed_k, routed_scale_n,
            routed_scale_k, 0, c, ROUTED_KIND, ROUTED_GROUP, BLOCK_K,
        )  # fmt: skip
        gate *= score
        up *= score
        at = gated_pairs + pair * routed_size + 0 * rows[:, None] + columns[None, :]
        there = known[:, None] & (columns < routed_size)[None, :]
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(at, gated.to(x.dtype.element_ty), there)


@triton.jit
def down_kernel(
    gated_all, gated_pairs, out_all, out_pairs, logits, table, dense_like, dense_scale, routed_like, routed_scale,
    t, c, size, routed_size, experts, dense_n, dense_k, dense_scale_n, dense_scale_k, routed_n, routed_k,
    routed_scale_n, routed_scale_k,
    DENSE_KIND: tl.constexpr, DENSE_GROUP: tl.constexpr, ROUTED_KIND: tl.constexpr, ROUTED_GROUP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, TOP_K: tl.constexpr,
    WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The second product, of all tokens (T, size) and of pairs (T * TOP_K, routed_size).

    Sums (SPLITS, T, C) and (SPLITS, T * TOP_K, C) in float32, each of a part of the inner dimension.
    """
    columns, split, which = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1), tl.program_id(2)
    rows = tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
    if which == 0:
        known = rows < t
        share = tl.cdiv(size, SPLITS * BLOCK_K) * BLOCK_K
        last = tl.minimum((split + 1) * share, size)
        entry = table + experts * 6
        acc = product(
            acc, gated_all, rows, known, size, address(entry + 4, dense_like, ALIGNED),
            address(entry + 5, dense_scale, False), columns, c, dense_n, dense_k, dense_scale_n, dense_scale_k,
            split * share, last, DENSE_KIND, DENSE_GROUP, BLOCK_K,
        )  # fmt: skip
        at = out_all + split * t * c + rows[:, None] * c + columns[None, :]
    else:
        pair = which - 1
        known = rows < 1
        expert, _ = chosen(logits + pair // TOP_K * experts, experts, pair % TOP_K, WIDTH)
        share = tl.cdiv(routed_size, SPLITS * BLOCK_K) * BLOCK_K
        last = tl.minimum((split + 1) * share, routed_size)
        entry = table + expert * 6
        acc = product(
            acc, gated_pairs + pair * routed_size, rows, known, 0, address(entry + 4, routed_like, ALIGNED),
            address(entry + 5, routed_scale, False), columns, c, routed_n, routed_k, routed_scale_n, routed_scale_k,
            split * share, last, ROUTED_KIND, ROUTED_GROUP, BLOCK_K,
        )  # fmt: skip
        at = out_pairs + (split * t * TOP_K + pair) * c + 0 * rows[:, None] + columns[None, :]
    tl.store(at, acc, known[:, None] & (columns < c)[None, :])
