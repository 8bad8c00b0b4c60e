// What several threads do together, by itself: for the sanitizer of threads, which takes its time.

#include "products.h"

int main() {
  int failures = check_pool();
#define X(name) failures += check_program(#name);
  TARGETS
#undef X
  return failures != 0;
}
