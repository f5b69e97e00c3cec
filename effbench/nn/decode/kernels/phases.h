// Work that threads share: the parts of a step, one after the other.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kSpins = 2000;       // looks at what is not done yet before the core is given away
constexpr int64_t kPiece = 65536;  // bytes of weights in one piece of work
constexpr int kPieces = 4;         // pieces that each thread gets, at least, where there are rows

struct Range {
  int64_t begin, end;
};

// Units of `bytes` each that make one piece: several pieces to a thread.
inline int64_t grain(int64_t n, int64_t bytes, int64_t threads) {
  int64_t units = kPiece / bytes, most = n / (kPieces * threads);
  if (units > most) units = most;
  return units < 1 ? 1 : units;
}

// Each phase is over when all of its pieces are done. A thread has a range of its own, which it reads
// as one stream; when that is done, it helps with the others' ranges, so that a thread that comes
// late (because something else has its core) holds nobody up.
class Phases {
  struct alignas(64) Count {
    std::atomic<int64_t> n{0};
  };

 public:
  Phases(int64_t phases, int64_t threads)
      : threads_(threads), counts_(new Count[size_t(phases * (threads + 1))]) {}

  // One thread's way through the phases; `count` threads take part.
  class Walk {
   public:
    Walk(Phases& all, int64_t self, int64_t count)
        : place_(all.counts_.get()), step_(all.threads_ + 1), self_(self), count_(count) {}

    template <typename Work>
    void run(int64_t n, int64_t grain, Work work) {
      std::atomic<int64_t>& done = place_[step_ - 1].n;
      const int64_t pieces = (n + grain - 1) / grain;
      int64_t mine = 0;
      for (int64_t i = 0; i < count_; ++i) {
        const int64_t owner = (self_ + i) % count_;
        const int64_t first = pieces * owner / count_, last = pieces * (owner + 1) / count_;
        for (int64_t piece; (piece = first + place_[owner].n.fetch_add(1)) < last; ++mine) {
          const int64_t begin = piece * grain;
          work(Range{begin, begin + grain < n ? begin + grain : n});
        }
      }
      if (mine) done.fetch_add(mine, std::memory_order_release);
      for (int spins = 0; done.load(std::memory_order_acquire) < pieces; ++spins) {
#if defined(__x86_64__)
        _mm_pause();
#endif
        if (spins > kSpins) std::this_thread::yield();
      }
      place_ += step_;
    }

   private:
    Count* place_;
    int64_t step_, self_, count_;
  };

 private:
  int64_t threads_;
  std::unique_ptr<Count[]> counts_;
};

}  // namespace
