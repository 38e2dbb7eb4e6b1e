// The vector kernels compiled for AVX-512.
#include "vector/avx512.h"

#include "vector/attention.h"
#include "vector/group_norm.h"
#include "vector/low_rank.h"

namespace latentrt {

const AttentionKernel kAttentionAvx512 = {attention_scratch, attention};
const GroupNormKernel kGroupNormAvx512 = {group_norm_channels_first, group_norm_statistics, group_norm_apply};
const LowRankKernel kLowRankAvx512 = low_rank;

} // namespace latentrt
