// A counting sort deals the choices to buckets (expert, pool, k) in order of tokens; of a full (expert, pool) the choices
// behind the capacity are found by a partial selection on their keys. Everything is independent of the number of threads.
#include "moe_routing/select.h"

#include <algorithm>

#include "moe_routing/route.h"
#include "tensor.h"

namespace dsvlm::moe {
namespace {

template <class Key>
class Selector {
 public:
  explicit Selector(const Selection& call)
      : call(call), pools(call.capacity.size()), segments(call.experts * pools), classes(call.by_choice ? call.k : 1),
        buckets(segments * classes) {}

  void run() {
    deal();
    place();
    std::fill(call.src, call.src + call.max_rows, -1);
    const int64_t grain = std::max<int64_t>(1, 2048 * segments / std::max<int64_t>(1, call.tokens * call.k));
    torch::stable::parallel_for(0, segments, grain, [&](int64_t begin, int64_t end) {
      Work work;
      for (int64_t s = begin; s < end; ++s) call.by_priority ? rank(s, work) : compact(s, work);
    });
  }

 private:
  struct Item {
    Key key;
    int32_t choice;
    bool operator<(const Item& other) const {
      return key != other.key ? key < other.key : choice < other.choice;
    }
  };
  struct Work {
    std::vector<Key> keys;
    std::vector<Item> items;
    std::vector<int32_t> chosen, merged;
  };

  int64_t bucket_of(int64_t choice, int64_t token) const {
    const int64_t segment = call.index[choice] * pools + (call.pool ? call.pool[token] : 0);
    return segment * classes + (classes > 1 ? choice - token * call.k : 0);
  }

  // list and keys: the choices that ask, bucket after bucket, in order of tokens; first[b]: where bucket b begins.
  void deal() {
    const Key* const key = static_cast<const Key*>(call.key);
    int64_t chunks = std::clamp<int64_t>(call.tokens / 2048, 1, 64);
    chunks = std::max<int64_t>(1, std::min(chunks, (int64_t{1} << 22) / buckets));
    const int64_t size = (call.tokens + chunks - 1) / chunks;
    std::vector<int32_t> place(chunks * buckets);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        int32_t* const count = place.data() + chunk * buckets;
        for (int64_t t = chunk * size; t < std::min(call.tokens, (chunk + 1) * size); ++t)
          for (int64_t c = t * call.k; c < (t + 1) * call.k; ++c)
            if (key[c] != kAsksNothing<Key>) ++count[bucket_of(c, t)];
      }
    });
    first.resize(buckets + 1);
    int32_t next = 0;
    for (int64_t b = 0; b < buckets; ++b) {
      first[b] = next;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int32_t count = place[chunk * buckets + b];
        place[chunk * buckets + b] = next;
        next += count;
      }
    }
    first[buckets] = next;
    list.resize(next);
    keys.resize(next);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        int32_t* const to = place.data() + chunk * buckets;
        for (int64_t t = chunk * size; t < std::min(call.tokens, (chunk + 1) * size); ++t)
          for (int64_t c = t * call.k; c < (t + 1) * call.k; ++c) {
            if (key[c] == kAsksNothing<Key>) {
              call.slot[c] = -1;
              continue;
            }
            const int32_t at = to[bucket_of(c, t)]++;
            list[at] = static_cast<int32_t>(c);
            keys[at] = key[c];
          }
      }
    });
  }

  void place() {
    start.resize(segments);
    int64_t row = 0;
    for (int64_t e = 0; e < call.experts; ++e) {
      for (int64_t p = 0; p < pools; ++p) {
        const int64_t s = e * pools + p, asked = first[(s + 1) * classes] - first[s * classes];
        const int64_t kept = call.capacity[p] < 0 ? asked : std::min(asked, call.capacity[p]);
        start[s] = row;
        call.load[s] = static_cast<int32_t>(asked);
        call.kept[s] = static_cast<int32_t>(kept);
        row += kept;
      }
      row = (row + call.align - 1) / call.align * call.align;
      call.offs[e] = static_cast<int32_t>(row);
    }
    STD_TORCH_CHECK(row <= call.max_rows, "moe_route: max_rows is ", call.max_rows, ", but ", row, " rows are needed");
  }

  void give(int64_t row, int32_t choice) {
    call.slot[choice] = static_cast<int32_t>(row);
    call.src[row] = choice;
  }

  // Rows in order of tokens: the classes, each in that order, are thinned and merged.
  void compact(int64_t segment, Work& work) {
    int64_t left = call.kept[segment];
    work.chosen.clear();
    for (int64_t b = segment * classes; b < (segment + 1) * classes; ++b) {
      const int64_t n = first[b + 1] - first[b], take = std::min(n, left), before = work.chosen.size();
      thin(first[b], n, take, work);
      left -= take;
      if (before > 0 && take > 0) {
        work.merged.resize(work.chosen.size());
        const auto middle = work.chosen.begin() + before;
        std::merge(work.chosen.begin(), middle, middle, work.chosen.end(), work.merged.begin());
        work.chosen.swap(work.merged);
      }
    }
    for (size_t i = 0; i < work.chosen.size(); ++i) give(start[segment] + i, work.chosen[i]);
  }

  // Appends the `take` choices of smallest (key, token) in order of tokens; the others get no row.
  void thin(int64_t from, int64_t n, int64_t take, Work& work) {
    const int32_t* const choices = list.data() + from;
    const Key* const key = keys.data() + from;
    if (take == n) {
      work.chosen.insert(work.chosen.end(), choices, choices + n);
      return;
    }
    if (take == 0) {
      for (int64_t i = 0; i < n; ++i) call.slot[choices[i]] = -1;
      return;
    }
    work.keys.assign(key, key + n);
    std::nth_element(work.keys.begin(), work.keys.begin() + take - 1, work.keys.end());
    const Key limit = work.keys[take - 1];
    int64_t ties = take - std::count_if(key, key + n, [=](Key k) { return k < limit; });
    for (int64_t i = 0; i < n; ++i) {
      if (key[i] < limit || (key[i] == limit && ties-- > 0)) {
        work.chosen.push_back(choices[i]);
      } else {
        call.slot[choices[i]] = -1;
      }
    }
  }

  // Rows in order of priority.
  void rank(int64_t segment, Work& work) {
    int64_t left = call.kept[segment], row = start[segment];
    for (int64_t b = segment * classes; b < (segment + 1) * classes; ++b) {
      const int64_t n = first[b + 1] - first[b], take = std::min(n, left);
      work.items.resize(n);
      for (int64_t i = 0; i < n; ++i) work.items[i] = {keys[first[b] + i], list[first[b] + i]};
      if (take < n) std::nth_element(work.items.begin(), work.items.begin() + take, work.items.end());
      std::sort(work.items.begin(), work.items.begin() + take);
      for (int64_t i = 0; i < take; ++i) give(row++, work.items[i].choice);
      for (int64_t i = take; i < n; ++i) call.slot[work.items[i].choice] = -1;
      left -= take;
    }
  }

  const Selection& call;
  const int64_t pools, segments, classes, buckets;
  std::vector<int32_t> first, list;
  std::vector<Key> keys;
  std::vector<int64_t> start;
};

}  // namespace

void select(const Selection& call) {
  call.wide_key ? Selector<uint64_t>(call).run() : Selector<uint32_t>(call).run();
}

}  // namespace dsvlm::moe
