// The vector kernels compiled for AVX2.
#include "vector_avx2.h"

#include "attention_vector.h"
#include "group_norm_vector.h"
#include "low_rank_vector.h"

namespace latentrt {

const AttentionKernel kAttentionAvx2 = {attention_scratch, attention};
const GroupNormKernel kGroupNormAvx2 = {group_norm_channels_first, group_norm_statistics, group_norm_apply};
const LowRankKernel kLowRankAvx2 = low_rank;

} // namespace latentrt
