// AMX tiles emulated in software, so that their kernels can be tested on other processors: `g++ -include` this
// file. It replaces the intrinsics of immintrin.h, and the question whether the system permits tiles. All tiles
// have 16 rows of 64 bytes, the only size that the kernels use.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef __AMX_BF16__
#define __AMX_BF16__ 1

namespace emulated {

inline thread_local uint32_t tiles[8][16][16];

inline float to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void load(int tile, const void* from, int64_t stride) {
    for (int row = 0; row < 16; row++)
        std::memcpy(tiles[tile][row], static_cast<const char*>(from) + row * stride, 64);
}

inline void store(int tile, void* to, int64_t stride) {
    for (int row = 0; row < 16; row++)
        std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile][row], 64);
}

// Add the matmul of tiles of bfloat16, which are stored in pairs in elements of 32 bits, to a tile of float32.
inline void multiply(int sum, int a, int b) {
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++) {
            uint32_t x = tiles[a][m][k];
            for (int n = 0; n < 16; n++) {
                uint32_t y = tiles[b][k][n];
                float total = to_float(tiles[sum][m][n]);
                total += to_float(x << 16) * to_float(y << 16);
                total += to_float(x & 0xffff0000u) * to_float(y & 0xffff0000u);
                std::memcpy(&tiles[sum][m][n], &total, sizeof total);
            }
        }
}

}  // namespace emulated

#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(tile) std::memset(emulated::tiles[tile], 0, sizeof emulated::tiles[tile])
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbf16ps(sum, a, b) emulated::multiply(sum, a, b)
#define syscall(...) 0
