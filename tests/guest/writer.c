/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * writer - keeps disks busy with content that can be checked.
 *
 *   writer    [-d] [-n COUNT] [-s SEED] [-w START:LENGTH] DEVICE...   random writes, read back now and then
 *   writer -o [-d] [-n COUNT]                              DEVICE...   ordered records, for "is a prefix" checks
 *
 * With -d each write is on the disk (O_DSYNC: written and flushed) before the next one.
 *
 * Every sector written is self-describing (little endian words of 64 bit):
 *
 *   | MAGIC | device (0, 1, ..) | byte offset | sequence (from 1) | 60 times hash(device, offset, sequence) |
 *
 * Ordered: record k (from 1) is one block of 4096 bytes. With N devices of S blocks each, j = k - 1 goes to device j % N,
 * block ((j / N) % S) * STRIDE % S; it is complete before k + 1 starts. So the state of all disks at any instant is that of
 * records 1..K for some K.
 *
 * Runs until SIGTERM or SIGINT (or COUNT writes), then prints one line of JSON. Exit status 0: no error, no wrong sector.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <linux/fs.h>

#define MAGIC UINT64_C(0x5453455453465121)
#define STRIDE UINT64_C(2654435761)
#define SECTOR 512
#define WORDS (SECTOR / 8)
#define RECORD 4096
#define MAX_BLOCK (256 * 1024)
#define MAX_DEVICES 16
#define VERIFY_EVERY 8
#define BUCKETS (64 * 16)

struct device {
    const char *path;
    int fd;
    uint64_t start, length; /* the window that is written, in bytes */
    uint64_t *sequences;    /* the last sequence of each sector of the window; 0 is unknown */
};

static struct device devices[MAX_DEVICES];
static unsigned device_count;
static volatile sig_atomic_t stopped;
static uint64_t buckets[BUCKETS], writes, errors, verified, wrong, longest;
static int first_errno;
static uint64_t random_state = 1;

static void on_signal(int number)
{
    (void)number;
    stopped = 1;
}

static void fail(const char *what)
{
    fprintf(stderr, "writer: %s: %s\n", what, strerror(errno));
    exit(2);
}

static uint64_t mix(uint64_t x) /* splitmix64's finalizer */
{
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static uint64_t next_random(uint64_t below)
{
    random_state += UINT64_C(0x9e3779b97f4a7c15);
    return mix(random_state) % below;
}

static void fill(uint64_t *sector, uint64_t device, uint64_t offset, uint64_t sequence)
{
    uint64_t hash = mix(mix(mix(device) + offset) + sequence);
    sector[0] = MAGIC;
    sector[1] = device;
    sector[2] = offset;
    sector[3] = sequence;
    for (int i = 4; i < WORDS; i++)
        sector[i] = hash;
}

static uint64_t microseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* Buckets of a sixteenth of a power of two: a percentile is at most 6 % too high. */
static unsigned bucket_of(uint64_t value)
{
    if (value < 16)
        return (unsigned)value;
    unsigned top = 63 - (unsigned)__builtin_clzll(value);
    return (top - 3) * 16 + (unsigned)((value >> (top - 4)) & 15);
}

static uint64_t bucket_end(unsigned bucket)
{
    if (bucket < 16)
        return bucket;
    unsigned top = bucket / 16 + 3;
    return ((UINT64_C(16) + bucket % 16 + 1) << (top - 4)) - 1;
}

static uint64_t percentile(unsigned percent)
{
    uint64_t total = 0, seen = 0;
    for (unsigned i = 0; i < BUCKETS; i++)
        total += buckets[i];
    for (unsigned i = 0; i < BUCKETS; i++) {
        seen += buckets[i];
        if (total && seen * 100 >= total * percent)
            return bucket_end(i) < longest ? bucket_end(i) : longest;
    }
    return 0;
}

static void note_error(ssize_t done)
{
    errors++;
    if (!first_errno)
        first_errno = done < 0 ? errno : EIO;
}

static bool write_block(const struct device *device, const void *buffer, size_t size, uint64_t offset)
{
    uint64_t begin = microseconds();
    ssize_t done = pwrite(device->fd, buffer, size, (off_t)offset);
    uint64_t took = microseconds() - begin;
    writes++;
    buckets[bucket_of(took)]++;
    if (took > longest)
        longest = took;
    if (done != (ssize_t)size)
        note_error(done);
    return done == (ssize_t)size;
}

static void open_device(struct device *device, const char *path, int flags, uint64_t start, uint64_t length)
{
    uint64_t size;
    struct stat status;
    device->path = path;
    device->fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC | flags);
    if (device->fd < 0 || fstat(device->fd, &status) < 0)
        fail(path);
    if (!S_ISBLK(status.st_mode))
        size = (uint64_t)status.st_size;
    else if (ioctl(device->fd, BLKGETSIZE64, &size) < 0)
        fail(path);
    device->start = start;
    device->length = length ? length : size - start;
    if (start % SECTOR || device->length % SECTOR || start > size || device->length > size - start || device->length < RECORD) {
        errno = EINVAL;
        fail("the window does not fit the device");
    }
}

static void verify(const struct device *device, uint64_t *buffer, size_t size, uint64_t offset)
{
    static uint64_t expected[WORDS];
    ssize_t done = pread(device->fd, buffer, size, (off_t)offset);
    if (done != (ssize_t)size) {
        note_error(done);
        return;
    }
    for (size_t i = 0; i < size / SECTOR; i++) {
        uint64_t at = offset + i * SECTOR, sequence = device->sequences[(at - device->start) / SECTOR];
        if (!sequence)
            continue;
        fill(expected, (uint64_t)(device - devices), at, sequence);
        verified++;
        if (memcmp(expected, buffer + i * WORDS, SECTOR) != 0)
            wrong++;
    }
}

static void write_random(uint64_t *buffer, uint64_t sequence)
{
    struct device *device = &devices[sequence % device_count];
    uint64_t most = device->length < MAX_BLOCK ? device->length : MAX_BLOCK;
    size_t size = (size_t)(next_random(most / SECTOR) + 1) * SECTOR;
    if (next_random(2)) /* half of the writes are small ones */
        size = size % RECORD + SECTOR - size % SECTOR;
    uint64_t first = next_random((device->length - size) / SECTOR + 1);
    uint64_t offset = device->start + first * SECTOR;
    for (size_t i = 0; i < size / SECTOR; i++)
        fill(buffer + i * WORDS, (uint64_t)(device - devices), offset + i * SECTOR, sequence);
    bool good = write_block(device, buffer, size, offset);
    for (size_t i = 0; i < size / SECTOR; i++)
        device->sequences[first + i] = good ? sequence : 0;
    if (sequence % VERIFY_EVERY == 0) {
        uint64_t other = next_random(2) ? first : next_random((device->length - size) / SECTOR + 1);
        verify(device, buffer, size, device->start + other * SECTOR);
    }
}

static void write_ordered(uint64_t *buffer, uint64_t sequence)
{
    uint64_t index = sequence - 1, number = index % device_count;
    struct device *device = &devices[number];
    uint64_t blocks = device->length / RECORD;
    uint64_t offset = (index / device_count) % blocks * STRIDE % blocks * RECORD;
    for (size_t i = 0; i < RECORD / SECTOR; i++)
        fill(buffer + i * WORDS, number, offset + i * SECTOR, sequence);
    if (!write_block(device, buffer, RECORD, offset))
        stopped = 1; /* a hole in the sequence would spoil every later check */
}

static int report(void)
{
    printf("{\"writes\": %" PRIu64 ", \"errors\": %" PRIu64 ", \"first_errno\": %d, \"verified\": %" PRIu64
           ", \"verify_failures\": %" PRIu64 ", \"max_us\": %" PRIu64 ", \"p50_us\": %" PRIu64
           ", \"p99_us\": %" PRIu64 "}\n",
           writes, errors, first_errno, verified, wrong, longest, percentile(50), percentile(99));
    return errors || wrong ? 1 : 0;
}

int main(int argc, char **argv)
{
    uint64_t count = UINT64_MAX, start = 0, length = 0;
    bool ordered = false;
    int option, flags = 0;
    while ((option = getopt(argc, argv, "don:s:w:")) != -1) {
        if (option == 'o')
            ordered = true;
        else if (option == 'd')
            flags = O_DSYNC;
        else if (option == 'n')
            count = strtoull(optarg, NULL, 0);
        else if (option == 's')
            random_state = strtoull(optarg, NULL, 0);
        else if (option != 'w' || sscanf(optarg, "%" SCNu64 ":%" SCNu64, &start, &length) != 2)
            return 2;
    }
    if (optind == argc || argc - optind > MAX_DEVICES || (ordered && (start || length))) {
        fprintf(stderr, "usage: writer [-d] [-n COUNT] [-s SEED] [-w START:LENGTH] DEVICE... | writer -o [-d] [-n COUNT] DEVICE...\n");
        return 2;
    }
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    for (; optind < argc; optind++) {
        struct device *device = &devices[device_count++];
        open_device(device, argv[optind], flags, start, length);
        device->sequences = calloc(device->length / SECTOR, sizeof(uint64_t));
        if (!device->sequences)
            fail("no memory");
    }
    void *buffer = aligned_alloc(RECORD, MAX_BLOCK + RECORD);
    if (!buffer)
        fail("no memory");
    for (uint64_t sequence = 1; sequence <= count && !stopped; sequence++) {
        if (ordered)
            write_ordered(buffer, sequence);
        else
            write_random(buffer, sequence);
    }
    return report();
}
