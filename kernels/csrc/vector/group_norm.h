// Group normalisation with SiLU in float32 on the `Vector` of the including file.
//
// Variance is never E[x^2] - E[x]^2: short blocks have their moments taken about a value near their mean, and are then
// merged pairwise (Chan, Golub, LeVeque 1983).
#pragma once

#include <cmath>
#include <cstdint>

#include "vector/exponential.h"
#include "kernels.h"

namespace {

using latentrt::Moments;

constexpr int64_t kMomentBlock = 4096; // elements: 8 or 16 KiB

struct Running {
    double count = 0, mean = 0, m2 = 0;

    void merge(double n, double other_mean, double other_m2) {
        const double total = count + n, delta = other_mean - mean;
        m2 += other_m2 + delta * delta * count * n / total;
        mean += delta * n / total;
        count = total;
    }
};

// Merges sets of one size: no division until the end. Means are taken from the first one's.
struct SameSize {
    double first = 0, sum = 0, square = 0, m2 = 0;
    bool empty = true;

    void add(double mean, double other_m2) {
        if (empty) first = mean, empty = false;
        const double d = mean - first;
        sum += d;
        square += d * d;
        m2 += other_m2;
    }

    Moments merged(int64_t sets, int64_t size) const {
        const double n = static_cast<double>(sets), between = square - sum * sum / n;
        return {static_cast<float>(first + sum / n), static_cast<float>(m2 + between * static_cast<double>(size))};
    }
};

// e^-y, relative error 7.5e-5 for bfloat16 and 2.6e-6 for float16: 2^f by the polynomial of least relative error.
template <class T>
[[gnu::always_inline]] inline Vector::Reg coarse_exponential(Vector::Reg y) {
    using V = Vector;
    V::Reg x = V::mul(y, V::set(-1.44269504088896340736f));
    if (!V::kScalesByAny) x = V::max(V::set(-126.0f), V::min(V::set(126.0f), x));
    const V::Reg n = V::round(x), f = V::sub(x, n);
    V::Reg p;
    if constexpr (T::kBits == 8) {
        p = V::fma(V::set(0.0551716723f), f, V::set(0.242611125f));
        p = V::fma(p, f, V::set(0.693260968f));
        p = V::fma(p, f, V::set(0.999928057f));
    } else {
        p = V::fma(V::set(0.0095701023f), f, V::set(0.0559178628f));
        p = V::fma(p, f, V::set(0.240247443f));
        p = V::fma(p, f, V::set(0.693121791f));
        p = V::fma(p, f, V::set(0.999999285f));
    }
    return V::scale_by_power_of_two(p, n);
}

template <class T, bool SILU>
[[gnu::always_inline]] inline Vector::Reg activate(Vector::Reg y) {
    using V = Vector;
    if (!SILU) return y;
    if constexpr (sizeof(typename T::Type) == 2) {
        const V::Reg e = coarse_exponential<T>(y);
        return V::mul(y, V::coarse_reciprocal(V::add(e, V::set(1.0f))));
    }
    // Beyond 2^126 the exponential stays there; y / 2^126 is zero to every dtype.
    const V::Reg e = exp2(V::min(V::set(126.0f), V::mul(y, V::set(-1.44269504088896340736f))));
    return V::mul(y, V::reciprocal(V::add(e, V::set(1.0f))));
}

// One pass, of differences from the mean of the first few elements. That lies within sqrt(count / few) standard
// deviations of the mean of all, whatever they are: the correction takes away at most six bits of the sum of squares.
template <class T>
Moments moments_of(const typename T::Type* x, int64_t count) {
    using V = Vector;
    constexpr int kSums = 4;
    const int64_t few = count < kMomentBlock / 64 ? count : kMomentBlock / 64;
    V::Reg start = V::zero();
    for (int64_t i = 0; i < few; i += kW) start = V::add(start, V::template read<T>(x + i, V::first(few - i)));
    const float center = V::sum(start) / static_cast<float>(few);
    const V::Reg offset = V::set(center);
    V::Reg sum[kSums], square[kSums];
    for (int j = 0; j < kSums; j++) sum[j] = square[j] = V::zero();
    int64_t i = 0;
    for (; i + kSums * kW <= count; i += kSums * kW) {
        for (int j = 0; j < kSums; j++) {
            const V::Reg d = V::sub(V::template read<T>(x + i + j * kW), offset);
            sum[j] = V::add(sum[j], d);
            square[j] = V::fma(d, d, square[j]);
        }
    }
    for (; i < count; i += kW) {
        const auto mask = V::first(count - i);
        const V::Reg d = V::select(mask, V::sub(V::template read<T>(x + i, mask), offset), V::zero());
        sum[0] = V::add(sum[0], d);
        square[0] = V::fma(d, d, square[0]);
    }
    const double n = static_cast<double>(count);
    const double total = V::sum(V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3])));
    const double squares = V::sum(V::add(V::add(square[0], square[1]), V::add(square[2], square[3])));
    const double m2 = squares - total * total / n;
    return {static_cast<float>(center + total / n), static_cast<float>(m2 > 0 || m2 != m2 ? m2 : 0)};
}

// out = act(a x + b), a and b the same for the whole row.
template <class T, bool SILU>
void transform_row(const typename T::Type* x, typename T::Type* out, int64_t count, float a, float b) {
    using V = Vector;
    const V::Reg scale = V::set(a), shift = V::set(b);
    int64_t i = 0;
#pragma GCC unroll 2
    for (; i + kW <= count; i += kW)
        V::template write<T>(out + i, activate<T, SILU>(V::fma(V::template read<T>(x + i), scale, shift)));
    if (i < count) {
        const auto mask = V::first(count - i);
        V::template write<T>(out + i, activate<T, SILU>(V::fma(V::template read<T>(x + i, mask), scale, shift)), mask);
    }
}

template <class T, bool SILU>
void channels_first(const latentrt_group_norm_args& args, int64_t begin, int64_t end) {
    using Type = typename T::Type;
    const int64_t channels = args.channels / args.groups, size = channels * args.positions;
    for (int64_t unit = begin; unit < end; unit++) {
        const Type* x = static_cast<const Type*>(args.x) + unit * size;
        Type* out = static_cast<Type*>(args.out) + unit * size;
        Running all;
        for (int64_t i = 0; i < size; i += kMomentBlock) {
            const int64_t count = size - i < kMomentBlock ? size - i : kMomentBlock;
            const Moments m = moments_of<T>(x + i, count);
            all.merge(static_cast<double>(count), m.mean, m.m2);
        }
        const double inverse = 1 / std::sqrt(all.m2 / all.count + args.eps);
        for (int64_t c = 0; c < channels; c++) {
            const int64_t channel = unit % args.groups * channels + c;
            const double a = inverse * args.weight[channel];
            transform_row<T, SILU>(x + c * args.positions, out + c * args.positions, args.positions,
                                   static_cast<float>(a), static_cast<float>(args.bias[channel] - all.mean * a));
        }
    }
}

struct Block {
    int64_t image, index, first, rows; // positions [first, first + rows)

    Block(const latentrt_group_norm_args& args, int64_t unit, int64_t block_rows) {
        const int64_t blocks = (args.positions + block_rows - 1) / block_rows;
        image = unit / blocks;
        index = unit % blocks;
        first = index * block_rows;
        rows = args.positions - first < block_rows ? args.positions - first : block_rows;
    }
};

// Mean and squared differences of COLUMNS * kW channels over the rows of a block, or of `channels` where they are fewer.
// One pass, of differences from the mean of the first few rows, as in moments_of.
template <class T, int COLUMNS>
void channel_moments(const typename T::Type* x, int64_t stride, int64_t rows, int64_t channels, float* mean,
                     float* m2) {
    using V = Vector;
    const auto mask = V::first(channels);
    const auto each_row = [&](int64_t count, auto&& use) {
        for (int64_t r = 0; r < count; r++)
            for (int j = 0; j < COLUMNS; j++) {
                const typename T::Type* from = x + r * stride + j * kW;
                use(j, COLUMNS > 1 || channels >= kW ? V::template read<T>(from) : V::template read<T>(from, mask));
            }
    };
    V::Reg center[COLUMNS], sum[COLUMNS], square[COLUMNS];
    for (int j = 0; j < COLUMNS; j++) center[j] = sum[j] = square[j] = V::zero();
    const int64_t few = rows < 4 ? rows : 4;
    each_row(few, [&](int j, V::Reg value) { center[j] = V::add(center[j], value); });
    for (int j = 0; j < COLUMNS; j++) center[j] = V::div(center[j], V::set(static_cast<float>(few)));
    each_row(rows, [&](int j, V::Reg value) {
        const V::Reg d = V::sub(value, center[j]);
        sum[j] = V::add(sum[j], d);
        square[j] = V::fma(d, d, square[j]);
    });
    const V::Reg each = V::set(1 / static_cast<float>(rows));
    for (int j = 0; j < COLUMNS; j++) {
        const V::Reg shift = V::mul(sum[j], each);
        V::store(mean + j * kW, V::add(center[j], shift));
        V::store(m2 + j * kW, V::max(V::zero(), V::sub(square[j], V::mul(sum[j], shift))));
    }
}

template <class T>
void statistics(const latentrt_group_norm_args& args, int64_t begin, int64_t end, int64_t block_rows,
                Moments* partial) {
    using Type = typename T::Type;
    const int64_t per_group = args.channels / args.groups;
    for (int64_t unit = begin; unit < end; unit++) {
        const Block block(args, unit, block_rows);
        const Type* x = static_cast<const Type*>(args.x) + (block.image * args.positions + block.first) * args.channels;
        Moments* to = partial + unit * args.groups;
        SameSize group;
        constexpr int kColumns = 4, kWide = kColumns * kW;
        for (int64_t c = 0, width; c < args.channels; c += width) {
            alignas(64) float mean[kWide], m2[kWide];
            const int64_t left = args.channels - c;
            width = left >= kWide ? kWide : left < kW ? left : kW;
            if (width == kWide) channel_moments<T, kColumns>(x + c, args.channels, block.rows, width, mean, m2);
            else channel_moments<T, 1>(x + c, args.channels, block.rows, width, mean, m2);
            for (int64_t i = 0; i < width; i++) {
                group.add(mean[i], m2[i]);
                if ((c + i + 1) % per_group == 0) {
                    *to++ = group.merged(per_group, block.rows);
                    group = SameSize();
                }
            }
        }
    }
}

template <class T, bool SILU>
void apply(const latentrt_group_norm_args& args, int64_t begin, int64_t end, int64_t block_rows, const float* factors) {
    using V = Vector;
    using Type = typename T::Type;
    for (int64_t unit = begin; unit < end; unit++) {
        const Block block(args, unit, block_rows);
        const int64_t start = (block.image * args.positions + block.first) * args.channels;
        const Type* x = static_cast<const Type*>(args.x) + start;
        Type* out = static_cast<Type*>(args.out) + start;
        const float *a = factors + block.image * 2 * args.channels, *b = a + args.channels;
        for (int64_t r = 0; r < block.rows; r++, x += args.channels, out += args.channels) {
            int64_t c = 0;
#pragma GCC unroll 2
            for (; c + kW <= args.channels; c += kW)
                V::template write<T>(
                    out + c, activate<T, SILU>(V::fma(V::template read<T>(x + c), V::load(a + c), V::load(b + c))));
            if (c < args.channels) {
                const auto mask = V::first(args.channels - c);
                const V::Reg y = V::fma(V::template read<T>(x + c, mask), V::load(a + c, mask), V::load(b + c, mask));
                V::template write<T>(out + c, activate<T, SILU>(y), mask);
            }
        }
    }
}

// Calls f with the type of the tensors and whether SiLU follows.
template <class F>
void by_type(const latentrt_group_norm_args& args, F&& f) {
    const auto with = [&](auto type) {
        return args.silu ? f.template operator()<decltype(type), true>()
                         : f.template operator()<decltype(type), false>();
    };
    switch (args.dtype) {
        case LATENTRT_FP32: return with(Vector::Fp32());
        case LATENTRT_BF16: return with(Vector::Bf16());
        case LATENTRT_FP16: return with(Vector::Fp16());
    }
}

void group_norm_channels_first(const latentrt_group_norm_args& args, int64_t begin, int64_t end) {
    by_type(args, [&]<class T, bool SILU>() { channels_first<T, SILU>(args, begin, end); });
}

void group_norm_statistics(const latentrt_group_norm_args& args, int64_t begin, int64_t end, int64_t block_rows,
                           Moments* partial) {
    by_type(args, [&]<class T, bool>() { statistics<T>(args, begin, end, block_rows, partial); });
}

void group_norm_apply(const latentrt_group_norm_args& args, int64_t begin, int64_t end, int64_t block_rows,
                      const float* factors) {
    by_type(args, [&]<class T, bool SILU>() { apply<T, SILU>(args, begin, end, block_rows, factors); });
}

} // namespace
