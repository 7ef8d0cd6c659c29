// The stand-in for libnccl.so.2, loaded as an engine loads NCCL: that tests of the NCCL engine may believe it. Ranks
// are threads. A stop after 150 s ends whatever hangs.
#include <unistd.h>

#include "stand_in_nccl_tests.h"

using namespace nccl_tests;

namespace {

// ---- messages ----------------------------------------------------------------------------------------------------

// From i to j: some of these, or none.
size_t elements(int i, int j) { return size_t((i * 5 + j * 3) % 7 * 11); }
int value(int i, int j, int turn) { return i * 10000 + j * 100 + turn; }

void test_all_to_all(int ranks, bool blocking) {
  with_ranks(ranks, blocking, [](Rank& r) {
    Memory<int> out(size_t(r.ranks) * 66), in(size_t(r.ranks) * 66, -1);
    for (int turn = 0; turn < 5; ++turn) {
      for (int i = 0; i < r.ranks * 66; ++i) out[i] = value(r.rank, i / 66, turn);
      DONE(api().GroupStart());
      for (int peer = 0; peer < r.ranks; ++peer) {
        DONE(api().Send(out + peer * 66, elements(r.rank, peer), DataType::int32, peer, r.comm, r.stream));
        DONE(api().Recv(in + peer * 66, elements(peer, r.rank), DataType::int32, peer, r.comm, r.stream));
      }
      r.end_group();
      r.sync();
      bool right = true;
      for (int i = 0; i < r.ranks * 66; ++i) {
        const bool arrived = size_t(i % 66) < elements(i / 66, r.rank);
        right &= in[i] == (arrived ? value(i / 66, r.rank, turn) : -1);
      }
      CHECK(right);
    }
  });
}

void test_a_ring(int ranks, bool blocking) {
  const int64_t bytes = counted("bytes"), sends = counted("sends", 1), groups = counted("groups", 1);
  with_ranks(ranks, blocking, [](Rank& r) {
    Memory<int> a(100, r.rank), b(100);
    for (int turn = 0; turn < r.ranks; ++turn) {
      DONE(api().GroupStart());
      DONE(api().GroupStart());  // they nest
      DONE(api().Send(turn % 2 ? b : a, 100, DataType::int32, r.at(1), r.comm, r.stream));
      DONE(api().GroupEnd());
      DONE(api().Recv(turn % 2 ? a : b, 100, DataType::int32, r.at(-1), r.comm, r.stream));
      r.end_group();
    }
    r.sync();
    CHECK((r.ranks % 2 ? b : a).all(r.rank));  // once around
  });
  CHECK(counted("bytes") - bytes == ranks * ranks * 400);
  CHECK(counted("sends", 1) - sends == ranks && counted("groups", 1) - groups == ranks);
}

// Between two ranks in the order of the calls, whatever the groups.
void test_messages_keep_their_order() {
  with_ranks(2, true, [](Rank& r) {
    Memory<int> x(6);
    for (int i = 0; i < 6; ++i) x[i] = r.rank == 0 ? i : -1;
    const auto pass = [&](int i) {
      return r.rank == 0 ? api().Send(x + i, 1, DataType::int32, 1, r.comm, r.stream)
                         : api().Recv(x + i, 1, DataType::int32, 0, r.comm, r.stream);
    };
    DONE(api().GroupStart());
    for (int i = 0; i < (r.rank == 0 ? 2 : 4); ++i) DONE(pass(i));
    DONE(api().GroupEnd());
    DONE(api().GroupStart());
    for (int i = r.rank == 0 ? 2 : 4; i < 6; ++i) DONE(pass(i));
    DONE(api().GroupEnd());
    r.sync();
    for (int i = 0; i < 6; ++i) CHECK(x[i] == i);
  });
}

// A stream waits for the other side, and what comes behind it waits too.
void test_operations_wait_in_their_stream() {
  with_ranks(2, true, [](Rank& r) {
    Memory<int> x(4, 7 + r.rank), y(4);
    if (r.rank == 1) {
      a_while();
      r.all.arrive_and_wait();  // 1
    }
    DONE(api().GroupStart());
    DONE(r.rank == 0 ? api().Send(x, 4, DataType::int32, 1, r.comm, r.stream)
                     : api().Recv(x, 4, DataType::int32, 0, r.comm, r.stream));
    // Connections are made by both; then rank 1 holds its stream back.
    std::atomic<bool> open{false};
    if (r.rank == 1) {
      OK(cudaLaunchHostFunc(
          r.stream, [](void* p) { CHECK(eventually([p] { return static_cast<std::atomic<bool>*>(p)->load(); })); },
          &open));
    } else {
      r.all.arrive_and_wait();  // 1
    }
    DONE(api().GroupEnd());
    OK(cudaMemcpyAsync(y, x, 16, cudaMemcpyDefault, r.stream));
    a_while();
    CHECK(!r.idle());
    r.all.arrive_and_wait();  // 2
    open = true;
    r.sync();
    CHECK(y.all(7));
  });
}

// Operations of one communicator do not overtake each other, even on different streams.
void test_streams_of_one_communicator_take_turns() {
  with_ranks(2, true, [](Rank& r) {
    cudaStream_t second = nullptr;
    OK(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
    Memory<int> x(2, r.rank), y(2, r.rank + 10);
    std::atomic<bool> open{false};
    OK(cudaLaunchHostFunc(
        r.stream, [](void* p) { CHECK(eventually([p] { return static_cast<std::atomic<bool>*>(p)->load(); })); },
        &open));
    DONE(api().AllReduce(x, x, 2, DataType::int32, RedOp::sum, r.comm, r.stream));
    DONE(api().AllReduce(y, y, 2, DataType::int32, RedOp::sum, r.comm, second));
    a_while();
    CHECK(cudaStreamQuery(second) == cudaErrorNotReady);
    r.all.arrive_and_wait();
    open = true;
    OK(cudaStreamSynchronize(second));
    r.sync();
    CHECK(x.all(1) && y.all(21));
    OK(cudaStreamDestroy(second));
  });
}

// ---- all-reduce --------------------------------------------------------------------------------------------------

template <class T>
void reduces(DataType type, RedOp op, const std::vector<T>& from, T expected) {
  with_ranks(int(from.size()), true, [&](Rank& r) {
    const T mine = from[size_t(r.rank)];
    Memory<T> x(65, mine), y(65);
    DONE(api().AllReduce(x, y, 65, type, op, r.comm, r.stream));
    DONE(api().AllReduce(x, x, 65, type, op, r.comm, r.stream));
    DONE(api().AllReduce(x, x, 0, type, op, r.comm, r.stream));
    r.sync();
    if (!CHECK(x.all(expected) && y.all(expected)))
      std::fprintf(stderr, "  type %d, operation %d\n", int(type), int(op));
  });
}

template <class T>
void reduces_numbers(DataType type) {
  reduces<T>(type, RedOp::sum, {5, 3, 4}, 12);
  reduces<T>(type, RedOp::prod, {5, 3, 4}, 60);
  reduces<T>(type, RedOp::max, {4, 3, 5}, 5);
  reduces<T>(type, RedOp::min, {4, 3, 5}, 3);
  reduces<T>(type, RedOp::avg, {2, 4, 10, 4}, 5);
}

void test_all_reduce() {
  reduces_numbers<int32_t>(DataType::int32);
  reduces_numbers<int64_t>(DataType::int64);
  reduces_numbers<float>(DataType::float32);
  reduces_numbers<double>(DataType::float64);
  reduces<int32_t>(DataType::int32, RedOp::sum, {INT32_MAX, 2}, INT32_MIN + 1);
  reduces<int32_t>(DataType::int32, RedOp::avg, {-5, -2}, -3);
  // The order is that of the ranks: 1e8 + 1 rounds to 1e8.
  reduces<float>(DataType::float32, RedOp::sum, {1e8f, 1, -1e8f, 1}, 1);
  // A mean multiplies by 1/3 first. In floats 1/3 rounds up and the products of 7 and 3 with it are 2.3333335 and 1.
  const float third = 1.0f / 3;
  reduces<float>(DataType::float32, RedOp::avg, {7, 3, 1e-8f}, 7 * third + 3 * third + 1e-8f * third);
}

// float16: 1 = 3c00, 2048 = 6800, 2050 = 6801, 0.5 = 3800. bfloat16: 1 = 3f80, 256 = 4380, 258 = 4381.
void test_all_reduce_in_16_bits() {
  reduces<uint16_t>(DataType::float16, RedOp::sum, {0x3c00, 0x3c00, 0x3c00}, 0x4200);
  reduces<uint16_t>(DataType::float16, RedOp::sum, {0x6800, 0x3c00, 0x3c00}, 0x6800);  // each 1 is lost in a tie
  reduces<uint16_t>(DataType::float16, RedOp::sum, {0x3c00, 0x3c00, 0x6800}, 0x6801);  // together they are not
  reduces<uint16_t>(DataType::float16, RedOp::avg, {0x3c00, 0x3c00}, 0x3c00);
  reduces<uint16_t>(DataType::float16, RedOp::avg, {0x0001, 0x0001}, 0x0000);  // halves of the least number tie to 0
  reduces<uint16_t>(DataType::float16, RedOp::max, {0x3c00, 0xbc00}, 0x3c00);
  reduces<uint16_t>(DataType::float16, RedOp::sum, {0x7bff, 0x7bff}, 0x7c00);
  reduces<uint16_t>(DataType::bfloat16, RedOp::sum, {0x4380, 0x3f80, 0x3f80}, 0x4380);
  reduces<uint16_t>(DataType::bfloat16, RedOp::sum, {0x3f80, 0x3f80, 0x4380}, 0x4381);
  reduces<uint16_t>(DataType::bfloat16, RedOp::min, {0x3f80, 0xbf80}, 0xbf80);
  reduces<uint16_t>(DataType::bfloat16, RedOp::prod, {0x4000, 0x4000}, 0x4080);
}

// ---- graphs ------------------------------------------------------------------------------------------------------

void test_a_graph_replays(bool blocking) {
  with_ranks(3, blocking, [](Rank& r) {
    Memory<int> x(8), y(8);
    Graph graph(r, [&] {
      OK(cudaMemcpyAsync(y, x, 32, cudaMemcpyDefault, r.stream));
      DONE(api().GroupStart());
      DONE(api().Send(y, 8, DataType::int32, r.at(1), r.comm, r.stream));
      DONE(api().Recv(x, 8, DataType::int32, r.at(-1), r.comm, r.stream));
      r.end_group();
      DONE(r.settled(api().AllReduce(y, y, 8, DataType::int32, RedOp::max, r.comm, r.stream)));
    });
    for (int i = 0; i < 8; ++i) x[i] = r.rank;
    for (int turn = 0; turn < 4; ++turn) OK(cudaGraphLaunch(graph.exec, r.stream));
    r.sync();
    CHECK(x.all((r.rank + 3 * 4 - 4) % 3) && y.all(2));
    std::atomic<bool> gone{false};
    r.all.arrive_and_wait();
    std::thread waits([&] {
      DONE(api().CommDestroy(r.comm));
      CHECK(gone);
    });
    a_while();
    gone = true;
    graph.destroy();
    waits.join();
    r.comm = nullptr;
  });
}

}  // namespace

int main(int argc, char** argv) {
  alarm(argc > 1 ? 60 : 150);
  if (argc > 1) return play_scene(argv[1]);
  CHECK(found_library() == nullptr && &api() == &found_library()->api);
  CHECK(found_library()->version == 22703 && found_library()->how == "DPCOMM_NCCL_LIBRARY");
  CHECK(api().GetErrorString(Result::remote_error) ==
        std::string("remote process exited or there was a network error"));
  for (const bool blocking : {true, false}) {
    for (const int ranks : {1, 2, 3, 8}) test_all_to_all(ranks, blocking);
    for (const int ranks : {2, 3, 8}) test_a_ring(ranks, blocking);
    test_a_graph_replays(blocking);
  }
  test_messages_keep_their_order();
  test_operations_wait_in_their_stream();
  test_streams_of_one_communicator_take_turns();
  test_all_reduce();
  test_all_reduce_in_16_bits();
  test_communicators();
  test_errors_and_aborts();
  test_what_ends_the_process();
  CHECK(counted("comms") == 0);
  return finish();
}
