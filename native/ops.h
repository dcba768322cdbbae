// The op contract: everything a device can do. One argument struct an op, one virtual function a backend.
//
// Layouts: activations row-major [tokens, channels]; images NHWC; attention [tokens, heads, head_dim] packed
// with cumulative lengths (varlen); KV in pages [page, kv_heads, page_size, head_dim]. "rows may be strided"
// means that only the last dimension (or, for [T, H, D], the last two) must be contiguous.
//
// A is the type of activations: f32 on the CPU; on CUDA bf16 or f16, and f32 too for ops that multiply no
// matrices (Device::computes_in). An op's activations are all of one type, its sums f32, and each result is
// rounded to A once. What is no activation (biases, norms, layer scales, depthwise weights) is f32.
//
// Everything marked optional may be an empty View. Shapes and dtypes have been checked (native/ops.cpp)
// before a backend sees them. Every result of a row depends on that row's inputs alone, bit for bit: a
// reduction's order is fixed by the reduced length, never by how many rows share the call.
#pragma once
#include "runtime/view.h"

namespace mgm {

enum class Activation : uint8_t { none, gelu, gelu_tanh, quick_gelu, silu };  // gelu: exact, with erf

// out = cast(x), contiguous; f32, bf16, f16 to each other. x may have any strides.
struct CastArgs {
  View x, out;
};

// out = x with its dimensions permuted, contiguous: out.shape[i] = x.shape[dims[i]]. Any dtype of 1, 2 or 4
// bytes.
struct PermuteArgs {
  View x, out;
  int dims[kMaxRank];
};

// out[n,k] = w[n,k] * scale[k]; w and out A.
struct ScaleColumnsArgs {
  View w, scale, out;
};

// Packs `count` weight matrices [n_i, K] (f32, bf16 or f16; rows may be strided), stacked along n, into out
// [N, K] (layout panels, or gated_panels when N = 2n and row r gates row n + r). out.dtype is the storage
// type; int8 and int4 are quantized per block along K.
struct PackLinearArgs {
  const View* weights;
  int count;
  View out;
};

// out[m] = residual[m % R] + scale * act(x[m] W^T + bias);  gated: act(x[m] Wgate^T + bias_gate) * (x[m]
// Wup^T + bias_up)
struct LinearArgs {
  View x;         // A [M, K], rows may be strided
  View w;         // panels [N, K] or gated_panels [2N, K]; on CUDA of type A, int8 or int4
  View bias;      // optional [N] (gated: [2N]) f32
  View scale;     // optional [N] f32, ConvNeXt's layer scale
  View residual;  // optional A [R, N], M % R == 0, rows may be strided; may be the same memory as out when
                  // R == M
  Activation activation;
  View out;  // A or f32 [M, N]
};

// Mixtral's router: softmax over E in f32, the k largest (lowest index first on ties), renormalized to sum 1.
struct MoeRouteArgs {
  View logits /*[T, E]*/, weights /*out f32 [T, k]*/, ids /*out i32 [T, k]*/;
};

// Without `weights` (gather): x [T, K], out [T*k, N], out[t*k+j] = act/gated(x[t] W_{ids[t,j]}^T).
// With `weights` (scatter):   x [T*k, K], out [T, N], out[t] = residual[t] + sum_j weights[t,j] * x[t*k+j]
// W_{ids[t,j]}^T, j in order.
struct GroupedLinearArgs {
  View x;         // A, rows may be strided
  const View* w;  // `experts` packed matrices of one shape
  int experts;
  View ids;       // i32 [T, k]
  View weights;   // optional f32 [T, k]
  View residual;  // optional A [T, N], only with weights
  Activation activation;
  View out;  // A
};

// Convolution as a GEMM over patches packed on the fly. w: panels [O, kh*kw*C], patch order (kh, kw, C). The
// image convolved is x, or x resized to height x width by nearest neighbour (pixel (y, x) of the resized
// image is x's (y * H / height, x * W / width), rounded down), which is never stored. Around it lie zeros,
// `pad_before` rows and columns above and left, `pad_after` below and right. residual row of output position
// r (over B*OH*OW, row-major) is r % R: CLIP adds its position embedding that way.
struct Conv2dArgs {
  View x;                // A [B, H, W, C]
  View w;                // as in LinearArgs, not quantized
  View bias;             // optional [1, O] or [B, O] f32, rows may be strided: row b for image b
  View scale, residual;  // as in LinearArgs; residual [R, O]
  int kernel_h, kernel_w, stride, pad_before, pad_after;
  int height, width;  // of the image convolved: x's own, or what it is resized to
  Activation activation;
  View out;  // A [B, OH, OW, O]
};

// LayerNorm over C of bias + depthwise conv (stride 1, zero padding kh/2, kw/2).
struct DepthwiseConvNormArgs {
  View x;                       // A [B, H, W, C]
  View w;                       // [kh, kw, C] f32
  View bias;                    // [C]
  View norm_weight, norm_bias;  // [C]
  float eps;
  View out;  // A [B, H, W, C]
};

// sum = x + residual (if given; `sum` is then written too); out = sum / sqrt(mean(sum^2) + eps) * (weight +
// weight_offset)
struct RmsNormArgs {
  View x, residual, weight;
  float eps, weight_offset;
  View out, sum;
};  // x, residual, out, sum A [T, C]; rows may be strided

// The same with mean and bias.
struct LayerNormArgs {
  View x, residual, weight, bias;
  float eps;
  View out, sum;
};

// GroupNorm of each image: mean and variance over the pixels and the channels of a group. The channels are
// those of x, then those of `more` (a UNet's skip connection), (C + C2) / groups to a group.
struct GroupNormArgs {
  View x;             // A [B, H, W, C]
  View more;          // optional A [B, H, W, C2]
  View weight, bias;  // f32 [C + C2]
  int groups;
  float eps;
  Activation activation;  // none or silu
  View out;               // A [B, H, W, C + C2]
};

// Varlen softmax attention. Sequence b: queries cu_q[b]..cu_q[b+1], keys cu_k[b]..cu_k[b+1]. Causal masks
// align the ends: query i of n sees keys j <= i + (n_k - n_q). heads % kv_heads == 0 (GQA/MQA). A query
// without keys gives zeros.
struct AttentionArgs {
  View q;           // A [Tq, H, D], rows may be strided
  View k, v;        // A [Tk, KV, D], rows may be strided
  View cu_q, cu_k;  // i32 [B+1]
  float scale;
  bool causal;
  View out;  // A [Tq, H, D]
};

// Causal attention of the newest queries of each sequence over its KV pages (decode and chunked prefill).
// Query j of the n of sequence b has position context_lens[b] - n + j and sees all positions up to its own.
// Queries behind cu_q[B] belong to no sequence and give zeros: a recorded step is padded with them.
struct PagedAttentionArgs {
  View q;                 // A [T, H, D], rows may be strided
  View k_pages, v_pages;  // [pages, KV, page_size, D] f32, bf16 or f16; on CUDA A
  View block_table;       // i32 [B, max_blocks]
  View cu_q;              // i32 [B+1]
  View context_lens;      // i32 [B], the new tokens included
  float scale;
  View out;  // A [T, H, D]
};

// Rotates q and k (halves rotated, HF's rotate_half) by f32 angles position * inv_freq[i]; writes k and v to
// their slots (page * page_size + offset; negative: not stored) and q to out.
struct RopeAndCacheArgs {
  View qkv;               // A [T, (H + 2*KV) * D], rows may be strided
  View positions, slots;  // i32 [T]
  View inv_freq;          // f32 [D/2]
  View k_pages, v_pages;  // [pages, KV, page_size, D] f32, bf16 or f16, written
  View out;               // A [T, H, D]
};

// Patch info mining without ever projecting or building the concatenated map (docs/architecture.md, section
// 4). x(p) = the concatenated map at position p: every stage bilinearly upsampled (align_corners=false) to
// stage 0's size and, if downscale > 1, that map bilinearly scaled by 1/downscale. Query i (row-major in a
// grid x grid) sees the m x m positions of its window, m = (S0 / downscale) / grid.
//   mu(p), r(p): mean and 1/sqrt(var + eps) of x(p) over all channels
//   logit(i,p) = nan_to_num(scale * r(p) * (g_i . x(p) - mu(p) * sum(g_i)));  a = softmax over the window
//   out_i = sum_p a(i,p) * r(p) * (x(p) - mu(p))
// bias(i), the optional last column of g, is added inside the nan_to_num: scale * (r(p) * (...) + bias(i)).
// Softmax ignores it, but it decides the sign of a score that overflows.
struct PatchMiningArgs {
  View g;          // f32 [B*grid*grid, C_total or C_total + 1]
  View stages[4];  // A [B, H_s, W_s, c_s], NHWC, sum of c_s = C_total; all four given
  int grid, downscale;
  float eps, scale;
  View out;  // A [B*grid*grid, C_total]
};

// PyTorch's bilinear interpolate, align_corners=false, antialias=false; source coordinates in f32 as PyTorch
// computes them.
struct ResizeBilinearArgs {
  View x /*A [B, H, W, C]*/, out /*[B, OH, OW, C]*/;
};

// out[t] = scale * table[ids[t]]; a negative id gives zeros. table: strided f32/bf16/f16, or panels of any
// storage type. out: A, or f32.
struct EmbeddingArgs {
  View table /*[V, C]*/, ids /*i32 [T]*/;
  float scale;
  View out /*[T, C]*/;
};

// out[p] = index[p] >= 0 ? text[index[p]] : image[-1 - index[p]]; text, image and out A
struct SpliceEmbeddingsArgs {
  View text /*[T, C]*/, image /*[M, C]*/, index /*i32 [P]*/, out /*[P, C]*/;
};

// One next token a row. Order: token mask, penalties over history, then greedy (temperature 0) or
// temperature, top-k, top-p, min-p, inverse-CDF draw with Philox4x32-10 keyed by (seed, step). A row with a
// NaN logit, or no allowed token, yields id -1.
struct SampleArgs {
  View logits;    // f32 [B, V], rows may be strided
  View options;   // f32 [B, 6]: temperature, top_p, min_p, repetition, presence, frequency (off: 0, 1, 0, 1,
                  // 0, 0)
  View state;     // i32 [B, 5]: top_k (0 = off), seed low, seed high, step, history length
  View history;   // optional i32 [B, H]: ids that penalties see
  View mask;      // optional u8 [B, ceil(V/8)]: bit v of a row set = token v allowed
  View ids;       // out i32 [B]
  View logprobs;  // out f32 [B, 1 + n]: of the chosen id, then of the n most likely; log_softmax of the raw
                  // logits
  View top_ids;   // out i32 [B, n]; n may be 0 (empty View)
};

// One step of a diffusion sampler, f32. Row b of coefficients: guidance g, then factors p_x, p_m, c_x, c_m,
// c_p, c_n, s. Absent terms are zero.
//   m         = model[b], or with two halves of B images  model[b] + g * (model[B + b] - model[b])
//   predicted = p_x * x + p_m * m
//   out       = c_x * x + c_m * m + c_p * previous + c_n * noise
//   input     = s * out, rounded to A: what the network sees next, once or as two equal halves
struct SchedulerStepArgs {
  View x;                // f32 [B, H, W, C]
  View model;            // optional A [B or 2B, H, W, C]
  View coefficients;     // f32 [B, 8]
  View previous, noise;  // optional f32 [B, H, W, C]
  View out, predicted;   // f32 [B, H, W, C]; predicted only with model
  View input;            // A [B or 2B, H, W, C]
};

// Standard normal numbers: Philox4x32-10, key (low, high), counter (i / 4, 0, stream, 0), where element i of
// a row takes the (i % 4)-th of four Box-Muller results: words (0, 1) give the first two, words (2, 3) the
// others.
//   u = (word + 0.5) * 2^-32;  radius = sqrt(-2 ln u_0);  radius * cos(2 pi u_1), radius * sin(2 pi u_1)
struct RandomNormalArgs {
  View seeds;  // i32 [B, 3]: key low, key high, stream
  View out;    // f32 [B, N], contiguous
};

// out = round(min(max(scale * x + offset, 0), 255)), ties to even; NaN gives 0.
struct ToUint8Args {
  View x;  // A, contiguous
  float scale, offset;
  View out;  // u8, contiguous
};

// canvas[b, y + i, x + j, :] += rows[i] * columns[j] * tile[b, i, j, :]. Overlapping tiles whose weights add
// up to one blend.
struct AddTileArgs {
  View canvas;         // f32 [B, H, W, C], written
  View tile;           // A [B, h, w, C]
  View rows, columns;  // f32 [h], [w]
  int y, x;
};

// clang-format off
// Every op once: X(function name of a backend, argument struct).
#define MGM_OPS(X)                                 \
  X(cast, CastArgs)                                \
  X(permute, PermuteArgs)                          \
  X(scale_columns, ScaleColumnsArgs)               \
  X(pack_linear, PackLinearArgs)                   \
  X(linear, LinearArgs)                            \
  X(moe_route, MoeRouteArgs)                       \
  X(grouped_linear, GroupedLinearArgs)             \
  X(conv2d, Conv2dArgs)                            \
  X(depthwise_conv_norm, DepthwiseConvNormArgs)    \
  X(rms_norm, RmsNormArgs)                         \
  X(layer_norm, LayerNormArgs)                     \
  X(group_norm, GroupNormArgs)                     \
  X(attention, AttentionArgs)                      \
  X(paged_attention, PagedAttentionArgs)           \
  X(rope_and_cache, RopeAndCacheArgs)              \
  X(patch_mining, PatchMiningArgs)                 \
  X(resize_bilinear, ResizeBilinearArgs)           \
  X(embedding, EmbeddingArgs)                      \
  X(splice_embeddings, SpliceEmbeddingsArgs)       \
  X(sample, SampleArgs)                            \
  X(scheduler_step, SchedulerStepArgs)             \
  X(random_normal, RandomNormalArgs)               \
  X(to_uint8, ToUint8Args)                         \
  X(add_tile, AddTileArgs)
// clang-format on

}  // namespace mgm
