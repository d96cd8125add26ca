// Schemas of the expert routing; the CPU and CUDA implementations register themselves in files of their own.
//
// N tokens, E experts (<= 1024), K = k choices (<= E), P = len(capacity) pools (<= 256), M = num_modalities,
// R = max_rows. Scalars of the gate are fp32, or fp64 where the logits are (CPU only). Nothing waits for the host.
//
// moe_route
//   logits [N, E] contiguous fp32, bf16, fp16, fp64; noise [N, E] of the gate's dtype, added to make the noisy logits;
//   modality, pool uint8 [N] (none = 0); valid bool [N] (none = all); capacity per (expert, pool), -1 = dropless;
//   policy "bpr" | "position" | "probs"; slot_order "token" | "priority".
//   index    int32 [N, K]: the K largest noisy logits, larger first, equal ones by lower expert.
//   weight   [N, K]: softmax of the noisy logits at index; with renormalize divided by its sum over the K choices.
//   A choice (token, k) asks for a row of its expert unless the token is invalid or its noisy logit is -inf.
//   Of one (expert, pool), at most `capacity` choices are kept: the first ones by
//     bpr       k, then weight of the token's first choice before renormalisation (larger first), then token
//     position  k, then token
//     probs     own weight before renormalisation (larger first), then token.
//   load     int32 [E, P]: choices that asked; kept int32 [E, P]: choices kept.
//   Rows: expert after expert, each from a multiple of `align`; in it pool after pool without a gap; in a pool by token
//   or, with slot_order "priority", in the order above. offs int32 [E]: end of each expert, a multiple of `align`.
//   slot     int32 [N, K]: row of the choice, -1 = none; src int32 [R]: token * K + k of the row, -1 = none.
//   max_rows must be at least the bound that `dsvlm.ops.moe_routing.rows_bound` computes from N, E, K, capacity, align.
//   Sums over the valid tokens of each modality, p = softmax of the clean logits (0 log 0 = 0):
//   prob_sum [M, E] of p; ent_sum [M] of -sum_e p log p; z2_sum [M] of lse^2; loadp_sum [M, E] of
//   Phi((z - eta) / load_sigma), z clean, eta the K-th largest noisy logit (0 where z is -inf; all 0 at load_sigma 0).
//   lse      [N]: logsumexp of the clean logits.
//   A bad row (valid, noisy logits with NaN or +inf, or all -inf) has index 0..K-1, weight and lse NaN, adds NaN to
//   its sums, asks for rows as any other, and comes last among equal k (probs: last of all); bad_rows int32 [] counts
//   them. An invalid row has index 0..K-1, weight and lse 0, slot -1, and its values are never used.
//   modality >= M and pool >= P: refused on the CPU, taken as the last one on CUDA.
// moe_route_backward: the gradient of all differentiable outputs in one pass; none = no gradient came. A bad row gets
//   NaN, an invalid one 0; noise gets none.
// moe_permute: x [N, d] -> [R, d], row r = x[src[r] / K], zeros where src is -1.
// moe_combine: y [R, d] -> [N, d], sum over k of weight * y[slot], added in order of k in fp32 (fp64), rounded once.
//   Rows with slot -1 are never read. x and y: fp32, bf16, fp16, fp64 (CPU), contiguous; weight fp32 (fp64 with fp64).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(dsvlm, m) {
  m.def(
      "moe_route(Tensor logits, Tensor? noise, Tensor? modality, Tensor? valid, Tensor? pool, int k, int[] capacity,"
      " int max_rows, int align, str policy, str slot_order, bool renormalize, int num_modalities, float load_sigma)"
      " -> (Tensor weight, Tensor index, Tensor slot, Tensor src, Tensor offs, Tensor load, Tensor kept,"
      " Tensor prob_sum, Tensor ent_sum, Tensor z2_sum, Tensor loadp_sum, Tensor lse, Tensor bad_rows)");
  m.def(
      "moe_route_backward(Tensor? grad_weight, Tensor? grad_prob_sum, Tensor? grad_ent_sum, Tensor? grad_z2_sum,"
      " Tensor? grad_loadp_sum, Tensor logits, Tensor? noise, Tensor? modality, Tensor? valid, Tensor index, Tensor lse,"
      " bool renormalize, float load_sigma) -> Tensor grad_logits");
  m.def("moe_permute(Tensor x, Tensor src, Tensor slot) -> Tensor");
  m.def("moe_permute_backward(Tensor grad_out, Tensor src, Tensor slot) -> Tensor grad_x");
  m.def("moe_combine(Tensor y, Tensor weight, Tensor slot, Tensor src) -> Tensor");
  m.def(
      "moe_combine_backward(Tensor grad_out, Tensor y, Tensor weight, Tensor slot, Tensor src)"
      " -> (Tensor grad_y, Tensor grad_weight)");
}
