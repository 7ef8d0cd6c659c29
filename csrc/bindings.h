// The parts of the extension that have a file of their own.
#pragma once
#include <pybind11/pybind11.h>

void add_carried(pybind11::module_& m);  // bindings_carried.cpp
