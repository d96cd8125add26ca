// Rows of tokens and experts: weighted sums of rows, and the gradient of them.
#include "moe_routing/lanes.h"

namespace dsvlm::DSVLM_ISA {
namespace {

using namespace routing;

template <class Real, class T>
inline typename Vectors<Real>::V load_some(const T* from, int64_t n) {
  if (n >= Vectors<Real>::lanes) return load(from);
  T part[Vectors<Real>::lanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = from[i];
  return load(part);
}
template <class Real, class T>
inline void store_some(T* to, typename Vectors<Real>::V v, int64_t n) {
  if (n >= Vectors<Real>::lanes) return store(to, v);
  T part[Vectors<Real>::lanes];
  store(part, v);
  for (int64_t i = 0; i < n; ++i) to[i] = part[i];
}

template <class Real, class T>
void gather_sum(const T* y, const Real* weight, const int32_t* slot, T* out, int64_t k, int64_t width, int64_t begin,
                int64_t end) {
  using V = typename Vectors<Real>::V;
  for (int64_t token = begin; token < end; ++token) {
    const int32_t* const rows = slot + token * k;
    for (int64_t d = 0; d < width; d += Vectors<Real>::lanes) {
      V sum{};
      for (int64_t j = 0; j < k; ++j) {
        if (rows[j] < 0) continue;
        const V row = load_some<Real>(y + rows[j] * width + d, width - d);
        sum += weight ? row * weight[token * k + j] : row;
      }
      store_some<Real>(out + token * width + d, sum, width - d);
    }
  }
}

template <class Real, class T>
void scatter_product(const T* grad_out, const T* y, const Real* weight, const int32_t* src, T* grad_y,
                     Real* grad_weight, int64_t k, int64_t width, int64_t begin, int64_t end) {
  using V = typename Vectors<Real>::V;
  constexpr int64_t lanes = Vectors<Real>::lanes;
  for (int64_t row = begin; row < end; ++row) {
    T* const to = grad_y + row * width;
    if (src[row] < 0) {
      for (int64_t d = 0; d < width; d += lanes) store_some<Real>(to + d, V{}, width - d);
      continue;
    }
    const T* const upstream = grad_out + src[row] / k * width;
    const T* const own = y + row * width;
    const Real w = weight[src[row]];
    V dot[2] = {};
    for (int64_t d = 0; d < width; d += lanes) {
      const V g = load_some<Real>(upstream + d, width - d);
      dot[d / lanes % 2] += g * load_some<Real>(own + d, width - d);
      store_some<Real>(to + d, g * w, width - d);
    }
    Real sum = 0;
    for (int64_t i = 0; i < lanes; ++i) sum += dot[0][i] + dot[1][i];
    grad_weight[src[row]] = sum;
  }
}

}  // namespace

void moe_gather_sum(moe::Element element, const void* y, const void* weight, const int32_t* slot, void* out, int64_t k,
                    int64_t width, int64_t begin, int64_t end) {
  const auto run = [&](auto real, auto type) {
    using Real = decltype(real);
    using T = decltype(type);
    gather_sum<Real, T>(static_cast<const T*>(y), static_cast<const Real*>(weight), slot, static_cast<T*>(out), k,
                        width, begin, end);
  };
  switch (element) {
    case moe::Element::f32: return run(float{}, float{});
    case moe::Element::bf16: return run(float{}, Bf16{});
    case moe::Element::f16: return run(float{}, F16{});
    case moe::Element::f64: return run(double{}, double{});
  }
}

void moe_scatter_product(moe::Element element, const void* grad_out, const void* y, const void* weight,
                         const int32_t* src, void* grad_y, void* grad_weight, int64_t k, int64_t width, int64_t begin,
                         int64_t end) {
  const auto run = [&](auto real, auto type) {
    using Real = decltype(real);
    using T = decltype(type);
    scatter_product<Real, T>(static_cast<const T*>(grad_out), static_cast<const T*>(y),
                             static_cast<const Real*>(weight), src, static_cast<T*>(grad_y),
                             static_cast<Real*>(grad_weight), k, width, begin, end);
  };
  switch (element) {
    case moe::Element::f32: return run(float{}, float{});
    case moe::Element::bf16: return run(float{}, Bf16{});
    case moe::Element::f16: return run(float{}, F16{});
    case moe::Element::f64: return run(double{}, double{});
  }
}

}  // namespace dsvlm::DSVLM_ISA
