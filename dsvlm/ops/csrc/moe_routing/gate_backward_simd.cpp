// The gradient of the gate: one pass over the rows, from the saved logits, lse and index. One token to a lane.
//
// With p the clean and s the noisy softmax, g the gradients of the sums at the token's modality:
//   d logits = p (g_prob - <p, g_prob> - g_ent (log p + H) + 2 g_z2 lse)
//            + s (g_s - <s, g_s>), g_s from grad_weight at the K choices, 0 elsewhere
//            + t - (sum of t at the K-th choice), t = g_loadp phi((z - eta) / sigma) / sigma.
#include "moe_routing/tile.h"

namespace dsvlm::DSVLM_ISA {
namespace {

using namespace routing;

template <class Real, class T>
class Backward {
  using S = Vectors<Real>;
  using V = typename S::V;
  using I = typename S::I;
  static constexpr int lanes = S::lanes;

 public:
  Backward(const moe::GateBackward& call, void* scratch) : call(call), r(call.router) {
    clean = static_cast<V*>(scratch);
    probs = clean + r.experts;
    noisy = clean + 2 * r.experts;
    table = clean + 3 * r.experts;
    upstream = clean + 4 * r.experts;
    score = upstream + r.k;
  }

  void run(int64_t block) {
    const int64_t begin = block * moe::kBlock;
    const int64_t end = begin + moe::kBlock < r.tokens ? begin + moe::kBlock : r.tokens;
    for (int64_t first = begin; first < end; first += lanes) tile(Tile<Real>(r, first, end));
  }

 private:
  void tile(const Tile<Real>& t) {
    t.read(static_cast<const T*>(r.logits), r.tokens, r.experts, clean);
    if (r.noise) {
      t.read(static_cast<const Real*>(r.noise), r.tokens, r.experts, noisy);
      for (int64_t e = 0; e < r.experts; ++e) noisy[e] += clean[e];
    }
    int64_t last[lanes] = {};
    V eta{};
    if (call.grad_loadp) {
      choice(t, r.k - 1, last);
      eta = Tile<Real>::gather(r.noise ? noisy : clean, last);
    }
    const V lse = t.column(static_cast<const Real*>(call.lse), 1, 0);
    if (t.uniform) {
      const Real* g = static_cast<const Real*>(call.grad_prob) + t.kind_of_first * r.experts;
      const auto of_prob = [g](int64_t e) { return all<V>(g[e]); };
      call.grad_ent ? sums<true>(t, lse, of_prob) : sums<false>(t, lse, of_prob);
    } else {
      spread(t, call.grad_prob);
      const auto of_prob = [this](int64_t e) { return table[e]; };
      call.grad_ent ? sums<true>(t, lse, of_prob) : sums<false>(t, lse, of_prob);
    }
    if (call.grad_weight) {
      for (int64_t k = 0; k < r.k; ++k) {
        int64_t at[lanes];
        choice(t, k, at);
        for (int lane = 0; lane < lanes; ++lane)
          reinterpret_cast<Real*>(probs + at[lane])[lane] += upstream[k][lane] * score[k][lane];
      }
    }
    if (call.grad_loadp) through_load(t, eta, last);
    if (!t.all_live)
      for (int64_t e = 0; e < r.experts; ++e) probs[e] = t.live ? probs[e] : V{};
    t.write(static_cast<T*>(call.grad_logits), r.experts, probs);
  }

  // score = s at the choices, upstream = gradient of score; returns <s, g_s>. noisy becomes s.
  V through_weights(const Tile<Real>& t) {
    const V* s = probs;
    if (r.noise) {
      V total, ignored;
      exponentials<Real>(noisy, r.experts, largest(noisy, r.experts), total, ignored);
      for (int64_t e = 0; e < r.experts; ++e) noisy[e] /= total;
      s = noisy;
    }
    V sum{}, product{};
    for (int64_t k = 0; k < r.k; ++k) {
      int64_t at[lanes];
      choice(t, k, at);
      score[k] = Tile<Real>::gather(s, at);
      upstream[k] = t.live ? t.column(static_cast<const Real*>(call.grad_weight), r.k, k) : V{};
      sum += score[k];
      product += score[k] * upstream[k];
    }
    if (!r.renormalize) return product;
    const V mean = product / sum;
    product = V{};
    for (int64_t k = 0; k < r.k; ++k) {
      upstream[k] = (upstream[k] - mean) / sum;
      product += score[k] * upstream[k];
    }
    return product;
  }

  // probs becomes the gradient, but for what goes to the choices alone.
  template <bool of_entropy, class Gradient>
  void sums(const Tile<Real>& t, V lse, Gradient of_prob) {
    V of_ent{}, of_z2{}, dot{}, entropy{};
    t.for_each_kind([&](int64_t m, I mask) {
      if (of_entropy) of_ent = mask ? all<V>(static_cast<const Real*>(call.grad_ent)[m]) : of_ent;
      of_z2 = mask ? all<V>(static_cast<const Real*>(call.grad_z2)[m]) : of_z2;
    });
    for (int64_t e = 0; e < r.experts; ++e) {
      const V shifted = at_least_smallest<Real>(clean[e] - lse);
      probs[e] = exp_of(shifted);
      dot += probs[e] * of_prob(e);
      if (of_entropy) entropy -= probs[e] * shifted;
    }
    const V inner = call.grad_weight ? through_weights(t) : V{};
    const V shared = Real(2) * of_z2 * lse - dot - of_ent * entropy - (r.noise ? V{} : inner);
    for (int64_t e = 0; e < r.experts; ++e) {
      V factor = of_prob(e) + shared;
      if (of_entropy) factor -= of_ent * at_least_smallest<Real>(clean[e] - lse);
      probs[e] *= factor;
    }
    if (r.noise && call.grad_weight)
      for (int64_t e = 0; e < r.experts; ++e) probs[e] -= noisy[e] * inner;
  }

  void through_load(const Tile<Real>& t, V eta, const int64_t (&last)[lanes]) {
    const V unit = all<V>(static_cast<Real>(1 / r.load_sigma));
    spread(t, call.grad_loadp);
    V sum{};
    for (int64_t e = 0; e < r.experts; ++e) {
      const V density = table[e] * normal_density<Real>((clean[e] - eta) * unit) * unit;
      const V term = clean[e] == -infinity ? V{} : density;
      probs[e] += term;
      sum += term;
    }
    for (int lane = 0; lane < lanes; ++lane) reinterpret_cast<Real*>(probs + last[lane])[lane] -= sum[lane];
  }

  // table[e] = lane by lane the row of its modality of a [M, E] matrix.
  void spread(const Tile<Real>& t, const void* matrix) {
    const Real* const g = static_cast<const Real*>(matrix);
    for (int64_t e = 0; e < r.experts; ++e) table[e] = V{};
    t.for_each_kind([&](int64_t m, I mask) {
      for (int64_t e = 0; e < r.experts; ++e) table[e] = mask ? all<V>(g[m * r.experts + e]) : table[e];
    });
  }

  void choice(const Tile<Real>& t, int64_t k, int64_t (&at)[lanes]) const {
    for (int lane = 0; lane < lanes; ++lane) at[lane] = lane < t.count ? call.index[(t.first + lane) * r.k + k] : 0;
  }

  static constexpr Real infinity = __builtin_huge_val();
  const moe::GateBackward& call;
  const moe::Router& r;
  V *clean, *probs, *noisy, *table, *upstream, *score;
};

}  // namespace

void moe_gate_backward(const moe::GateBackward& call, int64_t block, void* scratch) {
  switch (call.router.element) {
    case moe::Element::f32: return Backward<float, float>(call, scratch).run(block);
    case moe::Element::bf16: return Backward<float, Bf16>(call, scratch).run(block);
    case moe::Element::f16: return Backward<float, F16>(call, scratch).run(block);
    case moe::Element::f64: return Backward<double, double>(call, scratch).run(block);
  }
}

}  // namespace dsvlm::DSVLM_ISA
