// Yardstick: the memory-traffic floor. Every rank copies its buffer to another one of its own, all at the same time. An
// all-reduce has to read every byte of its input and write every byte of its result at least once, as a copy does.
//   floor FOLDER RANK NRANKS
#include "shared.h"
#include "turns.h"

namespace {

class Floor final : public turns::Contender {
 public:
  Floor(turns::Pipes& pipes, int rank, int nranks)
      : barrier_(reinterpret_cast<turns::Flag*>(turns::share(pipes, rank, sizeof(turns::Flag) * size_t(nranks))), rank,
                 nranks, turns::crowded(nranks)) {}
  std::string version() override { return "memcpy of the C library"; }
  void select(const std::string&) override {}
  void resize(int64_t floats) override {
    copy_.reset();
    copy_ = turns::allocate(floats);
    std::memset(copy_.get(), 0, size_t(floats) * 4);
  }
  void allreduce(float* x, int64_t floats) override { std::memcpy(copy_.get(), x, size_t(floats) * 4); }
  void meet(float*) override { barrier_.meet(); }
  void flush(float* x, int64_t floats) override {
    flush_lines(x, floats);
    flush_lines(copy_.get(), floats);
  }

 private:
  turns::Barrier barrier_;
  turns::Buffer copy_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const int rank = std::atoi(argv[2]), nranks = std::atoi(argv[3]);
  return turns::serve(argv[1], rank, nranks,
                      [&](turns::Pipes& pipes) { return std::make_unique<Floor>(pipes, rank, nranks); });
}
