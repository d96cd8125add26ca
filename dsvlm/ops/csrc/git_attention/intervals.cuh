// What a block knows of the mask: the intervals of its queries, and which keys are not padding.
#pragma once

#include "tile.cuh"

namespace dsvlm::attention {

__device__ __forceinline__ Row load_row(const Row* row) {
  const int2 pair = *reinterpret_cast<const int2*>(row);
  return Row{pair.x, pair.y};
}

// The intervals of kRows queries from `first` on, inside [0, keys); (0, 0) beyond the last query.
template <int kRows>
__device__ __forceinline__ void load_intervals(Row* intervals, const Row* rows, int first, int queries, int keys) {
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    const Row row = first + i < queries ? load_row(rows + first + i) : Row{0, 0};
    const Row inside{larger(row.first, 0), smaller(row.last, keys)};
    intervals[i] = inside.live() ? inside : Row{0, 0};
  }
}

// Of the intervals that are not empty, by one warp: nothing is computed for the others that would be kept.
__device__ __forceinline__ QueryTile summarise(const Row* intervals, int count) {
  QueryTile tile;
  for (int i = lane_index(); i < count; i += 32)
    if (intervals[i].live()) tile.add(intervals[i]);
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    QueryTile theirs;
    theirs.first = __shfl_xor_sync(kAllLanes, tile.first, other);
    theirs.last = __shfl_xor_sync(kAllLanes, tile.last, other);
    theirs.common_first = __shfl_xor_sync(kAllLanes, tile.common_first, other);
    theirs.common_last = __shfl_xor_sync(kAllLanes, tile.common_last, other);
    tile.merge(theirs);
  }
  return tile;
}

// Words [begin, end) to `live`: bit i of word w says that key 32 w + i is one of [first, last) and not padding; none is
// padding where rows is null.
__device__ __forceinline__ void mark_live(uint32_t* live, int begin, int end, const Row* rows, int first, int last) {
#pragma unroll 4
  for (int word = begin + warp_index(); word < end; word += kWarps) {
    const int key = 32 * word + lane_index();
    const bool alive = key >= first && key < last && (rows == nullptr || load_row(rows + key).live());
    const uint32_t bits = __ballot_sync(kAllLanes, alive);
    if (lane_index() == 0) live[word - begin] = bits;
  }
}

// Which of N rows are live, in registers, for copy_tile.
template <int N>
struct LiveRows {
  uint32_t low, high;

  __device__ __forceinline__ LiveRows(const uint32_t* words) : low(words[0]), high(N == 64 ? words[1] : 0) {}
  __device__ __forceinline__ bool operator()(int row) const {
    return ((N == 32 || row < 32 ? low : high) >> (row % 32) & 1) != 0;
  }
};

// What mask.h wants to know of 32 keys from `begin` on.
__device__ __forceinline__ KeyTile key_word(uint32_t live, int begin) {
  KeyTile tile;
  if (live != 0) tile.first = begin + __ffs(live) - 1, tile.last = begin + 32 - __clz(live);
  if (~live != 0) tile.first_dead = begin + __ffs(~live) - 1;
  return tile;
}

template <int N>
__device__ __forceinline__ KeyTile key_tile(const uint32_t* live, int begin) {
  KeyTile tile = key_word(live[begin / 32], begin);
  if (N == 64) tile.merge(key_word(live[begin / 32 + 1], begin + 32));
  return tile;
}

// The keys that a block of queries visits: tiles of N in the hull of its intervals that hold a live key.
template <int N>
struct Walk {
  const uint32_t* live;
  int last;

  __device__ __forceinline__ int from(int key) const {
    while (key < last && live[key / 32] == 0 && (N == 32 || live[key / 32 + 1] == 0)) key += N;
    return key;
  }
};

// Bit i: key begin + i lies in the interval.
__device__ __forceinline__ uint32_t interval_bits(Row interval, int begin) {
  const int first = smaller(larger(interval.first - begin, 0), 32);
  const int last = smaller(larger(interval.last - begin, 0), 32);
  const uint32_t below_first = uint32_t((uint64_t{1} << first) - 1);
  const uint32_t below_last = uint32_t((uint64_t{1} << last) - 1);
  return below_last & ~below_first;
}

// Scores of pairs that are not allowed become -inf. intervals: of the warp's rows; live: of the tile's keys.
template <int R, int N>
__device__ __forceinline__ void mask_scores(float (&s)[R][N / 8][4], const Row* intervals, const uint32_t* live,
                                            int begin) {
  const int lane = lane_index();
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Row interval = intervals[16 * r + 8 * i + lane / 4];
#pragma unroll
      for (int w = 0; w < N / 32; ++w) {
        const uint32_t bits = (interval_bits(interval, begin + 32 * w) & live[w]) >> (2 * (lane % 4));
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          float& score = s[r][4 * w + n / 2][2 * i + n % 2];
          if ((bits >> (8 * (n / 2) + n % 2) & 1) == 0) score = -kInfinity;
        }
      }
    }
  }
}

// s = s * scale + slope * (key - position of the query), to base 2; keys from `begin`, queries from `query` on.
template <int R, int N>
__device__ __forceinline__ void add_alibi(float (&s)[R][N / 8][4], const Problem& p, int head, int begin, int query) {
  const int lane = lane_index(), first = begin + 2 * (lane % 4) - p.position_of(query + lane / 4);
  const float scale = p.scale * kLog2E, slope = p.slopes[head] * kLog2E;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int distance = first + 8 * n + e % 2 - 16 * r - 8 * (e / 2);
        s[r][n][e] = s[r][n][e] * scale + slope * float(distance);
      }
    }
  }
}

}  // namespace dsvlm::attention
