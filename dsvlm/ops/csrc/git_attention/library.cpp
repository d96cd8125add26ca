// Schemas of the GIT attention; the CPU and CUDA implementations register themselves in files of their own.
//
// q [B, Sq, H, D], k and v [B, Sk, Hk, D], H a multiple of Hk, last dimension contiguous, other strides free;
// rows int32 [B or 1, Sq, 2], see mask.h; out [B, Sq, H, D]; lse [B, H, Sq], natural logarithm, -inf for empty rows;
// alibi_slopes fp32 [H] add slope * (key - (query + Sk - Sq)) to the scaled scores.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(dsvlm, m) {
  m.def(
      "git_attention_forward(Tensor q, Tensor k, Tensor v, Tensor rows, Tensor? alibi_slopes, float scale)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "git_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor rows,"
      " Tensor? alibi_slopes, float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  // uint8 [B or 1, query tiles, key tiles]: 0 skip, 1 partial, 2 full; what the kernels decide, for tests.
  m.def("git_mask_tiles(Tensor rows, int kv_len, int query_tile, int key_tile) -> Tensor");
}
