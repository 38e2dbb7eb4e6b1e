// Tile instructions, and the packing of Q, K and V into tiles.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace latentrt {
namespace {

using bf16 = uint16_t;
constexpr int kTile = 1024; // bytes: 16 rows of 64
constexpr int kRows = 32;   // queries of a wide step: two tiles
constexpr int kKeys = 64;   // keys of a wide step: two pairs of tiles
constexpr int kScoreStride = kKeys * 4;
static_assert(kRows == kUnitRows);

// Compilers take tile intrinsics for instructions that touch no memory; these say what is true.
template <int T>
[[gnu::always_inline]] inline void tile_load(const void* from, int64_t stride = 64) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T>
[[gnu::always_inline]] inline void tile_store(void* to, int64_t stride = 64) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride) : "memory");
}
template <int T>
[[gnu::always_inline]] inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int C, int A, int B>
[[gnu::always_inline]] inline void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
}

void release_tiles() { asm volatile("tilerelease"); }

struct Sizes {
    int64_t blocks, depth, width, groups; // key blocks; tiles along the head dimension, in QK^T and in V; units a sweep

    explicit Sizes(const latentrt_attention_args& args)
        : blocks((args.keys + kKeys - 1) / kKeys),
          depth((args.head_dim + 31) / 32),
          width((args.head_dim + 1 + 15) / 16),
          groups(args.head_dim > 192  ? 8
                 : args.head_dim > 64 ? 2
                                      : 4) {}
};

struct Scratch {
    char *k, *v, *q, *scores, *weights, *out;
    float* bias;
    size_t bytes;

    Scratch(const Sizes& s, char* base) {
        bytes = 0;
        auto take = [&](int64_t n) {
            char* p = base + bytes;
            bytes += align64(n);
            return p;
        };
        k = take(s.blocks * 4 * s.depth * kTile);
        v = take(s.blocks * 2 * s.width * kTile);
        q = take(s.groups * 2 * s.depth * kTile);
        scores = take(2 * kRows * kScoreStride);
        weights = take(2 * 4 * kTile);
        out = take(s.groups * 2 * s.width * kTile);
        bias = reinterpret_cast<float*>(take(s.groups * kRows * sizeof(float)));
    }
};

// [16][16] of 32 bits, transposed in place.
inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

inline __mmask32 columns_from(int64_t dim, int64_t column, int64_t width) {
    const int64_t left = dim - column;
    return left <= 0 ? 0 : static_cast<__mmask32>((1ull << (left < width ? left : width)) - 1);
}

// Tiles [key tile][depth]: row r of a tile is dimensions 2r and 2r+1 of 16 keys. Returns whether all keys are finite.
bool pack_keys(const bf16* k, int64_t stride, int64_t keys, int64_t dim, const Sizes& sizes, char* to) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 bad = 0;
    const int64_t tiles = (keys + 31) / 32 * 2;
    for (int64_t tile = 0; tile < tiles; tile++) {
        for (int64_t step = 0; step < sizes.depth; step++, to += kTile) {
            const __mmask32 mask = columns_from(dim, 32 * step, 32);
            __m512i rows[16];
            for (int64_t i = 0; i < 16; i++) {
                const int64_t key = tile * 16 + i < keys ? tile * 16 + i : keys - 1;
                rows[i] = _mm512_maskz_loadu_epi16(mask, k + key * stride + 32 * step);
                bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(rows[i], exponent), exponent);
            }
            transpose(rows);
            for (int i = 0; i < 16; i++) _mm512_store_si512(to + 64 * i, rows[i]);
        }
    }
    return bad == 0;
}

// Where the packing of two vectors of scores puts key `position` of 32.
constexpr int64_t key_at(int64_t position) { return position / 8 * 4 + position % 4 + (position % 8 < 4 ? 0 : 16); }

// Tiles [pair of key tiles][width]: row r of a tile is 16 dimensions of the keys at positions 2r and 2r+1.
void pack_values(const bf16* v, int64_t stride, int64_t keys, int64_t dim, const Sizes& sizes, bool finite, char* to) {
    const int64_t ones_tile = dim / 16;
    const __m512i one = _mm512_maskz_set1_epi32(static_cast<__mmask16>(1u << dim % 16), finite ? 0x3f80 : 0x7fc0);
    for (int64_t first = 0; first < keys; first += 32) {
        for (int64_t tile = 0; tile < sizes.width; tile++, to += kTile) {
            const auto mask = static_cast<__mmask16>(columns_from(dim, 16 * tile, 16));
            for (int64_t row = 0; row < 16; row++) {
                __m512i pair[2];
                for (int64_t i = 0; i < 2; i++) {
                    const int64_t key = first + key_at(2 * row + i);
                    const bool real = key < keys;
                    const __m256i values =
                        _mm256_maskz_loadu_epi16(real ? mask : 0, v + (real ? key : 0) * stride + 16 * tile);
                    pair[i] = _mm512_cvtepu16_epi32(values);
                    if (tile == ones_tile && real) pair[i] = _mm512_or_si512(pair[i], one);
                }
                _mm512_store_si512(to + 64 * row, _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16)));
            }
        }
    }
}

// Tiles [tile of 16 queries][depth], as they lie in memory; queries beyond the last are zeros.
void pack_queries(const bf16* q, int64_t stride, int64_t rows, int64_t padded, int64_t dim, const Sizes& sizes,
                  char* to) {
    for (int64_t row = 0; row < padded; row++) {
        char* line = to + row / 16 * sizes.depth * kTile + row % 16 * 64;
        for (int64_t step = 0; step < sizes.depth; step++) {
            const __mmask32 mask = row < rows ? columns_from(dim, 32 * step, 32) : 0;
            _mm512_store_si512(line + step * kTile,
                               _mm512_maskz_loadu_epi16(mask, q + (row < rows ? row : 0) * stride + 32 * step));
        }
    }
}

}  // namespace
}  // namespace latentrt
