// The cross-entropy of relu networks on images, and its gradient. relu_classifiers.py says what they are.

#pragma once

#include <vector>

#include "products.h"

namespace {

inline Int padded(Int count) { return (count + Lanes<float>::count - 1) / Lanes<float>::count * Lanes<float>::count; }

// Parameters and gradients: per layer weight and bias, `size` numbers of each of `count` networks; `rows` of the pixels and
// labels are the images of each step [steps, count, num_images]
struct Classifiers {
    Int count, num_images, size, depth;
    const float* pixels;
    const Int *labels, *rows, *widths;
};

// [rows, columns], by rows `from_row` apart -> its transpose, by rows `to_row` apart
inline void transpose(const float* from, Int from_row, Int rows, Int columns, float* to, Int to_row) {
    for (Int c = 0; c < columns; c++)
        for (Int r = 0; r < rows; r++) to[c * to_row + r] = from[r * from_row + c];
}

// What is made for one network after the other; images are in the lanes of vectors
struct Classifier {
    const Classifiers& s;
    const Int lanes;                         // images and zeros behind them
    std::vector<std::vector<float>> values;  // of each layer [n_l, lanes], from the images on
    std::vector<float> images;               // [num_images, padded n_0]
    std::vector<float> delta, below, rows, product_rows;

    explicit Classifier(const Classifiers& classifiers) : s(classifiers), lanes(padded(s.num_images)) {
        Int widest = 0;
        for (Int l = 0; l <= s.depth; l++) {
            widest = std::max(widest, padded(s.widths[l]));
            values.emplace_back(s.widths[l] * lanes);
        }
        images.resize(s.num_images * padded(s.widths[0]));
        delta.resize(widest * lanes), below.resize(widest * lanes);
        rows.resize(widest * s.num_images), product_rows.resize(widest * widest);
    }

    void forward(const Int* chosen, const float* parameters) {
        const Int num_pixels = s.widths[0], row = padded(num_pixels);
        for (Int i = 0; i < s.num_images; i++) copy(s.pixels + chosen[i] * num_pixels, images.data() + i * row, num_pixels);
        transpose(images.data(), row, s.num_images, num_pixels, values[0].data(), lanes);
        for (Int l = 0; l < s.depth; l++) {
            const Int in = s.widths[l], out = s.widths[l + 1];
            const float *weight = parameters, *bias = weight + out * in;
            float* to = values[l + 1].data();
            for (Int o = 0; o < out; o++) std::fill(to + o * lanes, to + (o + 1) * lanes, bias[o]);
            product<float, float>(out, lanes, in, weight, in, 1, values[l].data(), to, true);
            if (l < s.depth - 1) relu(to, out * lanes);
            parameters = bias + out;
        }
    }

    // Leaves the gradient by the outputs in `delta`
    float loss(const Int* chosen) {
        typedef Lanes<float>::Vector Vector;
        const Int L = Lanes<float>::count;
        const float *z = values[s.depth].data(), share = 1.0f / s.num_images;
        const Int num_classes = s.widths[s.depth];
        float sum = 0;
        for (Int i = 0; i < lanes; i += L) {
            Vector largest = *(const Vector*)(z + i), total{};
            for (Int c = 1; c < num_classes; c++) {
                const Vector x = *(const Vector*)(z + c * lanes + i);
                largest = x > largest ? x : largest;
            }
            for (Int c = 0; c < num_classes; c++) {
                Vector& to = *(Vector*)(delta.data() + c * lanes + i);
                to = exponential(*(const Vector*)(z + c * lanes + i) - largest);
                total += to;
            }
            for (Int c = 0; c < num_classes; c++) *(Vector*)(delta.data() + c * lanes + i) *= share / total;
            const Vector normalizer = largest + logarithm(total);
            for (Int k = 0; k < L && i + k < s.num_images; k++) {
                const Int place = s.labels[chosen[i + k]] * lanes + i + k;
                sum += normalizer[k] - z[place];
                delta[place] -= share;
            }
        }
        for (Int c = 0; c < num_classes; c++)
            std::fill(delta.data() + c * lanes + s.num_images, delta.data() + (c + 1) * lanes, 0.0f);
        return sum * share;
    }

    void backward(const float* parameters, float* gradients) {
        typedef Lanes<float>::Vector Vector;
        const Int L = Lanes<float>::count;
        Int end = s.size;
        for (Int l = s.depth - 1; l >= 0; l--) {
            const Int in = s.widths[l], out = s.widths[l + 1], columns = padded(in), start = end - out * (in + 1);
            if (l) transpose(values[l].data(), lanes, in, s.num_images, rows.data(), columns);
            const float* factors = l ? rows.data() : images.data();
            product<float, float>(out, columns, s.num_images, delta.data(), lanes, 1, factors, product_rows.data(), false);
            for (Int o = 0; o < out; o++) {
                copy(product_rows.data() + o * columns, gradients + start + o * in, in);
                Vector sum{};
                for (Int i = 0; i < lanes; i += L) sum += *(const Vector*)(delta.data() + o * lanes + i);
                gradients[start + out * in + o] = total<float>(sum);
            }
            if (l) {
                product<float, float>(in, lanes, out, parameters + start, 1, in, delta.data(), below.data(), false);
                for (Int i = 0; i < in * lanes; i += L) {
                    Vector& to = *(Vector*)(below.data() + i);
                    to = *(const Vector*)(values[l].data() + i) <= 0.0f ? Vector{} : to;
                }
                std::swap(delta, below);
            }
            end = start;
        }
    }

    // The loss of a network on its images of a step
    float loss_and_gradients(Int network, Int time, const float* parameters, float* gradients) {
        const Int* chosen = s.rows + (time * s.count + network) * s.num_images;
        forward(chosen, parameters);
        const float result = loss(chosen);
        backward(parameters, gradients);
        return result;
    }
};

}  // namespace
