// Scratch memory, cache sizes, the threads' budget and fork safety.

#include "runtime.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <new>

namespace fastvit::cpu {
namespace {

// Large buffers are aligned to, and ask for, huge pages: a packed panel is walked once per six
// rows, and 4 KiB pages would cost a TLB miss every sixteen steps of it.
constexpr size_t kHugePage = size_t{2} << 20;

class Buffer {
 public:
  ~Buffer() { std::free(data_); }

  void* reserve(size_t bytes) {
    if (bytes <= capacity_) return data_;
    std::free(data_);
    data_ = nullptr;
    capacity_ = 0;
    const bool large = bytes >= kHugePage / 16;
    const size_t align = large ? kHugePage : 64;
    const size_t rounded = (bytes + align - 1) / align * align;
    data_ = std::aligned_alloc(align, rounded);
    if (data_ == nullptr) throw std::bad_alloc();
    capacity_ = rounded;
#ifdef MADV_HUGEPAGE
    if (large) madvise(data_, rounded, MADV_HUGEPAGE);  // advice: a refusal costs nothing
#endif
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t capacity_ = 0;
};

int64_t cache_size(int name, int64_t fallback) {
  const long bytes = sysconf(name);
  return bytes > 0 ? bytes : fallback;
}

std::atomic<int> leased_now{0}, leased_most{0};

#ifdef _OPENMP
// A child of fork() has none of the pool's threads, but the OpenMP runtime in it believes that it
// does and would wait for them for ever. So the forking thread dismisses its pool before: parent
// and child both start another when they need one. A runtime that can't leaves the child with one
// thread. The pool is torch's as well, hence from the moment this library is loaded.
std::atomic<bool> pool_dismissed{false}, pool_lost{false};

void before_fork() {
  constexpr int kSoft = 1;  // omp_pause_soft of OpenMP 5.0, which the compiler's omp.h may predate
  using Pause = int (*)(int);
  const auto pause = reinterpret_cast<Pause>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
  pool_dismissed.store(pause != nullptr && pause(kSoft) == 0);
}

void after_fork_in_child() {
  if (!pool_dismissed.load()) pool_lost.store(true);
  leased_now.store(0);  // other threads' calls exist in the parent only
}

[[maybe_unused]] const int registered = pthread_atfork(before_fork, nullptr, after_fork_in_child);
#endif

int lease(int requested) {
#ifdef _OPENMP
  if (pool_lost.load(std::memory_order_relaxed)) requested = 1;
#else
  requested = 1;
#endif
  int held = leased_now.load(std::memory_order_relaxed), granted;
  do {
    granted = requested - held > 1 ? requested - held : 1;
  } while (!leased_now.compare_exchange_weak(held, held + granted, std::memory_order_relaxed));
  int most = leased_most.load(std::memory_order_relaxed);
  while (most < held + granted &&
         !leased_most.compare_exchange_weak(most, held + granted, std::memory_order_relaxed)) {
  }
  return granted;
}

}  // namespace

void* scratch(Slot slot, size_t bytes) {
  static thread_local Buffer buffers[static_cast<int>(Slot::kCount)];
  return buffers[static_cast<int>(slot)].reserve(bytes);
}

const CacheSizes& cache_sizes() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const CacheSizes sizes{cache_size(_SC_LEVEL1_DCACHE_SIZE, 32 << 10),
                                cache_size(_SC_LEVEL2_CACHE_SIZE, 1 << 20),
                                cache_size(_SC_LEVEL3_CACHE_SIZE, 16 << 20)};
#else
  static const CacheSizes sizes{32 << 10, 1 << 20, 16 << 20};
#endif
  return sizes;
}

int64_t intermediate_bytes() {
  const int64_t share = cache_sizes().l3 / 4 * 3, most = 24 << 20, least = 2 << 20;
  return share > most ? most : share < least ? least : share;
}

ThreadLease::ThreadLease(int requested) : threads(lease(requested)) {}

ThreadLease::~ThreadLease() { leased_now.fetch_sub(threads, std::memory_order_relaxed); }

LeasedThreads leased_threads() {
  const int now = leased_now.load();
  return {now, leased_most.exchange(now)};
}

const float* rotation_signs(int64_t n) {
  // A longer table replaces a shorter one, which somebody may still read: the lengths double, so
  // all that were ever made take no more than twice the last.
  static std::atomic<const float*> table{nullptr};
  static std::atomic<int64_t> length{0};
  static std::mutex making;
  if (n > length.load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(making);
    if (n > length.load(std::memory_order_relaxed)) {
      int64_t count = 8192;
      while (count < n) count *= 2;
      auto* signs = new float[static_cast<size_t>(count)];
      for (int64_t i = 0; i < count; ++i) {
        auto hash = static_cast<uint32_t>(i);
        hash = (hash ^ hash >> 16) * 0x7feb352dU;
        hash = (hash ^ hash >> 15) * 0x846ca68bU;
        signs[i] = (hash ^ hash >> 16) & 1 ? -1.0f : 1.0f;
      }
      table.store(signs, std::memory_order_release);
      length.store(count, std::memory_order_release);
    }
  }
  return table.load(std::memory_order_acquire);
}

double seconds_now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

}  // namespace fastvit::cpu
