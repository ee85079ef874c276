// Disentangled attention of one head of one sequence at a time, in bfloat16 on processors whose registers
// hold tiles of matrices (AMX): scores stay in the core's cache. See ../attention.py for the formulas.
//
// A tile holds 16 rows of 64 bytes, with any distance between the rows. That makes the position terms cheap:
// row i of the scores needs the dot products with the table's rows from one distance earlier than row i - 1,
// so a tile whose rows lie one element further apart than the buffer's is read or added in place.
//
// The second factor of a matmul has two of its rows in one, in pairs of elements. L length, D head size.

#include "tiles.h"

#ifdef __AMX_BF16__

#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t MARGIN = 32;  // elements on both sides of a row that shifted tiles reach
constexpr int64_t TOGETHER =
    128;  // rows of scores at a time, which need 32 more distances of p2c than they are
constexpr int64_t PAIRED = 128;   // rows whose pairs are made at a time: they stay in the cache
constexpr int64_t SEQUENCES = 4;  // whose gradients of tables one thread adds up
constexpr int PERMISSION_FOR_TILES = 0x1023, TILES = 18;  // arch_prctl

// Hands out memory piece by piece; without any, it only counts.
struct Room {
    char* base;
    int64_t used = 0;

    template <class T>
    Matrix<T> matrix(int64_t rows, int64_t width) {
        width = (width + APART - 1) / APART * APART;
        T* at = reinterpret_cast<T*>(base ? base + used : nullptr);
        used += (rows * width * int64_t(sizeof(T)) + 63) / 64 * 64;
        return {at, width};
    }
};

// The matrices of one thread. Their memory stays for the next call: new memory is slow.
template <class T>
T make_room(int64_t length, int64_t size) {
    static thread_local std::vector<char> memory;
    Room counting{nullptr};
    T(counting, length, size);
    if (int64_t(memory.size()) < counting.used + 64) memory.assign(counting.used + 64, 0);
    Room room{memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64};
    return T(room, length, size);
}

struct ForwardRoom {
    Matrix<uint32_t> kt, values;
    Matrix<float> scores, distances, term, sums;
    Matrix<bfloat16> dropped;

    ForwardRoom(Room& room, int64_t length, int64_t size)
        : kt(room.matrix<uint32_t>(length / 2, size)),
          values(room.matrix<uint32_t>(length / 2, size)),
          scores(room.matrix<float>(TOGETHER, length + APART)),
          distances(room.matrix<float>(BLOCK, length + BLOCK + APART)),
          term(room.matrix<float>(BLOCK, TOGETHER + BLOCK + APART)),
          sums(room.matrix<float>(BLOCK, size)),
          dropped(room.matrix<bfloat16>(BLOCK, length + 2 * APART)) {}
};

// `pairs` is of probabilities first, for the gradient of v, then of parts of the gradients of scores;
// `turned` is what each matmul needs; `outer` the context's gradient, scaled as dropout does.
struct BackwardRoom {
    Matrix<bfloat16> gradients, mirrored, outer, turned;
    Matrix<uint32_t> pairs, vt, rows;
    Matrix<float> block, sums;

    BackwardRoom(Room& room, int64_t length, int64_t size)
        : gradients(room.matrix<bfloat16>(length, length + 2 * MARGIN + APART)),
          mirrored(room.matrix<bfloat16>(length, length + 2 * MARGIN + APART)),
          outer(room.matrix<bfloat16>(length, size)),
          turned(room.matrix<bfloat16>(size, length + 2 * APART)),
          pairs(room.matrix<uint32_t>(length / 2, length + 2 * MARGIN + APART)),
          vt(room.matrix<uint32_t>(length / 2, size)),
          rows(room.matrix<uint32_t>(length / 2, size)),
          block(room.matrix<float>(BLOCK, std::max(length, size) + APART)),
          sums(room.matrix<float>(size, length + APART)) {}
};

// Pairs as they lie in a matrix.
inline Right get_pairs(Matrix<uint32_t> pairs, int64_t i, int64_t j, int64_t further = 0) {
    Rows<const uint32_t> rows = pairs.from<const uint32_t>(i, j, further);
    return {rows.at, rows.row, 16 * rows.row, 64};
}

// Zero for what has a minus sign, but not for NaN.
inline bfloat16 clear_dropped(bfloat16 p) { return p.bits > 0x8000 && p.bits <= 0xff80 ? bfloat16{0} : p; }

// [D, rows] of [rows, D]
void transpose_rows(const bfloat16* x, int64_t distance, int64_t rows, int64_t size, Matrix<bfloat16> to) {
    for (int64_t i = 0; i < rows; i += TILE)
        for (int64_t d = 0; d < size; d += TILE) {
            Vector tile[TILE];
            for (int64_t k = 0; k < TILE; k++)
                for (int64_t c = 0; c < TILE; c++) tile[k][c] = load(x[(i + k) * distance + d + c]);
            transpose(tile);
            for (int64_t k = 0; k < TILE; k++) round_all(&tile[k][0], to.row(d + k) + i, TILE);
        }
}

// Position tables [H, W, D] of all heads, a row of zeros after each, packed.
std::unique_ptr<uint32_t[]> pack_tables(const bfloat16* tables, int64_t heads, int64_t length, int64_t size,
                                        bool is_transposed, int threads) {
    if (!tables) return nullptr;
    std::unique_ptr<uint32_t[]> packed(new uint32_t[heads * length * size]);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t head = 0; head < heads; head++) {
        int64_t rows = 2 * length - 1;
        std::vector<bfloat16> table((rows + 1) * size);
        std::memcpy(table.data(), tables + head * rows * size, rows * size * sizeof(bfloat16));
        Packed to{&packed[head * length * size], size, is_transposed};
        if (is_transposed) pack_columns(table.data(), rows + 1, size, to);
        else pack_rows(table.data(), size, rows + 1, size, to);
    }
    return packed;
}

// Gradient of queries [L, D]: what content and positions give. `gradients` [L, L] of the scores, zeros around
// each row; `keys` and `table` in pairs of rows. Transposed, that of keys, from queries and the other table.
void compute_row_gradients(Matrix<bfloat16> gradients, Packed keys, Packed table, int64_t length,
                           int64_t size, Matrix<float> sums, bfloat16* out) {
    for (int64_t i = 0; i < length; i += BLOCK) {
        for (int64_t d = 0; d < size; d += BLOCK) {
            clear_sums();
            add_matmul(gradients.from<const bfloat16>(i, MARGIN), keys.from(0, d), length / 32);
            if (table.at)
                add_matmul(gradients.from<const bfloat16>(i, MARGIN - BLOCK + 1, 1),
                           table.from(length - BLOCK - i, d), (length + BLOCK) / 32);
            store_sums(sums.from<float>(0, d));
        }
        for (int64_t n = 0; n < BLOCK; n++) round_all(sums.row(n), out + (i + n) * size, size);
    }
}

// Adds the gradient of a table, [D, 2L], from `gradients` of the scores as above and `queries` [D, L].
void add_table_gradients(Matrix<bfloat16> gradients, Matrix<bfloat16> queries, int64_t length, int64_t size,
                         Matrix<uint32_t> pairs, Matrix<float> out) {
    for (int64_t start = 0, end; start < length; start = end) {
        end = std::min(start + PAIRED, length);
        // The second row of a pair needs the next distance for the same column; pairs of rows lie two
        // distances apart.
        for (int64_t i = start; i < end; i += 2) {
            const bfloat16 *a = gradients.row(i), *b = gradients.row(i + 1) + 1;
            uint32_t* to = pairs.row((i - start) / 2);
            for (int64_t j = 0; j < length + 2 * MARGIN - 1; j++) to[j] = join_pair(a[j], b[j]);
        }
        for (int64_t w = length - end; w < 2 * length - start; w += BLOCK) {
            int64_t i = std::max(start, length - BLOCK - w), last = std::min(end, 2 * length - w);
            for (int64_t d = 0; d < size; d += BLOCK) {
                load_sums(out.from<float>(d, w));
                add_matmul(queries.from<const bfloat16>(d, i),
                           get_pairs(pairs, (i - start) / 2, MARGIN + w - length + 1 + i, 2),
                           (last - i) / 32);
                store_sums(out.from<float>(d, w));
            }
        }
    }
}

// [W, D] of each head, from [D, 2L] of each head in each group of sequences.
void sum_tables(const float* parts, bfloat16* tables, int64_t groups, int64_t heads, int64_t length,
                int64_t size, int threads) {
    int64_t width = 2 * length;
    if (!tables) return;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t head = 0; head < heads; head++)
        for (int64_t w = 0; w < width; w += TILE)
            for (int64_t d = 0; d < size; d += TILE) {
                Vector tile[TILE] = {};
                for (int64_t group = 0; group < groups; group++)
                    for (int64_t n = 0; n < TILE; n++) {
                        const float* from =
                            &parts[((group * heads + head) * size + d + n) * (width + APART) + w];
                        for (int64_t m = 0; m < TILE; m++) tile[n][m] += from[m];
                    }
                transpose(tile);
                for (int64_t n = 0; n < std::min(TILE, width - 1 - w); n++)
                    for (int64_t m = 0; m < TILE; m++)
                        store(tables[(head * (width - 1) + w + n) * size + d + m], tile[n][m]);
            }
}

}  // namespace

// Whether the system lets this process use tiles; asking for them is enough.
extern "C" __attribute__((visibility("default"))) int request_tiles() {
    return syscall(SYS_arch_prctl, PERMISSION_FOR_TILES, TILES) == 0;
}

EXPORT compute_attention_bfloat16(const bfloat16* q, const bfloat16* k, const bfloat16* v,
                                  const bfloat16* key_table, const bfloat16* query_table, const bool* mask,
                                  bfloat16* saved, bfloat16* context, int64_t batch, int64_t heads,
                                  int64_t length, int64_t size, uint64_t seed, int64_t threshold, float scale,
                                  int threads) {
    auto key_tables = pack_tables(key_table, heads, length, size, true, threads);
    auto query_tables = pack_tables(query_table, heads, length, size, true, threads);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        std::vector<uint64_t> words;
        auto [kt, values, scores, distances, term, sums, dropped] = make_room<ForwardRoom>(length, size);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < batch * heads; task++) {
            int64_t head = task % heads, b = task / heads;
            const bfloat16 *queries = q + task * length * size, *keys = k + task * length * size;
            const bool* real = mask + b * length;
            bool has_padding = !std::all_of(real, real + length, [](bool here) { return here; });
            Packed keys_packed{kt.at, size, true}, values_packed{values.at, size, false};
            Packed key_packed{key_table ? &key_tables[head * length * size] : nullptr, size, true};
            Packed query_packed{query_table ? &query_tables[head * length * size] : nullptr, size, true};
            pack_columns(keys, length, size, keys_packed);
            pack_rows(v + task * length * size, size, length, size, values_packed);
            for (int64_t start = 0; start < length; start += TOGETHER) {
                int64_t end = std::min(start + TOGETHER, length);
                for (int64_t i = start; i < end; i += BLOCK)
                    for (int64_t j = 0; j < length; j += BLOCK)
                        multiply(scores.from<float>(i - start, j), {queries + i * size, size * 2},
                                 keys_packed.from(j), size / 32);
                for (int64_t j = 0; j < length && query_table; j += BLOCK) {
                    for (int64_t c = 0; c < end - start + BLOCK; c += BLOCK)
                        multiply(term.from<float>(0, c), {keys + j * size, size * 2},
                                 query_packed.from(length - BLOCK + start - j + c), size / 32);
                    for (int64_t r = 0; r < end - start; r += TILE)
                        for (int64_t s = 0; s < BLOCK; s += TILE) {
                            Vector tile[TILE];
                            for (int64_t n = 0; n < TILE; n++)
                                std::memcpy(&tile[n], term.row(s + n) + BLOCK - 1 - s - n + r,
                                            sizeof(Vector));
                            transpose(tile);
                            for (int64_t n = 0; n < TILE; n++) {
                                float* to = scores.row(r + n) + j + s;
                                for (int64_t m = 0; m < TILE; m++) to[m] += tile[n][m];
                            }
                        }
                }
                for (int64_t i = start; i < end; i += BLOCK) {
                    for (int64_t c = 0; c < length + BLOCK && key_table; c += BLOCK)
                        multiply(distances.from<float>(0, c), {queries + i * size, size * 2},
                                 key_packed.from(length - BLOCK - i + c), size / 32);
                    for (int64_t n = 0; n < BLOCK; n++) {
                        int64_t row = (task * length + i + n) * length;
                        float* s = scores.row(i - start + n);
                        if (!real[i + n]) {
                            std::memset(saved + row, 0, length * sizeof(bfloat16));
                            std::memset(dropped.row(n), 0, length * sizeof(bfloat16));
                            continue;
                        }
                        if (key_table) {  // column c is distance i + 31 - c
                            const float* term = distances.row(n) + BLOCK - 1 - n;
                            for (int64_t j = 0; j < length; j++) s[j] += term[j];
                        }
                        if (has_padding)
                            for (int64_t j = 0; j < length; j++) s[j] = real[j] ? s[j] : -INFINITY;
                        apply_softmax(s, dropped.row(n), saved + row, length, seed, row, threshold, words);
                    }
                    for (int64_t d = 0; d < size; d += BLOCK)
                        multiply(sums.from<float>(0, d), dropped.from<const bfloat16>(0, 0),
                                 values_packed.from(0, d), length / 32);
                    for (int64_t n = 0; n < BLOCK; n++) {
                        bfloat16* to = context + ((b * length + i + n) * heads + head) * size;
                        for (int64_t d = 0; d < size; d++) sums.row(n)[d] *= scale;
                        round_all(sums.row(n), to, size);
                    }
                }
            }
        }
    }
}

EXPORT compute_attention_gradients_bfloat16(const bfloat16* q, const bfloat16* k, const bfloat16* v,
                                            const bfloat16* key_table, const bfloat16* query_table,
                                            const bfloat16* saved, const bfloat16* context,
                                            const bfloat16* gradient, bfloat16* dq, bfloat16* dk,
                                            bfloat16* dv, bfloat16* dkey_table, bfloat16* dquery_table,
                                            int64_t batch, int64_t heads, int64_t length, int64_t size,
                                            float scale, int threads) {
    auto key_tables = pack_tables(key_table, heads, length, size, false, threads);
    auto query_tables = pack_tables(query_table, heads, length, size, false, threads);
    int64_t table_width = 2 * length + APART, table_part = size * table_width;
    int64_t groups = (batch + SEQUENCES - 1) / SEQUENCES;
    std::unique_ptr<float[]> dkeys(key_table ? new float[groups * heads * table_part] : nullptr);
    std::unique_ptr<float[]> dqueries(query_table ? new float[groups * heads * table_part] : nullptr);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        auto [gradients, mirrored, outer, turned, pairs, vt, rows, block, sums] =
            make_room<BackwardRoom>(length, size);
        int64_t width = gradients.width;
        std::vector<float> inner(length);
        for (int64_t i = 0; i < length; i++)
            for (const auto& matrix : {gradients, mirrored}) {
                std::memset(matrix.row(i), 0, MARGIN * sizeof(bfloat16));
                std::memset(matrix.row(i) + MARGIN + length, 0, (width - MARGIN - length) * sizeof(bfloat16));
            }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < groups * heads; task++) {
            int64_t head = task % heads, group = task / heads;
            Packed key_packed{key_table ? &key_tables[head * length * size] : nullptr, size, false};
            Packed query_packed{query_table ? &query_tables[head * length * size] : nullptr, size, false};
            Matrix<float> dkey{dkeys ? &dkeys[task * table_part] : nullptr, table_width};
            Matrix<float> dquery{dqueries ? &dqueries[task * table_part] : nullptr, table_width};
            for (const auto& sum : {dkey, dquery})
                if (sum.at) std::fill(sum.at, sum.at + table_part, 0.0f);
            for (int64_t b = group * SEQUENCES; b < std::min(batch, (group + 1) * SEQUENCES); b++) {
                int64_t matrix = b * heads + head, start = matrix * length * size;
                // The context's gradient, scaled as dropout does, and its dot products with the context.
                for (int64_t i = 0; i < length; i++) {
                    int64_t row = ((b * length + i) * heads + head) * size;
                    float total = 0, *scaled = block.row(0);
#pragma omp simd reduction(+ : total)
                    for (int64_t d = 0; d < size; d++) {
                        float g = load(gradient[row + d]);
                        total += load(context[row + d]) * g;
                        scaled[d] = g * scale;
                    }
                    round_all(scaled, outer.row(i), size);
                    inner[i] = total;
                }
                // Gradients of the scores, also transposed; and the probabilities that multiplied v, in pairs
                // of rows.
                Packed values_packed{vt.at, size, true}, rows_packed{rows.at, size, false};
                pack_columns(v + start, length, size, values_packed);
                for (int64_t i = 0; i < length; i += BLOCK) {
                    for (int64_t j = 0; j < length; j += BLOCK)
                        multiply(block.from<float>(0, j), outer.from<const bfloat16>(i, 0),
                                 values_packed.from(j), size / 32);
                    for (int64_t n = 0; n < BLOCK; n++) {
                        const bfloat16* saved_row = saved + (matrix * length + i + n) * length;
                        float *s = block.row(n), dot = inner[i + n];
                        bfloat16* to = gradients.row(i + n) + MARGIN;
                        for (int64_t j = 0; j < length; j++) {
                            float p = load(saved_row[j]), positive = p < 0 ? 0 : p;
                            s[j] = positive * s[j] - std::fabs(p) * dot;
                        }
                        round_all(s, to, length);
                    }
                    for (int64_t n = 0; n < BLOCK; n += 2) {
                        const bfloat16 *low = saved + (matrix * length + i + n) * length,
                                       *high = low + length;
                        uint32_t* to = pairs.row((i + n) / 2);
                        for (int64_t j = 0; j < length; j++)
                            to[j] = join_pair(clear_dropped(low[j]), clear_dropped(high[j]));
                    }
                    for (int64_t j = 0; j < length; j += BLOCK)
                        put_transposed(block, mirrored.row(j) + MARGIN + i, width, j);
                }
                // Gradients of v; of q and k; of the tables.
                transpose_rows(outer.at, outer.width, length, size, turned);
                for (int64_t d = 0; d < size; d += BLOCK)
                    for (int64_t j = 0; j < length; j += BLOCK)
                        multiply(sums.from<float>(d, j), turned.from<const bfloat16>(d, 0),
                                 get_pairs(pairs, 0, j), length / 32);
                for (int64_t d = 0; d < size; d += BLOCK)
                    for (int64_t j = 0; j < length; j += BLOCK)
                        put_transposed({sums.row(d), sums.width}, dv + start + j * size + d, size, j);
                pack_rows(k + start, size, length, size, rows_packed);
                compute_row_gradients(gradients, rows_packed, key_packed, length, size, block, dq + start);
                pack_rows(q + start, size, length, size, rows_packed);
                compute_row_gradients(mirrored, rows_packed, query_packed, length, size, block, dk + start);
                if (key_table) {
                    transpose_rows(q + start, size, length, size, turned);
                    add_table_gradients(gradients, turned, length, size, pairs, dkey);
                }
                if (query_table) {
                    transpose_rows(k + start, size, length, size, turned);
                    add_table_gradients(mirrored, turned, length, size, pairs, dquery);
                }
            }
        }
    }
    sum_tables(dkeys.get(), dkey_table, groups, heads, length, size, threads);
    sum_tables(dqueries.get(), dquery_table, groups, heads, length, size, threads);
}

#endif
