/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Adds fallocate, ioctl and lseek to the operation table of pyfuse3, which has none of them, and takes read over, so
 * that reads go on for a while without the event loop. Holds no policy.
 *
 * pyfuse3 builds its table privately and hands it to libfuse's fuse_session_new, an ordinary dynamic symbol. This module
 * defines that symbol too. Loaded with RTLD_GLOBAL *before* pyfuse3, it is found first:
 *
 *     pyfuse3 --fuse_session_new(table)--> this file --fuse_session_new(table + 4)--> libfuse
 *
 * From libfuse 3.17 on fuse_session_new is an inline function over fuse_session_new_versioned, so that one is taken.
 * The callbacks run in the thread that runs trio, inside fuse_session_process_buf, and return at once; the answer is
 * given by one of the reply functions, exactly once a request, now or later.
 *
 * In the same way fuse_session_receive_buf is ours. A trip through trio for the request, and one more for the reply of
 * the NBD server, cost several times what answering a small read does. So reads never get to pyfuse3:
 *
 *     pyfuse3 --receive_buf--> receive a request --another one--> pyfuse3
 *                                 ^       '--a read--> on_read ... poll: a socket --> its callable --> answer
 *                                 '----------------------------------'  '--nothing came, or LONGEST is over--> EINTR
 */
#define FUSE_USE_VERSION 312
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define PATIENCE 500000L  /* ns without an event after which the event loop has its turn */
#define LONGEST 5000000L  /* ns after which it has its turn in any case */
#define LOOKING 100000L   /* ns that is looked for an event before the processor is given away */
#define MOST_SOCKETS 64   /* that are looked at without the event loop */
#define SMALL 65536       /* bytes of a read */

static PyObject *on_fallocate, *on_ioctl, *on_lseek, *on_read; /* callables, set by install() */
static PyObject *sockets; /* a dict: file descriptor -> callable */
static int extended;      /* has a session been made with our table? */
static int is_over;       /* may no request be answered any more? */
static int needs_loop;    /* does a task work, which the event loop has to run? */
static int was_small;     /* was the last read one? */

/* Calls `callable(*arguments)`; steals `arguments`. A callback that raises is answered with EIO, and its exception goes
 * to sys.unraisablehook, as do all here (see defects.py). Needs the GIL. */
static void dispatch(PyObject *callable, PyObject *arguments, fuse_req_t request)
{
    PyObject *result;

    Py_INCREF(callable); /* it is borrowed from a variable, which the call may change */
    result = arguments ? PyObject_CallObject(callable, arguments) : NULL;
    if (!result) {
        PyErr_WriteUnraisable(callable);
        fuse_reply_err(request, EIO);
    }
    Py_XDECREF(result);
    Py_XDECREF(arguments);
    Py_DECREF(callable);
}

static void op_fallocate(fuse_req_t request, fuse_ino_t inode, int mode, off_t offset, off_t length,
                         struct fuse_file_info *info)
{
    PyGILState_STATE gil = PyGILState_Ensure();

    dispatch(on_fallocate,
             Py_BuildValue("KKiLL", (unsigned long long)(uintptr_t)request, (unsigned long long)info->fh, mode,
                           (long long)offset, (long long)length),
             request);
    PyGILState_Release(gil);
}

/* The kernel has copied in what the command's number says; there is nothing to copy out. */
static void op_ioctl(fuse_req_t request, fuse_ino_t inode, unsigned command, void *argument, struct fuse_file_info *info,
                     unsigned flags, const void *content, size_t length, size_t unused)
{
    PyGILState_STATE gil;

    if (flags & FUSE_IOCTL_DIR) {
        fuse_reply_err(request, ENOTTY);
        return;
    }
    gil = PyGILState_Ensure();
    dispatch(on_ioctl,
             Py_BuildValue("KKIy#", (unsigned long long)(uintptr_t)request, (unsigned long long)info->fh,
                           command, content ? content : "", (Py_ssize_t)length),
             request);
    PyGILState_Release(gil);
}

static void op_lseek(fuse_req_t request, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *info)
{
    PyGILState_STATE gil = PyGILState_Ensure();

    dispatch(on_lseek,
             Py_BuildValue("KKLi", (unsigned long long)(uintptr_t)request, (unsigned long long)info->fh,
                           (long long)offset, whence),
             request);
    PyGILState_Release(gil);
}

static void op_read(fuse_req_t request, fuse_ino_t inode, size_t length, off_t offset, struct fuse_file_info *info)
{
    PyGILState_STATE gil = PyGILState_Ensure();

    was_small = length <= SMALL;
    dispatch(on_read,
             Py_BuildValue("KKLn", (unsigned long long)(uintptr_t)request, (unsigned long long)info->fh,
                           (long long)offset, (Py_ssize_t)length),
             request);
    PyGILState_Release(gil);
}

/* libfuse's own function of that name: looked up in the very library that our other calls go to. */
static void *libfuse_symbol(const char *name)
{
    Dl_info library;
    void *handle, *symbol;

    if (!dladdr((void *)fuse_reply_err, &library))
        return NULL;
    handle = dlopen(library.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle)
        return NULL;
    symbol = dlsym(handle, name);
    dlclose(handle);
    return symbol;
}

static void extend(struct fuse_lowlevel_ops *table, const struct fuse_lowlevel_ops *given, size_t size)
{
    memset(table, 0, sizeof *table);
    memcpy(table, given, size < sizeof *table ? size : sizeof *table);
    if (!on_read)
        return;
    table->fallocate = op_fallocate;
    table->ioctl = op_ioctl;
    table->lseek = op_lseek;
    table->read = op_read;
    extended = 1;
}

#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 17)

struct fuse_session *fuse_session_new_versioned(struct fuse_args *args, const struct fuse_lowlevel_ops *given,
                                                size_t size, struct libfuse_version *version, void *userdata)
{
    struct fuse_lowlevel_ops table;
    __typeof__(fuse_session_new_versioned) *real = libfuse_symbol("fuse_session_new_versioned");

    extend(&table, given, size);
    return real ? real(args, &table, sizeof table, version, userdata) : NULL;
}

#else

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *given, size_t size,
                                      void *userdata)
{
    struct fuse_lowlevel_ops table;
    __typeof__(fuse_session_new) *real = libfuse_symbol("fuse_session_new");

    extend(&table, given, size);
    return real ? real(args, &table, sizeof table, userdata) : NULL;
}

#endif

static long now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000L + time.tv_nsec;
}

/* Calls what belongs to the sockets that are readable. Needs the GIL. */
static void call_ready(const struct pollfd *polled, PyObject **callables, int count)
{
    int i;

    for (i = 0; i < count; i++) {
        if (polled[i].revents) {
            PyObject *result = PyObject_CallNoArgs(callables[i]);

            if (!result)
                PyErr_WriteUnraisable(callables[i]);
            Py_XDECREF(result);
        }
    }
}

/* poll(2) for at most `longest` ns. For small reads at first without sleeping: where the machine is idle but for reader
 * and server, being woken up takes longer than such a read. Whoever else can run on this processor does; with large
 * reads somebody always can, and we would come last. If looking was in vain, the next call does not look. */
static int wait_for_event(struct pollfd *polled, int count, long longest)
{
    static long looking = LOOKING;
    const struct timespec at_once = {0, 0}, wait = {0, longest};
    long begin = now(), waited = 0;
    int ready = ppoll(polled, count, &at_once, NULL);

    while (!ready && was_small && waited < looking && waited < longest) {
        sched_yield();
        ready = ppoll(polled, count, &at_once, NULL);
        waited = now() - begin;
    }
    if (ready || waited >= longest)
        return ready;
    ready = ppoll(polled, count, &wait, NULL);
    looking = now() - begin < LOOKING ? LOOKING : 0;
    return ready;
}

/* Waits until the session's descriptor is readable, and lets sockets be read meanwhile. 0 where the event loop should
 * have its turn; `until` is when at the latest, in ns. Needs the GIL. */
static int next_request(int session, long until)
{
    struct pollfd polled[MOST_SOCKETS + 1];
    PyObject *callables[MOST_SOCKETS], *key;

    for (;;) {
        Py_ssize_t position = 0;
        long left = until - now();
        int count = 0, ready, i;

        if (left <= 0)
            return 0;
        /* References of our own: while the GIL is released, and by the calls, others may go out of the dict. */
        while (count < MOST_SOCKETS && PyDict_Next(sockets, &position, &key, &callables[count])) {
            Py_INCREF(callables[count]);
            polled[count++] = (struct pollfd){.fd = (int)PyLong_AsLong(key), .events = POLLIN};
        }
        polled[count] = (struct pollfd){.fd = session, .events = POLLIN};
        Py_BEGIN_ALLOW_THREADS
        ready = wait_for_event(polled, count + 1, left < PATIENCE ? left : PATIENCE);
        Py_END_ALLOW_THREADS
        if (ready > (polled[count].revents != 0))
            call_ready(polled, callables, count);
        for (i = 0; i < count; i++)
            Py_DECREF(callables[i]);
        if (ready <= 0)
            return 0;
        if (polled[count].revents)
            return 1;
    }
}

static int is_read(const struct fuse_buf *buffer, int length)
{
    const struct fuse_in_header *header = buffer->mem;

    return !(buffer->flags & FUSE_BUF_IS_FD) && length >= (int)sizeof *header && header->opcode == FUSE_READ;
}

/* In the place of libfuse's. -EINTR, after which pyfuse3 comes back through the event loop, where there is no request
 * for pyfuse3 itself. Needs the GIL. */
int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buffer)
{
    static __typeof__(fuse_session_receive_buf) *receive;
    struct pollfd polled = {.fd = fuse_session_fd(session), .events = POLLIN};
    long until = now() + LONGEST;

    if (!receive)
        receive = libfuse_symbol("fuse_session_receive_buf");
    if (!receive)
        return -ENOSYS;
    if (poll(&polled, 1, 0) == 0)
        return -EINTR; /* it was taken without the event loop */
    do {
        int length = receive(session, buffer);

        if (length <= 0 || !on_read || !is_read(buffer, length))
            return length;
        fuse_session_process_buf(session, buffer);
    } while (!needs_loop && next_request(polled.fd, until));
    return -EINTR;
}

static PyObject *install(PyObject *self, PyObject *arguments)
{
    PyObject *fallocate, *ioctl, *lseek, *read, *dict;

    if (!PyArg_ParseTuple(arguments, "OOOOO!", &fallocate, &ioctl, &lseek, &read, &PyDict_Type, &dict))
        return NULL;
    Py_XSETREF(on_fallocate, Py_NewRef(fallocate));
    Py_XSETREF(on_ioctl, Py_NewRef(ioctl));
    Py_XSETREF(on_lseek, Py_NewRef(lseek));
    Py_XSETREF(on_read, Py_NewRef(read));
    Py_XSETREF(sockets, Py_NewRef(dict));
    Py_RETURN_NONE;
}

static PyObject *set_needs_loop(PyObject *self, PyObject *flag)
{
    needs_loop = PyObject_IsTrue(flag);
    Py_RETURN_NONE;
}

static PyObject *end(PyObject *self, PyObject *unused)
{
    is_over = 1;
    Py_RETURN_NONE;
}

static PyObject *answer(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    fuse_req_t request = count == 2 ? (fuse_req_t)(uintptr_t)PyLong_AsUnsignedLongLong(arguments[0]) : NULL;
    Py_buffer content;
    PyObject *number;

    if (!request)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "answer(request, content)");
    if (is_over)
        Py_RETURN_NONE;
    if (PyObject_CheckBuffer(arguments[1])) {
        if (PyObject_GetBuffer(arguments[1], &content, PyBUF_SIMPLE) < 0)
            return NULL;
        fuse_reply_buf(request, content.buf, (size_t)content.len);
        PyBuffer_Release(&content);
        Py_RETURN_NONE;
    }
    if (!(number = PyObject_GetAttrString(arguments[1], "errno")))
        return NULL;
    fuse_reply_err(request, (int)PyLong_AsLong(number));
    Py_DECREF(number);
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static PyObject *is_extended(PyObject *self, PyObject *unused)
{
    return PyBool_FromLong(extended);
}

static PyObject *reply_errno(PyObject *self, PyObject *arguments)
{
    unsigned long long request;
    int number;

    if (!PyArg_ParseTuple(arguments, "Ki", &request, &number))
        return NULL;
    fuse_reply_err((fuse_req_t)(uintptr_t)request, number);
    Py_RETURN_NONE;
}

static PyObject *reply_offset(PyObject *self, PyObject *arguments)
{
    unsigned long long request;
    long long offset;

    if (!PyArg_ParseTuple(arguments, "KL", &request, &offset))
        return NULL;
    fuse_reply_lseek((fuse_req_t)(uintptr_t)request, offset);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"install", install, METH_VARARGS,
     "install(fallocate, ioctl, lseek, read, sockets): fallocate(request, fh, mode, offset, length), ioctl(request, fh,\n"
     "command, content), lseek(request, fh, offset, whence), read(request, fh, offset, length); sockets: {descriptor:\n"
     "what to call when it is readable}, looked at without the event loop."},
    {"answer", (PyCFunction)(void (*)(void))answer, METH_FASTCALL,
     "answer(request, content): the bytes that a request gets, or an FsError; nothing once the session is over."},
    {"needs_loop", set_needs_loop, METH_O, "needs_loop(flag): is there a task that the event loop has to run."},
    {"end", end, METH_NOARGS, "end(): the session is over, and no request may be answered any more."},
    {"is_extended", is_extended, METH_NOARGS, "Has a FUSE session been made with our operations?"},
    {"reply_errno", reply_errno, METH_VARARGS, "reply_errno(request, errno): errno 0 is success."},
    {"reply_offset", reply_offset, METH_VARARGS, "reply_offset(request, offset): the answer of lseek."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_ops", "What pyfuse3 does not do, or not fast enough", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__ops(void)
{
    return PyModule_Create(&definition);
}
