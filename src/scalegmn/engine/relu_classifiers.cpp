// The cross-entropy of relu networks on images, and its gradient. relu_classifiers.py says what they are.

#include <vector>

#include "products.h"

namespace {

typedef Lanes<float>::Vector Vector;
const Int L = Lanes<float>::count;

Int padded(Int count) { return (count + L - 1) / L * L; }

// Parameters and gradients: per layer weight and bias, `size` numbers of each network
struct Classifiers {
    Int count, num_images, size, depth, num_threads;
    const float *parameters, *images;
    const Int* labels;
    float *losses, *gradients;
    const Int* widths;
};

// [rows, columns], by rows `from_row` apart -> its transpose, by rows `to_row` apart
inline void transpose(const float* from, Int from_row, Int rows, Int columns, float* to, Int to_row) {
    for (Int c = 0; c < columns; c++)
        for (Int r = 0; r < rows; r++) to[c * to_row + r] = from[r * from_row + c];
}

// One network; images are in the lanes of vectors
struct Memory {
    const Classifiers& s;
    const Int lanes;                         // images and zeros behind them
    std::vector<std::vector<float>> values;  // of each layer [n_l, lanes], from the images on
    std::vector<float> delta, below, rows, product_rows;

    explicit Memory(const Classifiers& classifiers) : s(classifiers), lanes(padded(s.num_images)) {
        Int widest = 0;
        for (Int l = 0; l <= s.depth; l++) {
            widest = std::max(widest, padded(s.widths[l]));
            values.emplace_back(s.widths[l] * lanes);
        }
        delta.resize(widest * lanes), below.resize(widest * lanes);
        rows.resize(widest * s.num_images), product_rows.resize(widest * widest);
    }

    void forward(const float* images, const float* parameters) {
        transpose(images, s.widths[0], s.num_images, s.widths[0], values[0].data(), lanes);
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
    float loss(const Int* labels) {
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
                const Int place = labels[i + k] * lanes + i + k;
                sum += normalizer[k] - z[place];
                delta[place] -= share;
            }
        }
        for (Int c = 0; c < num_classes; c++)
            std::fill(delta.data() + c * lanes + s.num_images, delta.data() + (c + 1) * lanes, 0.0f);
        return sum * share;
    }

    void backward(const float* parameters, float* gradients) {
        Int end = s.size;
        for (Int l = s.depth - 1; l >= 0; l--) {
            const Int in = s.widths[l], out = s.widths[l + 1], columns = padded(in), start = end - out * (in + 1);
            transpose(values[l].data(), lanes, in, s.num_images, rows.data(), columns);
            product<float, float>(out, columns, s.num_images, delta.data(), lanes, 1, rows.data(), product_rows.data(),
                                  false);
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
};

}  // namespace

extern "C" {

// words: those of Classifiers
void relu_classifiers(const int64_t* words) {
    const Classifiers s = *(const Classifiers*)words;
#pragma omp parallel num_threads(s.num_threads)
    {
        Memory memory(s);
#pragma omp for schedule(static)
        for (Int network = 0; network < s.count; network++) {
            const float* parameters = s.parameters + network * s.size;
            memory.forward(s.images + network * s.num_images * s.widths[0], parameters);
            s.losses[network] = memory.loss(s.labels + network * s.num_images);
            memory.backward(parameters, s.gradients + network * s.size);
        }
    }
}
}
