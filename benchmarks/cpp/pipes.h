// How a rank of a contender hears and answers the coordinator (benchmarks/cpp/group.py): lines through two FIFOs of its
// own. Between turns it sleeps in read(), so that a contender costs the others nothing while it waits.
//
//   rank -> coordinator   exchange TEXT            answered with "exchanged TEXT TEXT ...", in order of rank
//                         ready PID VERSION        the contender works
//                         failed TEXT              it does not, and ends
//   and, once ready, see turns.h
#pragma once
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace turns {

class Pipes {
 public:
  Pipes(const std::string& folder, int rank)
      : in_(folder + "/to." + std::to_string(rank)), out_(folder + "/from." + std::to_string(rank)) {
    if (!in_ || !out_) throw std::runtime_error("cannot open the pipes in " + folder);
  }

  // Empty when the coordinator has gone. It is the coordinator that has the deadline: it kills a rank that is late.
  std::string read() {
    std::string line;
    std::getline(in_, line);
    return line;
  }
  void write(const std::string& line) { out_ << line << std::endl; }

  // Gives a word to all ranks and returns what each gave; a barrier too.
  std::vector<std::string> exchange(const std::string& word) {
    write("exchange " + word);
    std::istringstream line(read());
    std::vector<std::string> words;
    std::string each;
    line >> each;
    if (each != "exchanged") throw std::runtime_error("the coordinator has gone");
    while (line >> each) words.push_back(each);
    return words;
  }

 private:
  std::ifstream in_;
  std::ofstream out_;
};

// A rank must not outlive the process that started it: it could spin for ever.
inline void end_with_parent() { ::prctl(PR_SET_PDEATHSIG, SIGKILL); }

}  // namespace turns
