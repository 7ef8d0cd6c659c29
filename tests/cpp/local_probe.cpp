// ./local_probe [every]   Of test_core what judges core/local.h and core/shards.h: what their mutants are made from.
#include "core_local.cpp"

int main(int argc, char** argv) {
  ::alarm(100);
  racing::patience = std::chrono::seconds(5);
  test_each_group_is_in_one_message_of_one_owner();
  test_what_is_gathered_and_spread_is_the_sum_of_the_host(0, argc > 1 ? std::atoi(argv[1]) : 1);
  return finish();
}
