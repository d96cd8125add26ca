// The backward pass of one task on the CPU: five products a block, weights computed again from the saved lse.
#include <initializer_list>

#include "cpu.h"
#include "cpu_tiles.h"

namespace dsvlm::DSVLM_ISA {
namespace {

template <class T>
struct BackwardScratch {
  T *keys, *values, *grad_keys, *grad_values;      // [key, pitch]
  T *query, *grad_out, *grad_query;                // [dim, lane]
  T *query_rows, *grad_out_rows;                   // [lane, pitch]
  T *weight, *grad_score;                          // [key of the block, lane]
  T *lse, *delta;                                  // [lane]
  int64_t size;

  BackwardScratch(T* memory, const Attention& a, int64_t keys_of_span) {
    Carver<T> carve{memory};
    const int64_t pitch = pitch_of<T>(a.dim);
    for (T** part : {&keys, &values, &grad_keys, &grad_values}) *part = carve.take((keys_of_span + kRows) * pitch);
    for (T** part : {&query, &grad_out, &grad_query, &query_rows, &grad_out_rows})
      *part = carve.take(pitch * kTile<T>);
    for (T** part : {&weight, &grad_score}) *part = carve.take((kBlock + kRows) * kTile<T>);
    for (T** part : {&lse, &delta}) *part = carve.take(kTile<T>);
    size = carve.used;
  }
};

constexpr double kLog2E = 1.4426950408889634;

// lse in powers of two and the sum of grad_out * out of each query; 0 for padding, whose lse is -inf.
// `out_rows` is as packed as grad_out_rows.
template <class T>
void pack_statistics(const Attention& a, const Task& task, int64_t head, int64_t begin, int64_t end, int64_t lanes,
                     const T* out_rows, const BackwardScratch<T>& scratch) {
  const int64_t pitch = pitch_of<T>(a.dim);
  const T* lse = static_cast<const T*>(a.lse) + (task.batch * a.heads + head) * a.queries;
  for (int64_t i = 0; i < lanes; ++i) {
    const T *out = out_rows + i * pitch, *grad = scratch.grad_out_rows + i * pitch;
    Vec<T> sums{};
    for (int64_t d = 0; d * Simd<T>::kLanes < a.dim; ++d) sums += at(out, d) * at(grad, d);
    T sum = 0;
    for (int j = 0; j < Simd<T>::kLanes; ++j) sum += sums[j];
    scratch.delta[i] = sum;
    scratch.lse[i] = begin + i < end && task.rows[begin + i].live() ? T(lse[begin + i] * kLog2E) : T(0);
  }
}

template <class E, class T, int columns>
void backward_tile(const Attention& a, const Task& task, int64_t head, int64_t begin, int64_t end,
                   const BackwardScratch<T>& scratch) {
  const int64_t pitch = pitch_of<T>(a.dim), dims = round_up(a.dim, kRows);
  constexpr int64_t lanes_used = columns * Simd<T>::kLanes;
  const int64_t vectors = round_up(a.dim, Simd<T>::kLanes) / Simd<T>::kLanes;
  const Lanes<T, columns> lanes(a, task, begin, end);
  const auto live = [&](int64_t query) { return task.rows[query].live(); };
  const int64_t behind = begin + lanes_used - end;
  pack_rows<E>(a.q, task, head, begin, end, behind, a.dim, live, scratch.query_rows);
  pack_rows<E>(a.grad_out, task, head, begin, end, behind, a.dim, live, scratch.grad_out_rows);
  T* out_rows = scratch.query;  // not needed any more when that is filled
  pack_rows<E>(a.out, task, head, begin, end, behind, a.dim, live, out_rows);
  pack_statistics(a, task, head, begin, end, lanes_used, out_rows, scratch);
  turn(scratch.query_rows, lanes_used, a.dim, T(a.scale * kLog2E), scratch.query);
  turn(scratch.grad_out_rows, lanes_used, a.dim, T(1), scratch.grad_out);
  fill_zero(scratch.grad_query, dims * kTile<T>);
  const T slope = a.slopes ? T(a.slopes[head] * kLog2E) : T(0);

  each_block(lanes.summary, task, [&](int64_t from, int64_t to, bool full) {
    const int64_t offset = (from - task.span.key_begin) * pitch, count = to - from;
    product<T, Factor::by_row, false>(count, columns, a.dim, scratch.keys + offset, pitch, scratch.query, kTile<T>,
                                      scratch.weight, kTile<T>);
    product<T, Factor::by_row, false>(count, columns, a.dim, scratch.values + offset, pitch, scratch.grad_out,
                                      kTile<T>, scratch.grad_score, kTile<T>);
    T *weight = scratch.weight, *grad = scratch.grad_score;
    for (int64_t i = 0; i < count; ++i, weight += kTile<T>, grad += kTile<T>)
      for (int n = 0; n < columns; ++n) {
        Vec<T> s = at(weight, n) - at(scratch.lse, n);
        if (slope != 0) s += (T(from + i) - lanes.position[n]) * slope;
        Vec<T> w = exp2<T>(s);
        if (!full) w = task.live[from + i] ? (lanes.sees(n, from + i) ? w : splat<T>(0)) : splat<T>(0);
        at(weight, n) = w;
        at(grad, n) = w * (at(grad, n) - at(scratch.delta, n));
      }
    const int64_t rest = (round_up(count, kRows) - count) * kTile<T>;  // rows of the next block's keys
    fill_zero(weight, rest);
    fill_zero(grad, rest);
    product<T, Factor::by_row, true>(count, vectors, lanes_used, scratch.weight, kTile<T>, scratch.grad_out_rows,
                                     pitch, scratch.grad_values + offset, pitch);
    product<T, Factor::by_row, true>(count, vectors, lanes_used, scratch.grad_score, kTile<T>, scratch.query_rows,
                                     pitch, scratch.grad_keys + offset, pitch);
    product<T, Factor::by_column, true>(dims, columns, count, scratch.keys + offset, pitch, scratch.grad_score,
                                        kTile<T>, scratch.grad_query, kTile<T>);
  });

  alignas(kVectorBytes) T factor[kTile<T>];
  for (T& by : factor) by = T(a.scale);
  unpack_turned<E>(scratch.grad_query, factor, a.grad_q, task, head, begin, end, a.dim, scratch.query_rows);
}

// Gradients of all keys that the span owns; exactly 0 where nobody sees the key.
template <class E, class T>
void unpack_keys(const Operand& x, const Attention& a, const Task& task, const T* packed, T factor) {
  const Span& span = task.span;
  for (int64_t key = span.own_begin; key < span.own_end; ++key) {
    E* to = row_of<E>(x, task.batch, key, task.kv_head);
    const T* from = packed + (key - span.key_begin) * pitch_of<T>(a.dim);
    if (key + kAhead < span.own_end) fetch(to + kAhead * x.row, a.dim, true);
    const bool inside = key >= span.key_begin && key < span.key_end && task.live[key];
    for (int64_t d = 0; d < a.dim; ++d) narrow(inside ? from[d] * factor : T(0), to[d]);
  }
}

template <class E>
void backward(const Attention& a, const Task& task, void* memory) {
  using T = typename Computed<E>::type;
  const Span& span = task.span;
  const int64_t keys = span.key_end - span.key_begin, pitch = pitch_of<T>(a.dim);
  const BackwardScratch<T> scratch(static_cast<T*>(memory), a, keys);
  const auto live = [&](int64_t key) { return task.live[key] != 0; };
  pack_rows<E>(a.k, task, task.kv_head, span.key_begin, span.key_end, kRows, a.dim, live, scratch.keys);
  pack_rows<E>(a.v, task, task.kv_head, span.key_begin, span.key_end, kRows, a.dim, live, scratch.values);
  fill_zero(scratch.grad_keys, (keys + kRows) * pitch);
  fill_zero(scratch.grad_values, (keys + kRows) * pitch);
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t head = task.kv_head * group; head < (task.kv_head + 1) * group; ++head)
    for (int64_t begin = span.query_begin; begin < span.query_end; begin += kTile<T>) {
      const int64_t end = begin + kTile<T> < span.query_end ? begin + kTile<T> : span.query_end;
      const int64_t columns = round_up(end - begin, Simd<T>::kLanes) / Simd<T>::kLanes;
      if (columns == 1) backward_tile<E, T, 1>(a, task, head, begin, end, scratch);
      if (columns == 2) backward_tile<E, T, 2>(a, task, head, begin, end, scratch);
      if (columns == 3) backward_tile<E, T, 3>(a, task, head, begin, end, scratch);
    }
  unpack_keys<E>(a.grad_k, a, task, scratch.grad_keys, T(a.scale));
  unpack_keys<E>(a.grad_v, a, task, scratch.grad_values, T(1));
}

}  // namespace

int64_t attention_backward_scratch(const Attention& a, int64_t keys) {
  if (a.element == Element::f64) return BackwardScratch<double>(nullptr, a, keys).size * sizeof(double);
  return BackwardScratch<float>(nullptr, a, keys).size * sizeof(float);
}

void attention_backward(const Attention& a, const Task& task, void* scratch) {
  if (a.element == Element::f32) backward<float>(a, task, scratch);
  if (a.element == Element::f64) backward<double>(a, task, scratch);
  if (a.element == Element::bf16) backward<Bf16>(a, task, scratch);
}

}  // namespace dsvlm::DSVLM_ISA
