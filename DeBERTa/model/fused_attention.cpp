// Disentangled attention of one head of one sequence at a time, in bfloat16 on processors whose registers hold tiles of
// matrices (AMX): scores never leave the core's cache. See blocked_attention.py for what it computes.
//
// A tile holds 16 rows of 64 bytes, with any distance between the rows. That makes the position terms cheap: row i of the
// scores needs the products with the table's rows from one distance earlier on than row i - 1, so a tile whose rows lie one
// element further apart than the buffer's is read from, or added to, in the right place.
//
// The second factor of a product has two of its rows in one, in pairs of numbers. Names: L length, D head size.

#include "kernels.h"

#ifdef __AMX_BF16__

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>

namespace {

constexpr int64_t BLOCK = 32;   // rows and columns of a product: two by two tiles
constexpr int64_t MARGIN = 32;  // elements on both sides of a row that shifted tiles reach
constexpr int64_t APART = 16;   // elements between rows, so that these do not compete for the same lines of the cache
constexpr int PERMISSION_FOR_TILES = 0x1023, TILES = 18;  // arch_prctl

struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        std::fill(shape.row_bytes, shape.row_bytes + 8, 64);
        std::fill(shape.rows, shape.rows + 8, 16);
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
};

// Rows in memory, the next `row` bytes further on.
template <class T>
struct Rows {
    T* at;
    int64_t row;
};

typedef Rows<const bfloat16> Left;
typedef Rows<const uint32_t> Right;  // pairs
typedef Rows<float> Sums;

// sums [32, 32] = left [32, 32 * steps] right [32 * steps, 32], added to what is there with ADD.
template <bool ADD = false>
void multiply(Sums sums, Left left, Right right, int64_t steps) {
    char *first = reinterpret_cast<char*>(sums.at), *second = first + 16 * sums.row;
    if (ADD) {
        _tile_loadd(0, first, sums.row);
        _tile_loadd(1, first + 64, sums.row);
        _tile_loadd(2, second, sums.row);
        _tile_loadd(3, second + 64, sums.row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    const char* a = reinterpret_cast<const char*>(left.at);
    const char* b = reinterpret_cast<const char*>(right.at);
    for (int64_t step = 0; step < steps; step++, a += 64, b += 16 * right.row) {
        _tile_loadd(4, a, left.row);
        _tile_loadd(6, b, right.row);
        _tile_loadd(7, b + 64, right.row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * left.row, left.row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, first, sums.row);
    _tile_stored(1, first + 64, sums.row);
    _tile_stored(2, second, sums.row);
    _tile_stored(3, second + 64, sums.row);
}

// A matrix of the room that each thread keeps.
template <class T>
struct Matrix {
    T* at;
    int64_t width;  // elements from row to row

    T* row(int64_t i) const { return at + i * width; }
    // From element (i, j) on; `further` elements more from row to row.
    template <class U>
    Rows<U> from(int64_t i, int64_t j, int64_t further = 0) const {
        return {row(i) + j, (width + further) * int64_t(sizeof(T))};
    }
};

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

// The matrices of one thread. Their memory stays for the next call: new memory costs more than most of what is done in it.
template <class T>
T make_room(int64_t length, int64_t size) {
    static thread_local std::vector<char> kept;
    Room count{nullptr};
    T(count, length, size);
    if (int64_t(kept.size()) < count.used + 64) kept.assign(count.used + 64, 0);
    Room room{kept.data() + (64 - reinterpret_cast<uintptr_t>(kept.data()) % 64) % 64};
    return T(room, length, size);
}

struct ForwardRoom {
    Matrix<uint32_t> kt, values;
    Matrix<float> scores, term, sums;
    Matrix<bfloat16> dropped;

    ForwardRoom(Room& room, int64_t length, int64_t size)
        : kt(room.matrix<uint32_t>(size / 2, length + APART)),
          values(room.matrix<uint32_t>(length / 2, size)),
          scores(room.matrix<float>(BLOCK, length + 2 * MARGIN)),
          term(room.matrix<float>(BLOCK, 2 * BLOCK + APART)),
          sums(room.matrix<float>(BLOCK, size)),
          dropped(room.matrix<bfloat16>(BLOCK, length + 2 * APART)) {}
};

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
          vt(room.matrix<uint32_t>(size / 2, length + APART)),
          rows(room.matrix<uint32_t>(length / 2, size)),
          block(room.matrix<float>(BLOCK, std::max(length, size) + APART)),
          sums(room.matrix<float>(size, length + APART)) {}
};

inline uint32_t pair(bfloat16 low, bfloat16 high) { return uint32_t(low.bits) | uint32_t(high.bits) << 16; }

// [rows, D] as the second factor of a product over rows: [rows / 2, D] pairs of two rows.
void pair_rows(const bfloat16* x, int64_t distance, int64_t rows, int64_t size, Matrix<uint32_t> to) {
    for (int64_t i = 0; i < rows; i += 2) {
        const bfloat16 *a = x + i * distance, *b = a + distance;
        uint32_t* out = to.row(i / 2);
        for (int64_t d = 0; d < size; d++) out[d] = pair(a[d], b[d]);
    }
}

// Its transpose as the second factor of a product over D: [D / 2, rows] pairs of two columns.
void pair_columns(const bfloat16* x, int64_t distance, int64_t rows, int64_t size, Matrix<uint32_t> to) {
    for (int64_t i = 0; i < rows; i += TILE)
        for (int64_t d = 0; d < size; d += 2 * TILE) {
            Vector tile[TILE];  // of pairs, which are only moved
            for (int64_t k = 0; k < TILE; k++) std::memcpy(&tile[k], x + (i + k) * distance + d, sizeof(Vector));
            transpose(tile);
            for (int64_t k = 0; k < TILE; k++) std::memcpy(to.row(d / 2 + k) + i, &tile[k], sizeof(Vector));
        }
}

// [D, rows] of [rows, D]
void transposed(const bfloat16* x, int64_t distance, int64_t rows, int64_t size, Matrix<bfloat16> to) {
    for (int64_t i = 0; i < rows; i += TILE)
        for (int64_t d = 0; d < size; d += TILE) {
            Vector tile[TILE];
            for (int64_t k = 0; k < TILE; k++)
                for (int64_t c = 0; c < TILE; c++) tile[k][c] = load(x[(i + k) * distance + d + c]);
            transpose(tile);
            for (int64_t k = 0; k < TILE; k++)
                for (int64_t c = 0; c < TILE; c++) store(to.row(d + k)[i + c], tile[k][c]);
        }
}

// to[i][j] = from[j][i] for a block of 32 x 32 from (j, i) on
void put_transposed(Matrix<float> from, bfloat16* to, int64_t distance, int64_t j) {
    for (int64_t k = 0; k < BLOCK; k += TILE)
        for (int64_t c = 0; c < BLOCK; c += TILE) {
            Vector tile[TILE];
            for (int64_t n = 0; n < TILE; n++) std::memcpy(&tile[n], from.row(k + n) + j + c, sizeof(Vector));
            transpose(tile);
            for (int64_t n = 0; n < TILE; n++)
                for (int64_t m = 0; m < TILE; m++) store(to[(c + n) * distance + k + m], tile[n][m]);
        }
}

// A head's position table [W, D] in pairs, a row of zeros after it: [D / 2, 2L] by columns or [L, D] by rows.
std::vector<uint32_t> pair_tables(const bfloat16* tables, int64_t heads, int64_t length, int64_t size, bool columns, int threads) {
    std::vector<uint32_t> pairs(tables ? heads * (columns ? size / 2 * (2 * length + APART) : length * size) : 0);
    if (!tables) return pairs;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t head = 0; head < heads; head++) {
        int64_t rows = 2 * length - 1;
        std::vector<bfloat16> table((rows + 1) * size);
        std::memcpy(table.data(), tables + head * rows * size, rows * size * sizeof(bfloat16));
        if (columns)
            pair_columns(table.data(), size, rows + 1, size, {&pairs[head * (size / 2) * (rows + 1 + APART)], rows + 1 + APART});
        else
            pair_rows(table.data(), size, rows + 1, size, {&pairs[head * length * size], size});
    }
    return pairs;
}

void attention(const bfloat16* q, const bfloat16* k, const bfloat16* v, const bfloat16* key_table, const bfloat16* query_table,
               const bool* mask, bfloat16* kept, bfloat16* context, int64_t batch, int64_t heads, int64_t length, int64_t size,
               uint64_t seed, int threshold, float scale, int threads) {
    std::vector<uint32_t> key_pairs = pair_tables(key_table, heads, length, size, true, threads);
    std::vector<uint32_t> query_pairs = pair_tables(query_table, heads, length, size, true, threads);
    int64_t table_width = 2 * length + APART;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        std::vector<float> padding(length);
        std::vector<uint64_t> words;
        auto [kt, values, scores, term, sums, dropped] = make_room<ForwardRoom>(length, size);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < batch * heads; task++) {
            int64_t head = task % heads, b = task / heads;
            const bfloat16 *queries = q + task * length * size, *keys = k + task * length * size;
            const bool* real = mask + b * length;
            bool padded = !std::all_of(real, real + length, [](bool here) { return here; });
            for (int64_t j = 0; j < length; j++) padding[j] = real[j] ? 0 : -INFINITY;
            Matrix<uint32_t> key_columns{key_table ? &key_pairs[head * (size / 2) * table_width] : nullptr, table_width};
            Matrix<uint32_t> query_columns{query_table ? &query_pairs[head * (size / 2) * table_width] : nullptr, table_width};
            pair_columns(keys, size, length, size, kt);
            pair_rows(v + task * length * size, size, length, size, values);
            for (int64_t i = 0; i < length; i += BLOCK) {
                Left here{queries + i * size, size * 2};
                for (int64_t j = 0; j < length; j += BLOCK)
                    multiply(scores.from<float>(0, MARGIN + j), here, kt.from<const uint32_t>(0, j), size / 32);
                // Column w of the products belongs to distance L - 1 - w.
                if (key_table)
                    for (int64_t c = 0; c < length + BLOCK; c += BLOCK)
                        multiply<true>(scores.from<float>(0, MARGIN + c - BLOCK + 1, 1), here,
                                       key_columns.from<const uint32_t>(0, length - BLOCK - i + c), size / 32);
                if (query_table)
                    for (int64_t j = 0; j < length; j += BLOCK) {
                        for (int64_t c = 0; c < 2 * BLOCK; c += BLOCK)
                            multiply(term.from<float>(0, c), {keys + j * size, size * 2},
                                     query_columns.from<const uint32_t>(0, length - BLOCK + i - j + c), size / 32);
                        for (int64_t s = 0; s < BLOCK; s += TILE)
                            for (int64_t r = 0; r < BLOCK; r += TILE) {
                                Vector tile[TILE];
                                for (int64_t n = 0; n < TILE; n++)
                                    std::memcpy(&tile[n], term.row(s + n) + BLOCK - 1 - s - n + r, sizeof(Vector));
                                transpose(tile);
                                for (int64_t n = 0; n < TILE; n++) {
                                    float* to = scores.row(r + n) + MARGIN + j + s;
                                    for (int64_t m = 0; m < TILE; m++) to[m] += tile[n][m];
                                }
                            }
                    }
                for (int64_t n = 0; n < BLOCK; n++) {
                    int64_t row = (task * length + i + n) * length;
                    float* s = scores.row(n) + MARGIN;
                    if (!real[i + n]) {
                        std::memset(kept + row, 0, length * sizeof(bfloat16));
                        std::memset(dropped.row(n), 0, length * sizeof(bfloat16));
                        continue;
                    }
                    if (padded)
                        for (int64_t j = 0; j < length; j++) s[j] += padding[j];
                    softmax(s, dropped.row(n), kept + row, length, seed, row, threshold, words);
                }
                for (int64_t d = 0; d < size; d += BLOCK)
                    multiply(sums.from<float>(0, d), dropped.from<const bfloat16>(0, 0), values.from<const uint32_t>(0, d),
                             length / 32);
                for (int64_t n = 0; n < BLOCK; n++) {
                    bfloat16* to = context + ((b * length + i + n) * heads + head) * size;
                    for (int64_t d = 0; d < size; d++) store(to[d], sums.row(n)[d] * scale);
                }
            }
        }
    }
}

// Gradient of queries [L, D]: what content and positions give. `gradients` [L, L] of the scores, zeros around each row;
// `keys` and `table` in pairs of rows. With gradients transposed, that of keys, from queries and the other table.
void one_side(Matrix<bfloat16> gradients, Matrix<uint32_t> keys, Matrix<uint32_t> table, int64_t length, int64_t size,
              Matrix<float> sums, bfloat16* out) {
    for (int64_t i = 0; i < length; i += BLOCK) {
        for (int64_t d = 0; d < size; d += BLOCK) {
            multiply(sums.from<float>(0, d), gradients.from<const bfloat16>(i, MARGIN), keys.from<const uint32_t>(0, d), length / 32);
            if (table.at)
                multiply<true>(sums.from<float>(0, d), gradients.from<const bfloat16>(i, MARGIN - BLOCK + 1, 1),
                               table.from<const uint32_t>((length - BLOCK - i) / 2, d), (length + BLOCK) / 32);
        }
        for (int64_t n = 0; n < BLOCK; n++)
            for (int64_t d = 0; d < size; d++) store(out[(i + n) * size + d], sums.row(n)[d]);
    }
}

// Gradient of a table, [D, 2L], from `gradients` of the scores as above and `queries` [D, L]. `pairs` is room for [L / 2, L].
void table_side(Matrix<bfloat16> gradients, Matrix<bfloat16> queries, int64_t length, int64_t size, Matrix<uint32_t> pairs,
                Matrix<float> out) {
    // The second row of a pair needs the next distance for the same column; pairs of rows lie two distances apart.
    for (int64_t i = 0; i < length; i += 2) {
        const bfloat16 *a = gradients.row(i), *b = gradients.row(i + 1) + 1;
        uint32_t* to = pairs.row(i / 2);
        for (int64_t j = 0; j < length + 2 * MARGIN - 1; j++) to[j] = pair(a[j], b[j]);
    }
    for (int64_t w = 0; w < 2 * length; w += BLOCK) {
        int64_t i = std::max<int64_t>(0, length - BLOCK - w), last = std::min(length, 2 * length - w);
        for (int64_t d = 0; d < size; d += BLOCK)
            multiply(out.from<float>(d, w), queries.from<const bfloat16>(d, i),
                     pairs.from<const uint32_t>(i / 2, MARGIN + w - length + 1 + i, 2), (last - i) / 32);
    }
}

// [W, D] of each head, from [D, 2L] of each head of each sequence.
void sum_tables(const float* parts, bfloat16* tables, int64_t batch, int64_t heads, int64_t length, int64_t size,
                int threads) {
    int64_t width = 2 * length;
    if (!tables) return;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (int64_t head = 0; head < heads; head++)
        for (int64_t w = 0; w < width; w += TILE)
            for (int64_t d = 0; d < size; d += TILE) {
                Vector tile[TILE] = {};
                for (int64_t b = 0; b < batch; b++)
                    for (int64_t n = 0; n < TILE; n++) {
                        const float* from = &parts[((b * heads + head) * size + d + n) * width + w];
                        for (int64_t m = 0; m < TILE; m++) tile[n][m] += from[m];
                    }
                transpose(tile);
                for (int64_t n = 0; n < std::min(TILE, width - 1 - w); n++)
                    for (int64_t m = 0; m < TILE; m++) store(tables[(head * (width - 1) + w + n) * size + d + m], tile[n][m]);
            }
}

void attention_gradients(const bfloat16* q, const bfloat16* k, const bfloat16* v, const bfloat16* key_table,
                         const bfloat16* query_table, const bfloat16* kept, const bfloat16* context, const bfloat16* gradient,
                         bfloat16* dq, bfloat16* dk, bfloat16* dv, bfloat16* dkey_table, bfloat16* dquery_table, int64_t batch,
                         int64_t heads, int64_t length, int64_t size, float scale, int threads) {
    std::vector<uint32_t> key_pairs = pair_tables(key_table, heads, length, size, false, threads);
    std::vector<uint32_t> query_pairs = pair_tables(query_table, heads, length, size, false, threads);
    int64_t table_part = size * 2 * length;
    std::unique_ptr<float[]> dkeys(key_table ? new float[batch * heads * table_part] : nullptr);
    std::unique_ptr<float[]> dqueries(query_table ? new float[batch * heads * table_part] : nullptr);
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        auto [gradients, mirrored, outer, turned, pairs, vt, rows, block, sums] = make_room<BackwardRoom>(length, size);
        int64_t width = gradients.width;
        std::vector<float> inner(length);
        for (int64_t i = 0; i < length; i++)
            for (Matrix<bfloat16> matrix : {gradients, mirrored}) {
                std::memset(matrix.row(i), 0, MARGIN * sizeof(bfloat16));
                std::memset(matrix.row(i) + MARGIN + length, 0, (width - MARGIN - length) * sizeof(bfloat16));
            }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < batch * heads; task++) {
            int64_t head = task % heads, b = task / heads, start = task * length * size;
            for (int64_t i = 0; i < length; i++) {
                int64_t row = ((b * length + i) * heads + head) * size;
                float total = 0;
                for (int64_t d = 0; d < size; d++) {
                    total += load(context[row + d]) * load(gradient[row + d]);
                    store(outer.row(i)[d], load(gradient[row + d]) * scale);
                }
                inner[i] = total;
            }
            pair_columns(v + start, size, length, size, vt);
            for (int64_t i = 0; i < length; i += BLOCK) {
                for (int64_t j = 0; j < length; j += BLOCK)
                    multiply(block.from<float>(0, j), outer.from<const bfloat16>(i, 0), vt.from<const uint32_t>(0, j), size / 32);
                for (int64_t n = 0; n < BLOCK; n++) {
                    const bfloat16* keep = kept + (task * length + i + n) * length;
                    float *s = block.row(n), product = inner[i + n];
                    bfloat16* to = gradients.row(i + n) + MARGIN;
                    for (int64_t j = 0; j < length; j++) {
                        float p = load(keep[j]), positive = p < 0 ? 0 : p;
                        s[j] = positive * s[j] - std::fabs(p) * product;
                        store(to[j], s[j]);
                    }
                }
                for (int64_t n = 0; n < BLOCK; n += 2) {
                    const bfloat16 *low = kept + (task * length + i + n) * length, *high = low + length;
                    uint32_t* to = pairs.row((i + n) / 2);
                    for (int64_t j = 0; j < length; j++) {
                        uint16_t a = low[j].bits, c = high[j].bits;
                        to[j] = uint32_t(a & 0x8000 ? 0 : a) | uint32_t(c & 0x8000 ? 0 : c) << 16;
                    }
                }
                for (int64_t j = 0; j < length; j += BLOCK) put_transposed(block, mirrored.row(j) + MARGIN + i, width, j);
            }
            transposed(outer.at, outer.width, length, size, turned);
            for (int64_t d = 0; d < size; d += BLOCK)
                for (int64_t j = 0; j < length; j += BLOCK)
                    multiply(sums.from<float>(d, j), turned.from<const bfloat16>(d, 0), pairs.from<const uint32_t>(0, j), length / 32);
            for (int64_t d = 0; d < size; d += BLOCK)
                for (int64_t j = 0; j < length; j += BLOCK)
                    put_transposed({sums.row(d), sums.width}, dv + start + j * size + d, size, j);
            pair_rows(k + start, size, length, size, rows);
            one_side(gradients, rows, {key_table ? &key_pairs[head * length * size] : nullptr, size}, length, size, block, dq + start);
            pair_rows(q + start, size, length, size, rows);
            one_side(mirrored, rows, {query_table ? &query_pairs[head * length * size] : nullptr, size}, length, size, block,
                     dk + start);
            if (key_table) {
                transposed(q + start, size, length, size, turned);
                table_side(gradients, turned, length, size, pairs, {&dkeys[task * table_part], 2 * length});
            }
            if (query_table) {
                transposed(k + start, size, length, size, turned);
                table_side(mirrored, turned, length, size, pairs, {&dqueries[task * table_part], 2 * length});
            }
        }
    }
    sum_tables(dkeys.get(), dkey_table, batch, heads, length, size, threads);
    sum_tables(dqueries.get(), dquery_table, batch, heads, length, size, threads);
}

}  // namespace

// Whether the system lets this process use tiles; asking for them is enough.
extern "C" __attribute__((visibility("default"))) int tiles_allowed() {
    return syscall(SYS_arch_prctl, PERMISSION_FOR_TILES, TILES) == 0;
}

EXPORT attention_bfloat16(const bfloat16* q, const bfloat16* k, const bfloat16* v, const bfloat16* key_table,
                          const bfloat16* query_table, const bool* mask, bfloat16* kept, bfloat16* context, int64_t batch,
                          int64_t heads, int64_t length, int64_t size, uint64_t seed, int64_t threshold, float scale, int threads) {
    attention(q, k, v, key_table, query_table, mask, kept, context, batch, heads, length, size, seed, threshold, scale, threads);
}

EXPORT attention_gradients_bfloat16(const bfloat16* q, const bfloat16* k, const bfloat16* v, const bfloat16* key_table,
                                    const bfloat16* query_table, const bfloat16* kept, const bfloat16* context,
                                    const bfloat16* gradient, bfloat16* dq, bfloat16* dk, bfloat16* dv, bfloat16* dkey_table,
                                    bfloat16* dquery_table, int64_t batch, int64_t heads, int64_t length, int64_t size, float scale,
                                    int threads) {
    attention_gradients(q, k, v, key_table, query_table, kept, context, gradient, dq, dk, dv, dkey_table, dquery_table, batch, heads,
                        length, size, scale, threads);
}

#endif
