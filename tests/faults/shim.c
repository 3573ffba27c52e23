/* Fails one chosen call on a file below given folders, for tests; loaded by LD_PRELOAD (Linux, glibc).
 *
 * A point is "CALL LABEL/PATH #n": the n-th such call on that path, where LABEL stands for a folder, and random parts
 * of names are stars. So threads that work on different files do not change the numbers. `fault_start` begins to count,
 * `fault_arm` chooses the point and what happens there, `fault_points` writes what was counted. With a log, every
 * change below the folders is written there with its bytes, in order, to be replayed in part.
 *
 * Not seen: calls that glibc makes itself (opendir's open, realpath's readlink), and system calls made without it.
 */
#define _GNU_SOURCE
#define _LARGEFILE64_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* What happens at the point. AFTER: done, and then reported as failed. SIGNAL: the process gets one instead of an error. */
enum { NOTHING, FAIL, HALF, NONE, AFTER, SIGNAL };

#define MOST_ROOTS 8
#define MOST_POINTS 16384
#define KEY 400

static struct { char path[PATH_MAX], label[64]; size_t length; } roots[MOST_ROOTS];
static int root_count, is_active, log_fd = -1;
static struct { char key[KEY]; unsigned count; } points[MOST_POINTS];
static struct { char key[KEY]; unsigned nth; int action, error, fired; } armed;
static unsigned long random_state; /* of getrandom, while it is not 0: then names and times are the same in every run */
static volatile char lock_word;
static __thread int holding;

static void lock(void) {
    if (holding++ == 0)
        while (__atomic_test_and_set(&lock_word, __ATOMIC_ACQUIRE)) {}
}
static void unlock(void) {
    if (--holding == 0) __atomic_clear(&lock_word, __ATOMIC_RELEASE);
}

/* ---- names ---- */

static int descriptor_path(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long n = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
    if (n <= 0 || out[0] != '/') return 0;
    out[n] = 0;
    char *deleted = strstr(out, " (deleted)");
    if (deleted) *deleted = 0;
    return 1;
}

static int absolute(int folder, const char *path, char *out) {
    if (!path) return 0;
    if (path[0] == '/') return snprintf(out, PATH_MAX, "%s", path) < PATH_MAX;
    char base[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (syscall(SYS_getcwd, base, sizeof base) <= 0) return 0;
    } else if (!descriptor_path(folder, base)) return 0;
    while (path[0] == '.' && path[1] == '/') path += 2;
    if (!path[0] || !strcmp(path, ".")) return snprintf(out, PATH_MAX, "%s", base) < PATH_MAX;
    return snprintf(out, PATH_MAX, "%s/%s", base, path) < PATH_MAX;
}

static int is_hex(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); }
static int is_random(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || c == '_'; }

/* Writes a name without its random parts: 12 or more hex digits, tmp and 8 characters, #inode. */
static void put_name(const char *name, char *out, size_t size) {
    size_t n = 0;
    while (*name && n + 2 < size) {
        size_t run = 0;
        while (is_hex(name[run])) run++;
        if (run >= 12) { out[n++] = '*'; name += run; continue; }
        if (!strncmp(name, "tmp", 3)) {
            for (run = 0; run < 8 && is_random(name[3 + run]); run++) {}
            if (run == 8) { out[n++] = '*'; name += 11; continue; }
        }
        if (*name == '#') { out[n++] = '*'; while (name[1] >= '0' && name[1] <= '9') name++; name++; continue; }
        out[n++] = *name++;
    }
    while (n > 1 && out[n - 1] == '/') n--;
    out[n] = 0;
}

static int below(const char *path) { /* the number of the root, or -1 */
    int found = -1;
    for (int i = 0; i < root_count; i++)
        if (!strncmp(path, roots[i].path, roots[i].length) &&
            (path[roots[i].length] == '/' || !path[roots[i].length]) &&
            (found < 0 || roots[i].length > roots[found].length))
            found = i;
    return found;
}

/* ---- counting ---- */

static int consult_key(const char *key) {
    unsigned long hash = 5381;
    for (const char *c = key; *c; c++) hash = hash * 33 + (unsigned char)*c;
    unsigned i = hash % MOST_POINTS;
    while (points[i].key[0] && strcmp(points[i].key, key)) i = (i + 1) % MOST_POINTS;
    if (!points[i].key[0]) strcpy(points[i].key, key);
    unsigned count = ++points[i].count;
    if (armed.action && !armed.fired && count == armed.nth && !strcmp(armed.key, key)) {
        armed.fired = 1;
        if (armed.action == FAIL) errno = armed.error;
        if (armed.action == SIGNAL) { kill(getpid(), armed.error); return NOTHING; }
        return armed.action;
    }
    return NOTHING;
}

static int consult(const char *call, const char *path) {
    if (!is_active) return NOTHING;
    int root = below(path);
    if (root < 0) return NOTHING;
    char key[KEY], name[PATH_MAX];
    put_name(path + roots[root].length, name, sizeof name);
    if (snprintf(key, sizeof key, "%s %s%.300s", call, roots[root].label, name) >= KEY) return NOTHING;
    lock();
    int action = consult_key(key);
    unlock();
    return action;
}

static int consult_at(const char *call, int folder, const char *path) {
    char full[PATH_MAX];
    int before = errno, action = is_active && absolute(folder, path, full) ? consult(call, full) : NOTHING;
    if (action != FAIL) errno = before;
    return action;
}

static int consult_fd(const char *call, int fd) {
    char full[PATH_MAX];
    int before = errno, action = is_active && fd > 2 && descriptor_path(fd, full) ? consult(call, full) : NOTHING;
    if (action != FAIL) errno = before;
    return action;
}

/* ---- the log of changes ---- */

static void put(const void *bytes, size_t n) {
    const char *at = bytes;
    while (n) {
        long done = syscall(SYS_write, log_fd, at, n);
        if (done <= 0) return;
        at += done, n -= done;
    }
}

static void tell(const char *format, ...) {
    char line[2 * PATH_MAX + 100];
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    put(line, n);
}

static int is_logged(const char *path) { return is_active && log_fd >= 0 && below(path) >= 0; }
static int log_begin(int fd, char *path) { /* locks when it returns 1 */
    if (!is_active || log_fd < 0 || !descriptor_path(fd, path) || below(path) < 0) return 0;
    lock();
    return 1;
}
static unsigned long inode(int fd) {
    struct stat s;
    return syscall(SYS_fstat, fd, &s) ? 0 : s.st_ino;
}
static int exists(const char *path) { return !syscall(SYS_faccessat, AT_FDCWD, path, F_OK); }

static void log_written(int fd, const char *path, const void *bytes, ssize_t n, off64_t offset) {
    if (n <= 0) return;
    if (offset < 0) offset = syscall(SYS_lseek, fd, 0, SEEK_CUR) - n;
    tell("write\t%lu\t%lld\t%zd\t%s\n", inode(fd), (long long)offset, n, path);
    put(bytes, n);
}

/* ---- for the tests ---- */

void fault_start(const char *lines, int log) { /* lines: LABEL=PATH */
    root_count = 0, log_fd = log;
    memset(points, 0, sizeof points);
    memset(&armed, 0, sizeof armed);
    while (*lines && root_count < MOST_ROOTS) {
        const char *equal = strchr(lines, '='), *end = strchrnul(lines, '\n');
        snprintf(roots[root_count].label, 64, "%.*s", (int)(equal - lines), lines);
        snprintf(roots[root_count].path, PATH_MAX, "%.*s", (int)(end - equal - 1), equal + 1);
        roots[root_count].length = strlen(roots[root_count].path);
        root_count++;
        lines = *end ? end + 1 : end;
    }
    is_active = 1;
}
void fault_arm(const char *key, unsigned nth, int action, int error) {
    snprintf(armed.key, sizeof armed.key, "%s", key);
    armed.nth = nth, armed.action = action, armed.error = error;
}
int fault_fired(void) { return armed.fired; }
void fault_seed(unsigned long seed) { random_state = seed; }
void fault_stop(void) { is_active = 0; }
void fault_points(int fd) {
    char line[KEY + 20];
    for (int i = 0; i < MOST_POINTS; i++)
        if (points[i].key[0]) {
            int n = snprintf(line, sizeof line, "%s\t%u\n", points[i].key, points[i].count);
            if (syscall(SYS_write, fd, line, n) < 0) return;
        }
}

/* ---- the calls ---- */

#define REAL(type, name, ...)                                                                 \
    static type (*real)(__VA_ARGS__);                                                         \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

/* A call that gives -1 on failure. `ask` consults, `real_call` does it. */
#define GUARDED(ask, real_call)                                                               \
    int action = (ask);                                                                       \
    if (action == FAIL) return -1;                                                            \
    __typeof__(real_call) result = (real_call);                                               \
    if (action == AFTER && result >= 0) { errno = armed.error; return -1; }                   \
    return result

static int opened(int (*real)(int, const char *, int, ...), int folder, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    const char *call = flags & O_TMPFILE & ~O_DIRECTORY ? "open-temporary"
                       : flags & O_CREAT ? "open-create" : (flags & O_ACCMODE) == O_RDONLY ? "open" : "open-write";
    if (consult_at(call, folder, path) == FAIL) return -1;
    if (!is_active || log_fd < 0 || !absolute(folder, path, full) || !is_logged(full))
        return real(folder, path, flags, mode);
    lock();
    int there = exists(full), fd = real(folder, path, flags, mode), error = errno;
    if (fd >= 0 && !there && flags & O_CREAT) tell("create\t%lu\t0\t0\t%s\n", inode(fd), full);
    if (fd >= 0 && there && flags & O_TRUNC) tell("truncate\t%lu\t0\t0\t%s\n", inode(fd), full);
    unlock();
    errno = error;
    return fd;
}
#define MODE                                                                                  \
    mode_t mode = 0;                                                                          \
    if (flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY))) {                                     \
        va_list more;                                                                         \
        va_start(more, flags);                                                                \
        mode = va_arg(more, mode_t);                                                          \
        va_end(more);                                                                         \
    }
static int openat_itself(int folder, const char *path, int flags, ...) {
    MODE
    return syscall(SYS_openat, folder, path, flags | O_LARGEFILE, mode);
}
int open(const char *path, int flags, ...) { MODE return opened(openat_itself, AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(openat_itself, AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(openat_itself, folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(openat_itself, folder, path, flags, mode); }
int creat(const char *path, mode_t mode) { return opened(openat_itself, AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

int close(int fd) {
    int action = consult_fd("close", fd), error = errno;
    int result = syscall(SYS_close, fd);
    if (action == FAIL) { errno = error; return -1; }
    return result;
}

#define COUNT(n) (action == HALF ? (n) / 2 : (n))
#define READING(name, args, call, n)                                                          \
    { int action = consult_fd(name, fd);                                                      \
      if (action == FAIL) return -1;                                                          \
      if (action == NONE) return 0;                                                           \
      size_t length = COUNT(n);                                                               \
      return call; }
ssize_t read(int fd, void *buffer, size_t n) { READING("read", , syscall(SYS_read, fd, buffer, length), n) }
ssize_t pread(int fd, void *buffer, size_t n, off_t at) { READING("pread", , syscall(SYS_pread64, fd, buffer, length, at), n) }
ssize_t pread64(int fd, void *buffer, size_t n, off64_t at) { return pread(fd, buffer, n, at); }

static ssize_t vector_read(const char *name, int fd, const struct iovec *parts, int count, off64_t at, int flags) {
    int action = consult_fd(name, fd);
    if (action == FAIL) return -1;
    if (action == NONE) return 0;
    struct iovec half = {parts[0].iov_base, parts[0].iov_len / 2};
    if (action == HALF) parts = &half, count = 1;
    if (at == -2) return syscall(SYS_readv, fd, parts, count);
    return syscall(SYS_preadv2, fd, parts, count, at, 0L, flags);
}
ssize_t readv(int fd, const struct iovec *parts, int count) { return vector_read("readv", fd, parts, count, -2, 0); }
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t at) { return vector_read("preadv", fd, parts, count, at, 0); }
ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t at) { return vector_read("preadv", fd, parts, count, at, 0); }
ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t at, int flags) { return vector_read("preadv", fd, parts, count, at, flags); }
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t at, int flags) { return vector_read("preadv", fd, parts, count, at, flags); }

static ssize_t written(const char *name, int fd, const void *buffer, size_t n, off64_t at) {
    int action = consult_fd(name, fd);
    if (action == FAIL) return -1;
    char path[PATH_MAX];
    int logged = log_begin(fd, path);
    ssize_t done = at < 0 ? syscall(SYS_write, fd, buffer, COUNT(n)) : syscall(SYS_pwrite64, fd, buffer, COUNT(n), at);
    int error = errno;
    if (logged) log_written(fd, path, buffer, done, at), unlock();
    errno = error;
    return done;
}
ssize_t write(int fd, const void *buffer, size_t n) { return written("write", fd, buffer, n, -1); }
ssize_t pwrite(int fd, const void *buffer, size_t n, off_t at) { return written("pwrite", fd, buffer, n, at); }
ssize_t pwrite64(int fd, const void *buffer, size_t n, off64_t at) { return written("pwrite", fd, buffer, n, at); }
ssize_t writev(int fd, const struct iovec *parts, int count) {
    char path[PATH_MAX];
    int action = consult_fd("writev", fd);
    if (action == FAIL) return -1;
    if (action == HALF || (is_active && log_fd >= 0 && descriptor_path(fd, path) && below(path) >= 0))
        return written("writev", fd, parts[0].iov_base, COUNT(parts[0].iov_len), -1);
    return syscall(SYS_writev, fd, parts, count);
}

static int synced(const char *name, int number, int fd) {
    if (consult_fd(name, fd) == FAIL) return -1;
    char path[PATH_MAX];
    int logged = log_begin(fd, path), result = syscall(number, fd), error = errno;
    if (logged) {
        if (!result) tell("sync\t%lu\t0\t0\t%s\n", inode(fd), path);
        unlock();
    }
    errno = error;
    return result;
}
int fsync(int fd) { return synced("fsync", SYS_fsync, fd); }
int fdatasync(int fd) { return synced("fdatasync", SYS_fdatasync, fd); }

static int sized(const char *name, int fd, off64_t size) {
    if (consult_fd(name, fd) == FAIL) return -1;
    char path[PATH_MAX];
    int logged = log_begin(fd, path), result = syscall(SYS_ftruncate, fd, size), error = errno;
    if (logged) {
        if (!result) tell("truncate\t%lu\t%lld\t0\t%s\n", inode(fd), (long long)size, path);
        unlock();
    }
    errno = error;
    return result;
}
int ftruncate(int fd, off_t size) { return sized("ftruncate", fd, size); }
int ftruncate64(int fd, off64_t size) { return sized("ftruncate", fd, size); }
int truncate64(const char *path, off64_t size) {
    GUARDED(consult_at("truncate", AT_FDCWD, path), (int)syscall(SYS_truncate, path, size));
}
int truncate(const char *path, off_t size) { return truncate64(path, size); }
static int reserved(int fd, int mode, off64_t at, off64_t size) {
    char path[PATH_MAX];
    int logged = log_begin(fd, path), result = syscall(SYS_fallocate, fd, mode, at, size), error = errno;
    if (logged) {
        off64_t end = syscall(SYS_lseek, fd, 0, SEEK_CUR), length = syscall(SYS_lseek, fd, 0, SEEK_END);
        syscall(SYS_lseek, fd, end, SEEK_SET);
        if (!result) tell("truncate\t%lu\t%lld\t0\t%s\n", inode(fd), (long long)length, path);
        unlock();
    }
    errno = error;
    return result;
}
int fallocate(int fd, int mode, off_t at, off_t size) { GUARDED(consult_fd("fallocate", fd), reserved(fd, mode, at, size)); }
int fallocate64(int fd, int mode, off64_t at, off64_t size) { return fallocate(fd, mode, at, size); }
int posix_fallocate(int fd, off_t at, off_t size) {
    if (consult_fd("fallocate", fd) == FAIL) return armed.error;
    return reserved(fd, 0, at, size) ? errno : 0;
}
int posix_fallocate64(int fd, off64_t at, off64_t size) { return posix_fallocate(fd, at, size); }

/* A change of names: done under the lock, so that the log has the order. */
#define NAMED(call, folder, path, statement, line)                                            \
    { int action = consult_at(call, folder, path);                                            \
      if (action == FAIL) return -1;                                                          \
      char full[PATH_MAX];                                                                    \
      int logged = is_active && log_fd >= 0 && absolute(folder, path, full) && is_logged(full); \
      if (logged) lock();                                                                     \
      int result = statement, error = errno;                                                  \
      if (logged) { if (!result) { line; } unlock(); }                                        \
      errno = error;                                                                          \
      if (action == AFTER && !result) { errno = armed.error; return -1; }                     \
      return result; }

static int renamed(int from, const char *old, int to, const char *new, unsigned flags) {
    char target[PATH_MAX];
    if (!absolute(to, new, target)) target[0] = 0;
    NAMED("rename", from, old, syscall(SYS_renameat2, from, old, to, new, flags), tell("rename\t0\t0\t0\t%s\t%s\n", full, target))
}
int rename(const char *old, const char *new) { return renamed(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renamed(from, old, to, new, 0); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) { return renamed(from, old, to, new, flags); }
int linkat(int from, const char *old, int to, const char *new, int flags) {
    char target[PATH_MAX];
    if (!absolute(to, new, target)) target[0] = 0;
    NAMED("link", from, old, syscall(SYS_linkat, from, old, to, new, flags), tell("link\t0\t0\t0\t%s\t%s\n", full, target))
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }
int unlinkat(int folder, const char *path, int flags) {
    NAMED(flags & AT_REMOVEDIR ? "rmdir" : "unlink", folder, path, syscall(SYS_unlinkat, folder, path, flags),
          tell("unlink\t0\t0\t0\t%s\n", full))
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int mkdirat(int folder, const char *path, mode_t mode) {
    NAMED("mkdir", folder, path, syscall(SYS_mkdirat, folder, path, mode), tell("mkdir\t0\t0\t0\t%s\n", full))
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int symlinkat(const char *to, int folder, const char *path) {
    NAMED("symlink", folder, path, syscall(SYS_symlinkat, to, folder, path), tell("symlink\t0\t0\t0\t%s\t%s\n", full, to))
}
int symlink(const char *to, const char *path) { return symlinkat(to, AT_FDCWD, path); }

#define STATUS(name, ask, ...)                                                                \
    { REAL(int, name, __VA_ARGS__);                                                           \
      if ((ask) == FAIL) return -1;
int stat(const char *restrict p, struct stat *restrict s) STATUS(stat, consult_at("stat", AT_FDCWD, p), const char *, struct stat *) return real(p, s); }
int lstat(const char *restrict p, struct stat *restrict s) STATUS(lstat, consult_at("lstat", AT_FDCWD, p), const char *, struct stat *) return real(p, s); }
int fstat(int fd, struct stat *s) STATUS(fstat, consult_fd("fstat", fd), int, struct stat *) return real(fd, s); }
int stat64(const char *restrict p, struct stat64 *restrict s) STATUS(stat64, consult_at("stat", AT_FDCWD, p), const char *, struct stat64 *) return real(p, s); }
int lstat64(const char *restrict p, struct stat64 *restrict s) STATUS(lstat64, consult_at("lstat", AT_FDCWD, p), const char *, struct stat64 *) return real(p, s); }
int fstat64(int fd, struct stat64 *s) STATUS(fstat64, consult_fd("fstat", fd), int, struct stat64 *) return real(fd, s); }
#define AT_CALL(flags) ((flags) & AT_SYMLINK_NOFOLLOW ? "lstat" : "stat")
int fstatat(int d, const char *restrict p, struct stat *restrict s, int f) STATUS(fstatat, consult_at(AT_CALL(f), d, p), int, const char *, struct stat *, int) return real(d, p, s, f); }
int fstatat64(int d, const char *restrict p, struct stat64 *restrict s, int f) STATUS(fstatat64, consult_at(AT_CALL(f), d, p), int, const char *, struct stat64 *, int) return real(d, p, s, f); }
int statx(int d, const char *restrict p, int f, unsigned m, struct statx *restrict s) STATUS(statx, p && *p ? consult_at(AT_CALL(f), d, p) : consult_fd("fstat", d), int, const char *, int, unsigned, struct statx *) return real(d, p, f, m, s); }
int __xstat(int v, const char *p, struct stat *s) STATUS(__xstat, consult_at("stat", AT_FDCWD, p), int, const char *, struct stat *) return real(v, p, s); }
int __lxstat(int v, const char *p, struct stat *s) STATUS(__lxstat, consult_at("lstat", AT_FDCWD, p), int, const char *, struct stat *) return real(v, p, s); }
int __fxstat(int v, int fd, struct stat *s) STATUS(__fxstat, consult_fd("fstat", fd), int, int, struct stat *) return real(v, fd, s); }
int __xstat64(int v, const char *p, struct stat64 *s) STATUS(__xstat64, consult_at("stat", AT_FDCWD, p), int, const char *, struct stat64 *) return real(v, p, s); }
int __lxstat64(int v, const char *p, struct stat64 *s) STATUS(__lxstat64, consult_at("lstat", AT_FDCWD, p), int, const char *, struct stat64 *) return real(v, p, s); }
int __fxstat64(int v, int fd, struct stat64 *s) STATUS(__fxstat64, consult_fd("fstat", fd), int, int, struct stat64 *) return real(v, fd, s); }

int access(const char *path, int mode) { GUARDED(consult_at("access", AT_FDCWD, path), (int)syscall(SYS_access, path, mode)); }
int faccessat(int folder, const char *path, int mode, int flags) {
    REAL(int, faccessat, int, const char *, int, int);
    GUARDED(consult_at("access", folder, path), real(folder, path, mode, flags));
}
ssize_t readlink(const char *restrict path, char *restrict buffer, size_t n) { GUARDED(consult_at("readlink", AT_FDCWD, path), syscall(SYS_readlinkat, AT_FDCWD, path, buffer, n)); }
ssize_t readlinkat(int folder, const char *restrict path, char *restrict buffer, size_t n) { GUARDED(consult_at("readlink", folder, path), syscall(SYS_readlinkat, folder, path, buffer, n)); }
int chmod(const char *path, mode_t mode) { GUARDED(consult_at("chmod", AT_FDCWD, path), (int)syscall(SYS_fchmodat, AT_FDCWD, path, mode)); }
int fchmod(int fd, mode_t mode) { GUARDED(consult_fd("fchmod", fd), (int)syscall(SYS_fchmod, fd, mode)); }
int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    REAL(int, fchmodat, int, const char *, mode_t, int);
    GUARDED(consult_at("chmod", folder, path), real(folder, path, mode, flags));
}
int utimensat(int folder, const char *path, const struct timespec times[2], int flags) { GUARDED(consult_at("utimensat", folder, path), (int)syscall(SYS_utimensat, folder, path, times, flags)); }
int futimens(int fd, const struct timespec times[2]) { GUARDED(consult_fd("futimens", fd), (int)syscall(SYS_utimensat, fd, NULL, times, 0)); }
int flock(int fd, int operation) {
    int action = (operation & ~LOCK_NB) == LOCK_UN ? NOTHING : consult_fd("flock", fd);
    if (action == FAIL) return -1;
    return syscall(SYS_flock, fd, operation);
}
static int controlled(int fd, int command, void *argument) {
    if ((command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW) &&
        consult_fd("fcntl-lock", fd) == FAIL) return -1;
    return syscall(SYS_fcntl, fd, command, argument);
}
int fcntl(int fd, int command, ...) { va_list more; va_start(more, command); void *a = va_arg(more, void *); va_end(more); return controlled(fd, command, a); }
int fcntl64(int fd, int command, ...) { va_list more; va_start(more, command); void *a = va_arg(more, void *); va_end(more); return controlled(fd, command, a); }
int statvfs64(const char *restrict path, struct statvfs64 *restrict s) { REAL(int, statvfs64, const char *, struct statvfs64 *); GUARDED(consult_at("statvfs", AT_FDCWD, path), real(path, s)); }
int statvfs(const char *restrict path, struct statvfs *restrict s) { REAL(int, statvfs, const char *, struct statvfs *); GUARDED(consult_at("statvfs", AT_FDCWD, path), real(path, s)); }
int fstatvfs64(int fd, struct statvfs64 *s) { REAL(int, fstatvfs64, int, struct statvfs64 *); GUARDED(consult_fd("fstatvfs", fd), real(fd, s)); }
/* What was copied inside the kernel is read back for the log. */
static ssize_t copied(const char *name, int to, long result_of(int, void *), void *copy) {
    if (consult_fd(name, to) == FAIL) return -1;
    char path[PATH_MAX], link[64], block[65536];
    int logged = log_begin(to, path);
    ssize_t n = result_of(to, copy), left = n;
    int error = errno;
    if (logged) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", to);
        int source = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY);
        off64_t at = syscall(SYS_lseek, to, 0, SEEK_CUR) - n;
        while (left > 0) {
            ssize_t some = syscall(SYS_pread64, source, block, left < 65536 ? left : 65536, at);
            if (some <= 0) break;
            log_written(to, path, block, some, at);
            at += some, left -= some;
        }
        syscall(SYS_close, source);
        unlock();
    }
    errno = error;
    return n;
}
struct range { int from; off64_t *a, *b; size_t n; unsigned flags; };
static long copy_range(int to, void *copy) {
    struct range *r = copy;
    return syscall(SYS_copy_file_range, r->from, r->a, to, r->b, r->n, r->flags);
}
static long send_file(int to, void *copy) {
    struct range *r = copy;
    return syscall(SYS_sendfile, to, r->from, r->a, r->n);
}
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t n, unsigned flags) {
    struct range copy = {from, a, b, n, flags};
    return copied("copy_file_range", to, copy_range, &copy);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t n) {
    struct range copy = {from, at, NULL, n, 0};
    return copied("sendfile", to, send_file, &copy);
}
ssize_t sendfile(int to, int from, off_t *at, size_t n) { return sendfile64(to, from, at, n); }

ssize_t getrandom(void *buffer, size_t n, unsigned flags) {
    if (!is_active || !random_state) return syscall(SYS_getrandom, buffer, n, flags);
    lock();
    for (size_t i = 0; i < n; i++) {
        random_state = random_state * 6364136223846793005UL + 1442695040888963407UL;
        ((unsigned char *)buffer)[i] = random_state >> 56;
    }
    unlock();
    return n;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, clock_gettime, clockid_t, struct timespec *);
    if (!is_active || !random_state || clock != CLOCK_REALTIME) return real(clock, now);
    now->tv_sec = 1800000000, now->tv_nsec = 0;
    return 0;
}
char *getcwd(char *buffer, size_t n) {
    REAL(char *, getcwd, char *, size_t);
    char path[PATH_MAX];
    if (is_active && syscall(SYS_getcwd, path, sizeof path) > 0 && consult("getcwd", path) == FAIL) return NULL;
    return real(buffer, n);
}
DIR *opendir(const char *path) {
    REAL(DIR *, opendir, const char *);
    return consult_at("opendir", AT_FDCWD, path) == FAIL ? NULL : real(path);
}
DIR *fdopendir(int fd) {
    REAL(DIR *, fdopendir, int);
    return consult_fd("opendir", fd) == FAIL ? NULL : real(fd);
}
/* The first of a folder's entries asks the system for many; the following ones are in memory by then. */
static int consult_list(DIR *stream) { return telldir(stream) ? NOTHING : consult_fd("readdir", dirfd(stream)); }
struct dirent64 *readdir64(DIR *stream) {
    REAL(struct dirent64 *, readdir64, DIR *);
    return consult_list(stream) == FAIL ? NULL : real(stream);
}
struct dirent *readdir(DIR *stream) {
    REAL(struct dirent *, readdir, DIR *);
    return consult_list(stream) == FAIL ? NULL : real(stream);
}
void *mmap64(void *at, size_t n, int protection, int flags, int fd, off64_t offset) {
    if (fd > 2 && consult_fd("mmap", fd) == FAIL) return MAP_FAILED;
    return (void *)syscall(SYS_mmap, at, n, protection, flags, fd, offset);
}
void *mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset) { return mmap64(at, n, protection, flags, fd, offset); }

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument) {
    REAL(int, pthread_create, pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (is_active) {
        int before = errno;
        lock();
        int action = consult_key("pthread_create process");
        unlock();
        errno = before;
        if (action == FAIL) return armed.error;
    }
    return real(thread, attributes, start, argument);
}
