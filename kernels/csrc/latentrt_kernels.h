/* Fused operators of latent diffusion for x86-64 CPUs: attention, group normalisation with
 * SiLU, and weights with changes of low rank.
 *
 * Plain C interface of liblatentrt_kernels. Every function is thread-safe, allocates only scratch that it frees again,
 * and leaves its inputs alone. Sizes and strides count elements, never bytes. Results do not depend on the number of
 * threads. A call that cannot be carried out returns a status other than LATENTRT_OK and writes nothing.
 *
 *     latentrt_attention_args a = {0};
 *     a.dtype = LATENTRT_BF16;
 *     a.batch = 2; a.heads = 8; a.queries = 4096; a.keys = 77; a.head_dim = 40;
 *     a.q = q; a.q_stride[0] = 4096 * 320; a.q_stride[1] = 40; a.q_stride[2] = 320; // [batch, query, head, dim]
 *     ...
 *     a.scale = 1 / sqrtf(40); a.threads = 8;
 *     int status = latentrt_attention(&a);
 *     if (status != LATENTRT_OK) fputs(latentrt_status_text(status), stderr);
 */
#ifndef LATENTRT_KERNELS_H
#define LATENTRT_KERNELS_H

#include <stdint.h>

#if defined(__GNUC__)
#define LATENTRT_API __attribute__((visibility("default")))
#else
#define LATENTRT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a struct or the meaning of a field changes. */
#define LATENTRT_ABI 2

typedef enum {
    LATENTRT_OK = 0,
    LATENTRT_BAD_DTYPE = 1,
    LATENTRT_BAD_SIZE = 2,     /* a size below one, or channels that do not divide into the groups */
    LATENTRT_BAD_HEAD_DIM = 3, /* not a multiple of 8, or above 1024 */
    LATENTRT_BAD_POINTER = 4,
    LATENTRT_BAD_ISA = 5, /* not on this CPU, or not a value of latentrt_isa */
    LATENTRT_BAD_THREADS = 6,
    LATENTRT_NO_MEMORY = 7,
    LATENTRT_BAD_SCALE = 8 /* scale or eps is not finite, or eps is negative */
} latentrt_status;

typedef enum { LATENTRT_FP32 = 0, LATENTRT_BF16 = 1, LATENTRT_FP16 = 2 } latentrt_dtype;

/* Instruction sets, each a superset of those before it. AMX means AMX-BF16; float32 takes AVX-512 there. */
typedef enum {
    LATENTRT_ISA_BEST = 0,
    LATENTRT_ISA_AVX2 = 1,   /* AVX2, FMA, F16C */
    LATENTRT_ISA_AVX512 = 2, /* AVX-512 F, BW, DQ, VL */
    LATENTRT_ISA_AMX = 3     /* AMX-BF16, AVX-512 VBMI and BF16 */
} latentrt_isa;

/* Runs task(argument, i) for every i in [0, count), on any threads, and returns when all are done. `context` is what
 * the caller put beside the function. Give one to keep the work on the threads of a framework; leave it NULL for this
 * library's own threads, which sleep between calls. */
typedef void (*latentrt_parallel)(void* context, int count, void (*task)(void* argument, int index), void* argument);

/* out[b,h,i,:] = sum_j softmax_j(scale * <q[b,h,i,:], k[b,h,j,:]>) v[b,h,j,:]
 *
 * dtype: FP32 or BF16, the same for all four tensors; arithmetic is float32, with FP32 inputs throughout, with BF16
 * inputs on AMX the weights are rounded to bfloat16 before they meet v. *_stride: elements from one batch, head and
 * token to the next; the head dimension is contiguous. out must not overlap an input. scale: 1 / sqrt(head_dim) as a
 * rule. causal: query i sees keys 0 ... i only. threads: how many work at most, the caller's included. */
typedef struct {
    latentrt_dtype dtype;
    latentrt_isa isa;
    int64_t batch, heads, queries, keys, head_dim;
    const void *q, *k, *v;
    void* out;
    int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
    float scale;
    int causal;
    int threads;
    latentrt_parallel parallel;
    void* parallel_context;
} latentrt_attention_args;

LATENTRT_API int latentrt_attention(const latentrt_attention_args* args);

/* out = act((x - mean) / sqrt(variance + eps) * weight + bias), mean and variance over each group of channels and all
 * positions, act(x) = x / (1 + exp(-x)) where silu is set, else act(x) = x.
 *
 * dtype: FP32, BF16 or FP16 for x and out; arithmetic is float32. weight, bias: float32 [channels]. Dense storage:
 * [batch, channels, positions], or [batch, positions, channels] where channels_last is set. out may be x. */
typedef struct {
    latentrt_dtype dtype;
    latentrt_isa isa;
    int64_t batch, channels, positions, groups;
    const void* x;
    const float *weight, *bias;
    void* out;
    float eps;
    int silu;
    int channels_last;
    int threads;
    latentrt_parallel parallel;
    void* parallel_context;
} latentrt_group_norm_args;

LATENTRT_API int latentrt_group_norm(const latentrt_group_norm_args* args);

/* out[i,j] = base[i,j] + sum_k up[i,k] down[k,j], in float32, rounded to nearest even.
 *
 * A weight with a LoRA, or with rank 0 a conversion. base: [rows, columns] of base_dtype; up: [rows, rank]; down: [rank,
 * columns]; out: [rows, columns] of out_dtype; all dense. In bfloat16 numbers beyond its largest become that. out must not overlap an input. */
typedef struct {
    latentrt_dtype base_dtype, out_dtype;
    latentrt_isa isa;
    int64_t rows, columns, rank;
    const void* base;
    const float *up, *down;
    void* out;
    int threads;
    latentrt_parallel parallel;
    void* parallel_context;
} latentrt_low_rank_args;

LATENTRT_API int latentrt_low_rank(const latentrt_low_rank_args* args);

/* The best instruction set of this CPU and operating system; 0 where there is not even AVX2. */
LATENTRT_API int latentrt_best_isa(void);

/* LATENTRT_ABI of the library, to be compared with that of the header. */
LATENTRT_API int latentrt_abi(void);

/* A sentence in English, never NULL. */
LATENTRT_API const char* latentrt_status_text(int status);

#ifdef __cplusplus
}
#endif

#endif
