// SPDX-License-Identifier: BSD-3-Clause
// So that a module that is built with a newer glibc runs on 2.28 too. The headers of libstdc++ count the owners of a
// shared_ptr without atomic instructions where __libc_single_threaded, of glibc 2.32, says that there is one thread.
// This one, which no other library sees, says that there are several.
#if __has_include(<sys/single_threaded.h>)
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
#endif
