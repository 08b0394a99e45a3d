// Programs of rowwise operations, run tile by tile: a tile of rows passes through all operations while it is in cache.
//
// A program has values v_0, v_1, ... of shape [rows, width]; every operation makes a new one. Rows are those of a block
// [B, R, S]; inputs are read by their strides over it, or gathered by an index over R. The backward pass makes the values
// of a tile again, but for what is on the tape, and goes through the operations in reverse order. The tape, if there is one,
// has moments of norms and, but for products in bfloat16, which are fast, results of linear maps.
// row_programs.py says what the operations are and writes programs.

#include <vector>

#include "products.h"
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

enum Code {
    LOAD, LINEAR, ADD, SUBTRACT, MULTIPLY, MODULATE, GATE, SCALE, SILU_BOTH, NORM_SILU, NORM_SILU_BOTH, SILU, INTERPOLATE,
    AGGREGATE, JOIN, STORE, SUM, STATISTICS
};

const Int FILLING = 32;  // the most rows that a tile is filled up with, as in row_programs.py

struct Input {
    const char* values;
    Int width, batch_stride, receiver_stride, sender_stride, is_half;
    const Int* index;  // which of its rows each receiver has, or null: the row of its number
    Int num_rows;      // that it has, if there is an index
    char* gradient;
    Int gradient_is_half, adds, gradient_batch_stride, gradient_receiver_stride, gradient_sender_stride, copy_size;
};

// Rows of a table between which a value is interpolated
constexpr int num_points(bool is_double) { return is_double ? 16 : 10; }

// A tensor (by rows `stride` numbers apart), the product of two parameters, (of vectors) a + factor M b, without a where it
// is -1, or the rows of one matrix, or the numbers of one vector, and then those of another
struct Parameter {
    const char* values;
    Int rows, columns, stride;
    char* gradient;
    Int kind, first, second, third, factor;
};

enum Kind { TENSOR, PRODUCT, SHIFTED, STACKED };

struct Operation {
    Int code, result, first, second, parameter, other_parameter;
    double epsilon;
};

struct Program {
    Int is_double, uses_halves, batch, receivers, senders, num_inputs, num_parameters, num_operations, num_values;
    Int num_threads;
    char* output;
    Int output_is_half, output_batch_stride, output_receiver_stride, output_sender_stride;  // those of its gradient, too
    char* tape;
    Int tape_width;
    const char* output_gradient;
    Int output_gradient_is_half;
    const Int* nodes;  // of statistics, whose each receiver is
    Int num_nodes;
    const Input* inputs;
    const Parameter* parameters;
    const Operation* operations;
    const Int* widths;  // of each value
    const Int* needs;   // whether its gradient is needed
};

Program read(const Int* words) {
    Program p;
    p.is_double = words[0], p.uses_halves = words[1];
    p.batch = words[2], p.receivers = words[3], p.senders = words[4];
    p.num_inputs = words[5], p.num_parameters = words[6], p.num_operations = words[7], p.num_values = words[8];
    p.num_threads = words[9];
    p.output = (char*)words[10], p.output_is_half = words[11];
    p.output_batch_stride = words[12], p.output_receiver_stride = words[13], p.output_sender_stride = words[14];
    p.tape = (char*)words[15], p.tape_width = words[16];
    p.output_gradient = (const char*)words[17], p.output_gradient_is_half = words[18];
    p.nodes = (const Int*)words[19], p.num_nodes = words[20];
    words += 21;
    p.inputs = (const Input*)words, words += p.num_inputs * (sizeof(Input) / sizeof(Int));
    p.parameters = (const Parameter*)words, words += p.num_parameters * (sizeof(Parameter) / sizeof(Int));
    p.operations = (const Operation*)words, words += p.num_operations * (sizeof(Operation) / sizeof(Int));
    p.widths = words, words += p.num_values;
    p.needs = words;
    return p;
}

// Products of bfloat16 matrices in the eight tile registers of a core, of 16 rows of 16 pairs each (Intel AMX)

#ifdef __AMX_BF16__
// Whether the system lets this process use them
inline bool has_tiles() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return granted;
}

// While it lives, this thread's registers are set up
struct TileRegisters {
    bool used;
    explicit TileRegisters(bool uses) : used(uses && has_tiles()) {
        if (!used) return;
        static const struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        _tile_loadconfig(&shapes);
    }
    ~TileRegisters() {
        if (used) _tile_release();
    }
};

// C [rows, columns] = S (if there is one, by rows) + A [rows, pairs] B [pairs, columns]; rows and columns are multiples of
// 32, pairs of 16
inline void tile_product(Int rows, Int columns, Int pairs, const Pair* a, const Pair* b, float* c, const float* s,
                         Int s_row) {
    const Int low = 16 * pairs, right = 4 * columns;
    const bool is_short = pairs == 16;
    __asm__ volatile("" ::: "memory");  // the intrinsics do not say that they read and write memory
    for (Int j = 0; j < columns; j += 32)
        for (Int i = 0; i < rows; i += 32) {
            float *top = c + i * columns + j, *bottom = top + 16 * columns;
            if (s) {
                const float *first = s + i * s_row + j, *second = first + 16 * s_row;
                _tile_loadd(0, first, 4 * s_row);
                _tile_loadd(1, first + 16, 4 * s_row);
                _tile_loadd(2, second, 4 * s_row);
                _tile_loadd(3, second + 16, 4 * s_row);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (Int k = 0; k < pairs; k += 16) {
                const Pair *left_factor = a + i * pairs + k, *right_factor = b + k * columns + j;
                _tile_loadd(4, left_factor, 4 * pairs);
                _tile_loadd(5, left_factor + low, 4 * pairs);
                if (!is_short || i == 0) {  // else they are there
                    _tile_loadd(6, right_factor, right);
                    _tile_loadd(7, right_factor + 16, right);
                }
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, top, right);
            _tile_stored(1, top + 16, right);
            _tile_stored(2, bottom, right);
            _tile_stored(3, bottom + 16, right);
        }
    __asm__ volatile("" ::: "memory");
}

// [16, 16] -> its transpose, by rows `from_row` and `to_row` numbers apart
inline void transpose(const Pair* from, Int from_row, Pair* to, Int to_row) {
    __m512i x[16], y[16];
    for (int i = 0; i < 16; i++) x[i] = _mm512_loadu_si512(from + i * from_row);
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int k = 0; k < 2; k++) {
            x[i + 2 * k] = _mm512_unpacklo_epi64(y[i + k], y[i + k + 2]);
            x[i + 2 * k + 1] = _mm512_unpackhi_epi64(y[i + k], y[i + k + 2]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int k = 0; k < 4; k++) {
            y[i + k] = _mm512_shuffle_i32x4(x[i + k], x[i + k + 4], 0x88);
            y[i + k + 4] = _mm512_shuffle_i32x4(x[i + k], x[i + k + 4], 0xdd);
        }
    for (int k = 0; k < 8; k++) {
        _mm512_storeu_si512(to + k * to_row, _mm512_shuffle_i32x4(y[k], y[k + 8], 0x88));
        _mm512_storeu_si512(to + (k + 8) * to_row, _mm512_shuffle_i32x4(y[k], y[k + 8], 0xdd));
    }
}
#else
inline bool has_tiles() { return false; }

struct TileRegisters {
    explicit TileRegisters(bool) {}
};

inline void tile_product(Int, Int, Int, const Pair*, const Pair*, float*, const float*, Int) {}
inline void transpose(const Pair*, Int, Pair*, Int) {}
#endif

inline bool fits_tiles(Int rows, Int columns, Int pairs) {
    return has_tiles() && rows % 32 == 0 && columns % 32 == 0 && pairs % 16 == 0;
}

// C [rows, columns] = S (if there is one, by rows) + A [rows, pairs] B [pairs, columns]
inline void pair_product(Int rows, Int columns, Int pairs, const Pair* a, const Pair* b, float* c, const float* s,
                         Int s_row) {
    if (fits_tiles(rows, columns, pairs))
        tile_product(rows, columns, pairs, a, b, c, s, s_row);
    else
        product<float, Pair>(rows, columns, pairs, a, pairs, 1, b, c, s, s_row);
}

// C [rows, columns] += A^T B for A [pairs, rows] and B [pairs, columns]; `turned` has the size of A
inline void pair_product_transposed(Int rows, Int columns, Int pairs, const Pair* a, const Pair* b, float* c,
                                    Pair* turned) {
    if (!fits_tiles(rows, columns, pairs))
        return product<float, Pair>(rows, columns, pairs, a, 1, rows, b, c, true);
    for (Int k = 0; k < pairs; k += 16)
        for (Int r = 0; r < rows; r += 16) transpose(a + k * rows + r, rows, turned + r * pairs + k, pairs);
    tile_product(rows, columns, pairs, turned, b, c, c, columns);
}

inline void pair_product(Int, Int, Int, const Pair*, const Pair*, double*, const double*, Int) {}
inline void pair_product_transposed(Int, Int, Int, const Pair*, const Pair*, double*, Pair*) {}

// A weight [out, in] as right factors of x W^T and of g W
template <class T>
struct Weight {
    std::vector<T> transposed;        // [in, out]
    std::vector<Pair> forward, back;  // [in / 2, out], [out / 2, in]

    void pack(const T* w, Int out, Int in, bool halves, bool backward, bool again) {
        if (!halves && !again) return;
        if (!halves) {
            transposed.resize(in * out);
            for (Int start = 0; start < out; start += FILLING)  // caches hold so many rows
                for (Int i = 0; i < in; i++)
                    for (Int o = start; o < std::min(out, start + FILLING); o++) transposed[i * out + o] = w[o * in + i];
            return;
        }
        std::vector<Half> rounded(out * in);
        to_halves(w, rounded.data(), out * in);
        if (backward) {
            back.resize(out / 2 * in);
            to_row_pairs(rounded.data(), back.data(), out, in);
        }
        if (!again) return;
        forward.resize(in / 2 * out);
        const Pair* pairs = (const Pair*)rounded.data();
        if (fits_tiles(out, in, in / 2)) {
            for (Int o = 0; o < out; o += 16)
                for (Int k = 0; k < in / 2; k += 16)
                    transpose(pairs + o * (in / 2) + k, in / 2, forward.data() + k * out + o, out);
            return;
        }
        for (Int o = 0; o < out; o++)
            for (Int k = 0; k < in / 2; k++) forward[k * out + o] = pairs[o * (in / 2) + k];
    }
};

template <class T>
struct Parameters {
    const Program& p;
    std::vector<const T*> values;        // row by row
    std::vector<std::vector<T>> memory;  // of those that are not read where they are
    std::vector<std::vector<T>> gradients;
    std::vector<char> needs;

    Parameters(const Program& program, bool backward) : p(program), memory(p.num_parameters) {
        for (Int k = 0; k < p.num_parameters; k++) {
            const Parameter& q = p.parameters[k];
            std::vector<T>& to = memory[k];
            if (q.kind != TENSOR || q.stride != q.columns) to.resize(q.rows * q.columns);
            if (q.kind == TENSOR) {
                for (Int r = 0; r < q.rows && !to.empty(); r++)
                    copy((const T*)q.values + r * q.stride, &to[r * q.columns], q.columns);
            } else if (q.kind == PRODUCT) {
                const Int depth = p.parameters[q.first].columns;
                product<T, T>(q.rows, q.columns, depth, values[q.first], depth, 1, values[q.second], to.data(), false);
            } else if (q.kind == STACKED) {
                const Int count = size(q.first);
                copy(values[q.first], to.data(), count);
                copy(values[q.second], to.data() + count, size(q.second));
            } else {
                const T *m = values[q.second], *b = values[q.third];
                const Int count = size(q.third);
                for (Int r = 0; r < q.columns; r++) {
                    T sum = 0;
                    for (Int c = 0; c < count; c++) sum += m[r * count + c] * b[c];
                    to[r] = (q.first < 0 ? 0 : values[q.first][r]) + q.factor * sum;
                }
            }
            values.push_back(to.empty() ? (const T*)q.values : to.data());
            const bool derived = q.kind == PRODUCT || q.kind == STACKED ? needs[q.first] || needs[q.second]
                                 : q.kind == SHIFTED ? (q.first >= 0 && needs[q.first]) || needs[q.second] || needs[q.third]
                                                     : false;
            needs.push_back(backward && (q.gradient || derived));
        }
        if (backward)
            for (Int k = 0; k < p.num_parameters; k++) gradients.emplace_back(needs[k] ? size(k) : 0);
    }

    Int size(Int k) const { return p.parameters[k].rows * p.parameters[k].columns; }

    // From what parameters are derived to tensors
    void distribute() {
        for (Int k = p.num_parameters - 1; k >= 0; k--) {
            if (!needs[k]) continue;
            const Parameter& q = p.parameters[k];
            const T* g = gradients[k].data();
            if (q.kind == TENSOR) {
                for (Int r = 0; r < q.rows; r++)
                    for (Int c = 0; c < q.columns; c++) ((T*)q.gradient)[r * q.stride + c] += g[r * q.columns + c];
            } else if (q.kind == PRODUCT) {
                const Int depth = p.parameters[q.first].columns;
                const T *a = values[q.first], *b = values[q.second];
                if (needs[q.first]) {  // g b^T
                    std::vector<T> transposed(depth * q.columns);
                    for (Int d = 0; d < depth; d++)
                        for (Int c = 0; c < q.columns; c++) transposed[c * depth + d] = b[d * q.columns + c];
                    product<T, T>(q.rows, depth, q.columns, g, q.columns, 1, transposed.data(),
                                  gradients[q.first].data(), true);
                }
                if (needs[q.second])  // a^T g
                    product<T, T>(depth, q.columns, q.rows, a, 1, depth, g, gradients[q.second].data(), true);
            } else if (q.kind == STACKED) {
                const Int count = size(q.first);
                if (needs[q.first]) copy<true>(g, gradients[q.first].data(), count);
                if (needs[q.second]) copy<true>(g + count, gradients[q.second].data(), size(q.second));
            } else {
                const T *m = values[q.second], *b = values[q.third];
                const Int count = size(q.third);
                for (Int r = 0; r < q.columns; r++) {
                    const T up = g[r] * q.factor;
                    if (q.first >= 0 && needs[q.first]) gradients[q.first][r] += g[r];
                    for (Int c = 0; c < count; c++) {
                        if (needs[q.second]) gradients[q.second][r * count + c] += up * b[c];
                        if (needs[q.third]) gradients[q.third][c] += up * m[r * count + c];
                    }
                }
            }
        }
    }
};

// Rows

// Rows of a tile that follow one another in a block: of one receiver or, if there is one sender, of one network
struct Run {
    Int row, count, batch, receiver, sender;  // of the first
};

// Parts of memory, which serve anew once nothing reads what is in them, the last one first: it is in cache
struct Parts {
    Int end = 0;
    std::vector<std::pair<Int, Int>> unused;  // size, place

    Int take(Int size) {
        for (Int k = (Int)unused.size() - 1; k >= 0; k--)
            if (unused[k].first == size) {
                const Int place = unused[k].second;
                unused.erase(unused.begin() + k);
                return place;
            }
        end += size + 16;
        return end - size - 16;
    }
    void give(Int size, Int place) { unused.push_back({size, place}); }
};

template <class T>
struct Tiles {
    typedef typename Lanes<T>::Vector Vector;
    static const int L = Lanes<T>::count, MOST = 512 / L;  // vectors of the widest row

    const Program& p;
    Parameters<T>& parameters;
    const std::vector<Weight<T>>& weights;
    Int most;      // rows of a tile
    Int size = 0;  // of this one, with those that fill it up
    Int thread;
    std::vector<Int> places, gradient_places;
    std::vector<T*> values, gradients;  // where those of the tile are: in the memory here, on the tape, or outside
    T *value_memory, *gradient_memory, *side_memory;
    std::vector<Int> side_places, tape_places;  // of each operation
    std::vector<char> has_gradient;
    std::vector<Int> uses;   // how many operations read each value
    std::vector<char> read;  // whether the backward pass reads each value, or what is kept beside it
    std::vector<Int> half_places;     // of those values that linear maps read in bfloat16
    std::vector<const Half*> halves;  // where they are now, or null
    std::vector<char> is_half;        // whether a value is in bfloat16 alone: nothing else reads it
    Half* half_memory;
    Pair *left, *right, *turned;  // factors of products, rounded
    std::vector<std::vector<T>> parameter_gradients;
    std::vector<std::vector<T>> shared_gradients;  // of inputs that all networks share
    std::vector<Run> runs;

    Tiles(const Program& program, Parameters<T>& given, const std::vector<Weight<T>>& packed, Int number, bool backward)
        : p(program), parameters(given), weights(packed), thread(number) {
        Int widest = 0;
        for (Int v = 0; v < p.num_values; v++) widest = std::max(widest, p.widths[v]);
        most = widest <= 64 ? 96 : p.uses_halves && has_tiles() ? 64 : 48;
        const Parts values_of = place_values(backward), gradients_of = place_gradients(backward);
        read.resize(p.num_values), uses.resize(p.num_values);
        for (Int k = p.num_operations - 1; k >= 0; k--) {
            const Operation& o = p.operations[k];
            if (o.code != LOAD && o.code != JOIN) {
                uses[o.first]++;
                if (reads_second(o)) uses[o.second]++;
            }
            const bool is_sum = o.code == ADD || o.code == SUBTRACT;
            if (o.code == AGGREGATE || o.code == NORM_SILU || o.code == NORM_SILU_BOTH) read[o.result] = 1;
            if (o.code == LOAD || o.code == JOIN || (is_sum && !read[o.result]) || o.code == STORE || o.code == SUM) continue;
            read[o.first] = 1;
            if (reads_second(o)) read[o.second] = 1;
        }
        std::vector<Int> linear_uses(p.num_values);
        for (Int k = 0; p.uses_halves && k < p.num_operations; k++)
            if (p.operations[k].code == LINEAR) linear_uses[p.operations[k].first]++;
        Int half_place = 0;
        for (Int v = 0; v < p.num_values; v++) {
            half_places.push_back(half_place);
            if (linear_uses[v]) half_place += most * p.widths[v];
        }
        halves.resize(p.num_values), is_half.resize(p.num_values);
        for (Int k = 0; k < p.num_operations; k++) {
            const Operation& o = p.operations[k];
            const bool is_loaded = o.code == LOAD && o.second < 0 && p.inputs[o.first].is_half;
            if (is_loaded || (o.code >= SILU_BOTH && o.code <= SILU))
                is_half[o.result] = linear_uses[o.result] > 0 && linear_uses[o.result] == uses[o.result];
        }
        Int side_place = 0, tape_place = 0;
        for (Int k = 0; k < p.num_operations; k++) {
            side_places.push_back(side_place), tape_places.push_back(tape_place);
            Int code = p.operations[k].code, signs = code == NORM_SILU ? 1 : code == NORM_SILU_BOTH ? 2 : 0;
            tape_place += code == LINEAR && !p.uses_halves ? p.widths[p.operations[k].result] : signs ? signs + 1 : 0;
            if (signs) side_place += most * (signs * (p.widths[p.operations[k].result] + 3) + 1) + 16;
        }
        value_memory = memory(values_of.end + gradients_of.end + side_place + most * 3 * widest + half_place / 2);
        values.resize(p.num_values), gradients.resize(p.num_values), runs.reserve(most);
        gradient_memory = value_memory + values_of.end;
        side_memory = gradient_memory + gradients_of.end;
        left = (Pair*)(side_memory + side_place), right = left + most * widest, turned = right + most * widest;
        half_memory = (Half*)(turned + most * widest);
        if (!backward) return;
        has_gradient.resize(p.num_values);
        for (Int k = 0; k < p.num_parameters; k++)
            parameter_gradients.emplace_back(parameters.needs[k] ? p.parameters[k].rows * p.parameters[k].columns : 0);
        for (Int k = 0; k < p.num_inputs; k++)
            shared_gradients.emplace_back(p.inputs[k].gradient && p.inputs[k].adds == 2 ? p.inputs[k].copy_size : 0);
    }

    // How many values an operation reads
    Int num_read(const Operation& o) { return o.code == LOAD || o.code == JOIN ? 0 : reads_second(o) ? 2 : 1; }

    // Backward all values are needed until the end, forward until they are read for the last time
    Parts place_values(bool backward) {
        Parts parts;
        std::vector<Int> last(p.num_values, p.num_operations);
        for (Int k = 0; k < p.num_operations; k++) {
            const Operation& o = p.operations[k];
            for (Int n = 0; n < num_read(o); n++) last[n ? o.second : o.first] = k;
        }
        places.resize(p.num_values);
        for (Int k = 0; k < p.num_operations; k++) {
            const Operation& o = p.operations[k];
            if (o.code < STORE) places[o.result] = parts.take(most * p.widths[o.result]);
            for (Int n = 0; n < num_read(o) && !backward; n++) {
                const Int v = n ? o.second : o.first;
                if (last[v] == k && (n == 0 || v != o.first)) parts.give(most * p.widths[v], places[v]);
            }
        }
        return parts;
    }

    // From the last operation that reads a value to the one that makes it
    Parts place_gradients(bool backward) {
        Parts parts;
        gradient_places.assign(p.num_values, -1);
        for (Int k = p.num_operations - 1; k >= 0 && backward; k--) {
            const Operation& o = p.operations[k];
            for (Int n = 0; n < num_read(o); n++) {
                const Int v = n ? o.second : o.first;
                if (gradient_places[v] < 0) gradient_places[v] = parts.take(most * p.widths[v]);
            }
            if (o.code < STORE && gradient_places[o.result] >= 0)
                parts.give(most * p.widths[o.result], gradient_places[o.result]);
        }
        return parts;
    }

    // not cleared, kept for the next call
    static T* memory(Int count) {
        thread_local std::vector<char> kept;
        const size_t bytes = count * sizeof(T) + 64;
        if (kept.size() < bytes) kept = std::vector<char>(bytes);
        return (T*)(((uintptr_t)kept.data() + 63) & ~(uintptr_t)63);
    }

    T* value(Int v) { return values[v]; }
    T* gradient(Int v) { return gradients[v]; }
    T* side(const Operation& o) { return side_memory + side_places[&o - p.operations]; }
    const T* parameter(Int k) { return parameters.values[k]; }

    static bool reads_second(const Operation& o) { return (o.code >= ADD && o.code <= SCALE) || o.code == AGGREGATE; }

    // Whose row each of the tile is; it is filled up to as many as products take
    void number(Int start, Int count) {
        const Int step = p.uses_halves ? FILLING : 16;
        size = std::min(most, (count + step - 1) / step * step);
        const Int rows = p.receivers * p.senders;
        Int batch = start / rows, receiver = start % rows / p.senders, sender = start % p.senders;
        runs.clear();
        for (Int i = 0; i < count; i += runs.back().count) {
            const Int n = std::min(p.senders == 1 ? p.receivers - receiver : p.senders - sender, count - i);
            runs.push_back({i, n, batch, receiver, sender});
            receiver += p.senders == 1 ? n : 1, sender = 0;
            if (receiver == p.receivers) batch++, receiver = 0;
        }
    }

    // f(row, count, place, step) for rows of the tile whose places are equally far apart: the first row, how many they are,
    // the place of the first and what is added from one to the next. An index has the number of each receiver.
    template <class F>
    void each_run(Int batch_stride, Int receiver_stride, Int sender_stride, const Int* index, F f) {
        for (const Run& run : runs) {
            const Int start = run.batch * batch_stride + run.sender * sender_stride;
            if (!index) {
                f(run.row, run.count, start + run.receiver * receiver_stride, p.senders == 1 ? receiver_stride : sender_stride);
                continue;
            }
            const Int* numbers = index + run.receiver;
            if (p.senders > 1) {
                f(run.row, run.count, start + numbers[0] * receiver_stride, sender_stride);
                continue;
            }
            for (Int i = 0, n; i < run.count; i += n) {
                const Int step = i + 1 < run.count ? numbers[i + 1] - numbers[i] : 0;
                for (n = 1; i + n < run.count && numbers[i + n] - numbers[i + n - 1] == step;) n++;
                f(run.row + i, n, start + numbers[i] * receiver_stride, step * receiver_stride);
            }
        }
    }

    // Rows of an input, as columns of rows of a width
    template <bool ADDS>
    void load(const Input& input, T* to, Int width) {
        each_run(input.batch_stride, input.receiver_stride, input.sender_stride, input.index,
                 [&](Int row, Int count, Int place, Int step) {
                     if (!input.is_half)
                         return copy_rows<ADDS>((const T*)input.values + place, step, to + row * width, width, count, input.width);
                     for (Int i = 0; i < count; i++)
                         from_halves<ADDS>((const Half*)input.values + place + i * step, to + (row + i) * width, input.width);
                 });
    }

    // Rows of an input in bfloat16, as they are
    void load_halves(const Operation& o, Int start, Int count, Half* to) {
        const Input& x = p.inputs[o.first];
        if (count == size && !x.index && is_dense(x.width, x.batch_stride, x.receiver_stride, x.sender_stride)) {
            halves[o.result] = (const Half*)x.values + start * x.width;
            return;
        }
        each_run(x.batch_stride, x.receiver_stride, x.sender_stride, x.index,
                 [&](Int row, Int number, Int place, Int step) {
                     const Half* rows = (const Half*)x.values + place;
                     for (Int i = 0; i < number; i++)
                         std::memcpy(to + (row + i) * x.width, rows + i * step, x.width * sizeof(Half));
                 });
        std::memset(to + count * x.width, 0, (size - count) * x.width * sizeof(Half));
    }

    // Numbers of a value from number i on: to its place, or rounded to that of bfloat16 if there is one
    void put(Vector x, T* to, Half* half, Int i) {
        if (half)
            to_halves((const T*)&x, half + i, L);
        else
            *(Vector*)(to + i) = x;
    }

    // A value in bfloat16
    const Half* halves_of(Int v) {
        if (!halves[v]) {
            Half* to = half_memory + half_places[v];
            to_halves(value(v), to, size * p.widths[v]);
            halves[v] = to;
        }
        return halves[v];
    }

    void linear(const Operation& o, T* to) {
        Int in = p.parameters[o.parameter].columns, out = p.parameters[o.parameter].rows;
        const T* bias = o.other_parameter >= 0 ? parameter(o.other_parameter) : nullptr;
        if (p.uses_halves) {
            const Pair *from = (const Pair*)halves_of(o.first), *weight = weights[o.parameter].forward.data();
            pair_product(size, out, in / 2, from, weight, to, bias, 0);
        } else {
            product<T, T>(size, out, in, value(o.first), in, 1, weights[o.parameter].transposed.data(), to, bias, 0);
        }
    }

    void linear_backward(const Operation& o) {
        Int in = p.parameters[o.parameter].columns, out = p.parameters[o.parameter].rows;
        const T *from = value(o.first), *g = gradient(o.result);
        T* to = gradient(o.first);
        if (p.uses_halves) to_halves(g, (Half*)turned, left, size, out);
        if (!p.needs[o.first]) {
        } else if (p.uses_halves) {
            const T* sums = has_gradient[o.first] ? to : nullptr;
            pair_product(size, in, out / 2, turned, weights[o.parameter].back.data(), to, sums, in);
        } else {
            product<T, T>(size, in, out, g, out, 1, parameter(o.parameter), to, has_gradient[o.first]);
        }
        has_gradient[o.first] = p.needs[o.first];
        if (parameters.needs[o.parameter]) {
            T* sums = parameter_gradients[o.parameter].data();
            if (p.uses_halves) {
                to_row_pairs(halves_of(o.first), right, size, in);
                pair_product_transposed(out, in, size / 2, left, right, sums, turned);
            } else {
                product<T, T>(out, in, size, g, 1, out, from, sums, true);
            }
        }
        if (o.other_parameter >= 0) add_rows(o.other_parameter, g, out);
    }

    // adds the rows of g to the gradient of a parameter
    void add_rows(Int k, const T* g, Int width) {
        if (!parameters.needs[k]) return;
        for (Int c = 0; c < width; c += L) {
            Vector sum{}, other{};
            for (Int i = 0; i < size; i += 2) {
                sum += *(const Vector*)(g + i * width + c);
                other += *(const Vector*)(g + (i + 1) * width + c);
            }
            *(Vector*)(parameter_gradients[k].data() + c) += sum + other;
        }
    }

    // SiLU(LayerNorm(x)) or, with a vector v, the sum of those of v + x and of v - x. For the backward pass it keeps
    // the sigmoids [size, signs, width] and, per row, the mean of x and, of each sign, 1 / deviation.
    template <int N, int SIGNS>
    void norm_silu(const Operation& o, Int start, const T* from, T* to, Half* half, Int width, bool keeps) {
        const Int n = N ? N : width / L;
        const Vector *scale = (const Vector*)parameter(o.parameter), *shift = (const Vector*)parameter(o.other_parameter);
        const Vector* v = SIGNS == 2 ? (const Vector*)parameter(o.second) : nullptr;
        T *sigmoids = side(o), *moments = moments_of(o, start);
        const T epsilon = o.epsilon, factor = T(1) / width;
        Vector middle[N ? N : MOST] = {};  // v without its mean
        T mean_of_v = 0;
        if (SIGNS == 2) {
            Vector sum{};
            for (Int c = 0; c < n; c++) sum += v[c];
            mean_of_v = total<T>(sum) * factor;
            for (Int c = 0; c < n; c++) middle[c] = v[c] - mean_of_v;
        }
        for (Int i = 0; i < size && !(keeps && p.tape); i += L) {  // of L rows at once
            Vector sums[L], squares[SIGNS][L];
            for (int r = 0; r < L; r++) {
                const Vector* x = (const Vector*)(from + (i + r) * width);
                sums[r] = x[0];
                for (Int c = 1; c < n; c++) sums[r] += x[c];
            }
            T means[L], deviations[SIGNS][L];
            *(Vector*)means = totals<T>(sums) * factor;
            for (int r = 0; r < L; r++) {
                const Vector* x = (const Vector*)(from + (i + r) * width);
                Vector of_plus{}, of_minus{};
                for (Int c = 0; c < n; c++) {
                    const Vector z = x[c] - means[r], plus = SIGNS == 1 ? z : middle[c] + z, minus = middle[c] - z;
                    of_plus += plus * plus;
                    if (SIGNS == 2) of_minus += minus * minus;
                }
                squares[0][r] = of_plus;
                if (SIGNS == 2) squares[SIGNS - 1][r] = of_minus;
            }
            for (int k = 0; k < SIGNS; k++) {
                *(Vector*)deviations[k] = totals<T>(squares[k]) * factor + epsilon;
                for (int r = 0; r < L; r++) deviations[k][r] = 1 / std::sqrt(deviations[k][r]);
            }
            for (int r = 0; r < L; r++) {
                T* of_row = moments + (SIGNS + 1) * (i + r);
                of_row[0] = means[r];
                for (int k = 0; k < SIGNS; k++) of_row[1 + k] = deviations[k][r];
            }
        }
        for (Int i = 0; i < size; i++) {
            const Vector* x = (const Vector*)(from + i * width);
            const T *of_row = moments + (SIGNS + 1) * i, mean = of_row[0];
            Vector* kept = (Vector*)(sigmoids + SIGNS * i * width);
            for (Int c = 0; c < n; c++) {
                const Vector z = x[c] - mean;
                Vector w = (SIGNS == 1 ? z : middle[c] + z) * of_row[1] * scale[c] + shift[c], s = sigmoid(w);
                Vector result = w * s;
                if (keeps) kept[c] = s;
                if (SIGNS == 2) {
                    w = (middle[c] - z) * of_row[SIGNS] * scale[c] + shift[c], s = sigmoid(w);
                    result = rounded(result) + rounded(w * s);
                    if (keeps) kept[n + c] = s;
                }
                put(result, to, half, i * width + c * L);
            }
        }
    }

    template <int N, int SIGNS>
    void norm_silu_backward(const Operation& o, Int start, const T* from, const T* g, T* to, Int width) {
        const Int n = N ? N : width / L;
        const Vector *scale = (const Vector*)parameter(o.parameter), *shift = (const Vector*)parameter(o.other_parameter);
        const Vector* v = SIGNS == 2 ? (const Vector*)parameter(o.second) : nullptr;
        T *sigmoids = side(o), *moments = moments_of(o, start);
        const bool adds = has_gradient[o.first] && p.needs[o.first];
        const T factor = T(1) / width;
        Vector scale_sum[N ? N : MOST] = {}, shift_sum[N ? N : MOST] = {}, v_sum[N ? N : MOST] = {};
        Vector middle[N ? N : MOST] = {};
        if (SIGNS == 2) {
            Vector sum{};
            for (Int c = 0; c < n; c++) sum += v[c];
            const T mean_of_v = total<T>(sum) * factor;
            for (Int c = 0; c < n; c++) middle[c] = v[c] - mean_of_v;
        }
        const auto normed = [&](const Vector* x, int sign, Int c, const T* of_row) {
            const Vector z = x[c] - of_row[0];
            return (SIGNS == 1 ? z : sign ? middle[c] - z : middle[c] + z) * of_row[1 + sign];
        };
        Vector sums[SIGNS][2][L];
        for (Int i = 0; i < size; i++) {  // of_y takes the place of the sigmoids, its means follow the moments
            const Vector *x = (const Vector*)(from + i * width), *up = (const Vector*)(g + i * width);
            const T* of_row = moments + (SIGNS + 1) * i;
            for (int sign = 0; sign < SIGNS; sign++) {
                Vector* kept = (Vector*)(sigmoids + (SIGNS * i + sign) * width);
                Vector first{}, second{};
                for (Int c = 0; c < n; c++) {
                    Vector y = normed(x, sign, c, of_row), w = y * scale[c] + shift[c], s = kept[c];
                    Vector of_w = up[c] * s * (1 + w * (1 - s));
                    shift_sum[c] += of_w;
                    scale_sum[c] += of_w * y;
                    kept[c] = of_w * scale[c];
                    first += kept[c];
                    second += kept[c] * y;
                }
                sums[sign][0][i % L] = first, sums[sign][1][i % L] = second;
            }
            for (int k = 0; k < 2 * SIGNS && i % L == L - 1; k++) {  // of L rows at once
                const Vector means = totals<T>(sums[k / 2][k % 2]) * factor;
                for (int r = 0; r < L; r++) sigmoids[SIGNS * size * width + SIGNS * 2 * (i - L + 1 + r) + k] = means[r];
            }
        }
        for (Int i = 0; i < size; i++) {
            const Vector* x = (const Vector*)(from + i * width);
            Vector* down = (Vector*)(to + i * width);
            const T *of_row = moments + (SIGNS + 1) * i, *means = sigmoids + SIGNS * size * width + SIGNS * 2 * i;
            const Vector* of_y = (const Vector*)(sigmoids + SIGNS * i * width);
            for (Int c = 0; c < n; c++) {
                Vector of_x = of_row[1] * (of_y[c] - means[0] - normed(x, 0, c, of_row) * means[1]);
                if (SIGNS == 2) {
                    const Vector minus = of_row[SIGNS] * (of_y[n + c] - means[2] - normed(x, 1, c, of_row) * means[3]);
                    v_sum[c] += of_x + minus;
                    of_x -= minus;
                }
                down[c] = adds ? down[c] + of_x : of_x;
            }
        }
        add_vectors(o.parameter, scale_sum, n), add_vectors(o.other_parameter, shift_sum, n);
        if (SIGNS == 2) add_vectors(o.second, v_sum, n);
        has_gradient[o.first] = p.needs[o.first];
    }

    T* moments_of(const Operation& o, Int start) {
        if (p.tape) return tape_place(o, start);
        const int signs = o.code == NORM_SILU ? 1 : 2;
        return side(o) + signs * size * (p.widths[o.result] + 2);
    }

    void add_vectors(Int k, const Vector* sums, Int n) {
        if (!parameters.needs[k]) return;
        Vector* to = (Vector*)parameter_gradients[k].data();
        for (Int c = 0; c < n; c++) to[c] += sums[c];
    }

    // SiLU(v + x) + SiLU(v - x)
    void silu_both(const Operation& o, const T* from, T* to, Half* half, Int width) {
        const Vector* v = (const Vector*)parameter(o.second);
        for (Int i = 0; i < size; i++)
            for (Int c = 0; c < width / L; c++) {
                const Vector x = ((const Vector*)(from + i * width))[c], plus = v[c] + x, minus = v[c] - x;
                put(rounded(plus * sigmoid(plus)) + rounded(minus * sigmoid(minus)), to, half, i * width + c * L);
            }
    }

    void silu_both_backward(const Operation& o, const T* from, const T* g, T* to, Int width) {
        const Vector* v = (const Vector*)parameter(o.second);
        const bool adds = has_gradient[o.first] && p.needs[o.first];
        Vector sums[MOST] = {};
        for (Int i = 0; i < size; i++)
            for (Int c = 0; c < width / L; c++) {
                const Vector x = ((const Vector*)(from + i * width))[c], plus = v[c] + x, minus = v[c] - x;
                const Vector s = sigmoid(plus), t = sigmoid(minus), up = ((const Vector*)(g + i * width))[c];
                const Vector of_plus = up * s * (1 + plus * (1 - s)), of_minus = up * t * (1 + minus * (1 - t));
                Vector& down = ((Vector*)(to + i * width))[c];
                down = adds ? down + of_plus - of_minus : of_plus - of_minus;
                sums[c] += of_plus + of_minus;
            }
        add_vectors(o.second, sums, width / L);
        has_gradient[o.first] = p.needs[o.first];
    }

    // x [2 width] = (gamma, beta), y [width]: gamma y + beta
    void modulate(const T* x, const T* y, T* to, Int width) {
        const Int n = width / L;
        for (Int i = 0; i < size; i++) {
            const Vector *gamma = (const Vector*)(x + 2 * i * width), *beta = gamma + n;
            for (Int c = 0; c < n; c++)
                ((Vector*)(to + i * width))[c] = gamma[c] * ((const Vector*)(y + i * width))[c] + beta[c];
        }
    }

    void modulate_backward(const Operation& o, const T* g, Int width) {
        const Int n = width / L;
        const T *x = value(o.first), *y = value(o.second);
        const bool adds = has_gradient[o.first], needs = p.needs[o.first];
        for (Int i = 0; needs && i < size; i++) {
            const Vector *up = (const Vector*)(g + i * width), *row = (const Vector*)(y + i * width);
            Vector *of_gamma = (Vector*)(gradient(o.first) + 2 * i * width), *of_beta = of_gamma + n;
            for (Int c = 0; c < n; c++) {
                of_gamma[c] = adds ? of_gamma[c] + up[c] * row[c] : up[c] * row[c];
                of_beta[c] = adds ? of_beta[c] + up[c] : up[c];
            }
        }
        has_gradient[o.first] = needs;
        if (!p.needs[o.second]) return;
        const bool adds_second = has_gradient[o.second];
        for (Int i = 0; i < size; i++) {
            const Vector *up = (const Vector*)(g + i * width), *gamma = (const Vector*)(x + 2 * i * width);
            Vector* down = (Vector*)(gradient(o.second) + i * width);
            for (Int c = 0; c < n; c++) down[c] = adds_second ? down[c] + up[c] * gamma[c] : up[c] * gamma[c];
        }
        has_gradient[o.second] = 1;
    }

    void multiply_backward(const Operation& o, const T* g, Int all) {
        const T *x = value(o.first), *y = value(o.second);
        if (!p.needs[o.first] || !p.needs[o.second] || o.first == o.second)
            return add(o.first, g, y, all, 1), add(o.second, g, x, all, 1);
        const bool adds = has_gradient[o.first], adds_second = has_gradient[o.second];
        T *down = gradient(o.first), *down_second = gradient(o.second);
        for (Int i = 0; i < all; i += L) {
            const Vector up = *(const Vector*)(g + i);
            Vector &to = *(Vector*)(down + i), &to_second = *(Vector*)(down_second + i);
            const Vector of_x = up * *(const Vector*)(y + i), of_y = up * *(const Vector*)(x + i);
            to = adds ? to + of_x : of_x;
            to_second = adds_second ? to_second + of_y : of_y;
        }
        has_gradient[o.first] = has_gradient[o.second] = 1;
    }

    // sigmoid(x) y
    void gate_backward(const Operation& o, const T* g, Int all) {
        const T *x = value(o.first), *y = value(o.second);
        const bool adds = has_gradient[o.first], adds_second = has_gradient[o.second];
        for (Int i = 0; i < all; i += L) {
            const Vector s = sigmoid(*(const Vector*)(x + i)), up = *(const Vector*)(g + i) * s;
            const Vector of_x = up * (1 - s) * *(const Vector*)(y + i);
            Vector &down = *(Vector*)(gradient(o.first) + i), &down_second = *(Vector*)(gradient(o.second) + i);
            down = adds ? down + of_x : of_x;
            down_second = adds_second ? down_second + up : up;
        }
        has_gradient[o.first] = p.needs[o.first], has_gradient[o.second] = p.needs[o.second];
    }

    // The variance of rows with sum and sum of squares, times a factor both, that have a mean
    static Vector variance(Vector squares, Vector mean) { return squares - mean * mean; }

    // Of statistics x [6 width] (see add_statistics) and 1 / n: mean, minimum, maximum, standard deviation [4 width],
    // variances up to epsilon being 0
    void aggregate(const Operation& o, T* to, Int width) {
        const Int n = width / L;
        const T *x = value(o.first), *share = value(o.second), epsilon = o.epsilon;
        for (Int i = 0; i < size; i++) {
            const Vector *sum = (const Vector*)(x + 6 * i * width), *squares = sum + n;
            Vector *mean = (Vector*)(to + 4 * i * width), *least = mean + n, *most = least + n, *deviation = most + n;
            for (Int c = 0; c < n; c++) {
                mean[c] = sum[c] * share[i];
                least[c] = sum[2 * n + c], most[c] = sum[4 * n + c];
                const Vector v = variance(squares[c] * share[i], mean[c]);
                for (int l = 0; l < L; l++) deviation[c][l] = v[l] > epsilon ? std::sqrt(v[l]) : 0;
            }
        }
    }

    void aggregate_backward(const Operation& o, const T* g, Int width) {
        if (!p.needs[o.first]) return;
        const Int n = width / L;
        const T *share = value(o.second), *result = value(o.result);
        T* to = gradient(o.first);
        if (!has_gradient[o.first]) std::memset(to, 0, 6 * size * width * sizeof(T));
        for (Int i = 0; i < size; i++) {
            const Vector *mean = (const Vector*)(result + 4 * i * width), *deviation = mean + 3 * n;
            const Vector* up = (const Vector*)(g + 4 * i * width);
            Vector* down = (Vector*)(to + 6 * i * width);
            for (Int c = 0; c < n; c++) {
                const Vector of_variance = deviation[c] > 0 ? up[3 * n + c] / (2 * deviation[c]) : Vector{};
                down[c] += share[i] * (up[c] - 2 * mean[c] * of_variance);
                down[n + c] += share[i] * of_variance;
                down[2 * n + c] += up[n + c], down[4 * n + c] += up[2 * n + c];
            }
        }
        has_gradient[o.first] = 1;
    }

    // Polynomials between the rows of a table. Of each x = (k, f), with f from 0 to 1, rows k to k + POINTS - 1 count, with
    // the weights of Lagrange's polynomial at POINTS / 2 - 1 + f.
    static const int POINTS = num_points(sizeof(T) == 8);

    // Of L rows from row i: their weights [POINTS, L], and their first rows of the table
    void lagrange(const Operation& o, const T* x, Int i, Vector* weights, Int* rows) {
        const Int last = p.parameters[o.parameter].rows - POINTS;
        Vector t{}, before[POINTS], after[POINTS];
        for (int l = 0; l < L; l++) {
            const T row = x[2 * (i + l)];
            rows[l] = row > 0 ? row < last ? (Int)row : last : 0;
            t[l] = x[2 * (i + l) + 1] + (POINTS / 2 - 1);
        }
        before[0] = after[POINTS - 1] = Vector{} + 1;
        for (int j = 1; j < POINTS; j++) {
            before[j] = before[j - 1] * (t - T(j - 1));
            after[POINTS - 1 - j] = after[POINTS - j] * (t - T(POINTS - j));
        }
        for (int j = 0; j < POINTS; j++) {
            double product = 1;  // of j - k over all other k
            for (int k = 0; k < POINTS; k++) product *= k == j ? 1 : j - k;
            weights[j] = before[j] * after[j] * T(1 / product);
        }
    }

    void interpolate(const Operation& o, const T* x, T* to, Int width) {
        const Int n = width / L;
        const Vector* table = (const Vector*)parameter(o.parameter);
        Vector weights[POINTS];
        Int rows[L];
        for (Int i = 0; i < size; i += L) {
            lagrange(o, x, i, weights, rows);
            for (int l = 0; l < L; l++) {
                const Vector* from = table + rows[l] * n;
                Vector* sums = (Vector*)(to + (i + l) * width);
                Int c = 0;
                for (; c + 4 <= n; c += 4) {
                    Vector s0{}, s1{}, s2{}, s3{};
                    for (int j = 0; j < POINTS; j++) {
                        const Vector* row = from + j * n + c;
                        const T w = weights[j][l];
                        s0 += w * row[0], s1 += w * row[1], s2 += w * row[2], s3 += w * row[3];
                    }
                    sums[c] = s0, sums[c + 1] = s1, sums[c + 2] = s2, sums[c + 3] = s3;
                }
                for (; c < n; c++) {
                    Vector sum{};
                    for (int j = 0; j < POINTS; j++) sum += weights[j][l] * from[j * n + c];
                    sums[c] = sum;
                }
            }
        }
    }

    // Of the table alone
    void interpolate_backward(const Operation& o, const T* x, const T* g, Int width) {
        if (!parameters.needs[o.parameter]) return;
        const Int n = width / L;
        Vector* table = (Vector*)parameter_gradients[o.parameter].data();
        Vector weights[POINTS];
        Int rows[L];
        for (Int i = 0; i < size; i += L) {
            lagrange(o, x, i, weights, rows);
            for (int l = 0; l < L; l++) {
                const Vector* up = (const Vector*)(g + (i + l) * width);
                for (int j = 0; j < POINTS; j++) {
                    Vector* to = table + (rows[l] + j) * n;
                    for (Int c = 0; c < n; c++) to[c] += weights[j][l] * up[c];
                }
            }
        }
    }

    template <int SIGNS>
    void norm_silu(const Operation& o, Int start, const T* from, T* to, Half* half, Int width, bool keeps) {
        switch (width / L) {
            case 1: return norm_silu<1, SIGNS>(o, start, from, to, half, width, keeps);
            case 2: return norm_silu<2, SIGNS>(o, start, from, to, half, width, keeps);
            case 4: return norm_silu<4, SIGNS>(o, start, from, to, half, width, keeps);
            case 8: return norm_silu<8, SIGNS>(o, start, from, to, half, width, keeps);
            case 16: return norm_silu<16, SIGNS>(o, start, from, to, half, width, keeps);
            default: return norm_silu<0, SIGNS>(o, start, from, to, half, width, keeps);
        }
    }

    template <int SIGNS>
    void norm_silu_backward(const Operation& o, Int start, const T* from, const T* g, T* to, Int width) {
        switch (width / L) {
            case 1: return norm_silu_backward<1, SIGNS>(o, start, from, g, to, width);
            case 2: return norm_silu_backward<2, SIGNS>(o, start, from, g, to, width);
            case 4: return norm_silu_backward<4, SIGNS>(o, start, from, g, to, width);
            case 8: return norm_silu_backward<8, SIGNS>(o, start, from, g, to, width);
            case 16: return norm_silu_backward<16, SIGNS>(o, start, from, g, to, width);
            default: return norm_silu_backward<0, SIGNS>(o, start, from, g, to, width);
        }
    }

    void forward(Int start, Int count, bool kept) {
        number(start, count);
        std::fill(halves.begin(), halves.end(), nullptr);
        for (Int k = 0; k < p.num_operations; k++) {
            const Operation& o = p.operations[k];
            if (o.code >= STORE) {
                if (!kept) write(o);
                continue;
            }
            Int width = p.widths[o.result], all = size * width;
            if (!read[o.result] && kept) continue;
            T* to = values[o.result] = value_place(o, start, count, kept);
            Half* half = is_half[o.result] ? half_memory + half_places[o.result] : nullptr;
            if (half) halves[o.result] = half;
            const T* a = o.code == LOAD || o.code == JOIN ? nullptr : value(o.first);
            const T* b = o.code >= ADD && o.code <= SCALE ? value(o.second) : nullptr;
            switch (o.code) {
                case LOAD:
                    if (to != value_memory + places[o.result]) break;
                    if (half) {
                        load_halves(o, start, count, half);
                        break;
                    }
                    load<false>(p.inputs[o.first], to, width);
                    if (o.second >= 0) load<true>(p.inputs[o.second], to, width);
                    std::memset(to + count * width, 0, (size - count) * width * sizeof(T));
                    break;
                case JOIN:
                    for (Int n = o.first, column = 0; n < o.first + o.second; column += p.inputs[n++].width)
                        load<false>(p.inputs[n], to + column, width);
                    std::memset(to + count * width, 0, (size - count) * width * sizeof(T));
                    break;
                case LINEAR:
                    if (!kept || !has_places()) linear(o, to);
                    break;
                case ADD: for (Int i = 0; i < all; i++) to[i] = a[i] + b[i]; break;
                case SUBTRACT: for (Int i = 0; i < all; i++) to[i] = a[i] - b[i]; break;
                case MULTIPLY: for (Int i = 0; i < all; i++) to[i] = a[i] * b[i]; break;
                case MODULATE: modulate(a, b, to, width); break;
                case GATE:
                    for (Int i = 0; i < all; i += L)
                        *(Vector*)(to + i) = sigmoid(*(const Vector*)(a + i)) * *(const Vector*)(b + i);
                    break;
                case SCALE:
                    for (Int i = 0; i < size; i++)
                        for (Int c = 0; c < width; c++) to[i * width + c] = a[i * width + c] * b[i];
                    break;
                case INTERPOLATE: interpolate(o, a, to, width); break;
                case AGGREGATE: aggregate(o, to, width / 4); break;
                case SILU_BOTH: silu_both(o, a, to, half, width); break;
                case NORM_SILU: norm_silu<1>(o, start, a, to, half, width, kept); break;
                case NORM_SILU_BOTH: norm_silu<2>(o, start, a, to, half, width, kept); break;
                case SILU:
                    for (Int i = 0; i < all; i += L) {
                        Vector x = *(const Vector*)(a + i);
                        put(x * sigmoid(x), to, half, i);
                    }
            }
        }
    }

    // The place of a tile's rows of a result: of linear maps that the backward pass reads on the tape; of inputs outside, if
    // rows are there one after the other
    T* value_place(const Operation& o, Int start, Int count, bool kept) {
        if (o.code == LINEAR && has_places() && read[o.result]) return tape_place(o, start);
        if (o.code == LOAD && o.second < 0 && count == size) {
            const Input& x = p.inputs[o.first];
            if (!x.index && !x.is_half && is_dense(x.width, x.batch_stride, x.receiver_stride, x.sender_stride))
                return (T*)x.values + start * x.width;
        }
        return value_memory + places[o.result];
    }

    // The same of gradients
    T* gradient_place(Int v, Int start, Int count) {
        const Operation& end = p.operations[p.num_operations - 1];
        if (end.code == STORE && end.first == v && uses[v] == 1 && count == size && !p.output_gradient_is_half &&
            is_dense(p.widths[v], p.output_batch_stride, p.output_receiver_stride, p.output_sender_stride))
            return (T*)p.output_gradient + start * p.widths[v];  // nothing adds to it
        return gradient_memory + gradient_places[v];
    }

    // What an operation keeps of a tile on the tape
    T* tape_place(const Operation& o, Int start) {
        return (T*)p.tape + (start + FILLING * thread) * p.tape_width + size * tape_places[&o - p.operations];
    }

    // Whether results of linear maps are on the tape
    bool has_places() { return p.tape && !p.uses_halves; }

    bool is_dense(Int width, Int batch_stride, Int receiver_stride, Int sender_stride) {
        return (p.senders == 1 || sender_stride == width) && (p.receivers == 1 || receiver_stride == p.senders * width) &&
               (p.batch == 1 || batch_stride == p.receivers * p.senders * width);
    }

    // The same for rows of the result, or of its gradient
    template <class F>
    void each_run_of_output(F f) {
        each_run(p.output_batch_stride, p.output_receiver_stride, p.output_sender_stride, nullptr, f);
    }

    void write(const Operation& o) {
        Int width = p.widths[o.first];
        const T* from = value(o.first);
        if (o.code == STATISTICS) return add_statistics(from, width);
        each_run_of_output([&](Int row, Int count, Int place, Int step) {
            if (o.code == SUM)
                copy_rows<true>(from + row * width, width, (T*)p.output + place, step, count, width);
            else if (!p.output_is_half)
                copy_rows<false>(from + row * width, width, (T*)p.output + place, step, count, width);
            else
                for (Int i = 0; i < count; i++)
                    to_halves(from + (row + i) * width, (Half*)p.output + place + i * step, width);
        });
    }

    // Statistics of a node's rows x, [6, width]: sum of x, of x^2, minimum, how many rows have it, maximum, how many have it.
    // All are 0 where there are no rows.
    void add_statistics(const T* from, Int width) {
        const Int n = width / L;
        each_run_of_nodes(width, [&](Int row, Int count, Int place) {
            Vector* all = (Vector*)((T*)p.output + place);
            for (Int c = 0; c < n; c++) {
                Vector of_node[6];
                for (int k = 0; k < 6; k++) of_node[k] = all[k * n + c];
                for (Int i = row; i < row + count; i++) {
                    const Vector x = ((const Vector*)(from + i * width))[c];
                    of_node[0] += x, of_node[1] += x * x;
                    add_extremum(x, of_node[2], of_node[3], x < of_node[2]);
                    add_extremum(x, of_node[4], of_node[5], x > of_node[4]);
                }
                for (int k = 0; k < 6; k++) all[k * n + c] = of_node[k];
            }
        });
    }

    template <class Mask>
    static void add_extremum(Vector x, Vector& extremum, Vector& number, Mask beyond) {
        const Vector next = number + 1, one = Vector{} + 1;
        beyond |= number == 0;
        number = beyond ? one : x == extremum ? next : number;
        extremum = beyond ? x : extremum;
    }

    // f(row, count, place) for rows of one node: the first row, how many they are, and the place of the node's statistics
    template <class F>
    void each_run_of_nodes(Int width, F f) {
        each_run(p.num_nodes * 6 * width, 6 * width, 0, p.nodes, [&](Int row, Int count, Int place, Int step) {
            if (step == 0) return f(row, count, place);
            for (Int i = 0; i < count; i++) f(row + i, 1, place + i * step);
        });
    }

    // Gradients of extrema are shared among the rows that have them
    void read_statistics_gradient(const T* x, T* to, Int width) {
        const Int n = width / L;
        each_run_of_nodes(width, [&](Int row, Int count, Int place) {
            const Vector *found = (const Vector*)((const T*)p.output + place), *up = (const Vector*)((const T*)p.output_gradient + place);
            for (Int c = 0; c < n; c++) {
                const Vector least = found[2 * n + c], most = found[4 * n + c];
                const Vector of_sum = up[c], of_squares = 2 * up[n + c];
                const Vector of_least = up[2 * n + c] / found[3 * n + c], of_most = up[4 * n + c] / found[5 * n + c];
                for (Int i = row; i < row + count; i++) {
                    const Vector value = ((const Vector*)(x + i * width))[c];
                    Vector g = of_sum + value * of_squares;
                    g += value == least ? of_least : Vector{};
                    g += value == most ? of_most : Vector{};
                    ((Vector*)(to + i * width))[c] = g;
                }
            }
        });
    }

    // gradient(v) += sign g, or factor g
    void add(Int v, const T* g, const T* factor, Int all, T sign) {
        if (!p.needs[v]) return;
        T* to = gradient(v);
        if (has_gradient[v]) {
            if (factor)
                for (Int i = 0; i < all; i++) to[i] += g[i] * factor[i];
            else
                for (Int i = 0; i < all; i++) to[i] += sign * g[i];
        } else {
            if (factor)
                for (Int i = 0; i < all; i++) to[i] = g[i] * factor[i];
            else
                for (Int i = 0; i < all; i++) to[i] = sign * g[i];
        }
        has_gradient[v] = 1;
    }

    void backward(Int start, Int count) {
        forward(start, count, true);
        std::fill(has_gradient.begin(), has_gradient.end(), 0);
        for (Int v = 0; v < p.num_values; v++) gradients[v] = gradient_place(v, start, count);
        for (Int k = 0; k < p.num_operations; k++) {
            const Operation& o = p.operations[k];
            if (o.code != LOAD || o.second >= 0 || count != size) continue;
            const Input& x = p.inputs[o.first];
            if (!x.gradient || x.gradient_is_half || x.adds == 2 || x.index) continue;
            if (!is_dense(x.width, x.gradient_batch_stride, x.gradient_receiver_stride, x.gradient_sender_stride)) continue;
            gradients[o.result] = (T*)x.gradient + start * x.width;
            has_gradient[o.result] = x.adds;
        }
        for (Int k = p.num_operations - 1; k >= 0; k--) {
            const Operation& o = p.operations[k];
            if (o.code >= STORE) {
                read_gradient(o, count);
                continue;
            }
            if (!has_gradient[o.result]) continue;
            Int width = p.widths[o.result], all = size * width;
            const T* g = gradient(o.result);
            switch (o.code) {
                case LOAD:
                    if (g != gradient_memory + gradient_places[o.result]) break;
                    write_gradient(g, width, o.first);
                    if (o.second >= 0) write_gradient(g, width, o.second);
                    break;
                case JOIN:
                    for (Int n = o.first, column = 0; n < o.first + o.second; column += p.inputs[n++].width)
                        write_gradient(g + column, width, n);
                    break;
                case LINEAR: linear_backward(o); break;
                case ADD: add(o.first, g, nullptr, all, 1), add(o.second, g, nullptr, all, 1); break;
                case SUBTRACT: add(o.first, g, nullptr, all, 1), add(o.second, g, nullptr, all, -1); break;
                case MULTIPLY: multiply_backward(o, g, all); break;
                case MODULATE: modulate_backward(o, g, width); break;
                case GATE: gate_backward(o, g, all); break;
                case INTERPOLATE: interpolate_backward(o, value(o.first), g, width); break;
                case AGGREGATE: aggregate_backward(o, g, width / 4); break;
                case SCALE: {
                    const T *x = value(o.first), *factor = value(o.second);
                    T *of_x = gradient(o.first), *of_factor = gradient(o.second);
                    bool adds = has_gradient[o.first], adds_factor = has_gradient[o.second];
                    for (Int i = 0; i < size; i++) {
                        Vector sum{};
                        for (Int c = 0; c < width; c += L) {
                            Vector up = *(const Vector*)(g + i * width + c);
                            sum += up * *(const Vector*)(x + i * width + c);
                            Vector* down = (Vector*)(of_x + i * width + c);
                            *down = adds ? *down + up * factor[i] : up * factor[i];
                        }
                        if (p.needs[o.second]) of_factor[i] = total<T>(sum) + (adds_factor ? of_factor[i] : 0);
                    }
                    has_gradient[o.first] = p.needs[o.first], has_gradient[o.second] = p.needs[o.second];
                    break;
                }
                case SILU_BOTH: silu_both_backward(o, value(o.first), g, gradient(o.first), width); break;
                case NORM_SILU: norm_silu_backward<1>(o, start, value(o.first), g, gradient(o.first), width); break;
                case NORM_SILU_BOTH: norm_silu_backward<2>(o, start, value(o.first), g, gradient(o.first), width); break;
                case SILU: {
                    const T* x = value(o.first);
                    T* to = gradient(o.first);
                    bool adds = has_gradient[o.first];
                    for (Int i = 0; i < all; i += L) {
                        Vector v = *(const Vector*)(x + i), s = sigmoid(v);
                        Vector down = *(const Vector*)(g + i) * s * (1 + v * (1 - s));
                        *(Vector*)(to + i) = adds ? *(Vector*)(to + i) + down : down;
                    }
                    has_gradient[o.first] = 1;
                }
            }
        }
    }

    void read_gradient(const Operation& o, Int count) {
        Int width = p.widths[o.first];
        T* to = gradient(o.first);
        has_gradient[o.first] = 1;
        if (to != gradient_memory + gradient_places[o.first]) return;
        if (o.code == STATISTICS)
            read_statistics_gradient(value(o.first), to, width);
        else
            each_run_of_output([&](Int row, Int count, Int place, Int step) {
                if (!p.output_gradient_is_half)
                    return copy_rows<false>((const T*)p.output_gradient + place, step, to + row * width, width, count, width);
                for (Int i = 0; i < count; i++)
                    from_halves((const Half*)p.output_gradient + place + i * step, to + (row + i) * width, width);
            });
        std::memset(to + count * width, 0, (size - count) * width * sizeof(T));
    }

    // Of an input, from columns of rows of a width
    void write_gradient(const T* g, Int row_width, Int number) {
        const Input& input = p.inputs[number];
        if (!input.gradient) return;
        const Int width = input.width;
        T* to = input.adds == 2 ? shared_gradients[number].data() : (T*)input.gradient;
        each_run(input.gradient_batch_stride, input.gradient_receiver_stride, input.gradient_sender_stride, input.index,
                 [&](Int row, Int count, Int place, Int step) {
                     const T* from = g + row * row_width;
                     if (input.adds)
                         copy_rows<true>(from, row_width, to + place, step, count, width);
                     else if (!input.gradient_is_half)
                         copy_rows<false>(from, row_width, to + place, step, count, width);
                     else
                         for (Int i = 0; i < count; i++)
                             to_halves(from + i * row_width, (Half*)input.gradient + place + i * step, width);
                 });
    }
};

bool is_within(const Int* index, Int count, Int most) {
    return std::all_of(index, index + count, [=](Int row) { return row >= 0 && row < most; });
}

// Whether inputs and indices are such as the program reads
bool fits(const Program& p) {
    for (Int k = 0; k < p.num_inputs; k++)
        if (p.inputs[k].index && !is_within(p.inputs[k].index, p.receivers, p.inputs[k].num_rows)) return false;
    for (Int k = 0; k < p.num_operations; k++) {
        const Operation& o = p.operations[k];
        if (o.code == LOAD && (p.inputs[o.first].width != p.widths[o.result] ||
                               (o.second >= 0 && p.inputs[o.second].width != p.widths[o.result])))
            return false;
        if (o.code == JOIN) {
            Int width = 0;
            for (Int n = o.first; n < o.first + o.second; n++) width += p.inputs[n].width;
            if (width != p.widths[o.result]) return false;
        }
        if (o.code == INTERPOLATE &&
            (p.widths[o.first] != 2 || p.parameters[o.parameter].rows < num_points(p.is_double)))
            return false;
        if (o.code == STATISTICS && !(p.nodes && is_within(p.nodes, p.receivers, p.num_nodes))) return false;
    }
    return true;
}

// Sums and statistics start at zero
template <class T>
void clear_sums(const Program& p) {
    const Operation& end = p.operations[p.num_operations - 1];
    if (end.code == STATISTICS) std::memset(p.output, 0, p.batch * p.num_nodes * 6 * p.widths[end.first] * sizeof(T));
    for (Int b = 0; end.code == SUM && b < p.batch; b++)
        for (Int r = 0; r < p.receivers; r++)
            std::memset((T*)p.output + b * p.output_batch_stride + r * p.output_receiver_stride, 0,
                        p.widths[end.first] * sizeof(T));
}

template <class T>
void run(const Program& p, bool backward) {
    if (!backward) clear_sums<T>(p);
    Parameters<T> parameters(p, backward);
    std::vector<Weight<T>> weights(p.num_parameters);
    for (Int k = 0; k < p.num_operations; k++) {
        const Operation& o = p.operations[k];
        if (o.code != LINEAR) continue;
        const Parameter& w = p.parameters[o.parameter];
        weights[o.parameter].pack(parameters.values[o.parameter], w.rows, w.columns, p.uses_halves, backward,
                                  !backward || !p.tape || p.uses_halves);
    }
    const Int num_threads = std::max<Int>(1, std::min(p.num_threads, p.batch));
    const Int rows = p.receivers * p.senders;
#pragma omp parallel for num_threads(num_threads) schedule(static, 1) ordered
    for (Int thread = 0; thread < num_threads; thread++) {
        const TileRegisters registers(p.uses_halves);
        Tiles<T> tiles(p, parameters, weights, thread, backward);
        const Int first = p.batch * thread / num_threads * rows, last = p.batch * (thread + 1) / num_threads * rows;
        for (Int start = first; start < last; start += tiles.most) {
            const Int count = std::min(tiles.most, last - start);
            if (backward)
                tiles.backward(start, count);
            else
                tiles.forward(start, count, false);
        }
#pragma omp ordered
        if (backward) {  // in order, so that sums are the same every time
            for (Int k = 0; k < p.num_parameters; k++)
                for (size_t i = 0; i < tiles.parameter_gradients[k].size(); i++)
                    parameters.gradients[k][i] += tiles.parameter_gradients[k][i];
            for (Int k = 0; k < p.num_inputs; k++)
                for (size_t i = 0; i < tiles.shared_gradients[k].size(); i++)
                    ((T*)p.inputs[k].gradient)[i] += tiles.shared_gradients[k][i];
        }
    }
    if (backward) parameters.distribute();
}

}  // namespace

extern "C" {

void graph_norm(const int64_t* words, int64_t backward);  // of graph_norms.cpp

// 0, or 1 if the program cannot run on its inputs
int64_t run_program(const int64_t* words, int64_t backward) {
    const Program p = read(words);
    if (!fits(p)) return 1;
    if (p.is_double)
        run<double>(p, backward);
    else
        run<float>(p, backward);
    return 0;
}

// Programs one after the other, in reverse order backward; `starts` has the first word of each. `places` has three words
// for each pointer: which word it is, the base that it is relative to, and how many bytes from there. Programs that start
// with 2 are graph norms. The result is that of `run_program`.
int64_t run_programs(const int64_t* words, int64_t num_words, const int64_t* starts, int64_t num_programs,
                     const int64_t* places, int64_t num_places, const int64_t* bases, int64_t backward) {
    std::vector<Int> copied(words, words + num_words);
    for (Int k = 0; k < num_places; k++) copied[places[3 * k]] = bases[places[3 * k + 1]] + places[3 * k + 2];
    for (Int k = 0; k < num_programs; k++) {
        const Int* program = copied.data() + starts[backward ? num_programs - 1 - k : k];
        if (*program == 2)
            graph_norm(program + 1, backward);
        else if (run_program(program, backward))
            return 1;
    }
    return 0;
}

int64_t multiplies_halves() {
#if defined __AMX_BF16__
    return has_tiles();
#elif defined __AVX512BF16__
    return !__builtin_cpu_is("intel");  // whose vdpbf16ps is slower than fp32
#else
    return 0;
#endif
}
}
