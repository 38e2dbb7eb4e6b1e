// The vector kernels compiled for AVX2.
#include "vector/avx2.h"

#include "vector/attention.h"
#include "vector/group_norm.h"
#include "vector/low_rank.h"

namespace latentrt {

const AttentionKernel kAttentionAvx2 = {attention_scratch, attention};
const GroupNormKernel kGroupNormAvx2 = {group_norm_channels_first, group_norm_statistics, group_norm_apply};
const LowRankKernel kLowRankAvx2 = low_rank;

} // namespace latentrt
