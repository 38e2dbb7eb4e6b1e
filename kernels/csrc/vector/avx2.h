// Eight floats: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Vector {
    static constexpr int kWidth = 8;
    static constexpr bool kScalesByAny = false;
    static constexpr int kRows = 4; // rows of a tile of the matrix product: 4 x 3 accumulators of 16 registers
    using Reg = __m256;
    struct Mask {
        __m256i lanes;
        int count;
    };

    static Mask first(int64_t n) {
        const int count = static_cast<int>(n >= 8 ? 8 : n <= 0 ? 0 : n);
        return {_mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), count};
    }
    static Reg zero() { return _mm256_setzero_ps(); }
    static Reg set(float x) { return _mm256_set1_ps(x); }
    static Reg load(const float* p) { return _mm256_loadu_ps(p); }
    static Reg load(const float* p, Mask m) { return _mm256_maskload_ps(p, m.lanes); }
    static void store(float* p, Reg x) { _mm256_storeu_ps(p, x); }
    static void store(float* p, Reg x, Mask m) { _mm256_maskstore_ps(p, m.lanes, x); }
    static Reg select(Mask m, Reg yes, Reg no) { return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(m.lanes)); }

    static Mask unordered(Reg a) { // where it is no number
        return {_mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)), 8};
    }

    static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
    static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
    static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
    static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
    static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); } // b where either is not a number
    static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
    static Reg round(Reg a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Reg scale_by_power_of_two(Reg a, Reg n) { // n from -126 to 127
        const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
    }
    static Reg reciprocal(Reg a) { return _mm256_div_ps(set(1), a); }
    static Reg coarse_reciprocal(Reg a) {  // relative error below 1e-6
        const Reg r = _mm256_rcp_ps(a);
        return mul(r, _mm256_fnmadd_ps(a, r, set(2)));
    }
    static float sum(Reg a) {
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
    }
    static float largest(Reg a) {
        __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        x = _mm_max_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
    }

    static void transpose(Reg (&row)[8]) {
        Reg a[8], b[8];
        for (int i = 0; i < 8; i += 2) { // pairs of rows, then of pairs, then of halves
            a[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
            a[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
            b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
            b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
            b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
        }
        for (int i = 0; i < 4; i++) {
            row[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
            row[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
        }
    }

    struct Bf16 {
        using Type = uint16_t;
        static constexpr int kBits = 8; // of precision
        static Reg widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
        static __m128i narrow(Reg x) {
            const __m256i bits = _mm256_castps_si256(x);
            const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
            const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
            const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
            const __m256i rounded = _mm256_castps_si256(
                _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), nan));
            const __m256i high = _mm256_srli_epi32(rounded, 16);
            return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
        }
    };
    struct Fp16 {
        using Type = uint16_t;
        static constexpr int kBits = 11;
        static Reg widen(__m128i x) { return _mm256_cvtph_ps(x); }
        static __m128i narrow(Reg x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    };
    struct Fp32 {
        using Type = float;
    };

    template <class T>
    static Reg read(const typename T::Type* p, Mask m) {
        if constexpr (sizeof(typename T::Type) == 4) {
            return load(p, m);
        } else {
            alignas(16) uint16_t part[8] = {};
            std::memcpy(part, p, 2 * m.count);
            return T::widen(_mm_load_si128(reinterpret_cast<const __m128i*>(part)));
        }
    }
    template <class T>
    static void write(typename T::Type* p, Reg x, Mask m) {
        if constexpr (sizeof(typename T::Type) == 4) {
            store(p, x, m);
        } else {
            alignas(16) uint16_t part[8];
            _mm_store_si128(reinterpret_cast<__m128i*>(part), T::narrow(x));
            std::memcpy(p, part, 2 * m.count);
        }
    }
    template <class T>
    static Reg read(const typename T::Type* p) {
        if constexpr (sizeof(typename T::Type) == 4) return load(p);
        else return T::widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    template <class T>
    static void write(typename T::Type* p, Reg x) {
        if constexpr (sizeof(typename T::Type) == 4) store(p, x);
        else _mm_storeu_si128(reinterpret_cast<__m128i*>(p), T::narrow(x));
    }
};

constexpr int kW = Vector::kWidth;

} // namespace
