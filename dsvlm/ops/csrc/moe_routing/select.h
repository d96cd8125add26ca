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

  // Choices are counted, and later dealt, by chunks of tokens: asked[chunk * buckets + bucket].
  int64_t chunk_tokens, buckets;
  std::vector<int32_t> asked;

  int64_t chunks() const { return (tokens + chunk_tokens - 1) / chunk_tokens; }
};

// Sets the division into chunks, of whole blocks of `block` tokens, with a count of 0 for all.
void divide(Selection& call, int64_t block);

// Counts the choices of some tokens of a chunk, whose index and key are there; chunks may be counted at the same time.
void count(Selection& call, int64_t chunk, int64_t begin, int64_t end);

// When everything is counted.
void select(Selection& call);

}  // namespace dsvlm::moe
