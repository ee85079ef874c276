"""Triton kernels of disentangled attention.

Position scores are never written to memory.

    score(i, j) = q_i . k_j + q_i . K[i - j] + k_j . Q[j - i]

K and Q are the projected position tables expanded to one row per distance, [H, 2W, D], for distances from -W
to W - 1, where W is the sequence length L rounded up to full tiles. Q is mirrored: Q[d] is the row of
distance -d, so that Q[j - i] is the row of slot(i, j). At L 512 the tables are at most 2 MB each and stay in
the L2 cache.

Both position terms have one form: a row of one kind (queries, or keys) meets the table at distance row -
column. In the tile of row block a and column block m, that distance is N * (a - m) + r - c. With t = a - m
and u = (r - c) mod N it is row u of table block t where c <= r, and of block t - 1 where c > r. So a tile of
the term is

    y[r, c] = z[r, (r - c) mod N],  z[r, u] = x_r . T_t[u] where u <= r, else x_r . T_{t-1}[u]

two matmuls [N, N], a selection, and a rotation of each row (`rotate_rows`), which is its own inverse:
gradients of scores are rotated in the same way. The p2c term is computed with keys as rows and transposed.

Shapes: B batch, L length, H heads, D head size, N tile size, W length in full tiles. Nothing is added
atomically, so the same inputs give the same bits. Gradients of scores are written once, [B, H, W, W], for
three small kernels.
"""

import triton
import triton.language as tl
from triton import knobs

# The interpreter runs no inline assembly.
HAS_ASSEMBLY = tl.constexpr(not knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def draw_mask_kernel(
    seed_ptr,
    mask_ptr,
    num_rows,
    threshold,
    L: tl.constexpr,
    WORDS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the dropout mask of ops/dropout.py as bits.

    The mask of [B, H, L, L] is written to int32 [B * H * L, WORDS].
    GROUP: elements of a row that share a 64-bit word of SplitMix64, 4 where L is a multiple of 4, else 1.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    word = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :, None]
    bit = tl.arange(0, 32 // GROUP)[None, None, :] * GROUP
    element = row.to(tl.int64) * L + word * 32 + bit
    z = (element // 4 + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + tl.load(seed_ptr).to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    if GROUP == 1:
        bits = (((z >> ((element % 4) * 16).to(tl.uint64)) & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32)
    else:
        low, high = z.to(tl.uint32), (z >> 32).to(tl.uint32)
        bits = ((low & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32)
        bits |= ((low >> 16).to(tl.int32) >= threshold).to(tl.int32) << 1
        bits |= ((high & 0xFFFF).to(tl.int32) >= threshold).to(tl.int32) << 2
        bits |= ((high >> 16).to(tl.int32) >= threshold).to(tl.int32) << 3
    bits = tl.sum(bits << bit, 2)  # no two terms share a bit
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    is_valid = (row < num_rows) & (column < WORDS)
    tl.store(mask_ptr + row.to(tl.int64) * WORDS + column, bits, mask=is_valid)


@triton.jit
def load_keep_mask(mask_ptr, row, i, j0, L, WORDS: tl.constexpr, N: tl.constexpr):
    """Load the dropout mask of queries `i` and N keys from `j0` on, bool [N, N].

    row: the first row of the head.
    """
    word = j0 // 32 + tl.arange(0, N // 32)
    bits = tl.load(
        mask_ptr + row * WORDS + (i[:, None] * WORDS + word[None, :]), mask=(i < L)[:, None], other=0
    )
    return tl.reshape(bits[:, :, None] & (1 << tl.arange(0, 32))[None, None, :], [N, N]) != 0


@triton.jit
def load_rows(x_ptr, row, h, i, L, stride_row, stride_head, D: tl.constexpr):
    """Load rows `i` of head `h`, [N, D], zero past L.

    row: the first row of the sequence. The offset that differs between threads has 32 bits, which saves
    registers.
    """
    offsets = (i * stride_row)[:, None] + tl.arange(0, D)[None, :]
    return tl.load(x_ptr + row * stride_row + h * stride_head + offsets, mask=(i < L)[:, None], other=0.0)


@triton.jit
def store_rows(x_ptr, x, row, h, i, L, stride_row, stride_head, D: tl.constexpr):
    """Store rows `i` of head `h`, [N, D], up to L; the counterpart of `load_rows`."""
    offsets = (i * stride_row)[:, None] + tl.arange(0, D)[None, :]
    first = x_ptr + row * stride_row + h * stride_head
    tl.store(first + offsets, x.to(x_ptr.dtype.element_ty), mask=(i < L)[:, None])


@triton.jit
def load_table_block(table_ptr, h, t, BLOCKS: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """Load the rows of distances t * N .. t * N + N - 1, [N, D]."""
    first = table_ptr + (h * 2 * BLOCKS + BLOCKS + t) * (N * D)
    return tl.load(first + (tl.arange(0, N)[:, None] * D + tl.arange(0, D)[None, :]))


@triton.jit
def multiply_transposed(x, y):
    """Return `x y^T`, in float32 without TF32."""
    return tl.dot(x, tl.trans(y), input_precision="ieee")


@triton.jit
def pack_columns(x, dtype: tl.constexpr, N: tl.constexpr):
    """Round `x` float32 [N, N] to `dtype`, and pack 16-bit columns in pairs.

    For 16-bit dtypes, returns uint32 [N, N/2] of columns u (low half) and u + N/2.
    """
    if dtype.primitive_bitwidth == 16:
        low, high = tl.split(tl.permute(tl.reshape(x, [N, 2, N // 2]), [0, 2, 1]))
        if HAS_ASSEMBLY:  # one instruction instead of four
            name: tl.constexpr = "f16" if dtype == tl.float16 else "bf16"
            assembly: tl.constexpr = "cvt.rn." + name + "x2.f32 $0, $2, $1;"
            packed = tl.inline_asm_elementwise(assembly, "=r,r,r", [low, high], tl.uint32, True, 1)
        else:
            low = low.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
            packed = low | high.to(dtype).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    else:
        packed = x.to(dtype)
    return packed


@triton.jit
def select_triangle(near, far, N: tl.constexpr):
    """Return z [N, N], where z[r, u] is near where u <= r, else far."""
    return tl.where(tl.arange(0, N)[None, :] <= tl.arange(0, N)[:, None], near, far)


@triton.jit
def rotate_rows(near, far, dtype: tl.constexpr, N: tl.constexpr):
    """Return y[r, c] = z[r, (r - c) mod N] of z = select_triangle(near, far).

    near, far: from `pack_columns`. With two columns in a 32-bit word, a warp
    rotates a row of 64 in one shuffle.
    """
    r = tl.arange(0, N)[:, None]
    if dtype.primitive_bitwidth == 16:
        u = tl.arange(0, N // 2)[None, :]
        use_near = tl.where(u <= r, 0xFFFF, 0).to(tl.uint32) | tl.where(u + N // 2 <= r, 0xFFFF0000, 0).to(
            tl.uint32
        )
        y = tl.gather((near ^ far) & use_near ^ far, (r - u) & (N // 2 - 1), 1)
        y = tl.where(((r - u) & (N // 2)) != 0, y >> 16 | y << 16, y)
        pairs = tl.join((y & 0xFFFF).to(tl.uint16), (y >> 16).to(tl.uint16))
        rotated = tl.reshape(tl.permute(pairs, [0, 2, 1]), [N, N]).to(dtype, bitcast=True)
    else:
        rotated = tl.gather(select_triangle(near, far, N), (r - tl.arange(0, N)[None, :]) & (N - 1), 1)
    return rotated


@triton.jit
def compute_position_scores(x, table_ptr, h, t, BLOCKS: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """Return the position term [N, N] of rows `x`, `t` blocks below the diagonal."""
    near = multiply_transposed(x, load_table_block(table_ptr, h, t, BLOCKS, N, D))
    far = multiply_transposed(x, load_table_block(table_ptr, h, t - 1, BLOCKS, N, D))
    return rotate_rows(pack_columns(near, x.dtype, N), pack_columns(far, x.dtype, N), x.dtype, N)


@triton.jit
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_table_ptr,
    query_table_ptr,
    input_mask_ptr,
    keep_mask_ptr,
    out_ptr,
    lse_ptr,
    H,
    stride_row,
    stride_head,
    scale,
    L: tl.constexpr,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_C2P: tl.constexpr,
    HAS_P2C: tl.constexpr,
    N: tl.constexpr,
):
    """Compute the context of one tile of queries, and its softmax statistics.

    The statistics are the base-2 logarithms of the sums of exponentials. scale: 1 / (1 - p). The softmax is
    computed online over tiles of keys (FlashAttention, algorithm 1).
    """
    BLOCKS: tl.constexpr = (L + N - 1) // N
    a, h, b = tl.program_id(0), tl.program_id(1) % H, tl.program_id(1) // H
    row, head_row = b.to(tl.int64) * L, tl.program_id(1).to(tl.int64) * L
    i = a * N + tl.arange(0, N)
    q = load_rows(q_ptr, row, h, i, L, stride_row, stride_head, D)
    largest = tl.full([N], -1e30, tl.float32)
    total = tl.zeros([N], tl.float32)
    out = tl.zeros([N, D], tl.float32)
    if HAS_C2P:
        near = pack_columns(
            multiply_transposed(q, load_table_block(key_table_ptr, h, a, BLOCKS, N, D)), q.dtype, N
        )
    for j0 in range(0, L, N):
        t = a - j0 // N
        j = j0 + tl.arange(0, N)
        k = load_rows(k_ptr, row, h, j, L, stride_row, stride_head, D)
        v = load_rows(v_ptr, row, h, j, L, stride_row, stride_head, D)
        # Position terms come first, as the accumulator of q k^T. Otherwise softmax would run in a transposed
        # layout.
        scores = tl.zeros([N, N], tl.float32)
        if HAS_C2P:
            block = load_table_block(key_table_ptr, h, t - 1, BLOCKS, N, D)
            far = pack_columns(multiply_transposed(q, block), q.dtype, N)
            scores += rotate_rows(near, far, q.dtype, N).to(tl.float32)
            near = far  # of the next tile
        if HAS_P2C:
            scores += tl.trans(compute_position_scores(k, query_table_ptr, h, -t, BLOCKS, N, D)).to(
                tl.float32
            )
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
        is_real = tl.load(input_mask_ptr + b * L + j, mask=j < L, other=0) != 0
        scores = tl.where(is_real[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * LOG2E)
        factor = tl.exp2(largest - new_largest)
        probs = tl.exp2(scores * LOG2E - new_largest[:, None])
        total = total * factor + tl.sum(probs, 1)
        if HAS_DROPOUT:
            probs = tl.where(load_keep_mask(keep_mask_ptr, head_row, i, j0, L, WORDS, N), probs, 0.0)
        out = tl.dot(probs.to(v.dtype), v, out * factor[:, None], input_precision="ieee")
        largest = new_largest
    # Padded queries: no context, and with infinite statistics no gradients either.
    is_real = tl.load(input_mask_ptr + b * L + i, mask=i < L, other=0) != 0
    factor = tl.where(is_real, scale / total, 0.0)
    store_rows(out_ptr, out * factor[:, None], row, h, i, L, H * D, D, D)
    lse = tl.where(is_real, largest + tl.log2(total), float("inf"))
    tl.store(lse_ptr + head_row + i, lse, mask=i < L)


@triton.jit
def delta_kernel(out_ptr, grad_out_ptr, delta_ptr, H, L, D: tl.constexpr, N: tl.constexpr):
    """Write the inner product of the context and its gradient per query.

    Source: FlashAttention, section B.2.
    """
    h, b = tl.program_id(1) % H, tl.program_id(1) // H
    row = b.to(tl.int64) * L
    i = tl.program_id(0) * N + tl.arange(0, N)
    out = load_rows(out_ptr, row, h, i, L, H * D, D, D).to(tl.float32)
    grad_out = load_rows(grad_out_ptr, row, h, i, L, H * D, D, D).to(tl.float32)
    tl.store(delta_ptr + tl.program_id(1).to(tl.int64) * L + i, tl.sum(out * grad_out, 1), mask=i < L)


@triton.jit
def key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_table_ptr,
    query_table_ptr,
    input_mask_ptr,
    keep_mask_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_scores_ptr,
    H,
    stride_row,
    stride_head,
    scale,
    L: tl.constexpr,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_C2P: tl.constexpr,
    HAS_P2C: tl.constexpr,
    N: tl.constexpr,
):
    """Compute the gradients of one tile of keys and values, and of its scores.

    Tiles are [keys, queries], so that no operand of a matmul is transposed in shared memory.
    """
    BLOCKS: tl.constexpr = (L + N - 1) // N
    m, h, b = tl.program_id(0), tl.program_id(1) % H, tl.program_id(1) // H
    row, head_row = b.to(tl.int64) * L, tl.program_id(1).to(tl.int64) * L
    j = m * N + tl.arange(0, N)
    k = load_rows(k_ptr, row, h, j, L, stride_row, stride_head, D)
    v = load_rows(v_ptr, row, h, j, L, stride_row, stride_head, D)
    is_real = tl.load(input_mask_ptr + b * L + j, mask=j < L, other=0) != 0
    grad_k = tl.zeros([N, D], tl.float32)
    grad_v = tl.zeros([N, D], tl.float32)
    for i0 in range(0, L, N):
        t = m - i0 // N
        i = i0 + tl.arange(0, N)
        q = load_rows(q_ptr, row, h, i, L, stride_row, stride_head, D)
        scores = tl.zeros([N, N], tl.float32)
        if HAS_P2C:
            scores += compute_position_scores(k, query_table_ptr, h, t, BLOCKS, N, D).to(tl.float32)
        if HAS_C2P:
            scores += tl.trans(compute_position_scores(q, key_table_ptr, h, -t, BLOCKS, N, D)).to(tl.float32)
        scores = tl.dot(k, tl.trans(q), scores, input_precision="ieee")
        lse = tl.load(lse_ptr + head_row + i, mask=i < L, other=float("inf"))
        delta = tl.load(delta_ptr + head_row + i, mask=i < L, other=0.0)
        probs = tl.exp2(tl.where(is_real[:, None], scores, float("-inf")) * LOG2E - lse[None, :])
        grad_out = load_rows(grad_out_ptr, row, h, i, L, H * D, D, D)
        grad_probs = tl.dot(v, tl.trans(grad_out), input_precision="ieee")
        dropped = probs
        if HAS_DROPOUT:
            keep = tl.trans(load_keep_mask(keep_mask_ptr, head_row, i, m * N, L, WORDS, N))
            dropped = tl.where(keep, probs, 0.0)
            grad_probs = tl.where(keep, grad_probs, 0.0)
        grad_v = tl.dot(dropped.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
        exact = probs * (grad_probs * scale - delta[None, :])
        grad_scores = exact.to(q.dtype)
        first = grad_scores_ptr + head_row // L * (BLOCKS * N * BLOCKS * N)
        tl.store(first + ((i * (BLOCKS * N))[None, :] + j[:, None]), grad_scores)
        grad_k = tl.dot(grad_scores, q, grad_k, input_precision="ieee")
        if HAS_P2C:
            packed = pack_columns(exact, q.dtype, N)
            z = rotate_rows(packed, packed, q.dtype, N)
            zeros = tl.zeros([N, N], k.dtype)
            block = load_table_block(query_table_ptr, h, t, BLOCKS, N, D)
            grad_k = tl.dot(select_triangle(z, zeros, N), block, grad_k, input_precision="ieee")
            block = load_table_block(query_table_ptr, h, t - 1, BLOCKS, N, D)
            grad_k = tl.dot(select_triangle(zeros, z, N), block, grad_k, input_precision="ieee")
    store_rows(grad_k_ptr, grad_k, row, h, j, L, stride_row, stride_head, D)
    store_rows(grad_v_ptr, grad_v * scale, row, h, j, L, stride_row, stride_head, D)


@triton.jit
def load_tile(
    grad_scores_ptr, head, a, m, IS_TRANSPOSED: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr
):
    """Load the tile of row block `a` and column block `m`, zero outside.

    IS_TRANSPOSED: load it from the transposed matrix.
    """
    W: tl.constexpr = BLOCKS * N
    is_inside = (a >= 0) & (a < BLOCKS) & (m >= 0) & (m < BLOCKS)
    r, c = (a * N + tl.arange(0, N))[:, None], (m * N + tl.arange(0, N))[None, :]
    offsets = c * W + r if IS_TRANSPOSED else r * W + c
    return tl.load(grad_scores_ptr + tl.cast(head, tl.int64) * (W * W) + offsets, mask=is_inside, other=0.0)


@triton.jit
def load_by_distance(grad_scores_ptr, head, a, t, BLOCKS: tl.constexpr, N: tl.constexpr):
    """Load z[r, u] of query i = a * N + r and key i - (t * N + u), zero outside."""
    W: tl.constexpr = BLOCKS * N
    i = (a * N + tl.arange(0, N))[:, None]
    j = i - (t * N + tl.arange(0, N)[None, :])
    first = grad_scores_ptr + tl.cast(head, tl.int64) * (W * W)
    return tl.load(first + (i * W + j), mask=(j >= 0) & (j < W), other=0.0)


@triton.jit
def query_gradient_kernel(
    k_ptr,
    key_table_ptr,
    grad_scores_ptr,
    grad_q_ptr,
    H,
    stride_row,
    stride_head,
    L: tl.constexpr,
    D: tl.constexpr,
    HAS_C2P: tl.constexpr,
    N: tl.constexpr,
):
    """Compute the gradients of one tile of queries from those of its scores."""
    BLOCKS: tl.constexpr = (L + N - 1) // N
    a, h, b = tl.program_id(0), tl.program_id(1) % H, tl.program_id(1) // H
    row = b.to(tl.int64) * L
    grad_q = tl.zeros([N, D], tl.float32)
    for m in range(BLOCKS):
        tile = load_tile(grad_scores_ptr, tl.program_id(1), a, m, False, BLOCKS, N)
        k = load_rows(k_ptr, row, h, m * N + tl.arange(0, N), L, stride_row, stride_head, D)
        grad_q = tl.dot(tile, k, grad_q, input_precision="ieee")
        if HAS_C2P:
            z = load_by_distance(grad_scores_ptr, tl.program_id(1), a, a - m, BLOCKS, N)
            block = load_table_block(key_table_ptr, h, a - m, BLOCKS, N, D)
            grad_q = tl.dot(z, block, grad_q, input_precision="ieee")
    if HAS_C2P:
        z = load_by_distance(grad_scores_ptr, tl.program_id(1), a, a - BLOCKS, BLOCKS, N)
        block = load_table_block(key_table_ptr, h, a - BLOCKS, BLOCKS, N, D)
        grad_q = tl.dot(z, block, grad_q, input_precision="ieee")
    store_rows(grad_q_ptr, grad_q, row, h, a * N + tl.arange(0, N), L, stride_row, stride_head, D)


@triton.jit
def table_gradient_kernel(
    x_ptr,
    grad_scores_ptr,
    grad_table_ptr,
    B,
    H,
    stride_row,
    stride_head,
    L: tl.constexpr,
    D: tl.constexpr,
    IS_QUERY_TABLE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    N: tl.constexpr,
):
    """Compute the gradient of one block of a position table over SEQUENCES sequences.

    The rows `x` are queries for the key table (c2p), and keys for the query table (p2c). Written as float32
    [B / SEQUENCES, H, 2W, D], whose first dimension PyTorch sums.
    """
    BLOCKS: tl.constexpr = (L + N - 1) // N
    t, h, part = tl.program_id(0) - BLOCKS, tl.program_id(1), tl.program_id(2)
    grad_table = tl.zeros([N, D], tl.float32)
    for b in range(part * SEQUENCES, tl.minimum(part * SEQUENCES + SEQUENCES, B)):
        for a in range(tl.maximum(t, 0), tl.minimum(BLOCKS, BLOCKS + t + 1)):
            if IS_QUERY_TABLE:
                near = load_tile(grad_scores_ptr, b * H + h, a, a - t, True, BLOCKS, N)
                far = load_tile(grad_scores_ptr, b * H + h, a, a - t - 1, True, BLOCKS, N)
                z = pack_columns(select_triangle(near, far, N).to(tl.float32), x_ptr.dtype.element_ty, N)
                z = rotate_rows(z, z, x_ptr.dtype.element_ty, N)
            else:
                z = load_by_distance(grad_scores_ptr, b * H + h, a, t, BLOCKS, N)
            i = a * N + tl.arange(0, N)
            x = load_rows(x_ptr, tl.cast(b, tl.int64) * L, h, i, L, stride_row, stride_head, D)
            grad_table = tl.dot(tl.trans(z), x, grad_table, input_precision="ieee")
    block = ((part * H + h) * 2 * BLOCKS + tl.program_id(0)) * N
    offsets = (block + tl.arange(0, N))[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(grad_table_ptr + offsets, grad_table)
