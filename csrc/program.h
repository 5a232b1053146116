// A recorded sequence of kernel calls on fixed buffers, replayed by one call: what a CUDA graph is to
// a GPU. The caller keeps the buffers alive; `run` of cpu_ops.cpp records.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace tdm {

using Work = std::function<void(int64_t, int64_t)>;

class Program {
 public:
  // `work` does any half-open range of `count` items; `cost` numbers are read for each.
  void add(Work work, int64_t count, int64_t cost) {
    calls_.push_back({std::move(work), count, count > 1 && count * cost >= kShared});
  }

  // As many threads as `parallel_for` gives walk the calls together, with a barrier between two
  // calls of which one is shared. Which thread does what changes no result.
  template <class ParallelFor>
  void replay(int64_t threads, ParallelFor parallel_for) const {
    std::atomic<int64_t> chunk{0}, arrived{0};
    parallel_for(threads, [&](int64_t begin, int64_t end) {
      // The first chunk says how many of `threads` each team member stands for.
      if (begin == 0) chunk.store(end, std::memory_order_release);
      wait([&] { return chunk.load(std::memory_order_acquire) != 0; });
      const int64_t size = chunk.load(), members = (threads + size - 1) / size, me = begin / size;
      int64_t barriers = 0;
      for (size_t i = 0; i < calls_.size(); i++) {
        const Call& call = calls_[i];
        if (i > 0 && members > 1 && (call.shared || calls_[i - 1].shared)) {
          arrived.fetch_add(1, std::memory_order_acq_rel);
          const int64_t all = ++barriers * members;
          wait([&] { return arrived.load(std::memory_order_acquire) >= all; });
        }
        if (call.shared)
          call.work(call.count * me / members, call.count * (me + 1) / members);
        else if (me == 0)
          call.work(0, call.count);
      }
    });
  }

 private:
  struct Call {
    Work work;
    int64_t count;
    bool shared;
  };
  static constexpr int64_t kShared = 2048;  // numbers below which a barrier costs more

  template <class Ready>
  static void wait(Ready ready) {
    for (int spins = 0; !ready(); spins++)
      if (spins > 4000) std::this_thread::yield();  // the others may not be running at all
  }

  std::vector<Call> calls_;
};

}  // namespace tdm
