// A counting sort deals the choices to buckets (expert, pool, k) in order of tokens. Where all who ask are kept, that is
// the order of the rows; of a full (expert, pool) the choices behind the capacity are found by a partial selection on
// their keys. Everything is independent of the number of threads.
#include "moe_routing/select.h"

#include <algorithm>

#include "moe_routing/route.h"
#include "tensor.h"

namespace dsvlm::moe {
namespace {

template <class Key>
class Selector {
 public:
  explicit Selector(Selection& call)
      : call(call), key(static_cast<const Key*>(call.key)), pools(call.capacity.size()),
        segments(call.experts * pools), classes(call.buckets / segments) {}

  void count(int64_t chunk, int64_t begin, int64_t end) {
    int32_t* const counts = call.asked.data() + chunk * call.buckets;
    const auto body = [&](int64_t, int64_t segment, int64_t of_class) { ++counts[segment * classes + of_class]; };
    for_each_choice(begin, end, body, [](int64_t) {});
  }

  void run() {
    place();
    plan();
    torch::stable::parallel_for(0, call.chunks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) deal(chunk);
    });
    if (full.empty()) return;
    const int64_t crowd = static_cast<int64_t>(full.size()), grain = 1 + 4096 * crowd / (1 + list.size());
    torch::stable::parallel_for(0, crowd, grain, [&](int64_t begin, int64_t end) {
      Work work;
      for (int64_t i = begin; i < end; ++i) call.by_priority ? rank(full[i], work) : compact(full[i], work);
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

  // body(choice, segment, class) for each choice that asks, and refuse(choice) for the others.
  template <class Body, class Refuse>
  void for_each_choice(int64_t begin, int64_t end, Body body, Refuse refuse) const {
    if (pools == 1 && call.k == 1) {
      for (int64_t t = begin; t < end; ++t) key[t] != kAsksNothing<Key> ? body(t, call.index[t], 0) : refuse(t);
      return;
    }
    for (int64_t t = begin; t < end; ++t) {
      const int64_t pool = call.pool ? call.pool[t] : 0;
      for (int64_t k = 0; k < call.k; ++k) {
        const int64_t choice = t * call.k + k;
        if (key[choice] != kAsksNothing<Key>)
          body(choice, call.index[choice] * pools + pool, classes > 1 ? k : 0);
        else
          refuse(choice);
      }
    }
  }

  // Rows of every segment, (expert, pool); rows that nobody gets are empty.
  void place() {
    start.resize(segments);
    std::vector<int32_t> asked(segments);
    for (int64_t chunk = 0; chunk < call.chunks(); ++chunk)
      for (int64_t b = 0; b < call.buckets; ++b) asked[b / classes] += call.asked[chunk * call.buckets + b];
    int64_t row = 0;
    const auto leave_empty_to = [&](int64_t end) {
      STD_TORCH_CHECK(end <= call.max_rows, "moe_route: max_rows is ", call.max_rows, ", but ", end,
                      " rows are needed");
      std::fill(call.src + row, call.src + end, -1);
      row = end;
    };
    for (int64_t e = 0; e < call.experts; ++e) {
      for (int64_t p = 0; p < pools; ++p) {
        const int64_t s = e * pools + p;
        const int64_t kept = call.capacity[p] < 0 ? asked[s] : std::min<int64_t>(asked[s], call.capacity[p]);
        start[s] = row;
        call.load[s] = asked[s];
        call.kept[s] = static_cast<int32_t>(kept);
        row += kept;
        if (asked[s] > 0 && (call.by_priority || kept < asked[s])) full.push_back(s);
      }
      leave_empty_to((row + call.align - 1) / call.align * call.align);
      call.offs[e] = static_cast<int32_t>(row);
    }
    leave_empty_to(call.max_rows);
  }

  // Makes of each count where its choices go: their rows, or of a full segment their places in `list` and `keys`, where
  // bucket b begins at first[b].
  void plan() {
    is_full.assign(segments, false);
    for (int64_t s : full) is_full[s] = true;
    first.resize(call.buckets + 1);
    int32_t listed = 0;
    for (int64_t s = 0; s < segments; ++s) {
      int32_t row = static_cast<int32_t>(start[s]);
      for (int64_t b = s * classes; is_full[s] && b < (s + 1) * classes; ++b) {
        first[b] = listed;
        for (int64_t chunk = 0; chunk < call.chunks(); ++chunk) {
          const int32_t count = call.asked[chunk * call.buckets + b];
          call.asked[chunk * call.buckets + b] = listed;
          listed += count;
        }
        first[b + 1] = listed;
      }
      for (int64_t chunk = 0; !is_full[s] && chunk < call.chunks(); ++chunk) {
        int32_t* const counts = call.asked.data() + chunk * call.buckets + s * classes;
        const int32_t begin = row;
        for (int64_t c = 0; c < classes; ++c) row += counts[c];
        counts[0] = begin;  // one place for all classes: rows are in order of tokens
      }
    }
    list.resize(listed);
    keys.resize(listed);
  }

  void deal(int64_t chunk) {
    int32_t* const places = call.asked.data() + chunk * call.buckets;
    const int64_t begin = chunk * call.chunk_tokens, end = std::min(call.tokens, begin + call.chunk_tokens);
    const auto body = [&](int64_t choice, int64_t segment, int64_t of_class) {
      int32_t* const place = places + segment * classes;
      if (!is_full[segment]) return give(place[0]++, static_cast<int32_t>(choice));
      const int32_t at = place[of_class]++;
      list[at] = static_cast<int32_t>(choice);
      keys[at] = key[choice];
    };
    for_each_choice(begin, end, body, [&](int64_t choice) { call.slot[choice] = -1; });
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
    const Key* const key = keys.data() + from;  // of these alone
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

  Selection& call;
  const Key* const key;
  const int64_t pools, segments, classes;
  std::vector<int64_t> start, full;
  std::vector<char> is_full;
  std::vector<int32_t> first, list;
  std::vector<Key> keys;
};

// A table of counts may have this many entries.
constexpr int64_t kCounts = 1 << 20;

}  // namespace

void divide(Selection& call, int64_t block) {
  call.buckets = call.experts * static_cast<int64_t>(call.capacity.size()) * (call.by_choice ? call.k : 1);
  const int64_t blocks = (call.tokens + block - 1) / block;
  const int64_t chunks = std::clamp<int64_t>(kCounts / std::max<int64_t>(1, call.buckets), 1, std::max<int64_t>(1, blocks));
  call.chunk_tokens = std::max<int64_t>(1, (blocks + chunks - 1) / chunks) * block;
  call.asked.assign(call.chunks() * call.buckets, 0);
}

void count(Selection& call, int64_t chunk, int64_t begin, int64_t end) {
  call.wide_key ? Selector<uint64_t>(call).count(chunk, begin, end) : Selector<uint32_t>(call).count(chunk, begin, end);
}

void select(Selection& call) { call.wide_key ? Selector<uint64_t>(call).run() : Selector<uint32_t>(call).run(); }

}  // namespace dsvlm::moe
