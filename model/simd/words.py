"""Places of the 64-bit integers that machine code is called with, for what emits it and what calls it.

A STRIDE is the bytes from one row of float32 numbers to the next, a STEP those from one number to the next, which are 0
where one serves all.
"""

from __future__ import annotations

WORD, LINE = 8, 64
"""Bytes. Each operation has a line, and so has each counter that threads add to."""

FUNCTION, ARGUMENTS, UNITS, UNITS_A_ROW, GRAIN, SHARES, WAITS = range(7)
"""Of an operation. It has UNITS + UNITS_A_ROW * rows units, which threads take in shares of multiples of GRAIN, SHARES
each if all are equally fast. WAITS: 1 if it must not begin before all operations before it have ended."""

OPERATIONS, COUNT, ROWS, THREADS, BARRIER, COUNTERS = range(6)
"""Of a task. BARRIER is the address of a function that returns when all threads have called it, or 0. Counters begin as
0, one for each operation."""

STEPS, INPUT, INPUT_STRIDE, OUTPUT, OUTPUT_STRIDE = range(5)
"""Of a product and an expansion: steps of a row. Of these and others: their rows."""

BIAS, BIAS_STEP, ADDED, ADDED_STRIDE, ADDED_STEP, SUMS, SUMS_STRIDE, FACTOR, FACTOR_STEP = range(5, 14)
"""Of a product: what is added to sums; where those of a Columns layout are, which may be the output; what they are
multiplied by."""

TENSORS = 14
"""Then an address and stride for each tensor of the layout."""

WEIGHT, SIZE, EPSILON = range(5, 8)
"""Of a norm over SIZE numbers. Epsilons are float64."""

HEADS, ROTATION, ROTATION_STRIDE, TEMPERATURE, HEADS_EPSILON = range(5, 10)
"""Of the work on so many heads a row: rotations (rows, D / 2) are complex; temperatures are (rows,)."""

UP, UP_STRIDE, SCORES, SCORES_STEP, COPIES = range(5, 10)
"""Of a gate, which is the input: the scores of rows, of which there are COPIES for each row of the input."""

CALLED, CALLS, CALLED_WITH, CALLED_WITH_STRIDE = range(4)
"""Of the repetition of a function, CALLS times a row: its address, and that of the first call's arguments."""

LOGITS, LOGITS_STRIDE, EXPERTS, TOP_K, CHOSEN, CHOSEN_LOGITS, EXPERT_SCORES, MATRICES, MATRIX = range(9)
"""Of the choice of experts: the router's logits, room for integers and numbers, one for each pair of a row and an
expert; the pairs' scores; and MATRICES times MATRIX_WORDS words, from MATRIX on."""

SLOTS, SLOT_STRIDE, TABLE, TABLE_WORDS, TOKENS_IN, TOKENS_IN_STRIDE, TOKENS_OUT, TOKENS_OUT_STRIDE = range(8)
"""Of an experts' matrix: the arguments of each pair's product; for each expert, TABLE_WORDS of its own from FACTOR on;
the rows that are read or, if that is not 0, those that are added to."""

MATRIX_WORDS = 8
