/*
 * probe: what tests want from inside a container and no standard tool does. Static; prints plain lines.
 *
 *   probe alloc MIB     touches MIB MiB of memory, prints "allocated MIB", waits for a signal
 *   probe write BYTES   writes BYTES bytes of a known pattern (byte i is i % 251) to stdout and ends at once
 *   probe status        ids, groups, capabilities, no_new_privs, seccomp, rlimits
 *   probe fork N        starts N children that wait, prints how many there are, waits for a signal
 *   probe signals       prints "ready", then the number of each signal; ends with it on SIGTERM
 *   probe orphans N     leaves N children behind that end after it
 *   probe pause         waits; ends on SIGTERM or SIGINT, reaps children
 */
#define _GNU_SOURCE
#include <errno.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MIB = 1 << 20, PATTERN = 251, PAGE = 4096 };

static void die(const char *what)
{
    fprintf(stderr, "probe: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void alloc(long mib)
{
    for (long i = 0; i < mib; i++) {
        char *block = malloc(MIB);
        if (!block)
            die("malloc");
        for (long at = 0; at < MIB; at += PAGE)
            block[at] = 1;
    }
    printf("allocated %ld\n", mib);
    fflush(stdout);
    pause();
}

static void write_pattern(long total)
{
    unsigned char block[PATTERN * 256];
    for (size_t i = 0; i < sizeof block; i++)
        block[i] = i % PATTERN;
    for (long done = 0; done < total;) {
        size_t start = done % sizeof block, want = sizeof block - start;
        if ((long)want > total - done)
            want = total - done;
        ssize_t wrote = write(1, block + start, want);
        if (wrote < 0)
            die("write");
        done += wrote;
    }
}

static void status(void)
{
    static const struct { int which; const char *name; } limits[] = {
        {RLIMIT_NOFILE, "nofile"}, {RLIMIT_NPROC, "nproc"}, {RLIMIT_CORE, "core"},
        {RLIMIT_MEMLOCK, "memlock"}, {RLIMIT_STACK, "stack"},
    };
    static const char *const wanted[] = {"Cap", "NoNewPrivs", "Seccomp:", "Groups"};
    printf("Effective uid: %d\nuid %d gid %d egid %d\n", geteuid(), getuid(), getgid(), getegid());
    FILE *file = fopen("/proc/self/status", "r");
    if (!file)
        die("/proc/self/status");
    char line[4096];
    while (fgets(line, sizeof line, file))
        for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
            if (!strncmp(line, wanted[i], strlen(wanted[i])))
                fputs(line, stdout);
    fclose(file);
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        struct rlimit limit;
        if (getrlimit(limits[i].which, &limit))
            die("getrlimit");
        printf("rlimit %s %lld %lld\n", limits[i].name, (long long)limit.rlim_cur, (long long)limit.rlim_max);
    }
}

static void fork_children(long count)
{
    long started = 0;
    for (; started < count; started++) {
        pid_t pid = fork();
        if (pid < 0) {
            printf("fork: %s\n", strerror(errno));
            break;
        }
        if (!pid)
            for (;;)
                pause();
    }
    printf("children %ld\n", started);
    fflush(stdout);
    pause();
}

static void signals(void)
{
    sigset_t all;
    int number;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    puts("ready");
    fflush(stdout);
    while (!sigwait(&all, &number)) {
        printf("signal %d\n", number);
        fflush(stdout);
        if (number == SIGTERM)
            exit(number);
    }
}

static void orphans(long count)
{
    for (; count > 0; count--)
        if (!fork()) {
            while (getppid() != 1)
                usleep(1000);
            _exit(0);
        }
}

static void wait_and_reap(void)
{
    sigset_t all;
    int number;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    while (!sigwait(&all, &number)) {
        if (number == SIGTERM || number == SIGINT)
            exit(0);
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
    }
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    long number = argc > 2 ? atol(argv[2]) : 0;
    if (!strcmp(what, "alloc"))
        alloc(number);
    else if (!strcmp(what, "write"))
        write_pattern(number);
    else if (!strcmp(what, "status"))
        status();
    else if (!strcmp(what, "fork"))
        fork_children(number);
    else if (!strcmp(what, "signals"))
        signals();
    else if (!strcmp(what, "orphans"))
        orphans(number);
    else if (!strcmp(what, "pause"))
        wait_and_reap();
    else {
        fprintf(stderr, "probe: alloc MIB | write BYTES | status | fork N | signals | orphans N | pause\n");
        return 2;
    }
    return 0;
}
