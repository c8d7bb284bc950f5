// Threads that go through the phases of a step together. Work inside a phase is claimed piece by
// piece, so that a thread that is held up does not hold up the other's share.
#pragma once

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace loralab {

// Memory that is kept from use to use.
struct Room {
  std::unique_ptr<char[]> bytes;
  size_t size = 0;

  template <class T>
  T* of(size_t count) {
    const size_t needed = count * sizeof(T) + 128;
    if (needed > size) {
      bytes.reset(new char[needed]);
      size = needed;
    }
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(bytes.get()) + 63) & ~uintptr_t(63));
  }
};

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

class Team {
 public:
  explicit Team(int size) : size_(size), home_(getpid()), claims_(MAX_PHASES) {
    for (int i = 1; i < size; ++i) threads_.emplace_back([this, i] { serve(i); });
  }

  ~Team() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;
      ++round_;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int size() const { return size_; }
  bool lives_here() const { return home_ == getpid(); }  // threads do not survive a fork

  // Calls job(number) on every thread, the caller's being number 0.
  void run(const std::function<void(int)>& job) {
    for (auto& claim : claims_) claim.next.store(0, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      ++round_;
    }
    wake_.notify_all();
    job(0);
    meet();
  }

  // The thread's share of pieces 0 ... count - 1 of a phase, then waits for the others.
  // work(piece, next): next is the piece this thread does afterwards, -1 where there is none.
  template <class Work>
  void share(int& phase, int64_t count, Work work) {
    auto& claims = claims_[phase++ % MAX_PHASES].next;
    auto claim = [&] {
      int64_t piece = claims.fetch_add(1, std::memory_order_relaxed);
      return piece < count ? piece : int64_t(-1);
    };
    for (int64_t piece = claim(); piece >= 0;) {
      const int64_t next = claim();
      work(piece, next);
      piece = next;
    }
    meet();
  }

  static constexpr int MAX_PHASES = 4096;

 private:
  struct alignas(64) Claim {
    std::atomic<int64_t> next{0};
  };

  void meet() {
    int64_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      if (spins < 4000) relax(); else sched_yield();
    }
  }

  void serve(int number) {
    int64_t seen = 0;
    for (;;) {
      const std::function<void(int)>* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        job = job_;
      }
      if (job == nullptr) return;
      (*job)(number);
      meet();
    }
  }

  const int size_;
  const pid_t home_;
  std::vector<Claim> claims_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  const std::function<void(int)>* job_ = nullptr;
  int64_t round_ = 0;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> generation_{0};
};

// The team of this process with so many threads. The last one is never ended, nor is one of before a
// fork: its threads are not in this process, and waiting for them would take for ever.
inline Team& team_of(int size) {
  static Team* team = nullptr;
  if (team != nullptr && team->lives_here() && team->size() != size) {
    delete team;
    team = nullptr;
  }
  if (team == nullptr || !team->lives_here()) team = new Team(size);
  return *team;
}

}  // namespace loralab
