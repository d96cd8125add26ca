// A tile of tokens, one to a lane: what the forward and the backward of the gate begin and end with.
// Included by *_simd.cpp only.
#pragma once

#include "moe_routing/lanes.h"

namespace dsvlm::DSVLM_ISA::routing {

template <class Real>
struct Tile {
  using V = typename Vectors<Real>::V;
  using I = typename Vectors<Real>::I;
  static constexpr int lanes = Vectors<Real>::lanes;

  int64_t first;  // token of lane 0
  int count;      // lanes that hold a token
  bool all_live, uniform;
  I live;         // -1 = a valid token, 0 = not
  I kind;         // modality
  int64_t kind_of_first;

  Tile(const moe::Router& r, int64_t first, int64_t end)
      : first(first), count(static_cast<int>(end - first < lanes ? end - first : lanes)) {
    all_live = uniform = true;
    if (count == lanes && !r.valid && !r.modality) {
      live = all<I>(-1);
      kind = I{};
      kind_of_first = 0;
      return;
    }
    kind_of_first = -1;
    for (int lane = 0; lane < lanes; ++lane) {
      const bool alive = lane < count && (!r.valid || r.valid[first + lane]);
      const int64_t m = alive && r.modality ? r.modality[first + lane] : 0;
      live[lane] = alive ? -1 : 0;
      kind[lane] = m;
      all_live = all_live && alive;
      if (alive && kind_of_first < 0) kind_of_first = m;
      uniform = uniform && (!alive || m == kind_of_first);
    }
    if (kind_of_first < 0) kind_of_first = 0;
  }

  // body(modality, mask) for each modality that the live lanes have.
  template <class Body>
  void for_each_kind(Body body) const {
    if (uniform) return body(kind_of_first, live);
    I left = live;
    for (int lane = 0; lane < lanes; ++lane) {
      if (!left[lane]) continue;
      const I mask = left & (kind == kind[lane]);
      left &= ~mask;
      body(static_cast<int64_t>(kind[lane]), mask);
    }
  }

  // columns[e] = lane by lane the element e of each token's row; whatever stands in dead rows becomes 0.
  template <class T>
  void read(const T* matrix, int64_t tokens, int64_t experts, V* columns) const {
    const T* const end = matrix + tokens * experts;
    for (int64_t e = 0; e < experts; e += lanes) {
      const T* const from = matrix + first * experts + e;
      V rows[lanes];
      // a short row may be read beyond its end, as what follows is dropped, but not beyond the end of everything
      if (count == lanes && from + (lanes - 1) * experts + lanes <= end) {
#pragma GCC unroll 16
        for (int lane = 0; lane < lanes; ++lane) rows[lane] = load(from + lane * experts);
      } else {
        for (int lane = 0; lane < lanes; ++lane) {
          T part[lanes] = {};
          const T* const row = from + (lane < count ? lane : 0) * experts;
          for (int64_t i = 0; i < lanes && row + i < end; ++i) part[i] = row[i];
          rows[lane] = load(part);
        }
      }
      transpose<lanes / 2, lanes>(rows);
      if (e + lanes <= experts) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) columns[e + i] = rows[i];
      } else {
        for (int64_t i = 0; i < experts - e; ++i) columns[e + i] = rows[i];
      }
    }
    if (!all_live)
      for (int64_t e = 0; e < experts; ++e) columns[e] = live ? columns[e] : V{};
  }

  template <class T>
  void write(T* matrix, int64_t experts, const V* columns) const {
    for (int64_t e = 0; e < experts; e += lanes) {
      T* const to = matrix + first * experts + e;
      const int64_t n = experts - e < lanes ? experts - e : lanes;
      V rows[lanes];
      if (n == lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) rows[i] = columns[e + i];
      } else {
        for (int64_t i = 0; i < lanes; ++i) rows[i] = i < n ? columns[e + i] : V{};
      }
      transpose<lanes / 2, lanes>(rows);
      if (n == lanes && count == lanes) {
#pragma GCC unroll 16
        for (int lane = 0; lane < lanes; ++lane) store(to + lane * experts, rows[lane]);
        continue;
      }
      for (int lane = 0; lane < count; ++lane) {
        T part[lanes];
        store(part, rows[lane]);
        for (int64_t i = 0; i < n; ++i) to[lane * experts + i] = part[i];
      }
    }
  }

  // Lane by lane matrix[token, k]; 0 behind the last token.
  V column(const Real* matrix, int64_t width, int64_t k) const {
    if (width == 1 && count == lanes) return load(matrix + first);
    Real part[lanes] = {};
    for (int lane = 0; lane < count; ++lane) part[lane] = matrix[(first + lane) * width + k];
    return load(part);
  }

  // Lane by lane the element of its own column.
  static V gather(const V* columns, const int64_t (&column)[lanes]) {
    Real part[lanes];
    for (int lane = 0; lane < lanes; ++lane) part[lane] = reinterpret_cast<const Real*>(columns + column[lane])[lane];
    return load(part);
  }
};

// exp(x - top) in place of x; total: their sum, NaN for a bad row; product: sum of exp(x - top) * (x - top).
template <class Real, class V>
inline void exponentials(V* x, int64_t n, V top, V& total, V& product) {
  total = product = V{};
  for (int64_t e = 0; e < n; ++e) {
    const V shifted = at_least_smallest<Real>(x[e] - top);
    x[e] = exp_of(shifted);
    total += x[e];
    product += x[e] * shifted;
  }
}

template <class V>
inline V largest(const V* x, int64_t n) {
  V top = x[0];
  for (int64_t e = 1; e < n; ++e) top = x[e] > top ? x[e] : top;
  return top;
}

}  // namespace dsvlm::DSVLM_ISA::routing
