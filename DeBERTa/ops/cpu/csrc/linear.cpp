// Linear maps and the feed-forward, and their gradients, in bfloat16 on processors with AMX. Weights come in
// float32 and are rounded while they are laid out for the matmul; the epilogue runs while tiles compute the
// next.
//
// Names: x [M, K], weight [N, K], y [M, N]; `rows`, `depth` and `columns` are M, K and N. K and N are
// multiples of 32. Functions "of all threads" are called by each thread of a parallel region and share the
// work.

#include "tiles.h"

#ifdef __AMX_BF16__

namespace {

constexpr int64_t ROWS = 64, COLUMNS = 256;  // of a matmul, by one thread at a time

// The first factor [rows, depth] of a matmul, in blocks of 32 rows, with zeros after it.
struct Blocks {
    const bfloat16* x;
    int64_t rows, distance;  // elements from row to row
    std::vector<bfloat16> last;

    Blocks(const bfloat16* x, int64_t rows, int64_t distance) : x(x), rows(rows), distance(distance) {
        if (rows % BLOCK == 0) return;
        last.resize(BLOCK * distance);
        std::copy(x + rows / BLOCK * BLOCK * distance, x + rows * distance, last.begin());
    }

    Left from(int64_t i) const { return {i + BLOCK <= rows ? x + i * distance : last.data(), distance * 2}; }
};

// Of all threads: N matmuls of the same size, block by block. `finish(i, j, n, sums)` takes row n of each
// one's block from (i, j) on, in order, also where that is past the last row, and may write over it.
template <int64_t N, class F>
void multiply_all(const Blocks (&left)[N], const Factor* const (&right)[N], F finish) {
    int64_t steps = 0;
    for (const Factor* factor : right) steps += factor->depth / 32;
    Pipeline<N, F> blocks(finish, BLOCK, steps);
#pragma omp for schedule(dynamic) collapse(2) nowait
    for (int64_t i = 0; i < left[0].rows; i += ROWS)
        for (int64_t first = 0; first < right[0]->columns; first += COLUMNS)
            for (int64_t j = first; j < std::min(first + COLUMNS, right[0]->columns); j += BLOCK)
                for (int64_t k = i; k < std::min(i + ROWS, left[0].rows); k += BLOCK)
                    blocks.multiply(k, j, [&](int64_t m) {
                        return Matmul{left[m].from(k), right[m]->panel(j).from(0), right[m]->depth / 32};
                    });
    blocks.end();
#pragma omp barrier
}

// 32 elements of two rows, as `pack_rows` places them.
inline void pack_pair(const float* low, const float* high, uint32_t* to) {
    for (int64_t half = 0; half < 2; half++)
        _mm512_storeu_si512(to + half * TILE * TILE,
                            join_pairs(load_rounded(low + half * TILE), load_rounded(high + half * TILE)));
}

// Of all threads: the transpose of x [rows, columns], zeros after it.
void transpose_all(const bfloat16* x, int64_t rows, int64_t columns, int64_t depth, const Between& to) {
    const bfloat16 zeros[BLOCK] = {};
#pragma omp for schedule(static)
    for (int64_t j = 0; j < columns; j += BLOCK)
        for (int64_t i = 0; i < depth; i += BLOCK) {
            Vector tiles[2][TILE];
            for (int64_t n = 0; n < TILE; n++) {
                const bfloat16* row = x + (i + 2 * n) * columns + j;
                const bfloat16 *low = i + 2 * n < rows ? row : zeros,
                               *high = i + 2 * n + 1 < rows ? row + columns : zeros;
                __builtin_prefetch(row + BLOCK * columns);
                __builtin_prefetch(row + (BLOCK + 1) * columns);
                for (int64_t half = 0; half < 2; half++)
                    tiles[half][n] =
                        Vector(join_pairs(load_rounded(low + half * TILE), load_rounded(high + half * TILE)));
            }
            for (int64_t half = 0; half < 2; half++) {
                transpose(tiles[half]);
                for (int64_t c = 0; c < TILE; c++)
                    std::memcpy(to.row(j + half * TILE + c) + i, &tiles[half][c], sizeof(Vector));
            }
        }
}

// Of all threads, without a barrier at the end: sums of the rows of x [rows, columns].
void sum_rows(const Between& x, int64_t rows, int64_t columns, float* sums) {
    const __m512bh ones = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1), _mm512_set1_ps(1));
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < rows; i++) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t j = 0; j < columns; j += 2 * TILE)
            total = _mm512_dpbf16_ps(total, __m512bh(_mm512_loadu_si512(x.row(i) + j)), ones);
        sums[i] = _mm512_reduce_add_ps(total);
    }
}

// Of all threads: y = x weight^T + bias, or GELU of that. The factor takes the weight.
template <bool GELU>
void apply_affine(const bfloat16* x, const float* weight, const float* bias, Factor& factor, bfloat16* y,
                  int64_t rows) {
    int64_t columns = factor.columns;
    factor.take_columns(weight);
    multiply_all<1>({{x, rows, factor.depth}}, {&factor}, [=](int64_t i, int64_t j, int64_t n, Block* done) {
        if (i + n >= rows) return;
        float* sums = done->row(n);
        for (int64_t c = 0; c < BLOCK; c++) sums[c] += bias[j + c];
        if (GELU)
            for (int64_t c = 0; c < BLOCK; c++) {
                float below, density;
                compute_normal(sums[c], below, density);
                sums[c] *= below;
            }
        put(sums, y + (i + n) * columns + j);
    });
}

// Of all threads: the gradient of x, from that of y, rows `distance` elements apart.
void compute_input_gradients(const bfloat16* gradient, int64_t distance, const float* weight, Factor& factor,
                             bfloat16* dx, int64_t rows) {
    int64_t columns = factor.columns;
    factor.take_rows(weight, factor.depth);
    multiply_all<1>({{gradient, rows, distance}}, {&factor},
                    [=](int64_t i, int64_t j, int64_t n, Block* done) {
                        if (i + n < rows) put(done->row(n), dx + (i + n) * columns + j);
                    });
}

// Of all threads: the gradients of weight [N, K] and bias, if wanted, from y's, transposed [N, M], and x.
void compute_weight_gradients(const Between& gradient, const Factor& x, float* dweight, float* dbias,
                              int64_t columns) {
    int64_t depth = x.columns;
    if (dbias) sum_rows(gradient, columns, x.depth, dbias);
    multiply_all<1>({{gradient.row(0), columns, gradient.distance}}, {&x},
                    [=](int64_t i, int64_t j, int64_t n, Block* done) {
                        put_through(done->row(n), dweight + (i + n) * depth + j);
                    });
    _mm_sfence();
}

}  // namespace

EXPORT apply_affine_bfloat16_float32(const bfloat16* x, const float* weight, const float* bias, bfloat16* y,
                                     int64_t rows, int64_t depth, int64_t columns, int threads) {
    Factor factor(depth, columns);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        apply_affine<false>(x, weight, bias, factor, y, rows);
    }
}

// `dx` and `dbias` may be null.
EXPORT compute_affine_gradients_bfloat16_float32(const bfloat16* gradient, const bfloat16* x,
                                                 const float* weight, bfloat16* dx, float* dweight,
                                                 float* dbias, int64_t rows, int64_t depth, int64_t columns,
                                                 int threads) {
    Factor weights(columns, depth), inputs(rows, depth);
    Between turned(columns, inputs.depth);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        if (dx) compute_input_gradients(gradient, columns, weight, weights, dx, rows);
        transpose_all(gradient, rows, columns, inputs.depth, turned);
        inputs.take_rows(x, rows);
        compute_weight_gradients(turned, inputs, dweight, dbias, columns);
    }
}

// outer(GELU(inner(x))) for two linear maps.
EXPORT apply_feed_forward_bfloat16_float32(const bfloat16* x, const float* inner, const float* inner_bias,
                                           const float* outer, const float* outer_bias, bfloat16* y,
                                           int64_t rows, int64_t depth, int64_t columns, int threads) {
    Factor first(depth, columns), second(columns, depth);
    std::unique_ptr<bfloat16[]> activated(new bfloat16[rows * columns]);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        apply_affine<true>(x, inner, inner_bias, first, activated.get(), rows);
        apply_affine<false>(activated.get(), outer, outer_bias, second, y, rows);
    }
}

EXPORT compute_feed_forward_gradients_bfloat16_float32(const bfloat16* x, const float* inner,
                                                       const float* inner_bias, const bfloat16* gradient,
                                                       const float* outer, bfloat16* dx, float* dinner,
                                                       float* dinner_bias, float* douter, float* douter_bias,
                                                       int64_t rows, int64_t depth, int64_t columns,
                                                       int threads) {
    Factor forth(depth, columns), back(depth, columns), down(columns, depth), inputs(rows, depth),
        activated(rows, columns);
    Between dhidden(inputs.depth, columns), turned_dhidden(columns, inputs.depth),
        turned(depth, inputs.depth);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        forth.take_columns(inner);
        back.take_rows(outer, depth);
        multiply_all<2>({{x, rows, depth}, {gradient, rows, depth}}, {&forth, &back},
                        [&](int64_t i, int64_t j, int64_t n, Block* done) {
                            float *hidden = done[0].row(n), *slope = done[1].row(n);
                            for (int64_t c = 0; c < BLOCK; c++) {
                                float value = hidden[c] + inner_bias[j + c], below, density;
                                compute_normal(value, below, density);
                                hidden[c] = value * below;
                                slope[c] *= below + value * density;
                            }
                            put(slope, dhidden.row(i + n) + j);
                            if (n % 2)
                                pack_pair(done[0].row(n - 1), hidden,
                                          activated.panel(j, i).at + n / 2 * TILE);
                            if (n == BLOCK - 1)
                                put_transposed({done[1].at, BLOCK}, turned_dhidden.row(j) + i,
                                               turned_dhidden.distance, 0);
                        });
        compute_input_gradients(dhidden.row(0), dhidden.distance, inner, down, dx, rows);
        inputs.take_rows(x, rows);
        compute_weight_gradients(turned_dhidden, inputs, dinner, dinner_bias, columns);
        transpose_all(gradient, rows, depth, inputs.depth, turned);
        compute_weight_gradients(turned, activated, douter, douter_bias, depth);
    }
}

#endif
