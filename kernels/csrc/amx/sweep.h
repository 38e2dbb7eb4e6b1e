// The loops of the AMX kernel over the keys of a head.
//
// A step multiplies a few queries by a few keys, turns the scores into weights, and multiplies the weights by V. Tiles
// and vectors are different execution units, so a step's softmax is written between the tile instructions of the next
// one's scores and the last one's output, a row after a tile instruction or so, and the out-of-order core runs all
// three at once. What they share lies in a few KiB of scratch that stay in the first cache.
#pragma once

#include "amx/softmax.h"
#include "amx/tiles.h"

namespace latentrt {
namespace {

// scores[32][32 * chunks] = Q K^T
template <int DEPTH, class P>
[[gnu::always_inline]] inline void multiply_keys(const char* q, const char* k, char* scores, int chunks, int64_t depth,
                                                 P& pace) {
    const int64_t steps = DEPTH ? DEPTH : depth;
    for (int chunk = 0; chunk < chunks; chunk++, k += 2 * steps * kTile, scores += 128) {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
#pragma GCC unroll 1
        for (int64_t step = 0; step < steps; step++) {
            tile_load<4>(q + step * kTile);
            tile_load<6>(k + step * kTile);
            tile_multiply<0, 4, 6>();
            pace.tick();
            tile_load<7>(k + (steps + step) * kTile);
            tile_multiply<1, 4, 7>();
            pace.tick();
            tile_load<5>(q + (steps + step) * kTile);
            tile_multiply<2, 5, 6>();
            pace.tick();
            tile_multiply<3, 5, 7>();
            pace.tick();
        }
        tile_store<0>(scores, kScoreStride);
        tile_store<1>(scores + 64, kScoreStride);
        tile_store<2>(scores + 16 * kScoreStride, kScoreStride);
        tile_store<3>(scores + 16 * kScoreStride + 64, kScoreStride);
    }
}

// out[32][16 * COLUMNS] (+)= weights[32][32 * chunks] V. `width`: tiles from one tile row of V and out to the next.
template <int COLUMNS, class P>
[[gnu::always_inline]] inline void multiply_values(const char* weights, const char* v, char* out, int chunks,
                                                   int64_t width, bool first, P& pace) {
    char* const below = out + width * kTile;
    if (first) {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(), tile_zero<4>(), tile_zero<5>();
    } else {
        tile_load<0>(out);
        if (COLUMNS > 1) tile_load<1>(out + kTile);
        if (COLUMNS > 2) tile_load<2>(out + 2 * kTile);
        tile_load<3>(below);
        if (COLUMNS > 1) tile_load<4>(below + kTile);
        if (COLUMNS > 2) tile_load<5>(below + 2 * kTile);
    }
#pragma GCC unroll 1
    for (int chunk = 0; chunk < chunks; chunk++, weights += 2 * kTile, v += width * kTile) {
        tile_load<6>(weights);
        tile_load<7>(v);
        tile_multiply<0, 6, 7>();
        pace.tick();
        if (COLUMNS > 1) {
            tile_load<7>(v + kTile);
            tile_multiply<1, 6, 7>();
            pace.tick();
        }
        if (COLUMNS > 2) {
            tile_load<7>(v + 2 * kTile);
            tile_multiply<2, 6, 7>();
            pace.tick();
        }
        tile_load<6>(weights + kTile);
        tile_load<7>(v);
        tile_multiply<3, 6, 7>();
        pace.tick();
        if (COLUMNS > 1) {
            tile_load<7>(v + kTile);
            tile_multiply<4, 6, 7>();
            pace.tick();
        }
        if (COLUMNS > 2) {
            tile_load<7>(v + 2 * kTile);
            tile_multiply<5, 6, 7>();
            pace.tick();
        }
    }
    tile_store<0>(out);
    if (COLUMNS > 1) tile_store<1>(out + kTile);
    if (COLUMNS > 2) tile_store<2>(out + 2 * kTile);
    tile_store<3>(below);
    if (COLUMNS > 1) tile_store<4>(below + kTile);
    if (COLUMNS > 2) tile_store<5>(below + 2 * kTile);
}

template <class P>
[[gnu::always_inline]] inline void multiply_all_values(const char* weights, const char* v, char* out, int chunks,
                                                       int64_t width, bool first, P& pace) {
    int64_t left = width;
    for (; left > 4 || left == 3; left -= 3, v += 3 * kTile, out += 3 * kTile)
        multiply_values<3>(weights, v, out, chunks, width, first, pace);
    for (; left >= 2; left -= 2, v += 2 * kTile, out += 2 * kTile)
        multiply_values<2>(weights, v, out, chunks, width, first, pace);
    if (left) multiply_values<1>(weights, v, out, chunks, width, first, pace);
}

// One sweep of `groups` times 32 queries over all keys of a head, in steps of 32 queries and 64 keys. The output is
// loaded and stored at every step.
template <int DEPTH, int WIDTH, bool CAUSAL>
class WideSweep {
public:
    WideSweep(const latentrt_attention_args& args, const Sizes& sizes, const Scratch& scratch)
        : sizes_(sizes), scratch_(scratch), keys_(args.keys), factor_(256 * kLog2e * args.scale), table_(curvature()) {}

    // exact: start from each row's true maximum instead of that of the first block.
    void run(int64_t query, int64_t groups, bool exact) {
        const Curve curve{_mm512_set1_ps(factor_), table_};
        const int64_t steps = sizes_.blocks * groups;
        Idle idle;
        if (exact) {
            for (int64_t t = 0; t < steps; t++) {
                scores(at(t, groups), idle);
                find_bias(curve, at(t, groups), query);
            }
        }
        scores(at(0, groups), idle);
        for (int64_t t = 0; t <= steps; t++) {
            const Step before = at(t - 1, groups), now = at(t, groups), after = at(t + 1, groups);
            const bool last = t == steps;
            if (!last && !exact && now.block == 0) find_bias(curve, now, query);
            const float* bias = scratch_.bias + now.group * kRows;
            const int instructions =
                (t ? 2 * width() * before.chunks : 0) + (t + 1 < steps ? 4 * depth() * after.chunks : 0);
            Softmax<kScoreStride, CAUSAL> softmax{curve,
                                                  now.scores,
                                                  now.weights,
                                                  bias,
                                                  last ? bias : bias + kRows,
                                                  now.chunks == 2,
                                                  query + now.group * kRows - now.block * kKeys,
                                                  instructions * 256 / kRows};
            if (t + 1 < steps) scores(after, softmax);
            if (t > 0) values(before, softmax);
            softmax.finish();
        }
    }

private:
    struct Step {
        int64_t block, group;
        int chunks;
        char *scores, *weights;
    };

    int64_t depth() const { return DEPTH ? DEPTH : sizes_.depth; }
    int64_t width() const { return WIDTH ? WIDTH : sizes_.width; }

    Step at(int64_t t, int64_t groups) const {
        const int64_t block = t / groups;
        return {block, t % groups, block * kKeys + 32 < keys_ ? 2 : 1, scratch_.scores + (t & 1) * kRows * kScoreStride,
                scratch_.weights + (t & 1) * 4 * kTile};
    }

    template <class P>
    [[gnu::always_inline]] void scores(const Step& step, P& pace) const {
        multiply_keys<DEPTH>(scratch_.q + step.group * 2 * depth() * kTile,
                             scratch_.k + step.block * 4 * depth() * kTile, step.scores, step.chunks, depth(), pace);
    }

    template <class P>
    [[gnu::always_inline]] void values(const Step& step, P& pace) const {
        multiply_all_values(step.weights, scratch_.v + step.block * 2 * width() * kTile,
                            scratch_.out + step.group * 2 * width() * kTile, step.chunks, width(), step.block == 0,
                            pace);
    }

    void find_bias(const Curve& curve, const Step& step, int64_t query) const {
        raise_bias<kScoreStride, CAUSAL>(curve, step.scores, scratch_.bias + step.group * kRows, kRows, step.chunks,
                                         query + step.group * kRows - step.block * kKeys, step.block == 0);
    }

    const Sizes sizes_;
    const Scratch scratch_;
    const int64_t keys_;
    const float factor_;
    const __m512i table_;
};

// The same for outputs of up to five tiles, which stay in registers for 128 keys: steps of 16 queries and 32 keys.
template <int DEPTH, int WIDTH, bool CAUSAL>
class NarrowSweep {
public:
    NarrowSweep(const latentrt_attention_args& args, const Sizes& sizes, const Scratch& scratch)
        : scratch_(scratch), chunks_((args.keys + 31) / 32), factor_(256 * kLog2e * args.scale), table_(curvature()) {
        static_assert(WIDTH <= 5);
        (void)sizes;
    }

    void run(int64_t query, int64_t groups, bool exact) {
        const Curve curve{_mm512_set1_ps(factor_), table_};
        tiles_ = 2 * groups;
        Idle idle;
        if (exact) {
            for (Step step = first(); step.chunk < chunks_; step = next(step)) {
                scores(step, idle);
                find_bias(curve, step, query);
            }
        }
        Step before{}, now = first();
        scores(now, idle);
        for (bool started = false;; started = true) {
            const Step after = next(now);
            const bool more = after.chunk < chunks_;
            if (!exact && now.chunk == 0) find_bias(curve, now, query);
            const float* bias = scratch_.bias + now.tile * 16;
            const int instructions = (started ? WIDTH : 0) + (more ? 2 * DEPTH : 0);
            Softmax<kStride, CAUSAL> softmax{curve,
                                             score_buffer(now),
                                             weight_buffer(now),
                                             bias,
                                             bias + 16,
                                             false,
                                             query + now.tile * 16 - now.chunk * 32,
                                             instructions * 256 / 16};
            if (more) scores(after, softmax);
            if (started) values(before, softmax);
            softmax.finish();
            before = now;
            now = after;
            if (!more) break;
        }
        values(before, idle);
    }

private:
    static constexpr int kStride = 128; // bytes of a row of scores
    static constexpr int kBlock = 4;    // chunks of 32 keys that go with an output in registers

    struct Step {
        int64_t chunk, tile;
        int parity;
    };

    Step first() const { return {0, 0, 0}; }

    Step next(Step step) const {
        step.parity ^= 1;
        step.chunk++;
        if (step.chunk % kBlock == 0 || step.chunk == chunks_) {
            if (++step.tile < tiles_) step.chunk = (step.chunk - 1) / kBlock * kBlock;
            else step.tile = 0;
        }
        return step;
    }

    char* score_buffer(const Step& step) const { return scratch_.scores + step.parity * 16 * kStride; }
    char* weight_buffer(const Step& step) const { return scratch_.weights + step.parity * kTile; }

    template <class P>
    [[gnu::always_inline]] void scores(const Step& step, P& pace) const {
        const char* q = scratch_.q + step.tile * DEPTH * kTile;
        const char* k = scratch_.k + step.chunk * 2 * DEPTH * kTile;
        char* to = score_buffer(step);
        if constexpr (WIDTH <= 3) {
            tile_zero<3>(), tile_zero<4>();
#pragma GCC unroll 4
            for (int i = 0; i < DEPTH; i++) {
                tile_load<5>(q + i * kTile);
                tile_load<6>(k + i * kTile);
                tile_multiply<3, 5, 6>();
                pace.tick();
                tile_load<7>(k + (DEPTH + i) * kTile);
                tile_multiply<4, 5, 7>();
                pace.tick();
            }
            tile_store<3>(to, kStride);
            tile_store<4>(to + 64, kStride);
        } else {
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                tile_zero<5>();
#pragma GCC unroll 4
                for (int i = 0; i < DEPTH; i++) {
                    tile_load<6>(q + i * kTile);
                    tile_load<7>(k + (half * DEPTH + i) * kTile);
                    tile_multiply<5, 6, 7>();
                    pace.tick();
                }
                tile_store<5>(to + 64 * half, kStride);
            }
        }
    }

    template <class P>
    [[gnu::always_inline]] void values(const Step& step, P& pace) const {
        const char* v = scratch_.v + step.chunk * WIDTH * kTile;
        char* out = scratch_.out + step.tile * WIDTH * kTile;
        if (step.chunk == 0) {
            tile_zero<0>(), tile_zero<1>(), tile_zero<2>();
            if constexpr (WIDTH > 3) tile_zero<3>(), tile_zero<4>();
        } else if (step.chunk % kBlock == 0) {
            tile_load<0>(out), tile_load<1>(out + kTile), tile_load<2>(out + 2 * kTile);
            if constexpr (WIDTH > 3) tile_load<3>(out + 3 * kTile), tile_load<4>(out + 4 * kTile);
        }
        constexpr int A = WIDTH <= 3 ? 5 : 6;
        tile_load<A>(weight_buffer(step));
        tile_load<7>(v);
        tile_multiply<0, A, 7>();
        pace.tick();
        tile_load<7>(v + kTile);
        tile_multiply<1, A, 7>();
        pace.tick();
        tile_load<7>(v + 2 * kTile);
        tile_multiply<2, A, 7>();
        pace.tick();
        if constexpr (WIDTH > 3) {
            tile_load<7>(v + 3 * kTile);
            tile_multiply<3, A, 7>();
            pace.tick();
            tile_load<7>(v + 4 * kTile);
            tile_multiply<4, A, 7>();
            pace.tick();
        }
        if (step.chunk % kBlock == kBlock - 1 || step.chunk + 1 == chunks_) {
            tile_store<0>(out), tile_store<1>(out + kTile), tile_store<2>(out + 2 * kTile);
            if constexpr (WIDTH > 3) tile_store<3>(out + 3 * kTile), tile_store<4>(out + 4 * kTile);
        }
    }

    void find_bias(const Curve& curve, const Step& step, int64_t query) const {
        raise_bias<kStride, CAUSAL>(curve, score_buffer(step), scratch_.bias + step.tile * 16, 16, 1,
                                    query + step.tile * 16 - step.chunk * 32, step.chunk == 0);
    }

    const Scratch scratch_;
    const int64_t chunks_;
    int64_t tiles_ = 0;
    const float factor_;
    const __m512i table_;
};

}  // namespace
}  // namespace latentrt
