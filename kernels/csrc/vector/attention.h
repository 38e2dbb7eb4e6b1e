// Flash attention in float32 on the `Vector` of the including file, for float32 and bfloat16 tensors.
//
// Blocks of 96 keys: S = Q K^T for 64 queries, a softmax with running maximum and sum, O += P V. Both products are one
// micro-kernel, C (+)= A B with a few rows of C in registers and A's elements broadcast; K is packed as K^T, V as it
// is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "vector/exponential.h"
#include "kernels.h"

namespace {

using latentrt::align64;

constexpr int64_t kBlockKeys = 96;
constexpr int64_t kBlockRows = 64;
constexpr int kR = Vector::kRows;
constexpr float kLog2e = 1.44269504088896340736f;
static_assert(kBlockRows % latentrt::kUnitRows == 0 && latentrt::kUnitRows % kR == 0 && kBlockKeys % kW == 0);

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// C[kR][N vectors] (+)= A[kR][depth] B[depth][N vectors]
template <int N>
[[gnu::always_inline]] inline void product_tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                                                int64_t ldc, int64_t depth, bool add) {
    using V = Vector;
    V::Reg sum[kR][N];
    for (int r = 0; r < kR; r++)
        for (int n = 0; n < N; n++) sum[r][n] = add ? V::load(c + r * ldc + n * kW) : V::zero();
#pragma GCC unroll 2
    for (int64_t i = 0; i < depth; i++, b += ldb) {
        V::Reg row[N];
        for (int n = 0; n < N; n++) row[n] = V::load(b + n * kW);
        for (int r = 0; r < kR; r++) {
            const V::Reg x = V::set(a[r * lda + i]);
            for (int n = 0; n < N; n++) sum[r][n] = V::fma(x, row[n], sum[r][n]);
        }
    }
    for (int r = 0; r < kR; r++)
        for (int n = 0; n < N; n++) V::store(c + r * ldc + n * kW, sum[r][n]);
}

// C[rows][vectors] (+)= A[rows][depth] B[depth][vectors]; rows a multiple of kR.
void product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
             int64_t vectors, int64_t depth, bool add) {
    for (int64_t done = 0; done < vectors;) {
        const int64_t left = vectors - done, width = left > 4 || left == 3 ? 3 : left > 1 ? 2 : 1;
        const float* from = b + done * kW;
        float* to = c + done * kW;
        for (int64_t r = 0; r < rows; r += kR) {
            const float* a_rows = a + r * lda;
            float* c_rows = to + r * ldc;
            if (width == 3) product_tile<3>(a_rows, lda, from, ldb, c_rows, ldc, depth, add);
            else if (width == 2) product_tile<2>(a_rows, lda, from, ldb, c_rows, ldc, depth, add);
            else product_tile<1>(a_rows, lda, from, ldb, c_rows, ldc, depth, add);
        }
        done += width;
    }
}

struct VectorScratch {
    float *k, *v, *q, *scores, *out, *largest, *sum;
    int64_t width; // of a row of V and out, padded to vectors
    size_t bytes = 0;

    VectorScratch(const latentrt_attention_args& args, char* base) : width(round_up(args.head_dim, kW)) {
        auto take = [&](int64_t n) {
            char* p = base + bytes;
            bytes += align64(n * sizeof(float));
            return reinterpret_cast<float*>(p);
        };
        k = take(round_up(args.keys, kBlockKeys) * args.head_dim);
        v = take(args.keys * width);
        q = take(kBlockRows * args.head_dim);
        scores = take(kBlockRows * kBlockKeys);
        out = take(kBlockRows * width);
        largest = take(kBlockRows);
        sum = take(kBlockRows);
    }
};

// [rows][dim] of T to float32 [padded][to_stride], times `factor`; what is beyond rows and dim becomes zero.
template <class T>
void pack_rows(const typename T::Type* from, int64_t stride, int64_t rows, int64_t padded, int64_t dim, float factor,
               float* to, int64_t to_stride) {
    using V = Vector;
    const int64_t whole = dim / kW * kW;
    for (int64_t row = 0; row < rows; row++, from += stride, to += to_stride) {
        for (int64_t i = 0; i < whole; i += kW) V::store(to + i, V::mul(V::template read<T>(from + i), V::set(factor)));
        if (whole < dim) {
            const V::Reg x = V::mul(V::template read<T>(from + whole, V::first(dim - whole)), V::set(factor));
            V::store(to + whole, x, V::first(to_stride - whole));
        }
    }
    std::fill(to, to + (padded - rows) * to_stride, 0.0f);
}

// Blocks of [dim][96]; keys beyond the last, to a whole vector, are zeros.
template <class T>
void pack_transposed(const typename T::Type* k, int64_t stride, int64_t keys, int64_t dim, float* to) {
    using V = Vector;
    for (int64_t first = 0; first < keys; first += kW) {
        float* column = to + first / kBlockKeys * kBlockKeys * dim + first % kBlockKeys;
        for (int64_t d = 0; d < dim; d += kW) {
            V::Reg tile[kW];
            for (int64_t i = 0; i < kW; i++) {
                const auto* from = k + (first + i) * stride + d;
                if (first + i >= keys) tile[i] = V::zero();
                else if (d + kW <= dim) tile[i] = V::template read<T>(from);
                else tile[i] = V::template read<T>(from, V::first(dim - d));
            }
            V::transpose(tile);
            const int64_t rows = dim - d < kW ? dim - d : kW;
            for (int64_t i = 0; i < rows; i++) V::store(column + (d + i) * kBlockKeys, tile[i]);
        }
    }
}

// One row: scores to weights, the running maximum and sum brought up to date; out shrinks where the maximum grew.
inline void softmax_row(float* scores, int64_t seen, int64_t padded, float& largest, float& sum, float* out,
                        int64_t width) {
    using V = Vector;
    const V::Reg hidden = V::set(-INFINITY);
    V::Reg top = V::set(largest);
    for (int64_t i = 0; i < padded; i += kW) {
        V::Reg s = V::load(scores + i);
        if (i + kW > seen) V::store(scores + i, s = V::select(V::first(seen - i), s, hidden));
        top = V::max(top, s);
    }
    const float now = V::largest(top);
    V::Reg total = V::zero();
    for (int64_t i = 0; i < padded; i += kW) {
        V::Reg p = exp2(V::sub(V::load(scores + i), V::set(now)));
        if (i + kW > seen) p = V::select(V::first(seen - i), p, V::zero());
        V::store(scores + i, p);
        total = V::add(total, p);
    }
    if (now > largest) {
        const float shrink = exp2f(largest - now);
        sum *= shrink;
        for (int64_t i = 0; i < width; i += kW) V::store(out + i, V::mul(V::load(out + i), V::set(shrink)));
        largest = now;
    }
    sum += V::sum(total);
}

template <class T>
void attend(const latentrt_attention_args& args, const VectorScratch& scratch, int64_t query, int64_t rows) {
    using V = Vector;
    const int64_t dim = args.head_dim, width = scratch.width, padded_rows = round_up(rows, kR);
    for (int64_t i = 0; i < padded_rows * width; i += kW) V::store(scratch.out + i, V::zero());
    for (int64_t i = 0; i < rows; i++) scratch.largest[i] = -INFINITY, scratch.sum[i] = 0;
    const float* k = scratch.k;
    for (int64_t first = 0; first < args.keys; first += kBlockKeys, k += kBlockKeys * dim) {
        if (args.causal && first > query + rows - 1) break;
        const int64_t keys = args.keys - first < kBlockKeys ? args.keys - first : kBlockKeys,
                      padded = round_up(keys, kW);
        product(scratch.q, dim, k, kBlockKeys, scratch.scores, kBlockKeys, padded_rows, padded / kW, dim, false);
        for (int64_t i = 0; i < rows; i++) {
            const int64_t visible = args.causal ? query + i - first + 1 : keys;
            softmax_row(scratch.scores + i * kBlockKeys, visible < keys ? visible : keys, padded, scratch.largest[i],
                        scratch.sum[i], scratch.out + i * width, width);
        }
        product(scratch.scores, kBlockKeys, scratch.v + first * width, width, scratch.out, width, padded_rows,
                width / kW, keys, true);
    }
}

template <class T>
void write_rows(const VectorScratch& scratch, int64_t rows, int64_t dim, typename T::Type* to, int64_t stride) {
    using V = Vector;
    for (int64_t row = 0; row < rows; row++, to += stride) {
        const V::Reg inverse = V::set(1 / scratch.sum[row]);
        for (int64_t i = 0; i < dim; i += kW) {
            const V::Reg x = V::mul(V::load(scratch.out + row * scratch.width + i), inverse);
            if (i + kW <= dim) V::template write<T>(to + i, x);
            else V::template write<T>(to + i, x, V::first(dim - i));
        }
    }
}

template <class T>
void run_units(const latentrt_attention_args& args, int64_t begin, int64_t end, char* base) {
    using Type = typename T::Type;
    const VectorScratch scratch(args, base);
    const int64_t unit_rows = latentrt::kUnitRows, per_head = (args.queries + unit_rows - 1) / unit_rows,
                  dim = args.head_dim;
    const auto head_of = [&](const void* tensor, const int64_t (&stride)[3], int64_t head) {
        return static_cast<const Type*>(tensor) + head / args.heads * stride[0] + head % args.heads * stride[1];
    };
    int64_t packed = -1;
    while (begin < end) {
        const int64_t head = begin / per_head, unit = begin % per_head;
        if (head != packed) {
            pack_transposed<T>(head_of(args.k, args.k_stride, head), args.k_stride[2], args.keys, dim, scratch.k);
            pack_rows<T>(head_of(args.v, args.v_stride, head), args.v_stride[2], args.keys, args.keys, dim, 1,
                         scratch.v, scratch.width);
            packed = head;
        }
        int64_t units = kBlockRows / unit_rows;
        if (units > per_head - unit) units = per_head - unit;
        if (units > end - begin) units = end - begin;
        const int64_t query = unit * unit_rows;
        const int64_t rows = args.queries - query < units * unit_rows ? args.queries - query : units * unit_rows;
        pack_rows<T>(head_of(args.q, args.q_stride, head) + query * args.q_stride[2], args.q_stride[2], rows,
                     round_up(rows, kR), dim, args.scale * kLog2e, scratch.q, dim);
        attend<T>(args, scratch, query, rows);
        write_rows<T>(scratch, rows, dim,
                      const_cast<Type*>(head_of(args.out, args.out_stride, head)) + query * args.out_stride[2],
                      args.out_stride[2]);
        begin += units;
    }
}

size_t attention_scratch(const latentrt_attention_args& args) { return VectorScratch(args, nullptr).bytes; }

void attention(const latentrt_attention_args& args, int64_t begin, int64_t end, char* base) {
    if (args.dtype == LATENTRT_BF16) run_units<Vector::Bf16>(args, begin, end, base);
    else run_units<Vector::Fp32>(args, begin, end, base);
}

} // namespace
