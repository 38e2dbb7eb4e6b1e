// The softmax of the AMX kernel: scores in float32 to weights in bfloat16, ten instructions for 32 of them.
//
//   * y = 256 (127 + log2e (s - m)) as unsigned 16-bit integers, saturating, is a bfloat16 exponent and mantissa (times
//     two) of the weight, but for the curvature of 2^x between two powers, which a 64-entry byte table takes off. The
//     error is at most 0.8 % of a weight, half of it bfloat16's own.
//   * m is the largest score of the row's first keys, not the running maximum. Weights are then not bounded by one, but
//     bfloat16 and float32 keep their precision at any size. Sums beyond 2^64 (scores 44 above m) send the rows through
//     again with their true maximum.
//   * The packing of two vectors into one interleaves them by 128-bit lanes; V is packed in the same order of keys.
//   * Row sums are one more column of V, all ones. Its rounding is that of the weights themselves.
//   * Keys beyond the last repeat it, with zeros in V and in the column of ones: no masks, and m stays a true score.
#pragma once

#include <cmath>

#include "amx/tiles.h"

namespace latentrt {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;

// What 2^x falls short of the straight line 1 + x at the middle of each 64th, in 256ths. The line is 1/256 too high, so
// that dropping the last bit rounds to nearest.
__m512i curvature() {
    alignas(64) uint8_t table[64];
    for (int i = 0; i < 64; i++) {
        const float x = (i + 0.5f) / 64 - 0.875f / 256;
        table[i] = static_cast<uint8_t>(lrintf(256 * (1 + x - exp2f(x))));
    }
    return _mm512_load_si512(table);
}

// The constants of the softmax, in registers for as long as this object is a local variable.
struct Curve {
    __m512 factor;
    __m512i table;
};

// The bits of a chunk of 32 weights whose keys are at most `last`.
struct Seen {
    uint32_t upto[32] = {};
    constexpr Seen() {
        for (int last = 0; last < 32; last++)
            for (int p = 0; p < 32; p++)
                if (key_at(p) <= last) upto[last] |= 1u << p;
    }
};
constexpr Seen kSeen;

// Scores, float32 rows of STRIDE bytes, into weights, bfloat16 tiles of 16 queries by 32 keys; a row when `tick` finds
// it due.
// All members are plain values of a local variable: tile instructions in between must not send them to memory.
template <int STRIDE, bool CAUSAL>
struct Softmax {
    Curve curve;
    const char* scores;
    char* weights;
    const float *bias, *end;
    bool pair;       // two chunks of 32 keys, else one
    int64_t visible; // keys of the block that the row's query sees, less one
    int per_row;     // tile instructions to a row, in 256ths
    int credit = 0;

    [[gnu::always_inline]] void tick() {
        credit += 256;
        if (credit >= per_row && bias != end) {
            row();
            credit -= per_row;
        }
    }

    [[gnu::always_inline]] void finish() {
        while (bias != end) row();
    }

private:
    [[gnu::always_inline]] void row() {
        const __m512 offset = _mm512_set1_ps(*bias++);
        chunk(0, offset);
        if (pair) chunk(1, offset);
        scores += STRIDE;
        weights += 64;
        visible++;
    }

    [[gnu::always_inline]] void chunk(int i, __m512 offset) {
        const __m512 low = _mm512_fmadd_ps(_mm512_load_ps(scores + 128 * i), curve.factor, offset);
        const __m512 high = _mm512_fmadd_ps(_mm512_load_ps(scores + 128 * i + 64), curve.factor, offset);
        const __m512i y = _mm512_packus_epi32(_mm512_cvtps_epi32(low), _mm512_cvtps_epi32(high));
        const __m512i bend = _mm512_maskz_permutexvar_epi8(0x5555555555555555, _mm512_srli_epi16(y, 2), curve.table);
        __m512i p = _mm512_srli_epi16(_mm512_sub_epi16(y, bend), 1);
        if (CAUSAL) {
            const int64_t last = visible - 32 * i;
            p = _mm512_maskz_mov_epi16(last >= 31 ? ~0u : last < 0 ? 0u : kSeen.upto[last], p);
        }
        _mm512_store_si512(weights + 2 * kTile * i, p);
    }
};

struct Idle {
    void tick() {}
};

// bias = 256 (127 - log2e max) + 1 for each row, the maximum over these scores and, unless they are the first, over
// those before.
template <int STRIDE, bool CAUSAL>
void raise_bias(const Curve& curve, const char* scores, float* bias, int rows, int chunks, int64_t visible,
                bool first) {
    for (int row = 0; row < rows; row++, visible++) {
        const float* s = reinterpret_cast<const float*>(scores + row * STRIDE);
        __m512 top = _mm512_set1_ps(-INFINITY);
        for (int i = 0; i < 2 * chunks; i++) {
            __m512 scaled = _mm512_mul_ps(_mm512_load_ps(s + 16 * i), curve.factor);
            if (CAUSAL) {
                const int64_t last = visible - 16 * i;
                const auto mask = static_cast<__mmask16>(last >= 15 ? 0xffff : last < 0 ? 0 : (2u << last) - 1);
                scaled = _mm512_mask_blend_ps(mask, _mm512_set1_ps(-INFINITY), scaled);
            }
            top = _mm512_max_ps(top, scaled);
        }
        const float here = 256 * 127 + 1 - _mm512_reduce_max_ps(top);
        bias[row] = first || here < bias[row] ? here : bias[row];
    }
}

}  // namespace
}  // namespace latentrt
