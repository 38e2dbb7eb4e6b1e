// The vector kernels compiled for AVX-512.
#include "vector_avx512.h"

#include "attention_vector.h"
#include "group_norm_vector.h"
#include "low_rank_vector.h"

namespace latentrt {

const AttentionKernel kAttentionAvx512 = {attention_scratch, attention};
const GroupNormKernel kGroupNormAvx512 = {group_norm_channels_first, group_norm_statistics, group_norm_apply};
const LowRankKernel kLowRankAvx512 = low_rank;

} // namespace latentrt
