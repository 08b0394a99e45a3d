// A step of networks under a learned optimiser that reads each parameter by itself. coordinate_steps.py says what it is.
//
// Each network is updated on its own: first its momenta and moments, then, tensor by tensor, blocks of parameters pass
// through encoding, MLP and rule while they are in cache, a parameter per lane of a vector.

#pragma once

#include <vector>

#include "products.h"

namespace {

typedef Lanes<float>::Vector Vector;
typedef int32_t Whole __attribute__((vector_size(BYTES)));
const int L = Lanes<float>::count, VECTORS = BYTES == 64 ? 4 : 2, BLOCK = VECTORS * L;  // of parameters

enum Encoding { LOGARITHMS, UNITS };
enum Rule { EXPONENTIAL, MOMENTUM, ADAM };

// Of each network, `weight_stride` and `bias_stride` numbers apart; rows of weights are `row` numbers apart, biases of
// steps `bias_step`
struct Layer {
    Int outputs, inputs, row, weight_stride, bias_stride, bias_step;
    const float *weight, *bias;
};

// The parameters and state of B networks, [B, P], momenta [B, M, P]
struct State {
    float *values, *momenta, *first, *second;

    State of(Int network, Int size, Int num_momenta) const {
        const Int start = network * size;
        return {values + start, momenta + start * num_momenta, first + start, second + start};
    }
};

// The optimiser of `count` networks of `size` parameters; constants [steps, count, num_constants]
struct Optimizer {
    Int encoding, rule, count, size, num_tensors, num_momenta, num_layers, num_constants;
    const float *decays, *constants;
    const Int* sizes;
    const Layer* layers;
};

// What layers of the MLP read and write: BLOCK numbers of each of as many channels as the widest has
struct Buffers {
    std::vector<float> memory, units;
    float *first, *second;

    explicit Buffers(const Optimizer& s) : units(2 + s.num_momenta) {
        Int widest = 0;
        for (Int l = 0; l < s.num_layers; l++) widest = std::max({widest, s.layers[l].inputs, s.layers[l].outputs});
        memory.resize(2 * widest * BLOCK + L);
        first = (float*)(((uintptr_t)memory.data() + BYTES - 1) / BYTES * BYTES), second = first + widest * BLOCK;
    }
};

// The first `count` lanes from memory, 0 in others
inline Vector load(const float* from, Int count) {
    if (count >= L) return *(const Vector*)from;
    Vector x{};
    if (count > 0) std::memcpy(&x, from, count * sizeof(float));
    return x;
}

// e^x, which is 0 and infinite where single precision ends
inline Vector full_exponential(Vector x) {
    const Vector root = exponential(0.5f * x);
    return root * root;
}

// Comparisons are false for NaN, which stays
inline Vector clamp(Vector x, float limit) {
    x = x > limit ? Vector{} + limit : x;
    return x < -limit ? Vector{} - limit : x;
}

// to = decay from + weight x, where to may be from
inline void average(const float* from, const float* x, float decay, float weight, float* to, Int count) {
#pragma GCC ivdep
    for (Int i = 0; i < count; i++) to[i] = decay * from[i] + weight * x[i];
}

inline float root_mean_square(const float* x, Int count) {
    Vector sum{};
    for (Int i = 0; i < count; i += L) {
        const Vector part = load(x + i, count - i);
        sum += part * part;
    }
    return std::sqrt(total<float>(sum) / count);
}

// Of BLOCK numbers sign x and log|x| / 10, or e^10 x and -1 where |x| < e^-10: both are cut off where the other begins
inline void signs_and_logarithms(const float* x, float* signs, float* results) {
    Vector sizes[VECTORS], logs[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
        const Vector numbers = *(const Vector*)(x + j * L);
        sizes[j] = (Vector)((Whole)numbers & 0x7fffffff);
        *(Vector*)(signs + j * L) = clamp(22026.465794806718f * numbers, 1);
    }
    logarithms(sizes, logs);
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; j++) {
        const Vector tenth = 0.1f * logs[j];
        *(Vector*)(results + j * L) = tenth < -1.0f ? Vector{} - 1.0f : tenth;  // NaN stays
    }
}

// Outputs of a layer from `o` on, M at once: [M, BLOCK] = W [M, inputs] x [inputs, BLOCK] + b, then relu where it is hidden
template <int M>
inline Int outputs(Int o, const Layer& layer, const float* weight, const float* bias, bool is_hidden, const float* x,
                   float* to) {
    for (; o + M <= layer.outputs; o += M) {
        Vector sums[M][VECTORS];
#pragma GCC unroll 8
        for (int i = 0; i < M; i++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) sums[i][j] = bias[o + i] - Vector{};
        for (Int k = 0; k < layer.inputs; k++) {
            Vector factors[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) factors[j] = in_register(*(const Vector*)(x + k * BLOCK + j * L));
#pragma GCC unroll 8
            for (int i = 0; i < M; i++)
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; j++) sums[i][j] += weight[(o + i) * layer.row + k] * factors[j];
        }
#pragma GCC unroll 8
        for (int i = 0; i < M; i++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) {
                const Vector y = sums[i][j];
                ((Vector*)(to + (o + i) * BLOCK))[j] = is_hidden ? (y < 0.0f ? Vector{} : y) : y;  // NaN stays
            }
    }
    return o;
}

// A step of one network; momenta and moments after it may take the place of those before it
struct CoordinateStep {
    const Optimizer& s;
    Int network, time;
    State before, after;
    const float *gradients, *constants;

    CoordinateStep(const Optimizer& optimizer, Int network, Int time, State before, State after, const float* gradients)
        : s(optimizer), network(network), time(time), before(before), after(after), gradients(gradients),
          constants(s.constants + (time * s.count + network) * s.num_constants) {}

    void advance() {
        for (Int m = 0; m < s.num_momenta; m++) {
            const Int start = m * s.size;
            average(before.momenta + start, gradients, s.decays[2 * m], s.decays[2 * m + 1], after.momenta + start, s.size);
        }
        const float* d = s.decays + 2 * s.num_momenta;
        average(before.first, gradients, d[0], d[1], after.first, s.size);
#pragma GCC ivdep
        for (Int i = 0; i < s.size; i++)
            after.second[i] = d[2] * before.second[i] + d[3] * (gradients[i] * gradients[i]);
    }

    // Parameter, gradient, momenta
    const float* number(Int n) const {
        return n == 0 ? before.values : n == 1 ? gradients : after.momenta + (n - 2) * s.size;
    }

    // Channels of `count` parameters from `start` on, by rows of BLOCK numbers
    void encode(Int start, Int count, const float* units, float* channels) const {
        const Int num_numbers = 2 + s.num_momenta;
        float last[BLOCK] = {};  // and zeros behind them
        for (Int n = 0; n < num_numbers; n++) {
            const float* x = number(n) + start;
            if (count < BLOCK) x = (const float*)std::memcpy(last, x, count * sizeof(float));
            float *odd = channels + n * BLOCK, *even = odd + num_numbers * BLOCK;
            if (s.encoding == LOGARITHMS) signs_and_logarithms(x, odd, even);
            for (Int c = 0; s.encoding == UNITS && c < BLOCK; c += L)
                *(Vector*)(odd + c) = clamp(*(const Vector*)(x + c) / units[n], 10);
        }
    }

    // Leaves the outputs, two rows, in the buffer that is returned
    const float* mlp(float* from, float* to) const {
        for (Int l = 0; l < s.num_layers; l++) {
            const Layer& layer = s.layers[l];
            const float *weight = layer.weight + network * layer.weight_stride;
            const float* bias = layer.bias + network * layer.bias_stride + time * layer.bias_step;
            const bool is_hidden = l < s.num_layers - 1;
            Int o = outputs<6>(0, layer, weight, bias, is_hidden, from, to);
            o = outputs<4>(o, layer, weight, bias, is_hidden, from, to);
            o = outputs<2>(o, layer, weight, bias, is_hidden, from, to);
            outputs<1>(o, layer, weight, bias, is_hidden, from, to);
            std::swap(from, to);
        }
        return from;
    }

    void update(Int start, Int count, const float* outputs) {
        const float* c = constants;
        float directions[BLOCK], changes[BLOCK];
        for (Int i = 0; s.rule == ADAM && i < count; i++)
            directions[i] = after.first[start + i] / c[3] / (std::sqrt(after.second[start + i] / c[4]) + 1e-8f);
        for (Int i = 0; i < BLOCK; i += L) {
            const Vector o1 = *(const Vector*)(outputs + i), o2 = *(const Vector*)(outputs + BLOCK + i);
            Vector& change = *(Vector*)(changes + i);
            if (s.rule == EXPONENTIAL) {
                change = c[0] * o1 * full_exponential(c[0] * o2);
            } else if (s.rule == MOMENTUM) {
                change = c[0] * (load(after.first + start + i, count - i) + c[1] * o1);
            } else {
                change = c[0] * (*(Vector*)(directions + i) * exponential(clamp(c[2] * o2, 5)) + c[1] * o1);
            }
        }
        for (Int i = 0; i < count; i++) after.values[start + i] = before.values[start + i] + changes[i];
    }

    void run(Buffers& buffers) {
        advance();
        float* units = buffers.units.data();
        Int start = 0;
        for (Int t = 0; t < s.num_tensors; t++) {
            for (Int n = 0; s.encoding == UNITS && n < 2 + s.num_momenta; n++) {
                const float size = root_mean_square(number(n) + start, s.sizes[t]);
                units[n] = size > 1.0842021724855044e-19f ? size : 1;  // the root of the smallest normal number
            }
            for (const Int stop = start + s.sizes[t]; start < stop; start += std::min<Int>(BLOCK, stop - start)) {
                const Int count = std::min<Int>(BLOCK, stop - start);
                encode(start, count, units, buffers.first);
                update(start, count, mlp(buffers.first, buffers.second));
            }
        }
    }
};

}  // namespace
