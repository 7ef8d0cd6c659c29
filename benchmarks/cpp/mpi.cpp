// Open MPI and MPICH: MPI_Allreduce, compiled with the one's or the other's mpicxx.
//   mpirun -np NRANKS mpi FOLDER
#include <mpi.h>

#include "turns.h"

namespace {

class Mpi final : public turns::Contender {
 public:
  std::string version() override {
    char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    int length = 0;
    MPI_Get_library_version(text, &length);
    std::string line(text);  // Open MPI counts the closing zero
    line = line.substr(0, line.find('\n'));
    return line;
  }
  void select(const std::string&) override {}
  void allreduce(float* x, int64_t floats) override {
    MPI_Allreduce(MPI_IN_PLACE, x, int(floats), MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);  // an error ends the program
  }
};

}  // namespace

int main(int argc, char** argv) {
  turns::end_with_parent();  // MPI_Init may wait, too
  if (argc != 2) return 2;
  MPI_Init(&argc, &argv);
  int rank = 0, nranks = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &nranks);
  const int status = turns::serve(argv[1], rank, nranks, [](turns::Pipes&) { return std::make_unique<Mpi>(); });
  MPI_Finalize();
  return status;
}
