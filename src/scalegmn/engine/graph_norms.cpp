// SiLU(g * (x - mean) / (deviation + epsilon) + c) over all nodes and features of each network, and its gradient.
// graph_norms.py says what they are.

#include <vector>

#include "products.h"

namespace {

struct Norm {
    Int is_double, batch, rows, width, num_threads;
    const char *x, *scale, *shift;  // [B, rows, width], [width], [width]
    char *y, *moments;              // [B, rows, width]; null or, of each network, mean and deviation
    const char* y_gradient;
    char *x_gradient, *scale_gradient, *shift_gradient;  // null where they are not needed
    double epsilon;
};

template <class T>
struct Network {
    typedef typename Lanes<T>::Vector Vector;
    static const int L = Lanes<T>::count;

    const Norm& p;
    const Int n = p.width / L, size = p.rows * p.width;  // vectors of a row, numbers of a network
    const Vector *scale = (const Vector*)p.scale, *shift = (const Vector*)p.shift;

    explicit Network(const Norm& norm) : p(norm) {}

    void forward(Int b) {
        const Vector* x = (const Vector*)((const T*)p.x + b * size);
        Vector* y = (Vector*)((T*)p.y + b * size);
        Vector sum{}, squares{};
        for (Int i = 0; i < p.rows * n; i++) sum += x[i];
        const T mean = total<T>(sum) / size;
        for (Int i = 0; i < p.rows * n; i++) squares += (x[i] - mean) * (x[i] - mean);
        const T deviation = std::sqrt(total<T>(squares) / size), inverse = 1 / (deviation + (T)p.epsilon);
        for (Int r = 0; r < p.rows; r++)
            for (Int c = 0; c < n; c++) {
                const Vector w = (x[r * n + c] - mean) * inverse * scale[c] + shift[c];
                y[r * n + c] = w * sigmoid(w);
            }
        if (p.moments) ((T*)p.moments)[2 * b] = mean, ((T*)p.moments)[2 * b + 1] = deviation;
    }

    // Adds to the gradients of scale and shift
    void backward(Int b, Vector* scale_sums, Vector* shift_sums) {
        const Vector *x = (const Vector*)((const T*)p.x + b * size), *up = (const Vector*)((const T*)p.y_gradient + b * size);
        std::vector<Vector> unread(p.x_gradient ? 0 : p.rows * n);
        Vector* down = p.x_gradient ? (Vector*)((T*)p.x_gradient + b * size) : unread.data();
        const T mean = ((const T*)p.moments)[2 * b], deviation = ((const T*)p.moments)[2 * b + 1];
        const T inverse = 1 / (deviation + (T)p.epsilon);
        Vector sum{}, products{};
        for (Int r = 0; r < p.rows; r++)
            for (Int c = 0; c < n; c++) {
                const Vector z = (x[r * n + c] - mean) * inverse, w = z * scale[c] + shift[c], s = sigmoid(w);
                const Vector of_w = up[r * n + c] * s * (1 + w * (1 - s)), of_z = of_w * scale[c];
                shift_sums[c] += of_w, scale_sums[c] += of_w * z;
                sum += of_z, products += of_z * z;
                down[r * n + c] = of_z;
            }
        const T mean_of_z = total<T>(sum) / size, slope = total<T>(products) / size / deviation;
        for (Int i = 0; i < p.rows * n; i++) down[i] = inverse * (down[i] - mean_of_z - (x[i] - mean) * slope);
    }
};

template <class T>
void run(const Norm& p, bool backward) {
    typedef typename Lanes<T>::Vector Vector;
    const Int num_threads = std::max<Int>(1, std::min(p.num_threads, p.batch));
#pragma omp parallel for num_threads(num_threads) schedule(static, 1) ordered
    for (Int thread = 0; thread < num_threads; thread++) {
        Network<T> network(p);
        std::vector<T> sums(2 * p.width);
        Vector *scale_sums = (Vector*)sums.data(), *shift_sums = (Vector*)(sums.data() + p.width);
        for (Int b = p.batch * thread / num_threads; b < p.batch * (thread + 1) / num_threads; b++)
            backward ? network.backward(b, scale_sums, shift_sums) : network.forward(b);
#pragma omp ordered
        for (Int c = 0; backward && c < p.width; c++) {  // in order, so that sums are the same every time
            if (p.scale_gradient) ((T*)p.scale_gradient)[c] += sums[c];
            if (p.shift_gradient) ((T*)p.shift_gradient)[c] += sums[p.width + c];
        }
    }
}

}  // namespace

extern "C" void graph_norm(const int64_t* words, int64_t backward) {
    const Norm& p = *(const Norm*)words;
    if (p.is_double)
        run<double>(p, backward);
    else
        run<float>(p, backward);
}
