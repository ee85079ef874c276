// Softmax over the vocabulary, and gradients through it, in bfloat16 on processors with AMX: logits of 32 words at 32
// positions at a time never leave the core's cache. See vocabulary.py for what is kept of them.
//
// Names: x [M, E] at M positions, a multiple of 32; table [V, E] of words in float32, bias [V]; in functions `rows`, `width`
// and `words` are M, E and V. Logits are those of a word in a row, of a position in a column.

#include "tiles.h"

#include <limits>

#ifdef __AMX_BF16__

namespace {

constexpr int64_t GROUP = BLOCK;  // words whose exponentials are added up
constexpr int64_t WORDS = 256;    // whose logits' gradients are held at a time
constexpr int64_t PARTS = 32;     // of the vocabulary: the gradient of x is summed in each, then over them, in order
constexpr float LOWEST = -std::numeric_limits<float>::max();

// The table, for 32 words at a time.
struct Table {
    const float* table;
    int64_t words, width;

    // Rows from `word` on, rounded; zeros after the table's end.
    void round(int64_t word, bfloat16* to, int64_t distance) const {
        for (int64_t n = 0; n < GROUP; n++, to += distance) {
            if (word + n < words)
                round_all(table + (word + n) * width, to, width);
            else
                std::memset(to, 0, width * sizeof(bfloat16));
        }
    }

    // Fetches a part of the row, number `part` of `parts`.
    void fetch(int64_t word, int64_t part, int64_t parts) const {
        if (word >= words) return;
        const float *row = table + word * width, *end = row + width * (part + 1) / parts;
        for (row += width * part / parts; row < end; row += TILE) __builtin_prefetch(row, 0, 2);
    }
};

// Softmax in two steps, for each position in each chunk of `chunk` words, a multiple of 32: the largest logit [N, M], and the
// sums of exponentials relative to it of groups of 32 words [N, S, M], which hold zeros at first. Also the target's logit [M].
void softmax_sums(const bfloat16* x, const float* table, const float* bias, const int64_t* target_words, float* target_logits,
                  float* largest, float* sums, int64_t rows, int64_t width, int64_t words, int64_t chunk, int threads) {
    std::vector<int32_t> targets(target_words, target_words + rows);
    int64_t groups = (words + GROUP - 1) / GROUP, a_chunk = chunk / GROUP;
    const Table all{table, words, width};
    Factor states(width, rows);
    std::unique_ptr<float[]> tops(new float[groups * rows]);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Between rounded_words(GROUP, width);
        states.take_columns(x);
        float top[BLOCK], total[BLOCK];
        auto finish = [&](int64_t word, int64_t m, int64_t turn, Block* done) {
            int64_t n = turn % BLOCK;
            float* __restrict logits = done->row(n);
            if (turn < BLOCK) {
                all.fetch(word + GROUP + n, m / BLOCK, rows / BLOCK);
                float shift = word + n < words ? bias[word + n] : -INFINITY;
                float* __restrict to = target_logits + m;
                const int32_t *target = &targets[m], here = int32_t(word + n);
                if (n == 0) std::fill(top, top + BLOCK, LOWEST);
#pragma omp simd
                for (int64_t c = 0; c < BLOCK; c++) {
                    logits[c] += shift;
                    top[c] = logits[c] > top[c] ? logits[c] : top[c];
                    if (target[c] == here) to[c] = logits[c];
                }
                return;
            }
            if (n == 0) std::fill(total, total + BLOCK, 0.0f);
#pragma omp simd
            for (int64_t c = 0; c < BLOCK; c++) total[c] += exponential(logits[c] - top[c]);
            if (n < BLOCK - 1) return;
            std::copy(top, top + BLOCK, &tops[word / GROUP * rows + m]);
            std::copy(total, total + BLOCK, sums + word / GROUP * rows + m);
        };
        Pipeline<1, decltype(finish)> blocks(finish, 2 * BLOCK, width / 32);
#pragma omp for schedule(dynamic, 8) nowait
        for (int64_t group = 0; group < groups; group++) {
            all.round(group * GROUP, rounded_words.row(0), rounded_words.distance);
            for (int64_t m = 0; m < rows; m += BLOCK)
                blocks.multiply(group * GROUP, m, [&](int64_t) {
                    return Product{{rounded_words.row(0), rounded_words.distance * 2}, states.panel(m).from(0), width / 32};
                });
        }
        blocks.end();
#pragma omp barrier
#pragma omp for schedule(static) collapse(2)
        for (int64_t first = 0; first < groups; first += a_chunk)
            for (int64_t m = 0; m < rows; m += BLOCK) {
                float* most = largest + first / a_chunk * rows + m;
                int64_t end = std::min(first + a_chunk, groups);
                std::fill(most, most + BLOCK, LOWEST);
                for (int64_t group = first; group < end; group++)
                    for (int64_t c = 0; c < BLOCK; c++) most[c] = std::max(most[c], tops[group * rows + m + c]);
                for (int64_t group = first; group < end; group++)
                    for (int64_t c = 0; c < BLOCK; c++)
                        sums[group * rows + m + c] *= exponential(tops[group * rows + m + c] - most[c]);
            }
    }
}

// Gradients of x, in float32, table and bias, from `gradient` [M] of the loss, whose logarithm of the sum of all exponentials
// is `log_total` [M].
void softmax_gradients(const bfloat16* x, const float* table, const float* bias, const int64_t* target_words,
                       const float* log_total, const float* gradient, float* dx, float* dtable, float* dbias, int64_t rows,
                       int64_t width, int64_t words, int threads) {
    std::vector<int32_t> targets(target_words, target_words + rows);
    int64_t groups = (words + GROUP - 1) / GROUP;
    const Table all{table, words, width};
    Factor states(width, rows), inputs(rows, width);
    std::unique_ptr<float[]> parts(new float[PARTS * rows * width]);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Between rounded_words(WORDS, width), dlogits(2 * GROUP, rows), turned(rows, WORDS);
        Factor pairs(WORDS, width);
        states.take_columns(x);
        inputs.take_rows(x, rows);
        int64_t start = 0;
        auto from_logits = [&](int64_t word, int64_t m, int64_t n, Block* done) {
            float *__restrict values = done->row(n), total = 0, shift = word + n < words ? bias[word + n] : -INFINITY;
            all.fetch(word + GROUP + n, m / BLOCK, rows / BLOCK);
            const float *less = log_total + m, *scale = gradient + m;
            const int32_t *target = &targets[m], here = int32_t(word + n);
#pragma omp simd reduction(+ : total)
            for (int64_t c = 0; c < BLOCK; c++) {
                values[c] = scale[c] * (exponential(values[c] + shift - less[c]) - (target[c] == here ? 1.0f : 0.0f));
                total += values[c];
            }
            if (word + n < words) dbias[word + n] = (m ? dbias[word + n] : 0) + total;
            put(values, dlogits.row(word % (2 * GROUP) + n) + m);
            if (n == BLOCK - 1) put_transposed({done->at, BLOCK}, turned.row(m) + word - start, turned.distance, 0);
        };
        auto keep = [&](int64_t word, int64_t e, int64_t n, Block* done) {
            if (word + n < words) put_through(done->row(n), dtable + (word + n) * width + e);
        };
        Pipeline<1, decltype(from_logits)> logits(from_logits, BLOCK, width / 32);
        Pipeline<1, decltype(keep)> gradients(keep, BLOCK, rows / 32);
#pragma omp for schedule(dynamic) nowait
        for (int64_t part = 0; part < PARTS; part++) {
            float* sum = &parts[part * rows * width];
            int64_t end = groups * (part + 1) / PARTS * GROUP;
            std::fill(sum, sum + rows * width, 0.0f);
            for (start = groups * part / PARTS * GROUP; start < end; start += WORDS) {
                int64_t count = std::min(WORDS, end - start);
                // Gradients of the logits of 32 words are complete when those of the next have been multiplied.
                for (int64_t i = 0; i <= count; i += GROUP) {
                    if (i < count) {
                        Left here{rounded_words.row(i), rounded_words.distance * 2};
                        all.round(start + i, rounded_words.row(i), rounded_words.distance);
                        for (int64_t m = 0; m < rows; m += BLOCK)
                            logits.multiply(start + i, m, [&](int64_t) {
                                return Product{here, states.panel(m).from(0), width / 32};
                            });
                        for (int64_t e = 0; e < width; e += BLOCK)
                            pack_rows(rounded_words.row(i) + e, rounded_words.distance, GROUP, BLOCK, pairs.panel(e, i));
                    } else {
                        logits.end();
                    }
                    int64_t word = start + i - GROUP;
                    for (int64_t e = 0; e < width && i > 0; e += BLOCK)
                        gradients.multiply(word, e, [&](int64_t) {
                            Left complete{dlogits.row(word % (2 * GROUP)), dlogits.distance * 2};
                            return Product{complete, inputs.panel(e).from(0), rows / 32};
                        });
                }
                for (int64_t m = 0; m < rows; m += BLOCK)
                    for (int64_t e = 0; e < width; e += BLOCK) {
                        Sums to{sum + m * width + e, width * 4};
                        load_sums(to);
                        add_product({turned.row(m), turned.distance * 2}, pairs.panel(e).from(0), count / 32);
                        store_sums(to);
                    }
            }
        }
        gradients.end();
        _mm_sfence();
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * width; i += BLOCK)
            for (int64_t c = 0; c < BLOCK; c++) {
                float total = 0;
                for (int64_t part = 0; part < PARTS; part++) total += parts[part * rows * width + i + c];
                dx[i + c] = total;
            }
    }
}

}  // namespace

EXPORT vocabulary_sums_bfloat16_float32(const bfloat16* x, const float* table, const float* bias, const int64_t* targets,
                                        float* target_logits, float* largest, float* sums, int64_t rows, int64_t width,
                                        int64_t words, int64_t chunk, int threads) {
    softmax_sums(x, table, bias, targets, target_logits, largest, sums, rows, width, words, chunk, threads);
}

EXPORT vocabulary_gradients_bfloat16_float32(const bfloat16* x, const float* table, const float* bias, const int64_t* targets,
                                             const float* log_total, const float* gradient, float* dx, float* dtable,
                                             float* dbias, int64_t rows, int64_t width, int64_t words, int threads) {
    softmax_gradients(x, table, bias, targets, log_total, gradient, dx, dtable, dbias, rows, width, words, threads);
}

#endif
