// Training of many relu networks on images under a learned optimiser: all steps of one network, then the next, so that what
// belongs to it stays in cache. inner_training.py says what it is.

#include "coordinate_steps.h"
#include "relu_classifiers.h"

namespace {

inline bool all_finite(const float* x, Int count) {
    Int largest = 0;
    for (Int i = 0; i < count; i++) {
        int32_t bits;
        std::memcpy(&bits, x + i, 4);
        largest = std::max<Int>(largest, bits & 0x7fffffff);
    }
    return largest < 0x7f800000;
}

}  // namespace

extern "C" {

// words: those of Classifiers, parameters [count, size], losses [count], gradients [count, size], threads
void relu_classifiers(const int64_t* words) {
    const Classifiers& s = *(const Classifiers*)words;
    words += sizeof(Classifiers) / sizeof(Int);
    const float* parameters = (const float*)words[0];
    float *losses = (float*)words[1], *gradients = (float*)words[2];
#pragma omp parallel num_threads(words[3])
    {
        Classifier classifier(s);
#pragma omp for schedule(static)
        for (Int network = 0; network < s.count; network++) {
            const Int start = network * s.size;
            losses[network] = classifier.loss_and_gradients(network, 0, parameters + start, gradients + start);
        }
    }
}

// words: those of Optimizer, of the states before and after, gradients [count, size], threads
void coordinate_steps(const int64_t* words) {
    const Optimizer& s = *(const Optimizer*)words;
    words += sizeof(Optimizer) / sizeof(Int);
    const State before = *(const State*)words, after = *(const State*)(words + 4);
    const float* gradients = (const float*)words[8];
#pragma omp parallel num_threads(words[9])
    {
        Buffers buffers(s);
#pragma omp for schedule(static)
        for (Int network = 0; network < s.count; network++)
            CoordinateStep(s, network, 0, before.of(network, s.size, s.num_momenta),
                           after.of(network, s.size, s.num_momenta), gradients + network * s.size)
                .run(buffers);
    }
}

// words: those of Optimizer, of Classifiers, of the state, whose numbers are replaced, losses [count, num_steps], steps that
// each network took [count], num_steps, largest loss, threads
void inner_training(const int64_t* words) {
    const Optimizer& optimizer = *(const Optimizer*)words;
    words += sizeof(Optimizer) / sizeof(Int);
    const Classifiers& classifiers = *(const Classifiers*)words;
    words += sizeof(Classifiers) / sizeof(Int);
    const State states = *(const State*)words;
    float* losses = (float*)words[4];
    Int* num_taken = (Int*)words[5];
    const Int size = optimizer.size, num_steps = words[6];
    const float largest = *(const float*)words[7];
#pragma omp parallel num_threads(words[8])
    {
        Classifier classifier(classifiers);
        Buffers buffers(optimizer);
        std::vector<float> gradients(size), following(size);
#pragma omp for schedule(dynamic)
        for (Int network = 0; network < optimizer.count; network++) {
            const State before = states.of(network, size, optimizer.num_momenta);
            State after = before;
            after.values = following.data();
            Int t = 0;
            for (; t < num_steps; t++) {
                const float loss = classifier.loss_and_gradients(network, t, before.values, gradients.data());
                if (!(loss < largest && all_finite(gradients.data(), size))) break;
                losses[network * num_steps + t] = loss;
                CoordinateStep(optimizer, network, t, before, after, gradients.data()).run(buffers);
                if (!all_finite(following.data(), size)) break;
                copy(following.data(), before.values, size);
            }
            num_taken[network] = t;
        }
    }
}
}
