// The forward pass of one task on the CPU: online softmax over blocks of keys, one tile of queries after the other.
#include "cpu.h"
#include "cpu_tiles.h"

namespace dsvlm::DSVLM_ISA {
namespace {

template <class T>
struct ForwardScratch {
  T *keys, *values;  // [key, pitch]
  T* query_rows;     // [lane, pitch]; the result's at the end
  T *query, *out;    // [dim, lane]
  T* score;          // [key of the block, lane]
  int64_t size;

  ForwardScratch(T* memory, const Attention& a, int64_t keys_of_span) {
    Carver<T> carve{memory};
    const int64_t pitch = pitch_of<T>(a.dim);
    keys = carve.take((keys_of_span + kRows) * pitch);
    values = carve.take((keys_of_span + kRows) * pitch);
    query_rows = carve.take(pitch * kTile<T>);
    query = carve.take(pitch * kTile<T>);
    out = carve.take(pitch * kTile<T>);
    score = carve.take((kBlock + kRows) * kTile<T>);
    size = carve.used;
  }
};

float log2_of(float x) { return __builtin_log2f(x); }
double log2_of(double x) { return __builtin_log2(x); }

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class E, class T, int columns>
void forward_tile(const Attention& a, const Task& task, int64_t head, int64_t begin, int64_t end,
                  const ForwardScratch<T>& scratch) {
  constexpr T infinity = __builtin_inf();
  constexpr int64_t lanes_used = columns * Simd<T>::kLanes;
  const int64_t pitch = pitch_of<T>(a.dim), dims = round_up(a.dim, kRows);
  const Lanes<T, columns> lanes(a, task, begin, end);
  const auto live = [&](int64_t query) { return task.rows[query].live(); };
  pack_rows<E>(a.q, task, head, begin, end, begin + lanes_used - end, a.dim, live, scratch.query_rows);
  turn(scratch.query_rows, lanes_used, a.dim, T(a.scale * kLog2E), scratch.query);
  fill_zero(scratch.out, dims * kTile<T>);
  const T slope = a.slopes ? T(a.slopes[head] * kLog2E) : T(0);
  Vec<T> top[columns], sum[columns];
  for (int n = 0; n < columns; ++n) top[n] = splat<T>(-infinity), sum[n] = splat<T>(0);

  each_block(lanes.summary, task, [&](int64_t from, int64_t to, bool full) {
    T* score = scratch.score;
    const int64_t offset = (from - task.span.key_begin) * pitch, count = to - from;
    product<T, Factor::by_row, false>(count, columns, a.dim, scratch.keys + offset, pitch, scratch.query, kTile<T>,
                                      score, kTile<T>);
    Vec<T> highest[columns];
    for (int n = 0; n < columns; ++n) highest[n] = top[n];
    for (int64_t i = 0; i < count; ++i, score += kTile<T>)
      for (int n = 0; n < columns; ++n) {
        Vec<T> s = at(score, n);
        if (slope != 0) s += (T(from + i) - lanes.position[n]) * slope;
        if (!full) s = task.live[from + i] ? (lanes.sees(n, from + i) ? s : splat<T>(-infinity)) : splat<T>(-infinity);
        if (slope != 0 || !full) at(score, n) = s;
        highest[n] = highest[n] < s ? s : highest[n];
      }
    Vec<T> base[columns], shrink[columns];
    bool moved = false;
    for (int n = 0; n < columns; ++n) {
      base[n] = highest[n] == -infinity ? splat<T>(0) : highest[n];  // no key so far: -inf - -inf is not a number
      shrink[n] = exp2<T>(top[n] - base[n]);
      sum[n] *= shrink[n];
      const auto differs = top[n] != highest[n];
      for (int i = 0; i < Simd<T>::kLanes; ++i) moved |= differs[i] != 0;
      top[n] = highest[n];
    }
    if (moved)
      for (int64_t d = 0; d < dims; ++d)
        for (int n = 0; n < columns; ++n) at(scratch.out + d * kTile<T>, n) *= shrink[n];
    score = scratch.score;
    for (int64_t i = 0; i < count; ++i, score += kTile<T>)
      for (int n = 0; n < columns; ++n) {
        const Vec<T> weight = exp2<T>(at(score, n) - base[n]);
        sum[n] += weight;
        at(score, n) = weight;
      }
    product<T, Factor::by_column, true>(dims, columns, count, scratch.values + offset, pitch, scratch.score, kTile<T>,
                                        scratch.out, kTile<T>);
  });

  alignas(kVectorBytes) T total[kTile<T>]{}, inverse[kTile<T>]{}, high[kTile<T>]{};
  for (int n = 0; n < columns; ++n) {
    at(total, n) = sum[n], at(high, n) = top[n];
    at(inverse, n) = sum[n] == 0 ? splat<T>(0) : 1 / sum[n];
  }
  T* lse = static_cast<T*>(a.lse) + (task.batch * a.heads + head) * a.queries;
  for (int64_t i = 0; begin + i < end; ++i)
    lse[begin + i] = total[i] == 0 ? -infinity : T((high[i] + log2_of(total[i])) * kLn2);
  unpack_turned<E>(scratch.out, inverse, a.out, task, head, begin, end, a.dim, scratch.query_rows);
}

template <class E>
void forward(const Attention& a, const Task& task, void* memory) {
  using T = typename Computed<E>::type;
  const Span& span = task.span;
  const ForwardScratch<T> scratch(static_cast<T*>(memory), a, span.key_end - span.key_begin);
  const auto live = [&](int64_t key) { return task.live[key] != 0; };
  pack_rows<E>(a.k, task, task.kv_head, span.key_begin, span.key_end, kRows, a.dim, live, scratch.keys);
  pack_rows<E>(a.v, task, task.kv_head, span.key_begin, span.key_end, kRows, a.dim, live, scratch.values);
  const int64_t group = a.heads / a.kv_heads;
  for (int64_t head = task.kv_head * group; head < (task.kv_head + 1) * group; ++head)
    for (int64_t begin = span.query_begin; begin < span.query_end; begin += kTile<T>) {
      const int64_t end = begin + kTile<T> < span.query_end ? begin + kTile<T> : span.query_end;
      const int64_t columns = round_up(end - begin, Simd<T>::kLanes) / Simd<T>::kLanes;
      if (columns == 1) forward_tile<E, T, 1>(a, task, head, begin, end, scratch);
      if (columns == 2) forward_tile<E, T, 2>(a, task, head, begin, end, scratch);
      if (columns == 3) forward_tile<E, T, 3>(a, task, head, begin, end, scratch);
    }
}

}  // namespace

int64_t attention_forward_scratch(const Attention& a, int64_t keys) {
  if (a.element == Element::f64) return ForwardScratch<double>(nullptr, a, keys).size * sizeof(double);
  return ForwardScratch<float>(nullptr, a, keys).size * sizeof(float);
}

void attention_forward(const Attention& a, const Task& task, void* scratch) {
  if (a.element == Element::f32) forward<float>(a, task, scratch);
  if (a.element == Element::f64) forward<double>(a, task, scratch);
  if (a.element == Element::bf16) forward<Bf16>(a, task, scratch);
}

}  // namespace dsvlm::DSVLM_ISA
