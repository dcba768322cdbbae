// Keeps the released binary loadable on glibc 2.28, the oldest that Node 20 itself runs on, whatever glibc it
// was linked against. Some functions only changed their version when they moved from libpthread and libdl
// into libc (2.34) or lost an error wrapper (2.29): the linker option --wrap sends every call, those inside
// the static libstdc++ included, to the old version. The few that are newer than 2.28 are written here.
// CMakeLists.txt names the wrapped symbols; test/packaging reads the result off the binary.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/stat.h>
#include <time.h>

#define HIDDEN __attribute__((visibility("hidden")))

// Declares old_<name> as <name>@GLIBC_2.2.5 and defines the wrapper that calls it.
#define OLD_VERSION(type, name, params, args)              \
  __asm__(".symver old_" #name ", " #name "@GLIBC_2.2.5"); \
  extern type old_##name params;                           \
  HIDDEN type __wrap_##name params { return old_##name args; }

OLD_VERSION(int, pthread_create,
            (pthread_t * thread, const pthread_attr_t* attr, void* (*start)(void*), void* arg),
            (thread, attr, start, arg))
OLD_VERSION(int, pthread_join, (pthread_t thread, void** result), (thread, result))
OLD_VERSION(int, pthread_detach, (pthread_t thread), (thread))
OLD_VERSION(int, pthread_once, (pthread_once_t * once, void (*init)(void)), (once, init))
OLD_VERSION(int, pthread_key_create, (pthread_key_t * key, void (*destroy)(void*)), (key, destroy))
OLD_VERSION(int, __pthread_key_create, (pthread_key_t * key, void (*destroy)(void*)), (key, destroy))
OLD_VERSION(int, pthread_key_delete, (pthread_key_t key), (key))
OLD_VERSION(void*, pthread_getspecific, (pthread_key_t key), (key))
OLD_VERSION(int, pthread_setspecific, (pthread_key_t key, const void* value), (key, value))
OLD_VERSION(int, pthread_mutex_trylock, (pthread_mutex_t * mutex), (mutex))
OLD_VERSION(int, pthread_rwlock_rdlock, (pthread_rwlock_t * lock), (lock))
OLD_VERSION(int, pthread_rwlock_wrlock, (pthread_rwlock_t * lock), (lock))
OLD_VERSION(int, pthread_rwlock_unlock, (pthread_rwlock_t * lock), (lock))
OLD_VERSION(void*, dlopen, (const char* file, int mode), (file, mode))
OLD_VERSION(void*, dlsym, (void* handle, const char* name), (handle, name))
OLD_VERSION(int, dlclose, (void* handle), (handle))
OLD_VERSION(char*, dlerror, (void), ())
OLD_VERSION(int, dladdr, (const void* address, Dl_info* info), (address, info))
OLD_VERSION(double, exp, (double x), (x))
OLD_VERSION(double, exp2, (double x), (x))
OLD_VERSION(double, log, (double x), (x))
OLD_VERSION(double, log2, (double x), (x))
OLD_VERSION(double, pow, (double x, double y), (x, y))

// Before 2.33 the stat family was a set of inline functions over these, which carry the struct's version.
#define STAT_VERSION 1
__asm__(".symver old_xstat, __xstat@GLIBC_2.2.5");
__asm__(".symver old_lxstat, __lxstat@GLIBC_2.2.5");
__asm__(".symver old_fxstat, __fxstat@GLIBC_2.2.5");
extern int old_xstat(int version, const char* path, struct stat* out);
extern int old_lxstat(int version, const char* path, struct stat* out);
extern int old_fxstat(int version, int fd, struct stat* out);
HIDDEN int __wrap_stat(const char* path, struct stat* out) {
  return old_xstat(STAT_VERSION, path, out);
}
HIDDEN int __wrap_lstat(const char* path, struct stat* out) {
  return old_lxstat(STAT_VERSION, path, out);
}
HIDDEN int __wrap_fstat(int fd, struct stat* out) {
  return old_fxstat(STAT_VERSION, fd, out);
}

// 2.30: std::condition_variable::wait_for. The wait is by the wall clock instead, which a clock change can
// stretch; callers loop over their condition anyway.
HIDDEN int __wrap_pthread_cond_clockwait(pthread_cond_t* cond, pthread_mutex_t* mutex, clockid_t clock,
                                         const struct timespec* until) {
  struct timespec now, wall;
  if (clock_gettime(clock, &now) != 0 || clock_gettime(CLOCK_REALTIME, &wall) != 0) return EINVAL;
  wall.tv_sec += until->tv_sec - now.tv_sec;
  wall.tv_nsec += until->tv_nsec - now.tv_nsec;
  while (wall.tv_nsec < 0) wall.tv_nsec += 1000000000, --wall.tv_sec;
  while (wall.tv_nsec >= 1000000000) wall.tv_nsec -= 1000000000, ++wall.tv_sec;
  return pthread_cond_timedwait(cond, mutex, &wall);
}

// 2.32: lets shared_ptr skip atomic operations. Here there are always threads.
HIDDEN char __libc_single_threaded = 0;

// 2.35: how the static libgcc finds the unwind table of an address when an exception is thrown.
struct find_object {  // glibc's struct dl_find_object
  unsigned long long flags;
  void *map_start, *map_end;
  struct link_map* link_map;
  void* eh_frame;
  unsigned long long reserved[7];
};
struct search {
  ElfW(Addr) address;
  struct find_object* found;
};

static int visit(struct dl_phdr_info* info, size_t size, void* data) {
  (void)size;
  struct search* search = data;
  const ElfW(Phdr)* eh_frame = NULL;
  ElfW(Addr) start = 0, end = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)* header = &info->dlpi_phdr[i];
    const ElfW(Addr) first = info->dlpi_addr + header->p_vaddr;
    if (header->p_type == PT_GNU_EH_FRAME) eh_frame = header;
    if (header->p_type == PT_LOAD && search->address - first < header->p_memsz) {
      start = first;
      end = first + header->p_memsz;
    }
  }
  if (end == 0) return 0;
  if (eh_frame == NULL) return -1;
  search->found->flags = 0;
  search->found->map_start = (void*)start;
  search->found->map_end = (void*)end;
  search->found->link_map = NULL;
  search->found->eh_frame = (void*)(info->dlpi_addr + eh_frame->p_vaddr);
  return 1;
}

HIDDEN int mgm_find_object(void* address, struct find_object* found) __asm__("_dl_find_object");
HIDDEN int mgm_find_object(void* address, struct find_object* found) {
  struct search search = {(ElfW(Addr))address, found};
  return dl_iterate_phdr(visit, &search) == 1 ? 0 : -1;
}
