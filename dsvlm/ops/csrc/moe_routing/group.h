// A group of tokens, as many as a vector has lanes: each has a row of experts, in whole vectors, and a lane for what a
// token has once. The forward and the backward of the gate begin and end with it. Included by *_simd.cpp only.
#pragma once

#include "moe_routing/lanes.h"

namespace dsvlm::DSVLM_ISA::routing {

// fixed_width: vectors of a row where that is known to the compiler, else 0.
template <class Real, int fixed_width>
struct Group {
  using V = typename Vectors<Real>::V;
  using I = typename Vectors<Real>::I;
  static constexpr int lanes = Vectors<Real>::lanes;
  static constexpr Real infinity = __builtin_huge_val();

  const moe::Router& r;
  const int64_t first;  // token of lane 0
  const int count;      // lanes that hold a token
  bool uniform;         // there is nothing to know of valid and modality: all are live, and of kind 0
  I live;               // -1 = a valid token, 0 = not
  int64_t kind[lanes];  // modality

  Group(const moe::Router& r, int64_t first, int64_t end)
      : r(r), first(first), count(static_cast<int>(end - first < lanes ? end - first : lanes)) {
    live = all<I>(-1);
    for (int lane = 0; lane < lanes; ++lane) kind[lane] = 0;
    uniform = count == lanes && !r.valid && !r.modality;
    for (int lane = 0; !uniform && lane < lanes; ++lane) {
      const bool alive = lane < count && (!r.valid || r.valid[first + lane]);
      live[lane] = alive ? -1 : 0;
      kind[lane] = alive && r.modality ? r.modality[first + lane] : 0;
    }
  }

  // Vectors of a row.
  static int64_t width_of(const moe::Router& r) { return fixed_width ? fixed_width : (r.experts + lanes - 1) / lanes; }

  // Numbers of the experts in vector v of a row.
  static I numbers(int64_t v) {
    I n;
    for (int lane = 0; lane < lanes; ++lane) n[lane] = lane;
    return n + all<I>(v * lanes);
  }

  // body(modality, mask, tokens, n) for each modality that live lanes have; tokens: these n lanes.
  template <class Body>
  void for_each_kind(Body body) const {
    int tokens[lanes];
    if (uniform) {
      for (int lane = 0; lane < lanes; ++lane) tokens[lane] = lane;
      return body(0, live, tokens, lanes);
    }
    bool done[lanes] = {};
    for (int lane = 0; lane < count; ++lane) {
      if (done[lane] || !live[lane]) continue;
      int n = 0;
      I mask{};
      for (int other = lane; other < count; ++other) {
        if (!live[other] || kind[other] != kind[lane]) continue;
        done[other] = true;
        mask[other] = -1;
        tokens[n++] = other;
      }
      body(kind[lane], mask, tokens, n);
    }
  }

  // Rows in whole vectors, one after the other, padded with -inf; of lanes that hold no token, rubbish.
  struct Rows {
    const Real* first;
    int64_t stride;
    const Real* operator[](int lane) const { return first + lane * stride; }
  };

  // Rows of a matrix [N, E]; where they cannot be used in place they are put at `memory`.
  template <class T>
  Rows read(const T* matrix, V* memory) const {
    const int64_t width = width_of(r), stride = width * lanes;
    if constexpr (std::is_same_v<T, Real>)
      if (r.experts == stride && count == lanes) return {matrix + first * r.experts, stride};
    for (int lane = 0; lane < lanes; ++lane)
      for (int64_t v = 0; v < width; ++v) memory[lane * width + v] = part(matrix, lane, v);
    return {reinterpret_cast<const Real*>(memory), stride};
  }

  // Rows and a matrix [N, E] added.
  Rows sum(const Rows& rows, const Real* matrix, V* memory) const {
    const int64_t width = width_of(r);
    for (int lane = 0; lane < lanes; ++lane)
      for (int64_t v = 0; v < width; ++v)
        memory[lane * width + v] = load(rows[lane] + v * lanes) + part(matrix, lane, v);
    return {reinterpret_cast<const Real*>(memory), width * lanes};
  }

  // Vector v of a token's row of a matrix [N, E], -inf behind its end. Some of the next rows may be read for that, but
  // nothing behind the last one.
  template <class T>
  V part(const T* matrix, int lane, int64_t v) const {
    const T* from = matrix + (first + (lane < count ? lane : 0)) * r.experts + v * lanes;
    const int64_t n = r.experts - v * lanes;
    if (n >= lanes) return load(from);
    T some[lanes] = {};
    if (from + lanes > matrix + r.tokens * r.experts) {
      for (int64_t i = 0; i < n; ++i) some[i] = from[i];
      from = some;
    }
    const V x = load(from);
    return numbers(0) < all<I>(n) ? x : all<V>(-infinity);
  }

  // Writes vector v of a row of a matrix [N, E]. In the order of tokens: what is written behind a row is overwritten by
  // the next one. Nothing is written at `end` or behind it.
  template <class T>
  void write(T* row, int64_t v, V x, const T* end) const {
    T* const to = row + v * lanes;
    const int64_t n = r.experts - v * lanes;
    if (n >= lanes || to + lanes <= end) return store(to, x);
    T some[lanes];
    store(some, x);
    for (int64_t i = 0; i < n; ++i) to[i] = some[i];
  }

  // Lane by lane matrix[token, k]; 0 behind the last token.
  V column(const Real* matrix, int64_t columns, int64_t k) const {
    if (columns == 1 && count == lanes) return load(matrix + first);
    Real some[lanes] = {};
    for (int lane = 0; lane < count; ++lane) some[lane] = matrix[(first + lane) * columns + k];
    return load(some);
  }

  // Lane by lane vector[kind].
  V of_kind(const Real* vector) const {
    if (uniform) return all<V>(vector[0]);
    Real some[lanes];
    for (int lane = 0; lane < lanes; ++lane) some[lane] = vector[kind[lane]];
    return load(some);
  }

  // Lane i: the largest of each row, rubbish where there is NaN.
  V largest(const Rows& rows) const {
    const int64_t width = width_of(r);
    V of[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
      const Real* const x = rows[lane];
      of[lane] = load(x);
      for (int64_t v = 1; v < width; ++v) of[lane] = greater(of[lane], load(x + v * lanes));
    }
    return across<lanes / 2, lanes>(of, [](V a, V b) { return greater(a, b); });
  }

  static V greater(V a, V b) { return a > b ? a : b; }
  static V plus(V a, V b) { return a + b; }
};

template <class X>
struct Type {
  using type = X;
};

// body(Type<Gate<...>>) of the gate's element and width.
template <template <class Real, class T, int fixed_width> class Gate, class Body>
inline void for_element(const moe::Router& r, Body body) {
  const auto of_width = [&](auto element) {
    using T = typename decltype(element)::type;
    switch ((r.experts + Vectors<float>::lanes - 1) / Vectors<float>::lanes) {
      case 1: return body(Type<Gate<float, T, 1>>{});
      case 2: return body(Type<Gate<float, T, 2>>{});
      case 4: return body(Type<Gate<float, T, 4>>{});
      default: return body(Type<Gate<float, T, 0>>{});
    }
  };
  switch (r.element) {
    case moe::Element::f32: return of_width(Type<float>{});
    case moe::Element::bf16: return of_width(Type<Bf16>{});
    case moe::Element::f16: return of_width(Type<F16>{});
    case moe::Element::f64: return body(Type<Gate<double, double, 0>>{});
  }
}

}  // namespace dsvlm::DSVLM_ISA::routing
