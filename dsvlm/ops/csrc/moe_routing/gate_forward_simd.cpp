// The gate: softmax, the K largest, order keys, and the sums of a block.
#include "moe_routing/group.h"

namespace dsvlm::DSVLM_ISA {
namespace {

using namespace routing;

template <class Real, class T, int fixed_width>
class Forward {
  using S = Vectors<Real>;
  using V = typename S::V;
  using I = typename S::I;
  using Key = typename S::Key;
  using Integer = typename S::Integer;
  using G = Group<Real, fixed_width>;
  using Rows = typename G::Rows;
  static constexpr int lanes = S::lanes;

 public:
  Forward(const moe::GateForward& call, void* scratch) : call(call), r(call.router) {
    const int64_t width = G::width_of(r);
    clean_memory = static_cast<V*>(scratch);
    noisy_memory = clean_memory + lanes * width;
    powers = noisy_memory + lanes * width;
    value = powers + lanes * width;
    index = reinterpret_cast<I*>(value + r.k);
    sums = value + 2 * r.k;
  }

  void run(int64_t block) {
    const int64_t width = G::width_of(r);
    const int64_t begin = block * moe::kBlock;
    const int64_t end = begin + moe::kBlock < r.tokens ? begin + moe::kBlock : r.tokens;
    const int64_t size = r.modalities * (2 * width + 2);
    for (int64_t i = 0; i < size; ++i) sums[i] = V{};
    bad_rows = I{};
    for (int64_t first = begin; first < end; first += lanes) group(G(r, first, end));
    Real* partial = static_cast<Real*>(call.partial) + block * moe::partial_size(r);
    for (int64_t row = 0; row < 2 * r.modalities; ++row, partial += r.experts)
      __builtin_memcpy(partial, sums + row * width, r.experts * sizeof(Real));
    for (int64_t i = 2 * r.modalities * width; i < size; ++i) {
      Real sum = 0;
      for (int lane = 0; lane < lanes; ++lane) sum += sums[i][lane];
      *partial++ = sum;
    }
    call.bad[block] = 0;
    for (int lane = 0; lane < lanes; ++lane) call.bad[block] += static_cast<int32_t>(bad_rows[lane]);
  }

 private:
  void group(const G& g) {
    const int64_t width = G::width_of(r);
    const V nan = all<V>(static_cast<Real>(__builtin_nan("")));
    const Rows clean = g.read(static_cast<const T*>(r.logits), clean_memory);
    const Rows noisy = r.noise ? g.sum(clean, static_cast<const Real*>(r.noise), noisy_memory) : clean;
    best(g, noisy);
    for (int64_t k = 1; k < r.k; ++k) next_best(g, noisy, k);
    const V top = value[0], eta = value[r.k - 1];
    V clean_top = top, noisy_total{};
    if (r.noise) {
      noisy_total = exponentials(noisy, top);
      clean_top = g.largest(clean);
    }
    const V total = exponentials(clean, clean_top);
    if (!r.noise) noisy_total = total;
    const I bad = g.live & (noisy_total != noisy_total);
    bad_rows -= bad;  // true is -1
    choices(g, bad, top, Real(1) / noisy_total);

    const V inverse = bad ? nan : Real(1) / total;
    const V log_total = log_of(total);
    const V lse = bad ? nan : clean_top + log_total;
    put(g, static_cast<Real*>(call.lse), 1, 0, g.live ? lse : V{});
    Real scale[lanes];
    store(scale, inverse);
    g.for_each_kind([&](int64_t m, I mask, const int* tokens, int n) {
      V* const prob_sum = sums + m * width;
      V* const ent_sum = sums + 2 * r.modalities * width + m;
      V* const z2_sum = ent_sum + r.modalities;
      for (int64_t v = 0; v < width; ++v) {
        V sum{};
        for (int i = 0; i < n; ++i) sum += powers[tokens[i] * width + v] * scale[tokens[i]];
        prob_sum[v] += sum;
      }
      V entropy = mask ? log_total : V{};  // of no token in particular: only its sum over the lanes is used
      for (int i = 0; i < n; ++i) entropy -= product[tokens[i]] * scale[tokens[i]];
      *ent_sum += entropy;
      *z2_sum += mask ? lse * lse : V{};
    });
    if (r.load_sigma > 0) load_probabilities(g, clean, eta, bad ? nan : V{});
  }

  // The first choice of each row: the largest, equal ones by lower expert. Of NaN some expert, and rubbish.
  void best(const G& g, const Rows& rows) {
    const int64_t width = G::width_of(r);
    Real top[lanes];
    Integer number[lanes];
    value[0] = g.largest(rows);
    store(top, value[0]);
    for (int lane = 0; lane < lanes; ++lane) {
      number[lane] = r.experts - 1;
      for (int64_t v = width - 1; v >= 0; --v) {
        const uint64_t bits = equal_bits(load(rows[lane] + v * lanes), all<V>(top[lane]));
        number[lane] = bits ? v * lanes + __builtin_ctzll(bits) : number[lane];
      }
    }
    __builtin_memcpy(index, number, sizeof number);
  }

  // The choice after k others.
  void next_best(const G& g, const Rows& rows, int64_t k) {
    const int64_t width = G::width_of(r);
    Real before[lanes], top[lanes];
    Integer taken[lanes];
    store(before, value[k - 1]);
    __builtin_memcpy(taken, index + k - 1, sizeof taken);
    const auto is_left = [&](V x, I number, int lane) {
      return (x < before[lane]) | ((x == before[lane]) & (number > all<I>(taken[lane])));
    };
    V largest[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
      largest[lane] = all<V>(-G::infinity);
      for (int64_t v = 0; v < width; ++v) {
        const V x = load(rows[lane] + v * lanes);
        largest[lane] = is_left(x, G::numbers(v), lane) & (x > largest[lane]) ? x : largest[lane];
      }
    }
    value[k] = across<lanes / 2, lanes>(largest, G::greater);
    store(top, value[k]);
    I lowest[lanes];
    for (int lane = 0; lane < lanes; ++lane) {
      lowest[lane] = all<I>(r.experts - 1);
      for (int64_t v = 0; v < width; ++v) {
        const V x = load(rows[lane] + v * lanes);
        const I number = G::numbers(v);
        lowest[lane] = (x == top[lane]) & is_left(x, number, lane) & (number < lowest[lane]) ? number : lowest[lane];
      }
    }
    index[k] = across<lanes / 2, lanes>(lowest, [](I a, I b) { return a < b ? a : b; });
  }

  // powers = exp(x - top) of each row, product[lane] = exp(x - top) * (x - top), not yet added up across the lanes.
  // Returns the sum of each row, NaN for a bad one.
  [[gnu::noinline]] V exponentials(const Rows& rows, V top) {
    const int64_t width = G::width_of(r);
    V of[lanes];
    Real tops[lanes];
    store(tops, top);
    for (int lane = 0; lane < lanes; ++lane) {
      const Real* const x = rows[lane];
      const V top_of_row = all<V>(tops[lane]);
      V sum{}, weighted{};
      for (int64_t v = 0; v < width; ++v) {
        const V shifted = at_least_smallest<Real>(load(x + v * lanes) - top_of_row);
        const V power = exp_of(shifted);
        powers[lane * width + v] = power;
        sum += power;
        weighted += power * shifted;
      }
      of[lane] = sum;
      product[lane] = weighted;
    }
    return across<lanes / 2, lanes>(of, G::plus);
  }

  void load_probabilities(const G& g, const Rows& clean, V eta, V nan_if_bad) {
    const int64_t width = G::width_of(r);
    const V unit = all<V>(static_cast<Real>(1 / r.load_sigma));
    Real etas[lanes], nans[lanes];
    store(etas, eta);
    store(nans, nan_if_bad);
    g.for_each_kind([&](int64_t m, I, const int* tokens, int n) {
      V* const loadp_sum = sums + (r.modalities + m) * width;
      for (int64_t v = 0; v < width; ++v) {
        V sum{};
        for (int i = 0; i < n; ++i) {
          const V x = load(clean[tokens[i]] + v * lanes);
          sum += (x == -G::infinity ? V{} : normal_cdf((x - etas[tokens[i]]) * unit)) + nans[tokens[i]];
        }
        loadp_sum[v] += sum;
      }
    });
  }

  void choices(const G& g, I bad, V top, V inverse) {
    V sum{}, first{};
    if (r.renormalize)
      for (int64_t k = 0; k < r.k; ++k) sum += exp_of(at_least_smallest<Real>(value[k] - top)) * inverse;
    for (int64_t k = 0; k < r.k; ++k) {
      // the rubbish of a bad row is multiplied by NaN
      const V score = exp_of(at_least_smallest<Real>(value[k] - top)) * inverse;
      if (k == 0) first = score;
      const V weight = g.live ? (r.renormalize ? score / sum : score) : V{};
      const I chosen = bad | ~g.live ? all<I>(k) : index[k];
      const I asks = g.live & (bad | (value[k] > -G::infinity));
      I key{};
      if (call.policy != moe::Policy::position) {
        const V by = call.policy == moe::Policy::bpr ? first : score;
        key = all<I>(moe::kZeroScore<Key>) ^ bits_as<I>(by);  // minus, also for the rubbish of a bad row
      }
      key = asks ? (bad ? all<I>(moe::kBad<Key>) : key) : all<I>(moe::kAsksNothing<Key>);
      put(g, static_cast<Real*>(call.weight), r.k, k, weight);
      put(g, static_cast<Key*>(call.key), r.k, k, key);
      put(g, call.index, r.k, k, chosen);
    }
  }

  // matrix[token, column] of each lane.
  template <class To, class Lanes>
  static void put(const G& g, To* matrix, int64_t columns, int64_t column, Lanes lane_values) {
    To values[lanes];
    for (int lane = 0; lane < lanes; ++lane) values[lane] = static_cast<To>(lane_values[lane]);
    To* const to = matrix + g.first * columns + column;
    if (columns == 1 && g.count == lanes)
      __builtin_memcpy(to, values, sizeof values);
    else
      for (int lane = 0; lane < g.count; ++lane) to[lane * columns] = values[lane];
  }

  const moe::GateForward& call;
  const moe::Router& r;
  V *clean_memory, *noisy_memory, *powers, *value, *sums;
  V product[lanes];
  I *index, bad_rows{};
};

}  // namespace

void moe_gate_forward(const moe::GateForward& call, int64_t block, void* scratch) {
  for_element<Forward>(call.router, [&](auto type) { typename decltype(type)::type(call, scratch).run(block); });
}

}  // namespace dsvlm::DSVLM_ISA
