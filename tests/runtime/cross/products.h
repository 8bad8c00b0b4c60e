#pragma once

#include "check.h"
#include "kernels.h"

// Compares two targets' products and embeddings; same_sums: bit for bit. Returns how many differ.
int check_products(const fewbits::runtime::Kernels& reference, const fewbits::runtime::Kernels& kernels, bool same_sums);
int check_pool();
