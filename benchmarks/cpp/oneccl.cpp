// Intel oneCCL, from its wheel (pip install oneccl-devel), over the MPI that comes with it.
//   mpiexec -np NRANKS oneccl FOLDER NRANKS
#include <oneapi/ccl.hpp>

#include "turns.h"

namespace {

constexpr char kHex[] = "0123456789abcdef";

std::string to_hex(const ccl::kvs::address_type& address) {
  std::string text;
  for (const char c : address) {
    text += kHex[(c >> 4) & 15];
    text += kHex[c & 15];
  }
  return text;
}
ccl::kvs::address_type from_hex(const std::string& text) {
  ccl::kvs::address_type address{};
  for (size_t i = 0; i < address.size() && 2 * i + 1 < text.size(); ++i)
    address[i] = char(std::stoi(text.substr(2 * i, 2), nullptr, 16));
  return address;
}

class OneCcl final : public turns::Contender {
 public:
  OneCcl(turns::Pipes& pipes, int rank, int nranks) {
    ccl::init();
    if (rank == 0) kvs_ = ccl::create_main_kvs();
    const auto words = pipes.exchange(rank == 0 ? to_hex(kvs_->get_address()) : "-");
    if (rank != 0) kvs_ = ccl::create_kvs(from_hex(words[0]));
    comm_ = std::make_unique<ccl::communicator>(ccl::create_communicator(nranks, rank, kvs_));
  }
  std::string version() override {
    const auto version = ccl::get_library_version();
    return "oneCCL " + std::to_string(version.major) + "." + std::to_string(version.minor) + " " + version.full;
  }
  void select(const std::string&) override {}
  void allreduce(float* x, int64_t floats) override {
    ccl::allreduce(x, x, size_t(floats), ccl::datatype::float32, ccl::reduction::sum, *comm_).wait();
  }

 private:
  ccl::shared_ptr_class<ccl::kvs> kvs_;
  std::unique_ptr<ccl::communicator> comm_;
};

}  // namespace

int main(int argc, char** argv) {
  turns::end_with_parent();
  const char* rank_text = std::getenv("PMI_RANK");  // mpiexec sets it
  if (argc != 3 || !rank_text) return 2;
  const int rank = std::atoi(rank_text), nranks = std::atoi(argv[2]);
  return turns::serve(argv[1], rank, nranks,
                      [&](turns::Pipes& pipes) { return std::make_unique<OneCcl>(pipes, rank, nranks); });
}
