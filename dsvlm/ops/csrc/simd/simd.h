// Choice of an instruction set at run time, for sources that are compiled once per set (*_simd.cpp).
//
// Such a source keeps all it defines in `namespace dsvlm::DSVLM_ISA` and includes little: an inline function of another
// namespace would be compiled once per set as well, and the linker would keep any one of them, perhaps the one with
// instructions that this machine lacks.
//
//   shared header:     DSVLM_DECLARE_SIMD(void scale(float* x, int64_t n, float by))
//   x_simd.cpp:        namespace dsvlm::DSVLM_ISA { void scale(float* x, int64_t n, float by) { ... } }
//   x.cpp:             DSVLM_CALL_SIMD(scale, x, n, by);       or, with a set that this machine has,
//                      DSVLM_CALL_SIMD_OF(set, scale, x, n, by);
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#define DSVLM_DECLARE_SIMD(...)             \
  namespace dsvlm::baseline { __VA_ARGS__; } \
  namespace dsvlm::avx2 { __VA_ARGS__; }     \
  namespace dsvlm::avx512 { __VA_ARGS__; }
#define DSVLM_CALL_SIMD_OF(set, function, ...)                                                \
  ((set) == ::dsvlm::InstructionSet::avx512 ? ::dsvlm::avx512::function(__VA_ARGS__) \
   : (set) == ::dsvlm::InstructionSet::avx2 ? ::dsvlm::avx2::function(__VA_ARGS__)   \
                                            : ::dsvlm::baseline::function(__VA_ARGS__))
#else
#define DSVLM_DECLARE_SIMD(...) \
  namespace dsvlm::baseline { __VA_ARGS__; }
#define DSVLM_CALL_SIMD_OF(set, function, ...) (static_cast<void>(set), ::dsvlm::baseline::function(__VA_ARGS__))
#endif
#define DSVLM_CALL_SIMD(function, ...) DSVLM_CALL_SIMD_OF(::dsvlm::instruction_set(), function, __VA_ARGS__)

#if !defined(DSVLM_ISA)  // the callers' side
namespace dsvlm {

enum class InstructionSet { baseline, avx2, avx512 };

// The best set of this machine, or a lesser one that DSVLM_SIMD names (baseline, avx2): tests run each of them.
inline InstructionSet instruction_set() {
  static const InstructionSet chosen = [] {
    InstructionSet best = InstructionSet::baseline;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      best = InstructionSet::avx2;
    if (best == InstructionSet::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = InstructionSet::avx512;
#endif
    const char* wanted = std::getenv("DSVLM_SIMD");
    if (wanted && !std::strcmp(wanted, "baseline")) return InstructionSet::baseline;
    if (wanted && !std::strcmp(wanted, "avx2") && best == InstructionSet::avx512) return InstructionSet::avx2;
    return best;
  }();
  return chosen;
}

}  // namespace dsvlm
#endif
