// The gate: softmax, the K largest, order keys, and the sums of a block. One token to a lane.
#include "moe_routing/tile.h"

namespace dsvlm::DSVLM_ISA {
namespace {

using namespace routing;

// The k largest of each lane, larger first, equal ones by lower expert. NaN leaves rubbish; bad rows are mended later.
template <class V, class I>
inline void best(const V* x, int64_t experts, int64_t k, V* value, I* index) {
  if (k == 1) {
    constexpr int ways = 4;  // comparisons that do not wait for each other
    V top[ways];
    I at[ways];
    for (int w = 0; w < ways; ++w) {
      top[w] = x[w < experts ? w : 0];
      at[w] = all<I>(w < experts ? w : 0);
    }
    for (int64_t e = ways; e < experts; e += ways) {
      for (int w = 0; w < ways && e + w < experts; ++w) {
        const V v = x[e + w];
        at[w] = v > top[w] ? all<I>(e + w) : at[w];
        top[w] = v > top[w] ? v : top[w];
      }
    }
    for (int w = 1; w < ways; ++w) {
      const I over = (top[w] > top[0]) | ((top[w] == top[0]) & (at[w] < at[0]));
      at[0] = over ? at[w] : at[0];
      // NaN of any way stays: the row is bad, and its sum will say so
      top[0] = over ? top[w] : top[0];
    }
    value[0] = top[0];
    index[0] = at[0];
    return;
  }
  for (int64_t e = 0; e < experts; ++e) {
    const V v = x[e];
    if (e < k) {
      value[e] = v;
      index[e] = all<I>(e);
    }
    for (int64_t j = e < k ? e - 1 : k - 1; j >= 0; --j) {  // from the last place up; what is overtaken moves down
      const I over = v > value[j];
      if (j + 1 < k) {
        value[j + 1] = over ? value[j] : value[j + 1];
        index[j + 1] = over ? index[j] : index[j + 1];
      }
      value[j] = over ? v : value[j];
      index[j] = over ? all<I>(e) : index[j];
    }
  }
}

template <class Real, class T>
class Forward {
  using S = Vectors<Real>;
  using V = typename S::V;
  using I = typename S::I;
  using Key = typename S::Key;
  static constexpr int lanes = S::lanes;

 public:
  Forward(const moe::GateForward& call, void* scratch) : call(call), r(call.router) {
    clean = static_cast<V*>(scratch);
    noisy = r.noise ? clean + r.experts : clean;
    load = clean + 2 * r.experts;
    value = clean + 4 * r.experts;
    index = reinterpret_cast<I*>(value + r.k);
    sums = value + 2 * r.k;
  }

  void run(int64_t block) {
    const int64_t begin = block * moe::kBlock;
    const int64_t end = begin + moe::kBlock < r.tokens ? begin + moe::kBlock : r.tokens;
    const int64_t size = moe::partial_size(r);
    for (int64_t i = 0; i < size; ++i) sums[i] = V{};
    bad_rows = I{};
    for (int64_t first = begin; first < end; first += lanes) tile(Tile<Real>(r, first, end));
    Real* const partial = static_cast<Real*>(call.partial) + block * size;
    for (int64_t i = 0; i < size; ++i) {
      Real sum = 0;
      for (int lane = 0; lane < lanes; ++lane) sum += sums[i][lane];
      partial[i] = sum;
    }
    call.bad[block] = 0;
    for (int lane = 0; lane < lanes; ++lane) call.bad[block] += static_cast<int32_t>(bad_rows[lane]);
  }

 private:
  void tile(const Tile<Real>& t) {
    const V nan = all<V>(static_cast<Real>(__builtin_nan("")));
    t.read(static_cast<const T*>(r.logits), r.tokens, r.experts, clean);
    if (r.noise) {
      t.read(static_cast<const Real*>(r.noise), r.tokens, r.experts, noisy);
      for (int64_t e = 0; e < r.experts; ++e) noisy[e] += clean[e];
    }
    best(noisy, r.experts, r.k, value, index);
    const V top = value[0], eta = value[r.k - 1];
    if (r.load_sigma > 0) {
      const V unit = all<V>(static_cast<Real>(1 / r.load_sigma));
      for (int64_t e = 0; e < r.experts; ++e)
        load[e] = clean[e] == -infinity ? V{} : normal_cdf((clean[e] - eta) * unit);
    }
    V total, product, noisy_total{}, ignored;
    V clean_top = top;
    if (r.noise) {
      exponentials<Real>(noisy, r.experts, top, noisy_total, ignored);
      clean_top = largest(clean, r.experts);
    }
    exponentials<Real>(clean, r.experts, clean_top, total, product);
    if (!r.noise) noisy_total = total;
    const I bad = t.live & (noisy_total != noisy_total);
    bad_rows -= bad;  // true is -1
    choices(t, bad, top, Real(1) / noisy_total);

    const V inverse = bad ? nan : Real(1) / total;
    const V log_total = log_of(total);
    const V lse = bad ? nan : clean_top + log_total;
    const V entropy = log_total - product * inverse;
    put(t, static_cast<Real*>(call.lse), 1, 0, t.live ? lse : V{});
    t.for_each_kind([&](int64_t m, I mask) {
      V* const prob_sum = sums + m * r.experts;
      V* const loadp_sum = sums + (r.modalities + m) * r.experts;
      V* const ent_sum = sums + 2 * r.modalities * r.experts + m;
      V* const z2_sum = ent_sum + r.modalities;
      for (int64_t e = 0; e < r.experts; ++e) prob_sum[e] += mask ? clean[e] * inverse : V{};
      if (r.load_sigma > 0)
        for (int64_t e = 0; e < r.experts; ++e) loadp_sum[e] += mask ? (bad ? nan : load[e]) : V{};
      *ent_sum += mask ? entropy : V{};
      *z2_sum += mask ? lse * lse : V{};
    });
  }

  void choices(const Tile<Real>& t, I bad, V top, V inverse) {
    V sum{}, first{};
    if (r.renormalize)
      for (int64_t k = 0; k < r.k; ++k) sum += exp_of(at_least_smallest<Real>(value[k] - top)) * inverse;
    for (int64_t k = 0; k < r.k; ++k) {
      // the rubbish of a bad row is multiplied by NaN
      const V score = exp_of(at_least_smallest<Real>(value[k] - top)) * inverse;
      if (k == 0) first = score;
      const V weight = t.live ? (r.renormalize ? score / sum : score) : V{};
      const I chosen = bad ? all<I>(k) : index[k];
      const I asks = t.live & (bad | (value[k] > -infinity));
      I key{};
      if (call.policy != moe::Policy::position) {
        const V by = call.policy == moe::Policy::bpr ? first : score;
        key = all<I>(moe::kZeroScore<Key>) ^ bits_as<I>(by);  // minus, also for the rubbish of a bad row
      }
      key = asks ? (bad ? all<I>(moe::kBad<Key>) : key) : all<I>(moe::kAsksNothing<Key>);
      put(t, static_cast<Real*>(call.weight), r.k, k, weight);
      put(t, static_cast<Key*>(call.key), r.k, k, key);
      put(t, call.index, r.k, k, chosen);
    }
  }

  // matrix[token, column] of each lane.
  template <class To, class Lanes>
  static void put(const Tile<Real>& t, To* matrix, int64_t columns, int64_t column, Lanes lane_values) {
    To values[lanes];
    for (int lane = 0; lane < lanes; ++lane) values[lane] = static_cast<To>(lane_values[lane]);
    To* const to = matrix + t.first * columns + column;
    if (columns == 1 && t.count == lanes)
      __builtin_memcpy(to, values, sizeof values);
    else
      for (int lane = 0; lane < t.count; ++lane) to[lane * columns] = values[lane];
  }

  static constexpr Real infinity = __builtin_huge_val();
  const moe::GateForward& call;
  const moe::Router& r;
  V *clean, *noisy, *load, *value, *sums;
  I *index, bad_rows{};
};

}  // namespace

void moe_gate_forward(const moe::GateForward& call, int64_t block, void* scratch) {
  switch (call.router.element) {
    case moe::Element::f32: return Forward<float, float>(call, scratch).run(block);
    case moe::Element::bf16: return Forward<float, Bf16>(call, scratch).run(block);
    case moe::Element::f16: return Forward<float, F16>(call, scratch).run(block);
    case moe::Element::f64: return Forward<double, double>(call, scratch).run(block);
  }
}

}  // namespace dsvlm::DSVLM_ISA
