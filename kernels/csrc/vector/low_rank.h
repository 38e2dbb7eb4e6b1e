// A weight and a change of low rank, summed and rounded; included once for each instruction set, after its Vector.
//
// out[i, j] = base[i, j] + sum_k up[i, k] down[k, j]. Columns are taken in panels, whose part of `down` stays in the
// cache of a core while all rows pass over it; a tile of kRows x 3 vectors is summed in registers.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace latentrt {
namespace {

constexpr int64_t kTileColumns = 3 * kW;
constexpr int64_t kPanelValues = 1 << 16; // of `down`, in a core's own cache
constexpr int64_t kLeastTiles = 10;         // so that rows are not read in pieces too short to be prefetched

// Numbers beyond the largest of bfloat16 become that; infinity stays, and what is no number becomes one that rounding
// does not carry into the sign. Of two operands, min and max give the second where either is no number.
inline Vector::Reg to_bf16_range(Vector::Reg x) {
    const Vector::Reg most = Vector::set(3.38953139e38f);
    Vector::Reg clipped = Vector::max(Vector::min(x, most), Vector::sub(Vector::zero(), most));
    clipped = Vector::sub(clipped, Vector::sub(x, x)); // no number where x is infinite
    clipped = Vector::max(clipped, Vector::min(clipped, x));
    return Vector::select(Vector::unordered(x), Vector::set(__builtin_nanf("")), clipped);
}

template <class T>
inline void put(typename T::Type* to, Vector::Reg x, Vector::Mask m) {
    if constexpr (std::is_same_v<T, Vector::Bf16>) x = to_bf16_range(x);
    Vector::write<T>(to, x, m);
}

template <class Base, class Out, int Rows>
void low_rank_tile(const latentrt_low_rank_args& a, int64_t row, int64_t column) {
    const auto* base = static_cast<const typename Base::Type*>(a.base) + row * a.columns + column;
    auto* out = static_cast<typename Out::Type*>(a.out) + row * a.columns + column;
    Vector::Mask mask[3];
    for (int v = 0; v < 3; v++) mask[v] = Vector::first(a.columns - column - v * kW);
    Vector::Reg sum[Rows][3];
    for (int r = 0; r < Rows; r++)
        for (int v = 0; v < 3; v++) sum[r][v] = Vector::read<Base>(base + r * a.columns + v * kW, mask[v]);
    for (int64_t k = 0; k < a.rank; k++) {
        Vector::Reg down[3];
        for (int v = 0; v < 3; v++) down[v] = Vector::load(a.down + k * a.columns + column + v * kW, mask[v]);
        for (int r = 0; r < Rows; r++) {
            const Vector::Reg up = Vector::set(a.up[(row + r) * a.rank + k]);
            for (int v = 0; v < 3; v++) sum[r][v] = Vector::fma(up, down[v], sum[r][v]);
        }
    }
    for (int r = 0; r < Rows; r++)
        for (int v = 0; v < 3; v++) put<Out>(out + r * a.columns + v * kW, sum[r][v], mask[v]);
}

template <class Base, class Out>
void low_rank_rows(const latentrt_low_rank_args& a, int64_t begin, int64_t end) {
    const int64_t tiles = kPanelValues / (a.rank + 1) / kTileColumns;
    const int64_t width = (tiles < kLeastTiles ? kLeastTiles : tiles) * kTileColumns;
    for (int64_t panel = 0; panel < a.columns; panel += width) {
        const int64_t stop = panel + width < a.columns ? panel + width : a.columns;
        int64_t row = begin;
        for (; row + Vector::kRows <= end; row += Vector::kRows)
            for (int64_t j = panel; j < stop; j += kTileColumns) low_rank_tile<Base, Out, Vector::kRows>(a, row, j);
        for (; row < end; row++)
            for (int64_t j = panel; j < stop; j += kTileColumns) low_rank_tile<Base, Out, 1>(a, row, j);
    }
}

template <class Base>
void low_rank_from(const latentrt_low_rank_args& a, int64_t begin, int64_t end) {
    if (a.out_dtype == LATENTRT_FP32) low_rank_rows<Base, Vector::Fp32>(a, begin, end);
    else if (a.out_dtype == LATENTRT_BF16) low_rank_rows<Base, Vector::Bf16>(a, begin, end);
    else low_rank_rows<Base, Vector::Fp16>(a, begin, end);
}

void low_rank(const latentrt_low_rank_args& a, int64_t begin, int64_t end) {
    if (a.base_dtype == LATENTRT_FP32) low_rank_from<Vector::Fp32>(a, begin, end);
    else if (a.base_dtype == LATENTRT_BF16) low_rank_from<Vector::Bf16>(a, begin, end);
    else low_rank_from<Vector::Fp16>(a, begin, end);
}

} // namespace
} // namespace latentrt
