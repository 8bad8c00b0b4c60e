#pragma once

#include "check.h"
#include "kernels.h"

// Compares two targets' products and embeddings; same_sums: bit for bit. Returns how many differ.
int check_products(const fewbits::runtime::Kernels& reference, const fewbits::runtime::Kernels& kernels, bool same_sums);
// A program on several threads against the same on one; and the pool by itself.
int check_program(const char* target);
int check_pool();
