// Sixteen floats: AVX-512 F, BW, DQ and VL, and BF16 where the including file is compiled for it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Vector {
    static constexpr int kWidth = 16;
    static constexpr bool kScalesByAny = true; // scale_by_power_of_two over- and underflows as numbers do
    static constexpr int kRows = 8; // rows of a tile of the matrix product: 8 x 3 accumulators of 32 registers
    using Reg = __m512;
    using Mask = __mmask16;

    static Mask first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<Mask>((1u << n) - 1); }
    static Reg zero() { return _mm512_setzero_ps(); }
    static Reg set(float x) { return _mm512_set1_ps(x); }
    static Reg load(const float* p) { return _mm512_loadu_ps(p); }
    static Reg load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
    static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
    static void store(float* p, Reg x, Mask m) { _mm512_mask_storeu_ps(p, m, x); }
    static Reg select(Mask m, Reg yes, Reg no) { return _mm512_mask_blend_ps(m, no, yes); }

    static Mask unordered(Reg a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); } // where it is no number

    static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
    static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
    static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
    static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
    static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
    static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); } // b where either is not a number
    static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
    static Reg round(Reg a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static Reg scale_by_power_of_two(Reg a, Reg n) { return _mm512_scalef_ps(a, n); }
    static Reg reciprocal(Reg a) {
        const Reg r = _mm512_rcp14_ps(a);
        return mul(r, _mm512_fnmadd_ps(a, r, set(2)));
    }
    static Reg coarse_reciprocal(Reg a) { return _mm512_rcp14_ps(a); }  // relative error 6e-5
    static float sum(Reg a) { return _mm512_reduce_add_ps(a); }
    static float largest(Reg a) { return _mm512_reduce_max_ps(a); }

    static void transpose(Reg (&row)[16]) {
        Reg a[16], b[16];
        for (int i = 0; i < 16; i += 2) { // pairs of rows, then of pairs, then of quarters, twice
            a[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
            a[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            b[i] = _mm512_shuffle_ps(a[i], a[i + 2], 0x44);
            b[i + 1] = _mm512_shuffle_ps(a[i], a[i + 2], 0xee);
            b[i + 2] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0x44);
            b[i + 3] = _mm512_shuffle_ps(a[i + 1], a[i + 3], 0xee);
        }
        for (int i = 0; i < 4; i++) {
            a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
            a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
            a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
            a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
        }
        for (int i = 0; i < 8; i++) {
            row[i] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
            row[i + 8] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
        }
    }

    struct Bf16 {
        using Type = uint16_t;
        static constexpr int kBits = 8; // of precision
        static Reg widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
#ifdef __AVX512BF16__
        static __m256i narrow(Reg x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
#else
        // To nearest even. Of numbers that are none it takes those that bfloat16 inputs lead to: low bits are zero.
        static __m256i narrow(Reg x) {
            const __m512i bits = _mm512_castps_si512(x);
            const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
            const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
            return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
        }
#endif
    };
    struct Fp16 {
        using Type = uint16_t;
        static constexpr int kBits = 11;
        static Reg widen(__m256i x) { return _mm512_cvtph_ps(x); }
        static __m256i narrow(Reg x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    };
    struct Fp32 {
        using Type = float;
    };

    template <class T>
    static Reg read(const typename T::Type* p, Mask m) {
        if constexpr (sizeof(typename T::Type) == 4) return load(p, m);
        else return T::widen(_mm256_maskz_loadu_epi16(m, p));
    }
    template <class T>
    static void write(typename T::Type* p, Reg x, Mask m) {
        if constexpr (sizeof(typename T::Type) == 4) store(p, x, m);
        else _mm256_mask_storeu_epi16(p, m, T::narrow(x));
    }
    template <class T>
    static Reg read(const typename T::Type* p) {
        if constexpr (sizeof(typename T::Type) == 4) return load(p);
        else return T::widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    template <class T>
    static void write(typename T::Type* p, Reg x) {
        if constexpr (sizeof(typename T::Type) == 4) store(p, x);
        else _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), T::narrow(x));
    }
};

constexpr int kW = Vector::kWidth;

} // namespace
