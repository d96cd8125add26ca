// What the CPU attention calls of the instruction set it runs on.
#pragma once

#include "cpu_task.h"
#include "simd/simd.h"

// Bytes of scratch for a task that sees `keys` keys.
DSVLM_DECLARE_SIMD(int64_t attention_forward_scratch(const Attention& a, int64_t keys))
DSVLM_DECLARE_SIMD(int64_t attention_backward_scratch(const Attention& a, int64_t keys))
// One task; scratch is aligned to 64 bytes.
DSVLM_DECLARE_SIMD(void attention_forward(const Attention& a, const Task& task, void* scratch))
DSVLM_DECLARE_SIMD(void attention_backward(const Attention& a, const Task& task, void* scratch))
