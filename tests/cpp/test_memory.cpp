// Memory of engine shm: arenas keep within their cap, and a call like one made before allocates nothing.
//
// malloc and mmap are replaced by functions that count while `armed`, and go on to what they replace. A stop after
// 120 s ends whatever hangs.
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/shm_builder.h"
#include "queue.h"

namespace {

std::atomic<bool> armed{false};
std::atomic<int> allocations{0}, mappings{0};

void count(std::atomic<int>& what) {
  if (armed.load(std::memory_order_relaxed)) ++what;
}

}  // namespace

// Those of the C library under names of their own. operator new ends in malloc or aligned_alloc.
extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

void* malloc(size_t bytes) noexcept {
  count(allocations);
  return __libc_malloc(bytes);
}
void* calloc(size_t n, size_t bytes) noexcept {
  count(allocations);
  return __libc_calloc(n, bytes);
}
void* realloc(void* old, size_t bytes) noexcept {
  count(allocations);
  return __libc_realloc(old, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) noexcept {
  count(allocations);
  return __libc_memalign(alignment, bytes);
}
void* mmap(void* at, size_t bytes, int protection, int flags, int fd, off_t offset) noexcept {
  count(mappings);
  return reinterpret_cast<void*>(syscall(SYS_mmap, at, bytes, protection, flags, fd, offset));
}
}

using namespace dpcomm;

namespace {

constexpr double kTimeout = 30;  // s, for what should take milliseconds

// ---- arenas ------------------------------------------------------------------------------------------------------

void arenas_keep_within_their_cap() {
  for (const int64_t mib : {4, 8, 64, 1024})
    for (int nranks = 2; nranks <= kMaxRanks; ++nranks)
      for (int channels = 1; channels <= kMostChannels; ++channels) {
        Wish wish{};
        wish.arena_bytes = mib << 20;
        wish.channels = channels;
        const Geometry g = geometry(nranks, wish);
        CHECK(g.arena_bytes <= wish.arena_bytes);
        CHECK(g.slots >= 4 && g.slot_bytes >= 4096 && g.slice_bytes <= g.slot_bytes);
        CHECK(g.channels >= 1 && g.channels <= channels);
        CHECK(int64_t(sizeof(ControlPage)) + g.channels * g.channel_bytes <= g.arena_bytes);
        CHECK(arena_bytes(nranks, g.slots, g.slot_bytes, true) <= g.channel_bytes);
      }
}

// ---- calls -------------------------------------------------------------------------------------------------------

struct Shape {
  CodecKind codec;
  Algorithm algorithm;
  int segments;
  int64_t elems;  // of each segment

  std::string text() const {
    return std::string(name_of(codec)) + " " + name_of(algorithm) + " " + std::to_string(segments) + "x" +
           std::to_string(elems);
  }
};

struct Group {
  Group(int nranks, int channels) {
    Wish wish{};
    wish.arena_bytes = 16 << 20;
    wish.channels = channels;
    wish.slice_bytes = 4096;  // so that small buckets have enough slices for all channels
    for (auto& engine : local_engines(nranks, wish, kTimeout, "portable", "abcd"))
      rank.push_back(std::make_unique<Queue>(std::move(engine)));
  }
  std::vector<std::unique_ptr<Queue>> rank;
};

struct Used {
  int allocations, mappings;
  long faults;  // pages touched for the first time
};

// What all ranks together use for `calls` calls, each like one made before. Rank 0 allocates `planted` times between.
Used use(const Group& group, const Shape& shape, int calls, int planted = 0) {
  const int n = int(group.rank.size());
  std::barrier together(n + 1);
  std::vector<std::thread> threads;
  for (int r = 0; r < n; ++r)
    threads.emplace_back([&, r] {
      std::vector<float> x(size_t(shape.segments * shape.elems), float(r + 1));
      Call call;
      for (int s = 0; s < shape.segments; ++s)
        call.addresses.push_back(reinterpret_cast<char*>(x.data() + s * shape.elems));
      call.counts.assign(size_t(shape.segments), shape.elems);
      call.codec = shape.codec;
      call.algorithm = shape.algorithm;
      call.op = Op::mean;
      call.interrupted = [] { return false; };
      for (int i = 0; i < 20; ++i) group.rank[size_t(r)]->run(call);
      together.arrive_and_wait();  // armed between these two
      together.arrive_and_wait();
      for (int i = 0; i < calls; ++i) group.rank[size_t(r)]->run(call);
      for (int i = 0; r == 0 && i < planted; ++i) {
        void* const memory = std::malloc(100);
        asm volatile("" ::"r"(memory) : "memory");  // or the compiler leaves it out
        std::free(memory);
      }
      together.arrive_and_wait();
      together.arrive_and_wait();  // disarmed between these two
      CHECK(x.front() == float(n + 1) / 2 && x.back() == x.front());
    });
  rusage before{}, after{};
  together.arrive_and_wait();
  getrusage(RUSAGE_SELF, &before);
  allocations = mappings = 0;
  armed = true;
  together.arrive_and_wait();
  together.arrive_and_wait();
  armed = false;
  getrusage(RUSAGE_SELF, &after);
  together.arrive_and_wait();
  for (std::thread& thread : threads) thread.join();
  return {allocations, mappings, after.ru_minflt - before.ru_minflt};
}

void calls_allocate_nothing(int nranks, int channels) {
  const Group group(nranks, channels);
  CHECK(group.rank[0]->engine().describe().channels == channels);
  for (const CodecKind codec : {CodecKind::none, CodecKind::fp16})
    for (const Algorithm algorithm : {Algorithm::automatic, Algorithm::direct, Algorithm::oneshot, Algorithm::ring})
      for (const Shape& shape : {Shape{codec, algorithm, 1, 100'000}, Shape{codec, algorithm, 1000, 100}}) {
        const int calls = 30;
        const Used used = use(group, shape, calls);
        if (!CHECK(used.allocations == 0 && used.mappings == 0))
          std::fprintf(stderr, "  %d ranks, %d channels, %s: %d allocations, %d mappings in %d calls\n", nranks,
                       channels, shape.text().c_str(), used.allocations, used.mappings, calls);
        if (!CHECK(used.faults < calls))  // the system moves pages now and then, but not in every call
          std::fprintf(stderr, "  %s: %ld page faults\n", shape.text().c_str(), used.faults);
      }
}

// The negative control.
void a_planted_allocation_is_counted() {
  const Shape shape{CodecKind::none, Algorithm::direct, 1, 1000};
  const Group group(2, 1);
  const int without = use(group, shape, 1).allocations;
  CHECK(use(group, shape, 1, 7).allocations == without + 7);
  armed = true;
  void* const page = mmap(nullptr, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const std::vector<float> vector(1000);
  asm volatile("" ::"r"(vector.data()) : "memory");
  armed = false;
  CHECK(page != MAP_FAILED && mappings == 1);
  CHECK(allocations == without + 8);
  munmap(page, 4096);
}

}  // namespace

int main() {
  alarm(120);
  arenas_keep_within_their_cap();
  a_planted_allocation_is_counted();
  for (const int channels : {1, 2})
    for (const int nranks : {2, 3}) calls_allocate_nothing(nranks, channels);
  return finish();
}
