// The C interface of the selection kernels: what the TensorRT plugins, the PyTorch ops and the host tests all call.
//
// Shapes are row major and contiguous. B = batch, L = length, D = dim, H = heads, d = head_dim. The tokens that a
// reduction may touch are the n*unit rows of x from `start` on: n groups of `unit` neighbouring rows, of which k groups
// stay. All other rows are copied. The result has length L - (n - k)*unit.
//
// Every launcher only enqueues on `stream`: no allocation, no synchronisation, no host memory read after it returns, so
// it may be captured in a CUDA graph. `workspace` is device memory of at least the size that the function of the same
// name with `_workspace` gives, aligned to 256 bytes; outputs must not overlap inputs. Results do not depend on
// scheduling: sums are taken in a fixed order and equal scores go to the lower index. Similarities, norms and sums are
// float32.
//
// Any input, NaN and infinity too, gives indices that are in range and all different, and sizes that merging conserves;
// the values computed from a NaN or infinity are NaN or infinite, all others are not touched by it (EViT's fused token
// leaves kept rows out). NaN ranks above all scores, -0 equals 0. Results equal those of plain PyTorch, index for
// index, but where scores are closer than the rounding of a float32 sum, or where the squares of a row overflow
// float32.
//
// Returned: 0, or a cudaError_t; cudaErrorInvalidValue (1) for arguments that make no sense, before anything is
// enqueued: a NULL pointer other than text, size, index, new_size or assign; a shape that does not add up, for which the
// workspace's size is given as 0; or one above the limits: n up to 16,384 (tc_topk 65,536, tc_divprune 8,192), dim and
// head_dim 8,192, unit 4,096, heads 1,024, batch 65,535, length and tap_length 2^24, width 2^20, 1,024 pivots of a kind. Merging removes
// at most n / 2 groups. k = n copies x.
#ifndef TOKCOMPILE_LAUNCH_H
#define TOKCOMPILE_LAUNCH_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TC_API __attribute__((visibility("default")))

typedef void* tc_stream;  // a cudaStream_t

enum { TC_F32 = 0, TC_F16 = 1, TC_BF16 = 2 };

typedef struct {
  int32_t dtype;                  // of x, normed, q, k, v and attention rows: TC_F32, TC_F16 or TC_BF16
  int32_t batch, length, dim;     // x: (B, L, D)
  int32_t start, n, k, unit;      // which rows are reduced, and to how many groups
  int32_t tap_length, tap_start;  // length of the taps, and where the n*unit rows begin in them
  int32_t heads, head_dim;        // of keys: (B, H, tap_length, d) and attention rows: (B, H, tap_length)
} tc_shape;

// index, new_size and assign may be NULL where they are not wanted. index: (B, k) int64, counted in groups from
// `start`. assign: (B, n) int64, the slot of `index` each old group went to; for pruning the kept group most like it
// (cosine of x, float32, lower slot among equals). size: (B, n) float32 original tokens per group, NULL for ones;
// new_size: (B, k).

// Text in a language model: rows of the taps in `spans` runs, from edges[2 i] to before edges[2 i + 1], ascending and not
// overlapping. Up to `pivots` of its tokens are pivots.
#define TC_TEXT_SPANS 128
typedef struct {
  int32_t pivots, spans;
  int32_t edges[2 * TC_TEXT_SPANS];
} tc_text;

// DART: pivots are the `pivots` groups of largest key L1 norm and then, where `text` is not NULL, the text tokens of
// largest norm; each in turn picks its share of the least similar groups (cosine of `normed`) that are still free. Text
// only where unit is 1. index ascends. keys: (B, H, tap_length, d), normed: (B, tap_length, D).
TC_API size_t tc_dart_workspace(const tc_shape* s, int32_t pivots, const tc_text* text);
TC_API int32_t tc_dart(const tc_shape* s, int32_t pivots, const tc_text* text, const void* x, const void* normed,
                       const void* keys, void* out, int64_t* index, int64_t* assign, void* workspace, tc_stream stream);

// Top-K: the k groups of largest score, mean over the heads of attention: (B, H, tap_length); index ascends.
// With fuse != 0 (EViT): k - 1 kept groups, then one that is the sum of score_j * x_j over all others; its index is the
// best of them.
TC_API size_t tc_topk_workspace(const tc_shape* s, int32_t fuse);
TC_API int32_t tc_topk(const tc_shape* s, int32_t fuse, const void* x, const float* size, const void* attention, void* out,
                       int64_t* index, float* new_size, int64_t* assign, void* workspace, tc_stream stream);

// ToMe: the n - k groups of even position (counted over the whole sequence, which has tap_start / unit groups before
// them) most like one of odd position join it, as the mean weighted by size. Similarity: cosine of the keys' mean over
// heads. The even ones that stay come in their order, or by falling similarity where no group stands before, as
// published.
TC_API size_t tc_tome_workspace(const tc_shape* s);
TC_API int32_t tc_tome(const tc_shape* s, const void* x, const float* size, const void* keys, void* out, int64_t* index,
                       float* new_size, int64_t* assign, void* workspace, tc_stream stream);

// PiToMe: groups ranked by energy, mean over all groups of ELU(cosine - margin); those of even rank join the most
// similar one of odd rank. all != 0 pairs all groups (variant B), else the 2 (n - k) of highest energy (variant P).
TC_API size_t tc_pitome_workspace(const tc_shape* s, int32_t all);
TC_API int32_t tc_pitome(const tc_shape* s, int32_t all, float margin, float alpha, const void* x, const float* size,
                         const void* keys, void* out, int64_t* index, float* new_size, int64_t* assign, void* workspace,
                         tc_stream stream);

// DivPrune: greedy max-min cosine distance of x; the first pick is the group farthest from its nearest neighbour.
TC_API size_t tc_divprune_workspace(const tc_shape* s);
TC_API int32_t tc_divprune(const tc_shape* s, const void* x, void* out, int64_t* index, int64_t* assign, void* workspace,
                           tc_stream stream);

// The parts, for one plan that drives several tensors. `width` counts elements of `dtype` per row.
// top-k select: the k largest of scores: (B, n) float32, ascending by position if sorted != 0, else best first; NaN
// ranks highest. Any k <= n <= 65,536.
TC_API size_t tc_select_workspace(int32_t batch, int32_t n, int32_t k);
TC_API int32_t tc_select(int32_t batch, int32_t n, int32_t k, int32_t sorted, const float* scores, int64_t* index,
                         void* workspace, tc_stream stream);
// out[b, i] = x[b, index[b, i]] for each of `count` tensors: x[t]: (B, n, width[t]) -> out[t]: (B, k, width[t]).
TC_API int32_t tc_gather(int32_t count, int32_t batch, int32_t n, int32_t k, const int32_t* dtype, const int32_t* width,
                         const void* const* x, const int64_t* index, void* const* out, tc_stream stream);
// Size-weighted mean: slot j of out is index[b, j] and every sources[b, i] whose slots[b, i] is j.
// index: (B, k), sources, slots: (B, n - k). Indices out of range are read as the nearest one in range.
TC_API int32_t tc_merge(int32_t count, int32_t batch, int32_t n, int32_t k, const int32_t* dtype, const int32_t* width,
                        const void* const* x, const float* size, const int64_t* index, const int64_t* sources,
                        const int64_t* slots, void* const* out, float* new_size, tc_stream stream);

#ifdef __cplusplus
}
#endif
#endif
