/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Small reads of one disk over a connection of their own, with nothing between the request and the reply of the NBD
 * server that could be left out: a table of what is in flight, libnbd, and the rules by which a read may go this way.
 * All others are refused at once, and so go the ordinary way (disk.py), which knows what is wrong, too.
 *
 *     read(start, length, answer) -> bytes asked for ... the server replies ... receive() -> answer(content)
 *                                '> 0: not here                                        '> failed(start, length, answer)
 *
 * A read is taken if all of it may be read (`allow` says what), in one request that the server answers rightly; if it
 * does not go on where a recent one ended, for such readers are read ahead of; and if it meets neither one of ours in
 * flight nor one of the jobs that go the ordinary way, in flight or waiting (inflight.py). These in turn wait for ours
 * that they meet, until `advance` is called.
 *
 * Whose memory is what:
 *
 * - A slot's buffer is its own. libnbd writes to it from nbd_aio_pread on until nbd_aio_command_completed has told that
 *   the read is over. What is still in use when the lane is closed is never given back, for nobody can say when that is.
 * - What an answer is called with is a copy: of 4 KiB it costs less than whatever would spare it.
 * - The handle is libnbd's; the lane holds a reference to the NBD object, and nobody may close that.
 * - The borders of what may be read are a buffer of an array, which cannot change its size while the lane holds it. No
 *   pointer into it outlives a call: a read in flight does not need them, and so they may change meanwhile.
 * - A lane is for one thread. An answer may call any method of it, `receive` excepted.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <libnbd.h>

#define LONGEST 65536 /* bytes of a read */
#define SLOTS 32      /* reads in flight */
#define RECENT 64     /* ends of reads that are remembered */
#define MOST_JOBS 32  /* of others, that are looked at */

typedef struct {
    int64_t cookie;
    unsigned long long first, last; /* what was asked for, in whole units */
    unsigned long long start;
    Py_ssize_t length;
    PyObject *answer;
    char *buffer; /* of LONGEST bytes, NULL until there is need of one */
} Slot;

typedef struct {
    PyObject_HEAD
    struct nbd_handle *handle;
    PyObject *owner;             /* the NBD object whose handle it is */
    PyObject *blocked;           /* called where the socket did not take all of a request */
    PyObject *running, *waiting; /* a dict and a list: the jobs that go the ordinary way, with `start` and `end` */
    PyObject *advance;
    PyObject *failed;
    Py_buffer data; /* borders as in ranges.py, of what may be read */
    unsigned long long size, unit, border;
    int closed, in_flight;
    Slot slot[SLOTS]; /* the first `in_flight` are in use */
    unsigned long long ends[RECENT];
    unsigned newest;
} Lane;

static PyObject *start_name, *end_name;

/* The number of borders at or below `offset`; odd where it is data. */
static size_t borders_before(const Lane *self, unsigned long long offset)
{
    const unsigned long long *borders = self->data.buf;
    size_t low = 0, high = self->data.len / sizeof *borders;

    while (low < high) {
        size_t middle = (low + high) / 2;

        if (borders[middle] > offset)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* The first data at or behind `offset`. */
static unsigned long long wanted(const Lane *self, unsigned long long offset)
{
    size_t before = borders_before(self, offset), count = self->data.len / sizeof offset;

    return before % 2 ? offset : before < count ? ((unsigned long long *)self->data.buf)[before] : self->size;
}

static int is_data(const Lane *self, unsigned long long first, unsigned long long last)
{
    size_t before = borders_before(self, first);

    return before % 2 && last <= ((unsigned long long *)self->data.buf)[before];
}

/* Does a read that begins here go on where a recent one ended, or behind the hole there? Remembers its own end. */
static int goes_on(Lane *self, unsigned long long start, unsigned long long end)
{
    int i, found = 0;

    start = wanted(self, start);
    for (i = 0; i < RECENT && !found; i++)
        found = self->ends[i] == start;
    self->ends[self->newest++ % RECENT] = wanted(self, end);
    return found;
}

static int meets(const Lane *self, unsigned long long first, unsigned long long last)
{
    int i;

    for (i = 0; i < self->in_flight; i++)
        if (self->slot[i].first < last && first < self->slot[i].last)
            return 1;
    return 0;
}

/* Does a job reach into the range? In doubt it does. */
static int job_meets(PyObject *job, unsigned long long first, unsigned long long last)
{
    PyObject *start = PyObject_GetAttr(job, start_name), *end = PyObject_GetAttr(job, end_name);
    int does = !start || !end ||
               (PyLong_AsUnsignedLongLong(start) < last && first < PyLong_AsUnsignedLongLong(end));

    Py_XDECREF(start);
    Py_XDECREF(end);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return 1;
    }
    return does;
}

static int meets_jobs(const Lane *self, unsigned long long first, unsigned long long last)
{
    Py_ssize_t position = 0, i;
    PyObject *job, *unused;

    if (PyDict_Size(self->running) + PyList_GET_SIZE(self->waiting) > MOST_JOBS)
        return 1;
    while (PyDict_Next(self->running, &position, &job, &unused))
        if (job_meets(job, first, last))
            return 1;
    for (i = 0; i < PyList_GET_SIZE(self->waiting); i++)
        if (job_meets(PyList_GET_ITEM(self->waiting, i), first, last))
            return 1;
    return 0;
}

static int may_go(const Lane *self, unsigned long long first, unsigned long long last)
{
    return !self->closed && first < last && last <= self->size && last - first <= LONGEST &&
           first / self->border == (last - 1) / self->border && self->in_flight < SLOTS && is_data(self, first, last) &&
           !meets(self, first, last) && !meets_jobs(self, first, last);
}

static PyObject *lane_read(Lane *self, PyObject *const *arguments, Py_ssize_t count)
{
    unsigned long long start, length, first, last;
    Slot *slot;

    if (count != 3)
        return PyErr_Format(PyExc_TypeError, "read(start, length, answer)");
    start = PyLong_AsUnsignedLongLong(arguments[0]);
    length = PyLong_AsUnsignedLongLong(arguments[1]);
    if (PyErr_Occurred())
        return NULL;
    if (!self->owner || start > self->size || length > self->size)
        return PyLong_FromLong(0);
    first = start / self->unit * self->unit;
    last = (start + length + self->unit - 1) / self->unit * self->unit;
    if (last > self->size)
        last = self->size;
    if (goes_on(self, start, start + length) || start + length > self->size || !may_go(self, first, last))
        return PyLong_FromLong(0);
    slot = &self->slot[self->in_flight];
    if (!slot->buffer && !(slot->buffer = PyMem_Malloc(LONGEST)))
        return PyErr_NoMemory();
    slot->cookie = nbd_aio_pread(self->handle, slot->buffer, last - first, first, NBD_NULL_COMPLETION, 0);
    if (slot->cookie < 0)
        return PyLong_FromLong(0);
    slot->first = first;
    slot->last = last;
    slot->start = start;
    slot->length = (Py_ssize_t)length;
    slot->answer = Py_NewRef(arguments[2]);
    self->in_flight++;
    if (nbd_aio_get_direction(self->handle) & LIBNBD_AIO_DIRECTION_WRITE) {
        PyObject *result = PyObject_CallNoArgs(self->blocked);

        if (!result)
            PyErr_WriteUnraisable(self->blocked);
        Py_XDECREF(result);
    }
    return PyLong_FromUnsignedLongLong(last - first);
}

/* Takes a read out of the table. Its buffer stays with it. */
static Slot taken_out(Lane *self, int index)
{
    Slot slot = self->slot[index], *last = &self->slot[--self->in_flight];

    self->slot[index] = *last;
    last->buffer = NULL;
    return slot;
}

/* Hands `content` to the answer, or the read to `failed` where it is NULL. What raises is reported and forgotten. */
static void tell(Lane *self, const Slot *slot, PyObject *content)
{
    PyObject *callable = Py_NewRef(content ? slot->answer : self->failed), *result;

    result = content ? PyObject_CallOneArg(callable, content)
                     : PyObject_CallFunction(callable, "KnO", slot->start, slot->length, slot->answer);
    if (!result)
        PyErr_WriteUnraisable(callable);
    Py_XDECREF(result);
    Py_DECREF(callable);
    Py_DECREF(slot->answer);
}

/* Answers the read in a slot, which is then free. */
static void complete(Lane *self, int index, int has_come)
{
    Slot slot = taken_out(self, index), *freed = &self->slot[self->in_flight];
    PyObject *content = has_come ? PyBytes_FromStringAndSize(slot.buffer + (slot.start - slot.first), slot.length) : NULL;

    freed->buffer = slot.buffer;
    if (has_come && !content)
        PyErr_Clear();
    tell(self, &slot, content);
    Py_XDECREF(content);
}

static PyObject *lane_receive(Lane *self, PyObject *unused)
{
    int i, completed = 0;

    if (!self->in_flight || !self->owner)
        Py_RETURN_FALSE;
    nbd_aio_notify_read(self->handle); /* where that fails, so do the reads */
    for (i = 0; i < self->in_flight;) {
        int over = nbd_aio_command_completed(self->handle, self->slot[i].cookie);

        if (over)
            complete(self, i, over == 1);
        else
            i++;
        completed |= over;
    }
    if (completed && PyList_GET_SIZE(self->waiting)) {
        PyObject *result = PyObject_CallNoArgs(self->advance);

        if (!result)
            return NULL;
        Py_DECREF(result);
    }
    return PyBool_FromLong(!nbd_aio_is_dead(self->handle) && !nbd_aio_is_closed(self->handle));
}

static PyObject *lane_meets(Lane *self, PyObject *const *arguments, Py_ssize_t count)
{
    unsigned long long start, end;

    if (count != 2)
        return PyErr_Format(PyExc_TypeError, "meets(start, end)");
    start = PyLong_AsUnsignedLongLong(arguments[0]);
    end = PyLong_AsUnsignedLongLong(arguments[1]);
    return PyErr_Occurred() ? NULL : PyBool_FromLong(meets(self, start, end));
}

static PyObject *lane_allow(Lane *self, PyObject *borders)
{
    Py_buffer data = {0};

    if (borders != Py_None && PyObject_GetBuffer(borders, &data, PyBUF_SIMPLE) < 0)
        return NULL;
    PyBuffer_Release(&self->data);
    self->data = data;
    Py_RETURN_NONE;
}

/* What is still in flight may yet be written to its buffer by libnbd: that memory is never given back. */
static PyObject *lane_close(Lane *self, PyObject *unused)
{
    self->closed = 1;
    while (self->in_flight && self->failed) {
        Slot slot = taken_out(self, 0);

        tell(self, &slot, NULL);
    }
    Py_RETURN_NONE;
}

static int lane_init(Lane *self, PyObject *arguments, PyObject *unused)
{
    PyObject *owner, *blocked, *running, *waiting, *advance, *failed, *capsule;
    int i;

    if (!PyArg_ParseTuple(arguments, "OOO!O!OOKKK", &owner, &blocked, &PyDict_Type, &running, &PyList_Type, &waiting,
                          &advance, &failed, &self->size, &self->unit, &self->border))
        return -1;
    if (!self->unit || !self->border || self->owner) {
        PyErr_SetString(PyExc_ValueError, "unit and border are more than 0, and a lane is made once");
        return -1;
    }
    if (!(capsule = PyObject_GetAttrString(owner, "_o")))
        return -1;
    self->handle = PyCapsule_GetPointer(capsule, "nbd_handle"); /* as libnbd's own Python module makes it */
    Py_DECREF(capsule);
    if (!self->handle)
        return -1;
    self->owner = Py_NewRef(owner);
    self->blocked = Py_NewRef(blocked);
    self->running = Py_NewRef(running);
    self->waiting = Py_NewRef(waiting);
    self->advance = Py_NewRef(advance);
    self->failed = Py_NewRef(failed);
    for (i = 0; i < RECENT; i++)
        self->ends[i] = (unsigned long long)-1;
    return 0;
}

static int lane_traverse(Lane *self, visitproc visit, void *arg)
{
    int i;

    Py_VISIT(self->owner);
    Py_VISIT(self->blocked);
    Py_VISIT(self->running);
    Py_VISIT(self->waiting);
    Py_VISIT(self->advance);
    Py_VISIT(self->failed);
    for (i = 0; i < self->in_flight; i++)
        Py_VISIT(self->slot[i].answer);
    return 0;
}

static int lane_clear(Lane *self)
{
    self->closed = 1;
    Py_CLEAR(self->owner);
    Py_CLEAR(self->blocked);
    Py_CLEAR(self->running);
    Py_CLEAR(self->waiting);
    Py_CLEAR(self->advance);
    Py_CLEAR(self->failed);
    return 0;
}

/* As with lane_close, buffers that are in use stay for ever; here nobody waits any more. */
static void lane_dealloc(Lane *self)
{
    int i;

    PyObject_GC_UnTrack(self);
    lane_clear(self);
    for (i = 0; i < self->in_flight; i++)
        Py_DECREF(self->slot[i].answer);
    for (; i < SLOTS; i++)
        PyMem_Free(self->slot[i].buffer);
    PyBuffer_Release(&self->data);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyMethodDef lane_methods[] = {
    {"read", (PyCFunction)(void (*)(void))lane_read, METH_FASTCALL,
     "read(start, length, answer): how many bytes are asked for; 0: it was not taken, and nothing will be called."},
    {"receive", (PyCFunction)lane_receive, METH_NOARGS,
     "receive(): take the replies that are there; False where none is awaited, or the connection is dead."},
    {"meets", (PyCFunction)(void (*)(void))lane_meets, METH_FASTCALL, "meets(start, end): a read that is in flight?"},
    {"allow", (PyCFunction)lane_allow, METH_O, "allow(borders): these ranges alone may be read; None: nothing."},
    {"close", (PyCFunction)lane_close, METH_NOARGS, "close(): take no more reads; those in flight have failed."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject lane_type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "qfsbackup.nbd._lane.Lane",
    .tp_doc = "Lane(handle, blocked, running, waiting, advance, failed, size, unit, border)",
    .tp_basicsize = sizeof(Lane),
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)lane_init,
    .tp_dealloc = (destructor)lane_dealloc,
    .tp_traverse = (traverseproc)lane_traverse,
    .tp_clear = (inquiry)lane_clear,
    .tp_methods = lane_methods,
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_lane", "Small reads, the short way", -1, NULL, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__lane(void)
{
    PyObject *module = PyModule_Create(&definition);

    start_name = PyUnicode_InternFromString("start");
    end_name = PyUnicode_InternFromString("end");
    if (!module || !start_name || !end_name || PyType_Ready(&lane_type) < 0 ||
        PyModule_AddObjectRef(module, "Lane", (PyObject *)&lane_type) < 0)
        return NULL;
    return module;
}
