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
 * The callbacks run in the thread that runs trio, inside fuse_session_process_buf, and return at once. Each gets an
 * Answer, which is called now or later with what the request gets: bytes, an int for the offset of lseek, None for mere
 * success, or an FsError. Only its first call counts, and none once the session is over: libfuse has freed the request.
 * One that is dropped without a call is EIO: no reader waits for ever.
 *
 * In the same way fuse_session_receive_buf is ours. A trip through trio for the request, and one more for the reply of
 * the NBD server, cost several times what answering a small read does. So reads never get to pyfuse3:
 *
 *     pyfuse3 --receive_buf--> receive a request --another one--> pyfuse3
 *                                 ^       '--a read--> handle.read ... poll: a socket --> its callable --> answer
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
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#define PATIENCE 500000L  /* ns without an event after which the event loop has its turn */
#define LONGEST 5000000L  /* ns after which it has its turn in any case */
#define LOOKING 100000L   /* ns that is looked for an event before the processor is given away */
#define MOST_SOCKETS 64   /* that are looked at without the event loop */
#define SMALL 65536       /* bytes of a read */

static PyObject *on_fallocate, *on_ioctl, *on_lseek, *on_defect; /* callables, set by install() */
static PyObject *handles; /* a dict: file handle -> what has read(offset, length, answer) */
static PyObject *sockets; /* a dict: file descriptor -> callable */
static int extended;      /* has a session been made with our table? */
static int is_over;       /* may no request be answered any more? */
static int needs_loop;    /* does a task work, which the event loop has to run? */
static int was_small;     /* was the last read one? */

typedef struct {
    PyObject_HEAD
    vectorcallfunc vectorcall;
    fuse_req_t request; /* NULL once it was answered */
} Answer;

static PyObject *read_name;

static void answer_errno(PyObject *answer, int number)
{
    fuse_req_t request = ((Answer *)answer)->request;

    ((Answer *)answer)->request = NULL;
    if (request && !is_over)
        fuse_reply_err(request, number);
}

/* answer(content) */
static PyObject *answer_call(PyObject *self, PyObject *const *arguments, size_t count, PyObject *names)
{
    fuse_req_t request = ((Answer *)self)->request;
    PyObject *content = PyVectorcall_NARGS(count) == 1 ? arguments[0] : NULL, *number;
    Py_buffer bytes;

    if (!content)
        return PyErr_Format(PyExc_TypeError, "an answer takes what the request gets");
    if (!request || is_over)
        Py_RETURN_NONE;
    if (PyObject_CheckBuffer(content)) {
        if (PyObject_GetBuffer(content, &bytes, PyBUF_SIMPLE) < 0)
            return NULL;
        ((Answer *)self)->request = NULL;
        fuse_reply_buf(request, bytes.buf, (size_t)bytes.len);
        PyBuffer_Release(&bytes);
    } else if (PyLong_Check(content)) {
        ((Answer *)self)->request = NULL;
        fuse_reply_lseek(request, PyLong_AsLongLong(content));
    } else if (content == Py_None) {
        answer_errno(self, 0);
    } else {
        if (!(number = PyObject_GetAttrString(content, "errno")))
            return NULL;
        answer_errno(self, (int)PyLong_AsLong(number));
        Py_DECREF(number);
    }
    return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
}

static void answer_dealloc(PyObject *self)
{
    answer_errno(self, EIO);
    Py_TYPE(self)->tp_free(self);
}

static PyTypeObject answer_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "qfsbackup.fuse._ops.Answer",
    .tp_doc = "What one request gets is what this is called with.",
    .tp_basicsize = sizeof(Answer),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL,
    .tp_vectorcall_offset = offsetof(Answer, vectorcall),
    .tp_call = PyVectorcall_Call,
    .tp_dealloc = answer_dealloc,
};

static PyObject *answer_to(fuse_req_t request)
{
    Answer *answer = PyObject_New(Answer, &answer_type);

    if (!answer)
        return NULL;
    answer->vectorcall = answer_call;
    answer->request = request;
    return (PyObject *)answer;
}

/* A call has raised, and so its request gets EIO. on_defect is told what it raised; what that raises goes to
 * sys.unraisablehook, as all else here does (see defects.py). */
static void failed(PyObject *answer)
{
    PyObject *type, *value, *traceback, *result;

    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback)
        PyException_SetTraceback(value, traceback);
    if (answer)
        answer_errno(answer, EIO);
    result = PyObject_CallOneArg(on_defect, value);
    if (!result)
        PyErr_WriteUnraisable(on_defect);
    Py_XDECREF(result);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
}

/* Calls `callable(*arguments)`, of which the first is an Answer; steals `arguments`. Needs the GIL. */
static void dispatch(PyObject *callable, PyObject *arguments)
{
    PyObject *result = arguments ? PyObject_CallObject(callable, arguments) : NULL;

    if (!result)
        failed(arguments ? PyTuple_GET_ITEM(arguments, 0) : NULL);
    Py_XDECREF(result);
    Py_XDECREF(arguments);
}

static void op_fallocate(fuse_req_t request, fuse_ino_t inode, int mode, off_t offset, off_t length,
                         struct fuse_file_info *info)
{
    PyGILState_STATE gil = PyGILState_Ensure();

    dispatch(on_fallocate, Py_BuildValue("NKiLL", answer_to(request), (unsigned long long)info->fh, mode,
                                         (long long)offset, (long long)length));
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
    dispatch(on_ioctl, Py_BuildValue("NKIy#", answer_to(request), (unsigned long long)info->fh, command,
                                     content ? content : "", (Py_ssize_t)length));
    PyGILState_Release(gil);
}

static void op_lseek(fuse_req_t request, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *info)
{
    PyGILState_STATE gil = PyGILState_Ensure();

    dispatch(on_lseek, Py_BuildValue("NKLi", answer_to(request), (unsigned long long)info->fh, (long long)offset,
                                     whence));
    PyGILState_Release(gil);
}

static void op_read(fuse_req_t request, fuse_ino_t inode, size_t length, off_t offset, struct fuse_file_info *info)
{
    PyGILState_STATE gil = PyGILState_Ensure();

    PyObject *number = PyLong_FromUnsignedLongLong(info->fh), *result = NULL;
    PyObject *arguments[] = {Py_XNewRef(number ? PyDict_GetItemWithError(handles, number) : NULL),
                             PyLong_FromLongLong(offset), PyLong_FromSize_t(length), answer_to(request)};
    size_t i;

    was_small = length <= SMALL;
    if (arguments[0] && arguments[1] && arguments[2] && arguments[3])
        result = PyObject_VectorcallMethod(read_name, arguments, 4, NULL);
    else if (!PyErr_Occurred())
        PyErr_SetObject(PyExc_KeyError, number);
    if (!result)
        failed(arguments[3]);
    Py_XDECREF(result);
    Py_XDECREF(number);
    for (i = 0; i < 4; i++)
        Py_XDECREF(arguments[i]);
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
    if (!handles)
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
 * reads somebody always can, and we would come last. If looking was in vain, the next call does not look. Needs the GIL,
 * and gives it away unless something is there at once. */
static int wait_for_event(struct pollfd *polled, int count, long longest)
{
    static long looking = LOOKING;
    const struct timespec at_once = {0, 0}, wait = {0, longest};
    int ready = ppoll(polled, count, &at_once, NULL);
    long begin, waited = 0;

    if (ready)
        return ready;
    Py_BEGIN_ALLOW_THREADS
    begin = now();
    while (!ready && was_small && waited < looking && waited < longest) {
        sched_yield();
        ready = ppoll(polled, count, &at_once, NULL);
        waited = now() - begin;
    }
    if (!ready && waited < longest) {
        ready = ppoll(polled, count, &wait, NULL);
        looking = now() - begin < LOOKING ? LOOKING : 0;
    }
    Py_END_ALLOW_THREADS
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
        ready = wait_for_event(polled, count + 1, left < PATIENCE ? left : PATIENCE);
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

        if (length <= 0 || !handles || !is_read(buffer, length))
            return length;
        fuse_session_process_buf(session, buffer);
    } while (!needs_loop && next_request(polled.fd, until));
    return -EINTR;
}

static PyObject *install(PyObject *self, PyObject *arguments)
{
    PyObject *fallocate, *ioctl, *lseek, *defect, *opened, *dict;

    if (!PyArg_ParseTuple(arguments, "OOOOO!O!", &fallocate, &ioctl, &lseek, &defect, &PyDict_Type, &opened, &PyDict_Type, &dict))
        return NULL;
    Py_XSETREF(on_fallocate, Py_NewRef(fallocate));
    Py_XSETREF(on_ioctl, Py_NewRef(ioctl));
    Py_XSETREF(on_lseek, Py_NewRef(lseek));
    Py_XSETREF(handles, Py_NewRef(opened));
    Py_XSETREF(on_defect, Py_NewRef(defect));
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

static PyObject *is_extended(PyObject *self, PyObject *unused)
{
    return PyBool_FromLong(extended);
}

static PyMethodDef methods[] = {
    {"install", install, METH_VARARGS,
     "install(fallocate, ioctl, lseek, defect, handles, sockets): fallocate(answer, fh, mode, offset, length), ioctl(answer,\n"
     "fh, command, content), lseek(answer, fh, offset, whence); defect(exception), for what these and read raise;\n"
     "handles: {fh: what has read(offset, length, answer)}; sockets: {descriptor: what to call when it is readable}, looked\n"
     "at without the event loop."},
    {"needs_loop", set_needs_loop, METH_O, "needs_loop(flag): is there a task that the event loop has to run."},
    {"end", end, METH_NOARGS, "end(): the session is over, and no request may be answered any more."},
    {"is_extended", is_extended, METH_NOARGS, "Has a FUSE session been made with our operations?"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_ops", "What pyfuse3 does not do, or not fast enough", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__ops(void)
{
    PyObject *module = PyModule_Create(&definition);

    read_name = PyUnicode_InternFromString("read");
    return module && read_name && PyModule_AddType(module, &answer_type) == 0 ? module : NULL;
}
