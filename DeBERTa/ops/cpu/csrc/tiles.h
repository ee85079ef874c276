// Tiles of matrices in the processor's registers (AMX), for matmuls in bfloat16.
//
// A tile holds 16 rows of 64 bytes, with any distance between the rows in memory. The second factor of a
// matmul has two of its rows in one, in pairs of elements.

#pragma once

#include "kernels.h"

#ifdef __AMX_BF16__

#include <immintrin.h>

#include <memory>

namespace {

constexpr int64_t BLOCK = 32;  // rows and columns of a matmul: two by two tiles
constexpr int64_t APART = 16;  // floats between rows, so that these do not compete for cache lines

// GCC does not know that loading tiles reads memory: what was written before it has to be there.
inline void finish_writing() { asm volatile("" ::: "memory"); }

struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        std::fill(shape.row_bytes, shape.row_bytes + 8, 64);
        std::fill(shape.rows, shape.rows + 8, 16);
        finish_writing();
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
typedef Rows<float> Sums;

// Tiles of pairs, in bytes: from row to row, from 32 rows to the next, to the tile 16 columns on.
struct Right {
    const uint32_t* at;
    int64_t row, step, next;
};

// sums [32, 32] += left [32, 32 * steps] right [32 * steps, 32], where the sums are tiles 0 to 3. After each
// step `interleaved` is called: it overlaps with the slower tile instructions.
template <class F>
inline void add_matmul(Left left, Right right, int64_t steps, F interleaved) {
    finish_writing();
    const char* a = reinterpret_cast<const char*>(left.at);
    const char* b = reinterpret_cast<const char*>(right.at);
    for (int64_t step = 0; step < steps; step++, a += 64, b += right.step) {
        _tile_loadd(4, a, left.row);
        _tile_loadd(6, b, right.row);
        _tile_loadd(7, b + right.next, right.row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * left.row, left.row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        interleaved();
    }
}

inline void add_matmul(Left left, Right right, int64_t steps) {
    add_matmul(left, right, steps, [] {});
}

inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

inline void load_sums(Sums sums) {
    finish_writing();
    const char *first = reinterpret_cast<const char*>(sums.at), *second = first + 16 * sums.row;
    _tile_loadd(0, first, sums.row);
    _tile_loadd(1, first + 64, sums.row);
    _tile_loadd(2, second, sums.row);
    _tile_loadd(3, second + 64, sums.row);
}

inline void store_sums(Sums sums) {
    char *first = reinterpret_cast<char*>(sums.at), *second = first + 16 * sums.row;
    _tile_stored(0, first, sums.row);
    _tile_stored(1, first + 64, sums.row);
    _tile_stored(2, second, sums.row);
    _tile_stored(3, second + 64, sums.row);
}

inline void multiply(Sums sums, Left left, Right right, int64_t steps) {
    clear_sums();
    add_matmul(left, right, steps);
    store_sums(sums);
}

// A matrix in memory.
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

inline uint32_t join_pair(bfloat16 low, bfloat16 high) {
    return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

// 16 pairs from 16 elements of each of two rows.
inline __m512i join_pairs(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// 16 elements, in bfloat16
inline __m256i load_rounded(const bfloat16* x) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
}
inline __m256i load_rounded(const float* x) { return __m256i(_mm512_cvtneps_pbh(_mm512_loadu_ps(x))); }

// [rows, D], or its transpose, as the second factor of a matmul: in pairs of rows, tile by tile.
struct Packed {
    uint32_t* at;
    int64_t size;
    bool is_transposed;

    // All of the factor from row `first` of [rows, D] on; else the columns from `d` on.
    Right from(int64_t first, int64_t d = 0) const {
        if (is_transposed) return {at + first * size / 2, 64, 2048, 1024};
        return {at + first * size / 2 + d * 16, 64, size * 64, 1024};
    }
};

// [rows, D] for a matmul over rows, `distance` elements apart; zeros after it, to a multiple of 32 rows.
template <class T>
void pack_rows(const T* x, int64_t distance, int64_t rows, int64_t size, Packed to) {
    for (int64_t i = 0; i < (rows + 31) / 32 * 32; i += 2)
        for (int64_t d = 0; d < size; d += TILE) {
            __m256i low = i < rows ? load_rounded(x + i * distance + d) : _mm256_setzero_si256();
            __m256i high = i + 1 < rows ? load_rounded(x + (i + 1) * distance + d) : _mm256_setzero_si256();
            _mm512_storeu_si512(to.at + i / 32 * 16 * size + d * 16 + i % 32 / 2 * TILE,
                                join_pairs(low, high));
        }
}

// Its transpose [D, rows], for a matmul over D.
template <class T>
void pack_columns(const T* x, int64_t rows, int64_t size, Packed to) {
    for (int64_t i = 0; i < rows; i += TILE)
        for (int64_t d = 0; d < size; d += 2 * TILE) {
            Vector tile[TILE];  // of pairs, which are only moved
            for (int64_t k = 0; k < TILE; k++) {
                const T* row = x + (i + k) * size + d;
                tile[k] = Vector(_mm512_inserti64x4(_mm512_castsi256_si512(load_rounded(row)),
                                                    load_rounded(row + TILE), 1));
            }
            transpose(tile);
            std::memcpy(to.at + i / 32 * 16 * size + d * 16 + i % 32 * TILE, tile, sizeof(tile));
        }
}

// to[i][j] = from[j][i] for a block of 32 x 32 from (j, i) on
void put_transposed(Matrix<float> from, bfloat16* to, int64_t distance, int64_t j) {
    for (int64_t k = 0; k < BLOCK; k += TILE)
        for (int64_t c = 0; c < BLOCK; c += TILE) {
            Vector tile[TILE];
            for (int64_t n = 0; n < TILE; n++) std::memcpy(&tile[n], from.row(k + n) + j + c, sizeof(Vector));
            transpose(tile);
            for (int64_t n = 0; n < TILE; n++) round_all(&tile[n][0], to + (c + n) * distance + k, TILE);
        }
}

// The second factor [depth, columns] of a matmul, in panels of 32 columns, each packed row by row.
struct Factor {
    int64_t depth, columns;
    std::unique_ptr<uint32_t[]> words{new uint32_t[columns * depth / 2]};

    // `depth` is filled up to a multiple of 32.
    Factor(int64_t depth, int64_t columns) : depth((depth + 31) / 32 * 32), columns(columns) {}

    // Of columns from j, from row `i` on.
    Packed panel(int64_t j, int64_t i = 0) const {
        return {&words[(j * depth + i * BLOCK) / 2], BLOCK, false};
    }

    // Of all threads: the transpose of x [columns, depth], as y takes the weight.
    template <class T>
    void take_columns(const T* x) {
#pragma omp for schedule(static)
        for (int64_t j = 0; j < columns; j += BLOCK) pack_columns(x + j * depth, BLOCK, depth, panel(j));
    }

    // Of all threads: x [rows, columns], zeros after it, as gradients take the weight and x.
    template <class T>
    void take_rows(const T* x, int64_t rows) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i += BLOCK)
            for (int64_t j = 0; j < columns; j += BLOCK)
                pack_rows(x + i * columns + j, columns, std::min(BLOCK, rows - i), BLOCK, panel(j, i));
    }
};

// A matrix [rows, columns] in bfloat16 between two matmuls.
struct Between {
    int64_t distance;
    std::unique_ptr<bfloat16[]> elements;

    Between(int64_t rows, int64_t columns)
        : distance(columns + 2 * APART), elements(new bfloat16[rows * distance]) {}
    bfloat16* row(int64_t i) const { return &elements[i * distance]; }
};

// 32 x 32 elements
struct alignas(64) Block {
    float at[BLOCK * BLOCK];

    float* row(int64_t n) { return at + n * BLOCK; }
};

// One of the matmuls of a block.
struct Matmul {
    Left left;
    Right right;
    int64_t steps;
};

// Blocks of N matmuls each, one after the other. `finish(i, j, n, sums)` has turn n of `turns` with the
// block from (i, j) on, in order, and may write over it. Some turns come after each of a block's `steps` and
// take the block before, so that what they do is done while the tiles compute.
template <int64_t N, class F>
class Pipeline {
    Block blocks[2][N];
    F finish;
    int64_t turns, at_once, count = 0, done_i = 0, done_j = 0;

  public:
    Pipeline(F finish, int64_t turns, int64_t steps)
        : finish(finish), turns(turns), at_once(turns / std::max(steps, int64_t(1)) + 1) {}

    // `get_matmul(m)` is the block's matmul m.
    template <class P>
    void multiply(int64_t i, int64_t j, P get_matmul) {
        Block* done = blocks[count % 2];
        int64_t n = count ? 0 : turns;
        auto finish_some = [&] {
            for (int64_t end = std::min(n + at_once, turns); n < end; n++) finish(done_i, done_j, n, done);
        };
        for (int64_t m = 0; m < N; m++) {
            Matmul next = get_matmul(m);
            clear_sums();
            add_matmul(next.left, next.right, next.steps, finish_some);
            store_sums({blocks[(count + 1) % 2][m].at, BLOCK * 4});
        }
        while (n < turns) finish_some();
        finish_writing();
        count++, done_i = i, done_j = j;
    }

    // The last block's turns.
    void end() {
        for (int64_t n = 0; n < turns && count; n++) finish(done_i, done_j, n, blocks[count % 2]);
        count = 0;
    }
};

// 32 elements, which fill a line of the cache. The next line is fetched.
inline void put(const float* sums, bfloat16* to) {
    _mm512_storeu_si512(to, __m512i(_mm512_cvtne2ps_pbh(_mm512_load_ps(sums + TILE), _mm512_load_ps(sums))));
    __builtin_prefetch(to + BLOCK, 1);
}

// 32 elements that nobody reads soon: past the cache, where memory allows. `_mm_sfence` has to follow.
inline void put_through(const float* sums, float* to) {
    if (reinterpret_cast<uintptr_t>(to) % 64) {
        std::copy(sums, sums + BLOCK, to);
        return;
    }
    _mm512_stream_ps(to, _mm512_load_ps(sums));
    _mm512_stream_ps(to + TILE, _mm512_load_ps(sums + TILE));
}

}  // namespace

#endif
