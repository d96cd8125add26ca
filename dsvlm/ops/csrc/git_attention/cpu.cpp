// The GIT attention on the CPU: checks, the plan of independent tasks, threads. The arithmetic is in *_simd.cpp.
#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace dsvlm {
namespace {

constexpr int64_t kShortSpan = 64;    // queries; shorter spans are joined with the next one
constexpr int64_t kQueryChunk = 192;  // queries; a multiple of every tile, so that cuts leave tiles as they are
constexpr int64_t kFewTasks = 4;      // for each thread
constexpr double kGrain = 1 << 20;    // multiplications for scores that are worth another thread, about 50 us
constexpr int64_t kAlignment = 64;

// The rows of one batch row, put right: within [0, keys), empty ones (0, 0).
std::vector<Row> read_rows(const int32_t* rows, int64_t queries, int64_t keys) {
  std::vector<Row> found(queries);
  for (int64_t q = 0; q < queries; ++q) {
    const Row row{larger(rows[2 * q], 0), smaller(rows[2 * q + 1], static_cast<int32_t>(keys))};
    found[q] = row.live() ? row : Row{0, 0};
  }
  return found;
}

bool known_dead(const std::vector<Row>& rows, int64_t keys, int64_t key) {
  return static_cast<int64_t>(rows.size()) == keys && !rows[key].live();
}

// Which keys take part: not padding, and seen by some query. What others hold never enters arithmetic.
std::vector<uint8_t> seen_keys(const std::vector<Row>& rows, int64_t keys) {
  std::vector<int32_t> change(keys + 1, 0);
  for (const Row& row : rows) ++change[row.first], --change[row.last];
  std::vector<uint8_t> seen(keys);
  int32_t watchers = 0;
  for (int64_t key = 0; key < keys; ++key) {
    watchers += change[key];
    seen[key] = watchers > 0 && !known_dead(rows, keys, key);
  }
  return seen;
}

// Cuts a batch row where no later query sees a key of an earlier one: packed segments become tasks of their own.
std::vector<Span> find_spans(const std::vector<Row>& rows, int64_t keys) {
  const int64_t queries = rows.size();
  std::vector<int32_t> later(queries + 1, kFarKey);  // first key that this or a later query sees
  for (int64_t q = queries - 1; q >= 0; --q)
    later[q] = smaller(later[q + 1], rows[q].live() ? rows[q].first : kFarKey);
  std::vector<Span> spans;
  int64_t begin = 0, first = kFarKey, last = 0, owned = 0;
  for (int64_t q = 0; q < queries; ++q) {
    if (rows[q].live()) first = std::min<int64_t>(first, rows[q].first), last = std::max<int64_t>(last, rows[q].last);
    const bool end = q + 1 == queries;
    if (!end && (later[q + 1] < last || q + 1 - begin < kShortSpan)) continue;
    if (last == 0) first = last = owned;
    spans.push_back({begin, q + 1, first, last, owned, end ? keys : last});
    begin = q + 1, owned = last, first = kFarKey, last = 0;
  }
  return spans;
}

// Everything a call plans before threads start; one entry of rows, live and spans where rows serve the whole batch.
struct Plan {
  std::vector<std::vector<Row>> rows;
  std::vector<std::vector<uint8_t>> live;
  std::vector<Task> tasks;
  int64_t most_keys = 0;
  double work = 0;  // multiplications for scores
};

// chunk: queries of a task at most, 0 = no limit.
Plan make_plan(const Tensor& rows, int64_t batch, const Attention& a, int64_t chunk) {
  Plan plan;
  const int32_t* data = static_cast<const int32_t*>(rows.const_data_ptr());
  std::vector<std::vector<Span>> spans;
  for (int64_t b = 0; b < rows.size(0); ++b) {
    plan.rows.push_back(read_rows(data + b * a.queries * 2, a.queries, a.keys));
    plan.live.push_back(seen_keys(plan.rows[b], a.keys));
    spans.emplace_back();
    for (const Span& span : find_spans(plan.rows[b], a.keys))
      for (int64_t begin = span.query_begin; begin < span.query_end; begin += chunk ? chunk : a.queries) {
        Span part = span;
        part.query_begin = begin;
        if (chunk) part.query_end = std::min(span.query_end, begin + chunk);
        spans[b].push_back(part);
        plan.most_keys = std::max<int64_t>(plan.most_keys, part.key_end - part.key_begin);
      }
  }
  const double per_pair = double(a.heads / a.kv_heads) * a.dim;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t entry = rows.size(0) == 1 ? 0 : b;
    for (int64_t head = 0; head < a.kv_heads; ++head)
      for (const Span& span : spans[entry]) {
        plan.tasks.push_back({b, head, plan.rows[entry].data(), plan.live[entry].data(), span});
        plan.work += double(span.query_end - span.query_begin) * (span.key_end - span.key_begin) * per_pair;
      }
  }
  return plan;
}

// Threads take tasks in turn; each task writes what no other does, so that results do not depend on who takes it.
// A little work wakes nobody: on a busy machine the call would wait for a thread that has no core.
template <class Run>
void run_tasks(const Plan& plan, int64_t scratch_bytes, Run run) {
  const std::vector<Task>& tasks = plan.tasks;
  const int64_t worth = 1 + static_cast<int64_t>(plan.work / kGrain);
  const int64_t workers = std::min<int64_t>({torch::stable::get_num_threads(), worth, int64_t(tasks.size())});
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const std::unique_ptr<char[]> memory(new char[scratch_bytes + kAlignment]);
    void* scratch = memory.get();
    size_t space = scratch_bytes + kAlignment;
    std::align(kAlignment, scratch_bytes, scratch, space);
    for (size_t i; (i = next++) < tasks.size();) run(tasks[i], scratch);
  });
}

Operand operand(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

Element element_of(const char* op, const Tensor& q) {
  if (q.scalar_type() == ScalarType::Float) return Element::f32;
  if (q.scalar_type() == ScalarType::Double) return Element::f64;
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::BFloat16, op, ": on the CPU q is float32, float64 or bfloat16, not ",
                  "dtype number ", static_cast<int>(q.scalar_type()), " of torch's ScalarType");
  return Element::bf16;
}

Attention checked(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rows,
                  const std::optional<Tensor>& slopes, double scale) {
  check_shape(op, "q", q, {-1, -1, -1, -1});
  check_shape(op, "k", k, {q.size(0), -1, -1, q.size(3)});
  check_shape(op, "v", v, {k.size(0), k.size(1), k.size(2), k.size(3)});
  check_shape(op, "rows", rows, {-1, q.size(1), 2});
  const int64_t heads = q.size(2), kv_heads = k.size(2);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, op, ": q has ", heads, " heads, expected a multiple of the ",
                  kv_heads, " of k");
  STD_TORCH_CHECK(rows.size(0) == 1 || rows.size(0) == q.size(0), op, ": rows is ", shape_of(rows),
                  ", expected 1 or ", q.size(0), " in its first dimension");
  check_type(op, "rows", rows, ScalarType::Int);
  check_type(op, "k", k, q.scalar_type());
  check_type(op, "v", v, q.scalar_type());
  for (const auto& [name, x] : {std::pair("q", &q), std::pair("k", &k), std::pair("v", &v)})
    check_last_contiguous(op, name, *x);
  Attention a{};
  a.element = element_of(op, q);
  a.queries = q.size(1), a.keys = k.size(1), a.heads = heads, a.kv_heads = kv_heads, a.dim = q.size(3);
  a.q = operand(q), a.k = operand(k), a.v = operand(v);
  a.scale = scale;
  if (slopes) {
    check_shape(op, "alibi_slopes", *slopes, {heads});
    check_type(op, "alibi_slopes", *slopes, ScalarType::Float);
    STD_TORCH_CHECK(slopes->is_contiguous(), op, ": alibi_slopes must be contiguous");
    a.slopes = static_cast<const float*>(slopes->const_data_ptr());
  }
  return a;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& rows,
                                   const std::optional<Tensor>& slopes, double scale) {
  Attention a = checked("git_attention_forward", q, k, v, rows, slopes, scale);
  const ScalarType statistics = a.element == Element::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(q, {q.size(0), a.queries, a.heads, a.dim});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), a.heads, a.queries}, statistics);
  a.out = operand(out);
  a.lse = lse.data_ptr();
  const bool few = q.size(0) * a.kv_heads < kFewTasks * torch::stable::get_num_threads();
  const Plan plan = make_plan(contiguous(rows), q.size(0), a, few ? kQueryChunk : 0);
  const int64_t scratch = DSVLM_CALL_SIMD(attention_forward_scratch, a, plan.most_keys);
  run_tasks(plan, scratch, [&](const Task& task, void* memory) {
    DSVLM_CALL_SIMD(attention_forward, a, task, memory);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& lse, const Tensor& rows,
                                            const std::optional<Tensor>& slopes, double scale) {
  const char* op = "git_attention_backward";
  Attention a = checked(op, q, k, v, rows, slopes, scale);
  for (const auto& [name, x] : {std::pair("grad_out", &grad_out), std::pair("out", &out)}) {
    check_shape(op, name, *x, {q.size(0), a.queries, a.heads, a.dim});
    check_type(op, name, *x, q.scalar_type());
  }
  check_last_contiguous(op, "out", out);
  check_shape(op, "lse", lse, {q.size(0), a.heads, a.queries});
  check_type(op, "lse", lse, a.element == Element::f64 ? ScalarType::Double : ScalarType::Float);
  // autograd hands over whatever it has, expanded gradients among it
  const Tensor grad = grad_out.stride(3) == 1 || a.dim <= 1 ? grad_out : torch::stable::contiguous(grad_out);
  const Tensor statistics = contiguous(lse);
  Tensor grad_q = torch::stable::new_empty(q, {q.size(0), a.queries, a.heads, a.dim});
  Tensor grad_k = torch::stable::new_empty(k, {q.size(0), a.keys, a.kv_heads, a.dim});
  Tensor grad_v = torch::stable::new_empty(v, {q.size(0), a.keys, a.kv_heads, a.dim});
  if (a.queries == 0) torch::stable::zero_(grad_k), torch::stable::zero_(grad_v);  // there will be no task
  a.out = operand(out), a.grad_out = operand(grad), a.lse = statistics.data_ptr();
  a.grad_q = operand(grad_q), a.grad_k = operand(grad_k), a.grad_v = operand(grad_v);
  const Plan plan = make_plan(contiguous(rows), q.size(0), a, 0);
  const int64_t scratch = DSVLM_CALL_SIMD(attention_backward_scratch, a, plan.most_keys);
  run_tasks(plan, scratch, [&](const Task& task, void* memory) {
    DSVLM_CALL_SIMD(attention_backward, a, task, memory);
  });
  return {grad_q, grad_k, grad_v};
}

Tensor mask_tiles(const Tensor& rows, int64_t kv_len, int64_t query_tile, int64_t key_tile) {
  const char* op = "git_mask_tiles";
  check_shape(op, "rows", rows, {-1, -1, 2});
  check_type(op, "rows", rows, ScalarType::Int);
  STD_TORCH_CHECK(kv_len >= 0 && query_tile > 0 && key_tile > 0, op, ": kv_len ", kv_len, " and tiles of ", query_tile,
                  " by ", key_tile, "; expected none below 0, tiles above");
  const Tensor whole = contiguous(rows);
  const int64_t queries = rows.size(1), across = (kv_len + key_tile - 1) / key_tile;
  const int64_t down = (queries + query_tile - 1) / query_tile;
  Tensor tiles = torch::stable::new_empty(rows, {rows.size(0), down, across}, ScalarType::Byte);
  uint8_t* decision = static_cast<uint8_t*>(tiles.data_ptr());
  for (int64_t b = 0; b < rows.size(0); ++b) {
    const int32_t* data = static_cast<const int32_t*>(whole.const_data_ptr()) + b * queries * 2;
    const std::vector<Row> found = read_rows(data, queries, kv_len);
    for (int64_t i = 0; i < down; ++i) {
      QueryTile summary;
      for (int64_t q = i * query_tile; q < std::min(queries, (i + 1) * query_tile); ++q) summary.add(found[q]);
      for (int64_t j = 0; j < across; ++j) {
        const int64_t begin = j * key_tile, end = std::min(kv_len, begin + key_tile);
        KeyTile keys;
        for (int64_t key = begin; key < end; ++key) keys.add(key, !known_dead(found, kv_len, key));
        *decision++ = static_cast<uint8_t>(decide(summary, keys, begin, end));
      }
    }
  }
  return tiles;
}

}  // namespace
}  // namespace dsvlm

STABLE_TORCH_LIBRARY_IMPL(dsvlm, CPU, m) {
  m.impl("git_attention_forward", TORCH_BOX(&dsvlm::forward));
  m.impl("git_attention_backward", TORCH_BOX(&dsvlm::backward));
  m.impl("git_mask_tiles", TORCH_BOX(&dsvlm::mask_tiles));
}
