// What all kernels share: elements in memory, exponentials, random bits, transposition of registers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using std::int64_t;
using std::uint64_t;

struct bfloat16 {
    uint16_t bits;
};

inline float load(const float& x) { return x; }

inline float load(const bfloat16& x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void store(float& to, float x) { to = x; }

inline void store(bfloat16& to, float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void round_all(const float* x, float* to, int64_t count) { std::copy(x, x + count, to); }

// Processors that round by themselves make zeros of values below 2^-126.
inline void round_all(const float* x, bfloat16* to, int64_t count) {
    int64_t j = 0;
#ifdef __AVX512BF16__
    for (; j + 16 <= count; j += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j),
                            __m256i(_mm512_cvtneps_pbh(_mm512_loadu_ps(x + j))));
#endif
    for (; j < count; j++) store(to[j], x[j]);
}

// e^x by 2^n e^r with |r| <= ln(2) / 2, within 2 units of the last place; 0 below -87, NaN for NaN.
inline float compute_exp(float x) {
    float n = std::nearbyint(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1 + r * (1 + r * (0.5f + r * (1.6666667e-1f +
                                            r * (4.1666463e-2f + r * (8.3334569e-3f + r * 1.3929848e-3f)))));
    n = n > -126 ? n : -126;  // also for NaN
    n = n < 127 ? n : 127;
    uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return x < -87 ? 0 : y * power;
}

// The standard normal distribution at x: function and density (Abramowitz and Stegun, 7.1.26: to 1.5e-7).
inline void compute_normal(float x, float& below, float& density) {
    float e = compute_exp(-0.5f * x * x);
    float t = 1 / (1 + 0.3275911f * 0.70710678f * std::fabs(x));
    float y = t * (0.254829592f +
                   t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    float tail = 0.5f * y * e;
    below = x < 0 ? tail : 1 - tail;
    density = 0.39894228f * e;
}

// The largest of `count` elements that is not NaN; compilers vectorize it in this form.
template <class T>
float find_maximum(const T* x, int64_t count) {
    constexpr int64_t LANES = 32;
    float top[LANES];
    std::fill(top, top + LANES, -INFINITY);
    int64_t j = 0;
    for (; j + LANES <= count; j += LANES)
        for (int64_t k = 0; k < LANES; k++) top[k] = load(x[j + k]) > top[k] ? load(x[j + k]) : top[k];
    for (; j < count; j++) top[0] = load(x[j]) > top[0] ? load(x[j]) : top[0];
    for (int64_t half = LANES / 2; half > 0; half /= 2)
        for (int64_t k = 0; k < half; k++) top[k] = top[k + half] > top[k] ? top[k + half] : top[k];
    return top[0];
}

// Word number n of the stream of `seed` (SplitMix64).
inline uint64_t draw_word(uint64_t seed, uint64_t n) {
    uint64_t z = seed + (n + 1) * 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
}

typedef uint16_t __attribute__((may_alias)) Bits;

// 16 bits for each of `count` elements from number `first` on, four to a word. `words` is their buffer.
const Bits* draw_bits(uint64_t seed, int64_t first, int64_t count, std::vector<uint64_t>& words) {
    int64_t start = first / 4, number = (first + count + 3) / 4 - start;
    if (int64_t(words.size()) < number) words.resize(number);
    uint64_t* to = words.data();
#pragma omp simd
    for (int64_t n = 0; n < number; n++) to[n] = draw_word(seed, start + n);
    return reinterpret_cast<const Bits*>(to) + first % 4;
}

inline void zero_dropped(const float* __restrict x, float* __restrict to, const Bits* bits, uint16_t last,
                         int64_t count) {
    for (int64_t j = 0; j < count; j++) to[j] = bits[j] <= last ? 0 : x[j];
}

inline void zero_dropped(const bfloat16* x, bfloat16* to, const Bits* __restrict bits, uint16_t last,
                         int64_t count) {
    const Bits* __restrict from = reinterpret_cast<const Bits*>(x);
    Bits* __restrict out = reinterpret_cast<Bits*>(to);
    for (int64_t j = 0; j < count; j++) out[j] = bits[j] <= last ? 0 : from[j];
}

// Softmax of a row of `count` scores, which this overwrites: into `to` with zeros where dropped, into `saved`
// with a minus sign there. `first` is the number of the first element's random bits.
template <class T>
void apply_softmax(float* __restrict s, T* __restrict to, T* __restrict saved, int64_t count, uint64_t seed,
                   int64_t first, int threshold, std::vector<uint64_t>& words) {
    float sum = 0, largest = find_maximum(s, count);
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; j++) {
        float e = compute_exp(s[j] - largest);
        s[j] = e;
        sum += e;
    }
    float scale = 1 / sum;
    if (!threshold) {
        for (int64_t j = 0; j < count; j++) s[j] *= scale;
        round_all(s, saved, count);
        std::copy(saved, saved + count, to);
        return;
    }
    const Bits* bits = draw_bits(seed, first, count, words);
    const uint16_t last = uint16_t(threshold - 1);  // of those that drop
    for (int64_t j = 0; j < count; j++) s[j] *= bits[j] <= last ? -scale : scale;
    round_all(s, saved, count);
    zero_dropped(saved, to, bits, last, count);
}

typedef float Vector __attribute__((vector_size(64)));
typedef int32_t Choice __attribute__((vector_size(64)));
constexpr int64_t TILE = 16;

// Four rounds that each interleave the first eight rows with the last eight transpose the tile.
inline void transpose(Vector (&rows)[TILE]) {
    constexpr Choice low{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    constexpr Choice high{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    Vector mixed[TILE];
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            mixed[2 * i] = __builtin_shuffle(rows[i], rows[i + 8], low);
            mixed[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + 8], high);
        }
        for (int i = 0; i < TILE; i++) rows[i] = mixed[i];
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) void
