// dpcomm's engine shm without Python. Variants are CODEC/ALGORITHM, by the names that dpcomm has for them.
//   dpcomm FOLDER RANK NRANKS
#include <charconv>
#include <random>

#include "cpu/shm_builder.h"
#include "turns.h"

namespace {

constexpr int64_t kArenaBytes = int64_t(64) << 20;  // the default of DPCOMM_ARENA_MB
constexpr double kTimeoutS = 60;
using Word = std::array<uint8_t, 32>;  // an endpoint, or the secret

std::string to_hex(const Word& bytes) {
  std::string text;
  for (const uint8_t b : bytes)
    for (const int nibble : {b >> 4, b & 15}) text += "0123456789abcdef"[nibble];
  return text;
}
Word from_hex(const std::string& text) {
  Word bytes{};
  for (size_t i = 0; i < bytes.size(); ++i) std::from_chars(text.data() + 2 * i, text.data() + 2 * i + 2, bytes[i], 16);
  return bytes;
}

// What dpcomm/processors.py asks for when no environment variable says otherwise.
dpcomm::Wish usual_wish(int nranks) {
  cpu_set_t allowed;
  const int processors = ::sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
  dpcomm::Wish wish{.arena_bytes = kArenaBytes};
  wish.channels = std::clamp(processors / nranks, 1, 4);
  wish.fewer_channels = true;
  wish.crowded = nranks > processors;
  return wish;
}

template <class Enum>
Enum named(const std::string& name, std::initializer_list<Enum> values) {
  for (const Enum v : values)
    if (name == dpcomm::name_of(v)) return v;
  throw std::runtime_error("dpcomm has no '" + name + "'");
}

class Dpcomm final : public turns::Contender {
 public:
  // The stages of dpcomm/bootstrap.py, with the coordinator in place of the store.
  Dpcomm(turns::Pipes& pipes, int rank, int nranks) {
    dpcomm::ShmBuilder builder(rank, nranks, usual_wish(nranks), "");
    Word secret;
    std::random_device random;
    for (uint8_t& b : secret) b = uint8_t(random());
    secret = from_hex(pipes.exchange(to_hex(secret))[0]);
    std::vector<dpcomm::Endpoint> endpoints;
    for (const std::string& text : pipes.exchange(to_hex(builder.endpoint()))) endpoints.push_back(from_hex(text));
    builder.probe(endpoints);
    pipes.exchange("probed");
    builder.bind(secret, kTimeoutS);
    pipes.exchange("bound");
    engine_ = builder.finish(kTimeoutS, "cpp");
    call_.addresses.resize(1);
    call_.counts.resize(1);
  }
  ~Dpcomm() override { engine_->close(); }

  std::string version() override {
    const dpcomm::Description d = engine_->describe();
    return "dpcomm " DPCOMM_VERSION ", " + d.simd + ", store " + d.store + ", channels " + std::to_string(d.channels) +
           ", " + std::to_string(d.slots) + " slots of " + std::to_string(d.slot_bytes) + " bytes";
  }
  void select(const std::string& variant) override {
    using enum dpcomm::Algorithm;
    const size_t slash = std::min(variant.find('/'), variant.size() - 1);
    call_.codec = named(variant.substr(0, slash), {dpcomm::CodecKind::none, dpcomm::CodecKind::fp16});
    call_.algorithm = named(variant.substr(slash + 1), {automatic, direct, oneshot, ring});
  }
  double tolerance() override {
    if (call_.codec == dpcomm::CodecKind::none) return 0;
    // A ring rounds the sum once at each hop instead of once.
    return turns::kHalfTolerance * (call_.algorithm == dpcomm::Algorithm::ring ? engine_->nranks() : 1);
  }
  void allreduce(float* x, int64_t floats) override {
    call_.addresses[0] = reinterpret_cast<char*>(x);
    call_.counts[0] = floats;
    engine_->allreduce(call_);
  }

 private:
  std::unique_ptr<dpcomm::Engine> engine_;
  dpcomm::Call call_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const int rank = std::atoi(argv[2]), nranks = std::atoi(argv[3]);
  return turns::serve(argv[1], rank, nranks,
                      [&](turns::Pipes& pipes) { return std::make_unique<Dpcomm>(pipes, rank, nranks); });
}
