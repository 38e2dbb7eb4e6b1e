// Flash attention in bfloat16 on AMX tiles: packing, sweeps over a head's keys, the division by the sums.
#include "amx/softmax.h"
#include "amx/sweep.h"
#include "amx/tiles.h"
#include "kernels.h"

namespace latentrt {
namespace {

constexpr float kTooLarge = 0x1p64f;

inline const float* out_row(const Sizes& sizes, const Scratch& scratch, int64_t row) {
    return reinterpret_cast<const float*>(scratch.out + row / 16 * sizes.width * kTile + row % 16 * 64);
}

bool sums_are_small(const latentrt_attention_args& args, const Sizes& sizes, const Scratch& scratch, int64_t rows) {
    for (int64_t row = 0; row < rows; row++) {
        const float* out = out_row(sizes, scratch, row);
        if (!(out[args.head_dim / 16 * (kTile / 4) + args.head_dim % 16] < kTooLarge)) return false;
    }
    return true;
}

void write_out(const latentrt_attention_args& args, const Sizes& sizes, const Scratch& scratch, int64_t rows,
               bf16* to) {
    const int64_t dim = args.head_dim;
    for (int64_t row = 0; row < rows; row++, to += args.out_stride[2]) {
        const float* out = out_row(sizes, scratch, row);
        const __m512 inverse = _mm512_set1_ps(1 / out[dim / 16 * (kTile / 4) + dim % 16]);
        for (int64_t column = 0; column < dim; column += 16) {
            const __m512 value = _mm512_mul_ps(_mm512_load_ps(out + column / 16 * (kTile / 4)), inverse);
            _mm256_mask_storeu_epi16(to + column, static_cast<__mmask16>(columns_from(dim, column, 16)),
                                     reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
        }
    }
}

template <class Sweep>
void run_units(const latentrt_attention_args& args, int64_t begin, int64_t end, const Sizes& sizes,
               const Scratch& scratch) {
    const int64_t per_head = (args.queries + kRows - 1) / kRows;
    const auto head_of = [&](const void* base, const int64_t (&stride)[3], int64_t index) {
        return static_cast<const bf16*>(base) + index / args.heads * stride[0] + index % args.heads * stride[1];
    };
    Sweep sweep(args, sizes, scratch);
    int64_t packed = -1;
    while (begin < end) {
        const int64_t head = begin / per_head, unit = begin % per_head;
        if (head != packed) {
            const bool finite = pack_keys(head_of(args.k, args.k_stride, head), args.k_stride[2], args.keys,
                                          args.head_dim, sizes, scratch.k);
            pack_values(head_of(args.v, args.v_stride, head), args.v_stride[2], args.keys, args.head_dim, sizes, finite,
                        scratch.v);
            packed = head;
        }
        int64_t groups = sizes.groups;
        if (groups > per_head - unit) groups = per_head - unit;
        if (groups > end - begin) groups = end - begin;
        const int64_t query = unit * kRows;
        const int64_t rows = args.queries - query < groups * kRows ? args.queries - query : groups * kRows;
        pack_queries(head_of(args.q, args.q_stride, head) + query * args.q_stride[2], args.q_stride[2], rows,
                     groups * kRows, args.head_dim, sizes, scratch.q);
        sweep.run(query, groups, false);
        if (!sums_are_small(args, sizes, scratch, rows)) sweep.run(query, groups, true);
        write_out(args, sizes, scratch, rows,
                  const_cast<bf16*>(head_of(args.out, args.out_stride, head)) + query * args.out_stride[2]);
        begin += groups;
    }
}

template <bool CAUSAL>
void run_any(const latentrt_attention_args& args, int64_t begin, int64_t end, const Sizes& sizes,
             const Scratch& scratch) {
    switch (args.head_dim) {
        case 40: return run_units<NarrowSweep<2, 3, CAUSAL>>(args, begin, end, sizes, scratch);
        case 64: return run_units<NarrowSweep<2, 5, CAUSAL>>(args, begin, end, sizes, scratch);
        case 80: return run_units<WideSweep<3, 6, CAUSAL>>(args, begin, end, sizes, scratch);
        case 160: return run_units<WideSweep<5, 11, CAUSAL>>(args, begin, end, sizes, scratch);
        default: return run_units<WideSweep<0, 0, CAUSAL>>(args, begin, end, sizes, scratch);
    }
}

size_t scratch_bytes(const latentrt_attention_args& args) { return Scratch(Sizes(args), nullptr).bytes; }

void run(const latentrt_attention_args& args, int64_t begin, int64_t end, char* base) {
    const Sizes sizes(args);
    const Scratch scratch(sizes, base);
    configure_tiles();
    if (args.causal) run_any<true>(args, begin, end, sizes, scratch);
    else run_any<false>(args, begin, end, sizes, scratch);
    release_tiles();
}

} // namespace

const AttentionKernel kAttentionAmx = {scratch_bytes, run};

} // namespace latentrt
