// The residuals of sine networks on their images, and the gradients of their mean squares. siren_fit.py says what they are.

#include <vector>

#include "products.h"

namespace {

typedef Lanes<float>::Vector Vector;
const Int L = Lanes<float>::count;

// sin and cos, by polynomials on [-pi/4, pi/4] (Cephes) after the nearest multiple of pi/2 is taken off; |x| < 1e5
inline void sine_and_cosine(Vector x, Vector& sine, Vector& cosine) {
    typedef int32_t Whole __attribute__((vector_size(BYTES)));
    const float shift = 12582912.0f;  // 1.5 2^23: the sum is rounded to a whole number
    const Vector t = x * 0.636619772367581f + shift, n = t - shift;
    const Whole quarter = (Whole)t;
    const Vector r = x - n * 1.5703125f - n * 4.837512969970703125e-4f - n * 7.549789948768648e-8f, r2 = r * r;
    Vector s = r + r * r2 * (-1.6666654611e-1f + r2 * (8.3321608736e-3f + r2 * -1.9515295891e-4f));
    Vector c = 1.0f - 0.5f * r2 +
               r2 * r2 * (4.166664568298827e-2f + r2 * (-1.388731625493765e-3f + r2 * 2.443315711809948e-5f));
    const Whole swaps = -(quarter & 1);
    sine = swaps ? c : s, cosine = swaps ? s : c;
    sine = (Vector)((Whole)sine ^ ((quarter & 2) << 30));
    cosine = (Vector)((Whole)cosine ^ (((quarter + 1) & 2) << 30));
}

inline float sum(Vector x) {
    float total = 0;
    for (int i = 0; i < L; i++) total += x[i];
    return total;
}

// C [M, N] = scale A B^T for A [rows, points] and B [columns, points] from row i and column j on, C by rows `c_row` apart
template <int M, int N>
inline void dot_products(Int points, const float* a, const float* b, float* c, Int c_row, float scale) {
    Vector sums[M][N] = {};
    for (Int t = 0; t < points; t += L) {
        Vector factors[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) factors[j] = *(const Vector*)(b + j * points + t);
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) {
            const Vector x = *(const Vector*)(a + i * points + t);
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) sums[i][j] += x * factors[j];
        }
    }
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) c[i * c_row + j] = scale * sum(sums[i][j]);
}

template <int M>
inline void dot_rows(Int columns, Int points, const float* a, const float* b, float* c, Int c_row, float scale) {
    const int N = BYTES / 16;
    Int j = 0;
    for (; j + N <= columns; j += N) dot_products<M, N>(points, a, b + j * points, c + j, c_row, scale);
    for (; j < columns; j++) dot_products<M, 1>(points, a, b + j * points, c + j, c_row, scale);
}

struct Networks {
    Int count, points, padded, depth;
    const float *inputs, *targets;
    float* residuals;
    const Int* widths;
    const double* frequencies;
    const float* const* matrices;
    float* const* gradients;
};

// One network: `waves` and `slopes` per hidden layer, `delta` and `below` [widest, padded]
void fit_step(const Networks& s, Int network, std::vector<std::vector<float>>& waves,
              std::vector<std::vector<float>>& slopes, float* delta, float* below) {
    const Int P = s.padded, outputs = s.widths[s.depth];
    const auto matrix = [&](Int l) { return s.matrices[l] + network * s.widths[l + 1] * (s.widths[l] + 1); };
    const auto input = [&](Int l) { return l ? waves[l - 1].data() : s.inputs; };
    for (Int l = 0; l < s.depth; l++) {
        const Int in = s.widths[l], out = s.widths[l + 1];
        const bool last = l == s.depth - 1;
        float* to = last ? delta : waves[l].data();
        for (Int o = 0; o < out; o++) std::fill(to + o * P, to + (o + 1) * P, matrix(l)[o * (in + 1) + in]);
        product<float, float>(out, P, in, matrix(l), in + 1, 1, input(l), to, true);
        const float w0 = s.frequencies[l];
        for (Int t = 0; !last && t < out * P; t += L)
            sine_and_cosine(w0 * *(Vector*)(to + t), *(Vector*)(to + t), *(Vector*)(slopes[l].data() + t));
    }
    for (Int o = 0; o < outputs; o++) {
        const float* target = s.targets + (network * outputs + o) * s.points;
        for (Int t = 0; t < s.points; t++) delta[o * P + t] -= target[t];
        std::fill(delta + o * P + s.points, delta + (o + 1) * P, 0.0f);
        std::memcpy(s.residuals + (network * outputs + o) * s.points, delta + o * P, s.points * sizeof(float));
    }
    float scale = 2.0f / (s.points * outputs);
    for (Int l = s.depth - 1; l >= 0; l--) {
        const Int in = s.widths[l], out = s.widths[l + 1], row = in + 1;
        float* gradient = s.gradients[l] + network * out * row;
        Int o = 0;
        for (; o + 4 <= out; o += 4) dot_rows<4>(in, P, delta + o * P, input(l), gradient + o * row, row, scale);
        for (; o < out; o++) dot_rows<1>(in, P, delta + o * P, input(l), gradient + o * row, row, scale);
        for (o = 0; o < out; o++) {
            Vector total{};
            for (Int t = 0; t < P; t += L) total += *(Vector*)(delta + o * P + t);
            gradient[o * row + in] = scale * sum(total);
        }
        if (!l) continue;
        product<float, float>(in, P, out, matrix(l), 1, row, delta, below, false);
        for (Int t = 0; t < in * P; t += L) *(Vector*)(below + t) *= scale * *(Vector*)(slopes[l - 1].data() + t);
        std::swap(delta, below);
        scale = s.frequencies[l - 1];
    }
}

}  // namespace

extern "C" {

// words: count, points, padded points, depth, inputs [n_0, padded], targets and residuals [B, n_L, points], widths
// [depth + 1], frequencies [depth - 1], and per layer [B, out, in + 1] the matrices, then the gradients
void fit_sirens(const int64_t* words) {
    Networks s;
    s.count = words[0], s.points = words[1], s.padded = words[2], s.depth = words[3];
    s.inputs = (const float*)words[4], s.targets = (const float*)words[5], s.residuals = (float*)words[6];
    s.widths = words + 7;
    s.frequencies = (const double*)(s.widths + s.depth + 1);
    s.matrices = (const float* const*)(s.frequencies + s.depth);
    s.gradients = (float* const*)(s.matrices + s.depth);
    Int widest = 0;
    for (Int l = 0; l <= s.depth; l++) widest = std::max(widest, s.widths[l]);
    std::vector<std::vector<float>> waves, slopes;
    for (Int l = 1; l < s.depth; l++) {
        waves.emplace_back(s.widths[l] * s.padded);
        slopes.emplace_back(s.widths[l] * s.padded);
    }
    std::vector<float> delta(widest * s.padded), below(widest * s.padded);
    for (Int network = 0; network < s.count; network++)
        fit_step(s, network, waves, slopes, delta.data(), below.data());
}
}
