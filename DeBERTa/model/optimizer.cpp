// The norm of all gradients, and AdamW's update with their clipping, each in one pass over memory. See
// training/optimizer.py.

#include "kernels.h"

namespace {

constexpr int64_t PIECE = 1 << 15;  // numbers of a tensor that one thread takes at a time
constexpr int64_t AHEAD = 512;      // numbers to fetch before they are needed
constexpr int64_t SQUARES = 1024;   // added up in float32, 16 to each of 64 sums, before they go on in float64

struct Piece {
    int64_t tensor, first, last;
};

// `sizes` of `count` tensors.
std::vector<Piece> pieces(const int64_t* sizes, int64_t count) {
    std::vector<Piece> all;
    for (int64_t n = 0; n < count; n++)
        for (int64_t first = 0; first < sizes[n]; first += PIECE)
            all.push_back({n, first, std::min(first + PIECE, sizes[n])});
    return all;
}

double squares(const float* x, int64_t count) {
    Vector sums[4] = {};
    int64_t j = 0;
    for (; j + 4 * TILE <= count; j += 4 * TILE)
        for (int64_t k = 0; k < 4; k++) {
            Vector numbers;
            std::memcpy(&numbers, x + j + k * TILE, sizeof(Vector));
            __builtin_prefetch(x + j + AHEAD + k * TILE);
            sums[k] += numbers * numbers;
        }
    double total = 0;
    for (; j < count; j++) total += double(x[j]) * x[j];
    for (const Vector& sum : sums)
        for (int64_t k = 0; k < TILE; k++) total += sum[k];
    return total;
}

float* pointer(int64_t address) { return reinterpret_cast<float*>(address); }

}  // namespace

// Of gradients at `addresses`: the root of the sum of squares, added up in float64 in an order that threads do not change.
EXPORT gradient_norm_int64(const int64_t* addresses, const int64_t* sizes, float* norm, int64_t count, int threads) {
    const auto all = pieces(sizes, count);
    std::vector<double> sums(all.size());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t n = 0; n < all.size(); n++) {
        const float* x = pointer(addresses[all[n].tensor]);
        for (int64_t first = all[n].first; first < all[n].last; first += SQUARES)
            sums[n] += squares(x + first, std::min(SQUARES, all[n].last - first));
    }
    double total = 0;
    for (double sum : sums) total += sum;
    *norm = float(std::sqrt(total));
}

// `addresses` [5, count]: of each parameter, its gradient, both moments, and the number of updates, which counts this one.
// Decoupled weight decay (Loshchilov and Hutter, algorithm 2); `factor` multiplies the gradients.
EXPORT adamw_int64(const int64_t* addresses, const int64_t* sizes, int64_t count, double rate, double beta1, double beta2,
                   double epsilon, double decay, double factor, int threads) {
    const auto all = pieces(sizes, count);
    for (int64_t n = 0; n < count; n++) *pointer(addresses[4 * count + n]) += 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t n = 0; n < all.size(); n++) {
        const int64_t* at = addresses + all[n].tensor;
        float *__restrict w = pointer(at[0]), *__restrict m = pointer(at[2 * count]), *__restrict v = pointer(at[3 * count]);
        const float* __restrict gradient = pointer(at[count]);
        const double updates = *pointer(at[4 * count]);
        const float kept = float(1 - rate * decay), eps = float(epsilon), scale = float(factor);
        const float step = float(rate / (1 - std::pow(beta1, updates)));
        const float root = float(1 / std::sqrt(1 - std::pow(beta2, updates)));
        const float first = float(beta1), rest = float(1 - beta1), second = float(beta2), others = float(1 - beta2);
        for (int64_t i = all[n].first; i < all[n].last; i += TILE) {
            __builtin_prefetch(gradient + i + AHEAD);
            for (float* x : {w, m, v}) __builtin_prefetch(x + i + AHEAD, 1);
#pragma omp simd
            for (int64_t j = i; j < std::min(i + TILE, all[n].last); j++) {
                float g = gradient[j] * scale;
                m[j] = first * m[j] + rest * g;
                v[j] = second * v[j] + others * g * g;
                w[j] = w[j] * kept - step * m[j] / (std::sqrt(v[j]) * root + eps);
            }
        }
    }
}
