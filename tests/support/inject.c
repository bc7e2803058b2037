/* A library to preload. It makes chosen system calls fail, or sends the program a signal at them.

FAULTS holds rules, one per line, of six words each:
    RANK CALL PATH FIRST COUNT ACTION
RANK: the worker's HOROVOD_RANK, or *. CALL: open, read, write, fsync or rename. PATH: a part of
the file's path (for rename, of its new path). Of the matching calls of each process, the calls
FIRST to FIRST + COUNT - 1 get ACTION. If ACTION is positive, the call fails with that errno. If it
is -N, the process gets signal N and the call proceeds. If it is 0, a line "CALL PATH" is added to
the file TRACE, and the call proceeds. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RULES 16
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static struct rule { char call[8], path[256]; int first, count, action, met; } rules[RULES];
static int number, trace = -1;

__attribute__((constructor)) static void parse(void) {
    const char *line = getenv("FAULTS"), *own = getenv("HOROVOD_RANK");
    char rank[16];
    if (getenv("TRACE"))
        trace = syscall(SYS_openat, AT_FDCWD, getenv("TRACE"),
                        O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    for (; line && *line && number < RULES;
         line = strchr(line, '\n') ? strchr(line, '\n') + 1 : 0) {
        struct rule *rule = &rules[number];
        if (sscanf(line, "%15s %7s %255s %d %d %d", rank, rule->call, rule->path, &rule->first,
                   &rule->count, &rule->action) == 6)
            number += !strcmp(rank, "*") || (own && !strcmp(rank, own));
        else
            dprintf(2, "inject.c: invalid rule: %s\n", line), _exit(2);
    }
}

/* Return whether a call must fail. Sets errno. */
static int fails(const char *call, const char *path) {
    for (struct rule *rule = rules; rule < rules + number; rule++) {
        if (strcmp(rule->call, call) || !strstr(path, rule->path))
            continue;
        int met = __sync_add_and_fetch(&rule->met, 1);
        if (met < rule->first || met >= rule->first + rule->count)
            continue;
        if (!rule->action) {
            char line[4200];
            syscall(SYS_write, trace, line, snprintf(line, sizeof line, "%s %s\n", call, path));
            continue;
        }
        if (rule->action < 0) {
            kill(getpid(), -rule->action);
            continue;
        }
        errno = rule->action;
        return 1;
    }
    return 0;
}

static int fails_on(const char *call, int descriptor) {
    char link[32], path[4096];
    if (!number)
        return 0;
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    path[length < 0 ? 0 : length] = 0;
    return fails(call, path);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        int mode = va_arg(more, int); \
        va_end(more); \
        return fails("open", path) ? -1 : REAL(name)(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list more; \
        va_start(more, flags); \
        int mode = va_arg(more, int); \
        va_end(more); \
        return fails("open", path) ? -1 : REAL(name)(folder, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t read(int descriptor, void *data, size_t size) {
    return fails_on("read", descriptor) ? -1 : REAL(read)(descriptor, data, size);
}

ssize_t write(int descriptor, const void *data, size_t size) {
    return fails_on("write", descriptor) ? -1 : REAL(write)(descriptor, data, size);
}

int fsync(int descriptor) { return fails_on("fsync", descriptor) ? -1 : REAL(fsync)(descriptor); }

int rename(const char *old, const char *new) {
    return fails("rename", new) ? -1 : REAL(rename)(old, new);
}
