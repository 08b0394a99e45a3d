// The residuals of sine networks on their images, and the gradients of their mean squares. siren_fit.py says what they are.

#include <vector>

#include "products.h"

namespace {

typedef Lanes<float>::Vector Vector;
const Int L = Lanes<float>::count;

// Points of a chunk, which the first cache holds. Buffers [rows, points] are chunk after chunk, each [rows, its points].
const Int CHUNK = 64;

inline Int chunk_size(Int points, Int start) { return std::min(CHUNK, points - start); }

// sin and cos of pi u for u = (high + low) z: polynomials of u - n, n the nearest whole number, with the sign of (-1)^n
inline void sine_and_cosine(Vector z, float high, float low, Vector& sine, Vector& cosine) {
    typedef int32_t Whole __attribute__((vector_size(BYTES)));
    const float shift = 12582912.0f;  // 1.5 2^23: the sum is rounded to a whole number
    const Vector t = z * high + shift, n = t - shift;
    const Vector r = (z * high - n) + z * low, r2 = r * r;
    const Vector s = 3.14159274f + r2 * (-5.16771412f + r2 * (2.55012584f + r2 * (-0.598517001f + r2 * 0.0780204087f)));
    const Vector c = 4.05870533f + r2 * (-1.33516157f + r2 * (0.234683752f + r2 * -0.0239637811f));
    const Whole sign = (Whole)t << 31;
    sine = (Vector)((Whole)(r * s) ^ sign);
    cosine = (Vector)((Whole)(1.0f + r2 * (-4.93480206f + r2 * c)) ^ sign);
}

struct Layer {
    Int in, out;
    double frequency;
    const float* matrices;
    float* gradients;
    float *input, *delta, *slope;  // x [in + 1, points], ones behind; dL/dz [out, points]; dx/dz [out, points of a chunk]
};

// M rows and N columns of the gradient delta input^T [out, in + 1], from row i and column j on
template <int M, int N>
inline void dot_products(Int points, const Layer& layer, float* gradient, Int i, Int j) {
    Vector sums[M][N] = {};
    const Int row = layer.in + 1;
    for (Int start = 0; start < points; start += CHUNK) {
        const Int size = chunk_size(points, start);
        const float *delta = layer.delta + start * layer.out + i * size, *input = layer.input + start * row + j * size;
        for (Int t = 0; t < size; t += L) {
            Vector x[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) x[n] = *(const Vector*)(input + n * size + t);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                const Vector d = in_register(*(const Vector*)(delta + m * size + t));
#pragma GCC unroll 4
                for (int n = 0; n < N; n++) sums[m][n] += d * x[n];
            }
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) gradient[(i + m) * row + j + n] = total<float>(sums[m][n]);
}

// The gradient's rows from row i on, M at a time; the first row that is left
template <int M>
inline Int dot_rows(Int points, const Layer& layer, float* gradient, Int i) {
    for (; i + M <= layer.out; i += M) {
        Int j = 0;
        for (; j + 3 <= layer.in + 1; j += 3) dot_products<M, 3>(points, layer, gradient, i, j);
        for (; j <= layer.in; j++) dot_products<M, 1>(points, layer, gradient, i, j);
    }
    return i;
}

struct Networks {
    Int count, points, padded;
    const float* targets;
    float* residuals;
    std::vector<Layer> layers;
};

// `waves` [out, size], of a chunk: sin(w0 z) in the place of z, and its slope by z
void sines(const Layer& layer, Int size, float* waves) {
    const double half_turns = layer.frequency / M_PI;
    const float w0 = layer.frequency, high = half_turns, low = half_turns - high;
    for (Int t = 0; t < layer.out * size; t += L) {
        Vector sine, cosine;
        sine_and_cosine(*(Vector*)(waves + t), high, low, sine, cosine);
        *(Vector*)(waves + t) = sine;
        *(Vector*)(layer.slope + t) = w0 * cosine;
    }
}

void fit_step(const Networks& s, Int network) {
    const std::vector<Layer>& layers = s.layers;
    const Int last = layers.size() - 1, outputs = layers[last].out;
    const auto matrix = [&](const Layer& layer) { return layer.matrices + network * layer.out * (layer.in + 1); };
    for (Int start = 0; start < s.padded; start += CHUNK) {
        const Int size = chunk_size(s.padded, start), real = std::min(size, s.points - start);
        for (Int l = 0; l <= last; l++) {
            const Layer& layer = layers[l];
            const Int row = layer.in + 1, out = layer.out;
            float* to = l < last ? layers[l + 1].input + start * (out + 1) : layer.delta + start * out;
            product<float, float>(out, size, row, matrix(layer), row, 1, layer.input + start * row, to, false);
            if (l < last) sines(layer, size, to);
        }
        for (Int o = 0; o < outputs; o++) {
            float* delta = layers[last].delta + start * outputs + o * size;
            const Int place = (network * outputs + o) * s.points + start;
            for (Int t = 0; t < real; t++) {
                s.residuals[place + t] = delta[t] - s.targets[place + t];
                delta[t] = 2.0f / (s.points * outputs) * s.residuals[place + t];
            }
            std::fill(delta + real, delta + size, 0.0f);
        }
        for (Int l = last; l > 0; l--) {
            const Layer &layer = layers[l], &before = layers[l - 1];
            float* below = before.delta + start * layer.in;
            const float* delta = layer.delta + start * layer.out;
            product<float, float>(layer.in, size, layer.out, matrix(layer), 1, layer.in + 1, delta, below, false);
            for (Int t = 0; t < layer.in * size; t += L) *(Vector*)(below + t) *= *(Vector*)(before.slope + t);
        }
    }
    for (const Layer& layer : layers) {
        float* gradient = layer.gradients + network * layer.out * (layer.in + 1);
        Int o = BYTES == 64 ? dot_rows<8>(s.padded, layer, gradient, 0) : 0;
        o = dot_rows<4>(s.padded, layer, gradient, o);
        dot_rows<1>(s.padded, layer, gradient, o);
    }
}

}  // namespace

extern "C" {

// words: count, points, padded points, depth, inputs [n_0, padded], targets and residuals [B, n_L, points], widths
// [depth + 1], frequencies [depth], and per layer [B, out, in + 1] the matrices, then the gradients
void fit_sirens(const int64_t* words) {
    Networks s;
    s.count = words[0], s.points = words[1], s.padded = words[2];
    const Int depth = words[3];
    const float* inputs = (const float*)words[4];
    s.targets = (const float*)words[5], s.residuals = (float*)words[6];
    const int64_t* widths = words + 7;
    const double* frequencies = (const double*)(widths + depth + 1);
    const int64_t* addresses = widths + 2 * depth + 1;
    Int numbers = 0;
    for (Int l = 0; l < depth; l++) {
        s.layers.push_back({widths[l], widths[l + 1], frequencies[l], (float*)addresses[l], (float*)addresses[depth + l]});
        numbers += (widths[l] + 1 + widths[l + 1]) * s.padded + widths[l + 1] * CHUNK;
    }
    std::vector<float> memory(numbers + L, 1.0f);
    float* next = (float*)(((uintptr_t)memory.data() + BYTES - 1) / BYTES * BYTES);
    for (Layer& layer : s.layers) {
        layer.input = next, layer.delta = layer.input + (layer.in + 1) * s.padded;
        layer.slope = layer.delta + layer.out * s.padded, next = layer.slope + layer.out * CHUNK;
    }
    Layer& first = s.layers[0];
    for (Int start = 0; start < s.padded; start += CHUNK) {
        const Int size = chunk_size(s.padded, start);
        for (Int i = 0; i < first.in; i++)
            std::copy_n(inputs + i * s.padded + start, size, first.input + start * (first.in + 1) + i * size);
    }
    for (Int network = 0; network < s.count; network++) fit_step(s, network);
}
}
