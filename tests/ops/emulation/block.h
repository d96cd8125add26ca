// Runs a grid: blocks one after the other, each thread of a block a fiber that runs until its next collective.
//
// Which fiber goes on is drawn from a seed: warps in an order that changes at every barrier, so that one may be far
// ahead of the others; lanes of a warp in any order. Shared memory starts as NaN bits in every block. What a kernel
// must not do ends the launch with an error that names the thread; its fibers are given up where they stand.
#pragma once
#include <link.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "language.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emulation {

constexpr int kMaxThreads = 1024, kLanes = 32;
constexpr size_t kStackBytes = 128 << 10, kPage = 4096, kCanaryBytes = 4096;
constexpr size_t kSharedLimit = 163 << 10;  // of a block on sm_80; sm_90 has 227 KiB
constexpr unsigned char kPoison = 0xff;     // NaN in every floating type

struct Copy {
  unsigned char* shared;
  const void* global;  // nullptr: zeros
  int group;
};

struct Thread {
  jmp_buf state;
  uint3 index;
  bool started;                // its fiber has run before
  const char* waits;           // the collective it is in, nullptr while it runs
  const void* kind;            // tells collectives apart: lanes meet only at the same one
  uint32_t mask;               // the lanes it waits for
  void* arguments;             // its part of the collective
  std::vector<Copy> copies;    // asynchronous ones under way
  int groups;                  // committed
};

struct Warp {
  uint32_t exists, ready, waiting, ended;  // one bit a lane
};

struct Machine {
  std::vector<Thread> threads;
  unsigned char* stacks = nullptr;
  Warp warps[kMaxThreads / kLanes];
  int order[kMaxThreads / kLanes];
  int count = 0, warp_count = 0, current = 0, left = 0;
  int arrived = 0;  // at the barrier of the block
  int held = 0, barrier_result[3];
  const char* barrier = nullptr;
  unsigned char *shared = nullptr, *statics = nullptr;  // dynamic and static shared memory
  size_t shared_bytes = 0, static_bytes = 0;
  uint64_t block = 0, seed = 0, random = 1;
  void (*body)(void*) = nullptr;
  void* closure = nullptr;
  jmp_buf launcher;
  ucontext_t fiber;
  unsigned char* signal_stack = nullptr;
  std::string error;
};

inline Machine machine;
inline thread_local char shared_anchor;  // makes sure that the thread has its static shared memory before it is asked for

inline Thread& current() { return machine.threads[machine.current]; }
inline Thread& peer_of(int lane) { return machine.threads[machine.current / kLanes * kLanes + lane]; }

inline std::string place(const uint3& at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

[[noreturn]] inline void stop(const std::string& what) {
  machine.error = "block " + place(blockIdx) + ": " + what;
  _longjmp(machine.launcher, 1);
}

[[noreturn]] inline void fail(const std::string& what) { stop("thread " + place(current().index) + ": " + what); }

inline uint64_t draw() {  // xorshift
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  return machine.random ^= machine.random << 17;
}

inline void shuffle_warps() {
  for (int i = machine.warp_count - 1; i > 0; --i) std::swap(machine.order[i], machine.order[draw() % (i + 1)]);
}

// Who stands where, for the message of a block that cannot go on.
inline std::string standstill() {
  std::vector<std::pair<std::string, std::pair<int, int>>> places;  // what, how many, the first of them
  for (int i = 0; i < machine.count; ++i) {
    const std::string what = machine.threads[i].waits ? std::string("wait at ") + machine.threads[i].waits : "have ended";
    auto found = std::find_if(places.begin(), places.end(), [&](const auto& known) { return known.first == what; });
    if (found == places.end()) found = places.insert(found, {what, {0, i}});
    ++found->second.first;
  }
  std::string text = "deadlock:";
  for (const auto& [what, who] : places)
    text += " " + std::to_string(who.first) + " threads " + what + " (first " +
            place(machine.threads[who.second].index) + ");";
  return text.substr(0, text.size() - 1);
}

inline int next_thread() {
  for (int i = 0; i < machine.warp_count; ++i) {
    const int warp = machine.order[i];
    const uint32_t ready = machine.warps[warp].ready;
    if (!ready) continue;
    const uint32_t turn = draw() & 31;
    const uint32_t turned = ready >> turn | ready << (31 & (32 - turn));
    const int lane = (__builtin_ctz(turned) + turn) & 31;
    machine.warps[warp].ready &= ~(1u << lane);
    return warp * kLanes + lane;
  }
  stop(standstill());
}

inline void fiber_main();

[[noreturn]] inline void resume(int next) {
  machine.current = next;
  Thread& thread = machine.threads[next];
  threadIdx = thread.index;
  if (thread.started) _longjmp(thread.state, 1);
  thread.started = true;
  getcontext(&machine.fiber);
  machine.fiber.uc_stack.ss_sp = machine.stacks + next * (kStackBytes + kPage) + kPage;
  machine.fiber.uc_stack.ss_size = kStackBytes;
  machine.fiber.uc_link = nullptr;
  makecontext(&machine.fiber, fiber_main, 0);
  setcontext(&machine.fiber);
  __builtin_unreachable();
}

// Lets others run until somebody has made this thread ready again.
__attribute__((noinline)) inline void suspend() {
  if (_setjmp(current().state) == 0) resume(next_thread());
  current().waits = nullptr;
}

inline void make_ready(int warp, uint32_t lanes) {
  machine.warps[warp].waiting &= ~lanes;
  machine.warps[warp].ready |= lanes;
}

inline void fiber_main() {
  for (;;) {
    machine.body(machine.closure);
    current().waits = nullptr;
    machine.warps[machine.current / kLanes].ended |= 1u << machine.current % kLanes;
    if (--machine.left == 0) {
      if (_setjmp(current().state) == 0) _longjmp(machine.launcher, 2);
    } else if (_setjmp(current().state) == 0) {
      resume(next_thread());
    }
  }
}

// Joins the lanes of `mask`: the last one to come calls `complete` with every lane's arguments (nullptr: not in mask).
template <class Arguments>
void join(const char* name, uint32_t mask, Arguments& own, void (*complete)(Arguments* const (&)[kLanes])) {
  const int warp = machine.current / kLanes, lane = machine.current % kLanes;
  Warp& lanes = machine.warps[warp];
  Thread& thread = current();
  if (!(mask >> lane & 1)) fail(std::string(name) + " with a mask that leaves out the calling lane");
  if (mask & ~lanes.exists) fail(std::string(name) + " with a mask that names lanes which the block does not have");
  thread.waits = name, thread.kind = reinterpret_cast<const void*>(complete);
  thread.mask = mask, thread.arguments = &own;
  lanes.waiting |= 1u << lane;
  if (const uint32_t gone = mask & lanes.ended)
    fail(std::string(name) + " waits for thread " + place(peer_of(__builtin_ctz(gone)).index) + ", which has ended");
  const bool last = (lanes.waiting & mask) == mask;
  const uint32_t here = lanes.waiting & mask & ~(1u << lane);
  // while lanes are missing, one of those that are here tells whether all are at the same collective
  for (uint32_t rest = last ? here : here & -here; rest; rest &= rest - 1) {
    const Thread& peer = peer_of(__builtin_ctz(rest));
    if (peer.kind != thread.kind || peer.mask != mask)
      fail(std::string(name) + " waits for thread " + place(peer.index) + ", which is at " + peer.waits +
           (peer.mask != mask ? " (or has another mask)" : ""));
  }
  if (last) {
    Arguments* all[kLanes];
    for (int i = 0; i < kLanes; ++i)
      all[i] = mask >> i & 1 ? static_cast<Arguments*>(peer_of(i).arguments) : nullptr;
    complete(all);
    make_ready(warp, mask);
  }
  suspend();
}

// The barrier of the block: {how many, all, any} of the predicates.
inline const int (&barrier(const char* name, bool predicate))[3] {
  if (machine.arrived && strcmp(machine.barrier, name))
    fail(std::string("is at ") + name + " while others are at " + machine.barrier);
  machine.barrier = name;
  Thread& thread = current();
  thread.waits = name, thread.kind = name, thread.mask = 0;
  machine.warps[machine.current / kLanes].waiting |= 1u << machine.current % kLanes;
  machine.held += predicate;
  if (++machine.arrived == machine.count) {
    machine.barrier_result[0] = machine.held;
    machine.barrier_result[1] = machine.held == machine.count;
    machine.barrier_result[2] = machine.held > 0;
    machine.arrived = machine.held = 0;
    shuffle_warps();
    for (int warp = 0; warp < machine.warp_count; ++warp) make_ready(warp, machine.warps[warp].exists);
  }
  suspend();
  return machine.barrier_result;
}

// The thread-local memory of this library is the static shared memory: see __shared__.
inline int find_statics(dl_phdr_info* info, size_t, void*) {
  const auto own = reinterpret_cast<uintptr_t>(&machine);
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    ours |= part.p_type == PT_LOAD && own - (info->dlpi_addr + part.p_vaddr) < part.p_memsz;
  }
  for (int i = 0; ours && i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_TLS) {
      machine.statics = static_cast<unsigned char*>(info->dlpi_tls_data);
      machine.static_bytes = info->dlpi_phdr[i].p_memsz;
    }
  return ours;
}

inline void* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

inline void prepare() {
  if (machine.stacks) return;
  machine.threads.resize(kMaxThreads);
  machine.stacks = static_cast<unsigned char*>(reserve(kMaxThreads * (kStackBytes + kPage)));
  for (int i = 0; i < kMaxThreads; ++i) mprotect(machine.stacks + i * (kStackBytes + kPage), kPage, PROT_NONE);
  machine.signal_stack = static_cast<unsigned char*>(reserve(kStackBytes));
  // aligned to 128 bytes and to no more, as DSVLM_DYNAMIC_SHARED promises
  machine.shared = static_cast<unsigned char*>(reserve(kSharedLimit + kCanaryBytes + 128)) + 128;
}

inline void start_block() {
  shared_anchor = 0;
  dl_iterate_phdr(find_statics, nullptr);
  memset(machine.statics, kPoison, machine.static_bytes);
  memset(machine.shared, kPoison, machine.shared_bytes + kCanaryBytes);
  machine.left = machine.count, machine.arrived = machine.held = 0;
  for (int warp = 0; warp < machine.warp_count; ++warp) {
    const int lanes = std::min(kLanes, machine.count - warp * kLanes);
    const uint32_t exists = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    machine.warps[warp] = {exists, exists, 0, 0};
    machine.order[warp] = warp;
  }
  for (int i = 0; i < machine.count; ++i) {
    Thread& thread = machine.threads[i];
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    thread.waits = nullptr, thread.groups = 0;
    thread.copies.clear();
  }
  shuffle_warps();
}

inline void end_block() {
  for (size_t i = 0; i < kCanaryBytes; ++i)
    if (machine.shared[machine.shared_bytes + i] != kPoison)
      stop("dynamic shared memory was written " + std::to_string(i) + " bytes past its end");
}

// Memory that is not there: tests put arrays at the end of a page that nothing follows.
inline void on_fault(int, siginfo_t* info, void*) {
  char address[32];
  snprintf(address, sizeof(address), "%p", info->si_addr);
  fail(std::string("an address where there is no memory: ") + address);
}

// While kernels run, a fault is their error and not the end of the process.
struct FaultsAreErrors {
  struct sigaction handler {}, before;
  stack_t stack{}, stack_before;

  FaultsAreErrors() {
    stack.ss_sp = machine.signal_stack, stack.ss_size = kStackBytes;
    sigaltstack(&stack, &stack_before);
    handler.sa_sigaction = on_fault;
    handler.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &handler, &before);
  }
  ~FaultsAreErrors() {
    sigaction(SIGSEGV, &before, nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

// Runs body(closure) once in every thread; the message of what went wrong is in machine.error.
__attribute__((noinline)) inline cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
                                                 void* closure) {
  machine.error.clear();
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (shared_bytes > kSharedLimit || threads == 0 || threads > kMaxThreads || grid.y > 65535 || grid.z > 65535 ||
      uint64_t(grid.x) * grid.y * grid.z == 0) {
    machine.error = "a launch of " + place({grid.x, grid.y, grid.z}) + " blocks of " +
                    place({block.x, block.y, block.z}) + " threads with " + std::to_string(shared_bytes) +
                    " bytes of shared memory";
    return cudaErrorInvalidConfiguration;
  }
  prepare();
  machine.body = body, machine.closure = closure, machine.shared_bytes = shared_bytes;
  machine.count = int(threads), machine.warp_count = (machine.count + kLanes - 1) / kLanes;
  machine.random = (machine.seed + 1) * 0x9e3779b97f4a7c15u | 1;
  gridDim = grid, blockDim = block;
  const FaultsAreErrors faults;
  for (machine.block = 0; machine.block < uint64_t(grid.x) * grid.y * grid.z; ++machine.block) {
    blockIdx = {unsigned(machine.block % grid.x), unsigned(machine.block / grid.x % grid.y),
                unsigned(machine.block / grid.x / grid.y)};
    const int outcome = _setjmp(machine.launcher);
    if (outcome == 0) {
      start_block();
      resume(next_thread());
    }
    if (outcome == 2) {
      if (_setjmp(machine.launcher) == 0) {
        end_block();
        continue;
      }
    }
    for (Thread& thread : machine.threads) thread.started = false;  // their stacks are in the middle of something
    fprintf(stderr, "emulation: %s\n", machine.error.c_str());
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

extern "C" __attribute__((used, visibility("default"))) inline void dsvlm_emulation_seed(uint64_t seed) {
  machine.seed = seed;
}

extern "C" __attribute__((used, visibility("default"))) inline const char* dsvlm_emulation_error() {
  return machine.error.c_str();
}

}  // namespace emulation
