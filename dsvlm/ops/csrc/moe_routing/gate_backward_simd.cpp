// The gradient of the gate: one pass over the rows, from the saved logits, lse and index.
//
// With p the clean and s the noisy softmax, g the gradients of the sums at the token's modality:
//   d logits = p (G - <p, G> - g_ent (log p + H) + 2 g_z2 lse), G = g_prob, + the gradient of s at the K choices where
//              s is p; else
//            + s (g_s - <s, g_s>), g_s from grad_weight at the K choices, 0 elsewhere;
//            + t - (sum of t at the K-th choice), t = g_loadp phi((z - eta) / sigma) / sigma.
// lse has an error of its own, that of its size. So exp(z - lse) is divided by its sum; log p may be off by a constant,
// which log p + H is not.
#include "moe_routing/group.h"

namespace dsvlm::DSVLM_ISA {
namespace {

using namespace routing;

template <class Real, class T, int fixed_width>
class Backward {
  using S = Vectors<Real>;
  using V = typename S::V;
  using I = typename S::I;
  using G = Group<Real, fixed_width>;
  using Rows = typename G::Rows;
  static constexpr int lanes = S::lanes;

 public:
  Backward(const moe::GateBackward& call, void* scratch)
      : call(call), r(call.router), choices(call.grad_weight ? r.k : 0) {
    const int64_t width = G::width_of(r);
    clean_memory = static_cast<V*>(scratch);
    noisy_memory = clean_memory + lanes * width;
    probs = noisy_memory + lanes * width;
    more = probs + lanes * width;
    score = more + lanes * width;
    at_choice = score + r.k;
    of_prob = at_choice + r.k;
    of_loadp = of_prob + r.modalities * width;
  }

  void run(int64_t block) {
    const int64_t begin = block * moe::kBlock;
    const int64_t end = begin + moe::kBlock < r.tokens ? begin + moe::kBlock : r.tokens;
    pad(call.grad_prob, of_prob);
    if (call.grad_loadp) pad(call.grad_loadp, of_loadp);
    T* const block_end = static_cast<T*>(call.grad_logits) + end * r.experts;
    for (int64_t first = begin; first < end; first += lanes) {
      const G g(r, first, end);
      call.grad_ent ? group<true>(g, block_end) : group<false>(g, block_end);
    }
  }

 private:
  // Rows of a matrix [M, E] in whole vectors.
  void pad(const void* matrix, V* rows) const {
    const int64_t width = G::width_of(r);
    const Real* const from = static_cast<const Real*>(matrix);
    for (int64_t m = 0; m < r.modalities; ++m) {
      rows[(m + 1) * width - 1] = V{};
      __builtin_memcpy(rows + m * width, from + m * r.experts, r.experts * sizeof(Real));
    }
  }

  template <bool of_entropy>
  void group(const G& g, T* block_end) {
    const int64_t width = G::width_of(r);
    const Rows clean = g.read(static_cast<const T*>(r.logits), clean_memory);
    const bool has_more = (r.noise && choices > 0) || call.grad_loadp;
    if (has_more) add_more(g, clean);
    const V lse = g.column(static_cast<const Real*>(call.lse), 1, 0);
    V same = Real(2) * g.of_kind(static_cast<const Real*>(call.grad_z2)) * lse;  // what all factors of a row have
    V dots[lanes], entropies[lanes], totals[lanes];
    Real lses[lanes], ents[lanes], shared[lanes], inverses[lanes];
    store(lses, lse);
    for (int lane = 0; lane < lanes; ++lane) {
      const Real* const x = clean[lane];
      const V* const of_sum = of_prob + g.kind[lane] * width;
      const V lse_of_row = all<V>(lses[lane]);
      V dot{}, entropy{}, total{};
      for (int64_t v = 0; v < width; ++v) {
        const V shifted = at_least_smallest<Real>(load(x + v * lanes) - lse_of_row);
        const V p = exp_of(shifted);
        probs[lane * width + v] = p;
        total += p;
        dot += p * of_sum[v];
        if (of_entropy) entropy -= p * shifted;
      }
      dots[lane] = dot;
      totals[lane] = total;
      if (of_entropy) entropies[lane] = entropy;
    }
    const V inverse = Real(1) / across<lanes / 2, lanes>(totals, G::plus);
    store(inverses, inverse);
    if (!r.noise) same -= weights(g, clean, lse, inverse);
    same -= inverse * across<lanes / 2, lanes>(dots, G::plus);
    if (of_entropy) {
      const V ent = g.of_kind(static_cast<const Real*>(call.grad_ent));
      same -= ent * inverse * across<lanes / 2, lanes>(entropies, G::plus);
      store(ents, ent);
    }
    store(shared, same);

    T* const grads = static_cast<T*>(call.grad_logits) + g.first * r.experts;
    Real* rows = reinterpret_cast<Real*>(probs);
    int64_t stride = width * lanes;
    const bool in_place = std::is_same_v<T, Real> && r.experts == stride;
    if (in_place) rows = reinterpret_cast<Real*>(grads);
    for (int lane = 0; lane < g.count; ++lane) {
      const V* const of_sum = of_prob + g.kind[lane] * width;
      const V shared_of_row = all<V>(shared[lane]);
      Real* const row = rows + lane * stride;
      for (int64_t v = 0; v < width; ++v) {
        V factor = of_sum[v] + shared_of_row;
        if (of_entropy) factor -= ents[lane] * at_least_smallest<Real>(load(clean[lane] + v * lanes) - lses[lane]);
        store(row + v * lanes, probs[lane * width + v] * (factor * inverses[lane]));
      }
    }
    for (int lane = 0; !r.noise && lane < g.count; ++lane) add_choices(g, lane, rows + lane * stride);
    for (int lane = 0; has_more && lane < g.count; ++lane)
      for (int64_t v = 0; v < width; ++v) {
        Real* const to = rows + lane * stride + v * lanes;
        store(to, load(to) + more[lane * width + v]);
      }
    for (int lane = 0; !g.uniform && lane < g.count; ++lane)
      for (int64_t v = 0; !g.live[lane] && v < width; ++v) store(rows + lane * stride + v * lanes, V{});
    for (int lane = 0; !in_place && lane < g.count; ++lane)
      for (int64_t v = 0; v < width; ++v)
        g.write(grads + lane * r.experts, v, load(rows + lane * stride + v * lanes), block_end);
  }

  int64_t choice(const G& g, int lane, int64_t k) const {
    return call.index[(g.first + (lane < g.count ? lane : 0)) * r.k + k];
  }

  // What a row of the gradient gets at the choices alone.
  void add_choices(const G& g, int lane, Real* row) const {
    for (int64_t k = 0; k < choices; ++k) row[choice(g, lane, k)] += reinterpret_cast<const Real*>(at_choice + k)[lane];
  }

  // at_choice = softmax at the choices * its gradient there. Returns their sum.
  V weights(const G& g, const Rows& rows, V lse, V inverse) {
    V sum{}, product{};
    for (int64_t k = 0; k < choices; ++k) {
      Real x[lanes];
      for (int lane = 0; lane < lanes; ++lane) x[lane] = rows[lane][choice(g, lane, k)];
      score[k] = exp_of(at_least_smallest<Real>(load(x) - lse)) * inverse;
      at_choice[k] = g.live ? g.column(static_cast<const Real*>(call.grad_weight), r.k, k) : V{};
      sum += score[k];
      product += score[k] * at_choice[k];
    }
    const V mean = product / sum;
    product = V{};
    for (int64_t k = 0; k < choices; ++k) {
      if (r.renormalize) at_choice[k] = (at_choice[k] - mean) / sum;
      at_choice[k] *= score[k];
      product += at_choice[k];
    }
    return product;
  }

  // more = what comes by the noisy softmax and by the load probabilities.
  void add_more(const G& g, const Rows& clean) {
    const Rows noisy = r.noise ? g.sum(clean, static_cast<const Real*>(r.noise), noisy_memory) : clean;
    for (int64_t i = 0; i < lanes * G::width_of(r); ++i) more[i] = V{};
    if (r.noise && choices > 0) through_noisy(g, noisy);
    if (call.grad_loadp) through_load(g, clean, noisy);
  }

  void through_noisy(const G& g, const Rows& noisy) {
    const int64_t width = G::width_of(r);
    const V top = g.largest(noisy);
    Real tops[lanes], scale[lanes];
    V totals[lanes];
    store(tops, top);
    for (int lane = 0; lane < lanes; ++lane) {
      totals[lane] = V{};
      for (int64_t v = 0; v < width; ++v)
        totals[lane] += more[lane * width + v] =
            exp_of(at_least_smallest<Real>(load(noisy[lane] + v * lanes) - tops[lane]));
    }
    const V total = across<lanes / 2, lanes>(totals, G::plus);
    store(scale, -weights(g, noisy, top, Real(1) / total) / total);
    for (int lane = 0; lane < lanes; ++lane) {
      for (int64_t v = 0; v < width; ++v) more[lane * width + v] *= scale[lane];
      add_choices(g, lane, reinterpret_cast<Real*>(more + lane * width));
    }
  }

  void through_load(const G& g, const Rows& clean, const Rows& noisy) {
    const int64_t width = G::width_of(r);
    const V unit = all<V>(static_cast<Real>(1 / r.load_sigma));
    V terms[lanes];
    Real sums[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
      const V eta = all<V>(noisy[lane][choice(g, lane, r.k - 1)]);
      terms[lane] = V{};
      for (int64_t v = 0; v < width; ++v) {
        const V x = load(clean[lane] + v * lanes);
        const V density = of_loadp[g.kind[lane] * width + v] * normal_density<Real>((x - eta) * unit) * unit;
        const V term = x == -G::infinity ? V{} : density;
        more[lane * width + v] += term;
        terms[lane] += term;
      }
    }
    store(sums, across<lanes / 2, lanes>(terms, G::plus));
    for (int lane = 0; lane < lanes; ++lane)
      reinterpret_cast<Real*>(more + lane * width)[choice(g, lane, r.k - 1)] -= sums[lane];
  }

  const moe::GateBackward& call;
  const moe::Router& r;
  const int64_t choices;
  V *clean_memory, *noisy_memory, *probs, *more, *score, *at_choice, *of_prob, *of_loadp;
};

}  // namespace

void moe_gate_backward(const moe::GateBackward& call, int64_t block, void* scratch) {
  for_element<Backward>(call.router, [&](auto type) { typename decltype(type)::type(call, scratch).run(block); });
}

}  // namespace dsvlm::DSVLM_ISA
