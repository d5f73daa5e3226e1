// The threads of an emulated block: each is a fiber; barriers and warp collectives switch fibers until all have arrived.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace saap {
namespace emulated {

struct Copy {
  char* to;
  const char* from;
  int bytes;  // the rest are zeros
};

struct Barrier {
  int arrived = 0;
  long generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  std::vector<std::vector<Copy>> groups = std::vector<std::vector<Copy>>(1);  // the last one is open
  dim3 thread;
  bool done = false;
};

struct Warp {
  Barrier barrier;
  uint32_t words[32][6];
  const char* addresses[32];
  float floats[32];
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<char> shared;
  Barrier barrier;
  dim3 index;
  ucontext_t scheduler;
  size_t current = 0;
  std::function<void()> body;
  std::exception_ptr error;
};

inline Block* block = nullptr;

inline Fiber& self() { return *block->fibers[block->current]; }
inline Warp& warp() { return block->warps[block->current / 32]; }
inline size_t lane() { return block->current % 32; }
inline void yield() { swapcontext(&self().context, &block->scheduler); }

inline void wait(Barrier& barrier, size_t threads) {
  const long generation = barrier.generation;
  if (++barrier.arrived == int(threads)) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}
inline void wait_for_warp() { wait(warp().barrier, std::min<size_t>(32, block->fibers.size())); }

inline void fiber_main() {
  try {
    block->body();
  } catch (...) {  // must not leave the fiber
    block->error = std::current_exception();
  }
  self().done = true;
  yield();
}

// Grows whenever a thread arrives at a barrier or ends.
inline long arrivals() {
  long sum = block->barrier.generation * 4096 + block->barrier.arrived;
  for (const Warp& warp : block->warps) sum += warp.barrier.generation * 64 + warp.barrier.arrived;
  for (const auto& fiber : block->fibers) sum += fiber->done;
  return sum;
}

// Switches to every thread of a warp until none can move: at the block's barrier, or at its end.
inline void run_warp(size_t warp) {
  for (long before = -1; before != arrivals();) {
    before = arrivals();
    const size_t end = std::min(block->fibers.size(), 32 * warp + 32);
    for (block->current = 32 * warp; block->current < end; ++block->current)
      if (!self().done) {
        swapcontext(&block->scheduler, &self().context);
        if (block->error) std::rethrow_exception(block->error);
      }
  }
}

// Warp after warp, each as far as it comes, the last one first in every other block: whoever relies on another's pace
// fails. A round in which nothing can move would repeat for ever, so it is an error.
inline void run_block() {
  for (auto& fiber : block->fibers) {
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = fiber->stack.size();
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
  }
  const size_t warps = block->warps.size();
  const auto is_done = [](const auto& fiber) { return fiber->done; };
  while (!std::all_of(block->fibers.begin(), block->fibers.end(), is_done)) {
    const long before = arrivals();
    for (size_t warp = 0; warp < warps; ++warp) run_warp(block->index.x % 2 ? warps - 1 - warp : warp);
    if (arrivals() == before) throw std::runtime_error("emulated block: threads wait for one another for ever");
  }
}

}  // namespace emulated

}  // namespace saap
