// Which choices get a row, and which row: no sort of the batch, only a selection inside each (expert, pool) that is full.
#pragma once

#include <cstdint>
#include <vector>

namespace dsvlm::moe {

struct Selection {
  const int32_t* index;
  const void* key;  // uint32, or uint64 with wide_key; see GateForward
  const uint8_t* pool;
  bool wide_key, by_choice, by_priority;  // by_choice: all first choices before all second ones
  int64_t tokens, experts, k, max_rows, align;
  std::vector<int64_t> capacity;
  int32_t *slot, *src, *offs, *load, *kept;
};

void select(const Selection& call);

}  // namespace dsvlm::moe
