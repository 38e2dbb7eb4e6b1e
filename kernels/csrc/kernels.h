// What the dispatcher knows of the translation units, one for each instruction set.
//
// Only plain declarations here: these units are compiled for CPUs that may not be the one at hand, and an inline
// function in a shared header could reach the program in the version of the wrong one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "latentrt_kernels.h"

namespace latentrt {

// Attention is cut into units of 32 queries of one head, numbered head by head. A thread takes a contiguous range and
// keeps what it packs of a head's keys and values in its own scratch, aligned to 64 bytes.
constexpr int64_t kUnitRows = 32;

constexpr size_t align64(size_t bytes) { return (bytes + 63) / 64 * 64; }

struct AttentionKernel {
    size_t (*scratch)(const latentrt_attention_args& args);
    void (*run)(const latentrt_attention_args& args, int64_t begin, int64_t end, char* scratch);
};

struct Moments {
    float mean, m2; // m2: sum of squared differences from the mean
};

// Channels first: one pass, a unit is one group of one image. Channels last: `statistics` over blocks of `block_rows`
// positions into partial[batch][block][group], then `apply` over the same blocks.
struct GroupNormKernel {
    void (*channels_first)(const latentrt_group_norm_args& args, int64_t begin, int64_t end);
    void (*statistics)(const latentrt_group_norm_args& args, int64_t begin, int64_t end, int64_t block_rows,
                       Moments* partial);
    void (*apply)(const latentrt_group_norm_args& args, int64_t begin, int64_t end, int64_t block_rows,
                  const float* factors);
};

// factors[batch][2][channels]: a, then b, of a x + b, from the moments of all blocks.
void merge_moments(const latentrt_group_norm_args& args, int64_t block_rows, const Moments* partial, float* factors);

// Rows [begin, end).
using LowRankKernel = void (*)(const latentrt_low_rank_args& args, int64_t begin, int64_t end);

extern const AttentionKernel kAttentionAmx, kAttentionAvx512, kAttentionAvx2;
extern const GroupNormKernel kGroupNormAmx, kGroupNormAvx512, kGroupNormAvx2;
extern const LowRankKernel kLowRankAvx512, kLowRankAvx2;

} // namespace latentrt
