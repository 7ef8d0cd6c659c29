#include <string>

#include "../error.h"
#include "kernels.h"

namespace dpcomm {

namespace portable {
bool run(const KernelCall&);
void run_step(const StepCall&);
bool run_local(const LocalCall&);
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
bool run(const KernelCall&);
void run_step(const StepCall&);
bool run_local(const LocalCall&);
}  // namespace avx2
namespace avx512 {
bool run(const KernelCall&);
void run_step(const StepCall&);
bool run_local(const LocalCall&);
}  // namespace avx512
#endif

const Isa* isas(int* count) {
  static const Isa all[] = {
#if defined(__x86_64__)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq"),
       avx512::run, avx512::run_step, avx512::run_local},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"), avx2::run, avx2::run_step,
       avx2::run_local},
#endif
      {"portable", true, portable::run, portable::run_step, portable::run_local}};
  *count = int(sizeof all / sizeof *all);
  return all;
}

const Isa& isa(const char* name) {
  int count;
  const Isa* all = isas(&count);
  std::string usable;
  for (int i = 0; i < count; ++i) {
    if (!all[i].usable) continue;
    if (*name == '\0' || std::string(name) == all[i].name) return all[i];
    usable += usable.empty() ? all[i].name : std::string(", ") + all[i].name;
  }
  throw Error(Code::argument, std::string("instruction set '") + name +
                                  "' is not usable on this processor. Choose one of: " + usable + ".");
}

}  // namespace dpcomm
