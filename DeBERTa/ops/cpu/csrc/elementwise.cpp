// One pass over memory each, where PyTorch needs several: attention scores, logits of a chunk of words,
// dropout, GELU. Built by library.py. Shapes and layouts are those of the Python functions that call these.
// Elements are stored as float or bfloat16; all arithmetic is in float. Sums do not depend on the threads.

#include "kernels.h"

namespace {

// Where a position term lies: rows in blocks of `rows`, see `_PositionTerm` in attention.py.
struct Blocks {
    int64_t heads, length, rows;

    int64_t in_block(int64_t first) const { return std::min(rows, length - first); }

    // Of row `row` of head `head`, the element of column 0.
    int64_t offset(int64_t head, int64_t row) const {
        int64_t first = row / rows * rows, here = in_block(first);
        int64_t before = heads * first * (length + rows - 1) + head * here * (length + here - 1);
        return before + here - 1 + (row - first) * step(first);
    }

    // From a row's to that of the next, in the block that starts with row `first`.
    int64_t step(int64_t first) const { return length + in_block(first) - 2; }
};

// scores[k][j] += term[j][i + k], for `count` <= TILE rows i.
template <class T>
void add_transposed(float* scores, const T* term, const Blocks& blocks, int64_t head, int64_t i,
                    int64_t count) {
    int64_t length = blocks.length;
    for (int64_t first = 0; first < length; first += blocks.rows) {
        int64_t step = blocks.step(first), j = first, last = first + blocks.in_block(first);
        const T* from = term + blocks.offset(head, first) + i;
        if (count == TILE)
            for (; j + TILE <= last; j += TILE) {
                Vector tile[TILE];
                for (int64_t c = 0; c < TILE; c++, from += step) {
                    __builtin_prefetch(from + TILE * step);
                    for (int64_t k = 0; k < TILE; k++) tile[c][k] = load(from[k]);
                }
                transpose(tile);
                for (int64_t k = 0; k < TILE; k++) {
                    float* to = scores + k * length + j;
                    for (int64_t c = 0; c < TILE; c++) to[c] += tile[k][c];
                }
            }
        for (; j < last; j++, from += step)
            for (int64_t k = 0; k < count; k++) scores[k * length + j] += load(from[k]);
    }
}

// term[j][i + k] = scores[k][j], for `count` <= TILE rows i.
template <class T>
void put_transposed(const float* scores, T* term, const Blocks& blocks, int64_t head, int64_t i,
                    int64_t count) {
    int64_t length = blocks.length;
    for (int64_t first = 0; first < length; first += blocks.rows) {
        int64_t step = blocks.step(first), j = first, last = first + blocks.in_block(first);
        T* to = term + blocks.offset(head, first) + i;
        if (count == TILE)
            for (; j + TILE <= last; j += TILE) {
                Vector tile[TILE];
                for (int64_t k = 0; k < TILE; k++)
                    std::memcpy(&tile[k], scores + k * length + j, sizeof(Vector));
                transpose(tile);
                for (int64_t c = 0; c < TILE; c++, to += step) {
                    __builtin_prefetch(to + TILE * step, 1);
                    round_all(&tile[c][0], to, TILE);
                }
            }
        for (; j < last; j++, to += step)
            for (int64_t k = 0; k < count; k++) store(to[k], scores[k * length + j]);
    }
}

template <class T>
void compute_probabilities(T* scores, T* saved, const T* c2p, const T* p2c, const bool* mask, int64_t heads,
                           int64_t length, int64_t block_rows, uint64_t seed, int64_t first, int threshold,
                           int threads) {
    Blocks blocks{heads, length, block_rows};
    int64_t tiles = (length + TILE - 1) / TILE;
    bool has_padding = !std::all_of(mask, mask + length, [](bool real) { return real; });
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(TILE * length);
        std::vector<uint64_t> words;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < heads * tiles; task++) {
            int64_t head = task / tiles, i = task % tiles * TILE, count = std::min(TILE, length - i);
            for (int64_t k = 0; k < count; k++) {
                float* s = &room[k * length];
                const T* content = scores + (head * length + i + k) * length;
                if (c2p) {
                    const T* term = c2p + blocks.offset(head, i + k);
                    for (int64_t j = 0; j < length; j++) s[j] = load(content[j]) + load(term[j]);
                } else {
                    for (int64_t j = 0; j < length; j++) s[j] = load(content[j]);
                }
            }
            if (p2c) add_transposed(room.data(), p2c, blocks, head, i, count);
            for (int64_t k = 0; k < count; k++) {
                float* __restrict s = &room[k * length];
                int64_t row = (head * length + i + k) * length;
                T* __restrict to = scores + row, * __restrict saved_row = saved + row;
                if (!mask[i + k]) {
                    std::memset(to, 0, length * sizeof(T));
                    std::memset(saved_row, 0, length * sizeof(T));
                    continue;
                }
                if (has_padding)
                    for (int64_t j = 0; j < length; j++) s[j] = mask[j] ? s[j] : -INFINITY;
                apply_softmax(s, to, saved_row, length, seed, first + row, threshold, words);
            }
        }
    }
}

template <class T>
void compute_score_gradients(const T* saved, T* gradients, T* dropped, T* c2p, T* p2c, const float* inner,
                             int64_t heads, int64_t length, int64_t block_rows, int threads) {
    Blocks blocks{heads, length, block_rows};
    int64_t tiles = (length + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(TILE * length);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < heads * tiles; task++) {
            int64_t head = task / tiles, i = task % tiles * TILE, count = std::min(TILE, length - i);
            for (int64_t k = 0; k < count; k++) {
                float* s = &room[k * length];
                int64_t row = (head * length + i + k) * length;
                const T* saved_row = saved + row;
                T *gradient = gradients + row, *drop = dropped + row;
                float dot = inner[head * length + i + k];
                for (int64_t j = 0; j < length; j++) {
                    float p = load(saved_row[j]), d = load(gradient[j]), positive = p < 0 ? 0 : p;
                    s[j] = positive * d - std::fabs(p) * dot;
                    store(drop[j], positive);
                    store(gradient[j], s[j]);
                }
                if (c2p) std::memcpy(c2p + blocks.offset(head, i + k), gradient, length * sizeof(T));
            }
            if (p2c) put_transposed(room.data(), p2c, blocks, head, i, count);
        }
    }
}

template <class In, class Out>
void apply_dropout(const In* x, const Out* residual, Out* out, int64_t count, uint64_t seed, int threshold,
                   float scale, int threads) {
    constexpr int64_t PART = 4096;
#pragma omp parallel num_threads(threads)
    {
        std::vector<uint64_t> words;
        std::vector<float> sum(PART);
#pragma omp for schedule(static)
        for (int64_t first = 0; first < count; first += PART) {
            int64_t size = std::min(PART, count - first);
            const Bits* bits = draw_bits(seed, first, size, words);
            const In* from = x + first;
            for (int64_t j = 0; j < size; j++) sum[j] = bits[j] < threshold ? 0 : load(from[j]) * scale;
            if (residual)
                for (int64_t j = 0; j < size; j++) sum[j] += load(residual[first + j]);
            round_all(sum.data(), out + first, size);
        }
    }
}

template <class T>
void sum_chunk(const T* logits, float* largest, float* sums, int64_t rows, int64_t columns, int64_t group,
               int threads) {
    int64_t groups = (columns + group - 1) / group;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < rows; m++) {
        const T* x = logits + m * columns;
        float top = largest[m] = find_maximum(x, columns);
        for (int64_t s = 0; s < groups; s++) {
            float total = 0;
            int64_t end = std::min((s + 1) * group, columns);
#pragma omp simd reduction(+ : total)
            for (int64_t c = s * group; c < end; c++) total += compute_exp(load(x[c]) - top);
            sums[m * groups + s] = total;
        }
    }
}

template <class T>
void compute_chunk_gradients(T* logits, const float* shift, const float* weight, const int64_t* target,
                             const float* sign, float* dbias, int64_t rows, int64_t columns, int threads) {
    constexpr int64_t PART = 512;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < columns; first += PART) {
        int64_t size = std::min(PART, columns - first);
        float total[PART] = {}, value[PART];
        for (int64_t m = 0; m < rows; m++) {
            T* x = logits + m * columns + first;
            float signs = sign[m], from = shift[m];
            int64_t at = target[m] - first;
            float here = at >= 0 && at < size ? compute_exp(load(x[at]) - from) - weight[m] : 0;
            for (int64_t c = 0; c < size; c++) {
                value[c] = compute_exp(load(x[c]) - from);
                total[c] += signs * value[c];
            }
            round_all(value, x, size);
            if (at >= 0 && at < size) {
                store(x[at], here);
                total[at] -= signs * weight[m];
            }
        }
        std::copy(total, total + size, dbias + first);
    }
}

// x [rows, columns] as out [columns, rows], rounded as `round_all` does; `sums` of the columns, where wanted.
template <class In, class Out>
void transpose_matrix(const In* x, Out* out, float* sums, int64_t rows, int64_t columns, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t j = 0; j < columns; j += TILE) {
        int64_t width = std::min(TILE, columns - j), i = 0;
        Vector total[TILE] = {};  // sixteen partial sums of each column
        if (width == TILE)
            for (; i + 2 * TILE <= rows; i += 2 * TILE)  // a full line of the cache at a time for bfloat16
                for (int64_t half = 0; half < 2 * TILE; half += TILE) {
                    Vector tile[TILE];
                    for (int64_t k = 0; k < TILE; k++)
                        for (int64_t c = 0; c < TILE; c++)
                            tile[k][c] = load(x[(i + half + k) * columns + j + c]);
                    transpose(tile);
                    for (int64_t k = 0; k < TILE; k++)
                        round_all(&tile[k][0], out + (j + k) * rows + i + half, TILE);
                    if (sums)
                        for (int64_t k = 0; k < TILE; k++) total[k] += tile[k];
                }
        for (; i < rows; i++)
            for (int64_t c = 0; c < width; c++) {
                float value = load(x[i * columns + j + c]);
                store(out[(j + c) * rows + i], value);
                total[c][0] += value;
            }
        if (sums)
            for (int64_t c = 0; c < width; c++) {
                float sum = 0;
                for (int64_t n = 0; n < TILE; n++) sum += total[c][n];
                sums[j + c] = sum;
            }
    }
}

template <class T>
void compute_gelu_gradients(T* x, T* gradients, int64_t count, int threads) {
    constexpr int64_t PART = 512;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < count; first += PART) {
        int64_t size = std::min(PART, count - first);
        float values[PART], slopes[PART];
        for (int64_t j = 0; j < size; j++) {
            float value = load(x[first + j]), below, density;
            compute_normal(value, below, density);
            values[j] = value * below;
            slopes[j] = load(gradients[first + j]) * (below + value * density);
        }
        round_all(values, x + first, size);
        round_all(slopes, gradients + first, size);
    }
}

}  // namespace

#define FOR_TYPE(T, NAME)                                                                                  \
    EXPORT compute_probabilities_##NAME(T* scores, T* saved, const T* c2p, const T* p2c, const bool* mask, \
                                        int64_t heads, int64_t length, int64_t block_rows, uint64_t seed,  \
                                        int64_t first, int64_t threshold, int threads) {                   \
        compute_probabilities(scores, saved, c2p, p2c, mask, heads, length, block_rows, seed, first,       \
                              threshold, threads);                                                         \
    }                                                                                                      \
    EXPORT compute_score_gradients_##NAME(const T* saved, T* gradients, T* dropped, T* c2p, T* p2c,        \
                                          const float* inner, int64_t heads, int64_t length,               \
                                          int64_t block_rows, int threads) {                               \
        compute_score_gradients(saved, gradients, dropped, c2p, p2c, inner, heads, length, block_rows,     \
                                threads);                                                                  \
    }                                                                                                      \
    EXPORT sum_chunk_##NAME(const T* logits, float* largest, float* sums, int64_t rows, int64_t columns,   \
                            int64_t group, int threads) {                                                  \
        sum_chunk(logits, largest, sums, rows, columns, group, threads);                                   \
    }                                                                                                      \
    EXPORT compute_chunk_gradients_##NAME(T* logits, const float* shift, const float* weight,              \
                                          const int64_t* target, const float* sign, float* dbias,          \
                                          int64_t rows, int64_t columns, int threads) {                    \
        compute_chunk_gradients(logits, shift, weight, target, sign, dbias, rows, columns, threads);       \
    }                                                                                                      \
    EXPORT compute_gelu_gradients_##NAME(T* x, T* gradients, int64_t count, int threads) {                 \
        compute_gelu_gradients(x, gradients, count, threads);                                              \
    }                                                                                                      \
    EXPORT transpose_matrix_##NAME(const T* x, bfloat16* out, float* sums, int64_t rows, int64_t columns,  \
                                   int threads) {                                                          \
        transpose_matrix(x, out, sums, rows, columns, threads);                                            \
    }

FOR_TYPE(float, float32)
FOR_TYPE(bfloat16, bfloat16)

#define FOR_TYPES(IN, OUT, IN_NAME, OUT_NAME)                                                              \
    EXPORT apply_dropout_##IN_NAME##_##OUT_NAME(const IN* x, const OUT* residual, OUT* out, int64_t count, \
                                                uint64_t seed, int64_t threshold, float scale,             \
                                                int threads) {                                             \
        apply_dropout(x, residual, out, count, seed, threshold, scale, threads);                           \
    }

FOR_TYPES(float, float, float32, float32)
FOR_TYPES(float, bfloat16, float32, bfloat16)
FOR_TYPES(bfloat16, float, bfloat16, float32)
FOR_TYPES(bfloat16, bfloat16, bfloat16, bfloat16)
