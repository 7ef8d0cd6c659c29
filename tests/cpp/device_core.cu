// ./device_core <request >answer   The core as nvcc reads it for the host, on threads: what of the GPU half can run
// without a GPU. Vectors are eight values that move in 16-byte pieces, ends of segments are partial vectors, messages
// are pushed into the reader's arena (Team::shared is false), and lanes divide the work as in csrc/cuda/lanes.cuh: one
// vector each, 32 to a group. The other branches of core/portable.h (__CUDA_ARCH__: instructions, memory order) and a
// GPU's warps and barriers are not here.
//
// A program rather than a library: what goes wrong ends in a signal or a sanitizer's report, and the caller lives on.
// tests/test_device_core.py compiles, calls and judges it.
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

// The core is __host__ __device__, the lanes below are not. Device code is never made of them: there is no kernel.
#pragma nv_diag_suppress 20011, 20014
#include "core/all_reduce.h"
#include "core/codec_fp16.h"
#include "core/codec_none.h"
#include "core/native.h"

namespace {

using namespace dpcomm;
static_assert(kVec == 8 && kVecAlign == 16 && !kNanSurvives, "this must be the core of the GPU's kernels");

constexpr int kWarp = 32;
static_assert(kGroup == kWarp * kVec);
constexpr std::chrono::seconds kPatience{20};  // for what takes milliseconds

// The input, in this order: Request, its segments' places, one image of user memory for each rank.
struct Request {
  int64_t nranks, warps, segments, dtype, op, codec, algorithm, slots, slot_bytes, first_message, calls,
      disagreeing_rank, image_bytes;
};
struct Place {
  int64_t offset, elems;  // offset: bytes from the image's begin, which is aligned to kImageAlign
};
constexpr size_t kImageAlign = 256;
// The output: Answer, then the images as the calls left them.
struct Answer {
  uint64_t failure;
  int64_t nonfinite_groups;
};

class Barrier {
 public:
  explicit Barrier(int threads) { pthread_barrier_init(&barrier_, nullptr, unsigned(threads)); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void meet() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{kWarp};
  int32_t values[kWarp];
};

// Where the lanes of one rank meet.
struct Cta {
  explicit Cta(int warps) : lanes(warps * kWarp), barrier(lanes) {
    for (int w = 0; w < warps; ++w) warp.push_back(std::make_unique<Warp>());
  }
  const int lanes;
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warp;
  std::atomic<bool> failed{false};  // stays: a rank that has failed is not used again
};

// CtaLanes, a thread instead of each CUDA thread.
struct ThreadLanes {
  static constexpr bool puts_off = false;
  template <class Codec>
  static constexpr int vectors = 1;

  Cta& cta;
  int lane, rank;
  uint64_t* failure;
  std::atomic<int64_t>& nonfinite_groups;

  int index() const { return lane; }
  int count() const { return cta.lanes; }
  bool sync(bool ok) const {
    if (!ok) cta.failed = true;
    cta.barrier.meet();
    const bool all = !cta.failed;
    cta.barrier.meet();  // nobody sets it before everybody has read it
    return all;
  }
  bool wait(const Flag* flag, uint32_t value, int peer) const {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (!reached(load_acquire(&flag->value), value)) {
      if (load_acquire(failure) != 0) return false;
      if (std::chrono::steady_clock::now() > deadline)
        set_once(failure, pack({Cause::timeout, uint8_t(rank), uint8_t(peer), Field::none, 0}));
      sched_yield();
    }
    return true;
  }
  void post(Flag* flag, uint32_t value) const { store_release(&flag->value, value); }
  int32_t group_max(int32_t m) const {
    Warp& warp = *cta.warp[size_t(lane / kWarp)];
    warp.values[lane % kWarp] = m;
    warp.barrier.meet();
    for (const int32_t value : warp.values) m = value > m ? value : m;
    warp.barrier.meet();
    return m;
  }
  template <class T>
  void push(T* to, const Vec<T>& v) const {
    store(to, v);
  }
  void phase(Phase) const {}
  void nonfinite_group() const {
    if (lane % kWarp == 0) ++nonfinite_groups;
  }
};

using Memory = std::unique_ptr<char, void (*)(void*)>;

Memory allocate(size_t align, int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, align, size_t(bytes)) != 0) std::abort();
  std::memset(memory, 0x5a, size_t(bytes));  // what nobody has written is no zero
  return {static_cast<char*>(memory), &std::free};
}

void transfer(size_t (*move)(void*, size_t), void* data, size_t bytes, const char* what) {
  if (move(data, bytes) == bytes) return;
  std::fprintf(stderr, "device_core: cannot %s %zu bytes\n", what, bytes);
  std::exit(2);
}
void read(void* data, size_t bytes) {
  transfer([](void* p, size_t n) { return std::fread(p, 1, n, stdin); }, data, bytes, "read");
}
void write(void* data, size_t bytes) {
  transfer([](void* p, size_t n) { return std::fwrite(p, 1, n, stdout); }, data, bytes, "write");
}

// One rank: its user memory, its arena and its lanes.
struct Rank {
  explicit Rank(const Request& q)
      : image(allocate(kImageAlign, q.image_bytes)),
        arena(allocate(alignof(Mailbox), arena_bytes(int(q.nranks), int(q.slots), q.slot_bytes, false))),
        box(new (arena.get()) Mailbox{}),
        cta(int(q.warps)) {
    for (auto& writers : box->arrived)
      for (Flag& flag : writers) flag.value = uint32_t(q.first_message);
    for (uint32_t& sent : box->sent) sent = uint32_t(q.first_message);
  }
  void lay_out(const std::vector<Place>& places) {
    for (const Place& p : places) {
      segments.push_back({image.get() + p.offset, p.elems, groups});
      groups += groups_of(p.elems);
    }
  }
  Bucket bucket() const { return {segments.data(), int64_t(segments.size()), groups}; }

  Memory image, arena;  // the arena ends where its last slot does
  Mailbox* box;
  Cta cta;
  std::vector<Segment> segments;
  int64_t groups = 0;
};

// What one lane does: the body of the p2p kernel, q.calls times. No two ranks meet between calls.
template <class Codec>
void play(ThreadLanes lanes, const Team& team, const Bucket& bucket, Header header, const Request& q) {
  if (team.rank == q.disagreeing_rank) ++header.bucket;
  for (int64_t i = 0; i < q.calls; ++i) {
    if (!lanes.sync(load_acquire(team.failure) == 0)) return;
    header.sequence = uint64_t(i) + 1;
    if (!all_reduce<Codec>(lanes, team, bucket, header)) return;
  }
}

// The library between the two passes of algorithm native: it adds in rank order, and rounds each sum.
struct Library {
  Library(const Request& q, int64_t groups) : all(int(q.nranks * q.warps) * kWarp), codes(size_t(q.nranks)) {
    for (auto& mine : codes) mine.resize(size_t(groups * kGroup) + kVec);
  }
  Barrier all;
  std::vector<std::vector<uint16_t>> codes;  // by rank; the first end as the sums
};
std::unique_ptr<Library> library;

template <class Wire>
void add_up(std::vector<std::vector<uint16_t>>& codes) {
  const auto widened = [](uint16_t code) { return Wire::widen(splat(code)).at[0]; };
  for (size_t i = 0; i < codes[0].size(); ++i)
    for (size_t r = 1; r < codes.size(); ++r)
      codes[0][i] = Wire::narrow(splat(widened(codes[0][i]) + widened(codes[r][i]))).at[0];
}

template <class Codec>
void play_native(ThreadLanes lanes, const Team& team, const Bucket& bucket, Header header, const Request& q) {
  const Range all{0, bucket.groups};
  for (int64_t i = 0; i < q.calls; ++i) {
    const int divisor = Op(header.op) == Op::mean ? team.nranks : 1;
    cast<Codec>(lanes, bucket, all, divisor, library->codes[size_t(team.rank)].data());
    library->all.meet();
    if (team.rank == 0 && lanes.index() == 0) add_up<typename Codec::Wire>(library->codes);
    library->all.meet();
    widen<Codec>(lanes, bucket, all, library->codes[0].data());
    library->all.meet();
  }
}

using Play = void (*)(ThreadLanes, const Team&, const Bucket&, Header, const Request&);

Play choose(const Request& q) {
  const Dtype dtype = Dtype(q.dtype);
  if (Algorithm(q.algorithm) == Algorithm::native)
    return with_native_codec(dtype, CodecKind(q.codec), [](auto c) -> Play { return play_native<decltype(c)>; });
  if (CodecKind(q.codec) == CodecKind::fp16 && dtype == Dtype::float32) return play<Fp16<Float32>>;
  if (CodecKind(q.codec) == CodecKind::none && dtype == Dtype::float32) return play<None<Float32>>;
  if (CodecKind(q.codec) == CodecKind::none && dtype == Dtype::bfloat16) return play<None<Bfloat16>>;
  std::fprintf(stderr, "device_core: no such combination of dtype and codec\n");
  std::exit(2);
}

Header make_header(const Request& q, const std::vector<Place>& places) {
  Header header{};
  for (const Place& p : places) header.numel += p.elems;
  header.tensors = int32_t(q.segments);
  header.bucket = -1;
  header.op = uint8_t(q.op);
  header.dtype = uint8_t(q.dtype);
  header.codec = uint8_t(q.codec);
  header.algorithm = uint8_t(q.algorithm);
  return header;
}

Answer run(const Request& q, const Header& header, const std::vector<std::unique_ptr<Rank>>& ranks) {
  const Play play = choose(q);
  library = std::make_unique<Library>(q, ranks[0]->groups);
  alignas(64) uint64_t failure = 0;
  std::atomic<int64_t> nonfinite_groups{0};
  std::vector<Mailbox*> box;
  for (const auto& rank : ranks) box.push_back(rank->box);
  std::vector<std::thread> threads;
  for (int r = 0; r < int(q.nranks); ++r)
    for (int lane = 0; lane < int(q.warps) * kWarp; ++lane)
      threads.emplace_back([&, r, lane] {
        Rank& rank = *ranks[size_t(r)];
        const Team team{r, int(q.nranks), box.data(), &failure, int(q.slots), q.slot_bytes, q.slot_bytes, false};
        play(ThreadLanes{rank.cta, lane, r, &failure, nonfinite_groups}, team, rank.bucket(), header, q);
      });
  for (std::thread& thread : threads) thread.join();
  return {failure, nonfinite_groups};
}

}  // namespace

int main() {
  ::alarm(50);
  Request q;
  read(&q, sizeof q);
  std::vector<Place> places(static_cast<size_t>(q.segments));
  read(places.data(), places.size() * sizeof(Place));
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int64_t r = 0; r < q.nranks; ++r) {
    ranks.push_back(std::make_unique<Rank>(q));
    ranks.back()->lay_out(places);
    read(ranks.back()->image.get(), size_t(q.image_bytes));
  }
  Answer answer = run(q, make_header(q, places), ranks);
  write(&answer, sizeof answer);
  for (const auto& rank : ranks) write(rank->image.get(), size_t(q.image_bytes));
  return 0;
}
