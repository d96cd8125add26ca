// Gradients of keys and values: a block owns 64 keys of one key head, 16 a warp, and walks over the queries that see
// one of them, head after head of its group: sums need no atomics and come in one order.
//
// Scores are computed transposed, so that weights and their gradients are left operands as they lie in registers.
#pragma once

#include "backward_queries.cuh"

namespace dsvlm::attention {

// The tiles of queries that a block of keys visits, in every head of its group.
struct TileWalk {
  const uint32_t* visited;  // one bit a tile
  int tiles, heads;         // heads: where the group ends
  int head, tile;

  __device__ __forceinline__ int from(int begin) const {
    while (begin < tiles) {
      const uint32_t rest = visited[begin / 32] & (kAllLanes << begin % 32);
      if (rest != 0) return begin / 32 * 32 + __ffs(rest) - 1;
      begin = (begin / 32 + 1) * 32;
    }
    return tiles;
  }
  __device__ __forceinline__ bool done() const { return head >= heads; }
  __device__ __forceinline__ void start() {
    tile = from(0);
    if (tile >= tiles) head = heads;
  }
  __device__ __forceinline__ void advance() {
    tile = from(tile + 1);
    if (tile >= tiles) ++head, tile = from(0);
  }
};

// As add_alibi, where rows are keys, from `key` on for this lane, and columns queries, from `query` on.
template <int N>
__device__ __forceinline__ void add_alibi_transposed(float (&s)[N / 8][4], const Problem& p, int head, int key,
                                                     int query) {
  const int first = key - p.position_of(query + lane_index() % 4 * 2);
  const float scale = p.scale * kLog2E, slope = p.slopes[head] * kLog2E;
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      s[n][e] = s[n][e] * scale + slope * float(first + 8 * (e / 2) - 8 * n - e % 2);
  }
}

// Pairs that are not allowed: weight and gradient become 0. intervals, of queries, and key: from this lane's first on.
template <int N>
__device__ __forceinline__ void mask_transposed(float (&s)[N / 8][4], float (&grad_weights)[N / 8][4],
                                                const Row* intervals, int key) {
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (!intervals[8 * n + e % 2].sees(key + 8 * (e / 2))) s[n][e] = -kInfinity, grad_weights[n][e] = 0;
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, BackwardShape<D>::kKeyBlocks) backward_keys_kernel(Backward p) {
  using Shape = BackwardShape<D>;
  constexpr int kRows = Shape::kRows, N = Shape::kQueries, kTile = N * kPitch<D>;
  DSVLM_DYNAMIC_SHARED(shared);
  T* k_tile = reinterpret_cast<T*>(shared);
  T* v_tile = k_tile + kRows * kPitch<D>;
  T* q_tiles = v_tile + kRows * kPitch<D>;
  T* grad_tiles = q_tiles + 2 * kTile;
  const int tiles = Shape::summaries(p.queries), words = (tiles + 31) / 32;
  uint2* columns = reinterpret_cast<uint2*>(grad_tiles + 2 * kTile);  // per stage: N statistics, N intervals
  QueryTile* query_tiles = reinterpret_cast<QueryTile*>(columns + 4 * N);
  uint32_t* live = reinterpret_cast<uint32_t*>(query_tiles + 32 * words);  // queries
  uint32_t* visited = live + 32 * words;

  const int first_key = blockIdx.x * kRows, kv_head = blockIdx.y, batch = blockIdx.z, group = p.heads / p.kv_heads;
  const int own = 16 * warp_index(), lane = lane_index();
  __shared__ uint32_t live_keys[2];
  mark_live(live_keys, first_key / 32, first_key / 32 + 2, p.key_rows(batch), first_key, p.keys);
  __syncthreads();
  copy_tile<D, kRows>(k_tile, p.k.at(batch, kv_head), p.k.position, first_key, LiveRows<kRows>(live_keys));
  copy_tile<D, kRows>(v_tile, p.v.at(batch, kv_head), p.v.position, first_key, LiveRows<kRows>(live_keys));

  // dead keys are no reason to mask: what they gather is not kept
  KeyTile block_keys = key_word(live_keys[0], first_key), warp_keys;
  block_keys.merge(key_word(live_keys[1], first_key + 32));
  warp_keys = key_word(live_keys[own / 32] >> (own % 32) & 0xffffu, first_key + own);
  block_keys.first_dead = warp_keys.first_dead = kFarKey;
  const Summary* summaries = p.summaries + (p.rows_batch != 0 ? int64_t(batch) * tiles : 0);
  for (int tile = threadIdx.x; tile < 32 * words; tile += kThreads) {
    bool visit = false;
    if (tile < tiles) {
      const Summary summary = summaries[tile];
      visit = decide(summary.tile, block_keys, first_key, first_key + kRows) != Visit::skip;
      query_tiles[tile] = summary.tile, live[tile] = summary.live;
    }
    const uint32_t bits = __ballot_sync(kAllLanes, visit);
    if (lane == 0) visited[tile / 32] = bits;
  }
  __syncthreads();

  const auto load_queries = [&](const TileWalk& at, int stage) {
    const int query = at.tile * N;
    const LiveRows<N> alive(live + at.tile);
    copy_tile<D, N>(q_tiles + stage * kTile, p.q.at(batch, at.head), p.q.position, query, alive);
    copy_tile<D, N>(grad_tiles + stage * kTile, p.grad_out.at(batch, at.head), p.grad_out.position, query, alive);
  };
  // What a query brings along, half of the threads one each; fetched before a tile's products, kept after them.
  const auto fetch = [&](const TileWalk& at) {
    const int query = at.tile * N + threadIdx.x % N;
    const bool statistic = threadIdx.x < N;
    uint2 column = make_uint2(statistic ? __float_as_uint(kInfinity) : 0, 0);  // beyond the last query
    if (query < p.queries && threadIdx.x < 2 * N) {
      const void* from = p.statistics + (int64_t(batch) * p.heads + at.head) * p.queries + query;
      if (!statistic) from = p.rows + batch * p.rows_batch + query;
      column = *static_cast<const uint2*>(from);
    }
    return column;
  };
  const auto keep = [&](int stage, uint2 column) {
    if (threadIdx.x < 2 * N) columns[stage * 2 * N + threadIdx.x] = column;
  };

  float grad_k[1][D / 8][4] = {}, grad_v[1][D / 8][4] = {};
  const float factor = p.slopes != nullptr ? 1 : p.scale * kLog2E;  // what is left to multiply scores with
  TileWalk walk{visited, tiles, (kv_head + 1) * group, kv_head * group, 0};
  walk.start();
  int stage = 0;
  if (!walk.done()) {
    load_queries(walk, stage);
    keep(stage, fetch(walk));
  }
  device::copy_async_commit();
  while (!walk.done()) {
    device::copy_async_wait<0>();
    __syncthreads();
    TileWalk next = walk;
    next.advance();
    uint2 column{};
    if (!next.done()) {
      load_queries(next, 1 - stage);
      column = fetch(next);
    }
    device::copy_async_commit();

    const int key = first_key + own;
    const Visit visit = decide(query_tiles[walk.tile], warp_keys, key, smaller(key + 16, p.keys));
    if (visit != Visit::skip) {
      const T* q_tile = q_tiles + stage * kTile;
      const T* grad_tile = grad_tiles + stage * kTile;
      float s[1][N / 8][4] = {}, grad_weights[1][N / 8][4] = {};
      multiply_transposed<D, 1, N>(s, k_tile + own * kPitch<D>, q_tile);
      multiply_transposed<D, 1, N>(grad_weights, v_tile + own * kPitch<D>, grad_tile);
      const uint2* own_columns = columns + stage * 2 * N + lane % 4 * 2;
      const int own_key = key + lane / 4;
      if (p.slopes != nullptr) add_alibi_transposed<N>(s[0], p, walk.head, own_key, walk.tile * N);
      if (visit == Visit::partial)
        mask_transposed<N>(s[0], grad_weights[0], reinterpret_cast<const Row*>(own_columns + N), own_key);
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        const float4 pair = *reinterpret_cast<const float4*>(own_columns + 8 * n);  // lse and delta of two queries
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float weight = device::fast_exp2(s[0][n][e] * factor - (e % 2 ? pair.z : pair.x));
          s[0][n][e] = weight;
          grad_weights[0][n][e] = weight * (grad_weights[0][n][e] - (e % 2 ? pair.w : pair.y));
        }
      }
      uint32_t left[1][N / 16][4];
      fragments<T, 1, N>(left, s);
      multiply<D, 1, N>(grad_v, left, grad_tile);
      fragments<T, 1, N>(left, grad_weights);
      multiply<D, 1, N>(grad_k, left, q_tile);
    }
    if (!next.done()) keep(1 - stage, column);
    walk = next, stage = 1 - stage;
  }
  device::copy_async_wait<0>();
  __syncthreads();

  float kept_k[1][2], kept_v[1][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool live_row = LiveRows<kRows>(live_keys)(own + 8 * i + lane / 4);
    kept_k[0][i] = live_row ? p.scale : 0, kept_v[0][i] = live_row ? 1 : 0;
  }
  const int64_t stride = int64_t(p.kv_heads) * D;
  const int64_t offset = (int64_t(batch) * p.keys + first_key + own) * stride + kv_head * D;
  const int count = p.keys - first_key - own;
  store_rows<D, 1>(static_cast<T*>(p.grad_k) + offset, stride, count, k_tile + own * kPitch<D>, grad_k, kept_k);
  store_rows<D, 1>(static_cast<T*>(p.grad_v) + offset, stride, count, v_tile + own * kPitch<D>, grad_v, kept_v);
}

template <class T, int D>
cudaError_t start_backward(const Backward& p, cudaStream_t stream) {
  using Shape = BackwardShape<D>;
  const cudaError_t error = start_blocks(backward_queries_kernel<T, D>, p.queries, Shape::kRows, p.heads,
                                         Shape::query_bytes(p.keys), stream, p);
  if (error != cudaSuccess) return error;
  return start_blocks(backward_keys_kernel<T, D>, p.keys, Shape::kRows, p.kv_heads, Shape::key_bytes(p.queries),
                      stream, p);
}

template <class T>
cudaError_t backward(const Backward& p, int head_dim, cudaStream_t stream) {
  switch (head_dim) {
    case 64: return start_backward<T, 64>(p, stream);
    case 80: return start_backward<T, 80>(p, stream);
    case 96: return start_backward<T, 96>(p, stream);
    case 128: return start_backward<T, 128>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace dsvlm::attention
