// Tests of core/local.h, part of test_core. lanes: of a rank, 0 for all kinds; every: only each every-th call.
#pragma once

void test_each_group_is_in_one_message_of_one_owner();
void test_what_is_gathered_and_spread_is_the_sum_of_the_host(int lanes, int every);
