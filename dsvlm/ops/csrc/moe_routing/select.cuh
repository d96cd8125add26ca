// The selection: one block per segment (expert, pool) finds the choices that ask for it, keeps those within its
// capacity and gives them rows; blocks behind them add up the gate's sums.
#pragma once
#include "route.cuh"

namespace dsvlm::moe::cuda {

constexpr int kSelectThreads = 1024;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kSharedAsking = 4096;  // choices of one segment in shared memory; more go to global memory
constexpr int kBins = 2048;          // two per thread
constexpr int kIdsPerThread = 32;    // a tile of choices: one bit each in a register

struct SelectShared {
  unsigned long long asking[kSharedAsking];
  union {
    struct {
      int rows[kMaxExperts], load[kMaxExperts];  // of each expert: rows it takes, choices that ask for it
    } experts;
    int bins[kBins];
  };
  unsigned long long warp_totals[kSelectWarps];
  int own_load, load_before, kept_before, own_kept;  // before: in earlier pools of this expert
  int first_row, first_asking, end_row, last_row;    // last_row: behind the last expert's
  uint32_t digit;
  int wanted, found;
};

// Exclusive sum over the threads of the block, and the sum of all. Before the next call there must be a barrier.
template <class T>
__device__ __forceinline__ T block_scan(T value, unsigned long long* warp_totals, T& total) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const auto scan = [lane](T sum) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const T other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    return sum;
  };
  const T sum = scan(value);
  if (lane == 31) warp_totals[warp] = (unsigned long long)sum;
  __syncthreads();
  const T warps = scan(T(warp_totals[lane]));
  const T before = __shfl_sync(kAllLanes, warps, (warp + 31) % 32);
  total = __shfl_sync(kAllLanes, warps, 31);
  return (warp > 0 ? before : T(0)) + sum - value;
}

// Sum of a row of counts, by eight lanes; `active` is one truth for all eight.
__device__ __forceinline__ int count_row(const Route& r, int row, bool active) {
  const int lane = int(threadIdx.x) % 8;
  const uint4* const counts = reinterpret_cast<const uint4*>(r.counts + int64_t(row) * r.stride());
  const auto add = [](uint32_t four) { return (four & 0x00ff00ffu) + (four >> 8 & 0x00ff00ffu); };
  int sum = 0;
  if (active)
#pragma unroll 4
    for (int i = lane; i < r.stride() / 16; i += 8) {
      const uint4 bytes = counts[i];
      const uint32_t pairs = add(bytes.x) + add(bytes.y) + add(bytes.z) + add(bytes.w);  // two sums of 16 bits
      sum += int(pairs & 0xffff) + int(pairs >> 16);
    }
#pragma unroll
  for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  return sum;
}

// Where this segment's rows begin and end, which depends on what all experts keep.
__device__ __forceinline__ void place_segment(const Route& r, SelectShared& s, int expert, int pool) {
  const int experts = r.logits.experts;
  for (int first = 0; first < experts; first += kSelectThreads / 8) {
    const int e = first + int(threadIdx.x) / 8;
    int load = 0, kept = 0;
    for (int p = 0; p < r.pools; ++p) {
      const int asking = count_row(r, e * r.pools + p, e < experts);
      const int keeps = r.capacity[p] < 0 ? asking : min(asking, r.capacity[p]);
      if (e == expert && p == pool && threadIdx.x % 8 == 0)
        s.own_load = asking, s.own_kept = keeps, s.load_before = load, s.kept_before = kept;
      load += asking;
      kept += keeps;
    }
    if (e < experts && threadIdx.x % 8 == 0)
      s.experts.rows[e] = (kept + r.align - 1) / r.align * r.align, s.experts.load[e] = load;
  }
  __syncthreads();
  const int e = threadIdx.x;
  const unsigned long long rows = e < experts ? s.experts.rows[e] : 0, load = e < experts ? s.experts.load[e] : 0;
  unsigned long long total;
  const unsigned long long before = block_scan(rows << 32 | load, s.warp_totals, total);
  const int row = int(before >> 32);
  if (threadIdx.x == 0) s.last_row = int(total >> 32);
  if (e == expert) {
    s.first_row = row + s.kept_before;
    s.end_row = row + int(rows);
    s.first_asking = int(before & 0xffffffffu) + s.load_before;
  }
  __syncthreads();
}

// The segments of the 32 choices that start at `first`, 16 bits each.
struct Ids {
  uint4 eight[kIdsPerThread / 8];
};

__device__ __forceinline__ Ids load_ids(const Route& r, int64_t first, int64_t choices) {
  Ids ids{};
#pragma unroll
  for (int i = 0; i < kIdsPerThread / 8; ++i)  // the array is padded to 16 bytes
    if (first + 8 * i < choices) ids.eight[i] = *reinterpret_cast<const uint4*>(r.segment + first + 8 * i);
  return ids;
}

// Which of them ask for `segment`, as bits.
__device__ __forceinline__ uint32_t matches(const Ids& ids, int64_t first, int64_t choices, uint32_t segment) {
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < kIdsPerThread / 8; ++i) {
    const uint32_t words[4] = {ids.eight[i].x, ids.eight[i].y, ids.eight[i].z, ids.eight[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      mask |= uint32_t((words[j] & 0xffffu) == segment) << (8 * i + 2 * j);
      mask |= uint32_t(words[j] >> 16 == segment) << (8 * i + 2 * j + 1);
    }
  }
  const int64_t left = choices - first;
  return left >= kIdsPerThread ? mask : left <= 0 ? 0 : mask & ((1u << left) - 1);
}

__device__ __forceinline__ void give_row(const Route& r, int choice, int row) {
  r.slot[choice] = row;
  if (row >= 0) r.src[row] = choice;
}

// The (key, number of equal ones) up to which the `wanted` smallest keys reach: a radix search, 11 bits at a time from
// the top. Returns how many low bits of the keys never had to be looked at.
__device__ __forceinline__ int find_threshold(SelectShared& s, const unsigned long long* asking, int load, int wanted) {
  uint32_t prefix = 0;
  int shift = 22;
  for (;; shift -= 11) {
    for (int i = threadIdx.x; i < kBins; i += kSelectThreads) s.bins[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < load; i += kSelectThreads) {
      const uint32_t key = uint32_t(asking[i] >> 32);
      if (shift == 22 || key >> (shift + 11) == prefix) atomicAdd(&s.bins[key >> shift & (kBins - 1)], 1);
    }
    __syncthreads();
    const int first = 2 * int(threadIdx.x), low = s.bins[first], high = s.bins[first + 1];
    int total;
    const int before = block_scan(low + high, s.warp_totals, total);
    if (before < wanted && wanted <= before + low + high) {
      const bool second = before + low < wanted;
      s.digit = first + second;
      s.wanted = wanted - before - (second ? low : 0);
      s.found = second ? high : low;
    }
    __syncthreads();
    prefix = prefix << 11 | s.digit;
    wanted = s.wanted;
    const bool all = s.found == wanted;
    __syncthreads();
    if (all || shift == 0) break;
  }
  if (threadIdx.x == 0) s.digit = prefix;
  __syncthreads();
  return shift;
}

// Rows in order of choices for those below the threshold, and for the first of those that are equal to it.
__device__ __forceinline__ void keep_first(const Route& r, SelectShared& s, const unsigned long long* asking,
                                           int load) {
  const int shift = find_threshold(s, asking, load, s.own_kept);
  const uint32_t threshold = s.digit;
  const int share = (load + kSelectThreads - 1) / kSelectThreads;
  const int begin = min(int(threadIdx.x) * share, load), end = min(begin + share, load);
  unsigned long long counts = 0;  // below the threshold in the upper half, equal in the lower
  for (int i = begin; i < end; ++i) {
    const uint32_t key = uint32_t(asking[i] >> 32) >> shift;
    counts += (unsigned long long)(key < threshold) << 32 | (unsigned long long)(key == threshold);
  }
  unsigned long long total;
  const unsigned long long before = block_scan(counts, s.warp_totals, total);
  int below = int(before >> 32), equal = int(before & 0xffffffffu);
  for (int i = begin; i < end; ++i) {
    const uint32_t key = uint32_t(asking[i] >> 32) >> shift;
    const bool keep = key < threshold || (key == threshold && equal < s.wanted);
    give_row(r, int(asking[i] & 0xffffffffu), keep ? s.first_row + below + min(equal, s.wanted) : -1);
    below += key < threshold;
    equal += key == threshold;
  }
}

// Ascending, by compare-exchanges that all point the same way, so that no padding to a power of two is needed.
__device__ __forceinline__ void sort(unsigned long long* values, int count) {
  for (int size = 2; size < 2 * count; size *= 2)
    for (int step = size / 2; step > 0; step /= 2) {
      for (int pair = threadIdx.x; pair < (count + size) / 2; pair += kSelectThreads) {
        const int low = pair / step * 2 * step + pair % step;
        const int high = 2 * step == size ? low / size * size + size - 1 - low % size : low + step;
        if (high < count && values[high] < values[low]) {
          const unsigned long long value = values[low];
          values[low] = values[high];
          values[high] = value;
        }
      }
      __syncthreads();
    }
}

// The gate's sums by block in a fixed order, by one warp; column number `columns` is the count of bad rows.
__device__ __forceinline__ void add_up(const Route& r, int column) {
  const Logits& logits = r.logits;
  const int lane = int(threadIdx.x) % 32, columns = r.columns(), width = r.padded_experts();
  if (column == columns) {
    int bad = 0;
    for (int i = lane; i < r.blocks(); i += 32) bad += r.counts[int64_t(r.segments()) * r.stride() + i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) bad += __shfl_xor_sync(kAllLanes, bad, step);
    if (lane == 0) *r.bad_rows = bad;
    return;
  }
  float sum = 0;
#pragma unroll 8
  for (int i = lane; i < r.blocks(); i += 32) sum += r.sums[int64_t(i) * columns + column];
  sum = group_sum<32>(sum);
  if (lane != 0) return;
  const int table = logits.modalities * width, row = column / width % logits.modalities, expert = column % width;
  if (column < r.entropy_column()) {
    if (expert < logits.experts) (column < table ? r.prob_sum : r.loadp_sum)[row * logits.experts + expert] = sum;
    if (expert < logits.experts && r.tables() == 1) r.loadp_sum[row * logits.experts + expert] = 0;
  } else if (const int rest = column - r.entropy_column(); rest < 2 * logits.modalities) {
    (rest < logits.modalities ? r.ent_sum[rest] : r.z2_sum[rest - logits.modalities]) = sum;
  }
}

__global__ void __launch_bounds__(kSelectThreads, 1) select(const Route r) {
  __shared__ SelectShared s;
  const int segment = int(blockIdx.x);
  if (segment >= r.segments()) {
    const int warps = int(gridDim.x - r.segments()) * kSelectWarps;
    for (int i = (segment - r.segments()) * kSelectWarps + int(threadIdx.x) / 32; i <= r.columns(); i += warps)
      add_up(r, i);
    return;
  }
  const int expert = segment / r.pools, pool = segment % r.pools;
  const int64_t choices = int64_t(r.logits.tokens) * r.logits.k;
  constexpr int64_t tile = kSelectThreads * kIdsPerThread;
  int64_t first = int64_t(threadIdx.x) * kIdsPerThread;
  Ids ids = load_ids(r, first, choices);  // on their way while the segment's place is found
  place_segment(r, s, expert, pool);

  // choices that ask for the segment, in their order: all kept ones get their row at once, others go to a list
  const int load = s.own_load, kept = s.own_kept;
  const bool at_once = !r.by_priority && kept == load;
  unsigned long long* const asking = load <= kSharedAsking ? s.asking : r.asking + s.first_asking;
  int found = 0;
  for (int64_t begin = 0; begin < choices && found < load; begin += tile) {
    int count;
    uint32_t mask = matches(ids, first, choices, uint32_t(segment));
    const int before = block_scan(__popc(mask), s.warp_totals, count);
    for (int place = found + before; mask; mask &= mask - 1, ++place) {
      const int choice = int(first) + __ffs(int(mask)) - 1;
      if (at_once)
        give_row(r, choice, s.first_row + place);
      else
        asking[place] = (unsigned long long)choice;
    }
    found += count;
    first += tile;
    if (found < load) ids = load_ids(r, first, choices);
    __syncthreads();
  }
  if (!at_once) {
    for (int i = threadIdx.x; i < load; i += kSelectThreads)
      asking[i] |= (unsigned long long)r.key[asking[i]] << 32;
    __syncthreads();
    if (r.by_priority) {
      sort(asking, load);
      for (int i = threadIdx.x; i < load; i += kSelectThreads)
        give_row(r, int(asking[i] & 0xffffffffu), i < kept ? s.first_row + i : -1);
    } else if (kept > 0) {
      keep_first(r, s, asking, load);
    } else {
      for (int i = threadIdx.x; i < load; i += kSelectThreads) give_row(r, int(asking[i] & 0xffffffffu), -1);
    }
  }

  // rows that nobody has: behind this expert's, by its last pool, and behind all experts', by all blocks
  if (pool == r.pools - 1)
    for (int row = s.first_row + kept + int(threadIdx.x); row < s.end_row; row += kSelectThreads) r.src[row] = -1;
  for (int64_t row = s.last_row + int64_t(segment) * kSelectThreads + threadIdx.x; row < r.max_rows;
       row += int64_t(r.segments()) * kSelectThreads)
    r.src[row] = -1;
  if (threadIdx.x != 0) return;
  r.load[segment] = load;
  r.kept[segment] = kept;
  if (pool == 0) r.offs[expert] = s.end_row;
}

inline cudaError_t launch_select(const Route& route, cudaStream_t stream) {
  const int columns = (route.columns() + kSelectWarps) / kSelectWarps;  // one more: bad rows
  const int few = route.segments() < 128 ? 4 : route.segments() / 32;   // with 128 segments still one wave of blocks
  const int blocks = route.segments() + (columns < few ? columns : few);
  return device::launch(select, dim3(blocks), dim3(kSelectThreads), 0, stream, route);
}

}  // namespace dsvlm::moe::cuda
