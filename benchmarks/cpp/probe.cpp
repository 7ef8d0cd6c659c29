// Yardstick, not product code: what a hand-written all-reduce without checks reaches. Direct algorithm through slots in
// shared memory, three slices under way at once, one thread a rank. It checks nothing, waits without a deadline, does
// not scale what it sends in half precision, and wants a multiple of 16 elements.
//
//   probe FOLDER RANK NRANKS          variants: fp32|fp16 / plain|streaming / SLOT_KIB, as in fp16/streaming/1024
//
//   put      my values of every other rank's part of a slice into my slot
//   reduce   everyone's values of my part, summed; the sum into my other slot
//   get      the other parts' sums
#include <immintrin.h>

#include "shared.h"
#include "turns.h"

namespace {

constexpr size_t kSlots = 4, kMostSlotBytes = 1 << 20, kPack = 16;  // a pack: 16 floats

// ---- 16 floats at once -------------------------------------------------------------------------------------------
#if defined(__AVX512F__)
struct Pack {
  __m512 v;
  static Pack load(const float* x) { return {_mm512_loadu_ps(x)}; }
  static Pack widen(const char* x) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x))}; }
  void store(float* x) const { _mm512_storeu_ps(x, v); }
  void stream(float* x) const { _mm512_stream_ps(x, v); }
  void store_half(char* x) const { _mm256_storeu_si256((__m256i*)x, half()); }
  void stream_half(char* x) const { _mm256_stream_si256((__m256i*)x, half()); }
  __m256i half() const { return _mm512_cvtps_ph(v, 0); }
  Pack rounded() const { return {_mm512_cvtph_ps(half())}; }
  Pack operator+(Pack b) const { return {_mm512_add_ps(v, b.v)}; }
};
#elif defined(__AVX2__) && defined(__F16C__)
struct Pack {
  __m256 a, b;
  static Pack load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
  static __m256 widen8(const char* x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)); }
  static Pack widen(const char* x) { return {widen8(x), widen8(x + 16)}; }
  void store(float* x) const { _mm256_storeu_ps(x, a), _mm256_storeu_ps(x + 8, b); }
  void stream(float* x) const { _mm256_stream_ps(x, a), _mm256_stream_ps(x + 8, b); }
  static __m128i half(__m256 v) { return _mm256_cvtps_ph(v, 0); }
  void store_half(char* x) const { _mm_storeu_si128((__m128i*)x, half(a)), _mm_storeu_si128((__m128i*)x + 1, half(b)); }
  void stream_half(char* x) const {
    _mm_stream_si128((__m128i*)x, half(a)), _mm_stream_si128((__m128i*)x + 1, half(b));
  }
  Pack rounded() const { return {_mm256_cvtph_ps(half(a)), _mm256_cvtph_ps(half(b))}; }
  Pack operator+(Pack o) const { return {_mm256_add_ps(a, o.a), _mm256_add_ps(b, o.b)}; }
};
#else
#error "the probe is written for AVX-512, or AVX2 with F16C"
#endif

// ---- ranks -------------------------------------------------------------------------------------------------------
struct Flags {  // of one rank: how many slices it has put, reduced, got
  turns::Flag put, reduced, got;
};

class Probe final : public turns::Contender {
 public:
  Probe(turns::Pipes& pipes, int rank, int nranks) : rank_(rank), nranks_(nranks), crowded_(turns::crowded(nranks)) {
    const size_t head = sizeof(Flags) * size_t(nranks), slots = kSlots * 2 * kMostSlotBytes;
    char* memory = turns::share(pipes, rank, head + slots * size_t(nranks));
    flags_ = reinterpret_cast<Flags*>(memory);
    for (int r = 0; r < nranks; ++r) slots_.push_back(memory + head + slots * size_t(r));
    std::memset(slots_[size_t(rank)], 0, slots);
    pipes.exchange("touched");
  }
  std::string version() override { return sizeof(Pack) == alignof(Pack) ? "AVX-512" : "AVX2"; }
  double tolerance() override { return half_ ? turns::kHalfTolerance : 0; }
  void select(const std::string& variant) override {
    std::istringstream parts(variant);
    std::string wire, store, kib;
    std::getline(parts, wire, '/') && std::getline(parts, store, '/') && std::getline(parts, kib);
    slot_bytes_ = size_t(std::atol(kib.c_str())) << 10;
    half_ = wire == "fp16";
    streaming_ = store == "streaming";
    if ((!half_ && wire != "fp32") || (!streaming_ && store != "plain") || !slot_bytes_ || slot_bytes_ > kMostSlotBytes)
      throw std::runtime_error("the probe has no '" + variant + "'");
  }
  void allreduce(float* x, int64_t floats) override {
    if (half_)
      streaming_ ? slices<true, true>(x, size_t(floats)) : slices<true, false>(x, size_t(floats));
    else
      streaming_ ? slices<false, true>(x, size_t(floats)) : slices<false, false>(x, size_t(floats));
  }

 private:
  template <bool half, bool streaming>
  void slices(float* x, size_t floats) {
    const size_t per_slice = slot_bytes_ / (half ? 2 : 4), count = (floats + per_slice - 1) / per_slice;
    auto size = [&](size_t c) { return std::min(per_slice, floats - c * per_slice); };
    for (size_t c = 0; c < count + 2; ++c) {
      if (c < count) put<half, streaming>(x + c * per_slice, size(c), sequence_ + c);
      if (c >= 1 && c - 1 < count) reduce<half, streaming>(x + (c - 1) * per_slice, size(c - 1), sequence_ + c - 1);
      if (c >= 2) get<half>(x + (c - 2) * per_slice, size(c - 2), sequence_ + c - 2);
    }
    sequence_ += count;
  }

  template <bool half, bool streaming>
  void put(const float* x, size_t size, uint64_t message) {
    if (message >= kSlots)
      for (int r = 0; r < nranks_; ++r) turns::wait_for(flags_[r].got, message - kSlots + 1, crowded_);
    for (int owner = 0; owner < nranks_; ++owner)
      if (owner != rank_)
        for (size_t i = begin(size, owner); i < begin(size, owner + 1); i += kPack)
          send<half, streaming>(Pack::load(x + i), slot(rank_, message, 0), i);
    post<streaming>(flags_[rank_].put, message);
  }
  template <bool half, bool streaming>
  void reduce(float* x, size_t size, uint64_t message) {
    for (int r = 0; r < nranks_; ++r)
      if (r != rank_) turns::wait_for(flags_[r].put, message + 1, crowded_);
    for (size_t i = begin(size, rank_); i < begin(size, rank_ + 1); i += kPack) {
      Pack sum = Pack::load(x + i);
      for (int r = 0; r < nranks_; ++r)
        if (r != rank_) sum = sum + receive<half>(slot(r, message, 0), i);
      send<half, streaming>(sum, slot(rank_, message, 1), i);
      (half ? sum.rounded() : sum).store(x + i);
    }
    post<streaming>(flags_[rank_].reduced, message);
  }
  template <bool half>
  void get(float* x, size_t size, uint64_t message) {
    for (int k = 1; k < nranks_; ++k) {
      const int owner = (rank_ + k) % nranks_;
      turns::wait_for(flags_[owner].reduced, message + 1, crowded_);
      for (size_t i = begin(size, owner); i < begin(size, owner + 1); i += kPack)
        receive<half>(slot(owner, message, 1), i).store(x + i);
    }
    post<false>(flags_[rank_].got, message);
  }

  // Where an owner's part of a slice begins: whole packs, the last parts shorter or empty.
  size_t begin(size_t size, int owner) const {
    const size_t packs = (size + kPack - 1) / kPack, part = (packs + size_t(nranks_) - 1) / size_t(nranks_);
    return std::min(size, size_t(owner) * part * kPack);
  }
  char* slot(int rank, uint64_t message, size_t which) const {
    return slots_[size_t(rank)] + ((message % kSlots) * 2 + which) * slot_bytes_;
  }
  template <bool half, bool streaming>
  static void send(Pack p, char* slot, size_t i) {
    if (half)
      streaming ? p.stream_half(slot + i * 2) : p.store_half(slot + i * 2);
    else
      streaming ? p.stream(reinterpret_cast<float*>(slot) + i) : p.store(reinterpret_cast<float*>(slot) + i);
  }
  template <bool half>
  static Pack receive(const char* slot, size_t i) {
    return half ? Pack::widen(slot + i * 2) : Pack::load(reinterpret_cast<const float*>(slot) + i);
  }
  template <bool streaming>
  static void post(turns::Flag& flag, uint64_t message) {
    if (streaming) _mm_sfence();
    flag.v.store(message + 1, std::memory_order_release);
  }

  const int rank_, nranks_;
  const bool crowded_;
  Flags* flags_;
  std::vector<char*> slots_;
  size_t slot_bytes_ = kMostSlotBytes;
  bool half_ = false, streaming_ = false;
  uint64_t sequence_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const int rank = std::atoi(argv[2]), nranks = std::atoi(argv[3]);
  return turns::serve(argv[1], rank, nranks,
                      [&](turns::Pipes& pipes) { return std::make_unique<Probe>(pipes, rank, nranks); });
}
