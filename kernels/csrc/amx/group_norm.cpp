// Group norm for CPUs with AMX: AVX-512 with its instruction that rounds to bfloat16.
#include "vector/avx512.h"

#include "vector/group_norm.h"

namespace latentrt {

const GroupNormKernel kGroupNormAmx = {group_norm_channels_first, group_norm_statistics, group_norm_apply};

} // namespace latentrt
