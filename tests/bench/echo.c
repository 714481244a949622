/* The floor that the lease path is measured against: what the kernel takes for two exchanges.
 *
 *   echo server SOCKET A B C D        answers A bytes with B, then C bytes with D, and so on
 *   echo client SOCKET A B C D        reads counts from its input, one a line; for each it does that
 *                                     many pairs of exchanges and prints the nanoseconds they took
 *
 * One process each, blocking calls, one read and one write an exchange wherever the kernel allows.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { LARGEST = 65536 };

static char buffer[LARGEST];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

/* Returns 0 at the peer's end. */
static int read_all(int fd, size_t count)
{
    size_t done = 0;
    while (done < count) {
        ssize_t got = read(fd, buffer + done, count - done);
        if (got < 0)
            fail("read");
        if (got == 0)
            return 0;
        done += (size_t)got;
    }
    return 1;
}

static void write_all(int fd, size_t count)
{
    size_t done = 0;
    while (done < count) {
        ssize_t put = write(fd, buffer + done, count - done);
        if (put < 0)
            fail("write");
        done += (size_t)put;
    }
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void serve(int listener, const size_t *size)
{
    if (listen(listener, 8) < 0)
        fail("listen");
    puts("listening");
    fflush(stdout);
    int fd = accept(listener, NULL, NULL);
    if (fd < 0)
        fail("accept");
    while (read_all(fd, size[0])) {
        write_all(fd, size[1]);
        if (!read_all(fd, size[2]))
            break;
        write_all(fd, size[3]);
    }
}

static void measure(int fd, const size_t *size)
{
    long pairs;
    while (scanf("%ld", &pairs) == 1) {
        int64_t started = now_ns();
        for (long i = 0; i < pairs; i++) {
            write_all(fd, size[0]);
            if (!read_all(fd, size[1]))
                fail("server ended");
            write_all(fd, size[2]);
            if (!read_all(fd, size[3]))
                fail("server ended");
        }
        printf("%lld\n", (long long)(now_ns() - started));
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t size[4];
    if (argc != 7 || strlen(argv[2]) >= sizeof address.sun_path) {
        fputs("usage: echo server|client SOCKET A B C D\n", stderr);
        return 2;
    }
    strcpy(address.sun_path, argv[2]);
    for (int i = 0; i < 4; i++) {
        size[i] = (size_t)strtoul(argv[3 + i], NULL, 10);
        if (size[i] < 1 || size[i] > LARGEST) {
            fputs("sizes are 1 to 65536 bytes\n", stderr);
            return 2;
        }
    }
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0)
        fail("socket");
    if (strcmp(argv[1], "server") == 0) {
        if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
            fail("bind");
        serve(fd, size);
    } else {
        if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
            fail("connect");
        measure(fd, size);
    }
    return 0;
}
