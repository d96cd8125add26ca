// What forward and backward of one task share: scratch, packing, the lanes of a tile of queries, blocks of keys.
//
// Scores are kept transposed, [key, query]: a lane is a query, so that maxima, sums and masks need no shuffles, and
// the weights are a factor of the next product as they lie. Packing makes tensors fp32 (fp64), rows adjacent, and
// padding zero: whatever it held never enters arithmetic.
#pragma once

#include "mask.h"
#include "cpu_task.h"
#include "cpu_vectors.h"

namespace dsvlm::DSVLM_ISA {

struct Bf16 {
  uint16_t bits;
};

template <class E>
struct Computed {
  using type = E;
};
template <>
struct Computed<Bf16> {
  using type = float;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline void narrow(float x, float& to) { to = x; }
inline void narrow(double x, double& to) { to = x; }
inline void narrow(float x, Bf16& to) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}

constexpr int64_t kBlock = 96;  // keys of a block, at most

template <class T>
constexpr int64_t kTile = kColumns* Simd<T>::kLanes;  // queries of a tile

// Elements between packed rows: an odd number of vectors, or rows would meet in few sets of the cache; and room for
// products over the dimensions, which go in steps of kRows, where a vector is shorter than that.
template <class T>
inline int64_t pitch_of(int64_t dim) {
  constexpr int64_t lanes = Simd<T>::kLanes, step = lanes < kRows ? kRows : lanes;
  return (round_up(dim, step) / lanes | 1) * lanes;
}

// Hands out parts of the scratch; with none given it only counts.
template <class T>
struct Carver {
  T* next;
  int64_t used = 0;

  T* take(int64_t elements) {
    T* part = next ? next + used : nullptr;
    used += round_up(elements, Simd<T>::kLanes);
    return part;
  }
};

template <class E>
inline E* row_of(const Operand& x, int64_t batch, int64_t row, int64_t head) {
  return static_cast<E*>(x.data) + batch * x.batch + row * x.row + head * x.head;
}

template <class T>
inline void fill_zero(T* data, int64_t n) {
  for (int64_t i = 0; i < n; ++i) data[i] = 0;
}

constexpr int64_t kAhead = 4;  // rows; a row of another token is in another page, which no hardware fetches ahead

template <class E>
inline void fetch(const E* row, int64_t dim, bool write) {
  for (int64_t d = 0; d < dim; d += 64 / sizeof(E))
    if (write)
      __builtin_prefetch(row + d, 1);
    else
      __builtin_prefetch(row + d);
}

// Rows [begin, end) of one head, and kRows rows of zeros behind them: products take rows in steps of kRows.
template <class E, class T, class Live>
inline void pack_rows(const Operand& x, const Task& task, int64_t head, int64_t begin, int64_t end, int64_t behind,
                      int64_t dim, Live live, T* packed) {
  const int64_t pitch = pitch_of<T>(dim);
  for (int64_t row = begin; row < end; ++row, packed += pitch) {
    if (!live(row)) {
      fill_zero(packed, pitch);
      continue;
    }
    const E* from = row_of<E>(x, task.batch, row, head);
    if (row + kAhead < end) fetch(from + kAhead * x.row, dim, false);
    for (int64_t d = 0; d < dim; ++d) packed[d] = widen(from[d]);
    fill_zero(packed + dim, pitch - dim);
  }
  fill_zero(packed, behind * pitch);
}

// One tile of queries, packed: [lane, pitch] to [dim, lane], times a factor.
template <class T>
inline void turn(const T* rows, int64_t lanes, int64_t dim, T factor, T* turned) {
  const int64_t pitch = pitch_of<T>(dim);
  for (int64_t i = 0; i < lanes; i += Simd<T>::kLanes)
    for (int64_t d = 0; d < dim; d += Simd<T>::kLanes)
      transpose(rows + i * pitch + d, pitch, turned + d * kTile<T> + i, kTile<T>, factor);
}

// The way back, by way of `rows`, to a tensor: lane i times factor[i]; 0 for padding.
template <class E, class T>
inline void unpack_turned(const T* turned, const T* factor, const Operand& x, const Task& task, int64_t head,
                          int64_t begin, int64_t end, int64_t dim, T* rows) {
  const int64_t pitch = pitch_of<T>(dim);
  for (int64_t i = 0; i < end - begin; i += Simd<T>::kLanes)
    for (int64_t d = 0; d < dim; d += Simd<T>::kLanes)
      transpose(turned + d * kTile<T> + i, kTile<T>, rows + i * pitch + d, pitch, T(1));
  for (int64_t i = 0; begin + i < end; ++i) {
    E* to = row_of<E>(x, task.batch, begin + i, head);
    if (begin + i + kAhead < end) fetch(to + kAhead * x.row, dim, true);
    if (task.rows[begin + i].live())
      for (int64_t d = 0; d < dim; ++d) narrow(rows[i * pitch + d] * factor[i], to[d]);
    else
      for (int64_t d = 0; d < dim; ++d) narrow(T(0), to[d]);
  }
}

// The rows of a tile of queries, by lane.
template <class T, int columns>
struct Lanes {
  using Int = typename Simd<T>::Int;
  using Bits = typename Simd<T>::Bits;
  Int first[columns];
  Bits length[columns];
  Vec<T> position[columns];  // of the query, on the keys' scale
  QueryTile summary;

  Lanes(const Attention& a, const Task& task, int64_t begin, int64_t end) {
    for (int n = 0; n < columns; ++n)
      for (int i = 0; i < Simd<T>::kLanes; ++i) {
        const int64_t query = begin + n * Simd<T>::kLanes + i;
        const Row row = query < end ? task.rows[query] : Row{0, 0};
        if (query < end) summary.add(row);
        first[n][i] = row.first;
        length[n][i] = row.live() ? row.last - row.first : 0;
        position[n][i] = T(query + a.keys - a.queries);
      }
  }

  Int sees(int n, int64_t key) const {
    using Whole = decltype(first[0][0] + 0);
    return (Bits)(Whole(key) - first[n]) < length[n];
  }
};

// The keys that a tile of queries sees, in blocks of similar size: calls visit(begin, end, whether all pairs are
// allowed) for each that holds an allowed pair.
template <class Visitor>
inline void each_block(const QueryTile& queries, const Task& task, Visitor visit) {
  const int64_t begin = queries.first, count = queries.last - begin;
  if (count <= 0) return;
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  const int64_t step = round_up((count + blocks - 1) / blocks, kRows);
  for (int64_t from = begin; from < queries.last; from += step) {
    const int64_t to = from + step < queries.last ? from + step : queries.last;
    KeyTile keys;
    for (int64_t key = from; key < to; ++key) keys.add(key, task.live[key]);
    const Visit decision = decide(queries, keys, from, to);
    if (decision != Visit::skip) visit(from, to, decision == Visit::full);
  }
}

}  // namespace dsvlm::DSVLM_ISA
