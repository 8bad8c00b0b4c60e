// Functions compiled once for each kind of processor; the loader takes the best one that the machine has.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define FEWBITS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // no indirect functions (macOS, Windows), or a processor whose baseline has vectors (NEON)
#define FEWBITS_CLONES
#endif
