#include <cmath>

#include "kernels.h"

namespace latentrt {

void merge_moments(const latentrt_group_norm_args& args, int64_t block_rows, const Moments* partial, float* factors) {
    const int64_t blocks = (args.positions + block_rows - 1) / block_rows, per_group = args.channels / args.groups;
    for (int64_t image = 0; image < args.batch; image++) {
        float *a = factors + image * 2 * args.channels, *b = a + args.channels;
        for (int64_t group = 0; group < args.groups; group++) {
            double count = 0, mean = 0, m2 = 0;
            for (int64_t block = 0; block < blocks; block++) {
                const Moments& m = partial[(image * blocks + block) * args.groups + group];
                const int64_t rows = block + 1 < blocks ? block_rows : args.positions - block * block_rows;
                const double n = static_cast<double>(rows * per_group), total = count + n, delta = m.mean - mean;
                m2 += m.m2 + delta * delta * count * n / total;
                mean += delta * n / total;
                count = total;
            }
            const double inverse = 1 / std::sqrt(m2 / count + args.eps);
            for (int64_t c = group * per_group; c < (group + 1) * per_group; c++) {
                const double factor = inverse * args.weight[c];
                a[c] = static_cast<float>(factor);
                b[c] = static_cast<float>(args.bias[c] - mean * factor);
            }
        }
    }
}

} // namespace latentrt
