// What the CPU attention hands to the code of one instruction set: plain data, nothing inline.
#pragma once

#include <cstdint>

#include "mask.h"

namespace dsvlm {

enum class Element { f32, f64, bf16 };

// A [batch, row, head, dim] tensor; strides in elements, that of dim is 1.
struct Operand {
  void* data;
  int64_t batch, row, head;
};

// Queries that share no key with other queries, and the keys they see: work that is independent of all other spans.
struct Span {
  int64_t query_begin, query_end;
  int64_t key_begin, key_end;  // hull of what they see; empty if they are all padding
  int64_t own_begin, own_end;  // keys whose gradients this span writes: the hull and what nobody sees beside it
};

struct Attention {
  Element element;
  int64_t queries, keys, heads, kv_heads, dim;
  Operand q, k, v, out;
  Operand grad_out, grad_q, grad_k, grad_v;  // backward only
  void* lse;                                 // [batch, heads, queries], fp32, fp64 for fp64
  const float* slopes;                       // [heads] or null
  double scale;
};

// One span of one batch row and one key-value head, with all query heads of its group.
struct Task {
  int64_t batch, kv_head;
  const Row* rows;      // of this batch row, by query; empty ones are (0, 0)
  const uint8_t* live;  // of this batch row, by key: some query sees it
  Span span;
};

}  // namespace dsvlm
