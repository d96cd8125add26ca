// Which tiles of queries by keys are visited, decided from the rows of a GitMask: one rule for CPU and CUDA.
//
// allowed(query, key) = rows[query].first <= key < rows[query].last and live(key); a key is dead if its own row is
// empty, which is known only where queries and keys are the same positions (as many of the one as of the other).
#pragma once

#include <cstdint>

// Always inlined: sources compiled once per instruction set must not leave copies for the linker to choose from.
#if defined(__CUDACC__)
#define DSVLM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DSVLM_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace dsvlm {

constexpr int32_t kFarKey = 0x7fffffff;

// The keys of one query, half-open; last <= first: an empty row, which is padding.
struct Row {
  int32_t first, last;

  DSVLM_HOST_DEVICE bool live() const { return last > first; }
  // One comparison; dead keys are the caller's part.
  DSVLM_HOST_DEVICE bool sees(int32_t key) const {
    return static_cast<uint32_t>(key) - static_cast<uint32_t>(first) <
           (live() ? static_cast<uint32_t>(last) - static_cast<uint32_t>(first) : 0u);
  }
};

DSVLM_HOST_DEVICE int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }
DSVLM_HOST_DEVICE int32_t larger(int32_t a, int32_t b) { return a < b ? b : a; }

// What a tile of queries needs to know of its rows. Each field is a minimum or maximum over rows, so that threads
// can summarise parts and merge them: minima of first and common_last, maxima of last and common_first.
struct QueryTile {
  int32_t first = kFarKey, last = 0;                // some row sees a key: hull of all intervals
  int32_t common_first = 0, common_last = kFarKey;  // every row sees [common_first, common_last)

  DSVLM_HOST_DEVICE void add(Row row) {
    const bool live = row.live();
    first = smaller(first, live ? row.first : kFarKey);
    last = larger(last, live ? row.last : 0);
    common_first = larger(common_first, live ? row.first : kFarKey);
    common_last = smaller(common_last, live ? row.last : 0);
  }
  DSVLM_HOST_DEVICE void merge(const QueryTile& other) {
    first = smaller(first, other.first), last = larger(last, other.last);
    common_first = larger(common_first, other.common_first), common_last = smaller(common_last, other.common_last);
  }
};

// What a tile of keys needs to know of its keys: the hull of the live ones, and how far the first dead one is.
struct KeyTile {
  int32_t first = kFarKey, last = 0;
  int32_t first_dead = kFarKey;

  DSVLM_HOST_DEVICE void add(int32_t key, bool live) {
    first = smaller(first, live ? key : kFarKey);
    last = larger(last, live ? key + 1 : 0);
    first_dead = smaller(first_dead, live ? kFarKey : key);
  }
  DSVLM_HOST_DEVICE void merge(const KeyTile& other) {
    first = smaller(first, other.first), last = larger(last, other.last);
    first_dead = smaller(first_dead, other.first_dead);
  }
  // Keys [begin, end), all of them live: where no row says otherwise.
  static DSVLM_HOST_DEVICE KeyTile all_live(int32_t begin, int32_t end) {
    KeyTile tile;
    tile.first = begin, tile.last = end;
    return tile;
  }
};

enum class Visit : uint8_t { skip = 0, partial = 1, full = 2 };  // full: every pair of the tile is allowed

// The tile of `queries` by the keys [begin, end); end is not beyond the last key there is.
DSVLM_HOST_DEVICE Visit decide(const QueryTile& queries, const KeyTile& keys, int32_t begin, int32_t end) {
  const int32_t first = larger(larger(queries.first, keys.first), begin);
  const int32_t last = smaller(smaller(queries.last, keys.last), end);
  if (first >= last) return Visit::skip;
  const bool full = queries.common_first <= begin && end <= queries.common_last && keys.first_dead >= end;
  return full ? Visit::full : Visit::partial;
}

}  // namespace dsvlm
