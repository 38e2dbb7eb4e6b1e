// The C interface: checks, choice of instruction set, division of the work among threads.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <type_traits>

#include "kernels.h"
#include "latentrt_kernels.h"
#include "threads.h"

namespace latentrt {
namespace {

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

Memory allocate(size_t bytes) { return Memory(std::aligned_alloc(64, align64(bytes) + 64)); }

// The kernel hands out the 8 KiB of tile state to processes that ask.
bool tiles_granted() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx_bf16() {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    return (edx & kAmxBf16) && (edx & kAmxTile);
}

int find_best_isa() {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return 0;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
        return LATENTRT_ISA_AVX2;
    if (has_amx_bf16() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16") &&
        tiles_granted())
        return LATENTRT_ISA_AMX;
    return LATENTRT_ISA_AVX512;
}

int best_isa() {
    static const int best = find_best_isa();
    return best;
}

int choose_isa(latentrt_isa wanted) {
    if (wanted < LATENTRT_ISA_BEST || wanted > best_isa()) return 0;
    return wanted == LATENTRT_ISA_BEST ? best_isa() : wanted;
}

struct Range {
    int64_t begin, end;
};

Range share(int64_t count, int index, int parts) { return {count * index / parts, count * (index + 1) / parts}; }

// Calls work(index) for every index below `count`, on the caller's threads or our own.
template <class Args, class F>
void spread(const Args& args, int count, F&& work) {
    using Work = std::remove_reference_t<F>;
    const Task task = [](void* argument, int index) { (*static_cast<Work*>(argument))(index); };
    if (args.parallel) args.parallel(args.parallel_context, count, task, &work);
    else run_on_team(count, task, &work);
}

template <class Args>
int clamp_threads(const Args& args, int64_t units) {
    return static_cast<int>(args.threads < units ? args.threads : units);
}

bool bad_threads(int threads) { return threads < 1 || threads > kMaxThreads; }

int check(const latentrt_attention_args& a) {
    if (a.dtype != LATENTRT_FP32 && a.dtype != LATENTRT_BF16) return LATENTRT_BAD_DTYPE;
    if (a.batch < 1 || a.heads < 1 || a.queries < 1 || a.keys < 1) return LATENTRT_BAD_SIZE;
    if (a.head_dim < 8 || a.head_dim > 1024 || a.head_dim % 8) return LATENTRT_BAD_HEAD_DIM;
    if (!a.q || !a.k || !a.v || !a.out) return LATENTRT_BAD_POINTER;
    if (!std::isfinite(a.scale)) return LATENTRT_BAD_SCALE;
    return bad_threads(a.threads) ? LATENTRT_BAD_THREADS : LATENTRT_OK;
}

int check(const latentrt_group_norm_args& a) {
    if (a.dtype != LATENTRT_FP32 && a.dtype != LATENTRT_BF16 && a.dtype != LATENTRT_FP16) return LATENTRT_BAD_DTYPE;
    if (a.batch < 1 || a.channels < 1 || a.positions < 1 || a.groups < 1 || a.channels % a.groups)
        return LATENTRT_BAD_SIZE;
    if (!a.x || !a.weight || !a.bias || !a.out) return LATENTRT_BAD_POINTER;
    if (!std::isfinite(a.eps) || a.eps < 0) return LATENTRT_BAD_SCALE;
    return bad_threads(a.threads) ? LATENTRT_BAD_THREADS : LATENTRT_OK;
}

bool bad_dtype(latentrt_dtype dtype) { return dtype < LATENTRT_FP32 || dtype > LATENTRT_FP16; }

int check(const latentrt_low_rank_args& a) {
    if (bad_dtype(a.base_dtype) || bad_dtype(a.out_dtype)) return LATENTRT_BAD_DTYPE;
    if (a.rows < 1 || a.columns < 1 || a.rank < 0) return LATENTRT_BAD_SIZE;
    if (!a.base || !a.out || (a.rank && !(a.up && a.down))) return LATENTRT_BAD_POINTER;
    return bad_threads(a.threads) ? LATENTRT_BAD_THREADS : LATENTRT_OK;
}

const AttentionKernel& attention_kernel(int isa, latentrt_dtype dtype) {
    if (isa == LATENTRT_ISA_AMX && dtype == LATENTRT_BF16) return kAttentionAmx;
    return isa == LATENTRT_ISA_AVX2 ? kAttentionAvx2 : kAttentionAvx512;
}

int attention(const latentrt_attention_args& args, int isa) {
    const AttentionKernel& kernel = attention_kernel(isa, args.dtype);
    const int64_t units = args.batch * args.heads * ((args.queries + kUnitRows - 1) / kUnitRows);
    const int parts = clamp_threads(args, units);
    const size_t each = align64(kernel.scratch(args));
    const Memory scratch = allocate(parts * each);
    if (!scratch) return LATENTRT_NO_MEMORY;
    spread(args, parts, [&](int index) {
        const Range range = share(units, index, parts);
        kernel.run(args, range.begin, range.end, static_cast<char*>(scratch.get()) + index * each);
    });
    return LATENTRT_OK;
}

// Positions of a block: as many as make the merging of its channels cheap, few enough to share out.
int64_t rows_of_block(const latentrt_group_norm_args& args) {
    const int64_t rows = 65536 / args.channels;
    return rows < 1 ? 1 : rows > args.positions ? args.positions : rows;
}

const GroupNormKernel& group_norm_kernel(int isa) {
    return isa == LATENTRT_ISA_AMX ? kGroupNormAmx : isa == LATENTRT_ISA_AVX2 ? kGroupNormAvx2 : kGroupNormAvx512;
}

int group_norm_channels_last(const latentrt_group_norm_args& args, const GroupNormKernel& kernel) {
    const int64_t block = rows_of_block(args), blocks = (args.positions + block - 1) / block;
    const int64_t units = args.batch * blocks;
    const int parts = clamp_threads(args, units);
    const Memory partial = allocate(units * args.groups * sizeof(Moments));
    const Memory factors = allocate(args.batch * args.channels * 2 * sizeof(float));
    if (!partial || !factors) return LATENTRT_NO_MEMORY;
    auto* moments = static_cast<Moments*>(partial.get());
    spread(args, parts, [&](int index) {
        const Range range = share(units, index, parts);
        kernel.statistics(args, range.begin, range.end, block, moments);
    });
    merge_moments(args, block, moments, static_cast<float*>(factors.get()));
    spread(args, parts, [&](int index) {
        const Range range = share(units, index, parts);
        kernel.apply(args, range.begin, range.end, block, static_cast<const float*>(factors.get()));
    });
    return LATENTRT_OK;
}

int group_norm(const latentrt_group_norm_args& args, int isa) {
    const GroupNormKernel& kernel = group_norm_kernel(isa);
    if (args.channels_last) return group_norm_channels_last(args, kernel);
    const int64_t units = args.batch * args.groups;
    const int parts = clamp_threads(args, units);
    spread(args, parts, [&](int index) {
        const Range range = share(units, index, parts);
        kernel.channels_first(args, range.begin, range.end);
    });
    return LATENTRT_OK;
}

int low_rank(const latentrt_low_rank_args& args, int isa) {
    const LowRankKernel kernel = isa == LATENTRT_ISA_AVX2 ? kLowRankAvx2 : kLowRankAvx512;
    constexpr int64_t kBlock = 8; // rows that are summed together
    const int64_t blocks = (args.rows + kBlock - 1) / kBlock;
    const int parts = clamp_threads(args, blocks);
    spread(args, parts, [&](int index) {
        const Range range = share(blocks, index, parts);
        kernel(args, range.begin * kBlock, range.end * kBlock < args.rows ? range.end * kBlock : args.rows);
    });
    return LATENTRT_OK;
}

} // namespace
} // namespace latentrt

extern "C" {

int latentrt_attention(const latentrt_attention_args* args) {
    using namespace latentrt;
    if (!args) return LATENTRT_BAD_POINTER;
    if (const int status = check(*args)) return status;
    const int isa = choose_isa(args->isa);
    return isa ? attention(*args, isa) : LATENTRT_BAD_ISA;
}

int latentrt_group_norm(const latentrt_group_norm_args* args) {
    using namespace latentrt;
    if (!args) return LATENTRT_BAD_POINTER;
    if (const int status = check(*args)) return status;
    const int isa = choose_isa(args->isa);
    return isa ? group_norm(*args, isa) : LATENTRT_BAD_ISA;
}

int latentrt_low_rank(const latentrt_low_rank_args* args) {
    using namespace latentrt;
    if (!args) return LATENTRT_BAD_POINTER;
    if (const int status = check(*args)) return status;
    const int isa = choose_isa(args->isa);
    return isa ? low_rank(*args, isa) : LATENTRT_BAD_ISA;
}

int latentrt_best_isa(void) { return latentrt::best_isa(); }

int latentrt_abi(void) { return LATENTRT_ABI; }

const char* latentrt_status_text(int status) {
    switch (status) {
        case LATENTRT_OK: return "ok";
        case LATENTRT_BAD_DTYPE:
            return "this operator does not take this dtype; attention takes fp32 and bf16, group norm also fp16";
        case LATENTRT_BAD_SIZE: return "a size is below one, or the channels do not divide into the groups";
        case LATENTRT_BAD_HEAD_DIM:
            return "the head dimension is not a multiple of 8 from 8 to 1024; pad it with zeros";
        case LATENTRT_BAD_POINTER: return "a pointer is null";
        case LATENTRT_BAD_ISA: return "this CPU does not have this instruction set; pass 0 for the best it has";
        case LATENTRT_BAD_THREADS: return "the number of threads is not between 1 and 512";
        case LATENTRT_NO_MEMORY: return "there is no memory for scratch";
        case LATENTRT_BAD_SCALE: return "scale or eps is not finite, or eps is negative";
        default: return "not a status of this library";
    }
}
}
